//! Training, from a configuration to an adapter on disk: [`train`] reads from top to bottom.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::{DType, FloatDType};
use llama_burn::{Llama, LlamaConfig, LoadOptions};
use lora_core::{CounterRng, LoraError, Quantization};

use crate::config::{BatchSize, ComputeDtype, Config, Problems};
use crate::data::{self, Data, DataError, Dataset, Order, Prefixes};
use crate::device::{self, Backend, DeviceError, Selected};
use crate::embedded::{self, EmbeddedError};
use crate::fit::{self, Fit, FitError};
use crate::gradients::{self, AdapterGradients, PassOptions};
use crate::loss::LossSums;
use crate::metrics::{MetricsError, MetricsWriter, TrainLine, ValidationLine};
use crate::optimizer::AdamW;
use crate::output::{self, Existing, OutputError, OutputFolder};
use crate::peft::{self, AdapterConfig, AdapterError, AdapterTensors, write_adapter};
use crate::plan;
use crate::schedule::Schedule;
use crate::screen::{
    AdapterSummary, DataSummary, RunResult, RunSummary, Scores, Screen, StepSummary,
};
use crate::{human, memory};

/// Why a run did not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum TrainError {
    #[error(transparent)]
    Files(#[from] Problems),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
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
    Load(#[from] llama_burn::LoadError),
    #[error(transparent)]
    Lora(#[from] LoraError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Start(#[from] peft::StartError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A loss or gradient that is not a number.
    #[error(
        "the {what} of step {step} is {value}; {rows}. Nothing of this step was kept. A lower learning_rate or a longer warm-up usually helps; see whether the rows named are what you expect"
    )]
    NotFinite {
        /// Loss or gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The optimizer step, from 1.
        step: usize,
        /// Which lines of the data it came from.
        rows: String,
    },
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
    /// Finds the files, and unpacks the embedded ones if they are asked for.
    ///
    /// # Errors
    ///
    /// Every file that is missing.
    pub fn find(config: &Config) -> Result<Self, TrainError> {
        config.check_files()?;
        let embedded = match config.embedded_model() || config.embedded_data() {
            true => Some(embedded::materialise()?),
            false => None,
        };
        let embedded = embedded.as_ref();
        let train = match embedded.filter(|_| config.embedded_data()) {
            Some(paths) => paths.train.clone(),
            None => config.dataset_path.clone(),
        };
        let own_validation = embedded.filter(|_| config.embedded_data());
        Ok(Self {
            model: match (config.model_folder(), embedded) {
                (Some(folder), _) => folder,
                (None, Some(paths)) => paths.model_dir.clone(),
                (None, None) => PathBuf::from(&config.base_model),
            },
            validation: match (&config.val_dataset_path, own_validation) {
                (Some(path), _) => Some(path.clone()),
                (None, paths) => paths.map(|paths| paths.validation.clone()),
            },
            train,
        })
    }

    /// Reads and tokenizes the rows. `max_seq_len` is held to the positions that the model has.
    ///
    /// # Errors
    ///
    /// The first bad line, by file and number.
    pub fn data(&self, config: &Config, model: &LlamaConfig) -> Result<Data, DataError> {
        data::prepare(
            config,
            &self.model,
            &self.train,
            self.validation.as_deref(),
            model.vocab_size,
            config.max_seq_len.min(model.max_position_embeddings),
        )
    }
}

/// Trains an adapter as `config` says, shows it on `screen`, and writes it.
///
/// # Errors
///
/// Whatever is wrong with the files, the device or the configuration is found before the first step.
pub fn train(
    config: &Config,
    backend: Backend,
    existing: Existing,
    screen: &mut Screen,
) -> Result<OutputFolder, TrainError> {
    // What needs no weights comes first, so that a mistake costs seconds.
    let files = RunFiles::find(config)?;
    let model_config = LlamaConfig::from_file(&files.model)?;
    let config = &peft::continued(config, &model_config)?;
    let lora = config.lora_config();
    let data = files.data(config, &model_config)?;
    let selected = device::select(backend)?;
    let dtype = compute_dtype(config, &selected)?;
    let stored = device::prepare(&selected, dtype)?;
    let fit = fit::fit(config, &model_config, &selected, stored, &data)?;
    let (plan, gradient_checkpointing) = (&fit.plan, fit.gradient_checkpointing);
    device::self_test(&selected)?;
    let folder = OutputFolder::prepare(&config.output_dir, existing)?;
    output::write_atomically(&folder.config(), config.to_toml().as_bytes())?;
    let mut metrics = MetricsWriter::append(&folder.metrics())?;

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
    let mut model = peft::start(model, config)?;
    drop(task);

    let order = Order::new(
        config.seed,
        &data.train,
        fit.batch_size,
        fit.gradient_accumulation_steps,
        config.max_batch_tokens,
    );
    let total_steps = order.total_steps(config.num_epochs, config.max_steps);
    let schedule = Schedule {
        peak: config.learning_rate,
        warmup_steps: config.warmup(total_steps),
        total_steps,
        decay: config.lr_scheduler,
    };
    let mut optimizer = AdamW {
        beta_1: config.adam_beta1,
        beta_2: config.adam_beta2,
        epsilon: config.adam_epsilon,
        weight_decay: config.weight_decay,
    }
    .init();
    screen.start(&RunSummary {
        name: run_name(config),
        model: format!("{}: {}", config.base_model, plan::shape(&model_config)),
        precision: precision(config, dtype, gradient_checkpointing),
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
        warnings: selected.warning().into_iter().collect(),
    });

    let prefixes = fit.prefixes;
    let run = Run {
        config,
        fit: &fit,
        data: &data,
        selected: &selected,
    };
    let started = Instant::now();
    let base = run.validate(&model, 0, 0.0, screen, &mut metrics)?;
    let mut best: Option<(usize, Scores)> = None;
    let mut tokens_in_all = 0u64;
    let dropout = CounterRng::new(config.seed).fork(DROPOUT);

    for step in 1..=total_steps {
        let step_started = Instant::now();
        let mut sums = AdapterGradients::default();
        let mut tokens = 0;
        for (index, rows) in order.step(step - 1).into_iter().enumerate() {
            let batch = data.train.batch(&rows, prefixes);
            let options = PassOptions {
                gradient_checkpointing,
                dropout_seed: dropout.fork(step as u64).fork(index as u64).next_u64(),
            };
            gradients::accumulate(&model, &batch, options, &mut sums);
            if !sums.totals.loss.is_finite() {
                return Err(run.not_finite("loss", sums.totals.loss, step, &model, &[rows]));
            }
            tokens += batch.row_tokens;
        }
        let loss = sums.totals.mean();
        let (gradients, grad_norm) = sums.into_mean(config.max_grad_norm);
        if !grad_norm.is_finite() {
            let rows = order.step(step - 1);
            return Err(run.not_finite("gradient", grad_norm, step, &model, &rows));
        }
        let learning_rate = schedule.rate(step);
        model = optimizer.step(learning_rate, model, gradients);

        let step_s = step_started.elapsed().as_secs_f64();
        tokens_in_all += tokens as u64;
        let line = TrainLine {
            step,
            epoch: order.epoch_at(step),
            loss,
            learning_rate,
            grad_norm,
            tokens,
            tokens_per_s: tokens as f64 / step_s,
            step_s,
            memory_mib: human::mib(memory::peak()),
            device_memory_mib: device::memory_in_use(&selected.device).map(human::mib),
        };
        metrics.train(&line)?;
        screen.step(&line);

        let due = match config.eval_steps {
            Some(interval) => step.is_multiple_of(interval),
            None => step.is_multiple_of(order.steps_per_epoch()),
        };
        if due || step == total_steps {
            let scores = run.validate(&model, step, order.epoch_at(step), screen, &mut metrics)?;
            let better = match (scores, best) {
                (Some(now), Some((_, before))) => now.loss < before.loss,
                _ => true,
            };
            // Without `save_best`, or without validation rows, the newest adapter is the one to keep.
            if better || !config.save_best {
                run.save(&model, &folder)?;
                best = scores.map(|scores| (step, scores));
            }
        }
    }

    screen.finish(&RunResult {
        steps: total_steps,
        tokens: tokens_in_all,
        elapsed: started.elapsed(),
        peak_memory: memory::peak(),
        device_memory: device::memory_reserved(&selected.device),
        base,
        kept: best,
        stopped: None,
        written: vec![
            ("adapter".into(), folder.adapter()),
            ("configuration".into(), folder.config()),
            ("metrics".into(), folder.metrics()),
        ],
        next: next_commands(config, &folder),
    });
    Ok(folder)
}

/// What stays the same over a run.
struct Run<'a> {
    config: &'a Config,
    fit: &'a Fit,
    data: &'a Data,
    selected: &'a Selected,
}

impl Run<'_> {
    /// Loss and accuracy on the validation rows; `None` without any.
    fn validate(
        &self,
        model: &Llama,
        step: usize,
        epoch: f64,
        screen: &mut Screen,
        metrics: &mut MetricsWriter,
    ) -> Result<Option<Scores>, TrainError> {
        let rows = &self.data.validation;
        if rows.is_empty() {
            return Ok(None);
        }
        let started = Instant::now();
        let mut sums = LossSums::default();
        for indices in rows.in_order(self.fit.batch_size, self.config.max_batch_tokens) {
            let batch = rows.batch(&indices, self.fit.prefixes);
            sums.add(gradients::evaluate(model, &batch));
            screen.validating(sums.rows, rows.len());
        }
        let line = ValidationLine {
            step,
            epoch,
            val_loss: sums.mean(),
            val_accuracy: sums.accuracy(),
            val_row_accuracy: sums.row_accuracy(),
            val_tokens: sums.tokens,
            val_s: started.elapsed().as_secs_f64(),
        };
        metrics.validation(&line)?;
        screen.validation(&line);
        Ok(Some(Scores {
            loss: line.val_loss,
            accuracy: line.val_accuracy,
            row_accuracy: line.val_row_accuracy,
        }))
    }

    fn save(&self, model: &Llama, folder: &OutputFolder) -> Result<(), TrainError> {
        let config = AdapterConfig {
            lora: self.config.lora_config(),
            base_model_name_or_path: Some(self.config.base_model.clone()),
        };
        let tensors = AdapterTensors::from_model(model)?;
        log::debug!("writing the adapter from {}", self.selected.name);
        Ok(write_adapter(&folder.adapter(), &config, &tensors)?)
    }

    /// Looks for the rows that give a loss that is not a number, each by itself.
    fn not_finite(
        &self,
        what: &'static str,
        value: f64,
        step: usize,
        model: &Llama,
        micro_batches: &[Vec<usize>],
    ) -> TrainError {
        let mut all = Vec::new();
        let mut culprits = Vec::new();
        for index in micro_batches.iter().flatten() {
            let row = self.data.train.batch(&[*index], Prefixes::Apart);
            let line = row.rows[0].to_string();
            if !gradients::evaluate(model, &row).loss.is_finite() {
                culprits.push(line.clone());
            }
            all.push(line);
        }
        let rows = match culprits.is_empty() {
            true => format!(
                "no row alone does that; together they are lines {}",
                all.join(", ")
            ),
            false => format!(
                "it comes from these lines of the data: {}",
                culprits.join(", ")
            ),
        };
        TrainError::NotFinite {
            what,
            value,
            step,
            rows,
        }
    }
}

/// Separates the dropout's random numbers from those that the same seed gives elsewhere.
const DROPOUT: u64 = 0x64_72_6f_70;

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
    let activations = match gradient_checkpointing {
        true => "activations recomputed",
        false => "activations kept",
    };
    format!(
        "{base}, {} compute, {activations}",
        format!("{dtype:?}").to_lowercase()
    )
}

fn data_summary(config: &Config, data: &Data) -> DataSummary {
    let name = match config.embedded_data() {
        true => "embedded".into(),
        false => config.dataset_path.display().to_string(),
    };
    let sum = |dataset: &Dataset| dataset.lengths().map(|length| length as u64).sum();
    DataSummary {
        name,
        train_rows: data.train.len(),
        validation_rows: data.validation.len(),
        too_long_rows: data.too_long(),
        max_seq_len: config.max_seq_len,
        tokens: sum(&data.train),
        longest_row: data.train.lengths().max().unwrap_or(0),
        supervised_tokens: data.train.supervised() as u64,
    }
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

fn shown(path: &Path) -> String {
    match path.to_string_lossy() {
        text if text.contains(' ') => format!("\"{text}\""),
        text => text.into_owned(),
    }
}
