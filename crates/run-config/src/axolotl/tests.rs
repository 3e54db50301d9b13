//! Configurations of axolotl's shapes, written for these tests.

use std::path::Path;

use lora_core::{Init, TargetModules};

use data::PromptTemplate;

use super::super::{BatchSize, Checkpointing, ComputeDtype, Config, ConfigError};
use crate::Decay;
use data::Format;

/// As FinLoRA's `finetune.py` dumps a run, with other names.
const FINLORA: &str = r#"base_model: someone/Llama-3-model
model_type: LlamaForCausalLM
tokenizer_type: LlamaTokenizerFast
gradient_accumulation_steps: 2
micro_batch_size: 8
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0001
load_in_8bit: true
load_in_4bit: false
bnb_4bit_use_double_quant: false
bnb_4bit_quant_type: null
bnb_4bit_compute_dtype: null
adapter: lora
lora_model_dir: null
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
- q_proj
- v_proj
- k_proj
datasets:
- path: data/news.jsonl
  type:
    system_prompt: ''
    field_system: system
    field_instruction: context
    field_output: target
    format: '[INST] {instruction} [/INST]'
    no_input_format: '[INST] {instruction} [/INST]'
dataset_prepared_path: null
val_set_size: 0.02
output_dir: out/news
peft_use_dora: false
peft_use_rslora: true
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: false
wandb_project: news
wandb_entity: null
wandb_watch: gradients
wandb_name: news_r8
wandb_log_model: 'false'
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint: null
logging_steps: 500
flash_attention: false
deepspeed: deepspeed_configs/zero1.json
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: <|end_of_text|>
chat_template: llama3
"#;

/// As the QLoRA examples of axolotl's own are written.
const QLORA: &str = r"
base_model: models/llama # a folder
load_in_8bit: false
load_in_4bit: yes
strict: false

datasets:
  - path: rows.jsonl
    type: alpaca
dataset_prepared_path:
val_set_size: 0.1
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
lora_target_modules:
lora_fan_in_fan_out:
optimizer: paged_adamw_32bit
lr_scheduler: constant_with_warmup
learning_rate: 2e-4
micro_batch_size: '2'
batch_size: 8
warmup_ratio: 0.1
train_on_inputs: false
group_by_length: false
bf16: true
sequence_len: 2_048
early_stopping_patience:
special_tokens:
";

fn load(text: &str, sets: &[&str]) -> Result<Config, ConfigError> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    Config::parse(text, Some(Path::new("run.yml")), None, &sets)
}

fn problems(text: &str, sets: &[&str]) -> Vec<String> {
    match load(text, sets) {
        Err(ConfigError::Invalid(problems)) => problems.0.iter().map(|p| p.to_string()).collect(),
        Err(error) => panic!("{error}"),
        Ok(_) => Vec::new(),
    }
}

/// The QLoRA file without the lines that begin so, and with more at its end.
fn changed(without: &[&str], with: &str) -> String {
    let lines = QLORA.lines();
    let kept = lines.filter(|line| !without.iter().any(|key| line.starts_with(key)));
    kept.collect::<Vec<_>>().join("\n") + "\n" + with
}

#[test]
fn finloras_file_is_finloras_run() {
    let config = load(FINLORA, &[]).unwrap();
    assert_eq!(config.base_model, "someone/Llama-3-model");
    assert_eq!(config.dataset_path, Path::new("data/news.jsonl"));
    assert_eq!(config.dataset_format, Some(Format::ContextTarget));
    assert_eq!(config.prompt_template, PromptTemplate::Inst);
    assert_eq!((config.quant_bits, config.max_seq_len), (8, 4096));
    assert_eq!(
        (config.lora_r, config.lora_alpha, config.lora_dropout),
        (8, 16.0, 0.05)
    );
    assert!(config.peft_use_rslora && !config.peft_use_dora);
    let names = ["q_proj", "v_proj", "k_proj"].map(String::from).to_vec();
    assert_eq!(config.target_modules, TargetModules::Names(names));
    assert_eq!((config.learning_rate, config.num_epochs), (1e-4, 4.0));
    assert_eq!(config.batch_size, BatchSize::Rows(8));
    assert_eq!(config.gradient_accumulation_steps, 2);
    assert_eq!((config.warmup_steps, config.warmup_ratio), (10, 0.0));
    assert_eq!(config.lr_scheduler, Decay::Cosine);
    assert_eq!((config.weight_decay, config.val_set_size), (0.0, 0.02));
    assert_eq!(
        (config.evals_per_epoch, config.saves_per_epoch),
        (Some(4), Some(1))
    );
    assert_eq!(config.gradient_checkpointing, Checkpointing::On);
    assert_eq!(config.compute_dtype, ComputeDtype::Auto);
    assert_eq!(config.output_dir, Path::new("out/news"));
    // The last adapter, as axolotl's trainer leaves it.
    assert!(!config.save_best);
    let notes = config.source.notes.join("\n");
    for part in [
        "model_type, tokenizer_type, wandb_project, wandb_watch, wandb_name, wandb_log_model, logging_steps, deepspeed, \
         chat_template",
        "adamw_bnb_8bit",
        "load_in_8bit",
    ] {
        assert!(notes.contains(part), "{part}: {notes}");
    }
    assert_eq!(config.source.notes.len(), 3, "{notes}");
}

#[test]
fn a_qlora_file_has_axolotls_defaults_where_it_is_silent() {
    let config = load(QLORA, &[]).unwrap();
    assert_eq!((config.quant_bits, config.lora_r), (4, 32));
    assert_eq!(config.target_modules, TargetModules::AllLinear);
    assert_eq!(config.dataset_format, Some(Format::Alpaca));
    let PromptTemplate::Instruct(template) = &config.prompt_template else {
        panic!("{}", config.prompt_template)
    };
    assert!(template.no_input_format.ends_with("### Response:\n"));
    assert_eq!((config.learning_rate, config.max_seq_len), (2e-4, 2048));
    assert_eq!(config.batch_size, BatchSize::Rows(2));
    assert_eq!(config.gradient_accumulation_steps, 4);
    assert_eq!(config.lr_scheduler, Decay::Constant);
    assert_eq!((config.warmup_steps, config.warmup_ratio), (0, 0.1));
    assert_eq!(config.compute_dtype, ComputeDtype::Bf16);
    assert_eq!(config.gradient_checkpointing, Checkpointing::Auto);
    // From here on the file is silent.
    assert_eq!((config.num_epochs, config.lora_dropout), (1.0, 0.0));
    assert_eq!(config.output_dir, Path::new("./model-out"));
    assert_eq!(config.save_total_limit, Some(4));
    assert_eq!(config.source.preset_name, "axolotl");
    let given = |key: &str| config.source.preset.iter().any(|(name, _)| name == key);
    assert!(given("num_epochs") && given("save_best") && !given("lora_r"));
    assert!(!given("warmup_ratio") && !given("warmup_steps"));
    // The resolved file says it all.
    let again = Config::parse(&config.to_toml(), Some(Path::new("c.toml")), None, &[]).unwrap();
    let source = again.source.clone();
    assert_eq!(again, Config { source, ..config });
}

#[test]
fn overrides_of_either_trainers_keys_come_before_the_file() {
    let config = load(
        QLORA,
        &[
            "micro_batch_size=4",
            "warmup_steps=5",
            "lora_target_linear=false",
            "target_modules=[\"q_proj\"]",
            "num_epochs=3",
            "sequence_len=64",
            "quant_bits=8",
        ],
    )
    .unwrap();
    assert_eq!(config.batch_size, BatchSize::Rows(4));
    assert_eq!(config.gradient_accumulation_steps, 2);
    assert_eq!((config.warmup_steps, config.warmup_ratio), (5, 0.0));
    assert_eq!(
        config.target_modules,
        TargetModules::Names(vec!["q_proj".into()])
    );
    assert_eq!(
        (config.num_epochs, config.max_seq_len, config.quant_bits),
        (3.0, 64, 8)
    );
}

#[test]
fn an_unknown_key_finds_the_nearest_and_a_refused_one_says_what_to_do() {
    let text = changed(
        &["group_by_length", "early_stopping"],
        "sample_packing: true\nlora_droput: 0.1\nearly_stopping_patience: 3\nneftune_noise_alpha: 5\nwibble: null\n",
    );
    let line = 1 + text
        .lines()
        .position(|line| line.starts_with("sample_packing"))
        .unwrap();
    let found = problems(&text, &[]);
    let at = |line: usize| format!("run.yml:{line}: ");
    for (index, parts) in [
        ["sample_packing = true: ", "micro_batch_size"],
        ["lora_droput = 0.1: ", "did you mean lora_dropout?"],
        ["early_stopping_patience = 3: ", "load_best_model_at_end"],
        ["neftune_noise_alpha = 5: ", "remove it"],
        ["wibble = null: ", "unknown key"],
    ]
    .iter()
    .enumerate()
    {
        let problem = &found[index];
        assert!(
            problem.starts_with(&(at(line + index) + parts[0])),
            "{problem}"
        );
        assert!(problem.contains(parts[1]), "{problem}");
    }
    assert_eq!(found.len(), 5, "{found:?}");
    assert_eq!(problems(&text, &["sample_packing=false"]).len(), 4);
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_line_and_name() {
    for (without, with, parts) in [
        (
            "optimizer",
            "optimizer: lion_8bit",
            ["optimizer = \"lion_8bit\"", "adamw_torch"],
        ),
        (
            "lr_scheduler",
            "lr_scheduler: rex",
            ["lr_scheduler = \"rex\"", "constant_with_warmup"],
        ),
        ("adapter", "adapter:", ["adapter = null", "lora or qlora"]),
        (
            "load_in_4bit",
            "load_in_4bit: off",
            ["adapter = \"qlora\"", "load_in_4bit: true"],
        ),
        (
            "load_in_8bit",
            "load_in_8bit: true",
            ["load_in_4bit = true", "keep one"],
        ),
        (
            "learning_rate",
            "",
            ["learning_rate: is missing", "axolotl"],
        ),
        ("lora_alpha", "", ["lora_alpha: is missing", "axolotl"]),
        (
            "learning_rate",
            "learning_rate: fast",
            ["learning_rate = \"fast\"", "above 0"],
        ),
        (
            "micro_batch",
            "micro_batch_size: 0",
            ["(micro_batch_size): batch_size = 0", "at least 1"],
        ),
        (
            "train_on",
            "train_on_inputs: true",
            ["train_on_inputs = true", "false"],
        ),
        (
            "special_",
            "special_tokens: {eos_token: </s>}",
            ["special_tokens.eos_token", "tokenizer_config"],
        ),
        (
            "warmup",
            "eval_steps: 0.05",
            ["eval_steps = 0.05", "evals_per_epoch"],
        ),
        (
            "warmup",
            "gradient_accumulation_steps: 2",
            ["batch_size = 8", "remove one"],
        ),
        ("warmup", "plugins: [a.b.C]", ["plugins", "LigerPlugin"]),
        (
            "warmup",
            "model_revision: v1",
            ["model_revision = \"v1\"", "not a name"],
        ),
        (
            "warmup",
            "excess_length_strategy: truncate",
            ["excess_length_strategy", "never truncated"],
        ),
        ("warmup", "rl: dpo", ["rl = \"dpo\"", "preferences"]),
    ] {
        let found = problems(&changed(&[without], with), &[]);
        assert_eq!(found.len(), 1, "{with}: {found:?}");
        assert!(
            parts.iter().all(|part| found[0].contains(part)),
            "{with}: {}",
            found[0]
        );
        assert!(found[0].starts_with("run.yml"), "{}", found[0]);
    }
}

#[test]
fn data_sets_are_read_as_their_types_say_or_refused() {
    let data = |text: &str| {
        let text = format!("datasets:\n  - path: rows.jsonl\n{text}");
        changed(&["datasets:", "  - path", "    type"], &text)
    };
    let format = |text: &str| {
        let config = load(&data(text), &[]).unwrap_or_else(|error| panic!("{error}"));
        (
            config.dataset_format.unwrap(),
            config.prompt_template.to_string(),
            config.dataset_columns.0,
        )
    };
    let (kind, template, columns) = format("    type: completion\n    field: body");
    assert_eq!((kind, template.as_str()), (Format::Text, "raw"));
    assert_eq!(columns, [("text".to_string(), "body".to_string())]);
    let (kind, template, _) =
        format("    type: chat_template\n    roles_to_train: [assistant]\n    train_on_eos: turn");
    assert_eq!((kind, template.as_str()), (Format::Messages, "chat"));
    let (kind, template, columns) = format(
        "    ds_type: json\n    split: train\n    type:\n      field_instruction: question\n      format: 'Q: {instruction} {input}'\n      no_input_format: 'Q: {instruction}'",
    );
    assert_eq!(kind, Format::Alpaca);
    assert_eq!(
        template,
        r#"instruct:{"format":"Q: {instruction} {input}","no_input_format":"Q: {instruction}","system_format":"{system}"}"#
    );
    assert_eq!(
        columns,
        [("instruction".to_string(), "question".to_string())]
    );
    for (text, parts) in [
        (
            "    type: sharegpt",
            ["datasets[0].type = \"sharegpt\"", "alpaca_chat.load"],
        ),
        ("    type: alpaca\n  - path: b", ["2 data sets", "one file"]),
        (
            "    type: alpaca\n    split: test",
            ["datasets[0].split", "write train"],
        ),
        (
            "    type: alpaca\n    ds_type: csv",
            ["datasets[0].ds_type", ".jsonl"],
        ),
        (
            "    type: alpaca\n    shards: 4",
            ["datasets[0].shards = 4", "not supported"],
        ),
        (
            "    type:\n      format: '{text}'",
            ["datasets[0].type.format", "not a placeholder"],
        ),
        (
            "    type: chat_template\nchat_template: chatml",
            ["chat_template = \"chatml\"", "tokenizer_default"],
        ),
        (
            "    type: chat_template\n    train_on_eos: all",
            ["train_on_eos", "\"turn\""],
        ),
    ] {
        let found = problems(&data(text), &[]);
        // Of two data sets neither is the data file.
        let found: Vec<&String> = found
            .iter()
            .filter(|problem| !problem.contains("dataset_path: is missing"))
            .collect();
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert!(
            parts.iter().all(|part| found[0].contains(part)),
            "{text}: {}",
            found[0]
        );
    }
}

#[test]
fn rows_for_validation_are_a_file_of_the_same_type() {
    let test = |kind: &str| {
        changed(
            &["val_set_size"],
            &format!("test_datasets: [{{path: t.jsonl, type: {kind}}}]"),
        )
    };
    let config = load(&test("alpaca"), &[]).unwrap();
    assert_eq!(
        config.val_dataset_path.as_deref(),
        Some(Path::new("t.jsonl"))
    );
    assert_eq!(config.val_set_size, 0.0);
    assert!(problems(&test("gpteacher"), &[])[0].contains("the type and the fields of datasets"));
}

#[test]
fn numbers_formats_and_schedules_mean_what_they_do_there() {
    let of = |without: &[&str], with: &str| load(&changed(without, with), &[]).unwrap();
    assert_eq!(
        of(&["bf16"], "bf16: false\ntf32: true").compute_dtype,
        ComputeDtype::Tf32
    );
    assert_eq!(
        of(&["bf16"], "bf16: false").compute_dtype,
        ComputeDtype::F32
    );
    assert_eq!(
        of(&["bf16"], "bf16:\nfp16: true").compute_dtype,
        ComputeDtype::F16
    );
    assert_eq!(of(&["bf16"], "").compute_dtype, ComputeDtype::Auto);
    // No warm-up belongs to transformers' constant schedule; of one step axolotl makes two.
    let constant = of(&["lr_scheduler"], "lr_scheduler: constant");
    assert_eq!(
        (constant.lr_scheduler, constant.warmup(100)),
        (Decay::Constant, 0)
    );
    assert_eq!(of(&["warmup"], "warmup_steps: 1").warmup_steps, 2);
    assert_eq!(of(&["warmup"], "warmup_steps: 0").warmup(100), 0);
    let silent = of(&["warmup"], "");
    assert_eq!(silent.warmup_ratio, 0.03);
    assert!(
        silent
            .source
            .notes
            .iter()
            .any(|note| note.contains("100 steps"))
    );
    let gaussian = of(
        &[],
        "peft_init_lora_weights: gaussian\nmax_steps: -1\nsave_strategy: epoch",
    );
    assert_eq!(
        (gaussian.init_lora_weights, gaussian.max_steps),
        (Init::Gaussian, None)
    );
    let hub = of(
        &["base_model"],
        "base_model: someone/model\nrevision_of_model: v2",
    );
    assert_eq!(hub.base_model, "someone/model@v2");
    let patterns = of(
        &[],
        "lora_rank_pattern: {q_proj: 4}\npeft_layers_to_transform: ",
    );
    assert_eq!(patterns.rank_pattern, [("q_proj".to_string(), 4)]);
    let whole = of(&[], "lora_modules_to_save: [embed_tokens, lm_head]");
    assert_eq!(whole.modules_to_save, ["embed_tokens", "lm_head"]);
}

#[test]
fn a_data_file_is_looked_for_beside_the_file_first() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("lora")).unwrap();
    std::fs::create_dir_all(folder.path().join("data")).unwrap();
    std::fs::write(folder.path().join("data/rows.jsonl"), "{}").unwrap();
    let file = folder.path().join("lora/run.yaml");
    std::fs::write(&file, QLORA.replace("rows.jsonl", "../data/rows.jsonl")).unwrap();
    let config = Config::load(Some(&file), None, &[]).unwrap();
    assert!(config.dataset_path.is_file(), "{:?}", config.dataset_path);
    let error = Config::load(Some(&file), Some("x"), &[])
        .unwrap_err()
        .to_string();
    assert!(error.contains("leave out --run x"), "{error}");
    std::fs::write(&file, "base_model: [a\nb: 1\n").unwrap();
    let error = Config::load(Some(&file), None, &[])
        .unwrap_err()
        .to_string();
    assert!(error.contains("is not valid YAML:\n  line "), "{error}");
}
