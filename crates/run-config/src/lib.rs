//! The configuration of a run: read raw (TOML, JSON or axolotl's YAML, everything optional), checked as a whole, then used.
//!
//! Keys have FinLoRA's names; a file may hold one run, or many named ones as FinLoRA's own does. A file
//! that is wrong in five places yields five problems at once, each with key, value and what would be right.
//!
//! ```text
//! raw.rs       the file's runs and the --set overrides, as keys with values and line numbers
//! reader.rs    takes one key after another, collects problems and what nobody asked for
//! validate.rs  from raw to Config: every key, its default, its range
//! yaml.rs      YAML as axolotl reads it
//! axolotl/     an axolotl file's keys as these
//! preset.rs    what another trainer's files leave unsaid
//! files.rs     where paths lead, and whether the files are there (not needed to plan)
//! write.rs     Config to TOML with every key; the same parser reads it back
//! ```

mod axolotl;
pub mod embedded;
mod error;
mod files;
mod preset;
mod raw;
mod reader;
mod schedule;
mod validate;
mod value;
mod words;
mod write;
mod yaml;

use std::path::{Path, PathBuf};

use llama_burn::limited;
use lora_core::{ExcludeModules, Init, LoraConfig, TargetModules};

use data::{Columns, DataOptions, Format, PromptTemplate};

pub use error::nearest;
pub use error::{ConfigError, Problem, Problems, SyntaxError};
pub use files::is_model;
pub use schedule::{Decay, Schedule};
pub use words::{BatchSize, Checkpointing, ComputeDtype, OnNonFinite, OnOutOfMemory};

/// The largest configuration that is read, in bytes: some thousand runs.
const LARGEST: u64 = 1 << 20;

/// The word that stands for the model or the data built into this program.
pub const EMBEDDED: &str = "embedded";

/// The configuration built into this program: what `cargo xtask train` without `--config` runs.
pub const EMBEDDED_CONFIG: &str = include_str!("../../../configs/embedded.toml");

/// Where a configuration came from; it decides where relative paths are looked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Source {
    /// The file; `None` for the built-in configuration.
    pub file: Option<PathBuf>,
    /// The name of the run within a file of several.
    pub run: Option<String>,
    /// Whether the file is axolotl's YAML.
    pub is_axolotl: bool,
    /// The preset that gave the keys of `preset`; empty without one.
    pub preset_name: String,
    /// Keys that the preset gave, with their values.
    pub preset: Vec<(String, String)>,
    /// What the user should know of how another trainer's file is read.
    pub notes: Vec<String>,
    /// Beside `init_adapter`, the keys of adapters that were written and must not contradict it.
    pub lora_keys: Vec<String>,
}

/// A validated configuration. Every public field but `source` is the config key of that name.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The folder of the model, its name on the Hugging Face Hub (`ORG/NAME`, `ORG/NAME@REVISION`), or `embedded`.
    pub base_model: String,
    /// JSON lines, a JSON array, CSV or Parquet, in a format of [`Format`]; or `embedded`.
    pub dataset_path: PathBuf,
    /// A file of its own for validation; then nothing is split off `dataset_path`.
    pub val_dataset_path: Option<PathBuf>,
    /// What to split off `dataset_path` for validation: a fraction below 1, or a number of rows from 1. 0: nothing.
    pub val_set_size: f64,
    /// What the rows hold; told by the columns' names where `None` (`"auto"`).
    pub dataset_format: Option<Format>,
    /// The names that the file has for columns of the format, where they are other names.
    pub dataset_columns: Columns,
    /// How a row's context becomes the prompt. Conversations are always rendered by the model's chat template.
    pub prompt_template: PromptTemplate,
    /// Tokens of the longest row that is trained on; longer rows are left out and reported, never cut.
    pub max_seq_len: usize,

    /// Rank of the adapters.
    pub lora_r: usize,
    /// Numerator of the adapters' scale.
    pub lora_alpha: f64,
    /// Probability with which an element of an adapter's input is dropped in training, in `[0, 1)`.
    pub lora_dropout: f64,
    /// Scale by α/√r instead of α/r.
    pub peft_use_rslora: bool,
    /// Train a DoRA: a length for each output's weights beside the adapter.
    pub peft_use_dora: bool,
    /// Which linear modules are adapted.
    pub target_modules: TargetModules,
    /// Adapt these decoder layers only; all where `None`.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules that are not adapted although they are targets.
    pub exclude_modules: Option<ExcludeModules>,
    /// Ranks that differ from `lora_r`, by expressions for the end of a module's name.
    pub rank_pattern: Vec<(String, usize)>,
    /// Values that differ from `lora_alpha`, as `rank_pattern`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Tokens whose rows of the embedding (`embed_tokens`) or the output layer (`lm_head`) are trained as well.
    pub trainable_token_indices: Vec<(String, Vec<usize>)>,
    /// How the adapters' `A` starts.
    pub init_lora_weights: Init,
    /// The folder of a PEFT adapter to train on from; what it says of adapters counts.
    pub init_adapter: Option<PathBuf>,
    /// Bits of a frozen weight: 4, 8, or 16 for none quantized.
    pub quant_bits: u8,
    /// Whether the output layer is quantized as well.
    pub quantize_lm_head: bool,
    /// The number format of the computation.
    pub compute_dtype: ComputeDtype,
    /// Bytes of memory that the device has; asked of its driver where `None`, which not every one answers.
    pub device_memory: Option<u64>,

    /// The peak learning rate.
    pub learning_rate: f64,
    /// Passes over the training rows; a fraction is allowed.
    pub num_epochs: f64,
    /// Optimizer steps in all; overrides `num_epochs` where given, as in transformers.
    pub max_steps: Option<usize>,
    /// Rows of a micro-batch.
    pub batch_size: BatchSize,
    /// Tokens of a micro-batch at most: one with more is split, which changes no result. `None`: no limit.
    pub max_batch_tokens: Option<usize>,
    /// Micro-batches of an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Steps of the linear warm-up. See [`warmup`](Self::warmup).
    pub warmup_steps: usize,
    /// The warm-up as a fraction of all steps; only where `warmup_steps` is 0.
    pub warmup_ratio: f64,
    /// What the learning rate does after the warm-up.
    pub lr_scheduler: Decay,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's β₁.
    pub adam_beta1: f64,
    /// AdamW's β₂.
    pub adam_beta2: f64,
    /// AdamW's ε.
    pub adam_epsilon: f64,
    /// Largest norm of all gradients together; 0 switches clipping off.
    pub max_grad_norm: f64,
    /// Whether a layer's activations are recomputed in the backward pass.
    pub gradient_checkpointing: Checkpointing,
    /// Whether rows of a micro-batch that begin alike have that beginning computed once. Losses and gradients
    /// are the same; under dropout, whose masks would not be, it is off.
    pub share_prefixes: bool,
    /// Whether micro-batches of one update are computed together where memory is plentiful. The update is the
    /// same; under dropout, whose masks would not be, it is off.
    pub merge_micro_batches: bool,
    /// Decides the split, the order of the rows, the adapters' start and the dropout.
    pub seed: u64,

    /// Optimizer steps between two validations; `None`: as `evals_per_epoch` says. There is always one at the end.
    pub eval_steps: Option<usize>,
    /// Validations in an epoch; `None`: one.
    pub evals_per_epoch: Option<usize>,
    /// Optimizer steps between two progress lines.
    pub logging_steps: usize,
    /// Keep the adapter with the lowest validation loss rather than the last one.
    pub save_best: bool,
    /// Optimizer steps between two checkpoints; `None`: they go by `saves_per_epoch` and by time only.
    pub save_steps: Option<usize>,
    /// Checkpoints in an epoch, beside those by time.
    pub saves_per_epoch: Option<usize>,
    /// Minutes between two checkpoints; `None`: they go by steps only. With neither of the two there are no
    /// checkpoints, except on Ctrl-C.
    pub save_minutes: Option<f64>,
    /// Checkpoints that are kept, the newest; that of the best validation is kept besides. `None`: all.
    pub save_total_limit: Option<usize>,
    /// What happens when a loss or gradient is not a number.
    pub on_non_finite: OnNonFinite,
    /// Steps that may be skipped in a run, where `on_non_finite` says so.
    pub max_skipped_steps: usize,
    /// What happens when the device's memory is too small for a micro-batch.
    pub on_out_of_memory: OnOutOfMemory,
    /// Optimizer steps between two comparisons of a GPU with the CPU while the run goes on; 0: only before it.
    pub check_every: usize,
    /// Where the adapter, the metrics and this configuration are written.
    pub output_dir: PathBuf,

    /// Where the values came from; not a key.
    pub source: Source,
}

impl Config {
    /// What the data needs of the settings.
    pub fn data_options(&self) -> DataOptions {
        DataOptions {
            prompt_template: self.prompt_template.clone(),
            dataset_format: self.dataset_format,
            dataset_columns: self.dataset_columns.clone(),
            val_set_size: self.val_set_size,
            seed: self.seed,
        }
    }

    /// Reads a configuration file (the built-in one where `path` is `None`), picks a run, applies
    /// `KEY=VALUE` overrides (the value in TOML, else a string) and checks everything.
    ///
    /// No file that the configuration names is touched except to find which of the possible places
    /// it is in; [`check_files`](Self::check_files) is for the rest.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`] holds every wrong key at once; the other variants say why the file has
    /// no run to look at.
    pub fn load(
        path: Option<&Path>,
        run: Option<&str>,
        overrides: &[String],
    ) -> Result<Self, ConfigError> {
        match path {
            None => Self::parse(EMBEDDED_CONFIG, None, run, overrides),
            Some(path) => {
                let bytes = limited::read(path, LARGEST).map_err(|source| ConfigError::Read {
                    path: path.into(),
                    source,
                })?;
                let text = String::from_utf8(bytes).map_err(|error| ConfigError::NotUtf8 {
                    path: path.into(),
                    line: 1 + error.as_bytes()[..error.utf8_error().valid_up_to()]
                        .iter()
                        .filter(|byte| **byte == b'\n')
                        .count(),
                })?;
                Self::parse(&text, Some(path), run, overrides)
            }
        }
    }

    /// [`load`](Self::load) for the text of a file. `path` tells the format by its extension, appears in
    /// messages, and its folder is where a file of named runs looks for its data.
    ///
    /// # Errors
    ///
    /// See [`load`](Self::load).
    pub fn parse(
        text: &str,
        path: Option<&Path>,
        run: Option<&str>,
        overrides: &[String],
    ) -> Result<Self, ConfigError> {
        if let Some(path) = path.filter(|_| files::is_of_model(text)) {
            let file = path.display().to_string();
            return Err(ConfigError::OfModel { file });
        }
        let mut raw = raw::RawConfig::parse(text, path, run)?;
        let (mut overrides, mut problems) = (overrides.to_vec(), Vec::new());
        if raw.source.is_axolotl {
            (overrides, problems) = axolotl::convert(&mut raw, &overrides);
        }
        problems.extend(raw.apply(&overrides));
        problems.extend(preset::apply(&mut raw));
        validate::validate(raw, problems)
    }

    /// The adapters that this configuration asks for.
    pub fn lora_config(&self) -> LoraConfig {
        LoraConfig {
            r: self.lora_r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.peft_use_rslora,
            target_modules: self.target_modules.clone(),
            init: self.init_lora_weights,
            layers_to_transform: self.layers_to_transform.clone(),
            use_dora: self.peft_use_dora,
            exclude_modules: self.exclude_modules.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            trainable_token_indices: self.trainable_token_indices.clone(),
            ..LoraConfig::default()
        }
    }

    /// Warm-up steps of a run of `total_steps`: `warmup_steps`, else `warmup_ratio` of them, rounded up.
    pub fn warmup(&self, total_steps: usize) -> usize {
        match self.warmup_steps {
            0 => (self.warmup_ratio * total_steps as f64).ceil() as usize,
            steps => steps,
        }
    }

    /// Optimizer steps between two validations in a run of `total_steps`, an epoch of which has `steps_per_epoch`.
    pub fn steps_between_validations(&self, steps_per_epoch: usize) -> usize {
        let per_epoch = self.evals_per_epoch.unwrap_or(1);
        self.eval_steps
            .unwrap_or_else(|| steps_per_epoch.div_ceil(per_epoch).max(1))
    }

    /// Optimizer steps between two checkpoints, where they go by steps.
    pub fn steps_between_checkpoints(&self, steps_per_epoch: usize) -> Option<usize> {
        let of_epoch = |per_epoch: usize| steps_per_epoch.div_ceil(per_epoch).max(1);
        self.save_steps.or(self.saves_per_epoch.map(of_epoch))
    }

    /// Whether the model is the one built into this program.
    pub fn embedded_model(&self) -> bool {
        self.base_model == EMBEDDED
    }

    /// Whether the data are the ones built into this program.
    pub fn embedded_data(&self) -> bool {
        self.dataset_path == Path::new(EMBEDDED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_file_the_built_in_configuration_runs() {
        let config = Config::load(None, None, &[]).unwrap();
        assert!(config.embedded_model() && config.embedded_data());
        assert_eq!(config.output_dir, Path::new("runs/embedded"));
        assert_eq!(config.source, Source::default());
        config.check_files().unwrap();
    }

    #[test]
    fn every_file_in_configs_is_valid_and_opens_with_its_command() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "toml") {
                continue;
            }
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if let Err(error) = Config::load(Some(&path), None, &[]) {
                panic!("{error}");
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let opening: String = text.lines().take(4).collect::<Vec<_>>().join("\n");
            assert!(
                opening.contains("cargo xtask train"),
                "{name} opens with {opening}"
            );
            names.push(name);
        }
        assert!(names.len() >= 5, "{names:?}");
    }

    #[test]
    fn the_finlora_sentiment_file_says_what_finlora_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../configs/llama-3.1-8b-finlora-sentiment.toml");
        let config = Config::load(Some(&path), None, &[]).unwrap();
        assert_eq!(
            (config.lora_r, config.quant_bits, config.batch_size.rows()),
            (8, 8, 8)
        );
        assert_eq!((config.learning_rate, config.num_epochs), (1e-4, 4.0));
        assert_eq!(config.gradient_accumulation_steps, 2);
        assert!(config.peft_use_rslora);
    }

    #[test]
    fn a_file_that_is_missing_or_not_text_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        let error = Config::load(Some(&path), None, &[]).unwrap_err();
        assert!(error.to_string().contains("config.toml"), "{error}");
        std::fs::write(&path, b"lora_r = 8\nbase_model = \"\xff\"").unwrap();
        let error = Config::load(Some(&path), None, &[])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("config.toml:2") && error.contains("UTF-8"),
            "{error}"
        );
    }

    #[test]
    fn the_warm_up_is_given_in_steps_or_as_a_ratio() {
        let warmup = |set: &str| Config::load(None, None, &[set.into()]).unwrap().warmup(101);
        assert_eq!(warmup("warmup_steps=7"), 7);
        assert_eq!(warmup("warmup_ratio=0.03"), 4);
        assert_eq!(warmup("warmup_ratio=0"), 0);
    }

    #[test]
    fn the_adapters_are_those_of_the_keys() {
        let sets = [
            "lora_r=4",
            "lora_alpha=32",
            "peft_use_rslora=true",
            "lora_dropout=0.25",
        ];
        let config = Config::load(None, None, &sets.map(String::from)).unwrap();
        let lora = config.lora_config();
        assert_eq!(
            (lora.r, lora.lora_alpha, lora.lora_dropout),
            (4, 32.0, 0.25)
        );
        assert_eq!(lora.scale(), 16.0);
        assert_eq!(lora.validate(), Ok(()));
    }

    fn finlora(run: &str, sets: &[&str]) -> Config {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        let path = Path::new("finetune_configs.json");
        Config::parse(run, Some(path), None, &sets).unwrap()
    }

    const RUN: &str = r#"{"sentiment_fp16": {"base_model": "embedded", "dataset_path": "embedded", "lora_r": 4,
        "learning_rate": 1e-4, "batch_size": 8, "peft_use_rslora": true}}"#;

    #[test]
    fn a_run_of_finloras_file_has_finloras_values_where_it_says_nothing() {
        let config = finlora(RUN, &[]);
        assert_eq!(config.prompt_template, PromptTemplate::Inst);
        assert_eq!((config.lora_alpha, config.lora_dropout), (16.0, 0.05));
        assert_eq!((config.quant_bits, config.max_seq_len), (16, 4096));
        assert_eq!(
            (
                config.val_set_size,
                config.warmup_steps,
                config.warmup_ratio
            ),
            (0.02, 10, 0.0)
        );
        assert_eq!(
            (config.evals_per_epoch, config.saves_per_epoch),
            (Some(4), Some(1))
        );
        assert_eq!(
            (config.gradient_accumulation_steps, config.num_epochs),
            (4, 4.0)
        );
        let names = ["q_proj", "k_proj", "v_proj"].map(String::from).to_vec();
        assert_eq!(config.target_modules, TargetModules::Names(names));
        // Its own keys.
        assert_eq!((config.lora_r, config.learning_rate), (4, 1e-4));
        assert_eq!(config.batch_size.rows(), 8);
        assert!(config.peft_use_rslora);
        let given: Vec<&str> = config
            .source
            .preset
            .iter()
            .map(|(key, _)| key.as_str())
            .collect();
        assert!(
            given.contains(&"prompt_template") && !given.contains(&"lora_r"),
            "{given:?}"
        );
        // Written out, nothing is left to a preset.
        let again = Config::parse(&config.to_toml(), Some(Path::new("config.toml")), None, &[]);
        let again = again.unwrap();
        assert_eq!(again.source.preset, []);
        assert_eq!((again.lora_dropout, again.evals_per_epoch), (0.05, Some(4)));
    }

    #[test]
    fn what_is_written_comes_before_a_preset_and_a_preset_can_be_asked_for_or_not() {
        let config = finlora(
            RUN,
            &["lora_dropout=0.1", "warmup_ratio=0.2", "eval_steps=7"],
        );
        assert_eq!(
            (
                config.lora_dropout,
                config.warmup_steps,
                config.warmup_ratio
            ),
            (0.1, 0, 0.2)
        );
        assert_eq!((config.eval_steps, config.evals_per_epoch), (Some(7), None));
        assert_eq!(finlora(RUN, &["preset=none"]).lora_dropout, 0.0);
        // Another key: not FinLoRA's file, unless it says so.
        let other = RUN.replace("\"lora_r\": 4", "\"lora_r\": 4, \"seed\": 1");
        assert_eq!(finlora(&other, &[]).lora_dropout, 0.0);
        assert_eq!(finlora(&other, &["preset=finlora"]).lora_dropout, 0.05);
        let sets = ["preset=llama".to_string()];
        let error = Config::load(None, None, &sets).unwrap_err().to_string();
        assert!(
            error.contains("preset") && error.contains("\"finlora\""),
            "{error}"
        );
    }

    #[test]
    fn validations_and_checkpoints_are_given_in_steps_or_by_epoch() {
        let config = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            Config::load(None, None, &sets).unwrap()
        };
        let of_epoch = config(&["evals_per_epoch=4", "saves_per_epoch=2"]);
        assert_eq!(of_epoch.steps_between_validations(10), 3);
        assert_eq!(of_epoch.steps_between_checkpoints(10), Some(5));
        assert_eq!(of_epoch.steps_between_validations(2), 1);
        let steps = config(&["eval_steps=7", "save_steps=9"]);
        assert_eq!(steps.steps_between_validations(10), 7);
        assert_eq!(steps.steps_between_checkpoints(10), Some(9));
        assert_eq!(
            config(&["eval_steps=none"]).steps_between_validations(10),
            10
        );
        let both = ["eval_steps=7", "evals_per_epoch=4"].map(String::from);
        let error = Config::load(None, None, &both).unwrap_err().to_string();
        assert!(
            error.contains("evals_per_epoch = 4") && error.contains("beside eval_steps"),
            "{error}"
        );
    }
}
