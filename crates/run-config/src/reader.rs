//! Takes one key after another out of a raw configuration and collects everything that is wrong.

use super::error::{Problem, Problems, nearest};
use super::raw::{BUILT_IN, RawConfig, RawEntry};
use super::value::Value;
use super::words::Word;

/// What a key's value became, or what would have been right.
pub(super) type Parsed<T> = Result<T, String>;

/// Every key that a configuration may have.
pub(super) const KEYS: &[&str] = &[
    "preset",
    "base_model",
    "dataset_path",
    "val_dataset_path",
    "val_set_size",
    "dataset_format",
    "dataset_columns",
    "prompt_template",
    "max_seq_len",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "peft_use_rslora",
    "peft_use_dora",
    "target_modules",
    "layers_to_transform",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "init_lora_weights",
    "init_adapter",
    "quant_bits",
    "quantize_lm_head",
    "compute_dtype",
    "device_memory",
    "learning_rate",
    "num_epochs",
    "max_steps",
    "batch_size",
    "max_batch_tokens",
    "gradient_accumulation_steps",
    "warmup_steps",
    "warmup_ratio",
    "lr_scheduler",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "gradient_checkpointing",
    "share_prefixes",
    "merge_micro_batches",
    "seed",
    "eval_steps",
    "evals_per_epoch",
    "logging_steps",
    "save_best",
    "save_steps",
    "saves_per_epoch",
    "save_minutes",
    "save_total_limit",
    "on_non_finite",
    "max_skipped_steps",
    "on_out_of_memory",
    "check_every",
    "output_dir",
];

/// What other trainers call our keys, where the names are too far apart to count as a slip.
const ELSEWHERE: &[(&str, &str)] = &[
    ("r", "lora_r"),
    ("rank", "lora_r"),
    ("alpha", "lora_alpha"),
    ("dropout", "lora_dropout"),
    ("use_rslora", "peft_use_rslora"),
    ("rslora", "peft_use_rslora"),
    ("use_dora", "peft_use_dora"),
    ("dora", "peft_use_dora"),
    ("adapter", "init_adapter"),
    ("lora_model_dir", "init_adapter"),
    ("resume_adapter_file", "init_adapter"),
    ("lora_target_modules", "target_modules"),
    ("model", "base_model"),
    ("model_name_or_path", "base_model"),
    ("data", "dataset_path"),
    ("train_file", "dataset_path"),
    ("dataset_type", "dataset_format"),
    ("chat_template", "prompt_template"),
    ("validation_file", "val_dataset_path"),
    ("load_in_8bit", "quant_bits"),
    ("load_in_4bit", "quant_bits"),
    ("bits", "quant_bits"),
    ("lr", "learning_rate"),
    ("epochs", "num_epochs"),
    ("num_train_epochs", "num_epochs"),
    ("per_device_train_batch_size", "batch_size"),
    ("micro_batch_size", "batch_size"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("sequence_len", "max_seq_len"),
    ("max_length", "max_seq_len"),
    ("cutoff_len", "max_seq_len"),
    ("bf16", "compute_dtype"),
    ("fp16", "compute_dtype"),
    ("dtype", "compute_dtype"),
    ("clip_grad_norm", "max_grad_norm"),
    ("adam_eps", "adam_epsilon"),
    ("test_size", "val_set_size"),
];

/// A raw configuration that is being checked.
pub(super) struct Reader {
    entries: Vec<RawEntry>,
    used: Vec<bool>,
    file: String,
    /// Problems with the number of their entry, to be listed in the order of the file.
    problems: Vec<(usize, Problem)>,
}

impl Reader {
    pub fn new(raw: RawConfig, problems: Vec<Problem>) -> Self {
        Self {
            used: vec![false; raw.entries.len()],
            entries: raw.entries,
            file: raw.file,
            problems: problems
                .into_iter()
                .map(|problem| (usize::MAX, problem))
                .collect(),
        }
    }

    fn index(&self, key: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.key == key)
    }

    /// Whether the key stands in the file or among the overrides, with a value.
    pub fn has(&self, key: &str) -> bool {
        let index = self.index(key);
        index.is_some_and(|index| self.entries[index].value != Value::Null)
    }

    /// Whether the key stands there with a value that is not "none".
    pub fn is_on(&self, key: &str) -> bool {
        let index = self.index(key).filter(|_| self.has(key));
        let off = Value::String("none".into());
        index.is_some_and(|index| self.entries[index].value != off)
    }

    /// Whether somebody wrote the key, with a value: not the configuration that is built in.
    pub fn written(&self, key: &str) -> bool {
        let index = self.index(key).filter(|_| self.has(key));
        index.is_some_and(|index| !self.entries[index].location.starts_with(BUILT_IN))
    }

    /// The key's value; `None` where it is absent or wrong.
    pub fn get<T>(&mut self, key: &str, parse: impl Fn(&Value) -> Parsed<T>) -> Option<T> {
        debug_assert!(KEYS.contains(&key), "{key} is missing in KEYS");
        let index = self.index(key)?;
        self.used[index] = true;
        let value = self.entries[index].value.clone();
        if value == Value::Null {
            return None;
        }
        match parse(&value) {
            Ok(parsed) => Some(parsed),
            Err(mut right) => {
                if without_quotes(&value).is_some_and(|value| parse(&value).is_ok()) {
                    right.push_str(" (write it without quotes)");
                }
                self.problem(key, &right);
                None
            }
        }
    }

    /// [`get`](Self::get), with a value for an absent key.
    pub fn or<T>(&mut self, key: &str, default: T, parse: impl Fn(&Value) -> Parsed<T>) -> T {
        self.get(key, parse).unwrap_or(default)
    }

    /// [`get`](Self::get) for a key that may be switched off with the word `none`.
    pub fn optional<T>(&mut self, key: &str, parse: impl Fn(&Value) -> Parsed<T>) -> Option<T> {
        let parsed = self.get(key, |value| match value {
            Value::String(word) if word == "none" => Ok(None),
            other => parse(other)
                .map(Some)
                .map_err(|right| format!("{right}, or \"none\"")),
        });
        parsed.flatten()
    }

    /// [`get`](Self::get) for a key that must be there.
    pub fn required<T>(
        &mut self,
        key: &str,
        what: &str,
        parse: impl Fn(&Value) -> Parsed<T>,
    ) -> Option<T> {
        if !self.has(key) {
            self.problem(key, &format!("is missing; it must be {what}"));
        }
        self.get(key, parse)
    }

    /// Notes that this key is wrong.
    pub fn problem(&mut self, key: &str, message: &str) {
        let index = self.index(key);
        let entry = index.map(|index| &self.entries[index]);
        let problem = Problem {
            location: entry.map_or(&self.file, |entry| &entry.location).clone(),
            key: key.into(),
            value: entry.map(|entry| entry.value.to_string()),
            message: message.into(),
        };
        self.problems.push((index.unwrap_or(usize::MAX), problem));
    }

    /// Everything that was wrong, with the keys that nobody asked for.
    pub fn finish(mut self) -> Result<(), Problems> {
        for index in 0..self.entries.len() {
            if self.used[index] {
                continue;
            }
            let key = self.entries[index].key.clone();
            let known = ELSEWHERE
                .iter()
                .find(|(name, _)| *name == key)
                .map(|(_, ours)| *ours);
            let message = match known.or_else(|| nearest(&key, KEYS.iter().copied())) {
                Some(name) => format!("unknown key; did you mean {name}?"),
                None => format!("unknown key; the keys are {}", KEYS.join(", ")),
            };
            self.problem(&key, &message);
        }
        if self.problems.is_empty() {
            return Ok(());
        }
        self.problems.sort_by_key(|(index, _)| *index);
        Err(Problems(
            self.problems
                .into_iter()
                .map(|(_, problem)| problem)
                .collect(),
        ))
    }
}

/// The number or truth value that a string spells.
fn without_quotes(value: &Value) -> Option<Value> {
    let Value::String(text) = value else {
        return None;
    };
    let integer = text.parse().ok().map(Value::Integer);
    let float = || text.parse().ok().map(Value::Float);
    let boolean = || text.parse().ok().map(Value::Bool);
    integer.or_else(float).or_else(boolean)
}

/// A whole number of at least `least`. A float without a fraction counts, as in files that Python wrote.
pub(super) fn whole(least: usize) -> impl Fn(&Value) -> Parsed<usize> {
    whole_up_to(least, LARGEST_COUNT)
}

/// Rows, tokens, steps: no product of two leaves 64 bits.
const LARGEST_COUNT: usize = (1 << 31) - 1;

/// A whole number in a range.
pub(super) fn whole_up_to(least: usize, largest: usize) -> impl Fn(&Value) -> Parsed<usize> {
    move |value| {
        let number = match value {
            Value::Integer(number) => usize::try_from(*number).ok(),
            // 2⁵³: from there on a float no longer tells neighbouring integers apart.
            Value::Float(number) if number.fract() == 0.0 && (0.0..9.0e15).contains(number) => {
                Some(*number as usize)
            }
            _ => None,
        };
        match number {
            Some(number) if number > largest => Err(format!("must be at most {largest}")),
            Some(number) if number >= least => Ok(number),
            _ => Err(format!("must be a whole number of at least {least}")),
        }
    }
}

/// A finite number for which `valid` holds; `right` says in words what that is.
pub(super) fn number(
    right: &'static str,
    valid: impl Fn(f64) -> bool,
) -> impl Fn(&Value) -> Parsed<f64> {
    move |value| {
        let number = match value {
            Value::Integer(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            _ => None,
        };
        number
            .filter(|number| number.is_finite() && valid(*number))
            .ok_or_else(|| format!("must be {right}"))
    }
}

/// A number of bytes: `"8GiB"`, `"24 GB"`, or the number itself.
pub(super) fn bytes(value: &Value) -> Parsed<u64> {
    const UNITS: [(&str, f64); 8] = [
        ("KIB", 1024.0),
        ("MIB", 1048576.0),
        ("GIB", 1073741824.0),
        ("TIB", 1099511627776.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
    ];
    let number = match value {
        Value::Integer(number) => Some(*number as f64),
        Value::Float(number) => Some(*number),
        Value::String(text) => {
            let text = text.trim().to_uppercase();
            let unit = UNITS.iter().find(|(unit, _)| text.ends_with(unit));
            let (digits, factor) = match unit {
                Some((unit, factor)) => (text.trim_end_matches(unit), *factor),
                None => (text.trim_end_matches('B'), 1.0),
            };
            let number = digits.trim().parse::<f64>().ok();
            number.map(|number| number * factor)
        }
        _ => None,
    };
    // A device with less than a mebibyte is a unit that was forgotten; 2⁵³ is more than any has.
    number
        .filter(|bytes| (1048576.0..9.0e15).contains(bytes))
        .map(|bytes| bytes.round() as u64)
        .ok_or_else(|| {
            "must be a number of bytes with its unit, as in \"8GiB\" or \"24 GB\"".into()
        })
}

/// `true` or `false`.
pub(super) fn boolean(value: &Value) -> Parsed<bool> {
    match value {
        Value::Bool(boolean) => Ok(*boolean),
        _ => Err("must be true or false".into()),
    }
}

/// A string that is not empty; `right` says in words what it should be.
pub(super) fn text(right: &'static str) -> impl Fn(&Value) -> Parsed<String> {
    move |value| match value {
        Value::String(text) if !text.trim().is_empty() => Ok(text.clone()),
        _ => Err(format!("must be {right}")),
    }
}

/// One of a type's words.
pub(super) fn word<T: Word>(value: &Value) -> Parsed<T> {
    let words = || T::WORDS.iter().map(|(word, _)| *word);
    let right = || {
        let quoted: Vec<String> = words().map(|word| format!("{word:?}")).collect();
        format!("must be one of {}", quoted.join(", "))
    };
    let Value::String(text) = value else {
        return Err(right());
    };
    match T::WORDS.iter().find(|(word, _)| word == text) {
        Some((_, value)) => Ok(*value),
        None => Err(match nearest(text, words()) {
            Some(word) => format!("{}; did you mean {word:?}?", right()),
            None => right(),
        }),
    }
}
