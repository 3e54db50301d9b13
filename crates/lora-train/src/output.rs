//! The folder that a run writes into.
//!
//! ```text
//! runs/NAME/
//!   adapter/        the adapter in PEFT's layout
//!   config.toml     every setting of the run
//!   metrics.jsonl   one line per step and per validation
//!   checkpoints/    everything that is needed to resume the run
//! ```

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use durable::{Lock, LockError};

use crate::checkpoint::Store;

/// Why the output folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The folder cannot be made or written to.
    #[error("cannot write to the output folder {}: {source}; choose another with --output-dir", folder.display())]
    NotWritable {
        /// The folder.
        folder: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// There is a run in the folder.
    #[error(
        "{} already holds a run; resume it with --resume, choose another folder with --output-dir, or \
         replace it with --overwrite",
        folder.display()
    )]
    Taken {
        /// The folder.
        folder: PathBuf,
    },
    /// The folder holds a run without a checkpoint.
    #[error(
        "{} holds an adapter and no checkpoint, so there is nothing to resume from; choose another folder with \
         --output-dir, or start again with --overwrite",
        folder.display()
    )]
    NoCheckpoint {
        /// The folder.
        folder: PathBuf,
    },
    /// Another run is writing into the folder.
    #[error(
        "{holder} is writing to {} at this moment; wait for it, stop it, or choose another folder with \
         --output-dir",
        folder.display()
    )]
    Locked {
        /// The folder.
        folder: PathBuf,
        /// The process that holds the lock.
        holder: String,
    },
}

/// What to do if the folder already holds a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Take `NAME-2`, `NAME-3`, … instead. For a folder that the user did not name on the command
    /// line: the same command typed twice works, and the first result stays.
    Number,
    /// Return an error. For a folder that the user named.
    Refuse,
    /// Delete that run's files, and no others, and take its place (`--overwrite`).
    Replace,
    /// Replace a run that was killed before its first checkpoint, and refuse any other
    /// (`--resume auto` without a checkpoint).
    Restart,
}

/// The output folder of a run. It exists, can be written to, and stays locked as long as this value
/// or a clone of it exists.
#[derive(Debug, Clone)]
pub struct OutputFolder {
    path: PathBuf,
    /// `None` while the folder is only inspected.
    lock: Option<Arc<Lock>>,
}

impl OutputFolder {
    /// Makes the folder after inspecting it, and checks that it can be written to.
    ///
    /// A folder holds a run once a step was recorded or an adapter written in it; a folder that a
    /// run left before its first step is used again. Other files in the folder are never touched. A
    /// `config.toml` that no run wrote counts as a run, so that it is not lost.
    ///
    /// Call it before any long work, after every check that does not need the folder.
    ///
    /// # Errors
    ///
    /// [`OutputError::NotWritable`], [`OutputError::Taken`], [`OutputError::NoCheckpoint`] and
    /// [`OutputError::Locked`].
    pub fn prepare(path: &Path, existing: Existing) -> Result<Self, OutputError> {
        let folder = |path: &Path| Self {
            path: path.into(),
            lock: None,
        };
        let mut chosen = folder(path);
        match existing {
            Existing::Refuse if chosen.is_taken() => {
                return Err(OutputError::Taken {
                    folder: chosen.path,
                });
            }
            Existing::Refuse => chosen.lock()?,
            Existing::Number => {
                let mut number = 2u64;
                while chosen.is_taken() || !chosen.lock_if_free()? {
                    chosen = folder(&numbered(path, number));
                    number += 1;
                }
            }
            Existing::Replace => {
                chosen.lock()?;
                chosen.clear()?;
            }
            Existing::Restart => {
                chosen.lock()?;
                let foreign = chosen.config().exists() && !chosen.metrics().exists();
                if chosen.has_adapter() || foreign {
                    return Err(OutputError::NoCheckpoint {
                        folder: chosen.path,
                    });
                }
                chosen.clear()?;
            }
        }
        chosen.open()?;
        Ok(chosen)
    }

    /// The folder of a run that is resumed: locked, with nothing in it changed.
    ///
    /// # Errors
    ///
    /// [`OutputError::NotWritable`] and [`OutputError::Locked`].
    pub fn reopen(path: &Path) -> Result<Self, OutputError> {
        let mut folder = Self {
            path: path.into(),
            lock: None,
        };
        folder.lock()?;
        Ok(folder)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The adapter's folder, for PEFT; it is made when the adapter is first written.
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// The metrics, one JSON object per line.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The checkpoints.
    pub fn checkpoints(&self) -> Store {
        Store::new(self.path.join("checkpoints"))
    }

    fn is_taken(&self) -> bool {
        let metrics = fs::metadata(self.metrics());
        let started = metrics.as_ref().is_ok_and(|file| file.len() > 0);
        let checkpoints = !self.checkpoints().steps().is_empty();
        let config = metrics.is_err() && self.config().exists();
        self.has_adapter() || started || checkpoints || config
    }

    fn has_adapter(&self) -> bool {
        fs::read_dir(self.adapter()).is_ok_and(|mut files| files.next().is_some())
    }

    /// Makes the folder and locks it.
    fn lock(&mut self) -> Result<(), OutputError> {
        fs::create_dir_all(&self.path).map_err(|error| self.not_writable(error))?;
        match Lock::acquire(&self.path) {
            Ok(lock) => {
                self.lock = Some(Arc::new(lock));
                Ok(())
            }
            Err(LockError::Held(holder)) => Err(OutputError::Locked {
                folder: self.path.clone(),
                holder,
            }),
            Err(LockError::Io(error)) => Err(self.not_writable(error)),
        }
    }

    fn lock_if_free(&mut self) -> Result<bool, OutputError> {
        match self.lock() {
            Err(OutputError::Locked { .. }) => Ok(false),
            // Another run may have come and gone since the last check.
            Ok(()) => Ok(!self.is_taken()),
            Err(error) => Err(error),
        }
    }

    fn clear(&self) -> Result<(), OutputError> {
        let adapter = self.adapter();
        let files = [
            adapter.join(peft::CONFIG_FILE),
            adapter.join(peft::WEIGHTS_FILE),
            self.metrics(),
            self.config(),
        ];
        for file in files {
            match fs::remove_file(&file) {
                Err(error) if !is_absent(&error) => return Err(self.not_writable(error)),
                _ => {}
            }
        }
        let store = self.checkpoints();
        let cleared = store.sweep().and_then(|()| store.prune(0, None, None));
        cleared.map_err(|error| self.not_writable(io::Error::other(error)))?;
        // Not if the folder holds something else.
        let _ = fs::remove_dir(store.folder());
        Ok(())
    }

    /// The metrics file shows that the folder can be written to, and marks a run's folder.
    fn open(&self) -> Result<(), OutputError> {
        let open = || {
            fs::create_dir_all(&self.path)?;
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(self.metrics())
        };
        open().map(drop).map_err(|error| self.not_writable(error))
    }

    fn not_writable(&self, source: io::Error) -> OutputError {
        let folder = self.path.clone();
        OutputError::NotWritable { folder, source }
    }
}

/// Whether nothing exists at the path. If a parent is a file, creating the folder reports it.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// `runs/name` → `runs/name-2`.
fn numbered(path: &Path, number: u64) -> PathBuf {
    match path.file_name() {
        Some(name) => {
            let mut name = name.to_os_string();
            name.push(format!("-{number}"));
            path.with_file_name(name)
        }
        // A path that ends in `..` or is the root.
        None => path.join(format!("run-{number}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft::{CONFIG_FILE, WEIGHTS_FILE};

    fn finish(folder: &OutputFolder) {
        fs::create_dir_all(folder.adapter()).unwrap();
        fs::write(folder.adapter().join(CONFIG_FILE), "{}").unwrap();
        fs::write(folder.adapter().join(WEIGHTS_FILE), "old").unwrap();
        fs::write(folder.config(), "lora_r = 8").unwrap();
        fs::write(folder.metrics(), "{}\n").unwrap();
    }

    #[test]
    fn a_second_run_gets_a_number_and_the_first_stays() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("runs/name");
        for expected in ["name", "name-2", "name-3"] {
            let folder = OutputFolder::prepare(&path, Existing::Number).unwrap();
            assert_eq!(folder.path(), root.path().join("runs").join(expected));
            finish(&folder);
        }
    }

    #[test]
    fn a_run_that_took_no_step_leaves_its_folder_free() {
        let root = tempfile::tempdir().unwrap();
        for existing in [Existing::Number, Existing::Refuse, Existing::Number] {
            let folder = OutputFolder::prepare(root.path(), existing).unwrap();
            fs::write(folder.config(), "lora_r = 8").unwrap();
            assert_eq!(folder.path(), root.path());
        }
    }

    #[test]
    fn a_named_folder_with_a_run_is_refused_with_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let folder = OutputFolder::prepare(root.path(), Existing::Refuse).unwrap();
        finish(&folder);
        let error = OutputFolder::prepare(root.path(), Existing::Refuse).unwrap_err();
        assert!(matches!(error, OutputError::Taken { .. }));
        let error = error.to_string();
        assert!(
            error.contains("--overwrite") && error.contains("--output-dir"),
            "{error}"
        );
    }

    #[test]
    fn overwriting_removes_the_run_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let folder = OutputFolder::prepare(root.path(), Existing::Refuse).unwrap();
        finish(&folder);
        fs::write(folder.adapter().join("README.md"), "notes").unwrap();
        fs::write(root.path().join("notes.txt"), "notes").unwrap();
        fs::create_dir_all(folder.checkpoints().path(3)).unwrap();
        drop(folder);
        let folder = OutputFolder::prepare(root.path(), Existing::Replace).unwrap();
        assert!(!folder.checkpoints().folder().exists());
        assert_eq!(fs::read(folder.metrics()).unwrap(), b"");
        assert!(!folder.config().exists());
        assert!(!folder.adapter().join(WEIGHTS_FILE).exists());
        assert!(folder.adapter().join("README.md").exists());
        assert!(root.path().join("notes.txt").exists());
        // A missing folder is fine too.
        OutputFolder::prepare(&root.path().join("new"), Existing::Replace).unwrap();
    }

    #[test]
    fn a_folder_in_which_a_run_is_under_way_is_refused_or_passed_over() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("run");
        let running = OutputFolder::prepare(&path, Existing::Refuse).unwrap();
        for existing in [Existing::Refuse, Existing::Replace, Existing::Restart] {
            let error = OutputFolder::prepare(&path, existing).unwrap_err();
            assert!(matches!(error, OutputError::Locked { .. }), "{error}");
        }
        assert!(OutputFolder::reopen(&path).is_err());
        let other = OutputFolder::prepare(&path, Existing::Number).unwrap();
        assert_eq!(other.path(), root.path().join("run-2"));
        drop(running);
        OutputFolder::reopen(&path).unwrap();
    }

    #[test]
    fn restarting_takes_the_place_of_a_run_without_an_adapter_only() {
        let root = tempfile::tempdir().unwrap();
        let folder = OutputFolder::prepare(root.path(), Existing::Restart).unwrap();
        fs::write(folder.config(), "lora_r = 8").unwrap();
        fs::write(folder.metrics(), "{}\n").unwrap();
        drop(folder);
        let folder = OutputFolder::prepare(root.path(), Existing::Restart).unwrap();
        assert_eq!(fs::read(folder.metrics()).unwrap(), b"");
        finish(&folder);
        drop(folder);
        let error = OutputFolder::prepare(root.path(), Existing::Restart).unwrap_err();
        assert!(matches!(error, OutputError::NoCheckpoint { .. }), "{error}");
    }

    #[test]
    fn a_config_that_no_run_wrote_is_not_lost() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("config.toml"), "mine").unwrap();
        let error = OutputFolder::prepare(root.path(), Existing::Refuse).unwrap_err();
        assert!(matches!(error, OutputError::Taken { .. }));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named_before_any_work() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        for existing in [Existing::Number, Existing::Refuse, Existing::Replace] {
            let error = OutputFolder::prepare(&file.join("run"), existing).unwrap_err();
            assert!(matches!(error, OutputError::NotWritable { .. }));
            let error = error.to_string();
            assert!(
                error.contains("file") && error.contains("--output-dir"),
                "{error}"
            );
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_read_only_place_is_an_error() {
        // Permissions do not stop root, and tests often run as root; the kernel's own file system
        // does.
        let error = OutputFolder::prepare(Path::new("/proc/run"), Existing::Number).unwrap_err();
        assert!(matches!(error, OutputError::NotWritable { .. }), "{error}");
    }

    #[test]
    fn numbers_go_behind_the_whole_name() {
        assert_eq!(
            numbered(Path::new("runs/v1.2"), 2),
            Path::new("runs/v1.2-2")
        );
        assert_eq!(numbered(Path::new("runs/x/"), 3), Path::new("runs/x-3"));
        assert_eq!(numbered(Path::new(".."), 2), Path::new("../run-2"));
    }
}
