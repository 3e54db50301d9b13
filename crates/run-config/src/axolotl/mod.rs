//! Converts axolotl's YAML to the keys of this configuration.
//!
//! Every key of such a file is supported, has no effect on the training (one note names these keys), or is rejected.
//! Values that the file leaves out are those of the preset `axolotl`. Meanings follow axolotl 0.18: `utils/schemas`, `core/builders`, `loaders`.
//!
//! ```text
//! keys.rs     keys without counterpart: without effect, or rejected with a remedy
//! datasets.rs the data file and its format
//! format.rs   prompt formats, by name or written out
//! ```

mod datasets;
mod format;
mod keys;
#[cfg(test)]
mod tests;

use super::error::{Problem, nearest};
use super::keys::KEYS;
use super::raw::{RawConfig, RawEntry, key_and_value};
use super::value::Value;
use hub::HubName;
use keys::is_off;

/// How axolotl reads a value.
#[derive(Clone, Copy)]
enum Kind {
    /// A number, or a text of one, as `1e-4` is in YAML 1.1.
    Number,
    /// `true`, or one of Python's words for it.
    Switch,
    /// As it is.
    Plain,
}

/// Keys of axolotl, our names for them, and how axolotl reads the values.
const SAME: [(&str, &str, Kind); 31] = [
    ("micro_batch_size", "batch_size", Kind::Number),
    ("num_epochs", "num_epochs", Kind::Number),
    ("learning_rate", "learning_rate", Kind::Number),
    ("weight_decay", "weight_decay", Kind::Number),
    ("max_grad_norm", "max_grad_norm", Kind::Number),
    ("loraplus_lr_ratio", "loraplus_lr_ratio", Kind::Number),
    ("adam_beta1", "adam_beta1", Kind::Number),
    ("adam_beta2", "adam_beta2", Kind::Number),
    ("adam_epsilon", "adam_epsilon", Kind::Number),
    ("lora_r", "lora_r", Kind::Number),
    ("lora_alpha", "lora_alpha", Kind::Number),
    ("lora_dropout", "lora_dropout", Kind::Number),
    ("peft_use_dora", "peft_use_dora", Kind::Switch),
    ("peft_use_rslora", "peft_use_rslora", Kind::Switch),
    ("lora_rank_pattern", "rank_pattern", Kind::Plain),
    ("lora_alpha_pattern", "alpha_pattern", Kind::Plain),
    ("lora_exclude_modules", "exclude_modules", Kind::Plain),
    ("lora_modules_to_save", "modules_to_save", Kind::Plain),
    (
        "peft_layers_to_transform",
        "layers_to_transform",
        Kind::Plain,
    ),
    ("lora_model_dir", "init_adapter", Kind::Plain),
    ("sequence_len", "max_seq_len", Kind::Number),
    ("val_set_size", "val_set_size", Kind::Number),
    ("seed", "seed", Kind::Number),
    ("output_dir", "output_dir", Kind::Plain),
    ("load_best_model_at_end", "save_best", Kind::Switch),
    ("eval_steps", "eval_steps", Kind::Number),
    ("evals_per_epoch", "evals_per_epoch", Kind::Number),
    ("save_steps", "save_steps", Kind::Number),
    ("saves_per_epoch", "saves_per_epoch", Kind::Number),
    ("save_total_limit", "save_total_limit", Kind::Number),
    ("max_steps", "max_steps", Kind::Number),
];

/// Our name of an axolotl key that has the same meaning under another name.
pub(super) fn known_elsewhere(name: &str) -> Option<&'static str> {
    let found = SAME.iter().find(|(theirs, ..)| *theirs == name);
    found.map(|(_, ours, _)| *ours)
}

/// axolotl's name of one of our keys.
#[cfg(test)]
pub(super) fn name_of(key: &str) -> Option<&'static str> {
    let found = SAME.iter().find(|(_, ours, _)| *ours == key);
    found.map(|(theirs, ..)| *theirs)
}

/// For these keys zero means zero. For others, axolotl treats zero as absent.
const ZERO_COUNTS: [&str; 10] = [
    "micro_batch_size",
    "num_epochs",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "sequence_len",
    "seed",
];

/// Supported keys that are converted one by one.
const OTHERS: [&str; 37] = [
    "base_model",
    "model_revision",
    "revision_of_model",
    "datasets",
    "test_datasets",
    "chat_template",
    "chat_template_jinja",
    "eot_tokens",
    "train_on_inputs",
    "special_tokens",
    "adapter",
    "load_in_8bit",
    "load_in_4bit",
    "lora_target_modules",
    "lora_target_linear",
    "peft_init_lora_weights",
    "peft_autocast_adapter_dtype",
    "gradient_accumulation_steps",
    "batch_size",
    "optimizer",
    "lr_scheduler",
    "warmup_steps",
    "warmup_ratio",
    "bf16",
    "fp16",
    "bfloat16",
    "float16",
    "tf32",
    "float32",
    "gradient_checkpointing",
    "eval_strategy",
    "evaluation_strategy",
    "save_strategy",
    "excess_length_strategy",
    "eval_sequence_len",
    "min_sample_len",
    "plugins",
];

/// The key that selects the best adapter. Here the validation loss selects it.
const BEST: &str = "metric_for_best_model";

/// The names of AdamW in transformers, and whether its moments have 8 bits.
const OPTIMIZERS: [(&str, bool); 10] = [
    ("adamw_torch", false),
    ("adamw_torch_fused", false),
    ("adamw_hf", false),
    ("adamw_apex_fused", false),
    ("paged_adamw", false),
    ("paged_adamw_32bit", false),
    ("adamw_8bit", true),
    ("adamw_bnb_8bit", true),
    ("paged_adamw_8bit", true),
    ("adamw_torch_8bit", true),
];

/// Replaces the keys of an axolotl file by those of this configuration. Overrides of axolotl's keys replace those of the
/// file. Returns the overrides of our own keys, and everything that is wrong.
pub(super) fn convert(raw: &mut RawConfig, overrides: &[String]) -> (Vec<String>, Vec<Problem>) {
    let mut ours = Vec::new();
    for text in overrides {
        match key_and_value(text) {
            Some((key, value)) if !KEYS.contains(&key.as_str()) => {
                raw.entries.retain(|entry| entry.key != key);
                let location = "--set".into();
                raw.entries.push(RawEntry {
                    key,
                    value,
                    location,
                });
            }
            _ => ours.push(text.clone()),
        }
    }
    let mut converter = Converter {
        theirs: std::mem::take(&mut raw.entries),
        ours: Vec::new(),
        problems: Vec::new(),
        notes: Vec::new(),
    };
    converter.run();
    raw.entries = converter.ours;
    raw.source.notes = converter.notes;
    (ours, converter.problems)
}

struct Converter {
    theirs: Vec<RawEntry>,
    ours: Vec<RawEntry>,
    problems: Vec<Problem>,
    notes: Vec<String>,
}

impl Converter {
    fn run(&mut self) {
        for (theirs, ours, kind) in SAME {
            self.same(theirs, ours, kind);
        }
        self.model();
        datasets::convert(self);
        self.adapter();
        self.update();
        self.precision();
        self.schedule();
        self.lengths();
        self.others();
    }

    /// The entry of a key that has a value.
    fn get(&self, key: &str) -> Option<RawEntry> {
        let mut entries = self.theirs.iter();
        let found = entries.find(|entry| entry.key == key && entry.value != Value::Null);
        found.cloned()
    }

    /// The entry of a key whose value switches something on.
    fn on(&self, key: &str) -> Option<RawEntry> {
        self.get(key).filter(|entry| !is_off(&entry.value))
    }

    /// Whether a switch is on. Another value than a switch has is a problem.
    fn is_on(&mut self, key: &str) -> bool {
        match self.on(key) {
            None => false,
            Some(entry) => match switch(&entry.value) {
                Value::Bool(on) => on,
                _ => {
                    self.problem(&entry, "must be true or false");
                    false
                }
            },
        }
    }

    fn problem(&mut self, entry: &RawEntry, message: impl Into<String>) {
        self.problems.push(Problem {
            location: entry.location.clone(),
            key: entry.key.clone(),
            value: Some(entry.value.to_string()),
            message: message.into(),
        });
    }

    /// Sets a key of this configuration to what an entry means.
    fn set(&mut self, key: &str, value: Value, entry: &RawEntry) {
        let location = if entry.key == key {
            entry.location.clone()
        } else {
            format!("{} ({})", entry.location, entry.key)
        };
        self.ours.push(RawEntry {
            key: key.into(),
            value,
            location,
        });
    }

    fn same(&mut self, theirs: &str, ours: &str, kind: Kind) {
        let Some(entry) = self.get(theirs) else {
            return;
        };
        if is_off(&entry.value) && !ZERO_COUNTS.contains(&theirs) {
            return;
        }
        let value = match kind {
            Kind::Number => number(&entry.value),
            Kind::Switch => switch(&entry.value),
            Kind::Plain => entry.value.clone(),
        };
        match (theirs, &value) {
            // transformers' word for "as many as the epochs have".
            ("max_steps", Value::Integer(-1)) => {}
            ("eval_steps" | "save_steps", Value::Float(share)) if *share < 1.0 => {
                let per_epoch = match theirs {
                    "eval_steps" => "evals_per_epoch",
                    _ => "saves_per_epoch",
                };
                let message =
                    format!("a share of all steps is not supported; write {per_epoch} instead");
                self.problem(&entry, message);
            }
            _ => self.set(ours, value, &entry),
        }
    }

    fn model(&mut self) {
        let Some(model) = self.get("base_model") else {
            return;
        };
        let revision = self.on("model_revision");
        match (revision.or(self.on("revision_of_model")), &model.value) {
            (Some(revision), Value::String(name)) => {
                let text = match &revision.value {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                let revised = format!("{name}@{text}");
                let known = HubName::parse(&revised);
                if known.is_none() {
                    self.problem(
                        &revision,
                        "names a revision of a model on the Hub, and base_model is not a name on the Hub",
                    );
                }
                let name = known.map_or(name.clone(), |_| revised);
                self.set("base_model", Value::String(name), &model);
            }
            _ => self.set("base_model", model.value.clone(), &model),
        }
    }

    fn adapter(&mut self) {
        let kind = self.get("adapter").map(|entry| entry.value);
        let is_qlora = match &kind {
            Some(Value::String(word)) if word == "lora" => false,
            Some(Value::String(word)) if word == "qlora" => true,
            _ => {
                let entry = self.entry_or_file("adapter");
                self.problem(
                    &entry,
                    "must be lora or qlora: only adapters are trained here",
                );
                false
            }
        };
        let bits = match (self.is_on("load_in_8bit"), self.is_on("load_in_4bit")) {
            (true, true) => {
                let entry = self.entry_or_file("load_in_4bit");
                self.problem(&entry, "load_in_8bit is true as well; keep one of the two");
                None
            }
            (true, false) => Some(("load_in_8bit", 8)),
            (false, true) => Some(("load_in_4bit", 4)),
            (false, false) => None,
        };
        if is_qlora && !self.is_on("load_in_4bit") {
            let entry = self.entry_or_file("adapter");
            self.problem(&entry, "qlora needs load_in_4bit: true");
        }
        if let Some((key, bits)) = bits {
            let entry = self.entry_or_file(key);
            self.set("quant_bits", Value::Integer(bits), &entry);
            self.notes.push(format!(
                "{key}: the base has {bits} bits per weight in this trainer's own format; bitsandbytes' settings (NF4, double \
                 quantization, thresholds) have no counterpart"
            ));
        }
        self.targets();
        match self.get("peft_init_lora_weights") {
            Some(entry) if entry.value == Value::Bool(false) => {
                self.problem(&entry, "must be true, gaussian, pissa, pissa_niter_N or olora: an adapter starts without effect here");
            }
            Some(entry) => self.set("init_lora_weights", entry.value.clone(), &entry),
            None => {}
        }
        if let Some(entry) = self.get("peft_autocast_adapter_dtype")
            && switch(&entry.value) != Value::Bool(true)
        {
            self.problem(&entry, "adapters are f32 here; remove it");
        }
    }

    fn targets(&mut self) {
        let listed = self.on("lora_target_modules");
        if self.is_on("lora_target_linear") {
            let entry = self.entry_or_file("lora_target_linear");
            match listed.as_ref().map(|entry| &entry.value) {
                Some(Value::List(names)) if names.contains(&Value::String("lm_head".into())) => {
                    let message = "with lm_head in lora_target_modules; list all modules there and remove this key";
                    self.problem(&entry, message);
                }
                _ => self.set("target_modules", Value::String("all-linear".into()), &entry),
            }
        } else if let Some(entry) = listed {
            self.set("target_modules", entry.value.clone(), &entry);
        }
    }

    /// The number of examples per optimizer step, and the optimizer.
    fn update(&mut self) {
        let accumulation = self.on("gradient_accumulation_steps");
        match (accumulation, self.on("batch_size")) {
            (Some(_), Some(entry)) => self.problem(
                &entry,
                "stands beside gradient_accumulation_steps, and one follows from the other; remove one of them",
            ),
            (Some(entry), None) => {
                let value = number(&entry.value);
                self.set("gradient_accumulation_steps", value, &entry);
            }
            (None, Some(entry)) => {
                let micro = self.get("micro_batch_size").map(|entry| number(&entry.value));
                match (number(&entry.value), micro) {
                    (Value::Integer(rows), Some(Value::Integer(micro))) if micro > 0 => {
                        let steps = Value::Integer(rows / micro);
                        self.set("gradient_accumulation_steps", steps, &entry);
                    }
                    // The problem is reported for the other key.
                    (Value::Integer(_), Some(_)) => {}
                    _ => self.problem(&entry, "must be a whole number, beside micro_batch_size"),
                }
            }
            (None, None) => {}
        }
        let Some(entry) = self.on("optimizer") else {
            return;
        };
        let known = OPTIMIZERS.iter();
        let found = known
            .clone()
            .find(|(name, _)| entry.value == Value::String(name.to_string()));
        match found {
            Some((name, true)) => self.notes.push(format!(
                "optimizer {name}: its moments have 32 bits here, not 8"
            )),
            Some((_, false)) => {}
            None => {
                let names: Vec<&str> = known.map(|(name, _)| *name).collect();
                let message = format!(
                    "AdamW is the optimizer here; write one of {}",
                    names.join(", ")
                );
                self.problem(&entry, message);
            }
        }
    }

    /// The compute dtype: bf16 if it is requested by name; `auto` leaves the choice to the device.
    fn precision(&mut self) {
        let is_auto = |entry: &Option<RawEntry>| {
            let auto = Value::String("auto".into());
            entry.as_ref().is_some_and(|entry| entry.value == auto)
        };
        let bf16 = self.get("bf16");
        let bf16_is_auto = is_auto(&bf16) || !self.theirs.iter().any(|entry| entry.key == "bf16");
        let tf32 = self.get("tf32");
        let keys = ["bf16", "fp16", "bfloat16", "float16", "tf32", "float32"];
        let Some(first) = keys.iter().find_map(|key| self.get(key)) else {
            return;
        };
        let is_full = bf16
            .as_ref()
            .is_some_and(|entry| entry.value == Value::String("full".into()));
        let bf16_on = is_full || (!is_auto(&bf16) && self.is_on("bf16")) || self.is_on("bfloat16");
        let fp16_on = self.is_on("fp16") || self.is_on("float16");
        let tf32_on = !is_auto(&tf32) && self.is_on("tf32");
        let f32_on = self.is_on("float32");
        let word = match () {
            () if bf16_on => "bf16",
            () if fp16_on => "f16",
            () if f32_on => "f32",
            () if bf16_is_auto => "auto",
            () if tf32_on => "tf32",
            () => "f32",
        };
        self.set("compute_dtype", Value::String(word.into()), &first);
    }

    fn schedule(&mut self) {
        let decay = self.on("lr_scheduler");
        let word = decay.as_ref().map(|entry| entry.value.clone());
        let has_warmup = word != Some(Value::String("constant".into()));
        if let Some(entry) = &decay {
            match &entry.value {
                Value::String(word) if ["cosine", "linear"].contains(&word.as_str()) => {
                    self.set("lr_scheduler", entry.value.clone(), entry);
                }
                // transformers' "constant" has no warm-up.
                Value::String(word) if word == "constant" => {
                    self.set("lr_scheduler", entry.value.clone(), entry);
                    self.set("warmup_steps", Value::Integer(0), entry);
                }
                Value::String(word) if word == "constant_with_warmup" => {
                    self.set("lr_scheduler", Value::String("constant".into()), entry);
                }
                _ => self.problem(
                    entry,
                    "must be cosine, linear, constant or constant_with_warmup",
                ),
            }
        }
        match (self.get("warmup_steps"), self.get("warmup_ratio")) {
            _ if !has_warmup => {
                let unread = ["warmup_steps", "warmup_ratio"].map(|key| self.on(key));
                for entry in unread.into_iter().flatten() {
                    self.notes.push(format!(
                        "{}: the constant schedule has no warm-up, as in axolotl; constant_with_warmup has one",
                        entry.key
                    ));
                }
            }
            (Some(steps), ratio) => {
                let value = match number(&steps.value) {
                    // axolotl's builder makes two of one.
                    Value::Integer(1) => Value::Integer(2),
                    other => other,
                };
                let is_zero = value == Value::Integer(0);
                self.set("warmup_steps", value, &steps);
                // With zero steps there is no warm-up, whatever the ratio is.
                if let Some(ratio) = ratio.filter(|_| !is_zero) {
                    self.set("warmup_ratio", number(&ratio.value), &ratio);
                }
            }
            (None, Some(ratio)) => self.set("warmup_ratio", number(&ratio.value), &ratio),
            (None, None) => {}
        }
        if let Some(entry) = self.get("gradient_checkpointing") {
            let value = match &entry.value {
                Value::String(word) if word.starts_with("offload") || word == "unsloth" => {
                    Value::Bool(true)
                }
                other => switch(other),
            };
            self.set("gradient_checkpointing", value, &entry);
        }
        self.strategy(&["eval_strategy", "evaluation_strategy"], "eval");
        self.strategy(&["save_strategy"], "save");
    }

    /// When validations and checkpoints happen if neither steps nor a number per epoch are given.
    fn strategy(&mut self, names: &[&str], what: &str) {
        let Some(entry) = names.iter().find_map(|name| self.on(name)) else {
            return;
        };
        let steps = format!("{what}_steps");
        let per_epoch = format!("{what}s_per_epoch");
        let has_number = self.on(&steps).is_some() || self.on(&per_epoch).is_some();
        match &entry.value {
            Value::String(word) if word == "epoch" && !has_number => {
                self.set(&per_epoch, Value::Integer(1), &entry);
            }
            Value::String(word) if word == "steps" && has_number => {}
            Value::String(word) if word == "steps" => {
                self.problem(&entry, format!("needs {steps} beside it"));
            }
            // A validation at the end and a checkpoint every few minutes remain; neither changes the training.
            Value::String(word) if word == "no" => {}
            Value::Bool(false) => {}
            _ => self.problem(&entry, "must be steps, epoch or no"),
        }
    }

    fn lengths(&mut self) {
        if let Some(entry) = self.on("excess_length_strategy")
            && entry.value != Value::String("drop".into())
        {
            self.problem(
                &entry,
                "examples longer than sequence_len are skipped and counted, never truncated; write drop",
            );
        }
        if let Some(entry) = self.on("eval_sequence_len") {
            let same = self.get("sequence_len").map(|entry| number(&entry.value));
            if same != Some(number(&entry.value)) {
                self.problem(&entry, "must be sequence_len, or left out");
            }
        }
        if let Some(entry) = self.on("min_sample_len")
            && !matches!(number(&entry.value), Value::Integer(0..=2))
        {
            self.problem(
                &entry,
                "short examples are trained on here; remove them from the data file",
            );
        }
    }

    /// All other keys: without effect, rejected, or unknown.
    fn others(&mut self) {
        self.special_tokens();
        self.plugins();
        if let Some(entry) = self.on(BEST)
            && !["loss", "eval_loss"]
                .map(String::from)
                .map(Value::String)
                .contains(&entry.value)
        {
            self.problem(
                &entry,
                "the best adapter is that of the lowest validation loss; remove it",
            );
        }
        let mut unread = Vec::new();
        for entry in self.theirs.clone() {
            let key = entry.key.as_str();
            let is_read =
                SAME.iter().any(|(name, ..)| *name == key) || OTHERS.contains(&key) || key == BEST;
            if is_read {
                continue;
            }
            if keys::is_without_effect(key) {
                if !is_off(&entry.value) {
                    unread.push(entry.key.clone());
                }
            } else if let Some(remedy) = keys::remedy(key) {
                if !is_off(&entry.value) {
                    self.problem(&entry, remedy);
                }
            } else {
                self.unknown(&entry);
            }
        }
        let chat = ["chat_template", "chat_template_jinja", "eot_tokens"];
        if !datasets::has_chat(self) {
            unread.extend(
                chat.iter()
                    .filter_map(|key| self.on(key))
                    .map(|entry| entry.key),
            );
        }
        if !unread.is_empty() {
            self.notes.push(format!(
                "axolotl's keys that do not change the training and are not read: {}",
                unread.join(", ")
            ));
        }
    }

    fn unknown(&mut self, entry: &RawEntry) {
        let known = SAME.iter().map(|(name, ..)| *name);
        let known = known.chain(OTHERS).chain(keys::names());
        let message = match nearest(&entry.key, known) {
            Some(name) => format!("unknown key; did you mean {name}?"),
            None => "unknown key, for axolotl and for this trainer; remove it".into(),
        };
        self.problem(entry, message);
    }

    fn special_tokens(&mut self) {
        let Some(entry) = self.on("special_tokens") else {
            return;
        };
        let Value::Table(tokens) = &entry.value else {
            return self.problem(&entry, "must be a mapping of token names to tokens");
        };
        for token in tokens.iter().filter(|token| !is_off(&token.value)) {
            // This trainer pads nothing, and no text holds the unknown token.
            if ["pad_token", "unk_token"].contains(&token.key.as_str()) {
                continue;
            }
            let place = RawEntry {
                key: format!("special_tokens.{}", token.key),
                value: token.value.clone(),
                location: entry.location.clone(),
            };
            self.problem(
                &place,
                "the model's files name this token (tokenizer_config.json); set it there if it is another, and remove it \
                 here",
            );
        }
    }

    fn plugins(&mut self) {
        let Some(entry) = self.on("plugins") else {
            return;
        };
        let known = keys::PLUGINS_WITHOUT_EFFECT.map(|name| Value::String(name.into()));
        match &entry.value {
            Value::List(plugins) if plugins.iter().all(|plugin| known.contains(plugin)) => {}
            _ => self.problem(
                &entry,
                format!(
                    "only {} change nothing here; remove the others",
                    keys::PLUGINS_WITHOUT_EFFECT.join(" and ")
                ),
            ),
        }
    }

    /// The entry of a key, or one that stands for its absence.
    fn entry_or_file(&self, key: &str) -> RawEntry {
        let found = self.theirs.iter().find(|entry| entry.key == key).cloned();
        found.unwrap_or_else(|| RawEntry {
            key: key.into(),
            value: Value::Null,
            location: self.file(),
        })
    }

    /// The file, for messages about missing keys.
    fn file(&self) -> String {
        let written = self.theirs.iter().find(|entry| entry.location != "--set");
        let location = written.map_or("--set", |entry| &entry.location);
        let file = location.rsplit_once(':').map_or(location, |(file, _)| file);
        file.into()
    }
}

/// A number where a text spells one, as pydantic reads it.
fn number(value: &Value) -> Value {
    let Value::String(text) = value else {
        return value.clone();
    };
    let text = text.trim();
    let integer = text.parse().ok().map(Value::Integer);
    let float = || text.parse().ok().map(Value::Float);
    integer.or_else(float).unwrap_or_else(|| value.clone())
}

/// A truth value where a text or a number spells one, as pydantic reads it.
fn switch(value: &Value) -> Value {
    let word = match value {
        Value::String(text) => text.trim().to_lowercase(),
        Value::Integer(number) => number.to_string(),
        other => return other.clone(),
    };
    match word.as_str() {
        "true" | "t" | "yes" | "y" | "on" | "1" => Value::Bool(true),
        "false" | "f" | "no" | "n" | "off" | "0" => Value::Bool(false),
        _ => value.clone(),
    }
}
