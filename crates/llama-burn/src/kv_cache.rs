//! Keys and values of the tokens so far, so that the next one costs one token's work.
//!
//! Prompts are read as a packed batch: what they begin with alike is computed once, and on the CPU it is
//! also kept once. After that every row grows by one token a step.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use kernels::{PromptTokens, kv_cache};

use crate::packed::PackedError;
use crate::{LayerPass, Llama, PackedContext, PackedTokens};

/// Beginnings that are shorter are computed for each row: the bookkeeping would cost more.
const LEAST_SHARED: usize = 4;

/// What the layers keep of several rows that are being continued. Made by [`Llama::prefill`].
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<Box<dyn kernels::KvCache>>,
    /// Tokens of each row so far.
    lengths: Vec<usize>,
}

impl KvCache {
    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens of each row so far.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Goes on with these rows only, in this order; the others' memory is given back.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn keep(&mut self, rows: &[usize]) {
        self.lengths = rows.iter().map(|row| self.lengths[*row]).collect();
        for layer in &mut self.layers {
            layer.keep(rows);
        }
    }
}

impl Llama {
    /// Reads the rows' prompts and gives, with their cache, the last layer's output at each row's last
    /// token: `[rows, hidden]`, for [`manual_logits`](Self::manual_logits).
    ///
    /// # Errors
    ///
    /// An empty row, a token outside the vocabulary, or a row that is longer than the model's positions.
    pub fn prefill(&self, rows: &[&[u32]]) -> Result<(KvCache, Tensor<2>), PackedError> {
        if rows.is_empty() || rows.iter().any(|row| row.is_empty()) {
            return Err(PackedError::Empty);
        }
        let (packed, places) = PackedTokens::sharing_for(rows, LEAST_SHARED, &self.config);
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
            };
            layers.push(kv_cache(k, v, prompts));
            hidden = output;
        }
        let lengths = rows.iter().map(|row| row.len()).collect();
        Ok((KvCache { layers, lengths }, hidden))
    }

    /// Reads one more token of every row and gives the last layer's output there, `[rows, hidden]`.
    ///
    /// Under the rope type "dynamic" beyond `max_position_embeddings`, the new token is rotated by the frequencies of its
    /// row's length so far, and older ones stay as they were: what transformers does with a cache.
    ///
    /// # Errors
    ///
    /// A number of tokens that is not that of rows, a token outside the vocabulary, or a row that has
    /// used up the model's positions; the cache is then as before.
    pub fn decode(&self, cache: &mut KvCache, tokens: &[u32]) -> Result<Tensor<2>, PackedError> {
        if tokens.len() != cache.rows() || tokens.is_empty() {
            return Err(PackedError::Rows {
                expected: cache.rows(),
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

    /// Rows continued from the cache, some dropped on the way, against the whole rows computed anew.
    fn assert_continued(device: &Device) {
        let config = crate::model::tests::config();
        let model = Llama::random(&config, 1, device);
        let rows: [&[u32]; 4] = [
            &[1, 2, 3, 4, 5, 6, 7],
            &[1, 2, 3, 4, 5, 9],
            &[11],
            &[1, 2, 3, 4, 5],
        ];
        let next = |row: usize, step: usize| ((row * 13 + step * 7) % config.vocab_size) as u32;
        let (mut cache, hidden) = model.prefill(&rows).unwrap();
        let mut texts: Vec<Vec<u32>> = rows.iter().map(|row| row.to_vec()).collect();
        let mut left: Vec<usize> = (0..rows.len()).collect();
        assert_same(&model, &hidden, &texts, &left);
        for step in 0..40 {
            if step == 3 {
                left = vec![3, 0, 1];
                cache.keep(&[3, 0, 1]);
            }
            let tokens: Vec<u32> = left.iter().map(|row| next(*row, step)).collect();
            for (row, token) in left.iter().zip(&tokens) {
                texts[*row].push(*token);
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
        for (row, got) in left.iter().zip(got.chunks_exact(vocab)) {
            let text = &texts[*row];
            let whole = model.hidden_states(&PackedTokens::from_rows([&text[..]]));
            let last = model.logits(whole.narrow(0, text.len() - 1, 1));
            let expected: Vec<f32> = last.into_data().try_to_vec().unwrap();
            for (got, expected) in got.iter().zip(&expected) {
                // f32 sums in another order, on scores of about 10.
                assert!((got - expected).abs() < 2e-5, "{got} {expected}");
            }
        }
    }

    #[test]
    fn rows_continued_from_the_cache_are_the_rows_computed_anew() {
        assert_continued(&Device::flex());
    }

    #[test]
    fn what_cannot_be_continued_is_an_error_and_leaves_the_cache_as_it_was() {
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
