//! Attention on the CPU, tile by tile: memory grows linearly with the tokens, forward and backward.
//!
//! The forward pass saves each query's log-sum-exp, from which the backward pass recomputes the weights of a tile, as
//! in FlashAttention (Dao et al., 2022, <https://arxiv.org/abs/2205.14135>). Scores exist for one tile per thread.
//! Every sum has a fixed order, so that results repeat bit for bit.

use std::ops::Range;

use crate::cpu::{self, Matrix, MatrixMut, Threads};
use crate::in_vectors;
use rayon::prelude::*;

use burn::tensor::Tensor;

use crate::attention::{Heads, SavedAttention};
use crate::ranges::{AttentionRanges, SegmentRanges};

/// Queries per tile.
const QUERIES: usize = 128;

/// Keys per task of the backward pass.
const KEYS: usize = 256;

/// The number of heads per thread that keeps all threads busy if each head is one task.
const HEADS_A_THREAD: usize = 4;

/// Whether the backward pass on the CPU processes each of `query_heads` heads as one task. It then stores gradients of
/// keys and values per query head: two tensors as large as the queries.
pub fn heads_apart(query_heads: usize) -> bool {
    query_heads >= HEADS_A_THREAD * rayon::current_num_threads()
}

/// Queries, keys and values, `[n, heads · d]` or `[n, key heads · d]`, row by row.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

/// Queries `first..first + count` of a segment, in one head.
#[derive(Clone, Copy)]
struct Tile {
    segment: usize,
    head: usize,
    first: usize,
    count: usize,
}

/// [`crate::attention`] on the CPU.
pub fn output(
    [q, k, v]: [Tensor<2>; 3],
    ranges: &AttentionRanges,
    heads: Heads,
) -> (Tensor<2>, SavedAttention) {
    let n = q.dims()[0];
    let values = [&q, &k, &v].map(|x| cpu::values(x.clone()));
    let (output, log_sums) = forward(inputs(&values), ranges, heads, n);
    let output = cpu::tensor(output, [n, heads.query * heads.d]);
    let log_sums = cpu::tensor(log_sums, [n, heads.query]);
    (output, SavedAttention::LogSumExp { q, k, v, log_sums })
}

/// [`crate::attention_backward`] on the CPU.
pub fn gradients(
    qkv: [Tensor<2>; 3],
    log_sums: Tensor<2>,
    gradient: Tensor<2>,
    ranges: &AttentionRanges,
    heads: Heads,
) -> [Tensor<2>; 3] {
    let n = qkv[0].dims()[0];
    let values = qkv.map(cpu::values);
    let gradients = backward(
        inputs(&values),
        cpu::values(log_sums).as_slice(),
        cpu::values(gradient).as_slice(),
        ranges,
        heads,
    );
    gradients.map(|values| {
        let width = values.len() / n;
        cpu::tensor(values, [n, width])
    })
}

fn inputs([q, k, v]: &[cpu::Values; 3]) -> Inputs<'_> {
    Inputs {
        q: q.as_slice(),
        k: k.as_slice(),
        v: v.as_slice(),
    }
}

/// The output `[n, heads · d]` and each query's log-sum-exp of scores, `[n, heads]`.
fn forward(
    inputs: Inputs,
    ranges: &AttentionRanges,
    heads: Heads,
    n: usize,
) -> (Vec<f32>, Vec<f32>) {
    let mut output = vec![0f32; n * heads.query_width()];
    let mut log_sums = vec![0f32; n * heads.query];
    let (out, sums) = (Shared::new(&mut output), Shared::new(&mut log_sums));
    query_tiles(ranges, heads)
        .into_par_iter()
        .for_each_init(Vec::new, |scores, tile| {
            let keys = Keys::new(ranges, tile);
            scores.resize(tile.count * keys.count, 0.0);
            keys.scores(inputs, heads, tile, scores);
            for (i, row) in scores.chunks_exact_mut(keys.count).enumerate() {
                let visible = keys.visible_to(tile.first + i);
                row[..visible.start].fill(0.0);
                row[visible.end..].fill(0.0);
                let log_sum = softmax(&mut row[visible]);
                // SAFETY: this query and head are this task's.
                unsafe { *sums.at((keys.query(i)) * heads.query + tile.head) = log_sum };
            }
            // SAFETY: these rows' columns of this head are this task's.
            unsafe { keys.mix(inputs.v, heads, tile, scores, 1.0, out) };
        });
    (output, log_sums)
}

/// The gradients of queries, keys and values from that of the output.
fn backward(
    inputs: Inputs,
    log_sums: &[f32],
    gradient: &[f32],
    ranges: &AttentionRanges,
    heads: Heads,
) -> [Vec<f32>; 3] {
    let n = log_sums.len() / heads.query.max(1);
    let upstream = Upstream { gradient, log_sums };
    // One task per head computes the weights once, if there are enough heads to keep all threads busy.
    if heads_apart(heads.query) {
        return head_gradients(inputs, upstream, ranges, heads, n);
    }
    let (q, deltas) = query_gradients(inputs, upstream, ranges, heads, n);
    let (k, v) = key_gradients(inputs, upstream, &deltas, ranges, heads, n);
    [q, k, v]
}

/// The output's gradient and the log-sum-exp of each query.
#[derive(Clone, Copy)]
struct Upstream<'a> {
    gradient: &'a [f32],
    log_sums: &'a [f32],
}

/// All gradients, with one task per head and five products per tile. Each head has its own sums for the gradients of
/// keys and values, `[n, d]`; those of heads that share a key head are then added in the order of the heads.
fn head_gradients(
    inputs: Inputs,
    upstream: Upstream,
    ranges: &AttentionRanges,
    heads: Heads,
    n: usize,
) -> [Vec<f32>; 3] {
    let mut d_q = vec![0f32; n * heads.query_width()];
    let out = Shared::new(&mut d_q);
    let of_heads = (0..heads.query).into_par_iter().map(|head| {
        let (mut d_k, mut d_v) = (vec![0f32; n * heads.d], vec![0f32; n * heads.d]);
        let (mut scores, mut d_weights) = (Vec::new(), Vec::new());
        for (segment, span) in ranges.segments.iter().enumerate() {
            for first in (0..span.own.len()).step_by(QUERIES) {
                let count = QUERIES.min(span.own.len() - first);
                let tile = Tile {
                    segment,
                    head,
                    first,
                    count,
                };
                let keys = Keys::new(ranges, tile);
                scores.resize(count * keys.count, 0.0);
                d_weights.resize(count * keys.count, 0.0);
                keys.scores(inputs, heads, tile, &mut scores);
                keys.products(
                    upstream.gradient,
                    inputs.v,
                    heads,
                    tile,
                    1.0,
                    &mut d_weights,
                );
                keys.scores_backward(
                    upstream,
                    heads,
                    tile,
                    &mut scores,
                    &mut d_weights,
                    |_, _| {},
                );
                let gradient = heads.queries(upstream.gradient, &keys.queries(tile), head);
                keys.add(&scores, gradient, tile, 1.0, &mut d_v);
                let q = heads.queries(inputs.q, &keys.queries(tile), head);
                keys.add(&d_weights, q, tile, heads.scale(), &mut d_k);
                // SAFETY: these rows' columns of this head are this task's.
                unsafe { keys.mix(inputs.k, heads, tile, &d_weights, heads.scale(), out) };
            }
        }
        (d_k, d_v)
    });
    let (k_of_heads, v_of_heads): (Vec<_>, Vec<_>) = of_heads.unzip();
    let width = heads.key_width();
    let sum = |of_heads: Vec<Vec<f32>>| {
        let mut sum = vec![0f32; n * width];
        cpu::for_each_piece(&mut sum, width, |first, piece| {
            for (i, row) in piece.chunks_exact_mut(width).enumerate() {
                for (key_head, row) in row.chunks_exact_mut(heads.d).enumerate() {
                    for head in heads.group(key_head) {
                        let from = &of_heads[head][(first + i) * heads.d..][..heads.d];
                        add_row(row, from);
                    }
                }
            }
        });
        sum
    };
    let (d_k, d_v) = (sum(k_of_heads), sum(v_of_heads));
    [d_q, d_k, d_v]
}

/// The queries' gradients, and each query's delta in each head, `[n, heads]`.
fn query_gradients(
    inputs: Inputs,
    upstream: Upstream,
    ranges: &AttentionRanges,
    heads: Heads,
    n: usize,
) -> (Vec<f32>, Vec<f32>) {
    let mut gradients = vec![0f32; n * heads.query_width()];
    let mut deltas = vec![0f32; n * heads.query];
    let (out, delta_out) = (Shared::new(&mut gradients), Shared::new(&mut deltas));
    let scratch = || (Vec::new(), Vec::new());
    query_tiles(ranges, heads).into_par_iter().for_each_init(
        scratch,
        |(scores, d_weights), tile| {
            let keys = Keys::new(ranges, tile);
            scores.resize(tile.count * keys.count, 0.0);
            d_weights.resize(tile.count * keys.count, 0.0);
            keys.scores(inputs, heads, tile, scores);
            keys.products(upstream.gradient, inputs.v, heads, tile, 1.0, d_weights);
            keys.scores_backward(upstream, heads, tile, scores, d_weights, |at, delta| {
                // SAFETY: this query and head are this task's.
                unsafe { *delta_out.at(at) = delta };
            });
            // SAFETY: these rows' columns of this head are this task's.
            unsafe { keys.mix(inputs.k, heads, tile, d_weights, heads.scale(), out) };
        },
    );
    (gradients, deltas)
}

/// The gradients of keys and values. Each task is a chunk of a segment's keys in one key head; no other task adds to
/// them.
fn key_gradients(
    inputs: Inputs,
    upstream: Upstream,
    deltas: &[f32],
    ranges: &AttentionRanges,
    heads: Heads,
    n: usize,
) -> (Vec<f32>, Vec<f32>) {
    let width = heads.key_width();
    let (mut d_k, mut d_v) = (vec![0f32; n * width], vec![0f32; n * width]);
    let (k_out, v_out) = (Shared::new(&mut d_k), Shared::new(&mut d_v));
    let mut tasks = Vec::new();
    for (segment, span) in ranges.segments.iter().enumerate() {
        for head in 0..heads.key {
            let pieces = (0..span.own.len()).step_by(KEYS);
            tasks.extend(pieces.map(|first| (segment, head, first)));
        }
    }
    let scratch = || (Vec::new(), Vec::new());
    tasks.into_par_iter().for_each_init(
        scratch,
        |(weights, d_weights), (segment, key_head, first)| {
            let own = &ranges.segments[segment].own;
            let count = KEYS.min(own.len() - first);
            let keys = own.start + first..own.start + first + count;
            let k = heads.keys(inputs.k, &keys, key_head);
            let v = heads.keys(inputs.v, &keys, key_head);
            // SAFETY: these rows' columns of this head are this task's, and used by one product at a time.
            let output = |out: Shared| unsafe {
                let data = out.at(keys.start * width + key_head * heads.d);
                MatrixMut::from_raw(data, count, heads.d, width)
            };
            for descendant in &ranges.segments[segment].descendants {
                let queries = &ranges.segments[*descendant].own;
                let itself = *descendant == segment;
                // These keys are not visible to earlier queries of the same segment, nor to those whose window begins
                // after them.
                let begin = if itself { first } else { 0 };
                let position = ranges.segments[segment].offset + first;
                let offset = ranges.segments[*descendant].offset;
                let end = match ranges.window {
                    Some(window) => (position + count + window - 1).saturating_sub(offset),
                    None => usize::MAX,
                };
                let end = queries.end.min(queries.start.saturating_add(end));
                for from in (begin..end.saturating_sub(queries.start)).step_by(QUERIES) {
                    let tokens = queries.start + from..(queries.start + from + QUERIES).min(end);
                    weights.resize(tokens.len() * count, 0.0);
                    d_weights.resize(tokens.len() * count, 0.0);
                    for head in heads.group(key_head) {
                        let q = heads.queries(inputs.q, &tokens, head);
                        let gradient = heads.queries(upstream.gradient, &tokens, head);
                        let scores = MatrixMut::new(weights, tokens.len(), count, count);
                        cpu::multiply(
                            scores,
                            false,
                            heads.scale(),
                            q,
                            k.transposed(),
                            Threads::One,
                        );
                        let products = MatrixMut::new(d_weights, tokens.len(), count, count);
                        cpu::multiply(products, false, 1.0, gradient, v.transposed(), Threads::One);
                        let rows = weights.chunks_exact_mut(count);
                        let rows = rows.zip(d_weights.chunks_exact_mut(count));
                        for (i, (row, d_weights)) in rows.enumerate() {
                            let at = (tokens.start + i) * heads.query + head;
                            let oldest = ranges.oldest(offset + from + i);
                            let oldest = oldest.saturating_sub(position).min(count);
                            let visible = if itself {
                                oldest..(from + i + 1).saturating_sub(first).min(count)
                            } else {
                                oldest..count
                            };
                            let log_sum = upstream.log_sums[at];
                            row_backward(row, d_weights, visible, log_sum, Some(deltas[at]));
                        }
                        let weights = Matrix::new(weights, tokens.len(), count, count).transposed();
                        cpu::multiply(output(v_out), true, 1.0, weights, gradient, Threads::One);
                        let d_weights =
                            Matrix::new(d_weights, tokens.len(), count, count).transposed();
                        cpu::multiply(
                            output(k_out),
                            true,
                            heads.scale(),
                            d_weights,
                            q,
                            Threads::One,
                        );
                    }
                }
            }
        },
    );
    (d_k, d_v)
}

in_vectors! {
    /// Turns scores into weights. Returns the log-sum-exp of the scores.
    fn softmax(scores: &mut [f32]) -> f32 {
        let largest = cpu::max(scores);
        let sum = cpu::exp_and_sum(scores, largest);
        let scale = 1.0 / sum;
        for weight in scores.iter_mut() {
            *weight *= scale;
        }
        largest + sum.ln()
    }
}

in_vectors! {
    /// Turns a query's scores into weights, and `d_weights` into the gradient of the scores; 0 for keys that are not
    /// visible.
    ///
    /// Returns delta = rowsum(P ∘ dP), which the derivative of softmax subtracts. It must be given if the scores are
    /// not those of all visible keys.
    fn row_backward(
        scores: &mut [f32],
        d_weights: &mut [f32],
        visible: Range<usize>,
        log_sum: f32,
        delta: Option<f32>,
    ) -> f32 {
        for values in [&mut *scores, &mut *d_weights] {
            values[..visible.start].fill(0.0);
            values[visible.end..].fill(0.0);
        }
        let (scores, d_weights) = (&mut scores[visible.clone()], &mut d_weights[visible]);
        for weight in scores.iter_mut() {
            *weight = cpu::exp(*weight - log_sum);
        }
        let delta = match delta {
            Some(delta) => delta,
            None => cpu::dot(scores, d_weights),
        };
        for (weight, d_weights) in scores.iter().zip(d_weights.iter_mut()) {
            *d_weights = *weight * (*d_weights - delta);
        }
        delta
    }
}

in_vectors! {
    fn add_row(sum: &mut [f32], row: &[f32]) {
        for (sum, x) in sum.iter_mut().zip(row) {
            *sum += x;
        }
    }
}

fn query_tiles(ranges: &AttentionRanges, heads: Heads) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (segment, span) in ranges.segments.iter().enumerate() {
        for first in (0..span.own.len()).step_by(QUERIES) {
            let count = QUERIES.min(span.own.len() - first);
            tiles.extend((0..heads.query).map(|head| Tile {
                segment,
                head,
                first,
                count,
            }));
        }
    }
    tiles
}

/// The keys that are visible to a tile's queries, as ranges of the packed batch.
struct Keys<'a> {
    ranges: &'a AttentionRanges,
    span: &'a SegmentRanges,
    first: usize,
    /// The position of the first key.
    oldest: usize,
    places: Vec<Range<usize>>,
    count: usize,
}

impl<'a> Keys<'a> {
    fn new(ranges: &'a AttentionRanges, tile: Tile) -> Self {
        let span = &ranges.segments[tile.segment];
        let oldest = ranges.oldest(span.offset + tile.first);
        let end = span.offset + tile.first + tile.count;
        Self {
            ranges,
            span,
            first: tile.first,
            oldest,
            places: span.places(oldest..end).collect(),
            count: end - oldest,
        }
    }

    /// The ranges, each with its first index among the keys.
    fn key_ranges(&self) -> impl Iterator<Item = (usize, &Range<usize>)> {
        self.places.iter().scan(0, |place, range| {
            *place += range.len();
            Some((*place - range.len(), range))
        })
    }

    /// The keys that are visible to the segment's query `i`, as indices among the keys.
    fn visible_to(&self, i: usize) -> Range<usize> {
        let position = self.span.offset + i;
        self.ranges.oldest(position) - self.oldest..position + 1 - self.oldest
    }

    /// The token of the tile's query `i`.
    fn query(&self, i: usize) -> usize {
        self.span.own.start + self.first + i
    }

    /// Turns scores into weights and `d_weights` into the gradient of the scores.
    ///
    /// A tile has all keys that are visible to its queries. So delta = rowsum(dO ∘ O) is computed as rowsum(P ∘ dP),
    /// and the output O need not be saved. `store` gets each query's delta and its index in `[n, heads]`.
    fn scores_backward(
        &self,
        upstream: Upstream,
        heads: Heads,
        tile: Tile,
        scores: &mut [f32],
        d_weights: &mut [f32],
        store: impl Fn(usize, f32),
    ) {
        let rows = scores.chunks_exact_mut(self.count);
        let rows = rows.zip(d_weights.chunks_exact_mut(self.count));
        for (i, (row, d_weights)) in rows.enumerate() {
            let at = self.query(i) * heads.query + tile.head;
            let visible = self.visible_to(tile.first + i);
            store(
                at,
                row_backward(row, d_weights, visible, upstream.log_sums[at], None),
            );
        }
    }

    /// Adds `scale · weightsᵀ · rows` to the keys' rows of `out`, `[n, d]`.
    fn add(&self, weights: &[f32], rows: Matrix, tile: Tile, scale: f32, out: &mut [f32]) {
        let d = rows.columns();
        for (place, range) in self.key_ranges() {
            let weights = Matrix::new(&weights[place..], tile.count, range.len(), self.count);
            let out = MatrixMut::new(&mut out[range.start * d..], range.len(), d, d);
            cpu::multiply(out, true, scale, weights.transposed(), rows, Threads::One);
        }
    }

    fn queries(&self, tile: Tile) -> Range<usize> {
        self.query(0)..self.query(tile.count)
    }

    fn scores(&self, inputs: Inputs, heads: Heads, tile: Tile, out: &mut [f32]) {
        self.products(inputs.q, inputs.k, heads, tile, heads.scale(), out);
    }

    /// `scale · left · rightᵀ` for the tile's rows of `left` and all keys' rows of `right`.
    fn products(
        &self,
        left: &[f32],
        right: &[f32],
        heads: Heads,
        tile: Tile,
        scale: f32,
        out: &mut [f32],
    ) {
        let left = heads.queries(left, &self.queries(tile), tile.head);
        for (place, range) in self.key_ranges() {
            let right = heads.keys(right, range, heads.key_head(tile.head));
            let out = MatrixMut::new(&mut out[place..], tile.count, range.len(), self.count);
            cpu::multiply(out, false, scale, left, right.transposed(), Threads::One);
        }
    }

    /// Writes `scale · weights · rows` to the tile's rows and head of `out`.
    ///
    /// # Safety
    ///
    /// No other thread reads or writes those elements of `out` meanwhile.
    unsafe fn mix(
        &self,
        rows: &[f32],
        heads: Heads,
        tile: Tile,
        weights: &[f32],
        scale: f32,
        out: Shared,
    ) {
        let width = heads.query_width();
        for (place, range) in self.key_ranges() {
            let weights = Matrix::new(&weights[place..], tile.count, range.len(), self.count);
            let rows = heads.keys(rows, range, heads.key_head(tile.head));
            // SAFETY: the caller's promise.
            let out = unsafe {
                let data = out.at(self.query(0) * width + tile.head * heads.d);
                MatrixMut::from_raw(data, tile.count, heads.d, width)
            };
            cpu::multiply(out, place > 0, scale, weights, rows, Threads::One);
        }
    }
}

impl Heads {
    fn query_width(self) -> usize {
        self.query * self.d
    }

    fn key_width(self) -> usize {
        self.key * self.d
    }

    fn scale(self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    fn key_head(self, head: usize) -> usize {
        head / (self.query / self.key)
    }

    /// The query heads that share a key head.
    fn group(self, key_head: usize) -> Range<usize> {
        let group = self.query / self.key;
        key_head * group..(key_head + 1) * group
    }

    /// The tokens' rows of one query head.
    fn queries<'a>(self, x: &'a [f32], tokens: &Range<usize>, head: usize) -> Matrix<'a> {
        let width = self.query_width();
        Matrix::new(
            &x[tokens.start * width + head * self.d..],
            tokens.len(),
            self.d,
            width,
        )
    }

    /// The tokens' rows of one key head.
    fn keys<'a>(self, x: &'a [f32], tokens: &Range<usize>, head: usize) -> Matrix<'a> {
        let width = self.key_width();
        Matrix::new(
            &x[tokens.start * width + head * self.d..],
            tokens.len(),
            self.d,
            width,
        )
    }
}

/// An output that threads write disjoint parts of.
#[derive(Clone, Copy)]
struct Shared {
    data: *mut f32,
    length: usize,
}

// SAFETY: every user of a pointer guarantees that no two threads use the same elements.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

impl Shared {
    fn new(data: &mut [f32]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            length: data.len(),
        }
    }

    fn at(&self, index: usize) -> *mut f32 {
        assert!(index < self.length, "element {index} of {}", self.length);
        // SAFETY: within the data.
        unsafe { self.data.add(index) }
    }
}
