//! The gradient of one optimizer step, and the examples that cause a value that is not a number.

use llama_burn::Llama;
use lora_core::CounterRng;

use crate::fit::Fit;
use data::{Dataset, Prefixes};
use durable::faults;
use train_step::FlatGradients;
use train_step::gradients::{self, AdapterGradients, PassOptions};

/// Separates the dropout's random numbers from others with the same seed.
const DROPOUT: u64 = 0x64_72_6f_70;

/// The inputs of an optimizer step.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// The training examples.
    pub rows: &'a Dataset,
    /// The indices of the examples of each micro-batch.
    pub micro_batches: &'a [Vec<usize>],
    /// Options of the passes.
    pub fit: &'a Fit,
    /// The step, from 1.
    pub step: usize,
    /// The run's seed.
    pub seed: u64,
    /// Clips the norm of all gradients together; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// The loss scale: the factor of the loss in the backward pass; 1 if the type needs none.
    pub loss_scale: f64,
}

/// The gradient of a step's mean loss per token.
pub struct StepGradient {
    /// The gradients, clipped.
    pub gradients: FlatGradients,
    /// Their norm before clipping.
    pub norm: f64,
    /// The loss.
    pub loss: f64,
    /// Tokens of the examples.
    pub tokens: usize,
    /// The loss scale, if the type needs one.
    pub loss_scale: Option<f64>,
}

/// Why a step has no gradient.
#[derive(Debug, Clone, PartialEq)]
pub enum NoGradient {
    /// It exceeded the range of f16; a smaller loss scale may help.
    OutOfRange,
    /// The gradient, or the loss, is not a number.
    NotFinite(NotFinite),
}

/// A loss or gradient that is not a number.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the {what} of step {step} is {value}; {rows}")]
pub struct NotFinite {
    /// Loss or gradient norm.
    pub what: &'static str,
    /// Its value.
    pub value: f64,
    /// The optimizer step, from 1.
    pub step: usize,
    /// The lines of the data that cause it.
    pub rows: String,
}

/// Runs a step's micro-batches forward and backward and accumulates the gradients in `sums`, which are empty and
/// come from the optimizer.
///
/// The dropout masks are functions of the seed, the step and the micro-batch; no random generator
/// has a state.
///
/// # Errors
///
/// [`NoGradient`]; if the loss scale is not the cause, with the lines of the examples.
///
/// # Panics
///
/// If the device panics.
pub fn gradient(
    model: &Llama,
    mut sums: AdapterGradients,
    input: StepInput,
) -> Result<StepGradient, NoGradient> {
    let dropout = CounterRng::new(input.seed).fork(DROPOUT);
    let mut tokens = 0;
    for (index, rows) in input.micro_batches.iter().enumerate() {
        faults::device(rows.len());
        let batch = input.rows.batch(rows, input.fit.prefixes);
        let masks = dropout.fork(input.step as u64).fork(index as u64);
        let options = PassOptions {
            gradient_checkpointing: input.fit.gradient_checkpointing,
            dropout_seed: { masks }.next_u64(),
            loss_scale: input.loss_scale,
        };
        gradients::accumulate(model, &batch, options, &mut sums);
        tokens += batch.row_tokens;
    }
    // The only point of the step that waits for the device.
    let mean = sums.into_mean(input.max_grad_norm);
    let loss = faults::loss(mean.totals.mean());
    if loss.is_finite() && !mean.norm.is_finite() && input.loss_scale > 1.0 {
        return Err(NoGradient::OutOfRange);
    }
    for (what, value) in [("loss", loss), ("gradient", mean.norm)] {
        if !value.is_finite() {
            let problem = not_finite(what, value, model, input);
            return Err(NoGradient::NotFinite(problem));
        }
    }
    Ok(StepGradient {
        gradients: mean.gradients,
        norm: mean.norm,
        loss,
        tokens,
        loss_scale: (input.loss_scale != 1.0).then_some(input.loss_scale),
    })
}

/// Looks for the examples whose loss alone is not a number.
fn not_finite(what: &'static str, value: f64, model: &Llama, input: StepInput) -> NotFinite {
    let mut all = Vec::new();
    let mut culprits = Vec::new();
    for index in input.micro_batches.iter().flatten() {
        let row = input.rows.batch(&[*index], Prefixes::Apart);
        let line = row.rows[0].to_string();
        if !gradients::evaluate(model, &row).loss.is_finite() {
            culprits.push(line.clone());
        }
        all.push(line);
    }
    let rows = if culprits.is_empty() {
        format!(
            "no single example causes it; this step used lines {} of the data file",
            all.join(", ")
        )
    } else {
        format!("caused by lines {} of the data file", culprits.join(", "))
    };
    NotFinite {
        what,
        value,
        step: input.step,
        rows,
    }
}
