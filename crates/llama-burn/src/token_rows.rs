//! Rows of an embedding or `lm_head` weight that are trained while the weight is frozen, in whatever type it is stored
//! (PEFT's `trainable_token_indices`).

use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use kernels::{Floats, Ints, Uploaded, Uploads, multiply_add, multiply_in_f32};

use crate::Llama;

/// Rows whose gradient from the embeddings is summed at a time, in a product with one factor per row and position.
const ROWS_AT_ONCE: usize = 256;

/// Trained rows that replace rows of a weight.
#[derive(Module, Debug)]
pub struct TokenRows {
    /// `[tokens, hidden]`, f32, trainable.
    pub rows: Param<Tensor<2>>,
    /// The token of each row; no token occurs twice.
    #[module(skip)]
    pub tokens: Vec<usize>,
}

/// Which of a batch's embeddings the trained rows replace.
pub(crate) struct PlannedTokenRows {
    /// 1 for an embedding that is kept, 0 for one that is replaced.
    keep: Floats,
    /// The trained row that replaces it; 0 for an embedding that is kept.
    which: Ints,
    count: usize,
}

impl TokenRows {
    /// Rows `[tokens, hidden]` on a device, in f32.
    ///
    /// # Panics
    ///
    /// If the values do not hold one row per token.
    pub fn new(tokens: Vec<usize>, values: Vec<f32>, device: &Device) -> Self {
        let hidden = values.len() / tokens.len().max(1);
        let data = TensorData::new(values, [tokens.len(), hidden]);
        let rows = Tensor::from_data(data, (device, DType::F32));
        Self {
            rows: Param::from_tensor(rows),
            tokens,
        }
    }

    /// The rows outside an autodiff graph, in type `dtype`.
    fn detached(&self, dtype: DType) -> Tensor<2> {
        self.rows.val().without_autodiff().cast(dtype)
    }

    /// The rows in the type of `other`, and in its autodiff graph if it is in one.
    fn like(&self, other: &Tensor<2>) -> Tensor<2> {
        if other.is_autodiff() {
            self.rows.val().cast(other.dtype())
        } else {
            self.detached(other.dtype())
        }
    }

    /// The tokens, on the device of the rows.
    fn index(&self) -> Tensor<1, Int> {
        let tokens: Vec<i32> = self.tokens.iter().map(|token| *token as i32).collect();
        let device = self.rows.lazy_device().without_autodiff();
        let data = TensorData::new(tokens, [self.tokens.len()]);
        Tensor::from_data(data, (&device, DType::I32))
    }

    /// The index of each token's row.
    fn row_of_token(&self) -> HashMap<u32, usize> {
        let rows = self.tokens.iter().enumerate();
        rows.map(|(row, token)| (*token as u32, row)).collect()
    }

    /// Plans [`put`](Self::put) for these tokens.
    pub(crate) fn planned(&self, ids: &[u32], uploads: &mut Uploads) -> PlannedTokenRows {
        let places = self.row_of_token();
        let rows: Vec<Option<&usize>> = ids.iter().map(|id| places.get(id)).collect();
        PlannedTokenRows {
            keep: uploads.floats(rows.iter().map(|row| f32::from(row.is_none()))),
            which: uploads.ints(rows.iter().map(|row| row.map_or(0, |row| *row as i32))),
            count: ids.len(),
        }
    }

    /// Replaces the embeddings of the rows' tokens, `[n, hidden]`, in the autodiff graph of `embeddings` if it is in
    /// one.
    pub(crate) fn put(
        &self,
        embeddings: Tensor<2>,
        planned: &PlannedTokenRows,
        uploaded: &Uploaded,
    ) -> Tensor<2> {
        let keep = uploaded.floats(&planned.keep, [planned.count, 1]);
        let mut keep: Tensor<2> = keep.cast(embeddings.dtype());
        if embeddings.is_autodiff() {
            keep = keep.autodiff();
        }
        let rows = self.like(&embeddings);
        let rows = rows.select(0, uploaded.ints(&planned.which));
        let replaced = rows * keep.clone().neg().add_scalar(1.0);
        embeddings * keep + replaced
    }

    /// The rows' gradient from that of the embeddings of `ids`, in f32: the sum over each token's positions.
    ///
    /// # Shapes
    ///
    /// - `gradient`: `[ids.len(), hidden]`
    pub fn embeddings_backward(
        &self,
        ids: &[u32],
        gradient: Tensor<2>,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) {
        let places = self.row_of_token();
        let positions = ids.iter().enumerate();
        let positions = positions.filter_map(|(at, id)| Some((*places.get(id)?, at)));
        let mut positions: Vec<(usize, usize)> = positions.collect();
        positions.sort_unstable();
        let count = self.tokens.len();
        let sums = (0..count).step_by(ROWS_AT_ONCE).map(|start| {
            let rows = start..count.min(start + ROWS_AT_ONCE);
            let end = |row| positions.partition_point(|(other, _)| *other < row);
            let here = &positions[end(rows.start)..end(rows.end)];
            sums_of_positions(rows, here, &gradient)
        });
        accumulate(&self.rows, Tensor::cat(sums.collect(), 0));
    }

    /// Replaces the logits of the rows' tokens, in the autodiff graph of `logits` if it is in one.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[m, hidden]`
    /// - `logits`, output: `[m, vocab]`
    pub(crate) fn logits(&self, hidden: Tensor<2>, logits: Tensor<2>) -> Tensor<2> {
        let rows = self.like(&hidden);
        let new = hidden.matmul(rows.transpose()).cast(logits.dtype());
        let index = self.index();
        let old = logits.clone().select(1, index.clone());
        logits.select_assign(1, index, new - old, IndexingUpdateOp::Add)
    }

    /// Returns the gradient of the frozen weight's logits, with zeros for the rows' tokens, and the rows' part of the
    /// gradient of `hidden`. The rows' gradient goes to `accumulate`, in f32.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[m, hidden]`, normalized
    /// - `gradient`, first output: `[m, vocab]`
    /// - second output: `[m, hidden]`
    pub(crate) fn logits_backward(
        &self,
        hidden: Tensor<2>,
        gradient: Tensor<2>,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) -> [Tensor<2>; 2] {
        let index = self.index();
        let d_rows = gradient.clone().select(1, index.clone());
        let others = gradient.select_assign(1, index, d_rows.clone().neg(), IndexingUpdateOp::Add);
        let rows = self.detached(hidden.dtype());
        accumulate(
            &self.rows,
            multiply_in_f32(d_rows.clone().transpose(), hidden),
        );
        [others, multiply_add(None, 1.0, d_rows, rows)]
    }
}

/// The sums `[rows, hidden]` over the positions of each row. `positions` holds sorted pairs of row and position. The
/// sums are a matrix product, whose order of summation is the same in every run.
fn sums_of_positions(
    rows: Range<usize>,
    positions: &[(usize, usize)],
    gradient: &Tensor<2>,
) -> Tensor<2> {
    let device = gradient.device();
    let (count, found) = (rows.len(), positions.len());
    if found == 0 {
        return Tensor::zeros([count, gradient.dims()[1]], (&device, DType::F32));
    }
    let mut ones = vec![0f32; count * found];
    for (column, (row, _)) in positions.iter().enumerate() {
        ones[(row - rows.start) * found + column] = 1.0;
    }
    let places: Vec<i32> = positions.iter().map(|(_, at)| *at as i32).collect();
    let places = TensorData::new(places, [found]);
    let places = Tensor::<1, Int>::from_data(places, (&device, DType::I32));
    let ones = TensorData::new(ones, [count, found]);
    let ones = Tensor::<2>::from_data(ones, (&device, DType::F32));
    let of_tokens = gradient.clone().select(0, places).cast(DType::F32);
    multiply_in_f32(ones, of_tokens)
}

impl Llama {
    /// The trained rows of the output layer: `head_rows`, or those of a tied embedding.
    pub(crate) fn rows_of_head(&self) -> Option<&TokenRows> {
        let tied = self.lm_head.is_none() && self.config.tie_word_embeddings;
        let embedding = self.embed_rows.as_ref().filter(|_| tied);
        self.head_rows.as_ref().or(embedding)
    }

    /// The model with its trained rows written into the weights. A tied output layer with rows that differ from the
    /// embedding's gets a separate weight.
    ///
    /// # Errors
    ///
    /// The device's message if a tensor cannot be read back.
    pub fn with_merged_rows(mut self) -> Result<Self, String> {
        let written = |rows: &TokenRows, mut values: Vec<f32>| {
            let data = rows.detached(DType::F32).into_data();
            let own: Vec<f32> = data.try_to_vec().map_err(|error| format!("{error:?}"))?;
            let hidden = own.len() / rows.tokens.len().max(1);
            for (token, row) in rows.tokens.iter().zip(own.chunks_exact(hidden.max(1))) {
                values[token * hidden..(token + 1) * hidden].copy_from_slice(row);
            }
            Ok::<_, String>(values)
        };
        let head = match &self.head_rows {
            Some(rows) => Some(written(rows, self.head_values()?)?),
            None => None,
        };
        let embedding = match &self.embed_rows {
            Some(rows) => Some(written(rows, self.embed_tokens.values()?)?),
            None => None,
        };
        (self.head_rows, self.embed_rows) = (None, None);
        if head.is_some() {
            self.untie();
        }
        for (name, values) in [
            ("lm_head.weight", head),
            ("model.embed_tokens.weight", embedding),
        ] {
            if let Some(values) = values {
                self.set_tensor(name, values);
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PackedTokens;
    use crate::model::tests::config;
    use kernels::{CounterRng, normal};

    fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
        let norm = |x: Tensor<2>| x.powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        norm(a.clone() - b.clone()) / norm(b.clone())
    }

    fn rows(tokens: &[usize], seed: u64, device: &Device) -> TokenRows {
        let mut rng = CounterRng::new(seed);
        let values = (0..tokens.len() * 32).map(|_| 0.3 * rng.normal() as f32);
        TokenRows::new(tokens.to_vec(), values.collect(), device)
    }

    /// A tied or untied model with trained rows of its embedding, and with `head` also of its head.
    fn trained(tied: bool, head: bool, device: &Device) -> Llama {
        let config = crate::LlamaConfig {
            tie_word_embeddings: tied,
            ..config()
        };
        let mut model = Llama::random(&config, 1, device);
        model.embed_rows = Some(rows(&[7, 3], 2, device));
        model.head_rows = head.then(|| rows(&[40, 3, 0], 3, device));
        model
    }

    #[test]
    fn trained_rows_act_as_weights_with_these_rows() {
        let device = Device::flex();
        let ids = [1u32, 3, 7, 3, 9];
        let packed = PackedTokens::from_sequences([&ids[..]]);
        for (tied, head) in [(true, false), (false, false), (false, true), (true, true)] {
            let model = trained(tied, head, &device);
            let merged = model.clone().with_merged_rows().unwrap();
            assert!(merged.embed_rows.is_none() && merged.head_rows.is_none());
            assert_eq!(merged.lm_head.is_none(), tied && !head);
            let states = merged.hidden_states(&packed);
            assert!(distance(&model.hidden_states(&packed), &states) < 1e-6);
            let embedded = model.manual_inputs(&packed, [&[]]).hidden;
            assert!(distance(&embedded, &merged.embed(&packed)) < 1e-7);
            for logits in [model.logits(states.clone()), model.manual_logits(&states)] {
                assert!(distance(&logits, &merged.logits(states.clone())) < 1e-6);
            }
            // Each weight has changed.
            let before = Llama::random(&model.config, 1, &device);
            assert!(distance(&before.embed(&packed), &embedded) > 0.1);
            let others = before.logits(states.clone());
            assert_eq!(
                distance(&others, &model.logits(states)) > 1e-3,
                tied || head
            );
        }
    }

    #[test]
    fn manual_gradients_of_logits_are_those_of_the_autodiff_graph() {
        let device = Device::flex().autodiff();
        for (tied, head) in [(true, false), (false, true)] {
            let model = trained(tied, head, &device);
            let hidden = normal([5, 32], 1.0, &mut CounterRng::new(4), &device).require_grad();
            let gradient = normal([5, 48], 1.0, &mut CounterRng::new(5), &device);
            let logits = model.logits(hidden.clone());
            let expected = (logits * gradient.clone()).sum().backward();
            let mut accumulated = HashMap::new();
            let plain = hidden.clone().inner();
            let d_hidden =
                model.manual_logits_backward(&plain, gradient.inner(), &mut |param, gradient| {
                    accumulated.insert(param.id, gradient);
                });
            assert!(distance(&d_hidden, &hidden.grad(&expected).unwrap()) < 2e-6);
            let rows = &model.rows_of_head().unwrap().rows;
            let d_rows = rows.val().grad(&expected).unwrap();
            assert!(distance(&accumulated[&rows.id], &d_rows) < 2e-6);
            assert_eq!(accumulated.len(), 1);
        }
    }

    #[test]
    fn an_embeddings_gradient_is_the_sum_over_its_positions() {
        let device = Device::flex();
        let rows = rows(&[7, 3, 5], 2, &device);
        let gradient = TensorData::new((0..8).map(|i| i as f32).collect(), [4, 2]);
        let gradient = Tensor::<2>::from_data(gradient, &device);
        let of = |ids: &[u32]| {
            let mut found = Vec::new();
            rows.embeddings_backward(ids, gradient.clone(), &mut |_, gradient| {
                found.push(gradient.into_data().try_to_vec::<f32>().unwrap());
            });
            found.remove(0)
        };
        assert_eq!(of(&[3, 1, 7, 3]), [4.0, 5.0, 6.0, 8.0, 0.0, 0.0]);
        assert_eq!(of(&[1, 2, 4, 6]), [0.0; 6]);
    }

    #[test]
    fn gradients_of_many_rows_are_summed_some_at_a_time() {
        let device = Device::flex();
        let tokens: Vec<usize> = (0..3 * ROWS_AT_ONCE - 5).rev().collect();
        let rows = rows(&tokens, 2, &device);
        let ids: Vec<u32> = (0..500u32).map(|i| i * i % 1009).collect();
        let values: Vec<f32> = (0..500).map(|i| i as f32).collect();
        let mut expected = vec![0f32; tokens.len()];
        for (id, value) in ids.iter().zip(&values) {
            if let Some(row) = tokens.iter().position(|token| *token == *id as usize) {
                expected[row] += value;
            }
        }
        let gradient = Tensor::<2>::from_data(TensorData::new(values, [500, 1]), &device);
        rows.embeddings_backward(&ids, gradient, &mut |_, gradient| {
            let found = gradient.into_data().try_to_vec::<f32>().unwrap();
            assert_eq!(found, expected);
        });
    }
}
