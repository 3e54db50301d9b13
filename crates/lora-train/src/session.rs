//! What a run has beside the model while it trains: its place, its files, and what it does when something
//! fails. [`train`](crate::train::train) calls it in the order of a run.

use std::path::{Path, PathBuf};
use std::time::Instant;

use llama_burn::Llama;

use crate::checkpoint::{
    Division, FORMAT, Keeper, Progress, Resume, Resumed, Snapshot, State, TrainingTensors,
    run_folder,
};
use crate::fit::Fit;
use crate::guard::{DeviceFault, FaultKind, Guard};
use crate::interrupt::Interrupt;
use crate::metrics::{MetricsError, MetricsWriter, SkippedLine, TrainLine, ValidationLine};
use crate::output::OutputFolder;
use crate::screen::{RunScreen, Scores};
use crate::step::{self, NoGradient, NotFinite, StepGradient, StepInput};
use crate::train::{TrainError, WrongNumbers};
use data::{Data, Order};
use device::{Backend, Selected};
use peft::{AdapterConfig, AdapterError, AdapterTensors};
use run_config::{Config, OnNonFinite, OnOutOfMemory};
use terminal::human;
use train_step::gradients;
use train_step::loss::LossSums;
use train_step::loss_scale::LossScale;
use train_step::optimizer::Optimizer;

/// A run under way.
pub struct Session<'a> {
    /// Its settings.
    pub config: &'a Config,
    /// Its rows.
    pub data: &'a Data,
    /// Its device.
    pub selected: &'a Selected,
    /// Where it writes.
    pub folder: &'a OutputFolder,
    /// Steps in all.
    pub total_steps: usize,
    /// How rows are divided; smaller where the device's memory turned out too small.
    pub fit: Fit,
    /// Where it is.
    pub progress: Progress,
    /// Keeps its work.
    pub keeper: Keeper,
    /// Its lines.
    pub metrics: MetricsWriter,
    /// Whether it shall stop.
    pub interrupt: &'a Interrupt,
    /// Where it is shown.
    pub screen: &'a mut RunScreen,
    asked: Backend,
    guard: Guard,
    started: Instant,
    /// Seconds of earlier sessions.
    before: f64,
    metrics_fail: bool,
    /// The last step whose comparison with the CPU went well; the one before the run is step 0's.
    checked: usize,
}

/// What a session begins with.
pub struct Beginning<'a> {
    /// Its settings.
    pub config: &'a Config,
    /// Its rows.
    pub data: &'a Data,
    /// Its device.
    pub selected: &'a Selected,
    /// What was asked for as its device.
    pub asked: Backend,
    /// Where it writes.
    pub folder: &'a OutputFolder,
    /// Steps in all.
    pub total_steps: usize,
    /// How rows are divided.
    pub fit: Fit,
    /// Where it goes on.
    pub progress: Progress,
    /// Keeps its work.
    pub keeper: Keeper,
    /// Its lines.
    pub metrics: MetricsWriter,
}

impl<'a> Session<'a> {
    /// Begins. From here on failures of the device are caught.
    pub fn new(
        beginning: Beginning<'a>,
        interrupt: &'a Interrupt,
        screen: &'a mut RunScreen,
    ) -> Self {
        let progress_step = beginning.progress.step;
        Self {
            config: beginning.config,
            data: beginning.data,
            selected: beginning.selected,
            folder: beginning.folder,
            total_steps: beginning.total_steps,
            fit: beginning.fit,
            before: beginning.progress.seconds,
            progress: beginning.progress,
            keeper: beginning.keeper,
            metrics: beginning.metrics,
            interrupt,
            screen,
            asked: beginning.asked,
            guard: Guard::install(),
            started: Instant::now(),
            metrics_fail: false,
            checked: progress_step,
        }
    }

    /// The order of the rows, in the micro-batches of now.
    pub fn order(&self) -> Order {
        order(self.config, self.data, &self.fit)
    }

    /// Computes something whose memory grows with the rows of a micro-batch. Where the device has too little,
    /// micro-batches become smaller and it is computed again.
    ///
    /// # Errors
    ///
    /// Any other failure of the device, and one that smaller micro-batches do not cure; the run's work is
    /// saved then as far as it can be.
    pub fn compute<T>(
        &mut self,
        model: &Llama,
        optimizer: &Optimizer,
        work: impl Fn(&Self) -> T,
    ) -> Result<T, TrainError> {
        loop {
            let wait = || drop(self.selected.device.sync());
            let fault = match self.guard.run_repeatable(|| work(self), wait) {
                Ok(value) => return Ok(value),
                Err(fault) => fault,
            };
            let smaller = match (fault.kind, self.config.on_out_of_memory) {
                (FaultKind::OutOfMemory, OnOutOfMemory::Halve) => self.fit.smaller(self.config),
                _ => None,
            };
            let Some(smaller) = smaller else {
                return Err(self.rescue(fault, Some((model, optimizer))));
            };
            // What the failed pass still has under way fails too, and must not be taken for the next one's.
            let device = &self.selected.device;
            self.guard.settle(|| drop(device.sync()));
            let what = if smaller.batch_size == self.fit.batch_size {
                "activations are recomputed".into()
            } else {
                format!(
                    "micro-batches have {} rows instead of {}, and {} of them make an update",
                    smaller.batch_size, self.fit.batch_size, smaller.gradient_accumulation_steps
                )
            };
            let same = if self.config.lora_dropout > 0.0 {
                "the same update but for the dropout's masks"
            } else {
                "the same update"
            };
            self.screen.note(&format!(
                "step {}: {fault}. {}. From here on {what}: {same}",
                self.progress.next(),
                self.memory()
            ));
            self.fit = smaller;
        }
    }

    /// The gradient of a step. Where it leaves the range of f16, the loss scale is halved and it is computed again.
    ///
    /// # Errors
    ///
    /// As [`compute`](Self::compute); the inner error is a loss or gradient that is not a number.
    pub fn gradient(
        &mut self,
        model: &Llama,
        optimizer: &Optimizer,
        step: usize,
    ) -> Result<Result<StepGradient, NotFinite>, TrainError> {
        loop {
            let gradient = self.compute(model, optimizer, |session| {
                let input = StepInput {
                    rows: &session.data.train,
                    micro_batches: &session.order().step(step - 1),
                    fit: &session.fit,
                    step,
                    seed: session.config.seed,
                    max_grad_norm: session.config.max_grad_norm,
                    loss_scale: session
                        .progress
                        .loss_scale
                        .map_or(1.0, |scale| scale.factor),
                };
                step::gradient(model, input)
            })?;
            match gradient {
                Ok(gradient) => return Ok(Ok(gradient)),
                Err(NoGradient::NotFinite(problem)) => return Ok(Err(problem)),
                Err(NoGradient::OutOfRange) => {
                    let scale = self.progress.loss_scale.and_then(LossScale::halved);
                    log::debug!(
                        "step {step}: a gradient left the range of f16; loss scale {scale:?}"
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
    /// A failure of the device; the run's work is saved then as far as it can be.
    pub fn update<T>(&mut self, work: impl FnOnce() -> T) -> Result<T, TrainError> {
        let outcome = self.guard.run(work);
        // Half an update may be done: what is on the device is of no use.
        outcome.map_err(|fault| self.rescue(fault, None))
    }

    /// What was planned, and what the device says.
    fn memory(&self) -> String {
        let device = &self.selected.device;
        let used = match device::memory_in_use(device) {
            Some(bytes) => format!(", the device has {} in use", human::bytes(bytes)),
            None => String::new(),
        };
        let plan = human::bytes(self.fit.plan.resident_peak());
        format!("This was planned to need {plan}{used}")
    }

    /// Saves what can be saved after a failure of the device, and says what happened. `live` is given where
    /// what is on the device was not being changed.
    fn rescue(&mut self, fault: DeviceFault, live: Option<(&Llama, &Optimizer)>) -> TrainError {
        let step = self.progress.next();
        let newer = Some(self.progress.step) > self.keeper.newest();
        if let Some((model, optimizer)) = live.filter(|_| newer && self.progress.step > 0) {
            // The device may still give its tensors back; if not, there is the last copy.
            let metrics_bytes = self.metrics.bytes();
            let taken = self
                .guard
                .run(|| self.snapshot_at(model, optimizer, metrics_bytes));
            if let Ok(Ok(snapshot)) = taken {
                self.keeper.write(&snapshot, self.screen);
            }
        }
        self.keeper.rescue(self.screen);
        let advice = match fault.kind {
            FaultKind::OutOfMemory => format!(
                "{}. A smaller batch_size with more gradient_accumulation_steps, gradient_checkpointing = \"on\" or a \
                 smaller max_seq_len needs less",
                self.memory()
            ),
            FaultKind::TooLargeTensor => self.too_large(),
            FaultKind::Lost => "This is the driver's doing, or the machine's: another program, \
                                overheating, sleep"
                .to_string(),
            FaultKind::KernelCompilation => {
                "Another backend or dtype compiles other kernels; RUST_LOG=debug prints more"
                    .to_string()
            }
            FaultKind::Other => {
                "This is probably an error in the trainer; RUST_LOG=debug tells more".to_string()
            }
        };
        TrainError::Fault {
            fault,
            step,
            advice,
            resume: self.how_to_resume(),
            resumable: self.keeper.newest().is_some(),
        }
    }

    /// What to do about a tensor that the device has no buffer for.
    fn too_large(&self) -> String {
        let limit = match device::largest_buffer(self.selected) {
            Some(bytes) => format!(
                "The largest buffer of this device is {}",
                human::bytes(bytes)
            ),
            None => "The device limits its buffers".into(),
        };
        format!(
            "{limit}, whatever memory is free. A smaller batch_size with more gradient_accumulation_steps, or a \
             smaller max_seq_len, makes the activations smaller; for a weight of that size take another backend, as \
             in --backend cpu"
        )
    }

    /// Compares a layer with the CPU, if `check_every` says that it is time: a decoder layer as it is now, another
    /// one each time, on hidden states of this step's first rows, forward and backward. The model as a whole may
    /// not fit the host.
    ///
    /// Nothing is done on the CPU, which is what others are compared with.
    ///
    /// # Errors
    ///
    /// [`TrainError::WrongNumbers`] with the operation that differs most. Nothing of this step is kept, and no
    /// checkpoint is made of what may be wrong already.
    pub fn check(&mut self, model: &Llama, optimizer: &Optimizer) -> Result<(), TrainError> {
        let (every, step) = (self.config.check_every, self.progress.next());
        if self.selected.backend == Backend::Cpu || every == 0 || !step.is_multiple_of(every) {
            return Ok(());
        }
        let index = step / every % model.layers.len().max(1);
        let checks = self.compute(model, optimizer, |session| {
            let rows = session.order().step(step - 1);
            let rows = rows
                .first()
                .map_or(&[][..], |rows| &rows[..rows.len().min(2)]);
            let batch = session.data.train.batch(rows, session.fit.prefixes);
            device::check_layer(session.selected, model, index, &batch.tokens)
        })?;
        let verdict = checks.and_then(|checks| device::verdict(self.selected, &checks));
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

    /// What to type to go on, in words.
    fn how_to_resume(&self) -> String {
        match self.keeper.newest() {
            Some(step) => format!(
                "Step {step} is saved; this goes on from there:\n  {}",
                self.resume_command()
            ),
            None => "No checkpoint was written yet".into(),
        }
    }

    /// Everything that the run needs to go on, on the host.
    fn snapshot_at(
        &self,
        model: &Llama,
        optimizer: &Optimizer,
        metrics_bytes: u64,
    ) -> Result<Snapshot, AdapterError> {
        let mut progress = self.progress.clone();
        progress.seconds = self.seconds();
        Ok(Snapshot {
            state: State {
                format: FORMAT,
                program: concat!("trainer ", env!("CARGO_PKG_VERSION")).into(),
                device: self.selected.name.clone(),
                total_steps: self.total_steps,
                progress,
                division: Division::of(&self.fit),
                metrics_bytes,
                files: self.keeper.files().clone(),
                chat_template_time: self.data.prompt.chat_template_time,
            },
            tensors: TrainingTensors::take(model, optimizer),
            adapter: self.adapter(model)?,
        })
    }

    /// The adapter on the host.
    fn adapter(&self, model: &Llama) -> Result<(AdapterConfig, AdapterTensors), AdapterError> {
        let config = AdapterConfig {
            lora: self.config.lora_config(),
            base_model_name_or_path: Some(self.config.base_model.clone()),
        };
        Ok((config, AdapterTensors::from_model(model)?))
    }

    /// Makes a step's line public.
    pub fn record(&mut self, line: &TrainLine) {
        self.screen.step(line);
        let written = self.metrics.train(line);
        self.tell(written);
    }

    /// A full disk, or one that has gone, is no reason to stop: the lines wait in memory.
    fn tell(&mut self, written: Result<(), MetricsError>) {
        match written {
            Err(error) if !self.metrics_fail => {
                self.metrics_fail = true;
                self.screen.note(&format!(
                    "{error}. The run goes on, and the lines are written when there is room"
                ));
            }
            Err(_) => {}
            Ok(()) => self.metrics_fail = false,
        }
    }

    /// A step whose loss or gradient is not a number: leaves it out, if that is allowed.
    ///
    /// # Errors
    ///
    /// [`TrainError::NotFinite`] if not, or not any more; the step before it is saved.
    pub fn skip(
        &mut self,
        problem: NotFinite,
        model: &Llama,
        optimizer: &Optimizer,
    ) -> Result<(), TrainError> {
        let allowed = match self.config.on_non_finite {
            OnNonFinite::Skip => self.config.max_skipped_steps,
            OnNonFinite::Stop => 0,
        };
        if self.progress.skipped >= allowed {
            if self.progress.step > 0 && Some(self.progress.step) > self.keeper.newest() {
                self.save(model, optimizer)?;
            }
            return Err(TrainError::NotFinite {
                skipped: match self.progress.skipped {
                    0 => String::new(),
                    steps => format!(
                        " {} skipped before it, as many as max_skipped_steps allows.",
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
        self.screen.note(&format!(
            "{problem}. The step is skipped ({} of {allowed}), and the learning rate is {factor} of its schedule from \
             here on",
            self.progress.skipped
        ));
        let written = self.metrics.skipped(&SkippedLine {
            step: problem.step,
            epoch: self.order().epoch_at(problem.step),
            skipped: problem.to_string(),
            rate_factor: factor,
        });
        self.tell(written);
        Ok(())
    }

    /// Loss and accuracy on the validation rows: `Some(None)` without any, `None` if the run was asked to stop
    /// before the last row.
    ///
    /// # Errors
    ///
    /// A failure of the device.
    pub fn validate(
        &mut self,
        model: &Llama,
        optimizer: &Optimizer,
    ) -> Result<Option<Option<Scores>>, TrainError> {
        if self.data.validation.is_empty() {
            return Ok(Some(None));
        }
        let started = Instant::now();
        let sums = self.compute(model, optimizer, |session| session.validation_sums(model))?;
        let Some(sums) = sums else {
            return Ok(None);
        };
        let line = ValidationLine {
            step: self.progress.step,
            epoch: self.order().epoch_at(self.progress.step),
            val_loss: sums.mean(),
            val_accuracy: sums.accuracy(),
            val_row_accuracy: sums.row_accuracy(),
            val_tokens: sums.tokens,
            val_s: started.elapsed().as_secs_f64(),
        };
        let written = self.metrics.validation(&line);
        self.tell(written);
        self.screen.validation(&line);
        Ok(Some(Some(Scores {
            loss: line.val_loss,
            accuracy: line.val_accuracy,
            row_accuracy: line.val_row_accuracy,
        })))
    }

    fn validation_sums(&self, model: &Llama) -> Option<LossSums> {
        let rows = &self.data.validation;
        let mut sums = LossSums::default();
        for indices in rows.in_order(self.fit.batch_size, self.config.max_batch_tokens) {
            if self.interrupt.asked() {
                return None;
            }
            let batch = rows.batch(&indices, self.fit.prefixes);
            sums.add(gradients::evaluate(model, &batch));
            self.screen.validating(sums.rows, rows.len());
        }
        Some(sums)
    }

    /// Takes in the validation of the step just done: whether its adapter is the one to keep from now on.
    ///
    /// # Errors
    ///
    /// A failure of the device.
    pub fn keep_if_better(
        &mut self,
        scores: Option<Scores>,
        model: &Llama,
        optimizer: &Optimizer,
    ) -> Result<bool, TrainError> {
        let progress = &self.progress;
        let better = match (scores, progress.kept_scores) {
            (Some(now), Some(before)) => now.loss < before.loss,
            _ => true,
        };
        // Without `save_best`, or without validation rows, the newest adapter is the one to keep.
        if !better && self.config.save_best {
            return Ok(false);
        }
        self.progress.kept = Some(self.progress.step);
        self.progress.kept_scores = scores;
        let adapter = self.compute(model, optimizer, |session| session.adapter(model))??;
        self.keeper.keep(adapter);
        Ok(true)
    }

    /// Writes a checkpoint.
    ///
    /// # Errors
    ///
    /// A failure of the device; what the disk does not take is no error.
    pub fn save(&mut self, model: &Llama, optimizer: &Optimizer) -> Result<(), TrainError> {
        let synced = self.metrics.sync();
        let bytes = *synced.as_ref().unwrap_or(&self.metrics.bytes());
        self.tell(synced.map(|_| ()));
        let taken = self.guard.run(|| self.snapshot_at(model, optimizer, bytes));
        match taken {
            Ok(snapshot) => self.keeper.write(&snapshot?, self.screen),
            Err(fault) => return Err(self.rescue(fault, None)),
        }
        Ok(())
    }

    /// On a GPU, takes a copy on the host now and then: a device that is lost gives nothing back.
    ///
    /// # Errors
    ///
    /// A failure of the device.
    pub fn copy(&mut self, model: &Llama, optimizer: &Optimizer) -> Result<(), TrainError> {
        if self.selected.backend == Backend::Cpu || !self.keeper.wants_copy() {
            return Ok(());
        }
        let bytes = self.metrics.bytes();
        let started = Instant::now();
        let taken = self.guard.run(|| self.snapshot_at(model, optimizer, bytes));
        match taken {
            Ok(snapshot) => {
                self.keeper.copy(snapshot?, started.elapsed());
                Ok(())
            }
            Err(fault) => Err(self.rescue(fault, None)),
        }
    }

    /// What to do after an interruption, and the command.
    pub fn how_to_go_on(&self) -> (String, String) {
        match self.keeper.newest() {
            Some(step) => (format!("go on after step {step}"), self.resume_command()),
            None => (
                "nothing is saved yet".into(),
                "start the run again with the same command".into(),
            ),
        }
    }

    /// The command that goes on with this run.
    fn resume_command(&self) -> String {
        let folder = crate::train::shown(self.folder.path());
        let device = match self.asked {
            Backend::Auto => String::new(),
            backend => format!("--backend {backend} "),
        };
        let switches = device::switches();
        let switches: String = switches.iter().map(|name| format!("{name} ")).collect();
        format!("cargo xtask train {device}{switches}--resume {folder}")
    }

    /// Seconds of work, those of earlier sessions included.
    pub fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }
}

/// The order of a run's rows.
pub fn order(config: &Config, data: &Data, fit: &Fit) -> Order {
    Order::new(
        config.seed,
        &data.train,
        fit.batch_size,
        fit.gradient_accumulation_steps,
        config.max_batch_tokens,
    )
}

/// Opens the checkpoint that a run goes on from, and locks the run's folder if it is the one that the run
/// goes on in.
///
/// # Errors
///
/// If there is no such checkpoint, or another run is under way in the folder.
pub fn open(
    resume: &Resume,
    output_dir: &Path,
) -> Result<(Option<OutputFolder>, Option<Resumed>), TrainError> {
    let absolute = |path: &Path| path.canonicalize().ok();
    let from = absolute(&run_folder(&resume.from));
    if from.is_none() || from != absolute(output_dir) {
        return Ok((None, resume.open(false)?));
    }
    let folder = OutputFolder::reopen(output_dir)?;
    let resumed = resume.open(true)?;
    Ok((resumed.is_some().then_some(folder), resumed))
}

/// The metrics of a run that goes on: those of the steps before, which are copied if the run was in another
/// folder.
///
/// # Errors
///
/// [`MetricsError`] with the file's path.
pub fn metrics(
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
        log::warn!("{}: {source}; its lines are missing", before.display());
    }
    MetricsWriter::resume(&path, resumed.checkpoint.state.metrics_bytes)
}
