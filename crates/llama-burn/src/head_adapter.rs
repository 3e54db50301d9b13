//! A LoRA adapter of the output layer.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor, TensorData};
use kernels::{CounterRng, kaiming_uniform, multiply_add, normal};
use lora_core::{LoraConfig, LoraError};

use crate::Llama;

/// A LoRA adapter of the output layer: `logits += γ·(h·A)·B` with the normalized hidden states h.
///
/// It is separate from the layer's weight, which may be tied to the embedding, sharded or quantized.
#[derive(Module, Debug)]
pub struct HeadAdapter {
    /// `[hidden, r]`.
    pub a: Param<Tensor<2>>,
    /// `[r, vocab]`.
    pub b: Param<Tensor<2>>,
    /// The scale γ.
    pub scale: f64,
}

impl HeadAdapter {
    /// An adapter with these factors, trainable.
    pub fn new(a: Tensor<2>, b: Tensor<2>, scale: f64) -> Self {
        Self {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            scale,
        }
    }
}

impl Llama {
    /// Adds a new adapter to the output layer. Its `A` depends on `seed` only, its `B` is zero.
    pub(crate) fn with_new_head_adapter(
        mut self,
        lora: &LoraConfig,
        seed: u64,
    ) -> Result<Self, LoraError> {
        if self.lm_head_adapter.is_some() {
            return Err(LoraError::Already("has an adapter; merge it first"));
        }
        if lora.use_dora || lora.lora_dropout > 0.0 || lora.init.changes_weights() {
            return Err(LoraError::PlainHead);
        }
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let device = self.device();
        let mut rng = CounterRng::new(seed);
        let a = match lora.init {
            lora_core::Init::Gaussian => {
                normal([hidden, lora.r], 1.0 / lora.r as f64, &mut rng, &device)
            }
            _ => kaiming_uniform(hidden, lora.r, &mut rng, &device),
        };
        let b = Tensor::zeros([lora.r, vocab], (&device, a.dtype()));
        self.lm_head_adapter = Some(HeadAdapter::new(a, b, lora.scale()));
        Ok(self)
    }

    /// The model with the adapter of its output layer merged into that layer's weight, which is then no longer tied to
    /// the embedding.
    ///
    /// # Errors
    ///
    /// The device's message if a tensor cannot be read back.
    pub fn with_merged_head(mut self) -> Result<Self, String> {
        let Some(adapter) = self.lm_head_adapter.take() else {
            return Ok(self);
        };
        let a = adapter.a.val().without_autodiff();
        let b = adapter.b.val().without_autodiff();
        let mut values = self.head_values()?;
        let hidden = self.config.hidden_size;
        // Some rows at a time: the whole product would be as large as the weight.
        const ROWS: usize = 8192;
        let mut start = 0;
        for piece in values.chunks_mut(ROWS * hidden) {
            let rows = piece.len() / hidden;
            let b = b.clone().narrow(1, start, rows).transpose();
            let data = TensorData::new(piece.to_vec(), [rows, hidden]);
            let sum = Tensor::<2>::from_data(data, (&b.device(), DType::F32));
            let a = a.clone().transpose().cast(DType::F32);
            let sum = multiply_add(Some(sum), adapter.scale, b.cast(DType::F32), a);
            let sum = sum.into_data().convert::<f32>().try_to_vec::<f32>();
            piece.copy_from_slice(&sum.map_err(|error| format!("{error:?}"))?);
            start += rows;
        }
        self.untie();
        self.set_tensor("lm_head.weight", values);
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::config;
    use burn::tensor::Device;
    use lora_core::TargetModules;
    use std::collections::HashMap;

    fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
        let norm = |x: Tensor<2>| x.powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        norm(a.clone() - b.clone()) / norm(b.clone())
    }

    /// A model with an adapter on its head only, with B ≠ 0.
    fn adapted(tied: bool, device: &Device) -> Llama {
        let config = crate::LlamaConfig {
            tie_word_embeddings: tied,
            ..config()
        };
        let lora = LoraConfig {
            r: 3,
            lora_alpha: 4.0,
            target_modules: TargetModules::Names(vec!["lm_head".into()]),
            ..LoraConfig::default()
        };
        let mut model = Llama::random(&config, 1, device)
            .with_lora(&lora, 2)
            .unwrap();
        assert!(
            model
                .linears()
                .all(|(_, linear)| linear.adapter().is_none())
        );
        let adapter = model.lm_head_adapter.take().unwrap();
        let b = normal([3, 48], 0.5, &mut CounterRng::new(3), device);
        model.lm_head_adapter = Some(HeadAdapter::new(adapter.a.val(), b, adapter.scale));
        model
    }

    #[test]
    fn manual_logits_and_gradients_are_those_of_the_autodiff_graph() {
        let device = Device::flex().autodiff();
        let model = adapted(true, &device);
        let hidden = normal([5, 32], 1.0, &mut CounterRng::new(4), &device).require_grad();
        let gradient = normal([5, 48], 1.0, &mut CounterRng::new(5), &device);
        let logits = model.logits(hidden.clone());
        let expected = (logits.clone() * gradient.clone()).sum().backward();
        let plain = hidden.clone().inner();
        assert!(distance(&model.manual_logits(&plain), &logits.inner()) < 1e-6);
        let mut accumulated = HashMap::new();
        let d_hidden =
            model.manual_logits_backward(&plain, gradient.inner(), &mut |param, gradient| {
                accumulated.insert(param.id, gradient);
            });
        assert!(distance(&d_hidden, &hidden.grad(&expected).unwrap()) < 2e-6);
        let adapter = model.lm_head_adapter.as_ref().unwrap();
        for param in [&adapter.a, &adapter.b] {
            let expected = param.val().grad(&expected).unwrap();
            assert!(distance(&accumulated[&param.id], &expected) < 2e-6);
        }
        assert_eq!(accumulated.len(), 2);
    }

    #[test]
    fn a_merged_head_has_the_same_logits_and_the_embedding_stays() {
        let device = Device::flex();
        for tied in [true, false] {
            let model = adapted(tied, &device);
            let hidden = normal([5, 32], 1.0, &mut CounterRng::new(4), &device);
            let logits = model.logits(hidden.clone());
            let embedding = model.embed_tokens.values().unwrap();
            let merged = model.with_merged_head().unwrap();
            assert!(merged.lm_head_adapter.is_none());
            assert!(distance(&merged.logits(hidden), &logits) < 1e-6);
            assert_eq!(merged.embed_tokens.values().unwrap(), embedding);
        }
    }

    #[test]
    fn a_dora_or_dropout_on_the_head_is_refused_and_counts_include_it() {
        let device = Device::flex();
        let model = || Llama::random(&config(), 1, &device);
        let mut lora = LoraConfig {
            target_modules: TargetModules::Names(vec!["q_proj".into(), "lm_head".into()]),
            ..LoraConfig::default()
        };
        let counts = model().count(&lora).unwrap();
        assert_eq!(counts.trainable, 2 * 8 * (32 + 32) + 8 * (32 + 48));
        let tied = crate::LlamaConfig {
            tie_word_embeddings: true,
            ..config()
        };
        let tied = tied.count(&lora, lora_core::Quantization::None, 4).unwrap();
        assert_eq!(
            (tied.trainable, tied.adapted_modules),
            (counts.trainable, 3)
        );
        assert_eq!(tied.frozen, counts.frozen - 48 * 32);
        lora.use_dora = true;
        assert_eq!(
            model().with_lora(&lora, 1).unwrap_err(),
            LoraError::PlainHead
        );
        lora.use_dora = false;
        lora.lora_dropout = 0.5;
        assert_eq!(
            model().with_lora(&lora, 1).unwrap_err(),
            LoraError::PlainHead
        );
    }
}
