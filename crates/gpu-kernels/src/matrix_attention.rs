//! Attention on matrix units: the algorithm of `attention.rs`, its products in fragments.
//!
//! ```text
//!                keys (side)                     side = 64 or 32; a plane owns 16 rows, a fragment's
//!               ┌───────────┐
//!               │ K, V      │ chunk = 64 dimensions of a head at a time, 16 bits, in shared memory
//!  queries      ├───────────┤
//!  (side)       │ scores    │ fragments → shared memory (f32) → each unit has a part of a row
//!               └───────────┘                    → weights in 16 bits in shared memory → fragments
//! ```
//!
//! **Forward in two passes.** The first computes the scores and only their running maximum and sum, in registers of the
//! units that own the row. The second computes the scores again, and the output from weights that are already
//! normalised. One product more than with a running correction, but the output's fragments never leave the registers
//! of the matrix units: no unit knows which rows its registers hold, so that a correction would go through memory.
//!
//! **Backward** as in `attention.rs`: row sums, one kernel for dQ, one for dK and dV; no atomics. Weights are rounded to
//! 16 bits once; the gradients of scores, computed from them, take their place in shared memory. Sums are f32.

use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::{self, MatrixIdent, MatrixLayout};
use cubecl::ir::{DeviceProperties, ElemType};
use cubecl::prelude::*;

use super::attention::{HIDDEN, Shape, cubes, oldest, query_of};
use super::fault::Fault;
use super::fragment::{Fragment, read, zeros};
use super::launch::{dims, element, launch};
use super::operations::TiledAttention;

/// Padding of rows in shared memory in values: 16 bytes.
const PADDING: usize = 8;
const SCORE_PADDING: usize = 4;

/// Sizes that are known when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixShape {
    /// Heads and their width; its tiles have `side` queries and `side` keys.
    pub shape: Shape,
    /// The fragments of the matrix units.
    pub fragment: Fragment,
}

impl MatrixShape {
    const fn side(self) -> usize {
        self.shape.side
    }

    /// Rows of a plane.
    const fn plane_rows(self) -> usize {
        self.fragment.m
    }

    /// Dimensions of a head that are in shared memory at a time.
    const fn chunk(self) -> usize {
        4 * self.fragment.n
    }

    /// Values of a row of a chunk in shared memory.
    const fn chunk_row(self) -> usize {
        self.chunk() + PADDING
    }

    const fn planes(self) -> usize {
        self.side() / self.plane_rows()
    }

    const fn units(self) -> usize {
        self.planes() * self.fragment.plane
    }

    /// Units that share a row of scores.
    const fn parts(self) -> usize {
        if self.units() > self.side() {
            self.units() / self.side()
        } else {
            1
        }
    }

    /// Rows of scores of one unit.
    const fn rows_of_unit(self) -> usize {
        self.side() * self.parts() / self.units()
    }

    /// Scores of a row that one unit handles.
    const fn part(self) -> usize {
        self.side() / self.parts()
    }

    const fn chunks(self) -> usize {
        self.shape.d.div_ceil(self.chunk())
    }

    const fn score_row(self) -> usize {
        self.side() + SCORE_PADDING
    }

    const fn weight_row(self) -> usize {
        self.side() + PADDING
    }

    /// Fragments of keys beside one another.
    const fn across(self) -> usize {
        self.side() / self.fragment.n
    }

    /// Fragments of dimensions beside one another in a chunk.
    const fn across_chunk(self) -> usize {
        self.chunk() / self.fragment.n
    }

    /// Bytes of shared memory.
    pub const fn shared_bytes(self) -> usize {
        let side = self.side();
        let chunks = 2 * 2 * side * self.chunk_row();
        chunks
            + 4 * side * self.score_row()
            + 2 * side * self.weight_row()
            + 8 * side * self.parts()
            + 8 * side
    }
}

/// The shared memory of a workgroup.
#[derive(CubeType)]
struct Tiles<F: Float, NV: Size> {
    /// A chunk of queries, or of a gradient of their shape, `[side, chunk]`.
    left: Shared<[Vector<F, NV>]>,
    /// A chunk of keys or values, `[side, chunk]`.
    right: Shared<[Vector<F, NV>]>,
    /// `[side, side]`
    scores: Shared<[f32]>,
    /// Weights, or gradients of scores, as factors, `[side, side]`.
    weights: Shared<[Vector<F, NV>]>,
    /// Where each key's segment begins, then where its subtree ends.
    key_spans: Shared<[i32]>,
}

#[cube]
fn tiles_of<F: Float, NV: Size>(#[comptime] matrix: MatrixShape) -> Tiles<F, NV> {
    let width = NV::value();
    let chunk = comptime!(matrix.side() * matrix.chunk_row() / width);
    Tiles::<F, NV> {
        left: Shared::new_slice(chunk),
        right: Shared::new_slice(chunk),
        scores: Shared::new_slice(comptime!(matrix.side() * matrix.score_row())),
        weights: Shared::new_slice(comptime!(matrix.side() * matrix.weight_row() / width)),
        key_spans: Shared::new_slice(comptime!(2 * matrix.side())),
    }
}

/// A tile of queries and one of keys.
#[derive(CubeType, Clone, Copy)]
struct Pair {
    /// The first token of the queries.
    first: usize,
    first_key: usize,
    /// Tokens of the batch.
    n: usize,
    key_head: usize,
}

/// Zeros for sums of `[rows of a plane, d]`.
#[cube]
fn sums_of(#[comptime] matrix: MatrixShape) -> Sequence<cmma::Matrix<f32>> {
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(matrix.chunks() * matrix.across_chunk()) {
        sums.push(zeros(comptime!(matrix.fragment)));
    }
    sums
}

/// Copies a chunk of the dimensions of queries (or of a gradient of their shape) to shared memory, `[side, chunk]`.
#[cube]
fn load_queries<F: Float, NV: Size>(
    from: &[Vector<F, NV>],
    to: &mut Shared<[Vector<F, NV>]>,
    pair: &Pair,
    #[comptime] chunk: usize,
    #[comptime] matrix: MatrixShape,
) {
    let width = NV::value();
    let shape = comptime!(matrix.shape);
    let in_row = comptime!(matrix.chunk() / width);
    for i in range_stepped(
        UNIT_POS as usize,
        comptime!(matrix.side() * in_row),
        comptime!(matrix.units()),
    ) {
        let (row, at) = (i / in_row, i % in_row);
        let (token, head) = query_of(row, pair.first, pair.n, pair.key_head, shape);
        let dimension = comptime!(chunk * in_row) + at;
        let mut value = Vector::<F, NV>::new(F::from_int(0));
        if token < pair.n && dimension < comptime!(shape.d / width) {
            value = from[(token * comptime!(shape.heads()) + head) * comptime!(shape.d / width)
                + dimension];
        }
        to[row * comptime!(matrix.chunk_row() / width) + at] = value;
    }
}

/// As [`load_queries`], of keys or values.
#[cube]
fn load_keys<F: Float, NV: Size>(
    from: &[Vector<F, NV>],
    to: &mut Shared<[Vector<F, NV>]>,
    pair: &Pair,
    #[comptime] chunk: usize,
    #[comptime] matrix: MatrixShape,
) {
    let width = NV::value();
    let shape = comptime!(matrix.shape);
    let in_row = comptime!(matrix.chunk() / width);
    for i in range_stepped(
        UNIT_POS as usize,
        comptime!(matrix.side() * in_row),
        comptime!(matrix.units()),
    ) {
        let (row, at) = (i / in_row, i % in_row);
        let token = pair.first_key + row;
        let dimension = comptime!(chunk * in_row) + at;
        let mut value = Vector::<F, NV>::new(F::from_int(0));
        if token < pair.n && dimension < comptime!(shape.d / width) {
            let row = token * shape.key_heads + pair.key_head;
            value = from[row * comptime!(shape.d / width) + dimension];
        }
        to[row * comptime!(matrix.chunk_row() / width) + at] = value;
    }
}

/// Adds the dot products of a plane's rows of `left` with all rows of `right` to sums, `[rows of a plane, side]`: both hold a chunk
/// of dimensions.
#[cube]
fn add_dots<F: Float, NV: Size>(
    left: &Shared<[Vector<F, NV>]>,
    right: &Shared<[Vector<F, NV>]>,
    sums: &mut Sequence<cmma::Matrix<f32>>,
    #[comptime] matrix: MatrixShape,
) {
    let (fragment, width) = (comptime!(matrix.fragment), NV::value());
    let row = comptime!(matrix.chunk_row());
    let first = UNIT_POS_Y as usize * comptime!(matrix.plane_rows());
    let steps = comptime!(matrix.chunk() / fragment.k);
    #[unroll(steps <= 4)]
    for step in 0..steps {
        let inner = step * fragment.k;
        let at = first * row + inner;
        let rows = read::<F, NV>(
            left,
            at / width,
            row,
            MatrixIdent::A,
            MatrixLayout::RowMajor,
            fragment,
        );
        #[unroll]
        for j in 0..comptime!(matrix.across()) {
            let at = comptime!(j * fragment.n * row) + inner;
            let columns = read::<F, NV>(
                right,
                at / width,
                row,
                MatrixIdent::B,
                MatrixLayout::ColMajor,
                fragment,
            );
            let sum = &sums[j];
            cmma::execute(&rows, &columns, sum, sum);
        }
    }
}

/// Adds `weights · values` to sums that begin at `offset`, `[rows of a plane, chunk]`: weights `[side, side]`, or their transpose if
/// `transposed`; values `[side, chunk]`.
#[cube]
fn add_product<F: Float, NV: Size>(
    weights: &Shared<[Vector<F, NV>]>,
    values: &Shared<[Vector<F, NV>]>,
    sums: &mut Sequence<cmma::Matrix<f32>>,
    #[comptime] offset: usize,
    #[comptime] transposed: bool,
    #[comptime] matrix: MatrixShape,
) {
    let (fragment, width) = (comptime!(matrix.fragment), NV::value());
    let (weight_row, value_row) = comptime!((matrix.weight_row(), matrix.chunk_row()));
    let layout = comptime!(if transposed {
        MatrixLayout::ColMajor
    } else {
        MatrixLayout::RowMajor
    });
    let first = UNIT_POS_Y as usize * comptime!(matrix.plane_rows());
    let steps = comptime!(matrix.side() / fragment.k);
    #[unroll(steps <= 4)]
    for step in 0..steps {
        let inner = step * fragment.k;
        let at = if transposed {
            inner * weight_row + first
        } else {
            first * weight_row + inner
        };
        let rows = read::<F, NV>(
            weights,
            at / width,
            weight_row,
            MatrixIdent::A,
            layout,
            fragment,
        );
        #[unroll]
        for j in 0..comptime!(matrix.across_chunk()) {
            let at = inner * value_row + comptime!(j * fragment.n);
            let columns = read::<F, NV>(
                values,
                at / width,
                value_row,
                MatrixIdent::B,
                MatrixLayout::RowMajor,
                fragment,
            );
            let sum = &sums[comptime!(offset + j)];
            cmma::execute(&rows, &columns, sum, sum);
        }
    }
}

/// `left · rightᵀ` over all dimensions, in the place of the scores: `left` are rows of queries, `right` of keys. On return
/// every unit sees it.
#[cube]
fn dots<F: Float, NV: Size>(
    left: &[Vector<F, NV>],
    right: &[Vector<F, NV>],
    tiles: &mut Tiles<F, NV>,
    pair: &Pair,
    #[comptime] matrix: MatrixShape,
) {
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(matrix.across()) {
        sums.push(zeros(comptime!(matrix.fragment)));
    }
    #[unroll]
    for chunk in 0..comptime!(matrix.chunks()) {
        load_queries::<F, NV>(left, &mut tiles.left, pair, chunk, matrix);
        load_keys::<F, NV>(right, &mut tiles.right, pair, chunk, matrix);
        sync_cube();
        add_dots::<F, NV>(&tiles.left, &tiles.right, &mut sums, matrix);
        sync_cube();
    }
    #[unroll]
    for j in 0..comptime!(matrix.across()) {
        keep(&sums[j], &mut tiles.scores, j, matrix);
    }
    sync_cube();
}

/// Writes a fragment of sums to the scores' place in shared memory.
#[cube]
fn keep(
    sum: &cmma::Matrix<f32>,
    scores: &mut Shared<[f32]>,
    #[comptime] j: usize,
    #[comptime] matrix: MatrixShape,
) {
    let fragment = comptime!(matrix.fragment);
    let row = UNIT_POS_Y as usize * comptime!(matrix.plane_rows());
    let at = row * comptime!(matrix.score_row()) + comptime!(j * fragment.n);
    let end = scores.len();
    cmma::store(
        &mut scores[at..end],
        sum,
        comptime!(matrix.score_row() as u32),
        MatrixLayout::RowMajor,
    );
}

/// Writes sums of `[rows of a tile, d]` that lie in fragments to memory, a chunk at a time through the scores' place.
/// `owns_queries`: whether rows are queries, else keys.
#[cube]
fn write<F: Float>(
    sums: &Sequence<cmma::Matrix<f32>>,
    scores: &mut Shared<[f32]>,
    to: &mut [F],
    pair: &Pair,
    #[comptime] owns_queries: bool,
    #[comptime] matrix: MatrixShape,
) {
    let shape = comptime!(matrix.shape);
    // As many fragments beside one another as the scores have.
    let at_once = comptime!(if matrix.across() < matrix.across_chunk() {
        matrix.across()
    } else {
        matrix.across_chunk()
    });
    let columns = comptime!(at_once * matrix.fragment.n);
    #[unroll]
    for chunk in 0..comptime!(matrix.chunks()) {
        #[unroll]
        for begin in 0..comptime!(matrix.across_chunk() / at_once) {
            #[unroll]
            for j in 0..at_once {
                let at = comptime!(chunk * matrix.across_chunk() + begin * at_once + j);
                keep(&sums[at], scores, j, matrix);
            }
            sync_cube();
            for i in range_stepped(
                UNIT_POS as usize,
                comptime!(matrix.side() * columns),
                comptime!(matrix.units()),
            ) {
                let (row, col) = (i / columns, i % columns);
                let dimension = comptime!(chunk * matrix.chunk() + begin * columns) + col;
                let (token, at) = if owns_queries {
                    let (token, head) = query_of(row, pair.first, pair.n, pair.key_head, shape);
                    (token, token * comptime!(shape.heads()) + head)
                } else {
                    let token = pair.first_key + row;
                    (token, token * shape.key_heads + pair.key_head)
                };
                if token < pair.n && dimension < shape.d {
                    to[at * shape.d + dimension] =
                        F::cast_from(scores[row * comptime!(matrix.score_row()) + col]);
                }
            }
            sync_cube();
        }
    }
}

/// Copies the numbers of the segments of a tile of keys to shared memory: where each begins, then where its subtree
/// ends. No token attends to a key outside the batch.
#[cube]
fn load_spans(
    tables: &[i32],
    to: &mut Shared<[i32]>,
    spans: usize,
    pair: &Pair,
    #[comptime] matrix: MatrixShape,
) {
    for i in range_stepped(UNIT_POS as usize, matrix.side(), comptime!(matrix.units())) {
        let key = pair.first_key + i;
        let at = spans + min(key, pair.n - 1);
        to[i] = select(key < pair.n, tables[at], i32::MAX);
        to[matrix.side() + i] = tables[at + pair.n];
    }
}

/// A row of a tile of queries.
#[derive(CubeType, Clone, Copy)]
struct Row {
    /// In the tile.
    row: usize,
    /// The first score of the unit's part.
    begin: usize,
    /// `n` outside the batch.
    token: usize,
    head: usize,
    /// Where the token's segment begins; -1 outside the batch.
    segment: i32,
    /// The first token of its sliding window.
    oldest: usize,
}

/// One of the rows of which a unit handles a part.
#[cube]
fn row_of(
    tables: &[i32],
    spans: usize,
    pair: &Pair,
    #[comptime] index: usize,
    #[comptime] matrix: MatrixShape,
) -> Row {
    let unit = UNIT_POS as usize + comptime!(index * matrix.units());
    let row = unit / comptime!(matrix.parts());
    let (token, head) = query_of(
        row,
        pair.first,
        pair.n,
        pair.key_head,
        comptime!(matrix.shape),
    );
    Row {
        row,
        begin: (unit % comptime!(matrix.parts())) * comptime!(matrix.part()),
        token,
        head,
        segment: select(token < pair.n, tables[spans + min(token, pair.n - 1)], -1),
        oldest: oldest(tables, spans, token, pair.n, comptime!(matrix.shape)),
    }
}

/// Whether a row attends to the key at a column of the tile that begins at `first_key`.
#[cube]
fn sees(
    row: &Row,
    key_spans: &Shared<[i32]>,
    first_key: usize,
    col: usize,
    #[comptime] matrix: MatrixShape,
) -> bool {
    let begin = key_spans[col];
    let end = key_spans[matrix.side() + col];
    let inside = begin <= row.segment && row.segment < end;
    let same = inside
        || (comptime!(matrix.shape.fault() == Fault::Mask)
            && row.segment >= 0
            && begin != i32::MAX);
    let key = first_key + col;
    let mut near = key <= row.token;
    if matrix.shape.window {
        near = near && key >= row.oldest;
    }
    near && same
}

/// A unit's part of a row of attention weights from the scores, as factors.
#[cube]
fn weigh<F: Float, NV: Size>(
    tiles: &mut Tiles<F, NV>,
    row: &Row,
    log_sum: f32,
    pair: &Pair,
    #[comptime] matrix: MatrixShape,
) {
    let width = NV::value();
    for j in 0..comptime!(matrix.part() / width) {
        let mut value = Vector::<F, NV>::new(F::from_int(0));
        #[unroll]
        for part in 0..width {
            let col = row.begin + j * width + part;
            let score = tiles.scores[row.row * comptime!(matrix.score_row()) + col];
            let visible = sees(row, &tiles.key_spans, pair.first_key, col, matrix);
            let weight = select(visible, (score - log_sum).exp(), 0.0f32);
            value.insert(part, F::cast_from(weight));
        }
        let at = row.row * comptime!(matrix.weight_row() / width) + row.begin / width + j;
        tiles.weights[at] = value;
    }
}

/// The attention output, and the log-sum-exp of each query's scores. Shapes and tables as `attention.rs`'s `forward`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn matrix_forward<F: Float, NV: Size>(
    q: &[Vector<F, NV>],
    k: &[Vector<F, NV>],
    v: &[Vector<F, NV>],
    tables: &[i32],
    output: &mut [F],
    log_sums: &mut [f32],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] matrix: MatrixShape,
    #[define(F)] _type: ElemType,
) {
    let shape = comptime!(matrix.shape);
    let tile = CUBE_POS_X as usize;
    let mut pair = Pair {
        first: tile * comptime!(shape.tokens()),
        first_key: 0,
        n,
        key_head: CUBE_POS_Y as usize,
    };
    let mut shared = tiles_of::<F, NV>(matrix);
    // Of each part of a row: the maximum and the sum.
    let mut most_of = Shared::<[f32]>::new_slice(comptime!(matrix.side() * matrix.parts()));
    let mut sum_of = Shared::<[f32]>::new_slice(comptime!(matrix.side() * matrix.parts()));
    let rows = comptime!(matrix.rows_of_unit());

    // First pass: maximum and sum of each row.
    let mut most = Array::<f32>::new(rows);
    let mut total = Array::<f32>::new(rows);
    #[unroll]
    for index in 0..rows {
        most[index] = HIDDEN;
        total[index] = 0.0;
    }
    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        pair.first_key = tables[tiles + index as usize] as usize;
        load_spans(tables, &mut shared.key_spans, spans, &pair, matrix);
        dots::<F, NV>(q, k, &mut shared, &pair, matrix);
        #[unroll]
        for index in 0..rows {
            let row = row_of(tables, spans, &pair, index, matrix);
            let at = row.row * comptime!(matrix.score_row()) + row.begin;
            let mut largest = most[index];
            for j in 0..comptime!(matrix.part()) {
                let visible = sees(
                    &row,
                    &shared.key_spans,
                    pair.first_key,
                    row.begin + j,
                    matrix,
                );
                let score = select(visible, shared.scores[at + j], HIDDEN);
                shared.scores[at + j] = score;
                largest = max(largest, score);
            }
            let mut sum = total[index];
            if comptime!(shape.fault() != Fault::Correction) {
                sum *= (most[index] - largest).exp();
            }
            for j in 0..comptime!(matrix.part()) {
                let score = shared.scores[at + j];
                sum += select(
                    score > comptime!(HIDDEN / 2.0),
                    (score - largest).exp(),
                    0.0f32,
                );
            }
            most[index] = largest;
            total[index] = sum;
        }
        sync_cube();
    }
    #[unroll]
    for index in 0..rows {
        let at = UNIT_POS as usize + comptime!(index * matrix.units());
        most_of[at] = most[index];
        sum_of[at] = total[index];
    }
    sync_cube();
    // The log-sum-exp of each of the unit's rows, from all parts.
    #[unroll]
    for index in 0..rows {
        let row = row_of(tables, spans, &pair, index, matrix);
        let parts = comptime!(matrix.parts());
        let mut largest = most_of[row.row * parts];
        #[unroll]
        for part in 1..parts {
            largest = max(largest, most_of[row.row * parts + part]);
        }
        let mut sum = 0.0f32;
        #[unroll]
        for part in 0..parts {
            let at = row.row * parts + part;
            sum += sum_of[at] * (most_of[at] - largest).exp();
        }
        let log_sum = largest + sum.ln();
        total[index] = log_sum;
        if row.token < n && row.begin == 0 {
            log_sums[row.token * comptime!(shape.heads()) + row.head] = log_sum;
        }
    }

    // Second pass: the output.
    let mut sums = sums_of(matrix);
    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        pair.first_key = tables[tiles + index as usize] as usize;
        load_spans(tables, &mut shared.key_spans, spans, &pair, matrix);
        dots::<F, NV>(q, k, &mut shared, &pair, matrix);
        #[unroll]
        for index in 0..rows {
            let row = row_of(tables, spans, &pair, index, matrix);
            weigh::<F, NV>(&mut shared, &row, total[index], &pair, matrix);
        }
        #[unroll]
        for chunk in 0..comptime!(matrix.chunks()) {
            load_keys::<F, NV>(v, &mut shared.right, &pair, chunk, matrix);
            sync_cube();
            let offset = comptime!(chunk * matrix.across_chunk());
            add_product::<F, NV>(
                &shared.weights,
                &shared.right,
                &mut sums,
                offset,
                false,
                matrix,
            );
            sync_cube();
        }
    }
    write::<F>(&sums, &mut shared.scores, output, &pair, true, matrix);
}

/// The attention weights of a tile, as factors.
#[cube]
fn weights_again<F: Float, NV: Size>(
    q: &[Vector<F, NV>],
    k: &[Vector<F, NV>],
    log_sums: &[f32],
    tables: &[i32],
    spans: usize,
    tiles: &mut Tiles<F, NV>,
    pair: &Pair,
    #[comptime] matrix: MatrixShape,
) {
    load_spans(tables, &mut tiles.key_spans, spans, pair, matrix);
    dots::<F, NV>(q, k, tiles, pair, matrix);
    #[unroll]
    for index in 0..comptime!(matrix.rows_of_unit()) {
        let row = row_of(tables, spans, pair, index, matrix);
        let at = min(row.token, pair.n - 1) * comptime!(matrix.shape.heads()) + row.head;
        weigh::<F, NV>(tiles, &row, log_sums[at], pair, matrix);
    }
    sync_cube();
}

/// Replaces a tile's attention weights by the gradients of its scores: weight · (dO·V − Σ dO·O).
#[cube]
fn weights_to_gradients<F: Float, NV: Size>(
    gradient: &[Vector<F, NV>],
    v: &[Vector<F, NV>],
    row_sums: &[f32],
    tables: &[i32],
    spans: usize,
    tiles: &mut Tiles<F, NV>,
    pair: &Pair,
    #[comptime] matrix: MatrixShape,
) {
    let width = NV::value();
    dots::<F, NV>(gradient, v, tiles, pair, matrix);
    #[unroll]
    for index in 0..comptime!(matrix.rows_of_unit()) {
        let row = row_of(tables, spans, pair, index, matrix);
        let at = min(row.token, pair.n - 1) * comptime!(matrix.shape.heads()) + row.head;
        let row_sum = row_sums[at];
        for j in 0..comptime!(matrix.part() / width) {
            let at = row.row * comptime!(matrix.weight_row() / width) + row.begin / width + j;
            let weight = tiles.weights[at];
            let mut value = Vector::<F, NV>::new(F::from_int(0));
            #[unroll]
            for part in 0..width {
                let col = row.begin + j * width + part;
                let d_weight = tiles.scores[row.row * comptime!(matrix.score_row()) + col];
                let d_score = f32::cast_from(weight.extract(part)) * (d_weight - row_sum);
                value.insert(part, F::cast_from(d_score));
            }
            tiles.weights[at] = value;
        }
    }
    sync_cube();
}

/// The gradient of the queries.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn matrix_backward_queries<F: Float, NV: Size>(
    q: &[Vector<F, NV>],
    k: &[Vector<F, NV>],
    v: &[Vector<F, NV>],
    gradient: &[Vector<F, NV>],
    log_sums: &[f32],
    row_sums: &[f32],
    tables: &[i32],
    d_q: &mut [F],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] matrix: MatrixShape,
    #[define(F)] _type: ElemType,
) {
    let tile = CUBE_POS_X as usize;
    let mut pair = Pair {
        first: tile * comptime!(matrix.shape.tokens()),
        first_key: 0,
        n,
        key_head: CUBE_POS_Y as usize,
    };
    let mut shared = tiles_of::<F, NV>(matrix);
    let mut sums = sums_of(matrix);
    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        pair.first_key = tables[tiles + index as usize] as usize;
        weights_again::<F, NV>(q, k, log_sums, tables, spans, &mut shared, &pair, matrix);
        weights_to_gradients::<F, NV>(
            gradient,
            v,
            row_sums,
            tables,
            spans,
            &mut shared,
            &pair,
            matrix,
        );
        #[unroll]
        for chunk in 0..comptime!(matrix.chunks()) {
            load_keys::<F, NV>(k, &mut shared.right, &pair, chunk, matrix);
            sync_cube();
            let offset = comptime!(chunk * matrix.across_chunk());
            add_product::<F, NV>(
                &shared.weights,
                &shared.right,
                &mut sums,
                offset,
                false,
                matrix,
            );
            sync_cube();
        }
    }
    write::<F>(&sums, &mut shared.scores, d_q, &pair, true, matrix);
}

/// Adds `weightsᵀ · rows` to sums of keys; rows of queries or of a gradient of their shape.
#[cube]
fn add_to_keys<F: Float, NV: Size>(
    rows: &[Vector<F, NV>],
    sums: &mut Sequence<cmma::Matrix<f32>>,
    tiles: &mut Tiles<F, NV>,
    pair: &Pair,
    #[comptime] matrix: MatrixShape,
) {
    #[unroll]
    for chunk in 0..comptime!(matrix.chunks()) {
        load_queries::<F, NV>(rows, &mut tiles.left, pair, chunk, matrix);
        sync_cube();
        let offset = comptime!(chunk * matrix.across_chunk());
        add_product::<F, NV>(&tiles.weights, &tiles.left, sums, offset, true, matrix);
        sync_cube();
    }
}

/// The gradients of keys and values. The lists at `tiles` are those of tiles of queries.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn matrix_backward_keys<F: Float, NV: Size>(
    q: &[Vector<F, NV>],
    k: &[Vector<F, NV>],
    v: &[Vector<F, NV>],
    gradient: &[Vector<F, NV>],
    log_sums: &[f32],
    row_sums: &[f32],
    tables: &[i32],
    d_k: &mut [F],
    d_v: &mut [F],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] matrix: MatrixShape,
    #[define(F)] _type: ElemType,
) {
    let tile = CUBE_POS_X as usize;
    let mut pair = Pair {
        first: 0,
        first_key: tile * comptime!(matrix.side()),
        n,
        key_head: CUBE_POS_Y as usize,
    };
    let mut shared = tiles_of::<F, NV>(matrix);
    let (mut k_sums, mut v_sums) = (sums_of(matrix), sums_of(matrix));
    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        pair.first = tables[tiles + index as usize] as usize;
        weights_again::<F, NV>(q, k, log_sums, tables, spans, &mut shared, &pair, matrix);
        add_to_keys::<F, NV>(gradient, &mut v_sums, &mut shared, &pair, matrix);
        weights_to_gradients::<F, NV>(
            gradient,
            v,
            row_sums,
            tables,
            spans,
            &mut shared,
            &pair,
            matrix,
        );
        add_to_keys::<F, NV>(q, &mut k_sums, &mut shared, &pair, matrix);
    }
    write::<F>(&k_sums, &mut shared.scores, d_k, &pair, false, matrix);
    write::<F>(&v_sums, &mut shared.scores, d_v, &pair, false, matrix);
}

/// Whether the kernels here can compute it on this device.
pub fn fits(properties: &DeviceProperties, shape: Shape) -> bool {
    let Some(fragment) = shape.fragment else {
        return false;
    };
    let matrix = MatrixShape { shape, fragment };
    let hardware = &properties.hardware;
    shape.group <= shape.side
        && matrix.shared_bytes() <= hardware.max_shared_memory_size
        && matrix.units() <= hardware.max_units_per_cube as usize
}

/// The values of a vector in memory: 16 bytes where the device and the heads allow it.
fn width(tensor: &CubeTensor, d: usize) -> usize {
    let most = tensor.client.properties().hardware.max_vector_size;
    if most >= 8 && d.is_multiple_of(8) {
        8
    } else {
        4
    }
}

/// Launches [`matrix_forward`].
pub fn launch_forward(
    [q, k, v]: [CubeTensor; 3],
    tables: CubeTensor,
    (output, log_sums): (CubeTensor, CubeTensor),
    tiled: TiledAttention,
    fragment: Fragment,
) -> (CubeTensor, CubeTensor) {
    let (shape, [n, _]) = (tiled.shape, dims(&q));
    let matrix = MatrixShape { shape, fragment };
    launch!(
        matrix_forward::launch_unchecked,
        q.client,
        cubes(n, shape.tokens(), shape),
        units(matrix),
        [width(&q, shape.d)],
        [q, k, v, tables, output, log_sums],
        n,
        tiled.spans,
        tiled.keys_of,
        matrix,
        element(q.dtype),
    );
    (output, log_sums)
}

/// Launches [`matrix_backward_queries`] and [`matrix_backward_keys`]. Inputs: queries, keys, values, the output's
/// gradient, log-sum-exps, row sums, tables.
pub fn launch_backward(
    [q, k, v, gradient, log_sums, sums, tables]: [CubeTensor; 7],
    [d_q, d_k, d_v]: [&CubeTensor; 3],
    tiled: TiledAttention,
    fragment: Fragment,
) {
    let (shape, [n, _]) = (tiled.shape, dims(&q));
    let matrix = MatrixShape { shape, fragment };
    let (width, element) = (width(&q, shape.d), element(q.dtype));
    launch!(
        matrix_backward_queries::launch_unchecked,
        q.client,
        cubes(n, shape.tokens(), shape),
        units(matrix),
        [width],
        [q, k, v, gradient, log_sums, sums, tables, d_q],
        n,
        tiled.spans,
        tiled.keys_of,
        matrix,
        element,
    );
    launch!(
        matrix_backward_keys::launch_unchecked,
        q.client,
        cubes(n, shape.side, shape),
        units(matrix),
        [width],
        [q, k, v, gradient, log_sums, sums, tables, d_k, d_v],
        n,
        tiled.spans,
        tiled.queries_of,
        matrix,
        element,
    );
}

fn units(matrix: MatrixShape) -> CubeDim {
    CubeDim::new_2d(matrix.fragment.plane as u32, matrix.planes() as u32)
}
