//! The second act of a run: the loop over its optimizer steps.

use std::path::PathBuf;
use std::time::Instant;

use crate::callback::TrainingCallback;
use crate::checkpoint::{Resumed, run_folder};
use crate::error::TrainError;
use crate::interrupt::Interrupt;
use crate::metrics::{self, MetricsError, MetricsWriter, TrainLine};
use crate::output::OutputFolder;
use crate::prepare::{Prepared, Setup};
use crate::report;
use crate::screen::RunSummary;
use crate::session::{Learner, Session};
use crate::step::StepGradient;
use device::process_memory as memory;
use device::{self, Backend};
use durable::faults;
use run_config::Schedule;
use terminal::human;
use train_step::loss_scale::LossScale;

/// A run that trains.
pub struct Run<'a> {
    /// Its progress, its files, and how it handles failures.
    pub session: Session<'a>,
    /// Whether the file with the adapter's prompt format is written.
    pub prompt_written: bool,
    learner: Learner,
    schedule: Schedule,
}

impl<'a> Run<'a> {
    /// Reports what will be trained, and updates the files of an earlier session.
    ///
    /// # Errors
    ///
    /// Metrics that cannot be read or written.
    pub fn start(
        prepared: &'a mut Prepared,
        learner: Learner,
        interrupt: &'a Interrupt,
        callback: &'a mut dyn TrainingCallback,
    ) -> Result<Self, TrainError> {
        let Prepared {
            setup,
            fit,
            progress,
            keeper,
        } = prepared;
        let setup: &Setup = setup;
        let resumed = setup.resumed.as_ref();
        let metrics = open_metrics(&setup.folder, resumed)?;
        callback.on_start(&RunSummary::of(setup, fit));
        if setup.selected().backend != Backend::Cpu {
            callback.on_preparing("preparing kernels");
        }
        if resumed.is_some() {
            let history = metrics::history(&setup.folder.metrics())?;
            callback.on_resume(progress.step, &history);
        }
        // A run that was killed may have left an adapter of a later step, or none.
        keeper.write_adapter(callback);
        let config = &setup.config;
        Ok(Self {
            schedule: Schedule {
                peak: config.learning_rate,
                warmup_steps: config.warmup(setup.total_steps),
                total_steps: setup.total_steps,
                decay: config.lr_scheduler,
            },
            session: Session::new(setup, fit, progress, keeper, metrics, interrupt, callback),
            learner,
            prompt_written: false,
        })
    }

    /// Trains until all steps are done or `interrupt` asks to stop.
    ///
    /// # Errors
    ///
    /// A failure of the device, or a loss that is not a number. As much of the run as possible is saved first.
    pub fn train(mut self) -> Result<Self, TrainError> {
        let setup = self.session.setup;
        let first = self.session.progress.next();
        if setup.resumed.as_ref().is_some_and(|resumed| resumed.forced) {
            // What was forced once need not be forced again.
            self.session.save(&self.learner)?;
        }
        if self.session.progress.step == 0 {
            let scores = self.session.validate(&self.learner)?;
            self.session.progress.base = scores.flatten();
        }
        for step in first..=setup.total_steps {
            if self.session.interrupt.asked() {
                break;
            }
            faults::at_step(step);
            if !self.session.progress.owes_validation {
                self = self.step(step)?;
            }
            let improved = self.validate_if_owed()?;
            self.save(step, improved)?;
        }
        Ok(self)
    }

    /// An optimizer step.
    fn step(mut self, step: usize) -> Result<Self, TrainError> {
        let started = Instant::now();
        let gradient = self.session.gradient(&self.learner, step)?;
        self.session.check(&self.learner)?;
        match gradient {
            Ok(gradient) => self = self.update(step, gradient, started)?,
            Err(problem) => self.session.skip(problem, &self.learner)?,
        }
        let setup = self.session.setup;
        let steps_per_epoch = setup.order.steps_per_epoch();
        let interval = setup.config.steps_between_validations(steps_per_epoch);
        let due = step.is_multiple_of(interval);
        self.session.progress.owes_validation = due || step == setup.total_steps;
        Ok(self)
    }

    /// Updates the adapters and records the step, which started at `started`.
    fn update(
        mut self,
        step: usize,
        gradient: StepGradient,
        started: Instant,
    ) -> Result<Self, TrainError> {
        let learning_rate = self.schedule.rate(step) * self.session.progress.rate_factor();
        self.learner = self
            .session
            .update(self.learner, learning_rate, gradient.gradients)?;
        let progress = &mut self.session.progress;
        progress.step = step;
        progress.loss_scale = progress.loss_scale.map(LossScale::after_step);
        progress.tokens += gradient.tokens as u64;
        let step_s = started.elapsed().as_secs_f64();
        let setup = self.session.setup;
        let device = &setup.selected().device;
        self.session.record(&TrainLine {
            step,
            epoch: setup.order.epoch_at(step),
            loss: gradient.loss,
            learning_rate,
            grad_norm: gradient.norm,
            tokens: gradient.tokens,
            tokens_per_s: gradient.tokens as f64 / step_s,
            step_s,
            memory_mib: human::mib(memory::peak()),
            device_memory_mib: device::memory_in_use(device).map(human::mib),
            loss_scale: gradient.loss_scale,
        });
        Ok(self)
    }

    /// Validates if a validation is due, and keeps the adapter if it is the best so far. Returns whether it is.
    fn validate_if_owed(&mut self) -> Result<bool, TrainError> {
        if !self.session.progress.owes_validation {
            return Ok(false);
        }
        let Some(scores) = self.session.validate(&self.learner)? else {
            return Ok(false);
        };
        self.session.progress.owes_validation = false;
        self.session.keep_if_better(scores, &self.learner)
    }

    /// Writes what is due after a step. The checkpoint is written before the adapter, so the adapter is never newer
    /// than the newest checkpoint.
    fn save(&mut self, step: usize, improved: bool) -> Result<(), TrainError> {
        let session = &mut self.session;
        let milestone = improved || session.progress.is_over(session.setup.total_steps);
        let due = session.keeper.is_due(step) || milestone && session.keeper.is_on();
        if due || session.interrupt.asked() {
            session.save(&self.learner)?;
        }
        session.keeper.write_adapter(session.callback);
        self.prompt_written = self.prompt_written || report::write_prompt(session.setup);
        session.copy(&self.learner)
    }
}

/// Opens the metrics. Those of a resumed run keep the lines of earlier steps, which are copied if the run was in
/// another folder.
///
/// # Errors
///
/// [`MetricsError`] with the file's path.
fn open_metrics(
    folder: &OutputFolder,
    resumed: Option<&Resumed>,
) -> Result<MetricsWriter, MetricsError> {
    let path = folder.metrics();
    let Some(resumed) = resumed else {
        return MetricsWriter::append(&path);
    };
    let before: PathBuf = run_folder(resumed.checkpoint.folder()).join("metrics.jsonl");
    let elsewhere = before.canonicalize().ok() != path.canonicalize().ok();
    if elsewhere && let Err(source) = std::fs::copy(&before, &path) {
        log::warn!(
            "{}: {source}; metrics before this step are missing from {}",
            before.display(),
            path.display()
        );
    }
    MetricsWriter::resume(&path, resumed.checkpoint.state.metrics_bytes)
}
