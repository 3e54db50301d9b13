//! `manifest.json`: the files of a checkpoint with their lengths and hashes. It is written last, so
//! a checkpoint without it, or with other files than it describes, is incomplete.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::error::io;
use super::state::FORMAT;
use super::{CheckpointError, hash};

/// Its name.
pub const MANIFEST: &str = "manifest.json";
/// A larger file is not a manifest.
const LARGEST: u64 = 1 << 20;

/// The files of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    sha256: String,
}

impl Manifest {
    /// Of every file in `folder` and its subfolders.
    ///
    /// # Errors
    ///
    /// A file that cannot be read.
    pub fn of(folder: &Path) -> Result<Self, CheckpointError> {
        let mut files = BTreeMap::new();
        let mut folders = vec![String::new()];
        while let Some(prefix) = folders.pop() {
            let place = folder.join(&prefix);
            for entry in fs::read_dir(&place).map_err(io("read", &place))? {
                let path = entry.map_err(io("read", &place))?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let name = format!("{prefix}{name}");
                if path.is_dir() {
                    folders.push(format!("{name}/"));
                    continue;
                }
                let metadata = fs::metadata(&path).map_err(io("read", &path))?;
                let sha256 = hash::of_file(&path).map_err(io("read", &path))?;
                let bytes = metadata.len();
                files.insert(name, Entry { bytes, sha256 });
            }
        }
        Ok(Self {
            format: FORMAT,
            files,
        })
    }

    /// As JSON.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Strings and numbers only, which JSON can always represent.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// Reads the manifest in `folder` and checks every file against it. A name that leads out of
    /// the folder is an error.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Damaged`] with the first thing that is wrong.
    pub fn check(folder: &Path) -> Result<Self, CheckpointError> {
        let damaged = |reason: String| CheckpointError::Damaged {
            folder: folder.into(),
            reason,
        };
        let mut text = Vec::new();
        let file = File::open(folder.join(MANIFEST));
        let read = file.and_then(|file| file.take(LARGEST).read_to_end(&mut text));
        read.map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let manifest: Self = serde_json::from_slice(&text)
            .map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        if manifest.format != FORMAT {
            let format = manifest.format;
            return Err(damaged(format!(
                "it has format {format}, and this program reads format {FORMAT}"
            )));
        }
        for (name, entry) in &manifest.files {
            let parts: Vec<Component> = Path::new(name).components().collect();
            let plain = |part: &Component| matches!(part, Component::Normal(_));
            if parts.is_empty() || parts.len() > 2 || !parts.iter().all(plain) {
                return Err(damaged(format!(
                    "{MANIFEST} names {name:?}, which leads out of the checkpoint"
                )));
            }
            let path = folder.join(name);
            let length =
                fs::metadata(&path).map_err(|error| damaged(format!("{name}: {error}")))?;
            if !length.is_file() || length.len() != entry.bytes {
                return Err(damaged(format!(
                    "{name} has {} bytes, expected {}",
                    length.len(),
                    entry.bytes
                )));
            }
            let hash = hash::of_file(&path).map_err(|error| damaged(format!("{name}: {error}")))?;
            if hash != entry.sha256 {
                return Err(damaged(format!("{name} has changed since it was written")));
            }
        }
        Ok(manifest)
    }

    /// Whether the checkpoint has this file.
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// The files directly in this folder of the checkpoint.
    pub fn in_folder<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = &'a str> {
        let names = self.files.keys();
        names.filter_map(move |name| name.strip_prefix(folder)?.strip_prefix('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_happens_to_a_file_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("adapter")).unwrap();
        fs::write(path("state.json"), "{}").unwrap();
        fs::write(path("adapter/weights"), "weights").unwrap();
        let manifest = Manifest::of(folder.path()).unwrap();
        fs::write(path(MANIFEST), manifest.to_bytes()).unwrap();
        let read = Manifest::check(folder.path()).unwrap();
        assert_eq!(read, manifest);
        assert!(read.has("state.json") && !read.has(MANIFEST));
        assert_eq!(read.in_folder("adapter").collect::<Vec<_>>(), ["weights"]);

        let problem = || Manifest::check(folder.path()).unwrap_err().to_string();
        fs::write(path("adapter/weights"), "Weights").unwrap();
        assert!(problem().contains("adapter/weights has changed since it was written"));
        fs::write(path("adapter/weights"), "weight").unwrap();
        assert!(problem().contains("adapter/weights has 6 bytes, expected 7"));
        fs::remove_file(path("adapter/weights")).unwrap();
        assert!(problem().contains("adapter/weights: "));
        fs::write(path(MANIFEST), &manifest.to_bytes()[..20]).unwrap();
        assert!(problem().contains(MANIFEST));
        fs::remove_file(path(MANIFEST)).unwrap();
        assert!(problem().contains(MANIFEST));
    }

    #[test]
    fn no_name_leads_out_of_the_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("step-000001");
        fs::create_dir(&folder).unwrap();
        fs::write(root.path().join("secret"), "s").unwrap();
        let secret = root.path().join("secret").display().to_string();
        for name in ["../secret", secret.as_str(), "a/../../secret", "", "."] {
            let hash = hash::of_bytes(b"s");
            let text = serde_json::json!({"format": FORMAT, "files": {name: {"bytes": 1, "sha256": hash}}});
            fs::write(folder.join(MANIFEST), text.to_string()).unwrap();
            let problem = Manifest::check(&folder).unwrap_err().to_string();
            assert!(problem.contains("leads out"), "{name}: {problem}");
        }
    }
}
