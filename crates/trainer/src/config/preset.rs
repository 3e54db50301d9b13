//! `preset`: what another trainer's own files leave unsaid.

use super::error::Problem;
use super::raw::{RawConfig, RawEntry};
use super::value::Value;

/// The key.
pub(super) const PRESET: &str = "preset";

/// Where a preset's keys are from, in messages.
const LOCATION: &str = "preset \"finlora\"";

/// The keys that a run of FinLoRA's file of runs may have.
const FINLORA_KEYS: [&str; 11] = [
    "base_model",
    "dataset_path",
    "lora_r",
    "lora_alpha",
    "quant_bits",
    "learning_rate",
    "num_epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "peft_use_dora",
    "peft_use_rslora",
];

/// What FinLoRA's `finetune.py` writes into axolotl's configuration where a run has no key for it. Its optimizer, AdamW with
/// 8-bit moments, is ours with moments in f32.
fn finlora() -> Vec<(&'static str, Value)> {
    let text = |text: &str| Value::String(text.into());
    let modules = ["q_proj", "k_proj", "v_proj"].map(text);
    vec![
        ("prompt_template", text("inst")),
        ("max_seq_len", Value::Integer(4096)),
        ("val_set_size", Value::Float(0.02)),
        ("lora_r", Value::Integer(8)),
        ("lora_alpha", Value::Integer(16)),
        ("lora_dropout", Value::Float(0.05)),
        ("target_modules", Value::List(modules.to_vec())),
        // A run that names no bits has a base of 16.
        ("quant_bits", Value::Integer(16)),
        ("learning_rate", Value::Float(2e-4)),
        ("num_epochs", Value::Integer(4)),
        ("batch_size", Value::Integer(2)),
        ("gradient_accumulation_steps", Value::Integer(4)),
        ("warmup_steps", Value::Integer(10)),
        ("lr_scheduler", text("cosine")),
        ("weight_decay", Value::Float(0.0)),
        ("evals_per_epoch", Value::Integer(4)),
        ("saves_per_epoch", Value::Integer(1)),
    ]
}

/// Keys that say the same in another way: where one of them is written, the preset's is left out.
const INSTEAD: [(&str, &str); 5] = [
    ("warmup_steps", "warmup_ratio"),
    ("val_set_size", "val_dataset_path"),
    ("evals_per_epoch", "eval_steps"),
    ("saves_per_epoch", "save_steps"),
    ("num_epochs", "max_steps"),
];

/// Adds the keys of the preset that is asked for, or that the file's shape asks for, where the run does not have them.
/// Returns what is wrong with the key.
pub(super) fn apply(raw: &mut RawConfig) -> Option<Problem> {
    let asked = raw.entries.iter().position(|entry| entry.key == PRESET);
    let asked = asked.map(|at| raw.entries.remove(at));
    let is_wanted = match asked.as_ref().map(|entry| &entry.value) {
        None => has_finloras_shape(raw),
        Some(Value::Null) => false,
        Some(Value::String(word)) if word == "none" => false,
        Some(Value::String(word)) if word == "finlora" => true,
        Some(_) => {
            let entry = asked?;
            return Some(Problem {
                location: entry.location,
                key: entry.key,
                value: Some(entry.value.to_string()),
                message: "must be \"finlora\" or \"none\"".into(),
            });
        }
    };
    if !is_wanted {
        return None;
    }
    let has = |raw: &RawConfig, key: &str| {
        let mut entries = raw.entries.iter();
        entries.any(|entry| entry.key == key && entry.value != Value::Null)
    };
    for (key, value) in finlora() {
        let instead = INSTEAD.iter().filter(|(ours, _)| *ours == key);
        if has(raw, key) || instead.clone().any(|(_, other)| has(raw, other)) {
            continue;
        }
        raw.source.preset.push((key.into(), value.to_string()));
        raw.entries.retain(|entry| entry.key != key);
        raw.entries.push(RawEntry {
            key: key.into(),
            value,
            location: LOCATION.into(),
        });
    }
    None
}

/// Whether the run is one of a JSON file of named runs with no key but FinLoRA's.
fn has_finloras_shape(raw: &RawConfig) -> bool {
    let written = raw.entries.iter().filter(|entry| entry.location != "--set");
    let mut written = written.peekable();
    raw.is_json && raw.source.run.is_some() && written.peek().is_some() && { written }
        .all(|entry| FINLORA_KEYS.contains(&entry.key.as_str()))
}
