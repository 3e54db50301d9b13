//! Training, from a configuration to an adapter on disk, in three acts: prepare, run, report.

use crate::callback::TrainingCallback;
use crate::checkpoint::Resume;
use crate::error::TrainError;
use crate::interrupt::Interrupt;
use crate::output::{Existing, OutputFolder};
use crate::prepare::Prepared;
use crate::report;
use crate::run::Run;
use device::Backend;
use run_config::Config;

/// What to train, and where.
#[derive(Debug, Clone)]
pub struct Request {
    /// The settings.
    pub config: Config,
    /// The device.
    pub backend: Backend,
    /// What to do if the output folder holds a run.
    pub existing: Existing,
    /// The checkpoint to resume from.
    pub resume: Option<Resume>,
}

impl Request {
    /// A new run of this configuration, on the fastest device of this build. An output folder that already holds a
    /// run is refused.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            backend: Backend::Auto,
            existing: Existing::Refuse,
            resume: None,
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone)]
pub enum Ended {
    /// All steps are done, and the adapter is in this folder.
    Done(OutputFolder),
    /// The run was asked to stop; it can be resumed from this folder.
    Interrupted(OutputFolder),
}

impl Ended {
    /// The run's folder; its lock is released when this is dropped.
    pub fn folder(&self) -> &OutputFolder {
        match self {
            Self::Done(folder) | Self::Interrupted(folder) => folder,
        }
    }
}

/// Trains an adapter as `request` describes, reports to `callback`, and writes the adapter, its checkpoints and its
/// metrics into the output folder.
///
/// While it trains, the process's panic hook is replaced, because a device reports its failures as panics. A process
/// trains or evaluates one model at a time.
///
/// # Errors
///
/// Problems of the files, the device and the configuration are found before the first step. A device
/// that fails later is an error too, which names the saved step.
pub fn train(
    request: &Request,
    interrupt: &Interrupt,
    callback: &mut dyn TrainingCallback,
) -> Result<Ended, TrainError> {
    let mut prepared = Prepared::new(request, callback)?;
    if prepared.is_over() {
        return report::already_done(prepared, interrupt, callback);
    }
    let learner = prepared.load(callback)?;

    let run = Run::start(&mut prepared, learner, interrupt, callback)?;
    let run = run.train()?;

    report::report(run)
}
