//! The files that a run was made from, by their hashes: base model, tokenizer and data.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::error::io;
use super::{CheckpointError, hash};
use crate::files::RunFiles;

/// The files of a tokenizer and its templates.
const TOKENIZER: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// The files that a run reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// `config.json` and the weights; large files are hashed by samples.
    pub base_model: Vec<Mark>,
    /// The tokenizer and what belongs to it.
    pub tokenizer: Vec<Mark>,
    /// Training data.
    pub train: Vec<Mark>,
    /// Validation data, if it has a file of its own.
    pub validation: Vec<Mark>,
}

/// One file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mark {
    /// Its name in its folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256, of samples where the file is large.
    pub sha256: String,
    /// Its path and its time of modification; not saved in a checkpoint.
    #[serde(skip)]
    place: Option<(PathBuf, SystemTime)>,
}

impl PartialEq for Mark {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, self.bytes, &self.sha256) == (&other.name, other.bytes, &other.sha256)
    }
}

impl Fingerprint {
    /// Hashes the files of a run.
    ///
    /// # Errors
    ///
    /// A file that cannot be read.
    pub fn of(files: &RunFiles) -> Result<Self, CheckpointError> {
        let named = |folder: &Path, names: &[&str]| {
            let paths = names.iter().map(|name| folder.join(name));
            paths.filter(|path| path.is_file()).collect::<Vec<_>>()
        };
        let (model, tokenizer) = if files.model.is_dir() {
            let mut model = named(&files.model, &["config.json"]);
            let weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".gguf");
            model.extend(in_folder(&files.model, weights)?);
            (model, named(&files.model, &TOKENIZER))
        } else {
            (vec![files.model.clone()], Vec::new())
        };
        let rows = |path: &Path| {
            if path.is_dir() {
                in_folder(path, |_| true)
            } else {
                Ok(vec![path.to_path_buf()])
            }
        };
        let validation = files.validation.as_deref().map(rows).transpose()?;
        Ok(Self {
            base_model: marks(model, hash::of_large_file)?,
            tokenizer: marks(tokenizer, hash::of_file)?,
            train: marks(rows(&files.train)?, hash::of_file)?,
            validation: marks(validation.unwrap_or_default(), hash::of_file)?,
        })
    }

    /// Every file that differs from `before`, as sentences.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let parts = [
            ("the base model", &before.base_model, &self.base_model),
            ("the tokenizer", &before.tokenizer, &self.tokenizer),
            ("the training data", &before.train, &self.train),
            ("the validation data", &before.validation, &self.validation),
        ];
        let mut changes = Vec::new();
        for (what, before, now) in parts {
            // A single file may have another name; of several files, the name identifies each.
            if let ([before], [now]) = (before.as_slice(), now.as_slice()) {
                if (before.bytes, &before.sha256) != (now.bytes, &now.sha256) {
                    changes.push(format!("{what}: {}", difference(before, now)));
                }
                continue;
            }
            for mark in before {
                match now.iter().find(|other| other.name == mark.name) {
                    None => changes.push(format!("{what}: {} is missing", mark.name)),
                    Some(other) if other != mark => {
                        changes.push(format!("{what}: {}", difference(mark, other)));
                    }
                    Some(_) => {}
                }
            }
            for mark in now {
                if !before.iter().any(|other| other.name == mark.name) {
                    changes.push(format!("{what}: {} is new", mark.name));
                }
            }
        }
        changes
    }

    /// The data files that have changed since this was made.
    pub fn changed_data(&self) -> Vec<PathBuf> {
        let data = self.train.iter().chain(&self.validation);
        let changed = data.filter_map(|mark| {
            let (path, modified) = mark.place.as_ref()?;
            let same_date = fs::metadata(path).is_ok_and(|now| {
                now.len() == mark.bytes && now.modified().is_ok_and(|now| now == *modified)
            });
            let same = same_date || hash::of_file(path).is_ok_and(|now| now == mark.sha256);
            (!same).then(|| path.clone())
        });
        changed.collect()
    }
}

fn difference(before: &Mark, now: &Mark) -> String {
    let short = |mark: &Mark| {
        let hash = mark.sha256.trim_start_matches("sampled:");
        hash.chars().take(12).collect::<String>()
    };
    format!(
        "{} has changed: {} bytes, SHA-256 {}…, were {} bytes, {}…",
        now.name,
        now.bytes,
        short(now),
        before.bytes,
        short(before)
    )
}

fn in_folder(
    folder: &Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<PathBuf>, CheckpointError> {
    let entries = fs::read_dir(folder).map_err(io("read", folder))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(io("read", folder))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy());
        if path.is_file() && name.is_some_and(|name| wanted(&name)) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn marks(
    paths: Vec<PathBuf>,
    hash: fn(&Path) -> io::Result<String>,
) -> Result<Vec<Mark>, CheckpointError> {
    let marks = paths.into_iter().map(|path| {
        // The time before the content: a change in between is then noticed later.
        let metadata = fs::metadata(&path).map_err(io("read", &path))?;
        let name = path.file_name().unwrap_or_default();
        Ok(Mark {
            name: name.to_string_lossy().into_owned(),
            bytes: metadata.len(),
            sha256: hash(&path).map_err(io("read", &path))?,
            place: metadata.modified().ok().map(|date| (path, date)),
        })
    });
    marks.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path) -> RunFiles {
        fs::create_dir_all(folder.join("model")).unwrap();
        for (name, text) in [
            ("model/config.json", "{}"),
            ("model/a.safetensors", "a"),
            ("model/b.safetensors", "b"),
            ("model/tokenizer.json", "t"),
            ("model/README.md", "-"),
            ("rows.jsonl", "rows"),
        ] {
            fs::write(folder.join(name), text).unwrap();
        }
        RunFiles {
            model: folder.join("model"),
            train: folder.join("rows.jsonl"),
            validation: None,
        }
    }

    #[test]
    fn every_change_is_named_and_what_does_not_matter_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let before = Fingerprint::of(&files).unwrap();
        fs::write(folder.path().join("model/README.md"), "another").unwrap();
        assert_eq!(Fingerprint::of(&files).unwrap(), before);
        assert_eq!(before.changed_data(), [""; 0].map(PathBuf::from));

        fs::write(folder.path().join("model/a.safetensors"), "A").unwrap();
        fs::remove_file(folder.path().join("model/b.safetensors")).unwrap();
        fs::write(folder.path().join("model/tokenizer.json"), "longer").unwrap();
        fs::write(folder.path().join("model/chat_template.jinja"), "").unwrap();
        fs::write(folder.path().join("rows.jsonl"), "ROWS").unwrap();
        let changes = Fingerprint::of(&files).unwrap().changes_since(&before);
        let starts = [
            "the base model: a.safetensors has changed: 1 bytes",
            "the base model: b.safetensors is missing",
            "the tokenizer: tokenizer.json has changed: 6 bytes",
            "the tokenizer: chat_template.jinja is new",
            "the training data: rows.jsonl has changed: 4 bytes",
        ];
        assert_eq!(changes.len(), starts.len(), "{changes:#?}");
        for (change, start) in changes.iter().zip(starts) {
            assert!(change.starts_with(start), "{change}");
        }
        assert_eq!(before.changed_data(), std::slice::from_ref(&files.train));
    }

    #[test]
    fn a_file_that_was_moved_or_only_touched_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = files(folder.path());
        let before = Fingerprint::of(&files).unwrap();
        fs::write(&files.train, "rows").unwrap();
        assert_eq!(before.changed_data(), [""; 0].map(PathBuf::from));
        let moved = folder.path().join("other.jsonl");
        fs::rename(&files.train, &moved).unwrap();
        files.train = moved;
        let now = Fingerprint::of(&files).unwrap();
        assert_eq!(now.changes_since(&before), [""; 0]);
    }
}
