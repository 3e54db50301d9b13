//! This trainer: every call of the benchmark into its hot path is in this file.
//!
//! A step is that of [`train`](lora_train::train()), without validation, clipping and the screen.

use std::time::Instant;

use burn::tensor::{Device, FloatDType};
use llama_burn::{Llama, LlamaConfig, LoadOptions};
use lora_core::{LoraConfig, Quantization};

use super::error::BenchError;
use super::protocol::{Loaded, OursSettings, PeakMemory, Phases, WorkerSpec};
use super::random_model;
use data::{Batch, Dataset, Prefixes, TokenizedRow};
use device::process_memory as memory;
use device::{Backend, ModelLoader, ModelOptions, Selected};
use lora_train::fit;
use lora_train::plan::{Plan, PlanOptions, Workload};
use peft::read_adapter;
use train_step::gradients::{self, AdapterGradients, PassOptions};
use train_step::loss_scale::LossScale;
use train_step::optimizer::{AdamW, Optimizer};

/// The measurements of an optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepReport {
    /// The mean loss per token in the loss, before the update.
    pub loss: f64,
    /// Tokens that went through the layers.
    pub computed_tokens: u64,
    /// The seconds by part.
    pub phases: Phases,
}

/// A model in training, as `trainer train` does it.
pub(super) struct Ours {
    model: Llama,
    optimizer: Optimizer,
    rows: Dataset,
    prefixes: Prefixes,
    options: PassOptions,
    in_graph: bool,
    /// Whether the micro-batches of a step are computed together.
    merges: bool,
    learning_rate: f64,
    device: Device,
    on_gpu: bool,
}

impl Ours {
    /// Loads the model, applies the initial adapter, and describes what was loaded.
    ///
    /// # Errors
    ///
    /// An error of the device, the model's files or the adapter.
    pub fn load(
        spec: &WorkerSpec,
        settings: &OursSettings,
        selected: &Selected,
    ) -> Result<(Self, Loaded), BenchError> {
        let started = Instant::now();
        let config = LlamaConfig::from_file(&spec.model)?;
        let (adapter_config, adapter) = read_adapter(&spec.adapter)?;
        let lora = adapter_config.lora;
        let on_gpu = selected.backend != Backend::Cpu;
        let prefixes = if settings.share_prefixes {
            Prefixes::Shared
        } else {
            Prefixes::Apart
        };
        let options = ModelOptions {
            compute_dtype: requested(&settings.compute_dtype),
            quantization: Quantization::from_bits(settings.quant_bits).unwrap_or_default(),
            autodiff: true,
            ..ModelOptions::default()
        };
        let loader = ModelLoader::on(&spec.model, config, selected.clone(), options)?;
        let model = random_model::load(spec, &loader)?;
        let model = adapter.put_on(model, &lora)?;
        let memory = Memory {
            spec,
            prefixes,
            lora: &lora,
            config: &loader.config,
            options: loader.load_options(),
            on_gpu,
            available: device::device_memory(selected, None)
                .map(|memory| memory.usable(selected.backend)),
        };
        let checkpointing = match settings.gradient_checkpointing {
            Some(asked) => asked,
            None => !memory.keeps_activations(spec.steps.concat())?,
        };
        let accumulates = spec.steps.iter().any(|step| step.len() > 1);
        let merges = accumulates
            && !settings.in_graph
            && !checkpointing
            && memory.keeps_activations(spec.steps.iter().map(|step| step.concat()).collect())?;
        let description = format!(
            "{}, {}, {}, prefixes {}{}",
            match settings.quant_bits {
                16 => "base not quantized".to_string(),
                bits => format!("{bits}-bit base"),
            },
            format!("{:?}", loader.compute_dtype).to_lowercase(),
            match (settings.in_graph, checkpointing) {
                (true, _) => "Burn's autodiff graph over the whole model",
                (false, true) => "gradient checkpointing on",
                (false, false) => "gradient checkpointing off",
            },
            if settings.share_prefixes {
                "shared"
            } else {
                "apart"
            },
            if merges {
                ", micro-batches of a step together"
            } else {
                ""
            },
        );
        let ours = Self {
            options: PassOptions {
                gradient_checkpointing: checkpointing,
                loss_scale: LossScale::first_factor(model.dtype()),
                ..PassOptions::default()
            },
            model,
            optimizer: AdamW::default().resumable(),
            rows: dataset(spec),
            prefixes,
            in_graph: settings.in_graph,
            merges,
            learning_rate: spec.learning_rate,
            device: selected.device.clone(),
            on_gpu,
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
        let together = [micro_batches.concat()];
        let micro_batches = if self.merges {
            &together
        } else {
            micro_batches
        };
        for indices in micro_batches {
            let started = Instant::now();
            let batch = self.rows.batch(indices, self.prefixes);
            let packed = Instant::now();
            computed_tokens += batch.tokens.ids.len() as u64;
            pass(&self.model, &batch, self.options, self.in_graph, &mut sums);
            phases.data += (packed - started).as_secs_f64();
            phases.pass += packed.elapsed().as_secs_f64();
        }
        parts(&sums, self.on_gpu, &mut phases);
        let started = Instant::now();
        // Clipping is off with 0.
        let mean = sums.into_mean(0.0);
        let loss = mean.totals.mean();
        self.model = self
            .optimizer
            .step(self.learning_rate, self.model, mean.gradients);
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

/// Forward and backward of a micro-batch.
fn pass(
    model: &Llama,
    batch: &Batch,
    options: PassOptions,
    in_graph: bool,
    sums: &mut AdapterGradients,
) {
    if in_graph {
        gradients::accumulate_in_graph(model, batch, options.dropout_seed, sums)
    } else {
        gradients::accumulate(model, batch, options, sums)
    }
}

/// The pass by part. On a GPU, which works on while the program continues, only the total is
/// meaningful.
fn parts(sums: &AdapterGradients, on_gpu: bool, phases: &mut Phases) {
    let times = sums.times;
    if !on_gpu && times.forward_s > 0.0 {
        phases.forward = Some(times.forward_s);
        phases.loss = Some(times.loss_s);
        phases.backward = Some(times.backward_s);
    }
}

/// The options of a plan for a contender.
struct Memory<'a> {
    spec: &'a WorkerSpec,
    prefixes: Prefixes,
    lora: &'a LoraConfig,
    config: &'a LlamaConfig,
    options: LoadOptions,
    on_gpu: bool,
    available: Option<u64>,
}

impl Memory<'_> {
    /// Whether a run of these micro-batches needs no gradient checkpointing: if the largest of them
    /// does not take too much of the free memory, as [`fit`] decides.
    fn keeps_activations(&self, micro_batches: Vec<Vec<usize>>) -> Result<bool, BenchError> {
        let rows = dataset(self.spec);
        let workloads = micro_batches
            .iter()
            .map(|indices| Workload::of_batch(&rows.batch(indices, self.prefixes)));
        let Some(workload) = workloads.max_by_key(|workload| workload.tokens) else {
            return Ok(true);
        };
        let keeping = PlanOptions {
            lora: self.lora.clone(),
            quantization: self.options.quantization,
            float_bytes: self.options.dtype.size(),
            gradient_checkpointing: false,
            accumulates: self.spec.steps.iter().any(|step| step.len() > 1),
            on_gpu: self.on_gpu,
            workload,
        };
        let peak = Plan::new(self.config, &keeping)?.resident_peak();
        Ok(fit::is_comfortable(peak, self.available, self.on_gpu))
    }
}

/// The configuration's name for a type; `None` for auto.
fn requested(word: &str) -> Option<FloatDType> {
    match word {
        "f32" => Some(FloatDType::F32),
        "bf16" => Some(FloatDType::BF16),
        "f16" => Some(FloatDType::F16),
        _ => None,
    }
}

fn dataset(spec: &WorkerSpec) -> Dataset {
    let rows =
        spec.rows.iter().enumerate().map(|(index, row)| {
            TokenizedRow::answer(index + 1, row.ids.clone(), row.prompt_tokens)
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
