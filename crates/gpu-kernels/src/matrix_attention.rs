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

use super::attention::{HIDDEN, Shape, cubes, query_of};
use super::fault::Fault;
use super::launch::{dims, element};
use super::matrix_product::Fragment;
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

/// Copies a chunk of the dimensions of queries (or of a gradient of their shape) to shared memory, `[side, chunk]`.
#[cube]
fn load_queries<F: Float, NV: Size>(
    from: &[Vector<F, NV>],
    to: &mut Shared<[Vector<F, NV>]>,
    first: usize,
    n: usize,
    key_head: usize,
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
        let (token, head) = query_of(row, first, n, key_head, shape);
        let dimension = comptime!(chunk * in_row) + at;
        let mut value = Vector::<F, NV>::new(F::from_int(0));
        if token < n && dimension < comptime!(shape.d / width) {
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
    first: usize,
    n: usize,
    key_head: usize,
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
        let token = first + row;
        let dimension = comptime!(chunk * in_row) + at;
        let mut value = Vector::<F, NV>::new(F::from_int(0));
        if token < n && dimension < comptime!(shape.d / width) {
            value =
                from[(token * shape.key_heads + key_head) * comptime!(shape.d / width) + dimension];
        }
        to[row * comptime!(matrix.chunk_row() / width) + at] = value;
    }
}

/// A fragment of zeros for sums.
#[cube]
fn zeros(#[comptime] fragment: Fragment) -> cmma::Matrix<f32> {
    cmma::Matrix::<f32>::from_value(
        MatrixIdent::Accumulator,
        fragment.m,
        fragment.n,
        fragment.k,
        MatrixLayout::Undefined,
        0.0,
    )
}

/// Reads a fragment of factors from shared memory.
#[cube]
fn read<F: Float, NV: Size>(
    from: &Shared<[Vector<F, NV>]>,
    at: usize,
    #[comptime] row: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
    #[comptime] fragment: Fragment,
) -> cmma::Matrix<F> {
    let mut matrix = unsafe {
        cmma::Matrix::<F>::uninitialized(ident, fragment.m, fragment.n, fragment.k, layout)
    };
    let end = from.len();
    cmma::load(
        &mut matrix,
        &from[at / NV::value()..end],
        comptime!(row as u32),
    );
    matrix
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
    let fragment = comptime!(matrix.fragment);
    let row = comptime!(matrix.chunk_row());
    let first = UNIT_POS_Y as usize * comptime!(matrix.plane_rows());
    let steps = comptime!(matrix.chunk() / fragment.k);
    #[unroll(steps <= 4)]
    for step in 0..steps {
        let inner = step * fragment.k;
        let at = first * row + inner;
        let rows = read::<F, NV>(
            left,
            at,
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
                at,
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
    let fragment = comptime!(matrix.fragment);
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
        let rows = read::<F, NV>(weights, at, weight_row, MatrixIdent::A, layout, fragment);
        #[unroll]
        for j in 0..comptime!(matrix.across_chunk()) {
            let at = inner * value_row + comptime!(j * fragment.n);
            let columns = read::<F, NV>(
                values,
                at,
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

/// Sums of `[rows of a plane, side]` of each plane, in shared memory: `left · rightᵀ` of all dimensions. `left` are rows of queries,
/// `right` of keys. On return every unit sees them.
#[cube]
fn dots<F: Float, NV: Size>(
    left: &[Vector<F, NV>],
    right: &[Vector<F, NV>],
    left_tile: &mut Shared<[Vector<F, NV>]>,
    right_tile: &mut Shared<[Vector<F, NV>]>,
    scores: &mut Shared<[f32]>,
    first: usize,
    first_key: usize,
    n: usize,
    key_head: usize,
    #[comptime] matrix: MatrixShape,
) {
    let fragment = comptime!(matrix.fragment);
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(matrix.across()) {
        sums.push(zeros(fragment));
    }
    #[unroll]
    for chunk in 0..comptime!(matrix.chunks()) {
        load_queries::<F, NV>(left, left_tile, first, n, key_head, chunk, matrix);
        load_keys::<F, NV>(right, right_tile, first_key, n, key_head, chunk, matrix);
        sync_cube();
        add_dots::<F, NV>(&*left_tile, &*right_tile, &mut sums, matrix);
        sync_cube();
    }
    #[unroll]
    for j in 0..comptime!(matrix.across()) {
        keep(&sums[j], scores, j, matrix);
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
    first: usize,
    n: usize,
    key_head: usize,
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
                    let (token, head) = query_of(row, first, n, key_head, shape);
                    (token, token * comptime!(shape.heads()) + head)
                } else {
                    let token = first + row;
                    (token, token * shape.key_heads + key_head)
                };
                if token < n && dimension < shape.d {
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
    first_key: usize,
    n: usize,
    #[comptime] matrix: MatrixShape,
) {
    for i in range_stepped(UNIT_POS as usize, matrix.side(), comptime!(matrix.units())) {
        let key = first_key + i;
        let at = spans + min(key, n - 1);
        to[i] = select(key < n, tables[at], i32::MAX);
        to[matrix.side() + i] = tables[at + n];
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
}

/// One of the rows of which a unit handles a part.
#[cube]
fn row_of(
    tables: &[i32],
    spans: usize,
    #[comptime] index: usize,
    first: usize,
    n: usize,
    key_head: usize,
    #[comptime] matrix: MatrixShape,
) -> Row {
    let unit = UNIT_POS as usize + comptime!(index * matrix.units());
    let row = unit / comptime!(matrix.parts());
    let (token, head) = query_of(row, first, n, key_head, comptime!(matrix.shape));
    Row {
        row,
        begin: (unit % comptime!(matrix.parts())) * comptime!(matrix.part()),
        token,
        head,
        segment: select(token < n, tables[spans + min(token, n - 1)], -1),
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
    first_key + col <= row.token && same
}

/// Replaces a tile's scores by attention weights, as factors in `weights`.
#[cube]
fn weigh<F: Float, NV: Size>(
    scores: &Shared<[f32]>,
    key_spans: &Shared<[i32]>,
    weights: &mut Shared<[Vector<F, NV>]>,
    row: &Row,
    log_sum: f32,
    first_key: usize,
    #[comptime] matrix: MatrixShape,
) {
    let width = NV::value();
    for j in 0..comptime!(matrix.part() / width) {
        let mut value = Vector::<F, NV>::new(F::from_int(0));
        #[unroll]
        for part in 0..width {
            let col = row.begin + j * width + part;
            let score = scores[row.row * comptime!(matrix.score_row()) + col];
            let visible = sees(row, key_spans, first_key, col, matrix);
            let weight = select(visible, (score - log_sum).exp(), 0.0f32);
            value.insert(part, F::cast_from(weight));
        }
        weights[row.row * comptime!(matrix.weight_row() / width) + row.begin / width + j] = value;
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
    let fragment = comptime!(matrix.fragment);
    let width = NV::value();
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first = tile * comptime!(shape.tokens());
    let chunk_size = comptime!(matrix.side() * matrix.chunk_row() / width);
    let mut left = Shared::<[Vector<F, NV>]>::new_slice(chunk_size);
    let mut right = Shared::<[Vector<F, NV>]>::new_slice(chunk_size);
    let mut scores = Shared::<[f32]>::new_slice(comptime!(matrix.side() * matrix.score_row()));
    let mut weights = Shared::<[Vector<F, NV>]>::new_slice(comptime!(
        matrix.side() * matrix.weight_row() / width
    ));
    let mut key_spans = Shared::<[i32]>::new_slice(comptime!(2 * matrix.side()));
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
        let first_key = tables[tiles + index as usize] as usize;
        load_spans(tables, &mut key_spans, spans, first_key, n, matrix);
        dots::<F, NV>(
            q,
            k,
            &mut left,
            &mut right,
            &mut scores,
            first,
            first_key,
            n,
            key_head,
            matrix,
        );
        #[unroll]
        for index in 0..rows {
            let row = row_of(tables, spans, index, first, n, key_head, matrix);
            let at = row.row * comptime!(matrix.score_row()) + row.begin;
            let mut largest = most[index];
            for j in 0..comptime!(matrix.part()) {
                let visible = sees(&row, &key_spans, first_key, row.begin + j, matrix);
                let score = select(visible, scores[at + j], HIDDEN);
                scores[at + j] = score;
                largest = max(largest, score);
            }
            let mut sum = total[index];
            if comptime!(shape.fault() != Fault::Correction) {
                sum *= (most[index] - largest).exp();
            }
            for j in 0..comptime!(matrix.part()) {
                let score = scores[at + j];
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
        let row = row_of(tables, spans, index, first, n, key_head, matrix);
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
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(matrix.chunks() * matrix.across_chunk()) {
        sums.push(zeros(fragment));
    }
    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first_key = tables[tiles + index as usize] as usize;
        load_spans(tables, &mut key_spans, spans, first_key, n, matrix);
        dots::<F, NV>(
            q,
            k,
            &mut left,
            &mut right,
            &mut scores,
            first,
            first_key,
            n,
            key_head,
            matrix,
        );
        #[unroll]
        for index in 0..rows {
            let row = row_of(tables, spans, index, first, n, key_head, matrix);
            weigh::<F, NV>(
                &scores,
                &key_spans,
                &mut weights,
                &row,
                total[index],
                first_key,
                matrix,
            );
        }
        #[unroll]
        for chunk in 0..comptime!(matrix.chunks()) {
            load_keys::<F, NV>(v, &mut right, first_key, n, key_head, chunk, matrix);
            sync_cube();
            let offset = comptime!(chunk * matrix.across_chunk());
            add_product::<F, NV>(&weights, &right, &mut sums, offset, false, matrix);
            sync_cube();
        }
    }
    write::<F>(&sums, &mut scores, output, first, n, key_head, true, matrix);
}

/// The attention weights of a tile, as factors in `weights`.
#[cube]
fn weights_again<F: Float, NV: Size>(
    q: &[Vector<F, NV>],
    k: &[Vector<F, NV>],
    log_sums: &[f32],
    tables: &[i32],
    spans: usize,
    left: &mut Shared<[Vector<F, NV>]>,
    right: &mut Shared<[Vector<F, NV>]>,
    scores: &mut Shared<[f32]>,
    key_spans: &mut Shared<[i32]>,
    weights: &mut Shared<[Vector<F, NV>]>,
    first: usize,
    first_key: usize,
    n: usize,
    key_head: usize,
    #[comptime] matrix: MatrixShape,
) {
    load_spans(tables, key_spans, spans, first_key, n, matrix);
    dots::<F, NV>(
        q, k, left, right, scores, first, first_key, n, key_head, matrix,
    );
    #[unroll]
    for index in 0..comptime!(matrix.rows_of_unit()) {
        let row = row_of(tables, spans, index, first, n, key_head, matrix);
        let at = min(row.token, n - 1) * comptime!(matrix.shape.heads()) + row.head;
        weigh::<F, NV>(
            &*scores,
            &*key_spans,
            weights,
            &row,
            log_sums[at],
            first_key,
            matrix,
        );
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
    left: &mut Shared<[Vector<F, NV>]>,
    right: &mut Shared<[Vector<F, NV>]>,
    scores: &mut Shared<[f32]>,
    weights: &mut Shared<[Vector<F, NV>]>,
    first: usize,
    first_key: usize,
    n: usize,
    key_head: usize,
    #[comptime] matrix: MatrixShape,
) {
    let width = NV::value();
    dots::<F, NV>(
        gradient, v, left, right, scores, first, first_key, n, key_head, matrix,
    );
    #[unroll]
    for index in 0..comptime!(matrix.rows_of_unit()) {
        let row = row_of(tables, spans, index, first, n, key_head, matrix);
        let row_sum = row_sums[min(row.token, n - 1) * comptime!(matrix.shape.heads()) + row.head];
        for j in 0..comptime!(matrix.part() / width) {
            let at = row.row * comptime!(matrix.weight_row() / width) + row.begin / width + j;
            let weight = weights[at];
            let mut value = Vector::<F, NV>::new(F::from_int(0));
            #[unroll]
            for part in 0..width {
                let col = row.begin + j * width + part;
                let d_weight = scores[row.row * comptime!(matrix.score_row()) + col];
                let d_score = f32::cast_from(weight.extract(part)) * (d_weight - row_sum);
                value.insert(part, F::cast_from(d_score));
            }
            weights[at] = value;
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
    let shape = comptime!(matrix.shape);
    let width = NV::value();
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first = tile * comptime!(shape.tokens());
    let chunk_size = comptime!(matrix.side() * matrix.chunk_row() / width);
    let mut left = Shared::<[Vector<F, NV>]>::new_slice(chunk_size);
    let mut right = Shared::<[Vector<F, NV>]>::new_slice(chunk_size);
    let mut scores = Shared::<[f32]>::new_slice(comptime!(matrix.side() * matrix.score_row()));
    let mut key_spans = Shared::<[i32]>::new_slice(comptime!(2 * matrix.side()));
    let mut weights = Shared::<[Vector<F, NV>]>::new_slice(comptime!(
        matrix.side() * matrix.weight_row() / width
    ));
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(matrix.chunks() * matrix.across_chunk()) {
        sums.push(zeros(comptime!(matrix.fragment)));
    }
    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first_key = tables[tiles + index as usize] as usize;
        weights_again::<F, NV>(
            q,
            k,
            log_sums,
            tables,
            spans,
            &mut left,
            &mut right,
            &mut scores,
            &mut key_spans,
            &mut weights,
            first,
            first_key,
            n,
            key_head,
            matrix,
        );
        weights_to_gradients::<F, NV>(
            gradient,
            v,
            row_sums,
            tables,
            spans,
            &mut left,
            &mut right,
            &mut scores,
            &mut weights,
            first,
            first_key,
            n,
            key_head,
            matrix,
        );
        #[unroll]
        for chunk in 0..comptime!(matrix.chunks()) {
            load_keys::<F, NV>(k, &mut right, first_key, n, key_head, chunk, matrix);
            sync_cube();
            let offset = comptime!(chunk * matrix.across_chunk());
            add_product::<F, NV>(&weights, &right, &mut sums, offset, false, matrix);
            sync_cube();
        }
    }
    write::<F>(&sums, &mut scores, d_q, first, n, key_head, true, matrix);
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
    let width = NV::value();
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first_key = tile * comptime!(matrix.side());
    let chunk_size = comptime!(matrix.side() * matrix.chunk_row() / width);
    let mut left = Shared::<[Vector<F, NV>]>::new_slice(chunk_size);
    let mut right = Shared::<[Vector<F, NV>]>::new_slice(chunk_size);
    let mut scores = Shared::<[f32]>::new_slice(comptime!(matrix.side() * matrix.score_row()));
    let mut key_spans = Shared::<[i32]>::new_slice(comptime!(2 * matrix.side()));
    let mut weights = Shared::<[Vector<F, NV>]>::new_slice(comptime!(
        matrix.side() * matrix.weight_row() / width
    ));
    let mut k_sums = Sequence::<cmma::Matrix<f32>>::new();
    let mut v_sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(matrix.chunks() * matrix.across_chunk()) {
        k_sums.push(zeros(comptime!(matrix.fragment)));
        v_sums.push(zeros(comptime!(matrix.fragment)));
    }
    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first = tables[tiles + index as usize] as usize;
        weights_again::<F, NV>(
            q,
            k,
            log_sums,
            tables,
            spans,
            &mut left,
            &mut right,
            &mut scores,
            &mut key_spans,
            &mut weights,
            first,
            first_key,
            n,
            key_head,
            matrix,
        );
        #[unroll]
        for chunk in 0..comptime!(matrix.chunks()) {
            load_queries::<F, NV>(gradient, &mut left, first, n, key_head, chunk, matrix);
            sync_cube();
            let offset = comptime!(chunk * matrix.across_chunk());
            add_product::<F, NV>(&weights, &left, &mut v_sums, offset, true, matrix);
            sync_cube();
        }
        weights_to_gradients::<F, NV>(
            gradient,
            v,
            row_sums,
            tables,
            spans,
            &mut left,
            &mut right,
            &mut scores,
            &mut weights,
            first,
            first_key,
            n,
            key_head,
            matrix,
        );
        #[unroll]
        for chunk in 0..comptime!(matrix.chunks()) {
            load_queries::<F, NV>(q, &mut left, first, n, key_head, chunk, matrix);
            sync_cube();
            let offset = comptime!(chunk * matrix.across_chunk());
            add_product::<F, NV>(&weights, &left, &mut k_sums, offset, true, matrix);
            sync_cube();
        }
    }
    write::<F>(
        &k_sums,
        &mut scores,
        d_k,
        first_key,
        n,
        key_head,
        false,
        matrix,
    );
    write::<F>(
        &v_sums,
        &mut scores,
        d_v,
        first_key,
        n,
        key_head,
        false,
        matrix,
    );
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
    let (client, width, element) = (q.client.clone(), width(&q, shape.d), element(q.dtype));
    unsafe {
        matrix_forward::launch_unchecked(
            &client,
            cubes(n, shape.tokens(), shape),
            units(matrix),
            width,
            q.into_buffer_arg(),
            k.into_buffer_arg(),
            v.into_buffer_arg(),
            tables.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            log_sums.clone().into_buffer_arg(),
            n,
            tiled.spans,
            tiled.keys_of,
            matrix,
            element,
        );
    }
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
    let (client, width, element) = (q.client.clone(), width(&q, shape.d), element(q.dtype));
    unsafe {
        matrix_backward_queries::launch_unchecked(
            &client,
            cubes(n, shape.tokens(), shape),
            units(matrix),
            width,
            q.clone().into_buffer_arg(),
            k.clone().into_buffer_arg(),
            v.clone().into_buffer_arg(),
            gradient.clone().into_buffer_arg(),
            log_sums.clone().into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            tables.clone().into_buffer_arg(),
            d_q.clone().into_buffer_arg(),
            n,
            tiled.spans,
            tiled.keys_of,
            matrix,
            element,
        );
        matrix_backward_keys::launch_unchecked(
            &client,
            cubes(n, shape.side, shape),
            units(matrix),
            width,
            q.into_buffer_arg(),
            k.into_buffer_arg(),
            v.into_buffer_arg(),
            gradient.into_buffer_arg(),
            log_sums.into_buffer_arg(),
            sums.into_buffer_arg(),
            tables.into_buffer_arg(),
            d_k.clone().into_buffer_arg(),
            d_v.clone().into_buffer_arg(),
            n,
            tiled.spans,
            tiled.queries_of,
            matrix,
            element,
        );
    }
}

fn units(matrix: MatrixShape) -> CubeDim {
    CubeDim::new_2d(matrix.fragment.plane as u32, matrix.planes() as u32)
}
