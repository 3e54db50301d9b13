//! The quantities that parity compares, computed with this trainer's code.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use llama_burn::{EMBEDDING_WEIGHT, HEAD_WEIGHT, Llama};

use super::ParityError;
use data::Batch;
use peft::trained_names;
use train_step::gradients::{self, AdapterGradients, PassOptions};
use train_step::loraplus_rates;
use train_step::optimizer::AdamW;

/// The logits at every position, `[n, vocab]`, row-major.
pub(super) fn logits(model: &Llama, batch: &Batch) -> Result<Vec<f32>, ParityError> {
    let logits = model.logits(model.hidden_states(&batch.tokens));
    values(logits, "logits")
}

/// The mean loss per token in the loss.
pub(super) fn loss(model: &Llama, batch: &Batch) -> f64 {
    gradients::evaluate(model, batch).mean()
}

/// The gradients of the mean loss by PEFT's tensor name and in its layout: A `[r, d_in]`, B
/// `[d_out, r]`, the method's vectors `[d_out]`.
pub(super) fn gradients(
    model: &Llama,
    batch: &Batch,
    gradient_checkpointing: bool,
) -> Result<BTreeMap<String, Vec<f32>>, ParityError> {
    let mut sums = AdapterGradients::default();
    gradients::accumulate(model, batch, options(gradient_checkpointing), &mut sums);
    let tokens = sums.totals().tokens as f64;
    let adapter = model.linears().find_map(|(_, linear)| linear.adapter());
    let method = adapter.map(|adapter| adapter.method()).unwrap_or_default();
    let mut named = BTreeMap::new();
    for (module, params) in model.trainable() {
        for (name, param) in trained_names(&module, method).into_iter().zip(params) {
            let sum = sums
                .get(param.id)
                .ok_or_else(|| ParityError::NoGradient { name: name.clone() })?;
            let mean = sum.div_scalar(tokens).transpose();
            named.insert(name.clone(), values(mean, &name)?);
        }
    }
    for (name, parts) in model.trained_whole() {
        let is_table = [EMBEDDING_WEIGHT, HEAD_WEIGHT].contains(&name.as_str());
        let name = whole_name(&name);
        let mut all = Vec::new();
        for part in parts {
            let sum = sums
                .get(part.id())
                .ok_or_else(|| ParityError::NoGradient { name: name.clone() })?;
            let mean = sum.div_scalar(tokens);
            // Hugging Face stores the transpose of a linear weight.
            let mean = if is_table { mean } else { mean.transpose() };
            all.extend(values(mean, &name)?);
        }
        named.insert(name, all);
    }
    Ok(named)
}

/// The name of a tensor of the base model in PEFT's files.
pub(super) fn whole_name(tensor: &str) -> String {
    format!("base_model.model.{tensor}")
}

fn options(gradient_checkpointing: bool) -> PassOptions {
    PassOptions {
        gradient_checkpointing,
        ..PassOptions::default()
    }
}

/// A tensor's elements, row-major.
pub(super) fn values<const D: usize>(
    tensor: Tensor<D>,
    name: &str,
) -> Result<Vec<f32>, ParityError> {
    let data = tensor.into_data().convert::<f32>();
    data.try_to_vec().map_err(|error| ParityError::Unreadable {
        name: name.into(),
        reason: format!("{error:?}"),
    })
}

/// Trains on one batch and returns the loss of each step, before its update. With a ratio the optimizer is LoRA+.
pub(super) fn train(
    mut model: Llama,
    batch: &Batch,
    steps: usize,
    learning_rate: f64,
    loraplus_lr_ratio: Option<f64>,
) -> (Llama, Vec<f64>) {
    let mut optimizer = AdamW::default().resumable();
    if let Some(ratio) = loraplus_lr_ratio {
        optimizer = optimizer.with_rates(loraplus_rates(&model, ratio));
    }
    let mut losses = Vec::new();
    for _ in 0..steps {
        let mut sums = optimizer.sums();
        gradients::accumulate(&model, batch, options(true), &mut sums);
        let mean = sums.into_mean(0.0);
        losses.push(mean.totals.mean());
        model = optimizer.step(learning_rate, model, mean.gradients);
    }
    (model, losses)
}
