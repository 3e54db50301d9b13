//! Attention as a batch of matrix products over padded segments, for any backend.
//!
//! Queries are processed in tiles, so that the scores of one tile exist at a time. A tile attends to keys up to the
//! last one that is visible to it. Query heads that share a key head are stacked as additional queries, so that keys
//! and values are never repeated. The backward pass recomputes the weights from each query's log-sum-exp, without
//! another softmax, as in FlashAttention (Dao et al., 2022, <https://arxiv.org/abs/2205.14135>).

use burn::tensor::activation::softmax;
use burn::tensor::{DType, FloatDType, Tensor};

use super::padding::{Padded, Tile};
use crate::attention::Heads;
use crate::product;

/// The largest number of scores that exist at a time: 128 MiB in f32, which every GPU binds as one buffer.
pub const SCORES_AT_ONCE: usize = 1 << 25;

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct Attended {
    /// The scaled queries, stacked.
    q: Tensor<4>,
    k: Saved,
    v: Saved,
    /// The output, stacked.
    output: Tensor<4>,
    /// Each query's log-sum-exp of scores, per tile, `[segments, key heads, queries · group, 1]`, f32.
    log_sums: Vec<Tensor<4>>,
}

/// Keys or values, saved for the backward pass.
#[derive(Debug, Clone)]
enum Saved {
    /// In the layout of attention, if nothing is padded or shared: `[segments, key heads, keys, d]`.
    Spread(Tensor<4>),
    /// In the layout of the input, `[n, key heads · d]`, if the other layout is larger.
    Packed(Tensor<2>),
}

impl Attended {
    pub fn into_keys_values(self) -> [Tensor<2>; 2] {
        [self.k, self.v].map(|saved| match saved {
            Saved::Packed(x) => x,
            Saved::Spread(x) => {
                let [segments, key, keys, d] = x.dims();
                x.swap_dims(1, 2).reshape([segments * keys, key * d])
            }
        })
    }
}

/// The shapes of a batch's attention.
#[derive(Clone, Copy)]
struct Layout<'a> {
    padded: &'a Padded,
    heads: Heads,
}

impl Layout<'_> {
    fn group(&self) -> usize {
        self.heads.query / self.heads.key
    }

    /// `[segments · queries, heads · d]` → `[segments, key heads, queries · group, d]`: the queries of heads that share
    /// a key head are adjacent.
    fn stack(&self, x: Tensor<2>) -> Tensor<4> {
        let Heads { key, d, .. } = self.heads;
        let (segments, queries) = (self.padded.segments, self.padded.queries);
        let x = x.reshape([segments, queries, key, self.group() * d]);
        x.swap_dims(1, 2)
            .reshape([segments, key, queries * self.group(), d])
    }

    /// The opposite of [`stack`](Self::stack), without the padding: `[n, heads · d]`.
    fn unstack(&self, x: Tensor<4>) -> Tensor<2> {
        let Heads { query, key, d } = self.heads;
        let (segments, queries) = (self.padded.segments, self.padded.queries);
        let x = x.reshape([segments, key, queries, self.group() * d]);
        let x = x.swap_dims(1, 2).reshape([segments * queries, query * d]);
        self.padded.gather_queries(x)
    }

    /// Keys or values of all segments, `[segments, key heads, keys, d]`, contiguous per head: a matrix product would
    /// otherwise copy them for every tile.
    fn keys(&self, x: Tensor<2>) -> Tensor<4> {
        let Heads { key, d, .. } = self.heads;
        let (segments, keys) = (self.padded.segments, self.padded.keys);
        let x = self.padded.spread_keys(x);
        // No strides describe the intermediate shape, so this copies the heads.
        x.reshape([segments, keys, key, d])
            .swap_dims(1, 2)
            .reshape([segments, key, keys * d])
            .reshape([segments, key, keys, d])
    }

    /// Keys or values in the layout of [`keys`](Self::keys), and in the form that is saved for the backward pass.
    fn keys_and_saved(&self, x: Tensor<2>) -> (Tensor<4>, Saved) {
        let spread = self.keys(x.clone());
        let saved = if self.padded.is_plain() {
            Saved::Spread(spread.clone())
        } else {
            Saved::Packed(x)
        };
        (spread, saved)
    }

    fn saved_keys(&self, saved: Saved) -> Tensor<4> {
        match saved {
            Saved::Spread(spread) => spread,
            Saved::Packed(x) => self.keys(x),
        }
    }

    /// The gradients of keys or values from those of every segment: `[n, key heads · d]`.
    fn sum_keys(&self, x: Tensor<4>) -> Tensor<2> {
        let Heads { key, d, .. } = self.heads;
        let (segments, keys) = (self.padded.segments, self.padded.keys);
        self.padded
            .sum_keys(x.swap_dims(1, 2).reshape([segments * keys, key * d]))
    }

    /// A tile's rows of a stacked tensor.
    fn rows(&self, x: &Tensor<4>, tile: &Tile) -> Tensor<4> {
        let (first, count) = (tile.queries.start, tile.queries.len());
        if count == self.padded.queries {
            x.clone()
        } else {
            x.clone()
                .narrow(2, first * self.group(), count * self.group())
        }
    }

    /// The keys or values that are visible to a tile.
    fn visible(&self, x: &Tensor<4>, tile: &Tile) -> Tensor<4> {
        if tile.visible == self.padded.keys {
            x.clone()
        } else {
            x.clone().narrow(2, 0, tile.visible)
        }
    }
}

/// `softmax(q·kᵀ/√d)·v` within each packed sequence, in the autodiff graph of `q`, which keeps all scores.
pub fn forward_in_graph(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    padded: &Padded,
    heads: Heads,
) -> Tensor<2> {
    let layout = Layout { padded, heads };
    let dtype = FloatDType::from(q.dtype());
    let in_graph = q.is_autodiff();
    let q = q.mul_scalar(1.0 / (heads.d as f64).sqrt());
    let q = layout.stack(padded.spread_queries(q));
    let (k, v) = (layout.keys(k), layout.keys(v));
    let tiles = padded.tiles.iter().map(|tile| {
        let (k, v) = (layout.visible(&k, tile), layout.visible(&v, tile));
        let scores = layout.rows(&q, tile).matmul(k.swap_dims(2, 3));
        let mask = tile.mask(DType::F32);
        let mask = if in_graph { mask.autodiff() } else { mask };
        let weights = softmax(scores.cast(FloatDType::F32) + mask, 3);
        weights.cast(dtype).matmul(v)
    });
    layout.unstack(Tensor::cat(tiles.collect(), 2))
}

/// As [`forward_in_graph`], outside any graph and with scaled queries; also returns what [`backward`] needs.
pub fn forward(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    padded: &Padded,
    heads: Heads,
) -> (Tensor<2>, Attended) {
    let layout = Layout { padded, heads };
    let dtype = q.dtype();
    let q = layout.stack(padded.spread_queries(q));
    let ((keys, k), (values, v)) = (layout.keys_and_saved(k), layout.keys_and_saved(v));
    // Unnormalized weights are at most 1, and their products with values may overflow f16: in f16 they are 16 times
    // smaller.
    let head_room = if dtype == DType::F16 { 16f64 } else { 1.0 };
    // All slices come before the arithmetic: Burn fuses consecutive operations.
    let parts: Vec<_> = padded
        .tiles
        .iter()
        .map(|tile| {
            let k = layout.visible(&keys, tile).swap_dims(2, 3);
            (
                tile,
                layout.rows(&q, tile),
                k,
                layout.visible(&values, tile),
            )
        })
        .collect();
    let mut outputs = Vec::with_capacity(parts.len());
    let mut log_sums = Vec::with_capacity(parts.len());
    for (tile, q, k, v) in parts {
        // In the type of the product, which has rounded the scores already.
        let scores = (product(q, k).cast(DType::F32) + tile.mask(dtype)).cast(dtype);
        let most = scores.clone().max_dim(3).cast(DType::F32);
        let shift = if head_room > 1.0 {
            most.clone().add_scalar(head_room.ln())
        } else {
            most.clone()
        };
        let weights = (scores.cast(DType::F32) - shift).exp().cast(dtype);
        // The weights' sum divides the output, which is smaller than the weights.
        let (mixed, log_sum) = match dtype {
            DType::F32 => {
                let mixed = product(weights.clone(), v);
                let sum = weights.sum_dim(3);
                (mixed / sum.clone(), sum.log() + most)
            }
            _ => {
                let [segments, key, rows, visible] = weights.dims();
                let (flat, unflat) = ([segments * key, rows, 1], [segments, key, rows, 1]);
                let most = most.reshape(flat);
                let mixed = product(weights.clone(), v);
                // Burn does not fuse a product with the next operation. A free change of shape is inserted here, so
                // that the sum can be fused and reads 16-bit weights.
                let sum = weights.reshape([segments * key, rows, visible]);
                let sum = sum.cast(DType::F32).mul_scalar(head_room).sum_dim(2);
                let log_sum = sum.clone().log() + most;
                let (sum, log_sum) = (sum.reshape(unflat), log_sum.reshape(unflat));
                let mixed = mixed.cast(DType::F32);
                let mixed = if head_room > 1.0 {
                    mixed.mul_scalar(head_room)
                } else {
                    mixed
                };
                (mixed / sum, log_sum)
            }
        };
        outputs.push(mixed.cast(dtype));
        log_sums.push(log_sum);
    }
    let output = concatenated(outputs);
    let attended = Attended {
        q,
        k,
        v,
        output: output.clone(),
        log_sums,
    };
    (layout.unstack(output), attended)
}

/// The gradients of the scaled queries, of keys and of values from that of the output. Shapes as in
/// [`forward`].
pub fn backward(
    attended: Attended,
    gradient: Tensor<2>,
    padded: &Padded,
    heads: Heads,
) -> [Tensor<2>; 3] {
    let Attended {
        q,
        k,
        v,
        output,
        log_sums,
    } = attended;
    let layout = Layout { padded, heads };
    let dtype = q.dtype();
    let gradient = layout.stack(padded.spread_gradient(gradient));
    let (keys, values) = (layout.saved_keys(k), layout.saved_keys(v));
    // delta = rowsum(dO ∘ O), which the derivative of softmax subtracts.
    let delta = gradient.clone().cast(DType::F32) * output.cast(DType::F32);
    let delta = delta.sum_dim(3);
    let parts: Vec<_> = padded
        .tiles
        .iter()
        .zip(log_sums)
        .map(|(tile, log_sums)| Part {
            tile,
            q: layout.rows(&q, tile),
            k: layout.visible(&keys, tile),
            v: layout.visible(&values, tile),
            gradient: layout.rows(&gradient, tile),
            delta: layout.rows(&delta, tile),
            log_sums,
        })
        .collect();
    let mut d_q = Vec::with_capacity(parts.len());
    let mut d_k = Vec::with_capacity(parts.len());
    let mut d_v = Vec::with_capacity(parts.len());
    for part in parts {
        let (q, k, gradient) = (part.q, part.k, part.gradient);
        let scores = product(q.clone(), k.clone().swap_dims(2, 3)).cast(DType::F32);
        let weights = (scores + part.tile.mask(dtype) - part.log_sums)
            .exp()
            .cast(dtype);
        let d_weights = product(gradient.clone(), part.v.swap_dims(2, 3));
        let d_weights = d_weights.cast(DType::F32) - part.delta;
        let d_scores = (d_weights * weights.clone().cast(DType::F32)).cast(dtype);
        d_v.push(product(weights.swap_dims(2, 3), gradient));
        d_k.push(product(d_scores.clone().swap_dims(2, 3), q));
        d_q.push(product(d_scores, k));
    }
    [
        layout.unstack(concatenated(d_q)),
        layout.sum_keys(sum_over_tiles(d_k, padded)),
        layout.sum_keys(sum_over_tiles(d_v, padded)),
    ]
}

/// The inputs of a tile's backward pass.
struct Part<'a> {
    tile: &'a Tile,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gradient: Tensor<4>,
    delta: Tensor<4>,
    log_sums: Tensor<4>,
}

/// Concatenates tiles.
fn concatenated(mut tiles: Vec<Tensor<4>>) -> Tensor<4> {
    match tiles.len() {
        1 => tiles.remove(0),
        _ => Tensor::cat(tiles, 2),
    }
}

/// The sum of the tiles' gradients of the keys, `[segments, key heads, visible, d]` each. A tile contributes to its
/// visible keys only, and the visible keys of a tile include those of the tile before it.
fn sum_over_tiles(tiles: Vec<Tensor<4>>, padded: &Padded) -> Tensor<4> {
    let mut start = 0;
    let mut blocks = Vec::with_capacity(tiles.len());
    for (index, tile) in padded.tiles.iter().enumerate() {
        if tile.visible > start {
            let length = tile.visible - start;
            let parts = tiles[index..]
                .iter()
                .map(|x| x.clone().narrow(2, start, length));
            blocks.push(parts.collect::<Vec<_>>());
            start = tile.visible;
        }
    }
    let sums = blocks.into_iter().map(|parts| {
        let dtype = parts[0].dtype();
        let parts = parts.into_iter().map(|part| part.cast(DType::F32));
        let sum = parts.reduce(|sum, part| sum + part);
        sum.unwrap_or_else(|| unreachable!("a block has its own tile's part"))
            .cast(dtype)
    });
    let blocks = sums.collect();
    concatenated(blocks)
}
