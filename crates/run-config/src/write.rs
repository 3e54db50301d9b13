//! A configuration as TOML, with every key.

use lora_core::{ExcludeModules, TargetModules};
use toml::{Table, Value};

use super::Config;
use super::words::{BatchSize, Word};

impl Config {
    /// The configuration as a TOML file that names every key; the same parser reads it back as the same
    /// configuration. A key that is off says `"none"`.
    pub fn to_toml(&self) -> String {
        let path = |path: &std::path::Path| Value::from(path.to_string_lossy().into_owned());
        let whole = |number: usize| Value::from(number as i64);
        let optional = |number: Option<usize>| number.map_or_else(none, whole);
        let mut table = Table::new();
        let mut set = |key: &str, value: Value| {
            table.insert(key.into(), value);
        };
        // What a preset gave is written out below.
        set("preset", none());
        set("base_model", self.base_model.clone().into());
        set("dataset_path", path(&self.dataset_path));
        set(
            "val_dataset_path",
            self.val_dataset_path.as_deref().map_or_else(none, path),
        );
        set("val_set_size", self.val_set_size.into());
        let format = self.dataset_format.map_or("auto", |format| format.word());
        set("dataset_format", format.into());
        let columns = self.dataset_columns.0.iter();
        let columns: Table = columns
            .map(|(ours, theirs)| (ours.clone(), theirs.clone().into()))
            .collect();
        let is_renamed = !columns.is_empty();
        let columns = is_renamed.then_some(Value::Table(columns));
        set("dataset_columns", columns.unwrap_or_else(none));
        set("prompt_template", self.prompt_template.to_string().into());
        set("max_seq_len", whole(self.max_seq_len));
        set("lora_r", whole(self.lora_r));
        set("lora_alpha", self.lora_alpha.into());
        set("lora_dropout", self.lora_dropout.into());
        set("peft_use_rslora", self.peft_use_rslora.into());
        set("peft_use_dora", self.peft_use_dora.into());
        set(
            "target_modules",
            match &self.target_modules {
                TargetModules::Names(names) => names.clone().into(),
                TargetModules::Regex(pattern) => pattern.clone().into(),
                TargetModules::AllLinear => "all-linear".into(),
            },
        );
        let layers =
            |layers: &Vec<usize>| Value::Array(layers.iter().map(|layer| whole(*layer)).collect());
        set(
            "layers_to_transform",
            self.layers_to_transform.as_ref().map_or_else(none, layers),
        );
        set(
            "exclude_modules",
            match &self.exclude_modules {
                None => none(),
                Some(ExcludeModules::Names(names)) => names.clone().into(),
                Some(ExcludeModules::Regex(pattern)) => pattern.clone().into(),
            },
        );
        set("rank_pattern", pattern(&self.rank_pattern, |r| whole(*r)));
        set(
            "alpha_pattern",
            pattern(&self.alpha_pattern, |alpha| Value::from(*alpha)),
        );
        set(
            "trainable_token_indices",
            pattern(&self.trainable_token_indices, |tokens| {
                Value::Array(tokens.iter().map(|token| whole(*token)).collect())
            }),
        );
        set("init_lora_weights", self.init_lora_weights.word().into());
        set(
            "init_adapter",
            self.init_adapter.as_deref().map_or_else(none, path),
        );
        set("quant_bits", whole(self.quant_bits.into()));
        set("quantize_lm_head", self.quantize_lm_head.into());
        set("compute_dtype", self.compute_dtype.word().into());
        let memory = self.device_memory.map(|bytes| Value::from(bytes as i64));
        set("device_memory", memory.unwrap_or_else(none));
        set("learning_rate", self.learning_rate.into());
        set("num_epochs", self.num_epochs.into());
        set("max_steps", optional(self.max_steps));
        let batch_size = match self.batch_size {
            BatchSize::Rows(rows) => whole(rows),
            BatchSize::Auto => "auto".into(),
        };
        set("batch_size", batch_size);
        set("max_batch_tokens", optional(self.max_batch_tokens));
        set(
            "gradient_accumulation_steps",
            whole(self.gradient_accumulation_steps),
        );
        set("warmup_steps", whole(self.warmup_steps));
        set("warmup_ratio", self.warmup_ratio.into());
        set("lr_scheduler", self.lr_scheduler.word().into());
        set("weight_decay", self.weight_decay.into());
        set("adam_beta1", self.adam_beta1.into());
        set("adam_beta2", self.adam_beta2.into());
        set("adam_epsilon", self.adam_epsilon.into());
        set("max_grad_norm", self.max_grad_norm.into());
        set(
            "gradient_checkpointing",
            self.gradient_checkpointing.word().into(),
        );
        set("share_prefixes", self.share_prefixes.into());
        set("merge_micro_batches", self.merge_micro_batches.into());
        set("seed", Value::from(self.seed as i64));
        set("eval_steps", optional(self.eval_steps));
        set("evals_per_epoch", optional(self.evals_per_epoch));
        set("logging_steps", whole(self.logging_steps));
        set("save_best", self.save_best.into());
        set("save_steps", optional(self.save_steps));
        set("saves_per_epoch", optional(self.saves_per_epoch));
        let minutes = self.save_minutes.map_or_else(none, Value::from);
        set("save_minutes", minutes);
        set("save_total_limit", optional(self.save_total_limit));
        set("on_non_finite", self.on_non_finite.word().into());
        set("max_skipped_steps", whole(self.max_skipped_steps));
        set("on_out_of_memory", self.on_out_of_memory.word().into());
        set("check_every", whole(self.check_every));
        set("output_dir", path(&self.output_dir));
        table.to_string()
    }
}

fn pattern<T>(pattern: &[(String, T)], write: impl Fn(&T) -> Value) -> Value {
    if pattern.is_empty() {
        return none();
    }
    let entries = pattern.iter();
    Value::Table(
        entries
            .map(|(name, value)| (name.clone(), write(value)))
            .collect(),
    )
}

fn none() -> Value {
    "none".into()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::reader::KEYS;

    fn round_trip(config: &Config) {
        let written = config.to_toml();
        let read = Config::parse(&written, Some(Path::new("elsewhere.toml")), None, &[]);
        let read = read.unwrap_or_else(|error| panic!("{error}\n{written}"));
        let source = read.source.clone();
        assert_eq!(
            read,
            Config {
                source,
                ..config.clone()
            },
            "{written}"
        );
    }

    #[test]
    fn the_written_configuration_reads_back_as_the_same() {
        let load = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            Config::load(None, None, &sets).unwrap()
        };
        round_trip(&load(&[]));
        round_trip(&load(&[
            "target_modules=all-linear",
            "max_steps=3",
            "learning_rate=1.2345678901234567e-5",
            "num_epochs=0.1",
            "prompt_template=\"custom:a\\n\\\"'\\\\{context}\\t'''\"",
            "val_dataset_path=C:\\data\\v.jsonl",
            "val_set_size=0",
            "seed=9007199254740993",
            "eval_steps=none",
            "warmup_ratio=0",
            "warmup_steps=9",
            "lr_scheduler=linear",
            "compute_dtype=bf16",
            "init_lora_weights=gaussian",
        ]));
        round_trip(&load(&[
            "peft_use_dora=true",
            r"rank_pattern={ 'layers\.0\..*' = 4, q_proj = 2 }",
            "alpha_pattern={ v_proj = 2.5 }",
            "trainable_token_indices={ embed_tokens = [7, 3], lm_head = [5] }",
            "exclude_modules=[\"k_proj\"]",
        ]));
        round_trip(&load(&[
            "exclude_modules='.*k_proj'",
            "layers_to_transform=[0, 5]",
            "target_modules=[\"o_proj\"]",
            "quant_bits=16",
        ]));
        round_trip(&load(&[
            r"target_modules='.*\.layers\.[0-3]\..*_proj'",
            "adam_epsilon=1e-300",
            "save_steps=50",
            "save_minutes=none",
            "save_total_limit=none",
            "on_non_finite=skip",
            "max_skipped_steps=0",
            "on_out_of_memory=stop",
            "dataset_format=alpaca",
            "dataset_columns={ instruction = \"q\", output = \"a\" }",
            r#"prompt_template='instruct:{"format":"{input}","no_input_format":"{instruction}\n"}'"#,
            "device_memory=8GiB",
            "check_every=50",
        ]));
    }

    #[test]
    fn every_key_is_written() {
        let written: Table = Config::load(None, None, &[])
            .unwrap()
            .to_toml()
            .parse()
            .unwrap();
        let written: Vec<&str> = written.keys().map(String::as_str).collect();
        assert_eq!(written, KEYS);
    }
}
