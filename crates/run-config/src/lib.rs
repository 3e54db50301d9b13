//! The configuration of a run: read from TOML, JSON or axolotl's YAML, then checked as a whole.
//!
//! Keys have FinLoRA's names. A file holds one run, or several named runs as FinLoRA's file does. All problems of a file
//! are reported at once, each with key, line, value and remedy.
//!
//! ```text
//! keys.rs      the table of all keys: Config, its parser and its writer. A new key is added here, and only here
//! kinds/       what the value of a key may be
//! choice.rs    types of which a file names the values
//! raw.rs       the runs of a file and the --set overrides, as keys with values and line numbers
//! reader.rs    takes one key after another, collects problems and unknown keys
//! validate.rs  from raw to Config: what must hold between keys
//! yaml.rs      YAML as axolotl reads it
//! axolotl/     the keys of an axolotl file as these
//! preset.rs    the values that files of other trainers leave out
//! files.rs     where paths lead, and whether the files exist (not needed to plan)
//! pages.rs     the documentation and the commented example, written by a test
//! ```

mod axolotl;
mod choice;
pub mod embedded;
mod error;
mod files;
mod keys;
mod kinds;
#[cfg(test)]
mod pages;
mod preset;
mod raw;
mod reader;
mod schedule;
mod validate;
mod value;
mod yaml;

use std::path::{Path, PathBuf};

use data::DataOptions;
use llama_burn::limited;
use lora_core::{LoraConfig, Method};

pub use choice::{BatchSize, Checkpointing, ComputeDtype, OnNonFinite, OnOutOfMemory};
pub use error::nearest;
pub use error::{ConfigError, Problem, Problems, SyntaxError};
pub use files::is_model;
pub use keys::{Config, EXCLUSIVE, Key, Library, keys};
pub use schedule::{Decay, Schedule};

/// The largest configuration that is read, in bytes: about a thousand runs.
const LARGEST: u64 = 1 << 20;

/// The name of the model and of the data in this program.
pub const EMBEDDED: &str = "embedded";

/// The built-in configuration, which `cargo xtask train` without `--config` runs.
pub const EMBEDDED_CONFIG: &str = include_str!("../../../configs/embedded.toml");

/// Where a configuration came from. This decides where relative paths start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Source {
    /// The file; `None` for the built-in configuration.
    pub file: Option<PathBuf>,
    /// The name of the run within a file of several.
    pub run: Option<String>,
    /// Whether the file is axolotl's YAML.
    pub is_axolotl: bool,
    /// The keys that have their values from `--set`.
    pub overridden: Vec<String>,
    /// The preset that the keys of `preset` are from; empty without one.
    pub preset_name: String,
    /// The keys from the preset, with their values.
    pub preset: Vec<(String, String)>,
    /// Notes for the user on how the file of another trainer is read.
    pub notes: Vec<String>,
    /// With `init_adapter`: the keys of the adapter that are set and must not contradict it, and `lora_dropout`.
    pub lora_keys: Vec<String>,
}

impl Config {
    /// The settings of the data.
    pub fn data_options(&self) -> DataOptions {
        DataOptions {
            prompt_template: self.prompt_template.clone(),
            dataset_format: self.dataset_format,
            dataset_columns: self.dataset_columns.clone(),
            val_set_size: self.val_set_size,
            seed: self.seed,
        }
    }

    /// Reads a configuration file (the built-in one if `path` is `None`), selects a run, applies
    /// `KEY=VALUE` overrides (the value in TOML, else a string) and checks everything.
    ///
    /// The files that the configuration names are not read; [`check_files`](Self::check_files) checks that they exist.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`] holds all wrong keys; the other variants are about the file as a whole.
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

    /// [`load`](Self::load) for the text of a file. The extension of `path` determines the format, `path` appears in
    /// messages, and the data of a file of named runs are looked up in its folder.
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

    /// The configuration of the adapter.
    pub fn lora_config(&self) -> LoraConfig {
        LoraConfig {
            r: self.lora_r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.peft_use_rslora,
            target_modules: self.target_modules.clone(),
            init: self.init_lora_weights,
            layers_to_transform: self.layers_to_transform.clone(),
            method: self.method(),
            exclude_modules: self.exclude_modules.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            trainable_token_indices: self.trainable_token_indices.clone(),
            d_initial: self.d_initial,
            projection_prng_key: self.projection_prng_key,
            save_projection: self.save_projection,
            bias: self.bias,
            lora_bias: self.lora_bias,
            modules_to_save: self.modules_to_save.clone(),
            ..LoraConfig::default()
        }
    }

    /// The method of the adapter.
    fn method(&self) -> Method {
        let flag = self.peft_use_dora.then_some("use_dora");
        flag.and_then(Method::of_flag).unwrap_or(self.peft_type)
    }

    /// Warm-up steps of a run of `total_steps`: `warmup_steps`, else the fraction `warmup_ratio` of them, rounded up.
    pub fn warmup(&self, total_steps: usize) -> usize {
        match self.warmup_steps {
            0 => (self.warmup_ratio * total_steps as f64).ceil() as usize,
            steps => steps,
        }
    }

    /// Optimizer steps between two validations, with `steps_per_epoch` steps per epoch.
    pub fn steps_between_validations(&self, steps_per_epoch: usize) -> usize {
        let per_epoch = self.evals_per_epoch.unwrap_or(1);
        self.eval_steps
            .unwrap_or_else(|| steps_per_epoch.div_ceil(per_epoch).max(1))
    }

    /// Optimizer steps between two checkpoints; `None` if checkpoints are written by time only.
    pub fn steps_between_checkpoints(&self, steps_per_epoch: usize) -> Option<usize> {
        let of_epoch = |per_epoch: usize| steps_per_epoch.div_ceil(per_epoch).max(1);
        self.save_steps.or(self.saves_per_epoch.map(of_epoch))
    }

    /// Whether the model is the one in this program.
    pub fn embedded_model(&self) -> bool {
        self.base_model == EMBEDDED
    }

    /// Whether the data are those in this program.
    pub fn embedded_data(&self) -> bool {
        self.dataset_path == Path::new(EMBEDDED)
    }
}

#[cfg(test)]
mod tests {
    use data::PromptTemplate;
    use lora_core::TargetModules;

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
    fn the_finlora_sentiment_file_has_finloras_values() {
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
    fn a_run_of_finloras_file_has_finloras_defaults() {
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
    fn written_keys_override_a_preset_and_a_preset_can_be_requested_or_turned_off() {
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
    fn validations_and_checkpoints_are_given_in_steps_or_per_epoch() {
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
            error.contains("evals_per_epoch = 4") && error.contains("combined with eval_steps"),
            "{error}"
        );
    }
}
