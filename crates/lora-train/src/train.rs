//! Training, from a configuration to an adapter on disk: [`train`] reads from top to bottom.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::{DType, FloatDType};
use llama_burn::{LlamaConfig, LoadOptions};
use lora_core::{LoraError, Quantization};

use crate::checkpoint::{CheckpointError, Fingerprint, Keeper, Progress, Resume, Resumed};
use crate::fit::{self, Fit, FitError};
use crate::guard::DeviceFault;
use crate::interrupt::Interrupt;
use crate::metrics::{self, MetricsError, TrainLine};
use crate::model_card::{self, ModelCard};
use crate::output::{Existing, OutputError, OutputFolder};
use crate::plan;
use crate::screen::{AdapterSummary, DataSummary, RunResult, RunScreen, RunSummary, StepSummary};
use crate::session::{self, Beginning, Session};
use crate::step::NotFinite;
use data::{self, Data, DataError, Dataset};
use device::{
    self, Backend, CheckOptions, DeviceError, DeviceMemory, KeptKernels, Known, Selected,
};
use hub::{self, HubError, Need};
use peft::{self, AdapterError};
use run_config::Schedule;
use run_config::embedded::{self, EmbeddedError};
use run_config::{BatchSize, ComputeDtype, Config, Problems};
use terminal::human;
use train_step::loss_scale::LossScale;
use train_step::optimizer::AdamW;

use device::process_memory as memory;
use durable::faults::{self, FaultError, Kernels};

/// Why a run did not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum TrainError {
    #[error(transparent)]
    Files(#[from] Problems),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Model(#[from] llama_burn::ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Fit(#[from] FitError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Write(#[from] durable::WriteError),
    #[error(transparent)]
    Load(#[from] llama_burn::LoadError),
    #[error(transparent)]
    Lora(#[from] LoraError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Start(#[from] crate::continued::StartError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    OnDemand(#[from] FaultError),
    /// A loss or gradient that is not a number.
    #[error(
        "{problem}.{skipped} Nothing of this step was kept. A lower learning_rate or a longer warm-up usually helps, \
         and on_non_finite = \"skip\" leaves such steps out; see whether the rows named are what you expect. {resume}"
    )]
    NotFinite {
        /// What is not a number, and where it comes from.
        problem: NotFinite,
        /// How many steps were skipped for it before; empty if none was.
        skipped: String,
        /// How to go on, in words.
        resume: String,
    },
    /// The device failed.
    #[error("step {step}: {fault}. {advice}. {resume}")]
    Fault {
        /// The step under way.
        step: usize,
        /// What happened.
        fault: DeviceFault,
        /// What it may come from.
        advice: String,
        /// How to go on, in words.
        resume: String,
        /// Whether there is a checkpoint.
        resumable: bool,
    },
    /// The device computed something wrong while the run went on.
    #[error(transparent)]
    WrongNumbers(Box<WrongNumbers>),
    /// A data file that somebody writes to.
    #[error("{} changed while it was read; start again when it is complete", path.display())]
    DataChanged {
        /// The file.
        path: PathBuf,
    },
}

/// A comparison with the CPU, in the middle of a run, that did not go well.
#[derive(Debug, thiserror::Error)]
#[error(
    "step {step}: {error}. It was found in layer {layer}, and nothing of this step was kept; what the steps after step \
     {checked} computed, the last that was compared with the CPU, is in doubt. {resume}"
)]
pub struct WrongNumbers {
    /// The step under way.
    pub step: usize,
    /// The decoder layer that was compared.
    pub layer: usize,
    /// The last step whose comparison went well.
    pub checked: usize,
    /// The operation, and what to do.
    #[source]
    pub error: DeviceError,
    /// How to go on, in words.
    pub resume: String,
    /// Whether there is a checkpoint.
    pub resumable: bool,
}

/// The files of a run: those that the configuration names, or the embedded ones.
#[derive(Debug, Clone)]
pub struct RunFiles {
    /// The model's folder.
    pub model: PathBuf,
    /// Training rows.
    pub train: PathBuf,
    /// Validation rows, where they have a file of their own.
    pub validation: Option<PathBuf>,
}

impl RunFiles {
    /// Finds the files; downloads the model if it is a name on the Hub, and unpacks the embedded files if they
    /// are asked for.
    ///
    /// # Errors
    ///
    /// Every file that is missing; then what stands between us and the Hub.
    pub fn find(config: &Config) -> Result<Self, TrainError> {
        Self::find_for(config, Need::Model)
    }

    /// As [`find`](Self::find), where not all of a model on the Hub is needed.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub fn find_for(config: &Config, need: Need) -> Result<Self, TrainError> {
        config.check_files()?;
        let embedded = if config.embedded_model() || config.embedded_data() {
            Some(embedded::materialise()?)
        } else {
            None
        };
        let embedded = embedded.as_ref();
        let train = match embedded.filter(|_| config.embedded_data()) {
            Some(paths) => paths.train.clone(),
            None => config.dataset_path.clone(),
        };
        let own_validation = embedded.filter(|_| config.embedded_data());
        let model = match (config.hub_model(), config.model_folder(), embedded) {
            (Some(_), _, _) => hub::model_folder(&config.base_model, need)?,
            (None, Some(folder), _) => folder,
            (None, None, Some(paths)) => paths.model_dir.clone(),
            (None, None, None) => PathBuf::from(&config.base_model),
        };
        Ok(Self {
            model,
            validation: match (&config.val_dataset_path, own_validation) {
                (Some(path), _) => Some(path.clone()),
                (None, paths) => paths.map(|paths| paths.validation.clone()),
            },
            train,
        })
    }

    /// Reads and tokenizes the rows. `max_seq_len` is held to the positions that the model has; `time` is what a chat
    /// template takes for now, the clock's where `None`.
    ///
    /// # Errors
    ///
    /// The first bad line, by file and number.
    pub fn data(
        &self,
        config: &Config,
        model: &LlamaConfig,
        time: Option<u64>,
    ) -> Result<Data, DataError> {
        data::prepare(
            &config.data_options(),
            &self.model,
            &self.train,
            self.validation.as_deref(),
            model.vocab_size,
            config.max_seq_len.min(model.positions()),
            time,
        )
    }
}

/// What to train, and where.
#[derive(Debug, Clone)]
pub struct Request {
    /// The settings.
    pub config: Config,
    /// The device.
    pub backend: Backend,
    /// What to do where the output folder holds a run.
    pub existing: Existing,
    /// Where to go on from.
    pub resume: Option<Resume>,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub enum Ended {
    /// All steps are done, and the adapter is in this folder.
    Done(OutputFolder),
    /// It was asked to stop; with this folder it can be resumed.
    Interrupted(OutputFolder),
}

/// Trains an adapter as `request` says, shows it on `screen`, and writes it.
///
/// # Errors
///
/// Whatever is wrong with the files, the device or the configuration is found before the first step. A
/// device that fails after it is an error too, with what was saved.
pub fn train(
    request: &Request,
    interrupt: &Interrupt,
    screen: &mut RunScreen,
) -> Result<Ended, TrainError> {
    faults::init(Kernels {
        operations: &lora_core::spoil::OPERATIONS,
        spoil: lora_core::spoil::spoil,
    })?;
    let config = &request.config;
    // A run that goes on holds its folder's lock from here on.
    let (locked, mut resumed) = match &request.resume {
        Some(resume) => session::open(resume, &config.output_dir)?,
        None => (None, None),
    };

    // What needs no weights comes first, so that a mistake costs seconds.
    let files = RunFiles::find(config)?;
    let fingerprint = Fingerprint::of(&files)?;
    let model_config = LlamaConfig::from_file(&files.model)?;
    let config = &crate::continued::continued(config, &model_config)?;
    if let (Some(resumed), Some(resume)) = (&mut resumed, &request.resume) {
        resumed.check(config, &fingerprint, resume.force)?;
    }
    let lora = config.lora_config();
    let before = resumed.as_ref().map(|resumed| &resumed.checkpoint.state);
    let time = before.and_then(|state| state.chat_template_time);
    let data = files.data(config, &model_config, time)?;
    if let Some(path) = fingerprint.changed_data().into_iter().next() {
        return Err(TrainError::DataChanged { path });
    }
    let selected = device::select(request.backend)?;
    let dtype = compute_dtype(config, &selected)?;
    let stored = device::prepare(&selected, dtype)?;
    let before = resumed.as_ref().map(Resumed::division);
    let (fit, divided_anew) = match before {
        Some(before) => fit::refit(config, &model_config, &selected, stored, &data, before)?,
        None => (
            fit::fit(config, &model_config, &selected, stored, &data)?,
            false,
        ),
    };
    let order = session::order(config, &data, &fit);
    let total_steps = order.total_steps(config.num_epochs, config.max_steps);
    let kept = device::kept_kernels();
    if selected.backend != Backend::Cpu {
        let what = "comparing the device with the CPU";
        screen.preparing(what, device::kept_kernels);
    }
    let checks = device::check_device(
        &selected,
        &CheckOptions {
            model: &model_config,
            quantization: quantization(config),
            dtype: stored,
            lora: &lora,
            longest_row: data.train.lengths().max().unwrap_or(1),
        },
    );
    screen.prepared();
    let checks = checks?;
    for check in &checks {
        log::debug!("{check:?}");
    }
    device::verdict(&selected, &checks)?;
    let folder = match locked {
        Some(folder) => folder,
        None => OutputFolder::prepare(&config.output_dir, request.existing)?,
    };
    let checkpoint = resumed.as_ref().map(|resumed| &resumed.checkpoint);
    let steps_per_epoch = order.steps_per_epoch();
    let mut keeper = Keeper::new(config, &folder, fingerprint, checkpoint, steps_per_epoch)?;
    let progress = checkpoint.map_or_else(Progress::start, |from| from.state.progress.clone());
    let trainable = fit.plan.counts.trainable;
    let card = |progress: &Progress, checkpointing: bool| ModelCard {
        config,
        shape: plan::shape(&model_config),
        trainable,
        train_rows: data.train.len(),
        validation_rows: data.validation.len(),
        step: progress.kept.unwrap_or(total_steps),
        total_steps,
        device: format!(
            "{}, {}",
            selected.name,
            precision(config, dtype, checkpointing)
        ),
        base: progress.base,
        adapter: progress.kept_scores,
        command: model_card::command(&folder.config()),
    };
    if progress.is_over(total_steps) {
        // What the run that was stopped may have had no time for.
        keeper.finish(interrupt, screen)?;
        describe_prompt(&data, &folder);
        card(&progress, fit.gradient_checkpointing).write_or_warn(&folder.adapter());
        screen.line(&nothing_left(&folder, total_steps));
        return Ok(Ended::Done(folder));
    }

    // Weights, quantized one at a time as they are read; then the adapters.
    let device = selected.device.clone().autodiff();
    let options = LoadOptions {
        quantization: quantization(config),
        quantize_lm_head: config.quantize_lm_head,
        dtype: DType::from(stored),
    };
    let task = screen.task("loading weights", model_config.tensor_shapes().len());
    let model = llama_burn::load(&files.model, &model_config, options, &device, |tensor| {
        task.at(tensor.done);
        if let Some(error) = tensor.quantization {
            log::debug!(
                "{}: quantized, relative error {:.3e}, largest {:.3e}",
                tensor.name,
                error.relative,
                error.max_abs
            );
        }
    })?;
    let mut model = crate::continued::start(model, config)?;
    let mut optimizer = AdamW {
        beta_1: config.adam_beta1,
        beta_2: config.adam_beta2,
        epsilon: config.adam_epsilon,
        weight_decay: config.weight_decay,
    }
    .resumable();
    if let Some(checkpoint) = checkpoint {
        model = checkpoint.tensors()?.put(model, &mut optimizer)?;
    }
    drop(task);
    // Nothing in the folder of a run that goes on has changed until here.
    durable::write_atomically(&folder.config(), config.to_toml().as_bytes())?;
    let metrics = session::metrics(&folder, resumed.as_ref())?;

    let schedule = Schedule {
        peak: config.learning_rate,
        warmup_steps: config.warmup(total_steps),
        total_steps,
        decay: config.lr_scheduler,
    };
    let plan = &fit.plan;
    let memory_there = device::device_memory(&selected, config.device_memory);
    screen.start(&RunSummary {
        name: run_name(config),
        model: format!("{}: {}", config.base_model, plan::shape(&model_config)),
        precision: precision(config, dtype, fit.gradient_checkpointing),
        device: selected.name.clone(),
        device_reason: selected.reason.clone(),
        adapters: AdapterSummary {
            targets: plan::targets(&lora.target_modules),
            modules: plan.counts.adapted_modules,
            r: lora.r,
            alpha: lora.lora_alpha,
            scale: lora.scale(),
            dropout: lora.lora_dropout,
            trainable: plan.counts.trainable,
            frozen: plan.counts.frozen,
        },
        memory: plan.summary(),
        memory_there: memory_there.map_or_else(String::new, memory_in_words),
        data: data_summary(config, &data),
        steps: StepSummary {
            total: total_steps,
            epochs: order.epoch_at(total_steps),
            batch_size: fit.batch_size,
            merged_from: merged_from(config, &fit),
            gradient_accumulation_steps: fit.gradient_accumulation_steps,
            learning_rate: config.learning_rate,
            schedule: format!("{:?}", config.lr_scheduler).to_lowercase(),
            logging_steps: config.logging_steps,
        },
        output: folder.path().to_path_buf(),
        warnings: {
            let mut all = preset(config);
            all.extend(warnings(
                &selected,
                kept,
                resumed.as_ref(),
                divided_anew,
                memory_there,
            ));
            all.extend(data.warnings.iter().cloned());
            all
        },
    });
    if selected.backend != Backend::Cpu {
        screen.preparing("preparing kernels", device::kept_kernels);
    }
    if resumed.is_some() {
        screen.resume(progress.step, &metrics::history(&folder.metrics())?);
    }
    // A run that was killed may have left an adapter of a later step, or none.
    keeper.write_adapter(screen);

    let first = progress.next();
    let progress = Progress {
        // A run may go on in another type.
        loss_scale: LossScale::of_run(DType::from(stored), progress.loss_scale),
        ..progress
    };
    let beginning = Beginning {
        config,
        data: &data,
        selected: &selected,
        asked: request.backend,
        folder: &folder,
        total_steps,
        fit,
        progress,
        keeper,
        metrics,
    };
    let mut session = Session::new(beginning, interrupt, screen);
    if resumed.is_some_and(|resumed| resumed.forced) {
        // What was forced once need not be forced again.
        session.save(&model, &optimizer)?;
    }
    if session.progress.step == 0 {
        let scores = session.validate(&model, &optimizer)?;
        session.progress.base = scores.flatten();
    }
    let mut described = false;
    for step in first..=total_steps {
        if interrupt.asked() {
            break;
        }
        faults::at_step(step);
        if !session.progress.owes_validation {
            let step_started = Instant::now();
            let gradient = session.gradient(&model, &optimizer, step)?;
            session.check(&model, &optimizer)?;
            match gradient {
                Ok(gradient) => {
                    let learning_rate = schedule.rate(step) * session.progress.rate_factor();
                    let gradients = gradient.gradients;
                    model = session.update(|| optimizer.step(learning_rate, model, gradients))?;
                    session.progress.step = step;
                    session.progress.loss_scale =
                        session.progress.loss_scale.map(LossScale::after_step);
                    session.progress.tokens += gradient.tokens as u64;
                    let step_s = step_started.elapsed().as_secs_f64();
                    session.record(&TrainLine {
                        step,
                        epoch: order.epoch_at(step),
                        loss: gradient.loss,
                        learning_rate,
                        grad_norm: gradient.norm,
                        tokens: gradient.tokens,
                        tokens_per_s: gradient.tokens as f64 / step_s,
                        step_s,
                        memory_mib: human::mib(memory::peak()),
                        device_memory_mib: device::memory_in_use(&selected.device).map(human::mib),
                        loss_scale: gradient.loss_scale,
                    });
                }
                Err(problem) => session.skip(problem, &model, &optimizer)?,
            }
            let interval = config.steps_between_validations(order.steps_per_epoch());
            let due = step.is_multiple_of(interval);
            session.progress.owes_validation = due || step == total_steps;
        }

        let mut improved = false;
        if session.progress.owes_validation
            && let Some(scores) = session.validate(&model, &optimizer)?
        {
            session.progress.owes_validation = false;
            improved = session.keep_if_better(scores, &model, &optimizer)?;
        }
        // The checkpoint before the adapter: an adapter is never of a step that a resumed run does not know.
        let milestone = improved || session.progress.is_over(total_steps);
        let due = session.keeper.is_due(step) || milestone && session.keeper.is_on();
        if due || interrupt.asked() {
            session.save(&model, &optimizer)?;
        }
        session.keeper.write_adapter(session.screen);
        described = described || describe_prompt(&data, &folder);
        session.copy(&model, &optimizer)?;
    }

    let is_over = session.progress.is_over(total_steps);
    if is_over {
        session.keeper.finish(interrupt, session.screen)?;
        if !described && !describe_prompt(&data, &folder) {
            log::warn!("{} could not be written", data::PROMPT_FILE);
        }
    }
    let progress = &session.progress;
    if is_over {
        card(progress, session.fit.gradient_checkpointing).write_or_warn(&folder.adapter());
    }
    let result = RunResult {
        steps: progress.step,
        tokens: progress.tokens,
        elapsed: Duration::from_secs_f64(session.seconds()),
        peak_memory: memory::peak(),
        device_memory: device::memory_reserved(&selected.device),
        base: progress.base,
        kept: progress.kept.zip(progress.kept_scores),
        stopped: (!is_over).then(|| "interrupted".into()),
        written: written(&session, is_over),
        next: if is_over {
            next_commands(config, &folder)
        } else {
            vec![session.how_to_go_on()]
        },
    };
    session.screen.finish(&result);
    Ok(if is_over {
        Ended::Done(folder)
    } else {
        Ended::Interrupted(folder)
    })
}

/// Says beside an adapter that was written how its prompts were made; whether that worked.
fn describe_prompt(data: &Data, folder: &OutputFolder) -> bool {
    let adapter = folder.adapter();
    adapter.join(peft::WEIGHTS_FILE).exists() && data.prompt.write(&adapter).is_ok()
}

/// The micro-batches that the configuration asks for, where `fit` has fewer and larger ones.
fn merged_from(config: &Config, fit: &Fit) -> Option<[usize; 2]> {
    let steps = config.gradient_accumulation_steps;
    match config.batch_size {
        BatchSize::Rows(rows) if rows != fit.batch_size => Some([steps, rows]),
        _ => None,
    }
}

/// How the configuration stores frozen weights.
pub fn quantization(config: &Config) -> Quantization {
    // Validation let only 4, 8 and 16 through.
    Quantization::from_bits(config.quant_bits).unwrap_or(Quantization::None)
}

fn compute_dtype(config: &Config, selected: &Selected) -> Result<FloatDType, DeviceError> {
    let requested = match config.compute_dtype {
        ComputeDtype::Auto => None,
        ComputeDtype::F32 => Some(FloatDType::F32),
        ComputeDtype::Bf16 => Some(FloatDType::BF16),
        ComputeDtype::F16 => Some(FloatDType::F16),
        ComputeDtype::Tf32 => Some(device::TF32),
    };
    device::compute_dtype(selected, requested)
}

fn run_name(config: &Config) -> String {
    let folder = config.output_dir.file_name();
    folder.map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned())
}

fn precision(config: &Config, dtype: FloatDType, gradient_checkpointing: bool) -> String {
    let base = match config.quant_bits {
        16 => "base not quantized".to_string(),
        bits => format!("{bits}-bit base"),
    };
    let activations = if gradient_checkpointing {
        "activations recomputed"
    } else {
        "activations kept"
    };
    format!(
        "{base}, {} compute, {activations}",
        format!("{dtype:?}").to_lowercase()
    )
}

fn data_summary(config: &Config, data: &Data) -> DataSummary {
    let name = if config.embedded_data() {
        "embedded".into()
    } else {
        config.dataset_path.display().to_string()
    };
    let sum = |dataset: &Dataset| dataset.lengths().map(|length| length as u64).sum();
    DataSummary {
        name: format!("{name} ({})", data.formats()),
        train_rows: data.train.len(),
        validation_rows: data.validation.len(),
        too_long_rows: data.too_long(),
        max_seq_len: config.max_seq_len,
        tokens: sum(&data.train),
        longest_row: data.train.lengths().max().unwrap_or(0),
        supervised_tokens: data.train.supervised() as u64,
    }
}

/// How much memory a device has, in words.
fn memory_in_words(memory: DeviceMemory) -> String {
    let bytes = human::bytes(memory.bytes);
    match memory.known {
        Known::Free => format!("{bytes} free"),
        Known::Stated | Known::Total => bytes,
    }
}

/// Which values a preset gave, and how another trainer's file was read.
fn preset(config: &Config) -> Vec<String> {
    let source = &config.source;
    let values = source.preset.iter();
    let values: Vec<String> = values
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    let mut notes = source.notes.clone();
    if !values.is_empty() {
        let whose = match source.preset_name.as_str() {
            "axolotl" => "axolotl",
            _ => "FinLoRA's finetune.py",
        };
        let note = format!(
            "the preset {:?} set what the configuration leaves out, as in {whose}: {}. The file's own keys and --set come before it",
            source.preset_name,
            values.join(", ")
        );
        notes.insert(0, note);
    }
    notes
}

/// What the user should know before the first step.
fn warnings(
    selected: &Selected,
    kept: Option<KeptKernels>,
    resumed: Option<&Resumed>,
    divided_anew: bool,
    memory_there: Option<DeviceMemory>,
) -> Vec<String> {
    let mut warnings: Vec<String> = selected.warning().into_iter().collect();
    if selected.backend != Backend::Cpu {
        warnings.push(device::first_step(kept));
    }
    if memory_there.is_none() {
        warnings.push(
            "this device does not tell how much memory it has: what fits is found out by trying, and activations are \
             recomputed unless the run is small. device_memory = \"8GiB\", say, plans with what it has"
                .into(),
        );
    }
    let switches = device::switches();
    if !switches.is_empty() {
        warnings.push(format!("as asked for: {}", switches.join(", ")));
    }
    let Some(resumed) = resumed else {
        return warnings;
    };
    let state = &resumed.checkpoint.state;
    warnings.push(format!(
        "going on after step {} of {}, from {}",
        state.progress.step,
        state.total_steps,
        resumed.checkpoint.folder().display()
    ));
    warnings.extend(resumed.notes.iter().cloned());
    if state.device != selected.name {
        warnings.push(format!(
            "the run was on {}: the results agree up to rounding, not bit for bit",
            state.device
        ));
    }
    if divided_anew {
        warnings.push(
            "the rows of an update are divided anew, since less memory is free than before: the results agree up \
             to rounding, not bit for bit"
                .into(),
        );
    }
    warnings
}

/// What is said of a run that was resumed at its end.
fn nothing_left(folder: &OutputFolder, total_steps: usize) -> String {
    format!(
        "{}: all {total_steps} steps of this run are done. Its adapter is in {}",
        folder.path().display(),
        folder.adapter().display()
    )
}

/// What a run has written so far.
fn written(session: &Session, is_over: bool) -> Vec<(String, PathBuf)> {
    let folder = session.folder;
    let mut written = Vec::new();
    if is_over || session.progress.kept.is_some() {
        written.push(("adapter".into(), folder.adapter()));
    }
    written.push(("configuration".into(), folder.config()));
    written.push(("metrics".into(), folder.metrics()));
    if session.keeper.newest().is_some() {
        let checkpoints = folder.checkpoints().folder().to_path_buf();
        written.push(("checkpoints".into(), checkpoints));
    }
    written
}

fn next_commands(config: &Config, folder: &OutputFolder) -> Vec<(String, String)> {
    let mut next = vec![(
        "use it in PEFT".to_string(),
        format!(
            "PeftModel.from_pretrained(model, {:?})",
            folder.adapter().display().to_string()
        ),
    )];
    if config.embedded_model() {
        let command = "cargo xtask train --config configs/smollm2-135m-fpb.toml";
        next.push(("train a real model".into(), command.into()));
    } else {
        let again = format!("cargo xtask train --config {}", shown(&folder.config()));
        next.push(("run it again".into(), again));
    }
    next
}

/// A path as a shell takes it.
pub(crate) fn shown(path: &Path) -> String {
    match path.to_string_lossy() {
        text if text.contains(' ') => format!("\"{text}\""),
        text => text.into_owned(),
    }
}
