//! Attention as a batch of matrix products over padded segments, for any backend.
//!
//! Queries come in tiles, so that scores exist for some of them at a time, and each tile sees keys up to its last
//! visible one. Query heads that share a key head lie side by side as further queries, so that keys and values
//! are never repeated. The backward pass computes the weights again from each query's log-sum-exp, as
//! FlashAttention does (Dao et al., 2022, <https://arxiv.org/abs/2205.14135>): without a softmax of its own.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, FloatDType, Tensor};

use super::padding::{Padded, Tile};
use crate::attention::Heads;
use crate::product;

/// Scores that exist at a time at most: 128 MiB in f32, which every graphics adapter binds as one buffer.
pub const SCORES_AT_ONCE: usize = 1 << 25;

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct Attended {
    /// The scaled queries, stacked.
    q: Tensor<4>,
    k: Kept,
    v: Kept,
    /// The output, stacked.
    output: Tensor<4>,
    /// Each query's log-sum-exp of scores by tile, `[segments, key heads, queries · group, 1]`, f32.
    log_sums: Vec<Tensor<4>>,
}

/// Keys or values as the backward pass finds them.
#[derive(Debug, Clone)]
enum Kept {
    /// As attention reads them, where nothing is padded or shared: `[segments, key heads, keys, d]`.
    Spread(Tensor<4>),
    /// As they came, `[n, key heads · d]`, where they would grow.
    Packed(Tensor<2>),
}

impl Attended {
    pub fn into_keys_values(self) -> [Tensor<2>; 2] {
        [self.k, self.v].map(|kept| match kept {
            Kept::Packed(x) => x,
            Kept::Spread(x) => {
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

    /// `[segments · queries, heads · d]` → `[segments, key heads, queries · group, d]`: queries of the heads that
    /// share a key head side by side.
    fn stack(&self, x: Tensor<2>) -> Tensor<4> {
        let Heads { key, d, .. } = self.heads;
        let (segments, queries) = (self.padded.segments, self.padded.queries);
        let x = x.reshape([segments, queries, key, self.group() * d]);
        x.swap_dims(1, 2)
            .reshape([segments, key, queries * self.group(), d])
    }

    /// The opposite of [`stack`](Self::stack), the padding left out: `[n, heads · d]`.
    fn unstack(&self, x: Tensor<4>) -> Tensor<2> {
        let Heads { query, key, d } = self.heads;
        let (segments, queries) = (self.padded.segments, self.padded.queries);
        let x = x.reshape([segments, key, queries, self.group() * d]);
        let x = x.swap_dims(1, 2).reshape([segments * queries, query * d]);
        self.padded.gather_queries(x)
    }

    /// Keys or values of all segments, `[segments, key heads, keys, d]`, each head's in one piece: a matrix product
    /// would otherwise copy them for every tile.
    fn keys(&self, x: Tensor<2>) -> Tensor<4> {
        let Heads { key, d, .. } = self.heads;
        let (segments, keys) = (self.padded.segments, self.padded.keys);
        let x = self.padded.spread_keys(x);
        // The shape in between cannot be had by other strides, so the heads are copied apart here.
        x.reshape([segments, keys, key, d])
            .swap_dims(1, 2)
            .reshape([segments, key, keys * d])
            .reshape([segments, key, keys, d])
    }

    /// Keys or values as [`keys`](Self::keys) makes them, and as they are kept for the backward pass.
    fn keys_and_kept(&self, x: Tensor<2>) -> (Tensor<4>, Kept) {
        let spread = self.keys(x.clone());
        let kept = if self.padded.is_plain() {
            Kept::Spread(spread.clone())
        } else {
            Kept::Packed(x)
        };
        (spread, kept)
    }

    fn kept_keys(&self, kept: Kept) -> Tensor<4> {
        match kept {
            Kept::Spread(spread) => spread,
            Kept::Packed(x) => self.keys(x),
        }
    }

    /// The gradients of keys or values from those of every segment: `[n, key heads · d]`.
    fn sum_keys(&self, x: Tensor<4>) -> Tensor<2> {
        let Heads { key, d, .. } = self.heads;
        let (segments, keys) = (self.padded.segments, self.padded.keys);
        self.padded
            .sum_keys(x.swap_dims(1, 2).reshape([segments * keys, key * d]))
    }

    /// A tile's part of what is stacked.
    fn rows(&self, x: &Tensor<4>, tile: &Tile) -> Tensor<4> {
        let (first, count) = (tile.queries.start, tile.queries.len());
        if count == self.padded.queries {
            x.clone()
        } else {
            x.clone()
                .narrow(2, first * self.group(), count * self.group())
        }
    }

    /// The keys or values that a tile sees.
    fn seen(&self, x: &Tensor<4>, tile: &Tile) -> Tensor<4> {
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
        let (k, v) = (layout.seen(&k, tile), layout.seen(&v, tile));
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
    let ((keys, k), (values, v)) = (layout.keys_and_kept(k), layout.keys_and_kept(v));
    // Unnormalised weights are at most 1, and their sum with values may leave f16: there they are 16 times smaller.
    let head_room = if dtype == DType::F16 { 16f64 } else { 1.0 };
    // Parts are taken before anything is computed with them: Burn fuses what follows one another.
    let parts: Vec<_> = padded
        .tiles
        .iter()
        .map(|tile| {
            let k = layout.seen(&keys, tile).swap_dims(2, 3);
            (tile, layout.rows(&q, tile), k, layout.seen(&values, tile))
        })
        .collect();
    let mut outputs = Vec::with_capacity(parts.len());
    let mut log_sums = Vec::with_capacity(parts.len());
    for (tile, q, k, v) in parts {
        // In the type of the product, which has rounded them already.
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
                // Burn fuses a product with nothing here, and what follows such an operation with nothing either: a
                // change of shape, which costs nothing, takes that place, so that the sum reads 16-bit weights.
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
    let output = together(outputs);
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
    let (keys, values) = (layout.kept_keys(k), layout.kept_keys(v));
    // What the softmax's derivative subtracts: the weighted mean of the gradients of a query's weights.
    let delta = gradient.clone().cast(DType::F32) * output.cast(DType::F32);
    let delta = delta.sum_dim(3);
    let parts: Vec<_> = padded
        .tiles
        .iter()
        .zip(log_sums)
        .map(|(tile, log_sums)| Part {
            tile,
            q: layout.rows(&q, tile),
            k: layout.seen(&keys, tile),
            v: layout.seen(&values, tile),
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
        let through = product(gradient.clone(), part.v.swap_dims(2, 3));
        let through = through.cast(DType::F32) - part.delta;
        let scores = (through * weights.clone().cast(DType::F32)).cast(dtype);
        d_v.push(product(weights.swap_dims(2, 3), gradient));
        d_k.push(product(scores.clone().swap_dims(2, 3), q));
        d_q.push(product(scores, k));
    }
    [
        layout.unstack(together(d_q)),
        layout.sum_keys(sum_of_beginnings(d_k, padded)),
        layout.sum_keys(sum_of_beginnings(d_v, padded)),
    ]
}

/// What a tile's backward pass reads.
struct Part<'a> {
    tile: &'a Tile,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gradient: Tensor<4>,
    delta: Tensor<4>,
    log_sums: Tensor<4>,
}

/// Tiles one after the other.
fn together(mut tiles: Vec<Tensor<4>>) -> Tensor<4> {
    match tiles.len() {
        1 => tiles.remove(0),
        _ => Tensor::cat(tiles, 2),
    }
}

/// The sum of what the tiles give the keys, `[segments, key heads, visible, d]` each: a tile has something for its
/// visible keys only, and each sees at least what the one before it sees.
fn sum_of_beginnings(tiles: Vec<Tensor<4>>, padded: &Padded) -> Tensor<4> {
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
    together(blocks)
}
