//! A folder with a tiny model, its tokenizer, data and a configuration, for one test.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::fixture;

/// Tokens of the fixture `tied`, whose model the workspace uses.
const VOCABULARY: usize = 64;

/// The inputs of a training run, in a temporary folder that is removed with this value.
pub struct Workspace {
    folder: TempDir,
}

/// Copies the files of a folder, and of the folders in it.
///
/// # Panics
///
/// If a file cannot be copied.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a temporary folder is writable");
    for entry in fs::read_dir(from).expect("the folder is there") {
        let path = entry.expect("the folder can be read").path();
        let target = to.join(path.file_name().expect("an entry has a name"));
        if path.is_dir() {
            copy_folder(&path, &target)
        } else {
            fs::copy(&path, &target).expect("the file can be copied");
        }
    }
}

/// Changes a JSON file in place.
///
/// # Panics
///
/// If the file does not exist or is not JSON.
pub fn edit_json(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let text = fs::read_to_string(path).expect("the file can be read");
    let mut value = serde_json::from_str(&text).expect("the file is JSON");
    change(&mut value);
    fs::write(path, value.to_string()).expect("the file can be written");
}

impl Workspace {
    /// A model of the fixture `tied` with a tokenizer of whole words, examples whose target depends
    /// on the context, and `config.toml` for a run of a few steps on the CPU.
    ///
    /// # Panics
    ///
    /// If the temporary folder cannot be written.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let workspace = Self { folder };
        let model = workspace.path("model");
        copy_folder(&fixture("tied").join("model"), &model);
        workspace.write("model/tokenizer.json", &tokenizer(VOCABULARY).to_string());
        let tokens = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"});
        workspace.write("model/tokenizer_config.json", &tokens.to_string());
        workspace.write("rows.jsonl", &rows(24));
        let config = format!(
            "base_model = {model:?}\ndataset_path = {data:?}\noutput_dir = {output:?}\n\
             lora_r = 4\nlora_alpha = 16\nquant_bits = 8\nlearning_rate = 1e-2\nnum_epochs = 4\nbatch_size = 4\n\
             val_set_size = 4\nmax_seq_len = 32\nprompt_template = \"raw\"\n",
            model = model,
            data = workspace.path("rows.jsonl"),
            output = workspace.path("out"),
        );
        workspace.write("config.toml", &config);
        workspace
    }

    /// A path in the workspace.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file of the workspace.
    ///
    /// # Panics
    ///
    /// If it cannot be written.
    pub fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).expect("a temporary folder is writable");
    }

    /// The arguments of `trainer train` on the CPU with this workspace's configuration, and these
    /// settings.
    pub fn train_arguments(&self, settings: &[&str]) -> Vec<String> {
        let config = self.path("config.toml").display().to_string();
        let mut arguments = ["train", "--backend", "cpu", "--config", &config]
            .map(String::from)
            .to_vec();
        for setting in settings {
            arguments.extend(["--set".into(), setting.to_string()]);
        }
        arguments
    }

    /// Runs `trainer train` on the CPU with these settings overriding the configuration.
    ///
    /// # Panics
    ///
    /// If the program cannot be started.
    pub fn train(&self, settings: &[&str]) -> crate::program::Outcome {
        let arguments = self.train_arguments(settings);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        crate::program::run(&arguments)
    }
}

impl Default for Workspace {
    fn default() -> Self {
        Self::new()
    }
}

/// A tokenizer with `size` tokens: three special ones and the words w3, w4, ….
pub fn tokenizer(size: usize) -> serde_json::Value {
    let special = ["<unk>", "<s>", "</s>"];
    let words = (0..size).map(|id| match special.get(id) {
        Some(word) => (word.to_string(), json!(id)),
        None => (format!("w{id}"), json!(id)),
    });
    let vocabulary: serde_json::Map<_, _> = words.collect();
    let added = special.iter().enumerate().map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    })
}

/// Examples in FinLoRA's format whose target is determined by the first word of the context.
fn rows(count: usize) -> String {
    let row = |index: usize| {
        let kind = index % 2;
        let (context, target) = match kind {
            0 => (
                format!("w10 w{} w{}", 20 + index % 7, 30 + index % 5),
                "w50",
            ),
            _ => (
                format!("w11 w{} w{}", 20 + index % 5, 30 + index % 7),
                "w51",
            ),
        };
        format!("{}\n", json!({"context": context, "target": target}))
    };
    (0..count).map(row).collect()
}
