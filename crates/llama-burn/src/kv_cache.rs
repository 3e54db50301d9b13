//! The KV cache: keys and values of the tokens so far, so that the next token costs one token's work.
//!
//! Prompts are prefilled as one packed batch: shared prefixes are computed once, and on the CPU also stored once. After
//! that every sequence grows by one token per step.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use kernels::{PromptTokens, kv_cache};

use crate::packed::PackedError;
use crate::{LayerPass, Llama, PackedContext, PackedTokens};

/// Shorter prefixes are computed per sequence: the bookkeeping of sharing them would cost more.
const LEAST_SHARED: usize = 4;

/// The keys and values of all layers for several sequences. Made by [`Llama::prefill`].
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<Box<dyn kernels::KvCache>>,
    /// The length of each sequence so far.
    lengths: Vec<usize>,
}

impl KvCache {
    /// The number of sequences.
    pub fn sequences(&self) -> usize {
        self.lengths.len()
    }

    /// The length of each sequence so far, in tokens.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Keeps these sequences only, in this order, and frees the memory of the others.
    ///
    /// # Panics
    ///
    /// If an index is out of bounds.
    pub fn keep(&mut self, sequences: &[usize]) {
        self.lengths = sequences
            .iter()
            .map(|sequence| self.lengths[*sequence])
            .collect();
        for layer in &mut self.layers {
            layer.keep(sequences);
        }
    }
}

impl Llama {
    /// Prefills prompts. Returns their cache and the last layer's output at each prompt's last token, `[sequences,
    /// hidden]`, for [`manual_logits`](Self::manual_logits).
    ///
    /// # Errors
    ///
    /// An empty prompt, a token outside the vocabulary, or a prompt that is longer than the model's positions.
    pub fn prefill(&self, sequences: &[&[u32]]) -> Result<(KvCache, Tensor<2>), PackedError> {
        if sequences.is_empty() || sequences.iter().any(|sequence| sequence.is_empty()) {
            return Err(PackedError::Empty);
        }
        let (packed, places) = PackedTokens::sharing_for(sequences, LEAST_SHARED, &self.config);
        packed.check(&self.config)?;
        let context = self.manual_context(&packed);
        let device = self.device().without_autodiff();
        let last = places.iter().filter_map(|places| places.last());
        let last = indices(last.map(|place| *place as i32).collect(), &device);
        let mut hidden = self.manual_embeddings(&packed.ids);
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let pass = LayerPass {
                layer,
                context: &context,
                dropout_seed: None,
                output_positions: (index + 1 == self.layers.len()).then_some(&last),
            };
            let (output, activations) = pass.forward(&hidden);
            let [k, v] = activations.into_keys_values();
            let prompts = PromptTokens {
                places: &places,
                heads: layer.self_attn.heads(),
                window: layer.self_attn.sliding_window,
            };
            layers.push(kv_cache(k, v, prompts));
            hidden = output;
        }
        let lengths = sequences.iter().map(|sequence| sequence.len()).collect();
        Ok((KvCache { layers, lengths }, hidden))
    }

    /// Appends one token to every sequence and returns the last layer's output there, `[sequences, hidden]`.
    ///
    /// Under the rope type "dynamic" beyond `max_position_embeddings`, the new token is rotated by the frequencies of
    /// its sequence's length so far, and earlier tokens keep their rotation, as in transformers with a cache.
    ///
    /// # Errors
    ///
    /// A number of tokens that differs from the number of sequences, a token outside the vocabulary, or a sequence that
    /// has used all of the model's positions. The cache is then unchanged.
    pub fn decode(&self, cache: &mut KvCache, tokens: &[u32]) -> Result<Tensor<2>, PackedError> {
        if tokens.len() != cache.sequences() || tokens.is_empty() {
            return Err(PackedError::Sequences {
                expected: cache.sequences(),
                got: tokens.len(),
            });
        }
        let vocab_size = self.config.vocab_size;
        if let Some(position) = tokens.iter().position(|id| *id as usize >= vocab_size) {
            return Err(PackedError::OutsideVocabulary {
                position,
                id: tokens[position],
                vocab_size,
            });
        }
        let max_position_embeddings = self.config.positions();
        let longest = cache.lengths.iter().max().map_or(0, |longest| longest + 1);
        if longest > max_position_embeddings {
            return Err(PackedError::TooLong {
                length: longest,
                max_position_embeddings,
            });
        }
        let device = self.device().without_autodiff();
        let positions: Vec<u32> = cache.lengths.iter().map(|length| *length as u32).collect();
        let context = PackedContext::of_positions(&positions, &self.config, self.dtype(), &device);
        let mut hidden = self.manual_embeddings(tokens);
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            let pass = LayerPass {
                layer,
                context: &context,
                dropout_seed: None,
                output_positions: None,
            };
            hidden = pass.decode(&hidden, cache.as_mut());
        }
        cache.lengths.iter_mut().for_each(|length| *length += 1);
        Ok(hidden)
    }
}

fn indices(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), (device, DType::I32))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares sequences continued from the cache, some of them dropped meanwhile, with whole sequences computed anew.
    fn assert_continued(config: &crate::LlamaConfig, device: &Device) {
        let model = Llama::random(config, 1, device);
        let sequences: [&[u32]; 4] = [
            &[1, 2, 3, 4, 5, 6, 7],
            &[1, 2, 3, 4, 5, 9],
            &[11],
            &[1, 2, 3, 4, 5],
        ];
        let next =
            |sequence: usize, step: usize| ((sequence * 13 + step * 7) % config.vocab_size) as u32;
        let (mut cache, hidden) = model.prefill(&sequences).unwrap();
        let mut texts: Vec<Vec<u32>> = sequences.iter().map(|sequence| sequence.to_vec()).collect();
        let mut left: Vec<usize> = (0..sequences.len()).collect();
        assert_same(&model, &hidden, &texts, &left);
        for step in 0..40 {
            if step == 3 {
                left = vec![3, 0, 1];
                cache.keep(&[3, 0, 1]);
            }
            let tokens: Vec<u32> = left.iter().map(|sequence| next(*sequence, step)).collect();
            for (sequence, token) in left.iter().zip(&tokens) {
                texts[*sequence].push(*token);
            }
            let hidden = model.decode(&mut cache, &tokens).unwrap();
            assert_same(&model, &hidden, &texts, &left);
        }
        assert_eq!(cache.lengths(), [45, 47, 46]);
    }

    fn assert_same(model: &Llama, hidden: &Tensor<2>, texts: &[Vec<u32>], left: &[usize]) {
        let got: Vec<f32> = model
            .manual_logits(hidden)
            .into_data()
            .try_to_vec()
            .unwrap();
        let vocab = model.config.vocab_size;
        for (sequence, got) in left.iter().zip(got.chunks_exact(vocab)) {
            let text = &texts[*sequence];
            let whole = model.hidden_states(&PackedTokens::from_sequences([&text[..]]));
            let last = model.logits(whole.narrow(0, text.len() - 1, 1));
            let expected: Vec<f32> = last.into_data().try_to_vec().unwrap();
            for (got, expected) in got.iter().zip(&expected) {
                // f32 sums in another order, of logits of about 10.
                assert!((got - expected).abs() < 2e-5, "{got} {expected}");
            }
        }
    }

    #[test]
    fn sequences_continued_from_the_cache_are_those_computed_anew() {
        let config = crate::model::tests::config();
        assert_continued(&config, &Device::flex());
        let norms_of_heads = crate::LlamaConfig {
            query_key_norm: true,
            head_dim: 12,
            ..config
        };
        assert_continued(&norms_of_heads, &Device::flex());
        let windows = crate::LlamaConfig {
            windows: vec![None, Some(6)],
            ..norms_of_heads
        };
        assert_continued(&windows, &Device::flex());
    }

    #[test]
    fn invalid_tokens_are_an_error_and_leave_the_cache_unchanged() {
        let config = crate::model::tests::config();
        let model = Llama::random(&config, 1, &Device::flex());
        assert!(matches!(model.prefill(&[&[]]), Err(PackedError::Empty)));
        assert!(matches!(model.prefill(&[]), Err(PackedError::Empty)));
        let long = vec![1u32; config.max_position_embeddings];
        let (mut cache, _) = model.prefill(&[&long]).unwrap();
        let error = model.decode(&mut cache, &[1]).unwrap_err();
        assert!(matches!(error, PackedError::TooLong { length: 65, .. }));
        let (mut cache, _) = model.prefill(&[&[1, 2]]).unwrap();
        assert!(model.decode(&mut cache, &[1, 2]).is_err());
        assert!(model.decode(&mut cache, &[48]).is_err());
        assert_eq!(cache.lengths(), [2]);
    }
}
