//! The folder of a run's checkpoints: a checkpoint appears in it complete or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::io;
use super::{ADAPTER, CONFIG, CheckpointError, KEPT, MANIFEST, Manifest, STATE, Snapshot, TENSORS};

const PREFIX: &str = "step-";
/// A checkpoint that is being written.
const WRITING: &str = ".writing";
/// A checkpoint that is being replaced by another of the same step.
const REPLACED: &str = ".replaced";
/// A checkpoint that is being removed.
const GOING: &str = ".going";

/// The checkpoints of a run.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// The checkpoints in this folder, which need not exist.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The checkpoint of a step, whether it exists or not.
    pub fn path(&self, step: usize) -> PathBuf {
        self.folder.join(format!("{PREFIX}{step:06}"))
    }

    /// The steps that have a checkpoint, the newest first. Whether they are intact is not checked.
    pub fn steps(&self) -> Vec<usize> {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return Vec::new();
        };
        let names = entries.flatten().map(|entry| entry.file_name());
        let mut steps: Vec<usize> = names
            .filter_map(|name| step_of(name.to_str()?))
            .filter(|step| self.path(*step).is_dir())
            .collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps
    }

    /// Cleans up after a run that was killed: files that were being written or removed are deleted,
    /// and a checkpoint that was being replaced is restored. Only for the one process that holds
    /// the run's lock.
    ///
    /// # Errors
    ///
    /// If something cannot be removed or renamed.
    pub fn sweep(&self) -> Result<(), CheckpointError> {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return Ok(());
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_prefix('.')) else {
                continue;
            };
            if let Some(step) = name.strip_suffix(REPLACED).and_then(step_of) {
                let place = self.path(step);
                if !place.exists() {
                    durable::rename(&entry.path(), &place).map_err(io("rename", entry.path()))?;
                    continue;
                }
            }
            let left = [WRITING, REPLACED, GOING].iter().any(|suffix| {
                let step = name.strip_suffix(suffix).and_then(step_of);
                step.is_some()
            });
            if left {
                durable::remove_folder(&entry.path()).map_err(io("remove", entry.path()))?;
            }
        }
        Ok(())
    }

    /// Writes a checkpoint: into a folder of another name, every file and folder synced, then
    /// renamed, then the folder of checkpoints synced. A checkpoint of the same step is replaced.
    /// `write_kept` writes the adapter kept so far into a given folder, if that adapter is not of
    /// this step.
    ///
    /// # Errors
    ///
    /// If something cannot be written; then none of it stays.
    pub fn write(
        &self,
        snapshot: &Snapshot,
        config: &str,
        write_kept: &dyn Fn(&Path) -> Result<(), CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        let place = self.path(snapshot.state.progress.step);
        let writing = self.beside(&place, WRITING);
        if !self.folder.is_dir() {
            fs::create_dir_all(&self.folder).map_err(io("make", &self.folder))?;
            let parent = self.folder.parent().unwrap_or(Path::new("."));
            durable::sync_folder(parent).map_err(io("sync", parent))?;
        }
        let written = fill(&writing, snapshot, config, write_kept).and_then(|()| {
            let replaced = self.beside(&place, REPLACED);
            if place.exists() {
                durable::rename(&place, &replaced).map_err(io("rename", &place))?;
            }
            durable::rename(&writing, &place).map_err(io("rename", &writing))?;
            durable::sync_folder(&self.folder).map_err(io("sync", &self.folder))?;
            durable::remove_folder(&replaced).map_err(io("remove", &replaced))
        });
        match written {
            Ok(()) => Ok(place),
            Err(error) => {
                // The first error is the one to report.
                let _ = durable::remove_folder(&writing);
                Err(error)
            }
        }
    }

    /// Removes checkpoints after that of step `newest` was written: all but the last `limit` and
    /// the one of step `best`. Those of later steps are removed too, because the run went back to
    /// before them.
    ///
    /// # Errors
    ///
    /// If something cannot be removed.
    pub fn prune(
        &self,
        newest: usize,
        limit: Option<usize>,
        best: Option<usize>,
    ) -> Result<(), CheckpointError> {
        let steps = self.steps();
        let (later, earlier): (Vec<usize>, Vec<usize>) =
            steps.into_iter().partition(|step| *step > newest);
        let kept = limit.unwrap_or(usize::MAX);
        let old = earlier.into_iter().skip(kept.max(1));
        for step in later
            .into_iter()
            .chain(old.filter(|step| Some(*step) != best))
        {
            let place = self.path(step);
            // Removing takes several steps; a checkpoint that is half removed must not look intact.
            let going = self.beside(&place, GOING);
            durable::rename(&place, &going).map_err(io("rename", &place))?;
            durable::remove_folder(&going).map_err(io("remove", &going))?;
        }
        Ok(())
    }

    /// `checkpoints/step-000123` → `checkpoints/.step-000123.writing`.
    fn beside(&self, place: &Path, suffix: &str) -> PathBuf {
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        self.folder.join(format!(".{name}{suffix}"))
    }
}

fn step_of(name: &str) -> Option<usize> {
    let digits = name.strip_prefix(PREFIX)?;
    let plain = digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

/// Writes all files of a checkpoint into a new folder, and syncs them.
fn fill(
    folder: &Path,
    snapshot: &Snapshot,
    config: &str,
    write_kept: &dyn Fn(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    durable::remove_folder(folder).map_err(io("remove", folder))?;
    fs::create_dir(folder).map_err(io("make", folder))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        durable::write(&path, bytes).map_err(io("write", &path))
    };
    // Strings, numbers and lists of them, which JSON can always represent.
    let state = serde_json::to_vec_pretty(&snapshot.state).unwrap_or_default();
    write(STATE, &state)?;
    write(CONFIG, config.as_bytes())?;
    let tensors = folder.join(TENSORS);
    let written = snapshot.tensors.write(&tensors);
    written.map_err(io("write", &tensors))?;
    let (adapter_config, adapter) = &snapshot.adapter;
    peft::write_adapter(&folder.join(ADAPTER), adapter_config, adapter)?;
    write_kept(&folder.join(KEPT))?;
    write(MANIFEST, &Manifest::of(folder)?.to_bytes())?;
    durable::sync_folder(folder).map_err(io("sync", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path().join("checkpoints"));
        fs::create_dir(store.folder()).unwrap();
        (root, store)
    }

    fn make(store: &Store, name: &str) {
        let folder = store.folder().join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("file"), name).unwrap();
    }

    fn names(store: &Store) -> Vec<String> {
        let entries = fs::read_dir(store.folder()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn the_last_ones_and_the_best_stay_and_those_ahead_of_the_run_go() {
        let (_root, store) = store();
        assert!(Store::new("nowhere".into()).steps().is_empty());
        for step in [5, 10, 15, 20, 25, 30, 1_234_567] {
            make(&store, &format!("step-{step:06}"));
        }
        for other in ["step-x", "notes", "step-12", ".step-x.writing"] {
            make(&store, other);
        }
        assert_eq!(store.steps(), [1_234_567, 30, 25, 20, 15, 10, 5]);
        store.prune(25, Some(2), Some(10)).unwrap();
        assert_eq!(store.steps(), [25, 20, 10]);
        store.prune(25, None, None).unwrap();
        assert_eq!(store.steps(), [25, 20, 10]);
        store.prune(25, Some(0), None).unwrap();
        assert_eq!(
            names(&store),
            [
                ".step-x.writing",
                "notes",
                "step-000025",
                "step-12",
                "step-x"
            ]
        );
    }

    #[test]
    fn what_a_killed_run_left_is_tidied_up() {
        let (_root, store) = store();
        for name in [
            "step-000005",
            ".step-000005.replaced",
            ".step-000010.replaced",
            ".step-000015.writing",
            ".step-000001.going",
        ] {
            make(&store, name);
        }
        store.sweep().unwrap();
        assert_eq!(names(&store), ["step-000005", "step-000010"]);
        let file = |step| fs::read_to_string(store.path(step).join("file")).unwrap();
        assert_eq!(
            (file(5).as_str(), file(10).as_str()),
            ("step-000005", ".step-000010.replaced")
        );
    }
}
