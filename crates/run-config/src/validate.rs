//! From a raw configuration to a valid one: every key, its default and its range.

use std::path::PathBuf;

use lora_core::{ExcludeModules, Init, LoraConfig, LoraError, TargetModules};

use super::error::{ConfigError, Problem, Problems, nearest};
use super::raw::RawConfig;
use super::reader::{Parsed, Reader, boolean, bytes, number, text, whole, whole_up_to, word};
use super::value::Value;
use super::words::{BatchSize, Checkpointing};
use super::{Config, files};
use crate::Decay;
use data::{Columns, Format, PromptTemplate};

/// The linear modules of a Llama's decoder layers.
const LINEAR_MODULES: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

const MODEL: &str = "the folder of a Hugging Face model, its name on the Hub, or \"embedded\"";
/// The keys that say what adapters are like. Dropout is not among them: it is a training's own affair.
const LORA_KEYS: [&str; 10] = [
    "lora_r",
    "lora_alpha",
    "peft_use_rslora",
    "peft_use_dora",
    "target_modules",
    "layers_to_transform",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
];

const DATA: &str = "the path of a file of rows (JSON lines, JSON, CSV, Parquet), or \"embedded\"";
const POSITIVE: &str = "a number above 0";
const FRACTION: &str = "a number of at least 0 and below 1";
const NOT_NEGATIVE: &str = "a number of at least 0";

/// Checks every key and says everything that is wrong; `problems` are those found before.
pub(super) fn validate(raw: RawConfig, problems: Vec<Problem>) -> Result<Config, ConfigError> {
    let mut source = raw.source.clone();
    let default_output = PathBuf::from("runs").join(&raw.name);
    let mut reader = Reader::new(raw, problems);
    let r = &mut reader;

    let positive = || number(POSITIVE, |x| x > 0.0);
    let fraction = || number(FRACTION, |x| (0.0..1.0).contains(&x));
    let not_negative = || number(NOT_NEGATIVE, |x| x >= 0.0);
    let path = |path: String| files::resolve(&path, &source);

    let base_model = r.required("base_model", MODEL, text(MODEL)).map(path);
    let base_model = base_model.map(|path| path.to_string_lossy().into_owned());
    let dataset_path = r.required("dataset_path", DATA, text(DATA)).map(path);
    let val_dataset_path = r
        .optional("val_dataset_path", text("the path of a file of rows"))
        .map(path);
    let default_val_size = if val_dataset_path.is_some() {
        0.0
    } else {
        0.05
    };
    let val_set_size = r.or("val_set_size", default_val_size, val_set_size);
    if val_dataset_path.is_some() && val_set_size > 0.0 {
        r.problem(
            "val_set_size",
            "must be 0, or left out, beside val_dataset_path: rows for \
            validation come from one of the two",
        );
    }
    let max_seq_len = r.or("max_seq_len", 4096, whole(2));
    let max_batch_tokens = r.optional("max_batch_tokens", whole(2));
    if max_batch_tokens.is_some_and(|tokens| tokens < max_seq_len) {
        r.problem(
            "max_batch_tokens",
            &format!(
                "must be at least max_seq_len, which is {max_seq_len}: \
            a row is never cut"
            ),
        );
    }

    let target_modules = r.or(
        "target_modules",
        LoraConfig::default().target_modules,
        target_modules,
    );
    let layers_to_transform = r.optional("layers_to_transform", layers);
    if layers_to_transform.is_some() && !matches!(target_modules, TargetModules::Names(_)) {
        r.problem(
            "layers_to_transform",
            "cannot be used when target_modules is a string (as in PEFT); \
            list the module names, as in [\"q_proj\", \"v_proj\"]",
        );
    }
    let init_adapter = r
        .optional("init_adapter", text("the folder of a PEFT adapter"))
        .map(path);

    let warmup_steps = r.or("warmup_steps", 0, whole(0));
    let default_ratio = if r.has("warmup_steps") { 0.0 } else { 0.03 };
    let warmup_ratio = r.or("warmup_ratio", default_ratio, fraction());
    if warmup_steps > 0 && warmup_ratio > 0.0 {
        r.problem(
            "warmup_ratio",
            "must be 0, or left out, beside warmup_steps: the warm-up has one length",
        );
    }

    for (steps, per_epoch) in [
        ("eval_steps", "evals_per_epoch"),
        ("save_steps", "saves_per_epoch"),
    ] {
        if r.is_on(steps) && r.is_on(per_epoch) {
            r.problem(
                per_epoch,
                &format!("must be \"none\", or left out, beside {steps}"),
            );
        }
    }

    let save_minutes = if r.has("save_minutes") {
        r.optional("save_minutes", positive())
    } else {
        Some(5.0)
    };
    let save_total_limit = if r.has("save_total_limit") {
        r.optional("save_total_limit", whole(1))
    } else {
        Some(2)
    };

    let config = Config {
        base_model: base_model.unwrap_or_default(),
        dataset_path: dataset_path.unwrap_or_default(),
        val_dataset_path,
        val_set_size,
        dataset_format: r.or("dataset_format", None, dataset_format),
        dataset_columns: r
            .optional("dataset_columns", dataset_columns)
            .unwrap_or_default(),
        prompt_template: r.or("prompt_template", PromptTemplate::Raw, prompt_template),
        max_seq_len,
        lora_r: r.or("lora_r", 8, whole(1)),
        lora_alpha: r.or("lora_alpha", 16.0, positive()),
        lora_dropout: r.or("lora_dropout", 0.0, fraction()),
        peft_use_rslora: r.or("peft_use_rslora", false, boolean),
        peft_use_dora: r.or("peft_use_dora", false, boolean),
        target_modules,
        layers_to_transform,
        exclude_modules: r.optional("exclude_modules", exclude_modules),
        rank_pattern: r.optional("rank_pattern", rank_pattern).unwrap_or_default(),
        alpha_pattern: r
            .optional("alpha_pattern", alpha_pattern)
            .unwrap_or_default(),
        trainable_token_indices: r
            .optional("trainable_token_indices", trained_tokens)
            .unwrap_or_default(),
        init_lora_weights: r.or("init_lora_weights", Init::Kaiming, init),
        init_adapter: init_adapter.clone(),
        quant_bits: r.or("quant_bits", 8, quant_bits),
        quantize_lm_head: r.or("quantize_lm_head", false, boolean),
        compute_dtype: r.or("compute_dtype", Default::default(), word),
        device_memory: r.optional("device_memory", bytes),
        learning_rate: r.or("learning_rate", 1e-4, positive()),
        num_epochs: r.or("num_epochs", 4.0, positive()),
        max_steps: r.optional("max_steps", whole(1)),
        batch_size: r.or("batch_size", BatchSize::Rows(8), batch_size),
        max_batch_tokens,
        gradient_accumulation_steps: r.or("gradient_accumulation_steps", 1, whole(1)),
        warmup_steps,
        warmup_ratio,
        lr_scheduler: r.or("lr_scheduler", Decay::Cosine, word),
        weight_decay: r.or("weight_decay", 0.0, not_negative()),
        adam_beta1: r.or("adam_beta1", 0.9, fraction()),
        adam_beta2: r.or("adam_beta2", 0.999, fraction()),
        adam_epsilon: r.or("adam_epsilon", 1e-8, positive()),
        max_grad_norm: r.or("max_grad_norm", 1.0, not_negative()),
        gradient_checkpointing: r.or("gradient_checkpointing", Checkpointing::Auto, checkpointing),
        share_prefixes: r.or("share_prefixes", true, boolean),
        merge_micro_batches: r.or("merge_micro_batches", true, boolean),
        seed: r.or("seed", 42, whole_up_to(0, usize::MAX)) as u64,
        eval_steps: r.optional("eval_steps", whole(1)),
        evals_per_epoch: r.optional("evals_per_epoch", whole(1)),
        logging_steps: r.or("logging_steps", 1, whole(1)),
        save_best: r.or("save_best", true, boolean),
        save_steps: r.optional("save_steps", whole(1)),
        saves_per_epoch: r.optional("saves_per_epoch", whole(1)),
        save_minutes,
        save_total_limit,
        on_non_finite: r.or("on_non_finite", Default::default(), word),
        max_skipped_steps: r.or("max_skipped_steps", 3, whole(0)),
        on_out_of_memory: r.or("on_out_of_memory", Default::default(), word),
        check_every: r.or("check_every", 0, whole(0)),
        output_dir: r
            .get("output_dir", text("the path of a folder"))
            .map_or(default_output, PathBuf::from),
        source: {
            let written = LORA_KEYS.iter().chain(&["lora_dropout"]);
            let written = written.filter(|key| init_adapter.is_some() && r.written(key));
            source.lora_keys = written.map(|key| key.to_string()).collect();
            source.clone()
        },
    };
    reader.finish()?;
    // The ranges above are lora-core's own; should they ever part, it has the last word.
    config
        .lora_config()
        .validate()
        .map_err(|error| lora_problem(&config, &error))?;
    Ok(config)
}

fn lora_problem(config: &Config, error: &LoraError) -> Problems {
    Problems(vec![Problem {
        location: files::location(&config.source),
        key: "lora".into(),
        value: None,
        message: error.to_string(),
    }])
}

fn val_set_size(value: &Value) -> Parsed<f64> {
    number(
        "a fraction of the rows (at least 0, below 1) or a whole number of rows",
        |x| (0.0..1.0).contains(&x) || (x >= 1.0 && x.fract() == 0.0),
    )(value)
}

fn prompt_template(value: &Value) -> Parsed<PromptTemplate> {
    match value {
        Value::String(text) => PromptTemplate::parse(text),
        _ => PromptTemplate::parse(""),
    }
}

/// `auto`, or the name of a format.
fn dataset_format(value: &Value) -> Parsed<Option<Format>> {
    let words = Format::ALL.map(|format| format!("{:?}", format.word()));
    let right = || format!("must be \"auto\", {}", words.join(", "));
    match value {
        Value::String(word) if word == "auto" => Ok(None),
        Value::String(word) => {
            let found = Format::ALL.into_iter().find(|format| format.word() == word);
            found.map(Some).ok_or_else(right)
        }
        _ => Err(right()),
    }
}

/// A table from a format's columns to the file's.
fn dataset_columns(value: &Value) -> Parsed<Columns> {
    let right = "must be a table from the columns of a format to those of the file, as in { instruction = \"question\" }";
    let Value::Table(entries) = value else {
        return Err(right.into());
    };
    let mut columns: Vec<(String, String)> = Vec::new();
    for entry in entries {
        let known = Format::ALL.iter().flat_map(|format| format.keys());
        if !known.clone().any(|key| *key == entry.key) {
            let nearest = nearest(&entry.key, known.copied());
            let hint = nearest.map_or(String::new(), |name| format!("; did you mean {name:?}?"));
            return Err(format!(
                "{right}; no format has a column {:?}{hint}",
                entry.key
            ));
        }
        match &entry.value {
            Value::String(name) if columns.iter().any(|(_, other)| other == name) => {
                return Err(format!("names the column {name:?} of the file twice"));
            }
            Value::String(name) => columns.push((entry.key.clone(), name.clone())),
            other => return Err(format!("{right}; {:?} is {other}", entry.key)),
        }
    }
    Ok(Columns(columns))
}

fn quant_bits(value: &Value) -> Parsed<u8> {
    match whole(0)(value) {
        Ok(4) => Ok(4),
        Ok(8) => Ok(8),
        Ok(16) => Ok(16),
        _ => Err("must be 4, 8, or 16 (not quantized)".into()),
    }
}

fn batch_size(value: &Value) -> Parsed<BatchSize> {
    match value {
        Value::String(word) if word == "auto" => Ok(BatchSize::Auto),
        _ => whole(1)(value)
            .map(BatchSize::Rows)
            .map_err(|message| format!("{message}, or \"auto\"")),
    }
}

/// PEFT writes `true` for its default, Kaiming-uniform.
fn init(value: &Value) -> Parsed<Init> {
    match value {
        Value::Bool(true) => Ok(Init::Kaiming),
        _ => word(value),
    }
}

fn checkpointing(value: &Value) -> Parsed<Checkpointing> {
    match value {
        Value::Bool(true) => Ok(Checkpointing::On),
        Value::Bool(false) => Ok(Checkpointing::Off),
        _ => word(value),
    }
}

/// A list of layer numbers, or one number.
fn layers(value: &Value) -> Parsed<Vec<usize>> {
    let right = || "must be a list of layer numbers, counted from 0, as in [0, 1, 2]".to_string();
    match value {
        Value::Integer(_) => whole(0)(value)
            .map(|layer| vec![layer])
            .map_err(|_| right()),
        Value::List(items) if !items.is_empty() => {
            let layers: Result<Vec<usize>, String> = items.iter().map(whole(0)).collect();
            layers.map_err(|_| right())
        }
        _ => Err(right()),
    }
}

/// PEFT's meaning: a list of names, `all-linear`, or one expression for the whole module name.
fn target_modules(value: &Value) -> Parsed<TargetModules> {
    let right = "must be a list of module names such as [\"q_proj\", \"v_proj\"], \"all-linear\", or one \
        regular expression that matches whole module names";
    match value {
        Value::String(word) if word == "all-linear" => Ok(TargetModules::AllLinear),
        // A module's full name has dots (model.layers.0.self_attn.q_proj) and no commas; a plain word or
        // several with commas would be an expression that matches nothing.
        Value::String(text)
            if text
                .chars()
                .all(|c| c.is_alphanumeric() || "_-, ".contains(c)) =>
        {
            let names: Vec<String> = text
                .split([',', ' '])
                .filter(|name| !name.is_empty())
                .map(|name| format!("{name:?}"))
                .collect();
            if names.is_empty() {
                Err(right.into())
            } else {
                Err(format!(
                    "is read as a regular expression for the whole module name and matches none; for names \
                 write [{}]",
                    names.join(", ")
                ))
            }
        }
        Value::String(pattern) => {
            let targets = TargetModules::Regex(pattern.clone());
            let config = LoraConfig {
                target_modules: targets.clone(),
                ..LoraConfig::default()
            };
            match config.selector() {
                Ok(_) => Ok(targets),
                Err(LoraError::InvalidPattern { reason, .. }) => {
                    // The engine draws the place over several lines; its last line says what is wrong.
                    let reason = reason.lines().last().unwrap_or_default();
                    let reason = reason.trim_start_matches("error: ");
                    Err(format!("is not a valid regular expression: {reason}"))
                }
                Err(other) => Err(other.to_string()),
            }
        }
        Value::List(items) if !items.is_empty() => items
            .iter()
            .map(module_name)
            .collect::<Parsed<_>>()
            .map(TargetModules::Names),
        _ => Err(right.into()),
    }
}

/// As `target_modules`, without its one word.
fn exclude_modules(value: &Value) -> Parsed<ExcludeModules> {
    match target_modules(value)? {
        TargetModules::Names(names) => Ok(ExcludeModules::Names(names)),
        TargetModules::Regex(pattern) => Ok(ExcludeModules::Regex(pattern)),
        TargetModules::AllLinear => {
            Err("must be a list of module names or a regular expression".into())
        }
    }
}

fn rank_pattern(value: &Value) -> Parsed<Vec<(String, usize)>> {
    let pattern = pattern(value, whole(1))?;
    let config = LoraConfig {
        rank_pattern: pattern.clone(),
        ..LoraConfig::default()
    };
    config.selector().map_err(|error| error.to_string())?;
    Ok(pattern)
}

fn alpha_pattern(value: &Value) -> Parsed<Vec<(String, f64)>> {
    let pattern = pattern(value, number(POSITIVE, |x| x > 0.0))?;
    let config = LoraConfig {
        alpha_pattern: pattern.clone(),
        ..LoraConfig::default()
    };
    config.selector().map_err(|error| error.to_string())?;
    Ok(pattern)
}

/// A list of tokens of the embedding, or lists by the tables' names.
fn trained_tokens(value: &Value) -> Parsed<Vec<(String, Vec<usize>)>> {
    let right = || {
        "must be a list of token ids, as in [128011, 128012], or lists by the names embed_tokens and lm_head".to_string()
    };
    let tokens = |value: &Value| match value {
        Value::List(items) if !items.is_empty() => {
            let tokens: Result<Vec<usize>, String> = items.iter().map(whole(0)).collect();
            tokens.map_err(|_| right())
        }
        _ => Err(right()),
    };
    match value {
        Value::Table(entries) => entries
            .iter()
            .map(|entry| match entry.key.as_str() {
                name @ ("embed_tokens" | "lm_head") => Ok((name.into(), tokens(&entry.value)?)),
                _ => Err(right()),
            })
            .collect(),
        list => Ok(vec![("embed_tokens".into(), tokens(list)?)]),
    }
}

/// A table from expressions for the end of a module's name to values, in the file's order.
fn pattern<T>(value: &Value, parse: impl Fn(&Value) -> Parsed<T>) -> Parsed<Vec<(String, T)>> {
    let Value::Table(entries) = value else {
        return Err(
            "must be a table from module names to numbers, as in { q_proj = 16, v_proj = 4 }"
                .into(),
        );
    };
    let parsed = entries.iter().map(|entry| match parse(&entry.value) {
        Ok(value) => Ok((entry.key.clone(), value)),
        Err(right) => Err(format!("{:?} {right}; it is {}", entry.key, entry.value)),
    });
    parsed.collect()
}

/// One of the model's linear modules, perhaps with a part of the path before it.
fn module_name(value: &Value) -> Parsed<String> {
    let Value::String(name) = value else {
        return Err(format!("must be a list of module names; {value} is none"));
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    if LINEAR_MODULES.contains(&last) || name == "lm_head" {
        return Ok(name.clone());
    }
    Err(match nearest(last, LINEAR_MODULES.into_iter()) {
        Some(known) => {
            format!("{name:?} is no linear module of a Llama layer; did you mean {known:?}?")
        }
        None => format!(
            "{name:?} is no linear module of a Llama layer; these are {}",
            LINEAR_MODULES.join(", ")
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::reader::KEYS;

    const LEAST: &str = "base_model = \"m\"\ndataset_path = \"d.jsonl\"\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(
            &format!("{LEAST}{text}"),
            Some(Path::new("runs.toml")),
            None,
            &[],
        )
    }

    fn problems(text: &str) -> Vec<String> {
        match parse(text) {
            Err(ConfigError::Invalid(problems)) => {
                problems.0.iter().map(|p| p.to_string()).collect()
            }
            Err(error) => panic!("{error}"),
            Ok(_) => Vec::new(),
        }
    }

    #[test]
    fn absent_keys_have_finlora_s_and_peft_s_defaults() {
        let config = parse("").unwrap();
        assert_eq!(
            (config.lora_r, config.lora_alpha, config.quant_bits),
            (8, 16.0, 8)
        );
        assert_eq!(config.lora_config(), LoraConfig::default());
        assert_eq!(
            (config.adam_beta1, config.adam_beta2, config.adam_epsilon),
            (0.9, 0.999, 1e-8)
        );
        assert_eq!(
            (config.weight_decay, config.max_grad_norm, config.seed),
            (0.0, 1.0, 42)
        );
        assert_eq!(config.output_dir, Path::new("runs/runs"));
        assert_eq!(
            (config.max_steps, config.eval_steps, config.logging_steps),
            (None, None, 1)
        );
        assert_eq!(
            (
                config.save_steps,
                config.save_minutes,
                config.save_total_limit
            ),
            (None, Some(5.0), Some(2))
        );
    }

    #[test]
    fn a_device_s_memory_is_read_with_its_unit() {
        let memory = |value: &str| {
            parse(&format!("device_memory = {value}"))
                .unwrap()
                .device_memory
        };
        for (value, bytes) in [
            ("\"8GiB\"", 8 << 30),
            ("\"7.5 gib\"", 15 << 29),
            ("\"24 GB\"", 24_000_000_000),
            ("\"512MiB\"", 512 << 20),
            ("\"2097152\"", 2 << 20),
            ("25769803776", 24 << 30),
        ] {
            assert_eq!(memory(value), Some(bytes), "{value}");
        }
        assert_eq!(memory("\"none\""), None);
        assert_eq!(parse("").unwrap().device_memory, None);
        for wrong in [
            "8",
            "\"8\"",
            "\"-8GiB\"",
            "\"GiB\"",
            "\"8 Gibi\"",
            "true",
            "\"1e30GB\"",
        ] {
            let found = problems(&format!("device_memory = {wrong}"));
            assert!(
                found.len() == 1 && found[0].contains("8GiB"),
                "{wrong}: {found:?}"
            );
        }
    }

    #[test]
    fn every_wrong_value_is_caught() {
        for wrong in [
            "lora_r = 0",
            "lora_r = -1",
            "lora_r = 1.5",
            "lora_r = true",
            "lora_r = \"eight\"",
            "lora_r = [8]",
            "lora_alpha = 0",
            "lora_alpha = -16",
            "lora_alpha = nan",
            "lora_alpha = inf",
            "lora_dropout = 1",
            "lora_dropout = -0.1",
            "lora_dropout = nan",
            "quant_bits = 5",
            "quant_bits = 32",
            "quant_bits = -8",
            "quantize_lm_head = 1",
            "learning_rate = 0",
            "learning_rate = -1e-4",
            "learning_rate = nan",
            "num_epochs = 0",
            "num_epochs = -1",
            "batch_size = 0",
            "gradient_accumulation_steps = 0",
            "max_steps = 0",
            "max_steps = -1",
            "eval_steps = 0",
            "logging_steps = 0",
            "max_seq_len = 1",
            "max_batch_tokens = 0",
            "warmup_steps = -1",
            "warmup_ratio = 1.0",
            "warmup_ratio = -0.1",
            "lr_scheduler = \"cosin\"",
            "lr_scheduler = 1",
            "compute_dtype = \"fp16\"",
            "gradient_checkpointing = \"yes\"",
            "weight_decay = -0.1",
            "adam_beta1 = 1.0",
            "adam_beta2 = -0.5",
            "adam_epsilon = 0",
            "max_grad_norm = -1",
            "val_set_size = -0.1",
            "val_set_size = 1.5",
            "seed = -1",
            "seed = 99999999999999999999",
            "prompt_template = \"custom:x\"",
            "prompt_template = 3",
            "dataset_format = \"jsonl\"",
            "dataset_format = 1",
            "init_lora_weights = false",
            "init_lora_weights = \"pissa\"",
            "peft_use_rslora = 1",
            "peft_use_dora = \"no\"",
            "save_best = 0",
            "save_steps = 0",
            "save_minutes = 0",
            "save_minutes = nan",
            "save_total_limit = 0",
            "on_non_finite = \"ignore\"",
            "max_skipped_steps = -1",
            "on_out_of_memory = 1",
            "output_dir = \"\"",
            "target_modules = []",
            "target_modules = \"(\"",
            "target_modules = \"\"",
            "target_modules = [1]",
            "target_modules = \"q_proj\"",
            "target_modules = \"q_proj,v_proj\"",
            "target_modules = [\"qproj\"]",
            "target_modules = [\"self_attn\"]",
            "layers_to_transform = []",
            "trainable_token_indices = []",
            "trainable_token_indices = [-1]",
            "layers_to_transform = [-1]",
            "layers_to_transform = \"all\"",
            "val_dataset_path = 1",
            "logging_steps = 2026-01-01",
        ] {
            let found = problems(wrong);
            assert_eq!(found.len(), 1, "{wrong}: {found:?}");
            let (key, value) = wrong.split_once(" = ").unwrap();
            assert!(
                found[0].starts_with(&format!("runs.toml:3: {key} = ")),
                "{wrong}: {}",
                found[0]
            );
            assert!(
                found[0].contains(value.trim_matches('"')) || value.contains('e'),
                "{wrong}: {}",
                found[0]
            );
        }
    }

    #[test]
    fn all_problems_come_at_once_in_the_order_of_the_file() {
        let found = problems("lora_r = 0\nlearnig_rate = 1\n\nquant_bits = \"8\"\nbanana = {}\n");
        assert_eq!(found.len(), 4, "{found:?}");
        assert_eq!(
            found[0],
            "runs.toml:3: lora_r = 0: must be a whole number of at least 1"
        );
        assert_eq!(
            found[1],
            "runs.toml:4: learnig_rate = 1: unknown key; did you mean learning_rate?"
        );
        assert_eq!(
            found[2],
            "runs.toml:6: quant_bits = \"8\": must be 4, 8, or 16 (not quantized) (write it without quotes)"
        );
        assert!(found[3].starts_with(
            "runs.toml:7: banana = { … }: unknown key; the keys are preset, base_model"
        ));
    }

    #[test]
    fn the_model_and_the_data_must_be_named() {
        let error = Config::parse(
            "lora_r = 0",
            Some(Path::new("a.toml")),
            None,
            &["seed".into()],
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("4 problems"), "{error}");
        assert!(
            error.contains("a.toml: base_model: is missing; it must be the folder"),
            "{error}"
        );
        assert!(
            error.contains("a.toml: dataset_path: is missing"),
            "{error}"
        );
        assert!(
            error.contains("--set: seed: must have the form KEY=VALUE"),
            "{error}"
        );
    }

    #[test]
    fn overrides_are_checked_like_the_file() {
        let sets = ["lora_r=0".to_string(), "lerning_rate=1".into()];
        let error = Config::parse(LEAST, None, None, &sets)
            .unwrap_err()
            .to_string();
        assert!(error.contains("--set: lora_r = 0: must be"), "{error}");
        assert!(
            error.contains("--set: lerning_rate = 1: unknown key; did you mean learning_rate?"),
            "{error}"
        );
    }

    #[test]
    fn names_of_other_trainers_are_recognised() {
        for (theirs, ours) in [
            ("lr", "learning_rate"),
            ("load_in_8bit", "quant_bits"),
            ("r", "lora_r"),
        ] {
            let found = problems(&format!("{theirs} = 1"));
            assert!(
                found[0].ends_with(&format!("did you mean {ours}?")),
                "{found:?}"
            );
        }
    }

    #[test]
    fn keys_that_exclude_each_other_are_caught() {
        for (text, key) in [
            ("warmup_steps = 5\nwarmup_ratio = 0.1", "warmup_ratio"),
            (
                "val_dataset_path = \"v.jsonl\"\nval_set_size = 0.1",
                "val_set_size",
            ),
            (
                "max_seq_len = 512\nmax_batch_tokens = 511",
                "max_batch_tokens",
            ),
            (
                "target_modules = \"all-linear\"\nlayers_to_transform = [0]",
                "layers_to_transform",
            ),
        ] {
            let found = problems(text);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
            assert!(
                found[0].starts_with(&format!("runs.toml:4: {key} = ")),
                "{found:?}"
            );
        }
        assert_eq!(parse("warmup_steps = 0").unwrap().warmup(100), 0);
        assert_eq!(
            parse("val_dataset_path = \"v.jsonl\"")
                .unwrap()
                .val_set_size,
            0.0
        );
    }

    #[test]
    fn target_modules_have_peft_s_three_forms() {
        let targets = |text: &str| {
            parse(&format!("target_modules = {text}"))
                .unwrap()
                .target_modules
        };
        assert_eq!(targets("\"all-linear\""), TargetModules::AllLinear);
        let names = ["q_proj", "mlp.up_proj"].map(String::from).to_vec();
        assert_eq!(
            targets("[\"q_proj\", \"mlp.up_proj\"]"),
            TargetModules::Names(names)
        );
        let pattern = r".*\.[02]\..*q_proj";
        assert_eq!(
            targets(&format!("'{pattern}'")),
            TargetModules::Regex(pattern.into())
        );
        let found = problems("target_modules = \"q_proj, v_proj\"");
        assert!(
            found[0].ends_with("for names write [\"q_proj\", \"v_proj\"]"),
            "{found:?}"
        );
        let found = problems("target_modules = [\"qproj\"]");
        assert!(found[0].ends_with("did you mean \"q_proj\"?"), "{found:?}");
        assert_eq!(problems("target_modules = \".*(q\"")[0].lines().count(), 1);
    }

    #[test]
    fn other_spellings_are_accepted() {
        let config = parse(
            "init_lora_weights = true\ngradient_checkpointing = true\nlora_r = 4.0\nlora_alpha = 8\n\
             peft_use_dora = false\nlayers_to_transform = 3\nmax_steps = \"none\"\nval_set_size = 100",
        )
        .unwrap();
        assert_eq!(config.init_lora_weights, Init::Kaiming);
        assert_eq!(config.gradient_checkpointing, Checkpointing::On);
        assert_eq!((config.lora_r, config.lora_alpha), (4, 8.0));
        assert_eq!(
            (config.layers_to_transform, config.max_steps),
            (Some(vec![3]), None)
        );
        assert_eq!(config.val_set_size, 100.0);
        let format = |word| {
            parse(&format!("dataset_format = \"{word}\""))
                .unwrap()
                .dataset_format
        };
        assert_eq!(
            (format("auto"), format("messages")),
            (None, Some(Format::Messages))
        );
    }

    #[test]
    fn null_in_json_is_an_absent_key() {
        let json = r#"{"base_model": "m", "dataset_path": "d", "max_steps": null, "lora_r": null}"#;
        let config = Config::parse(json, None, None, &[]).unwrap();
        assert_eq!((config.max_steps, config.lora_r), (None, 8));
        let json = r#"{"base_model": null, "dataset_path": "d", "nonsense": null}"#;
        let error = Config::parse(json, None, None, &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains("2 problems"), "{error}");
    }

    #[test]
    fn finlora_s_run_with_dora_is_read_and_so_are_patterns() {
        let runs =
            r#"{"a": {"base_model": "m", "dataset_path": "d", "peft_use_dora": true}, "b": {}}"#;
        let config = Config::parse(runs, Some(Path::new("runs.json")), Some("a"), &[]).unwrap();
        assert!(config.lora_config().use_dora);
        let config = parse(
            "rank_pattern = { '^model\\.layers\\.0\\..*' = 2, q_proj = 4 }\nalpha_pattern = { q_proj = 1.5 }\n\
             exclude_modules = [\"k_proj\"]",
        )
        .unwrap();
        let selector = config.lora_config().selector().unwrap();
        let names = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
        ];
        assert_eq!(names.map(|name| selector.r(name)), [2, 4]);
        assert_eq!(selector.alpha(names[0]), 1.5);
        assert!(!selector.matches("model.layers.0.self_attn.k_proj"));
        for (text, words) in [
            (
                "rank_pattern = { q_proj = 0 }",
                "\"q_proj\" must be a whole number of at least 1",
            ),
            (
                "alpha_pattern = { \"(\" = 2 }",
                "not a valid regular expression",
            ),
            (
                "trainable_token_indices = { q_proj = [1] }",
                "by the names embed_tokens and lm_head",
            ),
            (
                "trainable_token_indices = { lm_head = [] }",
                "must be a list of token ids",
            ),
            ("rank_pattern = 3", "must be a table"),
            ("exclude_modules = \"all-linear\"", "must be a list"),
        ] {
            let found = problems(text);
            assert!(
                found.iter().any(|problem| problem.contains(words)),
                "{text}: {found:?}"
            );
        }
    }

    #[test]
    fn every_key_is_asked_for() {
        // A known key with an impossible value is one problem; one that nobody reads would be "unknown".
        for key in KEYS {
            let text = format!("{key} = 1979-05-27\n");
            let error = Config::parse(&text, None, None, &[])
                .unwrap_err()
                .to_string();
            assert!(!error.contains("unknown"), "{key}: {error}");
        }
    }
}
