//! Ours: every call of the benchmark into the trainer's hot path is in this file.
//!
//! A step is that of [`train`](crate::train), without validation, clipping and the screen.

use std::time::Instant;

use burn::optim::ModuleOptimizer;
use burn::tensor::{DType, Device, FloatDType};
use llama_burn::{Llama, LlamaConfig, LoadOptions};
use lora_core::{LoraConfig, Quantization};

use super::error::BenchError;
use super::protocol::{Loaded, OursSettings, PeakMemory, Phases, WorkerSpec};
use super::random_model;
use crate::data::{Batch, Dataset, TokenizedRow};
use crate::device::{self, Backend, Selected};
use crate::gradients::{self, AdapterGradients, PassOptions};
use crate::optimizer::AdamW;
use crate::peft::read_adapter;
use crate::plan::{Plan, PlanOptions, Workload};
use crate::{human, memory};

/// What one optimizer step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepReport {
    /// The mean loss a supervised token, before the update.
    pub loss: f64,
    /// Tokens that went through the layers.
    pub computed_tokens: u64,
    /// Where its seconds went.
    pub phases: Phases,
}

/// A model in training, as `trainer train` does it.
pub(super) struct Ours {
    model: Llama,
    optimizer: ModuleOptimizer,
    rows: Dataset,
    options: PassOptions,
    learning_rate: f64,
    device: Device,
}

impl Ours {
    /// Loads the model, puts the initial adapter on it, and says what was loaded.
    ///
    /// # Errors
    ///
    /// What is wrong with the device, the model's files or the adapter.
    pub fn load(
        spec: &WorkerSpec,
        settings: &OursSettings,
        selected: &Selected,
    ) -> Result<(Self, Loaded), BenchError> {
        let started = Instant::now();
        let config = LlamaConfig::from_file(&spec.model)?;
        let (adapter_config, adapter) = read_adapter(&spec.adapter)?;
        let lora = adapter_config.lora;
        let dtype = device::compute_dtype(selected, requested(&settings.compute_dtype))?;
        let options = LoadOptions {
            quantization: Quantization::from_bits(settings.quant_bits).unwrap_or_default(),
            quantize_lm_head: false,
            dtype: DType::from(dtype),
        };
        let device = selected.device.clone().autodiff();
        let model = match spec.random_weights {
            true => random_model::random(&config, options, &device),
            false => llama_burn::load(&spec.model, &config, options, &device, |_| {})?,
        };
        let model = adapter.put_on(model, &lora)?;
        let checkpointing = match settings.gradient_checkpointing {
            Some(asked) => asked,
            None => recomputes(spec, &config, &lora, options, selected)?,
        };
        let description = format!(
            "{}, {}, activations {}",
            match settings.quant_bits {
                16 => "base not quantized".to_string(),
                bits => format!("{bits}-bit base"),
            },
            format!("{dtype:?}").to_lowercase(),
            if checkpointing { "recomputed" } else { "kept" },
        );
        let ours = Self {
            model,
            optimizer: AdamW::default().init(),
            rows: dataset(spec),
            options: pass_options(checkpointing, settings),
            learning_rate: spec.learning_rate,
            device: selected.device.clone(),
        };
        ours.sync()?;
        let loaded = Loaded {
            description,
            seconds: started.elapsed().as_secs_f64(),
            memory: ours.memory(),
        };
        Ok((ours, loaded))
    }

    /// Trains on one step's micro-batches.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn step(mut self, micro_batches: &[Vec<usize>]) -> Result<(Self, StepReport), BenchError> {
        let mut phases = Phases::default();
        let mut sums = AdapterGradients::default();
        let mut computed_tokens = 0;
        for indices in micro_batches {
            let started = Instant::now();
            let batch = self.rows.batch(indices);
            let packed = Instant::now();
            computed_tokens += computed(&batch);
            gradients::accumulate(&self.model, &batch, self.options, &mut sums);
            phases.data += (packed - started).as_secs_f64();
            phases.pass += packed.elapsed().as_secs_f64();
        }
        parts(&sums, &mut phases);
        let started = Instant::now();
        let loss = sums.totals.mean();
        // Not clipped: 0 turns it off.
        let (gradients, _) = sums.into_mean(0.0);
        self.model = self
            .optimizer
            .step(self.learning_rate, self.model, gradients);
        self.sync()?;
        phases.optimizer += started.elapsed().as_secs_f64();
        let report = StepReport {
            loss,
            computed_tokens,
            phases,
        };
        Ok((self, report))
    }

    /// The process's memory and the device's.
    pub fn memory(&self) -> PeakMemory {
        peak_memory(&self.device)
    }

    fn sync(&self) -> Result<(), BenchError> {
        sync(&self.device)
    }
}

/// HOOK: a new field of `PassOptions` (`share_prefixes: settings.share_prefixes`) goes here.
fn pass_options(gradient_checkpointing: bool, _settings: &OursSettings) -> PassOptions {
    PassOptions {
        gradient_checkpointing,
        dropout_seed: 0,
    }
}

/// HOOK: once `AdapterGradients` counts seconds, fill `phases.forward`, `.loss` and `.backward` here.
fn parts(_sums: &AdapterGradients, _phases: &mut Phases) {}

/// HOOK: tokens that go through the layers; fewer than the rows' where a beginning is shared.
fn computed(batch: &Batch) -> u64 {
    batch.tokens.ids.len() as u64
}

/// HOOK: whether a training run with `gradient_checkpointing = "auto"` would recompute; as in `train::plan`.
fn recomputes(
    spec: &WorkerSpec,
    config: &LlamaConfig,
    lora: &LoraConfig,
    options: LoadOptions,
    selected: &Selected,
) -> Result<bool, BenchError> {
    const SMALL: u64 = 1 << 30;
    let mut lengths: Vec<usize> = spec.rows.iter().map(|row| row.ids.len()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let batch_size = spec.steps.iter().flatten().map(Vec::len).max();
    lengths.truncate(batch_size.unwrap_or(1));
    let targets = spec
        .rows
        .iter()
        .map(|row| row.ids.len() - row.prompt_tokens);
    let supervised = targets.max().unwrap_or(0) * lengths.len();
    let keeping = PlanOptions {
        lora: lora.clone(),
        quantization: options.quantization,
        float_bytes: options.dtype.size(),
        gradient_checkpointing: false,
        on_gpu: selected.backend != Backend::Cpu,
        workload: Workload::of_rows(&lengths, supervised),
    };
    let peak = Plan::new(config, &keeping)?.peak();
    log::debug!("activations kept, {} are predicted", human::bytes(peak));
    Ok(peak >= SMALL)
}

/// The configuration's word for a type; `None` for auto.
fn requested(word: &str) -> Option<FloatDType> {
    match word {
        "f32" => Some(FloatDType::F32),
        "bf16" => Some(FloatDType::BF16),
        "f16" => Some(FloatDType::F16),
        _ => None,
    }
}

fn dataset(spec: &WorkerSpec) -> Dataset {
    let rows = spec
        .rows
        .iter()
        .enumerate()
        .map(|(index, row)| TokenizedRow {
            line: index + 1,
            ids: row.ids.clone(),
            prompt_tokens: row.prompt_tokens,
        });
    Dataset {
        rows: rows.collect(),
        ..Dataset::default()
    }
}

/// Waits for the device.
///
/// # Errors
///
/// If it fails.
pub(super) fn sync(device: &Device) -> Result<(), BenchError> {
    let synced = device.sync();
    synced.map_err(|error| BenchError::Execution(format!("{error:?}")))
}

/// The process's peak memory, and what Burn holds on the device.
pub(super) fn peak_memory(device: &Device) -> PeakMemory {
    PeakMemory {
        resident: memory::resident().map(|memory| memory.peak),
        device: device::memory_reserved(device),
    }
}
