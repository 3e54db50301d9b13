//! FinLoRA's own file of runs: each resolves to FinLoRA's training.

use std::path::Path;

use data::PromptTemplate;
use lora_core::TargetModules;
use run_config::Config;
use serde_json::Value;

/// FinLoRA's `finetune_configs.json`, if it is beside the repository, which holds no
/// copy of it.
fn file() -> Option<std::path::PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let path = match std::env::var_os("FINLORA_CONFIGS") {
        Some(path) => path.into(),
        None => root.join("../shared/data/finlora_finetune_configs.json"),
    };
    path.is_file().then_some(path)
}

#[test]
fn every_run_of_finloras_file_resolves_to_finloras_values() {
    let Some(path) = file() else {
        return println!("skipped: FINLORA_CONFIGS names no file");
    };
    let text = std::fs::read_to_string(&path).expect("the file can be read");
    let runs: serde_json::Map<String, Value> = serde_json::from_str(&text).expect("it is JSON");
    assert!(runs.len() > 30, "{} runs", runs.len());
    let sets = ["base_model=embedded", "dataset_path=embedded"].map(String::from);
    for (name, run) in &runs {
        let config =
            Config::load(Some(&path), Some(name), &sets).unwrap_or_else(|e| panic!("{name}: {e}"));
        // As finetune.py reads a run: its key, or the default of its template for axolotl.
        let number = |key: &str, default: f64| {
            run.get(key)
                .map_or(default, |it| it.as_f64().expect("a number"))
        };
        let flag = |key: &str| {
            run.get(key)
                .is_some_and(|it| it.as_bool().expect("true or false"))
        };
        let expected = [
            ("lora_r", number("lora_r", 8.0), config.lora_r as f64),
            ("lora_alpha", number("lora_alpha", 16.0), config.lora_alpha),
            ("lora_dropout", 0.05, config.lora_dropout),
            (
                "quant_bits",
                number("quant_bits", 16.0),
                f64::from(config.quant_bits),
            ),
            (
                "learning_rate",
                number("learning_rate", 2e-4),
                config.learning_rate,
            ),
            ("num_epochs", number("num_epochs", 4.0), config.num_epochs),
            (
                "batch_size",
                number("batch_size", 2.0),
                config.batch_size.rows() as f64,
            ),
            (
                "gradient_accumulation_steps",
                number("gradient_accumulation_steps", 4.0),
                config.gradient_accumulation_steps as f64,
            ),
            ("max_seq_len", 4096.0, config.max_seq_len as f64),
            ("val_set_size", 0.02, config.val_set_size),
            ("warmup_steps", 10.0, config.warmup_steps as f64),
            ("weight_decay", 0.0, config.weight_decay),
            (
                "evals_per_epoch",
                4.0,
                config.evals_per_epoch.unwrap_or(0) as f64,
            ),
            (
                "saves_per_epoch",
                1.0,
                config.saves_per_epoch.unwrap_or(0) as f64,
            ),
            (
                "dora",
                f64::from(flag("peft_use_dora")),
                f64::from(config.peft_use_dora),
            ),
            (
                "rslora",
                f64::from(flag("peft_use_rslora")),
                f64::from(config.peft_use_rslora),
            ),
        ];
        print!("{name}:");
        for (key, expected, got) in expected {
            print!(" {key} {got}");
            assert_eq!(got, expected, "{name}: {key}");
        }
        println!();
        assert_eq!(config.prompt_template, PromptTemplate::Inst, "{name}");
        let modules = ["q_proj", "k_proj", "v_proj"].map(String::from).to_vec();
        assert_eq!(
            config.target_modules,
            TargetModules::Names(modules),
            "{name}"
        );
    }
}
