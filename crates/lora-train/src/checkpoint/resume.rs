//! Resuming: the newest intact checkpoint of a run, and whether the run is still the same.

use std::path::{Path, PathBuf};

use toml::Table;

use super::error::CheckpointError;
use super::{Checkpoint, Division, Fingerprint, Store};
use run_config::Config;

/// What to resume from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// The folder of a run, or one of its checkpoints.
    pub from: PathBuf,
    /// Start from the beginning if there is no checkpoint (`--resume auto`).
    pub or_start: bool,
    /// Resume although the configuration or a file has changed (`--force-resume`).
    pub force: bool,
}

/// A checkpoint that a run resumes from.
#[derive(Debug)]
pub struct Resumed {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// Notes to the user: newer checkpoints that are damaged, changes that were forced.
    pub notes: Vec<String>,
    /// Whether the run differs from the one that the checkpoint is from.
    pub forced: bool,
}

/// Keys that may change when a run is resumed: those that change no bit of the result, such as the
/// output folder and the frequency of checkpoints. For files, the content is compared and not the
/// path.
const FREE: [&str; 15] = [
    "base_model",
    "dataset_path",
    "val_dataset_path",
    "output_dir",
    "logging_steps",
    "gradient_checkpointing",
    "save_steps",
    "saves_per_epoch",
    "save_minutes",
    "save_total_limit",
    "on_non_finite",
    "max_skipped_steps",
    "on_out_of_memory",
    "device_memory",
    "check_every",
];

/// The run's folder for the path of a checkpoint, of the folder of checkpoints, or of the run
/// itself.
pub fn run_folder(path: &Path) -> PathBuf {
    let name = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let is_checkpoints = |path: &Path| name(path).is_some_and(|name| name == "checkpoints");
    let folder = match path.parent() {
        Some(parent) if is_checkpoints(path) => parent,
        Some(parent) if is_checkpoints(parent) => parent.parent().unwrap_or(parent),
        _ => path,
    };
    if folder.as_os_str().is_empty() {
        ".".into()
    } else {
        folder.into()
    }
}

/// The configuration of the checkpoint at a path, or of the newest one if the path is a run's
/// folder; `None` if the path is neither.
pub fn config_of(path: &Path) -> Option<PathBuf> {
    let folder = run_folder(path);
    let store = Store::new(folder.join("checkpoints"));
    let newest = store.steps().into_iter().map(|step| store.path(step));
    let checkpoint = (folder != path).then(|| path.to_path_buf());
    // The run's own file comes last: it may be of a session that saved nothing.
    let places = checkpoint.into_iter().chain(newest).chain([folder]);
    let mut files = places.map(|place| place.join("config.toml"));
    files.find(|file| file.is_file())
}

impl Resume {
    /// Opens the checkpoint to resume from: for a run's folder, the newest that is intact. `None`
    /// if the run is to start from the beginning. `owned` means that this process holds the run's
    /// lock and may clean up.
    ///
    /// # Errors
    ///
    /// If there is no checkpoint, or no intact one.
    pub fn open(&self, owned: bool) -> Result<Option<Resumed>, CheckpointError> {
        let folder = run_folder(&self.from);
        let named = self
            .from
            .file_name()
            .is_some_and(|name| name != "checkpoints");
        if named && folder != self.from {
            let checkpoint = Checkpoint::open(&self.from).map_err(|error| error.named(&folder))?;
            return Ok(Some(Resumed {
                checkpoint,
                notes: Vec::new(),
                forced: false,
            }));
        }
        let store = Store::new(folder.join("checkpoints"));
        if owned {
            store.sweep()?;
        }
        let mut damaged = Vec::new();
        for step in store.steps() {
            match Checkpoint::open(&store.path(step)) {
                Ok(checkpoint) => {
                    let step = checkpoint.state.progress.step;
                    let notes = damaged.into_iter();
                    let notes = notes
                        .map(|problem| format!("{problem}; resuming from step {step} instead"));
                    return Ok(Some(Resumed {
                        checkpoint,
                        notes: notes.collect(),
                        forced: false,
                    }));
                }
                Err(error) => damaged.push(error.to_string()),
            }
        }
        match (damaged.is_empty(), self.or_start) {
            (false, _) => Err(CheckpointError::NoneWhole { folder, damaged }),
            (true, false) => Err(CheckpointError::Nothing { folder }),
            (true, true) => Ok(None),
        }
    }
}

impl Resumed {
    /// Compares the run with the one that the checkpoint is from.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Changed`] lists every difference that matters; with `force` the
    /// differences become notes.
    pub fn check(
        &mut self,
        config: &Config,
        files: &Fingerprint,
        force: bool,
    ) -> Result<(), CheckpointError> {
        let mut changes = config_changes(&self.checkpoint.config, config);
        changes.extend(files.changes_since(&self.checkpoint.state.files));
        if changes.is_empty() {
            return Ok(());
        }
        if !force {
            return Err(CheckpointError::Changed {
                folder: self.checkpoint.folder().into(),
                changes,
            });
        }
        self.forced = true;
        let changes = changes.into_iter();
        self.notes
            .extend(changes.map(|change| format!("--force-resume: {change}")));
        Ok(())
    }

    /// The run's division into micro-batches.
    pub fn division(&self) -> Division {
        self.checkpoint.state.division
    }
}

/// Every key that differs and matters, as sentences.
fn config_changes(before: &Config, now: &Config) -> Vec<String> {
    let table = |config: &Config| config.to_toml().parse::<Table>().unwrap_or_default();
    let (before, now) = (table(before), table(now));
    let keys = now.iter().filter(|(key, _)| !FREE.contains(&key.as_str()));
    let changed = keys.filter_map(|(key, value)| {
        let old = before.get(key);
        let said = old.map_or_else(|| "not set".into(), ToString::to_string);
        (old != Some(value)).then(|| format!("{key} is {value}, was {said}"))
    });
    changed.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_belongs_to_the_run_around_it() {
        for path in [
            "runs/x",
            "runs/x/checkpoints",
            "runs/x/checkpoints/step-000010",
        ] {
            assert_eq!(run_folder(Path::new(path)), Path::new("runs/x"), "{path}");
        }
        let here = "checkpoints/step-000010";
        assert_eq!(run_folder(Path::new(here)), Path::new("."));
    }

    #[test]
    fn settings_that_change_the_result_are_named_and_others_are_free() {
        let config = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            Config::load(None, None, &sets).unwrap()
        };
        let before = config(&[]);
        let now = config(&[
            "learning_rate=1e-3",
            "num_epochs=2",
            "output_dir=elsewhere",
            "save_steps=3",
            "logging_steps=7",
        ]);
        assert_eq!(
            config_changes(&before, &now),
            [
                "learning_rate is 0.001, was 0.005",
                "num_epochs is 2.0, was 4.0"
            ]
        );
        assert_eq!(
            config_changes(&before, &config(&["save_minutes=none"])),
            [""; 0]
        );
    }

    #[test]
    fn without_a_checkpoint_a_run_starts_only_if_that_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let resume = |or_start| Resume {
            from: folder.path().into(),
            or_start,
            force: false,
        };
        assert!(resume(true).open(true).unwrap().is_none());
        let error = resume(false).open(true).unwrap_err();
        assert!(matches!(error, CheckpointError::Nothing { .. }), "{error}");
        std::fs::create_dir_all(folder.path().join("checkpoints/step-000005")).unwrap();
        let error = resume(true).open(true).unwrap_err().to_string();
        assert!(
            error.contains("step-000005 is damaged: manifest.json"),
            "{error}"
        );
    }
}
