//! A model in training: a step as the trainer does it. All calls of the report into the training
//! code are here.

use burn::tensor::{DType, Device, FloatDType};
use llama_burn::{Llama, LlamaConfig, LoadOptions};
use lora_core::{LoraConfig, Quantization};

use super::error::ReportError;
use data::{Batch, BatchRow, Prefixes};
use train_step::gradients::{self, AdapterGradients, PassOptions};
use train_step::loss_scale::LossScale;
use train_step::optimizer::{AdamW, Optimizer};
use train_step::step_counts;

/// The seed of the adapters' initialization.
const SEED: u64 = 1;

/// A model with adapters and an optimizer.
pub struct Trainee {
    /// The model.
    pub model: Llama,
    optimizer: Optimizer,
    options: PassOptions,
}

impl Trainee {
    /// A model that already has its adapters.
    pub fn new(model: Llama, gradient_checkpointing: bool) -> Self {
        Self {
            options: PassOptions {
                gradient_checkpointing,
                loss_scale: LossScale::first_factor(model.dtype()),
                ..PassOptions::default()
            },
            model,
            optimizer: AdamW::default().resumable(),
        }
    }

    /// A shape with random weights in 8 bits, made on the device, and the default adapters.
    ///
    /// # Errors
    ///
    /// If the adapters do not fit the shape.
    pub fn random(
        config: &LlamaConfig,
        dtype: FloatDType,
        gradient_checkpointing: bool,
        device: &Device,
    ) -> Result<Self, ReportError> {
        let device = device.clone().autodiff();
        let model = Llama::random_on_device(config, options(dtype), &device);
        let model = model.with_lora(&LoraConfig::default(), SEED)?;
        Ok(Self::new(model, gradient_checkpointing))
    }

    /// An optimizer step on one micro-batch; returns the mean loss per token in the loss before it.
    pub fn step(mut self, batch: &Batch, learning_rate: f64) -> (Self, f64) {
        let mean = self.gradients(batch).into_mean(1.0);
        let loss = mean.totals.mean();
        self.model = self
            .optimizer
            .step(learning_rate, self.model, mean.gradients);
        (self, loss)
    }

    /// The gradients of a micro-batch's summed loss.
    pub fn gradients(&self, batch: &Batch) -> AdapterGradients {
        let mut sums = AdapterGradients::default();
        gradients::accumulate(&self.model, batch, self.options, &mut sums);
        sums
    }
}

/// 8 bits, computing in `dtype`.
pub fn options(dtype: FloatDType) -> LoadOptions {
    LoadOptions {
        quantization: Quantization::Bits8,
        quantize_lm_head: false,
        dtype: DType::from(dtype),
    }
}

/// A micro-batch of examples of `tokens` random tokens, the second half of each in the loss, as in
/// `peft_bench.py --shape`.
pub fn batch(examples: usize, tokens: usize, vocab_size: usize) -> Batch {
    let examples = step_counts::examples(examples, tokens, vocab_size);
    let rows = examples.iter().enumerate().map(|(index, ids)| {
        let targets = (tokens / 2..tokens).map(|place| (place - 1, ids[place]));
        BatchRow {
            ids,
            targets: targets.collect(),
            line: index + 1,
        }
    });
    Batch::new(&rows.collect::<Vec<_>>(), Prefixes::Apart)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shapes::Shape;

    #[test]
    fn half_of_each_example_is_supervised_and_steps_lower_the_loss() {
        let config = Shape::Embedded.config().unwrap();
        let batch = batch(2, 12, config.vocab_size);
        assert_eq!((batch.row_tokens, batch.target_ids.len()), (24, 12));
        let device = Device::flex();
        let mut trainee = Trainee::random(&config, FloatDType::F32, false, &device).unwrap();
        let mut losses = Vec::new();
        for _ in 0..8 {
            let (next, loss) = trainee.step(&batch, 1e-2);
            trainee = next;
            losses.push(loss);
        }
        assert!(losses[7] < losses[0] - 0.1, "{losses:?}");
    }
}
