//! Causal attention over a packed batch, tile by tile: scores never exist in memory (Dao et al., 2022,
//! <https://arxiv.org/abs/2205.14135>).
//!
//! A workgroup handles 32 queries (consecutive tokens, and all query heads that share a key head) and visits tiles of
//! 32 keys. Which tiles it visits is a list made on the host: tiles without a visible key are left out, so that causal
//! attention computes half, and a batch of many sequences computes what its sequences need.
//!
//! ```text
//!            keys (32)                        forward, per tile of keys:
//!           ┌─────────┐                         scores = Q·Kᵀ            in registers, 4 × 4 per unit
//!           │ K, V    │                         scores → shared memory, running maximum and sum per query
//!  queries  ├─────────┤                         output = output·correction + weights·V
//!  (32)     │ scores  │  4 × 4 per unit
//!           └─────────┘                       backward: weights again from the log-sum-exp; no atomics:
//!                                               one kernel sums dQ over keys, the other dK and dV over queries
//! ```
//!
//! The head's dimensions are read in chunks of 32, so that any width fits into 16 KiB of shared memory.
//!
//! **Visibility.** The segments of a batch form a forest of shared prefixes. Every token has the number at which its
//! segment begins in a depth-first walk, and that at which the segment's subtree ends. Token i attends to token j if j
//! is not after i and i's segment is in the subtree of j's segment. With a sliding window every token also has the first
//! token of its window: earlier ones are outside, because a sequence's tokens are in order in the batch.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::ir::{DeviceProperties, ElemType};
use cubecl::prelude::*;

use super::fault::{self, Fault};
use super::fragment::{Fragment, only_burn_has_units};
use super::launch::{dims, element, empty, launch};
use super::matrix_attention;
use super::operations::TiledAttention;
use super::{plane_attention, plane_of_software_driver};

/// Queries of a tile without matrix units, counting every query head of a key head.
pub(crate) const QUERIES: usize = 32;
/// Keys of a tile without matrix units.
pub(crate) const KEYS: usize = 32;
/// Dimensions of a head that are in shared memory at a time.
const CHUNK: usize = 32;
/// Rows and columns of a unit's part of a 32 × 32 tile.
const PART: usize = 4;
/// Units of a workgroup.
pub const UNITS: usize = (QUERIES / PART) * (KEYS / PART);
/// Vectors of a row in shared memory; one more than the data has, against bank conflicts.
const ROW: usize = CHUNK / 4 + 1;
/// The score of a key that is not visible.
pub(crate) const HIDDEN: f32 = -1e30;

type F4 = Vector<f32, Const<4>>;

/// Sizes that are known when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Query heads per key head.
    pub group: usize,
    /// Key heads.
    pub key_heads: usize,
    /// The width of a head.
    pub d: usize,
    /// Queries of a tile, counting every query head of a key head; as many keys.
    pub side: usize,
    /// The matrix units' fragments, if they are used.
    pub fragment: Option<Fragment>,
    /// Whether the tables have the first token of each token's sliding window.
    pub window: bool,
    fault: Fault,
}

impl Shape {
    /// For heads of width `d` of tensors of type `dtype`. `None` if no kernel here computes it: with a width that is
    /// no multiple of 4, with more query heads per key head than a tile has rows, or with matrix units that only Burn's
    /// kernels use.
    pub fn of(
        properties: &DeviceProperties,
        dtype: DType,
        query_heads: usize,
        key_heads: usize,
        d: usize,
    ) -> Option<Self> {
        let group = query_heads / key_heads.max(1);
        let on_units = Self {
            group,
            key_heads,
            d,
            side: QUERIES,
            fragment: None,
            window: false,
            fault: fault::current(),
        };
        let fragment = Fragment::of(properties, dtype);
        let with = |side| Self {
            side,
            fragment,
            ..on_units
        };
        let on_matrix_units = [with(64), with(32)]
            .into_iter()
            .find(|shape| matrix_attention::fits(properties, *shape));
        if only_burn_has_units(properties, dtype) {
            return None;
        }
        let shape = on_matrix_units.unwrap_or(on_units);
        (group <= shape.side && d.is_multiple_of(4)).then_some(shape)
    }

    /// The same, for tables with or without windows.
    pub fn with_window(self, window: bool) -> Self {
        Self { window, ..self }
    }

    /// Tokens of a tile of queries.
    pub const fn tokens(self) -> usize {
        self.side / self.group
    }

    const fn chunks(self) -> usize {
        self.d.div_ceil(CHUNK)
    }

    /// Query heads.
    pub const fn heads(self) -> usize {
        self.group * self.key_heads
    }

    pub(crate) const fn fault(self) -> Fault {
        self.fault
    }
}

/// One unit's place in a 32 × 32 tile.
#[derive(CubeType, Clone, Copy)]
struct Place {
    unit: usize,
    row: usize,
    col: usize,
}

#[cube]
fn place() -> Place {
    let unit = UNIT_POS as usize;
    Place {
        unit,
        row: (unit / comptime!(KEYS / PART)) * PART,
        col: (unit % comptime!(KEYS / PART)) * PART,
    }
}

/// Where a row of a tile of queries lies: its token, or `n` for a row outside the batch, and its head.
#[cube]
pub(crate) fn query_of(
    row: usize,
    first: usize,
    n: usize,
    key_head: usize,
    #[comptime] shape: Shape,
) -> (usize, usize) {
    let token = first + row / shape.group;
    let inside = row < comptime!(shape.tokens() * shape.group) && token < n;
    (
        select(inside, token, n),
        key_head * shape.group + row % shape.group,
    )
}

/// Copies a chunk of the queries' dimensions (or of a gradient of their shape) to shared memory.
#[cube]
fn load_queries<F: Float>(
    from: &[Vector<F, Const<4>>],
    to: &mut Shared<[F4]>,
    first: usize,
    n: usize,
    key_head: usize,
    chunk: usize,
    unit: usize,
    #[comptime] shape: Shape,
) {
    for i in range_stepped(unit, comptime!(QUERIES * CHUNK / 4), UNITS) {
        let row = i / comptime!(CHUNK / 4);
        let at = i % comptime!(CHUNK / 4);
        let (token, head) = query_of(row, first, n, key_head, shape);
        let dimension = chunk * comptime!(CHUNK / 4) + at;
        let mut value = F4::new(0.0f32);
        if token < n && dimension < comptime!(shape.d / 4) {
            value = Vector::cast_from(
                from[(token * comptime!(shape.heads()) + head) * comptime!(shape.d / 4)
                    + dimension],
            );
        }
        to[row * ROW + at] = value;
    }
}

/// Copies a chunk of the keys' or values' dimensions to shared memory.
#[cube]
fn load_keys<F: Float>(
    from: &[Vector<F, Const<4>>],
    to: &mut Shared<[F4]>,
    first: usize,
    n: usize,
    key_head: usize,
    chunk: usize,
    unit: usize,
    #[comptime] shape: Shape,
) {
    for i in range_stepped(unit, comptime!(KEYS * CHUNK / 4), UNITS) {
        let row = i / comptime!(CHUNK / 4);
        let at = i % comptime!(CHUNK / 4);
        let token = first + row;
        let dimension = chunk * comptime!(CHUNK / 4) + at;
        let mut value = F4::new(0.0f32);
        if token < n && dimension < comptime!(shape.d / 4) {
            value = Vector::cast_from(
                from[(token * shape.key_heads + key_head) * comptime!(shape.d / 4) + dimension],
            );
        }
        to[row * ROW + at] = value;
    }
}

/// Adds `left · rightᵀ` to a unit's part, both with the dimensions of a chunk along rows.
#[cube]
fn add_dots(left: &Shared<[F4]>, right: &Shared<[F4]>, part: &mut Array<F4>, place: &Place) {
    for inner in 0..comptime!(CHUNK / 4) {
        let mut columns = Array::<F4>::new(PART);
        #[unroll]
        for j in 0..PART {
            columns[j] = right[(place.col + j) * ROW + inner];
        }
        #[unroll]
        for i in 0..PART {
            let row = left[(place.row + i) * ROW + inner];
            let mut sums = part[i];
            #[unroll]
            for j in 0..PART {
                let product = row * columns[j];
                let dot = product.extract(0usize)
                    + product.extract(1usize)
                    + product.extract(2usize)
                    + product.extract(3usize);
                sums.insert(j, sums.extract(j) + dot);
            }
            part[i] = sums;
        }
    }
}

/// Adds `weights · values` to a unit's part at `offset`: weights `[rows, 32]`, values `[32, chunk]`.
#[cube]
fn add_product(
    weights: &Shared<[F4]>,
    values: &Shared<[F4]>,
    part: &mut Array<F4>,
    #[comptime] offset: usize,
    place: &Place,
) {
    for inner in 0..comptime!(KEYS / 4) {
        let mut rows = Array::<F4>::new(4usize);
        #[unroll]
        for j in 0..4usize {
            rows[j] = values[(inner * 4 + j) * ROW + place.col / 4];
        }
        #[unroll]
        for i in 0..PART {
            let weight = weights[(place.row + i) * ROW + inner];
            let mut sums = part[comptime!(offset + i)];
            #[unroll]
            for j in 0..4usize {
                sums = fma(F4::new(weight.extract(j)), rows[j], sums);
            }
            part[comptime!(offset + i)] = sums;
        }
    }
}

/// Adds `weightsᵀ · values` to a unit's part at `offset`: weights `[32 queries, 32 keys]`, values `[32 queries, chunk]`.
#[cube]
fn add_transposed_product(
    weights: &Shared<[F4]>,
    values: &Shared<[F4]>,
    part: &mut Array<F4>,
    #[comptime] offset: usize,
    place: &Place,
) {
    for query in 0..QUERIES {
        let value = values[query * ROW + place.col / 4];
        let weight = weights[query * ROW + place.row / 4];
        #[unroll]
        for i in 0..PART {
            let at = comptime!(offset + i);
            part[at] = fma(F4::new(weight.extract(i)), value, part[at]);
        }
    }
}

/// Whether a token attends to another one, whose window begins at `oldest`. The table at `spans` holds both numbers of
/// every token's segment.
#[cube]
fn is_visible(
    tables: &[i32],
    spans: usize,
    query: usize,
    key: usize,
    n: usize,
    begin: i32,
    oldest: usize,
    #[comptime] shape: Shape,
) -> bool {
    let at = spans + min(key, n - 1);
    let same =
        comptime!(shape.fault == Fault::Mask) || (tables[at] <= begin && begin < tables[at + n]);
    let mut near = key <= query;
    if shape.window {
        near = near && key >= oldest;
    }
    near && same
}

/// The first token of a token's sliding window; 0 without windows.
#[cube]
pub(crate) fn oldest(
    tables: &[i32],
    spans: usize,
    token: usize,
    n: usize,
    #[comptime] shape: Shape,
) -> usize {
    if comptime!(shape.window && shape.fault != Fault::Window) {
        tables[spans + 2 * n + min(token, n - 1)] as usize
    } else {
        0usize.runtime()
    }
}

#[cube]
fn fill(part: &mut Array<F4>, #[comptime] length: usize) {
    #[unroll]
    for i in 0..length {
        part[i] = F4::new(0.0f32);
    }
}

/// The attention output, and the log-sum-exp of each query's scores.
///
/// Shapes: q, output `[n, heads · d]`; k, v `[n, key heads · d]`; log_sums `[n, heads]`. `tables` holds the
/// tables of `kernels`' tables of tiles, that of the segments at `spans` and the lists of tiles at `tiles`.
#[cube(launch_unchecked)]
pub fn forward<F: Float>(
    q: &[Vector<F, Const<4>>],
    k: &[Vector<F, Const<4>>],
    v: &[Vector<F, Const<4>>],
    tables: &[i32],
    output: &mut [Vector<F, Const<4>>],
    log_sums: &mut [f32],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] shape: Shape,
    #[define(F)] _type: ElemType,
) {
    let place = place();
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first = tile * comptime!(shape.tokens());
    let mut left = Shared::<[F4]>::new_slice(comptime!(QUERIES * ROW));
    let mut right = Shared::<[F4]>::new_slice(comptime!(KEYS * ROW));
    let mut weights = Shared::<[F4]>::new_slice(comptime!(QUERIES * ROW));
    // Per query: the running maximum and sum, and the factor for what was summed under the last maximum.
    let mut largest = Shared::<[f32]>::new_slice(QUERIES);
    let mut total = Shared::<[f32]>::new_slice(QUERIES);
    let mut correction = Shared::<[f32]>::new_slice(QUERIES);
    let mut sums = Array::<F4>::new(comptime!(PART * shape.chunks()));
    fill(&mut sums, comptime!(PART * shape.chunks()));
    if place.unit < QUERIES {
        largest[place.unit] = HIDDEN;
        total[place.unit] = 0.0;
    }

    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first_key = tables[tiles + index as usize] as usize;
        let mut scores = Array::<F4>::new(PART);
        fill(&mut scores, PART);
        #[unroll]
        for chunk in 0..comptime!(shape.chunks()) {
            load_queries::<F>(q, &mut left, first, n, key_head, chunk, place.unit, shape);
            load_keys::<F>(
                k, &mut right, first_key, n, key_head, chunk, place.unit, shape,
            );
            sync_cube();
            add_dots(&left, &right, &mut scores, &place);
            sync_cube();
        }
        #[unroll]
        for i in 0..PART {
            let (token, _head) = query_of(place.row + i, first, n, key_head, shape);
            let begin = tables[spans + min(token, n - 1)];
            let oldest = oldest(tables, spans, token, n, shape);
            let mut row = scores[i];
            #[unroll]
            for j in 0..PART {
                let key = first_key + place.col + j;
                let visible = token < n
                    && key < n
                    && is_visible(tables, spans, token, key, n, begin, oldest, shape);
                row.insert(j, select(visible, row.extract(j), HIDDEN));
            }
            weights[(place.row + i) * ROW + place.col / 4] = row;
        }
        sync_cube();
        if place.unit < QUERIES {
            let before = largest[place.unit];
            let mut most = before;
            for i in 0..comptime!(KEYS / 4) {
                let row = weights[place.unit * ROW + i];
                #[unroll]
                for j in 0..4usize {
                    most = max(most, row.extract(j));
                }
            }
            let factor = (before - most).exp();
            let mut sum = total[place.unit] * factor;
            for i in 0..comptime!(KEYS / 4) {
                let row = weights[place.unit * ROW + i];
                let mut powers = F4::new(0.0f32);
                #[unroll]
                for j in 0..4usize {
                    let score = row.extract(j);
                    let power = select(
                        score > comptime!(HIDDEN / 2.0),
                        (score - most).exp(),
                        0.0f32,
                    );
                    powers.insert(j, power);
                    sum += power;
                }
                weights[place.unit * ROW + i] = powers;
            }
            largest[place.unit] = most;
            total[place.unit] = sum;
            correction[place.unit] = factor;
        }
        #[unroll]
        for chunk in 0..comptime!(shape.chunks()) {
            load_keys::<F>(
                v, &mut right, first_key, n, key_head, chunk, place.unit, shape,
            );
            sync_cube();
            #[unroll]
            for i in 0..PART {
                let at = comptime!(chunk * PART + i);
                if comptime!(shape.fault != Fault::Correction) {
                    sums[at] *= F4::new(correction[place.row + i]);
                }
            }
            add_product(&weights, &right, &mut sums, comptime!(chunk * PART), &place);
            sync_cube();
        }
    }

    #[unroll]
    for i in 0..PART {
        let (token, head) = query_of(place.row + i, first, n, key_head, shape);
        if token < n {
            let at = token * comptime!(shape.heads()) + head;
            let sum = total[place.row + i];
            #[unroll]
            for chunk in 0..comptime!(shape.chunks()) {
                let dimension = chunk * comptime!(CHUNK / 4) + place.col / 4;
                if dimension < comptime!(shape.d / 4) {
                    let value = sums[comptime!(chunk * PART + i)] / F4::new(sum);
                    output[at * comptime!(shape.d / 4) + dimension] = Vector::cast_from(value);
                }
            }
            if place.col == 0 {
                log_sums[at] = largest[place.row + i] + sum.ln();
            }
        }
    }
}

/// Each query's Σ dO·O, which the gradient of the softmax subtracts. Shapes: both inputs `[n, heads · d]`, output
/// `[n, heads]`.
#[cube(launch_unchecked)]
pub fn row_sums<F: Float>(
    output: &[Vector<F, Const<4>>],
    gradient: &[Vector<F, Const<4>>],
    sums: &mut [f32],
    count: usize,
    #[comptime] d: usize,
    #[define(F)] _type: ElemType,
) {
    let row = ABSOLUTE_POS;
    if row < count {
        let mut sum = F4::new(0.0f32);
        for i in 0..comptime!(d / 4) {
            let at = row * comptime!(d / 4) + i;
            let (a, b) = (F4::cast_from(output[at]), F4::cast_from(gradient[at]));
            sum = fma(a, b, sum);
        }
        sums[row] =
            sum.extract(0usize) + sum.extract(1usize) + sum.extract(2usize) + sum.extract(3usize);
    }
}

/// The attention weights of a tile and the gradient of its scores, a unit's part each. On return, shared memory may be
/// overwritten.
#[cube]
fn weights_again<F: Float>(
    q: &[Vector<F, Const<4>>],
    k: &[Vector<F, Const<4>>],
    v: &[Vector<F, Const<4>>],
    gradient: &[Vector<F, Const<4>>],
    log_sums: &[f32],
    row_sums: &[f32],
    tables: &[i32],
    spans: usize,
    left: &mut Shared<[F4]>,
    right: &mut Shared<[F4]>,
    weights: &mut Array<F4>,
    d_scores: &mut Array<F4>,
    first: usize,
    first_key: usize,
    n: usize,
    key_head: usize,
    place: &Place,
    #[comptime] shape: Shape,
) {
    fill(weights, PART);
    fill(d_scores, PART);
    #[unroll]
    for chunk in 0..comptime!(shape.chunks()) {
        load_queries::<F>(q, left, first, n, key_head, chunk, place.unit, shape);
        load_keys::<F>(k, right, first_key, n, key_head, chunk, place.unit, shape);
        sync_cube();
        add_dots(&*left, &*right, weights, place);
        sync_cube();
    }
    #[unroll]
    for chunk in 0..comptime!(shape.chunks()) {
        load_queries::<F>(gradient, left, first, n, key_head, chunk, place.unit, shape);
        load_keys::<F>(v, right, first_key, n, key_head, chunk, place.unit, shape);
        sync_cube();
        add_dots(&*left, &*right, d_scores, place);
        sync_cube();
    }
    #[unroll]
    for i in 0..PART {
        let (token, head) = query_of(place.row + i, first, n, key_head, shape);
        let at = min(token, n - 1) * comptime!(shape.heads()) + head;
        let (log_sum, row_sum) = (log_sums[at], row_sums[at]);
        let begin = tables[spans + min(token, n - 1)];
        let oldest = oldest(tables, spans, token, n, shape);
        let mut row = weights[i];
        let mut d_row = d_scores[i];
        #[unroll]
        for j in 0..PART {
            let key = first_key + place.col + j;
            let visible = token < n
                && key < n
                && is_visible(tables, spans, token, key, n, begin, oldest, shape);
            let weight = select(visible, (row.extract(j) - log_sum).exp(), 0.0f32);
            row.insert(j, weight);
            d_row.insert(j, weight * (d_row.extract(j) - row_sum));
        }
        weights[i] = row;
        d_scores[i] = d_row;
    }
}

/// The gradient of the queries. Arguments as in [`forward`]; `row_sums` as from [`row_sums`].
#[cube(launch_unchecked)]
pub fn backward_queries<F: Float>(
    q: &[Vector<F, Const<4>>],
    k: &[Vector<F, Const<4>>],
    v: &[Vector<F, Const<4>>],
    gradient: &[Vector<F, Const<4>>],
    log_sums: &[f32],
    row_sums: &[f32],
    tables: &[i32],
    d_q: &mut [Vector<F, Const<4>>],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] shape: Shape,
    #[define(F)] _type: ElemType,
) {
    let place = place();
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first = tile * comptime!(shape.tokens());
    let mut left = Shared::<[F4]>::new_slice(comptime!(QUERIES * ROW));
    let mut right = Shared::<[F4]>::new_slice(comptime!(KEYS * ROW));
    let mut sums = Array::<F4>::new(comptime!(PART * shape.chunks()));
    fill(&mut sums, comptime!(PART * shape.chunks()));
    let mut weights = Array::<F4>::new(PART);
    let mut d_scores = Array::<F4>::new(PART);

    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first_key = tables[tiles + index as usize] as usize;
        weights_again::<F>(
            q,
            k,
            v,
            gradient,
            log_sums,
            row_sums,
            tables,
            spans,
            &mut left,
            &mut right,
            &mut weights,
            &mut d_scores,
            first,
            first_key,
            n,
            key_head,
            &place,
            shape,
        );
        #[unroll]
        for i in 0..PART {
            left[(place.row + i) * ROW + place.col / 4] = d_scores[i];
        }
        #[unroll]
        for chunk in 0..comptime!(shape.chunks()) {
            load_keys::<F>(
                k, &mut right, first_key, n, key_head, chunk, place.unit, shape,
            );
            sync_cube();
            add_product(&left, &right, &mut sums, comptime!(chunk * PART), &place);
            sync_cube();
        }
    }

    #[unroll]
    for i in 0..PART {
        let (token, head) = query_of(place.row + i, first, n, key_head, shape);
        if token < n {
            #[unroll]
            for chunk in 0..comptime!(shape.chunks()) {
                let dimension = chunk * comptime!(CHUNK / 4) + place.col / 4;
                if dimension < comptime!(shape.d / 4) {
                    let at = (token * comptime!(shape.heads()) + head) * comptime!(shape.d / 4)
                        + dimension;
                    d_q[at] = Vector::cast_from(sums[comptime!(chunk * PART + i)]);
                }
            }
        }
    }
}

/// The gradients of keys and values. Arguments as in [`backward_queries`]; the lists at
/// `tiles` are those of tiles of queries.
#[cube(launch_unchecked)]
pub fn backward_keys<F: Float>(
    q: &[Vector<F, Const<4>>],
    k: &[Vector<F, Const<4>>],
    v: &[Vector<F, Const<4>>],
    gradient: &[Vector<F, Const<4>>],
    log_sums: &[f32],
    row_sums: &[f32],
    tables: &[i32],
    d_k: &mut [Vector<F, Const<4>>],
    d_v: &mut [Vector<F, Const<4>>],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] shape: Shape,
    #[define(F)] _type: ElemType,
) {
    let place = place();
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first_key = tile * KEYS;
    let mut left = Shared::<[F4]>::new_slice(comptime!(QUERIES * ROW));
    let mut right = Shared::<[F4]>::new_slice(comptime!(KEYS * ROW));
    let mut k_sums = Array::<F4>::new(comptime!(PART * shape.chunks()));
    fill(&mut k_sums, comptime!(PART * shape.chunks()));
    let mut v_sums = Array::<F4>::new(comptime!(PART * shape.chunks()));
    fill(&mut v_sums, comptime!(PART * shape.chunks()));
    let mut weights = Array::<F4>::new(PART);
    let mut d_scores = Array::<F4>::new(PART);

    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first = tables[tiles + index as usize] as usize;
        weights_again::<F>(
            q,
            k,
            v,
            gradient,
            log_sums,
            row_sums,
            tables,
            spans,
            &mut left,
            &mut right,
            &mut weights,
            &mut d_scores,
            first,
            first_key,
            n,
            key_head,
            &place,
            shape,
        );
        #[unroll]
        for i in 0..PART {
            right[(place.row + i) * ROW + place.col / 4] = weights[i];
        }
        #[unroll]
        for chunk in 0..comptime!(shape.chunks()) {
            load_queries::<F>(
                gradient, &mut left, first, n, key_head, chunk, place.unit, shape,
            );
            sync_cube();
            add_transposed_product(&right, &left, &mut v_sums, comptime!(chunk * PART), &place);
            sync_cube();
        }
        #[unroll]
        for i in 0..PART {
            right[(place.row + i) * ROW + place.col / 4] = d_scores[i];
        }
        #[unroll]
        for chunk in 0..comptime!(shape.chunks()) {
            load_queries::<F>(q, &mut left, first, n, key_head, chunk, place.unit, shape);
            sync_cube();
            add_transposed_product(&right, &left, &mut k_sums, comptime!(chunk * PART), &place);
            sync_cube();
        }
    }

    #[unroll]
    for i in 0..PART {
        let token = first_key + place.row + i;
        if token < n {
            #[unroll]
            for chunk in 0..comptime!(shape.chunks()) {
                let dimension = chunk * comptime!(CHUNK / 4) + place.col / 4;
                if dimension < comptime!(shape.d / 4) {
                    let at =
                        (token * shape.key_heads + key_head) * comptime!(shape.d / 4) + dimension;
                    d_k[at] = Vector::cast_from(k_sums[comptime!(chunk * PART + i)]);
                    d_v[at] = Vector::cast_from(v_sums[comptime!(chunk * PART + i)]);
                }
            }
        }
    }
}

/// Launches [`forward`]. `q`, `k`, `v` as there.
pub fn launch_forward(
    qkv: [CubeTensor; 3],
    tables: CubeTensor,
    tiled: TiledAttention,
) -> (CubeTensor, CubeTensor) {
    let [q, k, v] = qkv.map(into_contiguous);
    let (shape, [n, width]) = (tiled.shape, dims(&q));
    let output = empty(&q, [n, width], q.dtype);
    let log_sums = empty(&q, [n, shape.heads()], DType::F32);
    let element = element(q.dtype);
    if let Some(fragment) = shape.fragment {
        let outputs = (output, log_sums);
        return matrix_attention::launch_forward([q, k, v], tables, outputs, tiled, fragment);
    }
    let cubes = cubes(n, shape.tokens(), shape);
    if let Some(units) = plane(&q.client, shape) {
        launch!(
            plane_attention::plane_forward::launch_unchecked,
            q.client,
            cubes,
            CubeDim::new_1d(units as u32),
            [],
            [q, k, v, tables, output, log_sums],
            n,
            tiled.spans,
            tiled.keys_of,
            shape,
            units,
            element,
        );
    } else {
        launch!(
            forward::launch_unchecked,
            q.client,
            cubes,
            CubeDim::new_1d(UNITS as u32),
            [],
            [q, k, v, tables, output, log_sums],
            n,
            tiled.spans,
            tiled.keys_of,
            shape,
            element,
        );
    }
    (output, log_sums)
}

/// Launches the three kernels of the backward pass.
pub fn launch_backward(
    qkv: [CubeTensor; 3],
    [output, gradient, log_sums]: [CubeTensor; 3],
    tables: CubeTensor,
    tiled: TiledAttention,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [q, k, v] = qkv.map(into_contiguous);
    let [output, gradient, log_sums] = [output, gradient, log_sums].map(into_contiguous);
    let (shape, [n, width]) = (tiled.shape, dims(&q));
    let (client, element) = (q.client.clone(), element(q.dtype));
    let count = n * shape.heads();
    let sums = empty(&q, [n, shape.heads()], DType::F32);
    let d_q = empty(&q, [n, width], q.dtype);
    let [d_k, d_v] = [(); 2].map(|()| empty(&q, dims(&k), q.dtype));
    launch!(
        row_sums::launch_unchecked,
        client,
        CubeCount::Static(count.div_ceil(UNITS) as u32, 1, 1),
        CubeDim::new_1d(UNITS as u32),
        [],
        [output, gradient, sums],
        count,
        shape.d,
        element,
    );
    if let Some(fragment) = shape.fragment {
        let inputs = [q, k, v, gradient, log_sums, sums, tables];
        matrix_attention::launch_backward(inputs, [&d_q, &d_k, &d_v], tiled, fragment);
        return (d_q, d_k, d_v);
    }
    let (of_queries, of_keys) = (cubes(n, shape.tokens(), shape), cubes(n, KEYS, shape));
    if let Some(units) = plane(&client, shape) {
        let dim = CubeDim::new_1d(units as u32);
        launch!(
            plane_attention::plane_backward_queries::launch_unchecked,
            client,
            of_queries,
            dim,
            [],
            [q, k, v, gradient, log_sums, sums, tables, d_q],
            n,
            tiled.spans,
            tiled.keys_of,
            shape,
            units,
            element,
        );
        launch!(
            plane_attention::plane_backward_keys::launch_unchecked,
            client,
            of_keys,
            dim,
            [],
            [q, k, v, gradient, log_sums, sums, tables, d_k, d_v],
            n,
            tiled.spans,
            tiled.queries_of,
            shape,
            units,
            element,
        );
    } else {
        let dim = CubeDim::new_1d(UNITS as u32);
        launch!(
            backward_queries::launch_unchecked,
            client,
            of_queries,
            dim,
            [],
            [q, k, v, gradient, log_sums, sums, tables, d_q],
            n,
            tiled.spans,
            tiled.keys_of,
            shape,
            element,
        );
        launch!(
            backward_keys::launch_unchecked,
            client,
            of_keys,
            dim,
            [],
            [q, k, v, gradient, log_sums, sums, tables, d_k, d_v],
            n,
            tiled.spans,
            tiled.queries_of,
            shape,
            element,
        );
    }
    (d_q, d_k, d_v)
}

/// The units of a plane if the kernels of `plane_attention.rs` run: a software driver, and heads whose dimensions fit
/// into a unit's registers.
fn plane(client: &Client, shape: Shape) -> Option<usize> {
    plane_of_software_driver(client).filter(|units| QUERIES.is_multiple_of(*units) && shape.d <= 64)
}

/// One workgroup per tile of `size` tokens and key head.
pub(crate) fn cubes(n: usize, size: usize, shape: Shape) -> CubeCount {
    CubeCount::Static(n.div_ceil(size) as u32, shape.key_heads as u32, 1)
}
