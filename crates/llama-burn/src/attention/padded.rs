//! Attention as a batch of matrix products over padded segments, for any backend.
//!
//! Queries come in tiles, so that scores exist for some of them at a time; the backward pass computes
//! them again. Query heads that share a key head are stacked along the queries, so that keys and values
//! are never repeated.

use burn::tensor::activation::softmax;
use burn::tensor::{FloatDType, Tensor};

use super::Heads;
use crate::packed::Padded;

/// Scores that exist at a time at most: 64 MiB in f32.
pub const SCORES_AT_ONCE: usize = 1 << 24;

/// Queries a tile.
pub(super) fn tile(padded: &Padded, heads: Heads) -> usize {
    let a_query = padded.segments * heads.query * padded.keys;
    (SCORES_AT_ONCE / a_query.max(1)).clamp(1, padded.queries.max(1))
}

/// Keys and values spread out, `[segments, key heads, keys, d]`.
struct Spread<'a> {
    padded: &'a Padded,
    heads: Heads,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
}

impl<'a> Spread<'a> {
    fn new(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, padded: &'a Padded, heads: Heads) -> Self {
        let n = q.dims()[0];
        let split = |x: Tensor<2>, count| x.reshape([n, count, heads.d]);
        Self {
            padded,
            heads,
            q: padded.spread_queries(split(q, heads.query)),
            k: padded.spread_keys(split(k, heads.key)).swap_dims(1, 2),
            v: padded.spread_keys(split(v, heads.key)).swap_dims(1, 2),
        }
    }

    /// `[segments, queries, heads, d]` → `[segments, key heads, group · count, d]` for a tile.
    fn stack(&self, x: &Tensor<4>, first: usize, count: usize) -> Tensor<4> {
        let Heads { query, key, d } = self.heads;
        let x = x.clone().narrow(1, first, count).swap_dims(1, 2);
        x.reshape([self.padded.segments, key, query / key * count, d])
    }

    /// The opposite of [`stack`](Self::stack).
    fn unstack(&self, x: Tensor<4>, count: usize) -> Tensor<4> {
        let Heads { query, d, .. } = self.heads;
        x.reshape([self.padded.segments, query, count, d])
            .swap_dims(1, 2)
    }

    /// A tile's scaled queries and weights, `[segments, key heads, group · count, d or keys]`; the
    /// weights in f32.
    fn weights(&self, first: usize, count: usize) -> (Tensor<4>, Tensor<4>) {
        let Heads { query, key, d } = self.heads;
        let (segments, keys) = (self.padded.segments, self.padded.keys);
        // The scale goes onto the queries, the smaller tensor; scores and softmax are f32.
        let q = self
            .stack(&self.q, first, count)
            .mul_scalar(1.0 / (d as f64).sqrt());
        let scores = q.clone().matmul(self.k.clone().swap_dims(2, 3));
        let scores = scores
            .cast(FloatDType::F32)
            .reshape([segments, query, count, keys]);
        let mask = self
            .padded
            .mask(first, count, &scores.device().without_autodiff());
        let mask = match scores.is_autodiff() {
            true => mask.autodiff(),
            false => mask,
        };
        let weights = softmax(scores + mask, 3);
        (
            q,
            weights.reshape([segments, key, query / key * count, keys]),
        )
    }
}

/// `softmax(q·kᵀ/√d)·v` within rows, `tile` queries at a time. Also on a tape, which keeps all scores.
///
/// # Shapes
///
/// - `q`, output: `[n, heads · d]`
/// - `k`, `v`: `[n, key heads · d]`
pub(super) fn forward(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    padded: &Padded,
    heads: Heads,
    tile: usize,
) -> Tensor<2> {
    let dtype = FloatDType::from(q.dtype());
    let spread = Spread::new(q, k, v, padded, heads);
    let tiles = (0..padded.queries).step_by(tile).map(|first| {
        let count = tile.min(padded.queries - first);
        let (_, weights) = spread.weights(first, count);
        spread.unstack(weights.cast(dtype).matmul(spread.v.clone()), count)
    });
    padded.gather_queries(Tensor::cat(tiles.collect(), 1))
}

/// The gradients of queries, keys and values from that of the output. Shapes as in [`forward`].
pub(super) fn backward(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    gradient: Tensor<2>,
    padded: &Padded,
    heads: Heads,
    tile: usize,
) -> [Tensor<2>; 3] {
    let n = q.dims()[0];
    let dtype = FloatDType::from(q.dtype());
    let gradient = padded.spread_queries(gradient.reshape([n, heads.query, heads.d]));
    // What stands at padded places is a copy of a token's gradient, which must not count twice.
    let gradient = match &padded.tokens {
        Some(tokens) => {
            let [segments, queries, ..] = gradient.dims();
            let tokens = tokens
                .clone()
                .cast(dtype)
                .reshape([segments, queries, 1, 1]);
            gradient * tokens
        }
        None => gradient,
    };
    let spread = Spread::new(q, k, v, padded, heads);
    let mut d_q = Vec::new();
    let mut d_k = spread.k.zeros_like();
    let mut d_v = spread.v.zeros_like();
    for first in (0..padded.queries).step_by(tile) {
        let count = tile.min(padded.queries - first);
        let (q, weights) = spread.weights(first, count);
        let gradient = spread.stack(&gradient, first, count);
        let low = weights.clone().cast(dtype);
        d_v = d_v + low.swap_dims(2, 3).matmul(gradient.clone());
        let through = gradient
            .matmul(spread.v.clone().swap_dims(2, 3))
            .cast(FloatDType::F32);
        let delta = (weights.clone() * through.clone()).sum_dim(3);
        let scores = (weights * (through - delta)).cast(dtype);
        d_k = d_k + scores.clone().swap_dims(2, 3).matmul(q);
        let tile = scores
            .matmul(spread.k.clone())
            .mul_scalar(1.0 / (heads.d as f64).sqrt());
        d_q.push(spread.unstack(tile, count));
    }
    [
        padded.gather_queries(Tensor::cat(d_q, 1)),
        padded.sum_keys(d_k.swap_dims(1, 2), n),
        padded.sum_keys(d_v.swap_dims(1, 2), n),
    ]
}
