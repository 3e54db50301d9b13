//! The folder of a new model. It has a temporary name until it is complete.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use super::MergeError;

/// Files that are copied from the base model: its tokenizer, its sampling settings and its license.
const COPIED: [&str; 16] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
    "USE_POLICY",
];

/// A temporary folder beside the final one. If it is dropped before [`finish`](Self::finish), it is
/// removed with everything in it.
pub(super) struct NewFolder {
    wanted: PathBuf,
    temporary: PathBuf,
    finished: bool,
}

impl NewFolder {
    /// Creates the temporary folder.
    ///
    /// # Errors
    ///
    /// [`MergeError::Exists`] if something is at `wanted` and `overwrite` is not set; [`MergeError::Write`].
    pub(super) fn create(wanted: &Path, overwrite: bool) -> Result<Self, MergeError> {
        let failed = |path: &Path, source| MergeError::Write {
            path: path.into(),
            source,
        };
        let taken = match fs::read_dir(wanted) {
            Ok(mut files) => files.next().is_some(),
            Err(_) => wanted.symlink_metadata().is_ok(),
        };
        if taken && !overwrite {
            return Err(MergeError::Exists {
                folder: wanted.into(),
            });
        }
        let name = wanted
            .file_name()
            .ok_or_else(|| failed(wanted, std::io::ErrorKind::InvalidInput.into()))?;
        let parent = match wanted.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
        let mut temporary = std::ffi::OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}.incomplete", std::process::id()));
        let temporary = parent.join(temporary);
        // Left by a killed process that had the same id.
        let _ = fs::remove_dir_all(&temporary);
        fs::create_dir(&temporary).map_err(|error| failed(&temporary, error))?;
        Ok(Self {
            wanted: wanted.into(),
            temporary,
            finished: false,
        })
    }

    /// The temporary folder.
    pub(super) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Writes a small file.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), MergeError> {
        let path = self.temporary.join(name);
        durable::write(&path, text.as_bytes()).map_err(|source| MergeError::Write { path, source })
    }

    /// Copies the files of [`COPIED`] that the base model has.
    pub(super) fn copy_from(&self, base: &Path) -> Result<(), MergeError> {
        for name in COPIED {
            let from = base.join(name);
            if !from.is_file() {
                continue;
            }
            let to = self.temporary.join(name);
            let copy = || {
                fs::copy(&from, &to)?;
                File::open(&to)?.sync_all()
            };
            copy().map_err(|source| MergeError::Write {
                path: to.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Renames the folder to its final name. What was there before is removed.
    pub(super) fn finish(mut self) -> Result<(), MergeError> {
        let failed = |path: &Path, source| MergeError::Write {
            path: path.into(),
            source,
        };
        let mut old = self.temporary.clone().into_os_string();
        old.push(".old");
        let old = PathBuf::from(old);
        // The names of its files are on the disk before the folder has its own.
        durable::sync_folder(&self.temporary).map_err(|error| failed(&self.temporary, error))?;
        let replaced = self.wanted.symlink_metadata().is_ok();
        if replaced {
            fs::rename(&self.wanted, &old).map_err(|error| failed(&self.wanted, error))?;
        }
        if let Err(error) = durable::rename(&self.temporary, &self.wanted) {
            if replaced {
                let _ = fs::rename(&old, &self.wanted);
            }
            return Err(failed(&self.wanted, error));
        }
        self.finished = true;
        let parent = self.wanted.parent().unwrap_or(Path::new("."));
        durable::sync_folder(parent).map_err(|error| failed(parent, error))?;
        if replaced {
            let removed = if old.is_dir() {
                fs::remove_dir_all(&old)
            } else {
                fs::remove_file(&old)
            };
            removed.map_err(|error| failed(&old, error))?;
        }
        Ok(())
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Whether the folder has a tokenizer that transformers can load.
pub(super) fn has_tokenizer(folder: &Path) -> bool {
    let is_there = |name: &&str| folder.join(name).is_file();
    let parts = ["vocab.json", "merges.txt"];
    ["tokenizer.json", "tokenizer.model"].iter().any(is_there) || parts.iter().all(is_there)
}

/// Sets the type of the weights in `config.json`: `dtype` for transformers 5, `torch_dtype` for
/// transformers 4. Only keys that exist are set, or both if neither exists.
pub(super) fn set_dtype(config: &mut serde_json::Map<String, Value>, dtype: Dtype) {
    let name = match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    };
    let keys = ["dtype", "torch_dtype"];
    let none = !keys.iter().any(|key| config.contains_key(*key));
    for key in keys {
        if none || config.contains_key(key) {
            config.insert(key.into(), name.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_appears_when_it_is_finished_and_leaves_nothing_when_it_is_not() {
        let root = tempfile::tempdir().unwrap();
        let wanted = root.path().join("deep/merged");
        let folder = NewFolder::create(&wanted, false).unwrap();
        folder.write("config.json", "{}").unwrap();
        assert!(!wanted.exists());
        drop(folder);
        assert_eq!(names(&root.path().join("deep")), [""; 0]);
        let folder = NewFolder::create(&wanted, false).unwrap();
        folder.write("config.json", "{}").unwrap();
        folder.finish().unwrap();
        assert_eq!(names(&root.path().join("deep")), ["merged"]);
        assert_eq!(names(&wanted), ["config.json"]);
    }

    #[test]
    fn what_is_there_stays_until_its_successor_is_complete() {
        let root = tempfile::tempdir().unwrap();
        let wanted = root.path().join("merged");
        fs::create_dir(&wanted).unwrap();
        NewFolder::create(&wanted, false).unwrap(); // An empty folder may be replaced.
        fs::write(wanted.join("old"), "old").unwrap();
        let error = NewFolder::create(&wanted, false).err().unwrap();
        assert!(error.to_string().contains("--overwrite"), "{error}");
        drop(NewFolder::create(&wanted, true).unwrap());
        assert_eq!(names(&wanted), ["old"]);
        let folder = NewFolder::create(&wanted, true).unwrap();
        folder.write("new", "").unwrap();
        folder.finish().unwrap();
        assert_eq!(names(root.path()), ["merged"]);
        assert_eq!(names(&wanted), ["new"]);
    }

    #[test]
    fn the_type_is_put_under_the_keys_that_are_there() {
        let set = |text: &str| {
            let mut config = serde_json::from_str(text).unwrap();
            set_dtype(&mut config, Dtype::BF16);
            Value::Object(config).to_string()
        };
        assert_eq!(
            set(r#"{"a":1,"torch_dtype":"float32"}"#),
            r#"{"a":1,"torch_dtype":"bfloat16"}"#
        );
        assert_eq!(
            set(r#"{"dtype":"float32","b":2}"#),
            r#"{"dtype":"bfloat16","b":2}"#
        );
        assert_eq!(
            set("{}"),
            r#"{"dtype":"bfloat16","torch_dtype":"bfloat16"}"#
        );
    }
}
