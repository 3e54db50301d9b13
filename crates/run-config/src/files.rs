//! Resolves the paths of a configuration, and checks that the files exist.

use std::path::{Path, PathBuf};

use llama_burn::WeightsError;
use llama_burn::limited::{self, LARGEST_SETTINGS};
use serde_json::Value;

use super::error::{Problem, Problems};
use super::raw::{BUILT_IN, SET};
use super::{Config, EMBEDDED, Source};
use hub::{self, HubName};

/// The places where the file of a path may be, in the order in which they are tried.
///
/// A relative path starts at the current directory. In a file of named runs, FinLoRA's form, and in an axolotl file it
/// starts at the file's own folder first: FinLoRA writes `../data/train/….jsonl` beside `configs/`.
fn places(path: &Path, source: &Source) -> Vec<PathBuf> {
    let folder = source.file.as_deref().and_then(Path::parent);
    let is_beside = source.run.is_some() || source.is_axolotl;
    match (is_beside, folder) {
        (true, Some(folder)) if path.is_relative() && folder != Path::new("") => {
            vec![folder.join(path), path.into()]
        }
        _ => vec![path.into()],
    }
}

/// The first of the possible places that exists, else the path as it was written.
pub(super) fn resolve(path: &str, source: &Source) -> PathBuf {
    let path = Path::new(path);
    if path == Path::new(EMBEDDED) {
        return path.into();
    }
    let found = places(path, source)
        .into_iter()
        .find(|place| place.exists());
    found.unwrap_or_else(|| path.into())
}

/// Whether this text is the `config.json` of a model, of whatever architecture, and not the configuration of a run.
pub(super) fn is_of_model(text: &str) -> bool {
    let Ok(Value::Object(object)) = serde_json::from_str(text.trim_start_matches('\u{feff}'))
    else {
        return false;
    };
    let has = |key: &str| object.contains_key(key);
    let of_model = has("architectures") || (has("model_type") && has("hidden_size"));
    of_model && !has("base_model")
}

/// Whether this is the path of a model whose configuration can be read: a folder, a `config.json` of any name, or a GGUF file.
pub fn is_model(path: &Path) -> bool {
    let of_model = || {
        let text = limited::read_to_string(path, LARGEST_SETTINGS);
        text.is_ok_and(|text| is_of_model(&text))
    };
    let named = || path.file_name().is_some_and(|name| name == "config.json");
    path.is_dir() || llama_burn::gguf::is_gguf(path) || named() || of_model()
}

impl Source {
    /// Where the value of a key comes from, for messages: `--set`, or the file.
    pub fn location(&self, key: &str) -> String {
        if self.overridden.iter().any(|known| known == key) {
            return SET.into();
        }
        match (&self.file, &self.run) {
            (None, _) => BUILT_IN.into(),
            (Some(file), None) => file.display().to_string(),
            (Some(file), Some(run)) => format!("{} ({run})", file.display()),
        }
    }
}

impl Config {
    /// The folder of the model as a path on this machine. `None` for the embedded model. Where nothing is there,
    /// `base_model` may be a name on the Hub ([`hub_model`](Self::hub_model)), or wrong.
    pub fn model_folder(&self) -> Option<PathBuf> {
        (!self.embedded_model()).then(|| resolve(&self.base_model, &self.source))
    }

    /// The model's name on the Hub, such as `meta-llama/Llama-3.1-8B-Instruct`, where `base_model` is no folder.
    pub fn hub_model(&self) -> Option<HubName> {
        let folder = self.model_folder()?;
        HubName::parse(&self.base_model).filter(|_| !folder.exists())
    }

    /// Checks that the model and the data are where the configuration says.
    ///
    /// # Errors
    ///
    /// Every file that is missing, with the places that were tried.
    pub fn check_files(&self) -> Result<(), Problems> {
        let mut problems = Vec::new();
        let mut problem = |key: &str, value: &str, message: Option<String>| {
            problems.extend(message.map(|message| Problem {
                location: self.source.location(key),
                key: key.into(),
                value: Some(format!("{value:?}")),
                message,
            }));
        };
        // Models on the Hub are downloaded after all other checks.
        if let (Some(folder), None) = (self.model_folder(), self.hub_model()) {
            problem("base_model", &self.base_model, self.model_problem(&folder));
        }
        if !self.embedded_data() {
            let path = &self.dataset_path;
            problem(
                "dataset_path",
                &path.to_string_lossy(),
                self.data_problem("dataset_path", path),
            );
        }
        if let Some(path) = &self.val_dataset_path {
            problem(
                "val_dataset_path",
                &path.to_string_lossy(),
                self.data_problem("val_dataset_path", path),
            );
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Problems(problems))
        }
    }

    fn model_problem(&self, folder: &Path) -> Option<String> {
        if !folder.exists() {
            let message = format!(
                "there is no such folder; looked at {}. Name the folder of a Hugging Face model, as in --set \
                 base_model=FOLDER, or a model of the Hub, as in --set base_model={}",
                self.looked_at(folder),
                hub::EXAMPLE
            );
            return Some(message);
        }
        if llama_burn::gguf::is_gguf(folder) {
            return None;
        }
        if !folder.is_dir() {
            return Some(
                "must be a folder with config.json, tokenizer.json and *.safetensors, or a GGUF file"
                    .into(),
            );
        }
        let has = |name: &str| folder.join(name).is_file();
        let weights = has("model.safetensors") || has("model.safetensors.index.json");
        if let Err(error @ WeightsError::Pickle { .. }) = llama_burn::weight_files(folder) {
            return Some(error.to_string());
        }
        let missing: Vec<&str> = [
            ("config.json", has("config.json")),
            ("tokenizer.json", has("tokenizer.json")),
            (
                "model.safetensors (or model.safetensors.index.json)",
                weights,
            ),
        ]
        .into_iter()
        .filter_map(|(name, there)| (!there).then_some(name))
        .collect();
        (!missing.is_empty())
            .then(|| format!("{} has no {}", folder.display(), missing.join(", no ")))
    }

    fn data_problem(&self, key: &str, path: &Path) -> Option<String> {
        if path.is_dir() {
            return Some("must be a JSON-lines file, not a folder".into());
        }
        (!path.is_file()).then(|| {
            let places = self.looked_at(path);
            format!(
                "there is no such file; looked at {places}. Name the file, as in --set {key}=FILE"
            )
        })
    }

    fn looked_at(&self, path: &Path) -> String {
        let absolute =
            |place: &PathBuf| std::path::absolute(place).unwrap_or_else(|_| place.clone());
        let places = places(path, &self.source);
        let shown: Vec<String> = places
            .iter()
            .map(|place| absolute(place).display().to_string())
            .collect();
        shown.join(" and ")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn load(file: &Path, run: Option<&str>) -> Config {
        Config::load(Some(file), run, &[]).unwrap()
    }

    /// A folder like FinLoRA's: `lora/runs.json` and `data/train.jsonl`.
    fn finlora() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("lora")).unwrap();
        fs::create_dir_all(folder.path().join("data")).unwrap();
        fs::write(folder.path().join("data/train.jsonl"), "{}").unwrap();
        let file = folder.path().join("lora/runs.json");
        let run = |data: &str| {
            format!(r#"{{"base_model": "nobody/no-model", "dataset_path": "{data}"}}"#)
        };
        let text = format!(
            r#"{{"there": {}, "missing": {}}}"#,
            run("../data/train.jsonl"),
            run("../data/none.jsonl")
        );
        fs::write(&file, text).unwrap();
        (folder, file)
    }

    #[test]
    fn named_runs_find_their_data_beside_their_file() {
        let (_folder, file) = finlora();
        let config = load(&file, Some("there"));
        assert!(config.dataset_path.is_file(), "{:?}", config.dataset_path);
        // A name on the Hub is not a missing folder.
        assert_eq!(config.check_files(), Ok(()));
        assert_eq!(config.hub_model(), HubName::parse("nobody/no-model"));
    }

    #[test]
    fn missing_data_are_reported_with_the_places_that_were_tried() {
        let (folder, file) = finlora();
        let error = load(&file, Some("missing"))
            .check_files()
            .unwrap_err()
            .to_string();
        let beside = folder.path().join("lora/../data/none.jsonl");
        let here = std::path::absolute("../data/none.jsonl").unwrap();
        assert!(
            error.contains(&format!(
                "looked at {} and {}",
                beside.display(),
                here.display()
            )),
            "{error}"
        );
        assert!(
            error.contains("runs.json (missing): dataset_path"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_file_of_an_override_is_reported_at_set() {
        let (_folder, file) = finlora();
        let sets = ["dataset_path=nowhere/x.jsonl".to_string()];
        let config = Config::load(Some(&file), Some("there"), &sets).unwrap();
        let error = config.check_files().unwrap_err().to_string();
        assert!(error.contains("\n  --set: dataset_path = "), "{error}");
    }

    #[test]
    fn a_single_run_looks_in_the_current_directory_only() {
        let (folder, _) = finlora();
        let file = folder.path().join("lora/one.toml");
        fs::write(
            &file,
            "base_model = \"embedded\"\ndataset_path = \"../data/train.jsonl\"",
        )
        .unwrap();
        let config = load(&file, None);
        assert_eq!(config.dataset_path, Path::new("../data/train.jsonl"));
        let error = config.check_files().unwrap_err().to_string();
        assert!(!error.contains(" and "), "{error}");
    }

    #[test]
    fn a_model_folder_must_hold_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("train.jsonl");
        fs::write(&data, "{}").unwrap();
        let check = |model: &Path| {
            let sets = [
                format!("base_model='{}'", model.display()),
                format!("dataset_path='{}'", data.display()),
            ];
            Config::load(None, None, &sets).unwrap().check_files()
        };
        let error = check(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("has no config.json, no tokenizer.json, no model.safetensors"),
            "{error}"
        );
        let error = check(&data).unwrap_err().to_string();
        assert!(error.contains("or a GGUF file"), "{error}");
        let error = check(&folder.path().join("none")).unwrap_err().to_string();
        assert!(
            error.contains("there is no such folder")
                && error.contains("--set base_model=FOLDER")
                && error.contains(hub::EXAMPLE),
            "{error}"
        );
        for name in [
            "config.json",
            "tokenizer.json",
            "model.safetensors.index.json",
        ] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(check(folder.path()), Ok(()));
    }

    #[test]
    fn a_models_configuration_is_recognised_by_what_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("my-llama.json");
        let of_model = |text: &str| {
            fs::write(&file, text).unwrap();
            let error = Config::load(Some(&file), None, &[])
                .unwrap_err()
                .to_string();
            assert_eq!(
                is_model(&file),
                error.contains("a model's config.json"),
                "{error}"
            );
            is_model(&file)
        };
        assert!(of_model(r#"{"model_type": "llama", "hidden_size": 8}"#));
        assert!(of_model(
            "\u{feff}{\"architectures\": [\"GPT2LMHeadModel\"]}"
        ));
        assert!(!of_model(r#"{"model_type": "llama"}"#));
        assert!(!of_model(r#"{"one": {"hidden_size": 8}, "two": {}}"#));
        assert!(!of_model(
            r#"{"base_model": "m", "model_type": "llama", "hidden_size": 8}"#
        ));
        assert!(!of_model("hidden_size = 8"));
    }

    #[test]
    fn a_folder_that_exists_is_not_a_name_on_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("owner/model")).unwrap();
        let file = folder.path().join("runs.json");
        let run =
            |model: &str| format!(r#"{{"base_model": "{model}", "dataset_path": "embedded"}}"#);
        let text = format!(
            r#"{{"a": {}, "b": {}}}"#,
            run("owner/model"),
            run("owner/other@v1")
        );
        fs::write(&file, text).unwrap();
        assert_eq!(load(&file, Some("a")).hub_model(), None);
        let name = load(&file, Some("b")).hub_model().unwrap();
        assert_eq!(name.to_string(), "owner/other@v1");
    }
}
