//! Saves a run's work: writes its checkpoints when they are due and its adapter when there is a
//! better one, and lets the run continue if the disk is full.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{AdapterFile, Checkpoint, CheckpointError, Fingerprint, Snapshot, Store};
use crate::callback::TrainingCallback;
use crate::interrupt::Interrupt;
use crate::output::OutputFolder;
use peft::{AdapterConfig, AdapterTensors, write_adapter};
use run_config::Config;

/// A copy on the host takes at most this share of a run's time.
const COPYING: f64 = 0.01;

/// How long a finished run waits for room for its adapter.
const PATIENCE: Duration = Duration::from_secs(3600);

/// How often the user is reminded that checkpoints cannot be written.
const REMINDER: Duration = Duration::from_secs(60);

/// The adapter that is kept.
enum Kept {
    Tensors(Box<(AdapterConfig, AdapterTensors)>),
    Files(Vec<AdapterFile>),
}

/// Saves a run's work.
pub struct Keeper {
    store: Store,
    adapter: PathBuf,
    config: String,
    save_steps: Option<usize>,
    save_minutes: Option<f64>,
    save_total_limit: Option<usize>,
    files: Fingerprint,
    kept: Option<Kept>,
    /// The adapter's folder is out of date.
    owed: bool,
    /// The user was informed.
    told: bool,
    /// The last step with a checkpoint on the disk.
    newest: Option<usize>,
    written: Instant,
    /// When the last failure to write a checkpoint was reported.
    failed: Option<Instant>,
    copy: Option<Snapshot>,
    copied: Instant,
    copying: Duration,
    changed: Vec<PathBuf>,
}

impl Keeper {
    /// For a run in this folder that reads these files, and resumes from `checkpoint` if there is
    /// one; an epoch of it has so many steps.
    ///
    /// # Errors
    ///
    /// An adapter in the checkpoint that cannot be read.
    pub fn new(
        config: &Config,
        folder: &OutputFolder,
        files: Fingerprint,
        checkpoint: Option<&Checkpoint>,
        steps_per_epoch: usize,
    ) -> Result<Self, CheckpointError> {
        let kept = checkpoint.map(Checkpoint::kept).transpose()?;
        let kept = kept.filter(|files| !files.is_empty());
        let store = folder.checkpoints();
        // A run may resume in another folder, where it has no checkpoint yet.
        let here = checkpoint.filter(|checkpoint| checkpoint.folder().starts_with(store.folder()));
        Ok(Self {
            adapter: folder.adapter(),
            config: config.to_toml(),
            save_steps: config.steps_between_checkpoints(steps_per_epoch),
            save_minutes: config.save_minutes,
            save_total_limit: config.save_total_limit,
            files,
            owed: kept.is_some(),
            told: false,
            kept: kept.map(Kept::Files),
            newest: here.map(|checkpoint| checkpoint.state.progress.step),
            store,
            written: Instant::now(),
            failed: None,
            copy: None,
            copied: Instant::now(),
            copying: Duration::ZERO,
            changed: Vec::new(),
        })
    }

    /// The files that the run reads.
    pub fn files(&self) -> &Fingerprint {
        &self.files
    }

    /// The last step with a checkpoint on the disk.
    pub fn newest(&self) -> Option<usize> {
        self.newest
    }

    /// Whether checkpoints are written at all.
    pub fn is_on(&self) -> bool {
        self.save_steps.is_some() || self.save_minutes.is_some()
    }

    /// Whether a checkpoint is due after this step.
    pub fn is_due(&self, step: usize) -> bool {
        let steps = self
            .save_steps
            .is_some_and(|steps| step.is_multiple_of(steps));
        let seconds = self.save_minutes.map(|minutes| minutes * 60.0);
        steps || seconds.is_some_and(|seconds| self.written.elapsed().as_secs_f64() >= seconds)
    }

    /// Whether a copy on the host is due, in case the device is lost.
    pub fn wants_copy(&self) -> bool {
        self.copying.as_secs_f64() <= COPYING * self.copied.elapsed().as_secs_f64()
    }

    /// Keeps a copy on the host; making it took this long.
    pub fn copy(&mut self, snapshot: Snapshot, took: Duration) {
        self.copy = Some(snapshot);
        self.copying = took;
        self.copied = Instant::now();
    }

    /// The adapter of this checkpoint's step is the one to keep from now on.
    pub fn keep(&mut self, adapter: (AdapterConfig, AdapterTensors)) {
        self.kept = Some(Kept::Tensors(Box::new(adapter)));
        self.owed = true;
    }

    /// Writes a checkpoint. If the disk is full, older ones are removed; if that is not enough, the
    /// user is informed and the run continues.
    pub fn write(&mut self, snapshot: &Snapshot, callback: &mut dyn TrainingCallback) {
        self.written = Instant::now();
        self.watch_data(callback);
        let progress = &snapshot.state.progress;
        let step = progress.step;
        let mut written = self.try_write(snapshot);
        if written.as_ref().is_err_and(CheckpointError::is_full) && self.newest.is_some() {
            // Room for the new one: the newest existing checkpoint stays until then.
            let newest = self.newest.unwrap_or(0);
            let pruned = self.store.prune(newest, Some(1), None);
            log::debug!("the disk is full; older checkpoints removed: {pruned:?}");
            written = self.try_write(snapshot);
        }
        match written {
            Ok(folder) => {
                self.newest = Some(step);
                self.copy = None;
                callback.on_checkpoint(step, &folder);
                if self.failed.take().is_some() {
                    callback.on_message("checkpoints are written again");
                }
                let limit = self.save_total_limit;
                if let Err(error) = self.store.prune(step, limit, progress.kept) {
                    callback
                        .on_message(&format!("an old checkpoint could not be removed: {error}"));
                }
            }
            // Not at every try.
            Err(_) if self.failed.is_some_and(|told| told.elapsed() < REMINDER) => {}
            Err(error) => {
                self.failed = Some(Instant::now());
                let newest = match self.newest {
                    Some(newest) => format!("the newest one is of step {newest}"),
                    None => "there is none yet".into(),
                };
                callback.on_message(&format!(
                    "step {step}: the checkpoint could not be written, {newest}: {error}. The run continues and tries again"
                ));
            }
        }
    }

    fn try_write(&self, snapshot: &Snapshot) -> Result<PathBuf, CheckpointError> {
        let progress = &snapshot.state.progress;
        // If it is the adapter of this very step, the checkpoint holds it anyway.
        let other = progress.kept.is_some_and(|kept| kept != progress.step);
        let kept = self.kept.as_ref().filter(|_| other);
        let write_kept = |folder: &Path| kept.map_or(Ok(()), |kept| kept.write(folder));
        self.store.write(snapshot, &self.config, &write_kept)
    }

    /// Writes the kept adapter into its folder if it is not there yet, and reports a failure.
    pub fn write_adapter(&mut self, callback: &mut dyn TrainingCallback) {
        if !self.owed {
            return;
        }
        match self.try_write_adapter() {
            Ok(()) => {
                self.owed = false;
                self.told = false;
            }
            Err(_) if self.told => {}
            Err(error) => {
                self.told = true;
                callback.on_message(&format!(
                    "the adapter could not be written: {error}. The run continues and tries again"
                ));
            }
        }
    }

    fn try_write_adapter(&self) -> Result<(), CheckpointError> {
        match &self.kept {
            Some(kept) => kept.write(&self.adapter),
            None => Ok(()),
        }
    }

    /// At the end of a run: as [`write_adapter`](Self::write_adapter), and again until there is room for it.
    ///
    /// # Errors
    ///
    /// If there is no room within an hour, or the run is asked to stop.
    pub fn finish(
        &mut self,
        interrupt: &Interrupt,
        callback: &mut dyn TrainingCallback,
    ) -> Result<(), CheckpointError> {
        let started = Instant::now();
        let mut told = false;
        while self.owed {
            match self.try_write_adapter() {
                Ok(()) => self.owed = false,
                Err(error) if interrupt.asked() || started.elapsed() > PATIENCE => {
                    return Err(error);
                }
                Err(error) => {
                    if !told {
                        callback.on_message(&format!(
                            "the run is over, but {error}. Make room: writing is tried again for up to an \
                             hour. Ctrl-C discards the adapter"
                        ));
                    }
                    told = true;
                    let pause = Instant::now();
                    while pause.elapsed() < Duration::from_secs(2) && !interrupt.asked() {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        }
        Ok(())
    }

    /// After a failure: writes a checkpoint of the last copy if that is newer than the last
    /// checkpoint.
    pub fn rescue(&mut self, callback: &mut dyn TrainingCallback) {
        let copy = self.copy.take();
        let newer = copy.filter(|copy| Some(copy.state.progress.step) > self.newest);
        if let Some(copy) = newer {
            self.write(&copy, callback);
        }
    }

    /// Reports once which data files have changed since the run read them.
    fn watch_data(&mut self, callback: &mut dyn TrainingCallback) {
        for path in self.files.changed_data() {
            if !self.changed.contains(&path) {
                callback.on_message(&format!(
                    "{} has changed since the run read it. The run continues with the data it has read; resuming will \
                     require the original file",
                    path.display()
                ));
                self.changed.push(path);
            }
        }
    }
}

impl Kept {
    fn write(&self, folder: &Path) -> Result<(), CheckpointError> {
        match self {
            Self::Tensors(adapter) => Ok(write_adapter(folder, &adapter.0, &adapter.1)?),
            Self::Files(files) => {
                for (name, bytes) in files {
                    let path = folder.join(name);
                    // Files that are already there are not written again; that is usual after
                    // resuming.
                    if std::fs::read(&path).is_ok_and(|there| there == *bytes) {
                        continue;
                    }
                    durable::write_atomically(&path, bytes).map_err(|error| {
                        CheckpointError::Io {
                            action: "write",
                            path: error.path,
                            source: error.source,
                        }
                    })?;
                }
                Ok(())
            }
        }
    }
}
