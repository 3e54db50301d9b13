//! What must hold between the keys of a configuration; what one key may be is in `keys.rs`.

use lora_core::{Bias, LoraError, Method, TargetModules};

use super::error::{ConfigError, Problem, Problems};
use super::raw::{RawConfig, SET};
use super::reader::Reader;
use super::{Config, Source, files, keys};

/// Checks every key and reports everything that is wrong; `problems` are those found before.
pub(super) fn validate(raw: RawConfig, problems: Vec<Problem>) -> Result<Config, ConfigError> {
    let mut source = raw.source.clone();
    // An axolotl key has the place "--set (KEY)".
    let overridden = raw.entries.iter();
    let overridden = overridden.filter(|entry| entry.location.starts_with(SET));
    source.overridden = overridden.map(|entry| entry.key.clone()).collect();
    let mut reader = Reader::new(raw, problems);
    let mut config = keys::read(&mut reader);
    check_together(&config, &mut reader);
    let unused = unused_split(&config, &reader, &source);
    source.notes.extend(unused);
    find_inputs(&mut config, &source);
    config.source = source;
    if config.init_adapter.is_some() {
        let written = keys::adapter_keys().filter(|key| reader.written(key));
        config.source.lora_keys = written.map(String::from).collect();
    }
    reader.finish()?;
    // The ranges of the table are those of lora-core; lora-core decides where they differ.
    config
        .lora_config()
        .validate()
        .map_err(|error| lora_problem(&config, &error))?;
    Ok(config)
}

/// Keys that contradict each other.
fn check_together(config: &Config, reader: &mut Reader) {
    if config.val_dataset_path.is_some() && config.val_set_size > 0.0 {
        reader.problem(
            "val_set_size",
            "cannot be combined with val_dataset_path; remove one of them",
        );
    }
    if config.warmup_steps > 0 && config.warmup_ratio > 0.0 {
        reader.problem(
            "warmup_ratio",
            "cannot be combined with warmup_steps; remove one of them",
        );
    }
    for (steps, per_epoch) in [
        ("eval_steps", "evals_per_epoch"),
        ("save_steps", "saves_per_epoch"),
    ] {
        if reader.is_on(steps) && reader.is_on(per_epoch) {
            let message = format!("cannot be combined with {steps}; remove one of them");
            reader.problem(per_epoch, &message);
        }
    }
    let max_seq_len = config.max_seq_len;
    if config
        .max_batch_tokens
        .is_some_and(|tokens| tokens < max_seq_len)
    {
        let message = format!(
            "must be at least max_seq_len, which is {max_seq_len}: examples are never truncated"
        );
        reader.problem("max_batch_tokens", &message);
    }
    if config.init_adapter.is_some() && config.init_lora_weights.changes_weights() {
        reader.problem(
            "init_lora_weights",
            "cannot be combined with init_adapter: it makes new adapters from the weights; remove one of them",
        );
    }
    if config.peft_use_dora && config.peft_type != Method::default() {
        let message = format!(
            "cannot be combined with peft_type = {:?}; remove one of them",
            config.peft_type.facts().peft_type.to_lowercase()
        );
        reader.problem("peft_use_dora", &message);
    }
    if config.loraplus_lr_ratio.is_some() && config.peft_type.facts().shared.is_some() {
        reader.problem(
            "loraplus_lr_ratio",
            "needs adapters whose A and B are trained; remove it, or choose another peft_type",
        );
    }
    let whole = [
        ("bias", config.bias != Bias::None),
        ("lora_bias", config.lora_bias),
        ("modules_to_save", !config.modules_to_save.is_empty()),
    ];
    for (key, is_set) in whole {
        if is_set && config.init_lora_weights.changes_weights() {
            let message = format!(
                "cannot be combined with init_lora_weights = \"{}\"; remove one of them",
                config.init_lora_weights
            );
            reader.problem(key, &message);
        }
    }
    let method = config.lora_config().method;
    if config.lora_bias && !method.facts().allows_lora_bias {
        let message = format!("cannot be combined with {method}, as in PEFT; remove one of them");
        reader.problem("lora_bias", &message);
    }
    let is_names = matches!(config.target_modules, TargetModules::Names(_));
    if config.layers_to_transform.is_some() && !is_names {
        reader.problem(
            "layers_to_transform",
            "cannot be used when target_modules is a string (as in PEFT); \
            list the module names, as in [\"q_proj\", \"v_proj\"]",
        );
    }
}

/// The note that `val_set_size` is set and not used. The `config.toml` of a run has every key, so the default is no reason
/// for a note.
fn unused_split(config: &Config, reader: &Reader, source: &Source) -> Option<String> {
    const KEY: &str = "val_set_size";
    let is_set = reader.written(KEY) && !source.preset.iter().any(|(key, _)| key == KEY);
    let is_used = !config.embedded_data() || config.val_dataset_path.is_some();
    (is_set && !is_used && config.val_set_size != keys::VAL_SET_SIZE).then(|| {
        format!(
            "{KEY} is not used: dataset_path = \"embedded\" has its own 300 validation examples; remove the key"
        )
    })
}

/// Replaces the paths of inputs by the places where the files are.
fn find_inputs(config: &mut Config, source: &Source) {
    let model = files::resolve(&config.base_model, source);
    config.base_model = model.to_string_lossy().into_owned();
    let optional = [&mut config.val_dataset_path, &mut config.init_adapter];
    let paths = optional.into_iter().flatten();
    for path in paths.chain([&mut config.dataset_path]) {
        *path = files::resolve(&path.to_string_lossy(), source);
    }
}

fn lora_problem(config: &Config, error: &LoraError) -> Problems {
    Problems(vec![Problem {
        location: config.source.location("lora"),
        key: "lora".into(),
        value: None,
        message: error.to_string(),
    }])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use data::Format;
    use lora_core::{Init, LoraConfig};

    use super::*;
    use crate::Checkpointing;
    use crate::keys::KEYS;

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
            "init_lora_weights = \"pissa_niter\"",
            "init_lora_weights = \"olora\"\ninit_adapter = \"a\"",
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
            "bias = \"lora\"",
            "bias = true",
            "lora_bias = \"all\"",
            "modules_to_save = []",
            "modules_to_save = \"norm\"",
            "modules_to_save = [\"\"]",
            "modules_to_save = [1]",
            "bias = \"all\"\ninit_lora_weights = \"pissa\"",
            "lora_bias = true\npeft_use_dora = true",
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
        assert_eq!(
            found[3],
            "runs.toml:7: banana = { … }: unknown key; docs/configuration.md lists all keys"
        );
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
            error
                .contains("a.toml: base_model: is missing; it must be a Hugging Face model folder"),
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
    fn a_size_of_the_split_beside_the_embedded_data_is_noted() {
        let notes = |data: &str, sets: &[&str]| {
            let text = format!("base_model = \"m\"\ndataset_path = {data:?}\n");
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            let path = Some(Path::new("runs.toml"));
            let config = Config::parse(&text, path, None, &sets).unwrap();
            config.source.notes
        };
        for set in ["val_set_size=8", "val_set_size=0", "val_set_size=0.1"] {
            let found = notes("embedded", &[set]);
            assert!(
                found.len() == 1 && found[0].contains("is not used"),
                "{found:?}"
            );
            assert_eq!(notes("d.jsonl", &[set]), [""; 0]);
        }
        assert_eq!(notes("embedded", &[]), [""; 0]);
        // As in the config.toml of a run.
        assert_eq!(notes("embedded", &["val_set_size=0.05"]), [""; 0]);
        let file = ["val_dataset_path=v.jsonl", "val_set_size=0"];
        assert_eq!(notes("embedded", &file), [""; 0]);
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
    fn keys_that_a_vera_adapter_does_not_have_are_named() {
        let config = parse("peft_type = \"Vera\"\nlora_r = 256\nprojection_prng_key = 3").unwrap();
        let lora = config.lora_config();
        assert_eq!(lora.method, lora_core::Method::Vera);
        assert_eq!(
            (lora.r, lora.projection_prng_key, lora.scale()),
            (256, 3, 1.0)
        );
        for (key, value) in [
            ("lora_alpha", "32"),
            ("peft_use_rslora", "true"),
            ("peft_use_dora", "true"),
            ("loraplus_lr_ratio", "4"),
            ("init_lora_weights", "\"pissa\""),
            ("rank_pattern", "{ q_proj = 2 }"),
            ("trainable_token_indices", "[1]"),
        ] {
            let found = problems(&format!("peft_type = \"vera\"\n{key} = {value}"));
            let name = key.trim_start_matches("peft_");
            assert!(found[0].contains(name), "{found:?}");
        }
        for key in ["d_initial = 0.2", "projection_prng_key = 1"] {
            let found = problems(key);
            let (name, _) = key.split_once(' ').unwrap();
            assert!(
                found[0].contains(name) && found[0].contains("LoRA"),
                "{found:?}"
            );
        }
        assert!(problems("peft_type = \"lokr\"")[0].contains("\"vera\""));
    }

    #[test]
    fn finlora_s_run_with_dora_is_read_and_so_are_patterns() {
        let runs =
            r#"{"a": {"base_model": "m", "dataset_path": "d", "peft_use_dora": true}, "b": {}}"#;
        let config = Config::parse(runs, Some(Path::new("runs.json")), Some("a"), &[]).unwrap();
        assert_eq!(config.lora_config().method, lora_core::Method::Dora);
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
