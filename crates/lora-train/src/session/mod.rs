//! The state of a run while it trains, apart from its model: its progress, its files, and how it handles failures.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `mod.rs` | a step's gradient and update, repeated with less memory if the device has too little |
//! | `validate.rs` | validation, and the choice of the adapter to keep |
//! | `saving.rs` | checkpoints, also after a failure of the device |

mod saving;
mod validate;

use std::rc::Rc;
use std::time::Instant;

use llama_burn::Llama;

use crate::callback::TrainingCallback;
use crate::checkpoint::{Keeper, Progress};
use crate::error::{TrainError, WrongNumbers};
use crate::fit::Fit;
use crate::guard::{DeviceFault, FaultKind, Guard};
use crate::interrupt::Interrupt;
use crate::metrics::{MetricsError, MetricsWriter, SkippedLine, TrainLine};
use crate::prepare::{self, Setup};
use crate::step::{self, NoGradient, NotFinite, StepGradient, StepInput};
use data::Order;
use device::Backend;
use peft::AdapterTensors;
use run_config::{OnNonFinite, OnOutOfMemory};
use terminal::human;
use train_step::FlatGradients;
use train_step::loss_scale::LossScale;
use train_step::optimizer::Optimizer;

/// The model with its adapters, and their optimizer.
pub struct Learner {
    /// The model.
    pub model: Llama,
    /// The optimizer, with the moments of every adapter.
    pub optimizer: Optimizer,
    /// The adapters that were taken out of the base model's weights, if they were: the trained ones are saved as
    /// adapters of the base model itself.
    pub initial: Option<AdapterTensors>,
}

impl Learner {
    /// Updates the adapters.
    pub fn step(mut self, learning_rate: f64, gradients: FlatGradients) -> Self {
        self.model = self.optimizer.step(learning_rate, self.model, gradients);
        self
    }
}

/// A run that trains.
pub struct Session<'a> {
    /// The parts that do not change.
    pub setup: &'a Setup,
    /// How examples are divided into micro-batches; smaller ones after the device ran out of memory.
    pub fit: &'a mut Fit,
    /// The progress of the run.
    pub progress: &'a mut Progress,
    /// Writes checkpoints and the adapter.
    pub keeper: &'a mut Keeper,
    /// `metrics.jsonl`.
    pub metrics: MetricsWriter,
    /// Whether the run should stop.
    pub interrupt: &'a Interrupt,
    /// The observer of the run.
    pub callback: &'a mut dyn TrainingCallback,
    /// Shared, so that work on the session can run under it.
    guard: Rc<Guard>,
    started: Instant,
    /// Seconds of earlier sessions.
    before: f64,
    metrics_fail: bool,
    /// The last step that agreed with the CPU; at first, the step that the session starts from.
    checked: usize,
}

impl<'a> Session<'a> {
    /// Starts the session. From here on, failures of the device are caught.
    pub fn new(
        setup: &'a Setup,
        fit: &'a mut Fit,
        progress: &'a mut Progress,
        keeper: &'a mut Keeper,
        metrics: MetricsWriter,
        interrupt: &'a Interrupt,
        callback: &'a mut dyn TrainingCallback,
    ) -> Self {
        Self {
            setup,
            fit,
            before: progress.seconds,
            checked: progress.step,
            progress,
            keeper,
            metrics,
            interrupt,
            callback,
            guard: Rc::new(Guard::install()),
            started: Instant::now(),
            metrics_fail: false,
        }
    }

    /// The order of the examples, in the current micro-batches.
    pub fn order(&self) -> Order {
        prepare::order(&self.setup.config, &self.setup.data, self.fit)
    }

    /// Runs `work`, whose memory grows with the examples of a micro-batch. If the device has too little
    /// memory, micro-batches become smaller and `work` is repeated.
    ///
    /// # Errors
    ///
    /// Any other failure of the device, and too little memory for even the smallest micro-batches. As much
    /// of the run as possible is saved first.
    pub fn compute<T>(
        &mut self,
        learner: &Learner,
        work: impl Fn(&mut Self) -> T,
    ) -> Result<T, TrainError> {
        let guard = Rc::clone(&self.guard);
        loop {
            let device = self.setup.selected().device.clone();
            let wait = || drop(device.sync());
            let fault = match guard.run_repeatable(|| work(self), wait) {
                Ok(value) => return Ok(value),
                Err(fault) => fault,
            };
            let smaller = match (fault.kind, self.setup.config.on_out_of_memory) {
                (FaultKind::OutOfMemory, OnOutOfMemory::Halve) => {
                    self.fit.smaller(&self.setup.config)
                }
                _ => None,
            };
            let Some(smaller) = smaller else {
                return Err(self.rescue(fault, Some(learner)));
            };
            // Unfinished work of the failed pass fails too. It must not count as a failure of the next pass.
            guard.settle(|| drop(device.sync()));
            self.report_smaller(&fault, &smaller);
            *self.fit = smaller;
        }
    }

    /// Reports that micro-batches become smaller after `fault`.
    fn report_smaller(&mut self, fault: &DeviceFault, smaller: &Fit) {
        let what = if smaller.batch_size == self.fit.batch_size {
            "gradient checkpointing is on".into()
        } else {
            format!(
                "micro-batches have {} examples instead of {}, with {} of them per update",
                smaller.batch_size, self.fit.batch_size, smaller.gradient_accumulation_steps
            )
        };
        let same = if self.setup.config.lora_dropout > 0.0 {
            "the update is the same except for the dropout masks"
        } else {
            "the update is the same"
        };
        self.callback.on_message(&format!(
            "step {}: {fault}. {}. From here on, {what}; {same}",
            self.progress.next(),
            self.memory()
        ));
    }

    /// The gradient of a step. If it exceeds the range of f16, it is computed again with half the loss scale.
    ///
    /// # Errors
    ///
    /// As [`compute`](Self::compute); the inner error is a loss or gradient that is not a number.
    pub fn gradient(
        &mut self,
        learner: &Learner,
        step: usize,
    ) -> Result<Result<StepGradient, NotFinite>, TrainError> {
        loop {
            let gradient = self.compute(learner, |session| {
                let input = StepInput {
                    rows: &session.setup.data.train,
                    micro_batches: &session.order().step(step - 1),
                    fit: session.fit,
                    step,
                    seed: session.setup.config.seed,
                    max_grad_norm: session.setup.config.max_grad_norm,
                    loss_scale: session
                        .progress
                        .loss_scale
                        .map_or(1.0, |scale| scale.factor),
                };
                step::gradient(&learner.model, learner.optimizer.sums(), input)
            })?;
            match gradient {
                Ok(gradient) => return Ok(Ok(gradient)),
                Err(NoGradient::NotFinite(problem)) => return Ok(Err(problem)),
                Err(NoGradient::OutOfRange) => {
                    let scale = self.progress.loss_scale.and_then(LossScale::halved);
                    log::debug!(
                        "step {step}: a gradient exceeded the range of f16; loss scale {scale:?}"
                    );
                    self.progress.loss_scale = scale;
                }
            }
        }
    }

    /// Updates the parameters.
    ///
    /// # Errors
    ///
    /// A failure of the device. As much of the run as possible is saved first.
    pub fn update(
        &mut self,
        learner: Learner,
        learning_rate: f64,
        gradients: FlatGradients,
    ) -> Result<Learner, TrainError> {
        let outcome = self.guard.run(|| learner.step(learning_rate, gradients));
        // The update may be half done, so the device's tensors cannot be saved.
        outcome.map_err(|fault| self.rescue(fault, None))
    }

    /// Compares one decoder layer with the CPU every `check_every` steps, forward and backward. Each comparison
    /// takes another layer, with its current weights, and hidden states of this step's first examples. It is one
    /// layer because the whole model may not fit into the host's memory.
    ///
    /// Does nothing on the CPU, which is the reference.
    ///
    /// # Errors
    ///
    /// [`TrainError::WrongNumbers`] with the operation that differs most. This step is discarded, and no
    /// checkpoint is written, because earlier steps may be wrong too.
    pub fn check(&mut self, learner: &Learner) -> Result<(), TrainError> {
        let (every, step) = (self.setup.config.check_every, self.progress.next());
        if self.setup.selected().backend == Backend::Cpu
            || every == 0
            || !step.is_multiple_of(every)
        {
            return Ok(());
        }
        let index = step / every % learner.model.layers.len().max(1);
        let checks = self.compute(learner, |session| {
            let rows = session.order().step(step - 1);
            let rows = rows
                .first()
                .map_or(&[][..], |rows| &rows[..rows.len().min(2)]);
            let batch = session.setup.data.train.batch(rows, session.fit.prefixes);
            device::check_layer(
                session.setup.selected(),
                &learner.model,
                index,
                &batch.tokens,
            )
        })?;
        let verdict = checks.and_then(|checks| device::verdict(self.setup.selected(), &checks));
        match verdict {
            Ok(()) => {
                self.checked = step;
                Ok(())
            }
            Err(error) => Err(TrainError::WrongNumbers(Box::new(WrongNumbers {
                step,
                layer: index,
                checked: self.checked,
                resume: self.how_to_resume(),
                resumable: self.keeper.newest().is_some(),
                error,
            }))),
        }
    }

    /// Reports a step to the observer and writes its line to the metrics.
    pub fn record(&mut self, line: &TrainLine) {
        self.callback.on_step(line);
        let written = self.metrics.train(line);
        self.report_write(written);
    }

    /// Reports a failed write, once. A full or missing disk does not stop the run: the lines wait in memory.
    fn report_write(&mut self, written: Result<(), MetricsError>) {
        match written {
            Err(error) if !self.metrics_fail => {
                self.metrics_fail = true;
                self.callback.on_message(&format!(
                    "{error}. The run continues, and the lines are written when there is room"
                ));
            }
            Err(_) => {}
            Ok(()) => self.metrics_fail = false,
        }
    }

    /// Skips a step whose loss or gradient is not a number, if that is allowed.
    ///
    /// # Errors
    ///
    /// [`TrainError::NotFinite`] if it is not allowed, or no longer; the step before it is saved.
    pub fn skip(&mut self, problem: NotFinite, learner: &Learner) -> Result<(), TrainError> {
        let allowed = match self.setup.config.on_non_finite {
            OnNonFinite::Skip => self.setup.config.max_skipped_steps,
            OnNonFinite::Stop => 0,
        };
        if self.progress.skipped >= allowed {
            if self.progress.step > 0 && Some(self.progress.step) > self.keeper.newest() {
                self.save(learner)?;
            }
            return Err(TrainError::NotFinite {
                skipped: match self.progress.skipped {
                    0 => String::new(),
                    steps => format!(
                        " {} skipped before it, the limit of max_skipped_steps.",
                        human::counted(steps as u64, "step")
                    ),
                },
                resume: self.how_to_resume(),
                problem,
            });
        }
        self.progress.skipped += 1;
        self.progress.step = problem.step;
        let factor = self.progress.rate_factor();
        self.callback.on_message(&format!(
            "{problem}. The step is skipped ({} of {allowed}). From here on, the learning rate is {factor} of its \
             schedule",
            self.progress.skipped
        ));
        let written = self.metrics.skipped(&SkippedLine {
            step: problem.step,
            epoch: self.order().epoch_at(problem.step),
            skipped: problem.to_string(),
            rate_factor: factor,
        });
        self.report_write(written);
        Ok(())
    }

    /// Seconds of training, including those of earlier sessions.
    pub fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }
}
