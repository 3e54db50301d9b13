//! Counts what a training step costs a GPU: launches, uploads, blocking reads, memory traffic, FLOPs.
//!
//! A step is counted for a model of 2 layers and for one of 3 layers. Their difference is one layer; a model of n
//! layers costs the step of 2 layers plus n − 2 differences. Both models have a first and a last layer.

use burn::tensor::Device;
use gpu_counts::{Counts, Mode, count};
use llama_burn::{Llama, LlamaConfig, LoadOptions};
use lora_core::{LoraConfig, LoraError};
use serde::Serialize;

use crate::gradients::{self, AdapterGradients, PassOptions};
use crate::loss_scale::LossScale;
use crate::optimizer::{AdamW, Optimizer};
use data::{Batch, BatchRow, Prefixes};

/// The step to count.
#[derive(Debug, Clone)]
pub struct StepShape {
    /// The model; its weights are not needed.
    pub model: LlamaConfig,
    /// How weights are stored, and the compute type.
    pub options: LoadOptions,
    /// The adapters.
    pub lora: LoraConfig,
    /// The token ids of each example of a micro-batch. Examples share common prefixes.
    pub examples: Vec<Vec<u32>>,
    /// The number of tokens at the end of each example that are in the loss.
    pub supervised: usize,
    /// Micro-batches per optimizer step.
    pub micro_batches: usize,
    /// Whether activations are recomputed in the backward pass.
    pub gradient_checkpointing: bool,
    /// Whether the kernels really run.
    pub mode: Mode,
}

/// The counts of a step.
#[derive(Debug, Clone, Serialize)]
pub struct StepCounts {
    /// One decoder layer, forward and backward.
    pub layer: Counts,
    /// The whole step: all layers, embedding, output layer, loss, optimizer.
    pub step: Counts,
    /// The number of layers.
    pub layers: usize,
    /// Tokens per micro-batch in the layers; shared prefixes count once.
    pub tokens: usize,
}

/// Examples of `length` tokens without shared prefixes.
pub fn examples(count: usize, length: usize, vocab_size: usize) -> Vec<Vec<u32>> {
    let id = |example: usize, place: usize| ((example * 7919 + place * 31 + 1) % vocab_size) as u32;
    (0..count)
        .map(|example| (0..length).map(|place| id(example, place)).collect())
        .collect()
}

/// Counts a step on `device`; `None` on a device without counters, such as the CPU.
///
/// # Errors
///
/// If the adapters' configuration does not fit the model.
///
/// # Panics
///
/// If the device fails.
pub fn count_step(shape: &StepShape, device: &Device) -> Result<Option<StepCounts>, LoraError> {
    let (Some(two), Some(three)) = (
        with_layers(shape, 2, device)?,
        with_layers(shape, 3, device)?,
    ) else {
        return Ok(None);
    };
    let layers = shape.model.num_hidden_layers;
    let layer = Counts {
        details: difference(&three, &two),
        ..Counts::default().extrapolated(&three, &two, 1)
    };
    Ok(Some(StepCounts {
        step: two.extrapolated(&three, &two, layers.saturating_sub(2) as u64),
        layer,
        layers,
        tokens: batch(shape).tokens.ids.len(),
    }))
}

/// The bytes that the device's memory pools hold after a step of the whole model, with all its layers: the peak of this
/// process. In a dry run ([`StepShape::mode`]) the memory is reserved and not used. `None` on a device without counters, such
/// as the CPU.
///
/// # Errors
///
/// If the adapters' configuration does not fit the model.
///
/// # Panics
///
/// If the device fails, such as for lack of memory.
pub fn reserved_by_step(shape: &StepShape, device: &Device) -> Result<Option<u64>, LoraError> {
    let counts = with_layers(shape, shape.model.num_hidden_layers, device)?;
    Ok(counts.map(|counts| counts.reserved_bytes))
}

/// How many more times each launch occurs in `more` than in `less`.
fn difference(more: &Counts, less: &Counts) -> std::collections::BTreeMap<String, u64> {
    let details = more.details.iter().filter_map(|(name, count)| {
        let before = less.details.get(name).copied().unwrap_or(0);
        (*count > before).then(|| (name.clone(), count - before))
    });
    details.collect()
}

fn with_layers(
    shape: &StepShape,
    layers: usize,
    device: &Device,
) -> Result<Option<Counts>, LoraError> {
    let config = LlamaConfig {
        num_hidden_layers: layers,
        ..shape.model.clone()
    };
    let device = device.clone().autodiff();
    let (model, _) = count(&device, shape.mode, || {
        Llama::random_on_device(&config, shape.options, &device).with_lora(&shape.lora, 1)
    });
    let mut model = model?;
    let mut optimizer = AdamW::default().resumable();
    let batch = batch(shape);
    let mut counted = None;
    // Burn searches for fusions in the first step and reuses them later: the second step is the one that is reported.
    for _ in 0..2 {
        let (next, counts) = count(&device, shape.mode, || {
            step(model, &mut optimizer, shape, &batch)
        });
        model = next;
        counted = counts;
    }
    Ok(counted)
}

/// An optimizer step, as in training.
fn step(model: Llama, optimizer: &mut Optimizer, shape: &StepShape, batch: &Batch) -> Llama {
    let mut sums = AdapterGradients::default();
    for _ in 0..shape.micro_batches {
        let options = PassOptions {
            gradient_checkpointing: shape.gradient_checkpointing,
            loss_scale: LossScale::first_factor(model.dtype()),
            ..PassOptions::default()
        };
        gradients::accumulate(&model, batch, options, &mut sums);
    }
    optimizer.step(1e-4, model, sums.into_mean(1.0).gradients)
}

fn batch(shape: &StepShape) -> Batch {
    let rows: Vec<BatchRow> = shape
        .examples
        .iter()
        .enumerate()
        .map(|(index, ids)| {
            let first = ids.len().saturating_sub(shape.supervised + 1);
            let targets = (first..ids.len() - 1).map(|place| (place, ids[place + 1]));
            BatchRow {
                ids,
                targets: targets.collect(),
                line: index + 1,
            }
        })
        .collect();
    Batch::new(&rows, Prefixes::Shared)
}
