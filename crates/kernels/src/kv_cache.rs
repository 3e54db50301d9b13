//! The KV cache of a layer: keys and values of the tokens so far, so that the next token costs one token's work.

use std::fmt::Debug;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::attention::Heads;
use crate::dispatch::of;

/// One layer's keys and values of several sequences that are being continued.
pub trait KvCache: Debug + Send {
    /// Keeps these sequences only, in this order, and frees the others' memory.
    fn keep(&mut self, sequences: &[usize]);

    /// Adds one token per sequence and returns the attention output of its query.
    ///
    /// # Shapes
    ///
    /// - `q`, output: `[sequences, heads · d]`; the queries times [`query_scale`](crate::query_scale)
    /// - `k`, `v`: `[sequences, key heads · d]`, the keys rotated
    fn attend(&mut self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, heads: Heads) -> Tensor<2>;

    /// A copy.
    fn boxed_clone(&self) -> Box<dyn KvCache>;
}

impl Clone for Box<dyn KvCache> {
    fn clone(&self) -> Self {
        self.boxed_clone()
    }
}

/// The indices of each prompt's tokens in the packed batch of prompts.
#[derive(Debug, Clone, Copy)]
pub struct PromptTokens<'a> {
    /// Per sequence the indices of its tokens, ascending.
    pub places: &'a [Vec<u32>],
    /// The heads of the layer.
    pub heads: Heads,
    /// The layer's sliding window: a token attends to this many tokens, itself included.
    pub window: Option<usize>,
}

/// A cache that starts from the prompts' keys and values.
///
/// # Shapes
///
/// - `k`, `v`: `[n, key heads · d]`, the keys rotated
pub fn kv_cache(k: Tensor<2>, v: Tensor<2>, prompts: PromptTokens) -> Box<dyn KvCache> {
    of(&k).kv_cache(k, v, prompts)
}

pub(crate) fn indices(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), (device, DType::I32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, composed, cpu, normal};

    #[test]
    fn both_caches_attend_alike() {
        let device = Device::flex();
        let mut rng = CounterRng::new(5);
        let mut random = |rows, width| normal([rows, width], 1.5, &mut rng, &device);
        let heads = Heads {
            query: 4,
            key: 2,
            d: 8,
        };
        let places = vec![vec![0, 1, 2, 3], vec![0, 1, 4], vec![5]];
        for window in [None, Some(1), Some(4), Some(70)] {
            let prompts = PromptTokens {
                places: &places,
                heads,
                window,
            };
            let [k, v] = [random(6, 16), random(6, 16)];
            let mut native = cpu::kv_cache::Cache::new([k.clone(), v.clone()], prompts);
            let mut padded = composed::kv_cache::Cache::new([k, v], prompts);
            let mut sequences = 3;
            // More steps than a block of the padded cache has room for.
            for step in 0..80 {
                if step == 10 {
                    sequences = 2;
                    native.keep(&[2, 0]);
                    padded.keep(&[2, 0]);
                }
                let [q, k, v] = [32, 16, 16].map(|width| random(sequences, width));
                let a = native.attend(q.clone(), k.clone(), v.clone(), heads);
                if window == Some(1) {
                    // Each token attends to itself: every query head gets its value.
                    let v = v.clone().reshape([sequences, 2, 1, 8]).repeat_dim(2, 2);
                    let difference = (a.clone() - v.reshape([sequences, 32])).abs().max();
                    assert!(difference.into_scalar::<f32>() < 1e-6);
                }
                let b = padded.attend(q.div_scalar((heads.d as f64).sqrt()), k, v, heads);
                let difference = (a - b).abs().max().into_scalar::<f32>();
                assert!(difference < 2e-6, "step {step}, {window:?}: {difference:e}");
            }
        }
    }
}
