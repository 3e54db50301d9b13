//! `preset`: the values that files of another trainer leave out.

use super::error::Problem;
use super::keys::excluded_by;
use super::raw::{RawConfig, RawEntry};
use super::value::Value;

/// The key.
pub(super) const PRESET: &str = "preset";

/// What the key means.
#[cfg(test)]
pub(super) const DOCUMENTATION: &str = "The values that files of another trainer leave out: `\"finlora\"`, `\"axolotl\"` \
    or `\"none\"`. Without this key, a JSON file of named runs that has only FinLoRA's keys gets the preset `finlora`, and \
    a YAML file gets the preset `axolotl`. The keys of the file and `--set` override a preset.";

/// The keys that a run of FinLoRA's file of runs may have.
pub(super) const FINLORA_KEYS: [&str; 11] = [
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

/// The values that FinLoRA's `finetune.py` writes into axolotl's configuration if the run does not have the key. FinLoRA's
/// optimizer is AdamW with 8-bit moments; here the moments are f32.
pub(super) fn finlora() -> Vec<(&'static str, Value)> {
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
        // FinLoRA does not quantize the base model without this key.
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

/// axolotl's defaults, after its `utils/schemas`, `core/builders/base.py` and transformers.
pub(super) fn axolotl() -> Vec<(&'static str, Value)> {
    let text = |text: &str| Value::String(text.into());
    vec![
        ("max_seq_len", Value::Integer(512)),
        ("val_set_size", Value::Float(0.0)),
        ("lora_dropout", Value::Float(0.0)),
        ("quant_bits", Value::Integer(16)),
        ("compute_dtype", text("auto")),
        ("num_epochs", Value::Integer(1)),
        ("batch_size", Value::Integer(1)),
        ("gradient_accumulation_steps", Value::Integer(1)),
        ("warmup_ratio", Value::Float(0.03)),
        ("lr_scheduler", text("cosine")),
        ("weight_decay", Value::Float(0.0)),
        ("adam_beta1", Value::Float(0.9)),
        ("adam_beta2", Value::Float(0.999)),
        ("adam_epsilon", Value::Float(1e-8)),
        ("max_grad_norm", Value::Float(1.0)),
        ("seed", Value::Integer(42)),
        ("save_best", Value::Bool(false)),
        ("saves_per_epoch", Value::Integer(1)),
        ("save_total_limit", Value::Integer(4)),
        ("output_dir", text("./model-out")),
    ]
}

/// Keys without a default in axolotl.
const AXOLOTL_NEEDS: [(&str, &str); 4] = [
    ("learning_rate", "learning_rate"),
    ("lora_r", "lora_r"),
    ("lora_alpha", "lora_alpha"),
    (
        "target_modules",
        "lora_target_modules (or lora_target_linear)",
    ),
];

/// A key in whose place another may be written; the preset's value is then left out.
fn alternative(key: &str) -> Option<&'static str> {
    match key {
        "num_epochs" => Some("max_steps"),
        key => excluded_by(key),
    }
}

/// Adds the keys of the preset that the run does not have. The key `preset` names the preset; without it the file's form
/// does. Returns the problems: a wrong name, and missing keys.
pub(super) fn apply(raw: &mut RawConfig) -> Vec<Problem> {
    let asked = raw.entries.iter().position(|entry| entry.key == PRESET);
    let asked = asked.map(|at| raw.entries.remove(at));
    let name = match asked.as_ref().map(|entry| &entry.value) {
        None if raw.source.is_axolotl => "axolotl",
        None if has_finloras_shape(raw) => "finlora",
        None | Some(Value::Null) => return Vec::new(),
        Some(Value::String(word)) => word,
        Some(_) => "",
    };
    let values = match name {
        "none" => return Vec::new(),
        "finlora" => finlora(),
        "axolotl" => axolotl(),
        _ => {
            let problem = asked.map(|entry| Problem {
                location: entry.location,
                key: entry.key,
                value: Some(entry.value.to_string()),
                message: "must be \"finlora\", \"axolotl\" or \"none\"".into(),
            });
            return problem.into_iter().collect();
        }
    };
    raw.source.preset_name = name.into();
    let location = format!("preset {name:?}");
    let has = |raw: &RawConfig, key: &str| {
        let mut entries = raw.entries.iter();
        entries.any(|entry| entry.key == key && entry.value != Value::Null)
    };
    let mut problems = Vec::new();
    // With init_adapter, these settings are those of the adapter.
    if raw.source.is_axolotl && !has(raw, "init_adapter") {
        for (key, theirs) in AXOLOTL_NEEDS {
            if !has(raw, key) {
                problems.push(Problem {
                    location: raw.file.clone(),
                    key: theirs.into(),
                    value: None,
                    message: "is missing; axolotl has no default for it".into(),
                });
            }
        }
    }
    for (key, value) in values {
        if has(raw, key) || alternative(key).is_some_and(|other| has(raw, other)) {
            continue;
        }
        if (name, key) == ("axolotl", "warmup_ratio") {
            let note = "warmup_ratio: axolotl's own warm-up ends after 100 steps at most; set warmup_steps in a run of more \
                than 3300 steps";
            raw.source.notes.push(note.into());
        }
        raw.source.preset.push((key.into(), value.to_string()));
        raw.entries.retain(|entry| entry.key != key);
        raw.entries.push(RawEntry {
            key: key.into(),
            value,
            location: location.clone(),
        });
    }
    problems
}

/// Whether the run is of a JSON file of named runs and has no key but FinLoRA's.
fn has_finloras_shape(raw: &RawConfig) -> bool {
    let written = raw.entries.iter().filter(|entry| entry.location != "--set");
    let mut written = written.peekable();
    raw.is_json && raw.source.run.is_some() && written.peek().is_some() && { written }
        .all(|entry| FINLORA_KEYS.contains(&entry.key.as_str()))
}
