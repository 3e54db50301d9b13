//! Products of few rows with packed weights, as in decoding. They are bound by the reading of the weight, which is read
//! once.
//!
//! ```text
//!   words along columns                        words along the inner dimension
//!          16 words of a row →                        16 words of a column →
//!   inner  ┌────────────────┐                 columns ┌────────────────┐
//!     ↓    │ unit = 16·part │                    ↓    │ unit = part    │
//!          │        + word  │                         │    + 16·column │
//!          └────────────────┘                         └────────────────┘
//! ```
//!
//! A workgroup computes the columns of 16 words, or 16 columns, for up to 8 rows. Sixteen parts of its units share the
//! inner dimension: neighbouring units read neighbouring words. Rows of x are in shared memory, a chunk at a time, and
//! sums in registers. The 16 partial sums of an output are added in order, so that results do not depend on timing.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::ending::Ending;
use super::fault::Fault;
use super::product::{Lengths, Packing, widen};

type F4 = Vector<f32, Const<4>>;

/// Products with fewer rows of x use this kernel.
pub const FEW_ROWS: usize = 16;
/// Words or columns of a workgroup.
pub const LANES: usize = 16;
/// The parts of the inner dimension.
const PARTS: usize = 16;
/// Units of a workgroup.
pub const UNITS: usize = LANES * PARTS;

/// Rows of a workgroup, for `n` rows.
pub fn rows_of(n: usize) -> usize {
    n.next_power_of_two().min(8)
}

/// Columns of a workgroup.
pub const fn columns_of(packing: Packing) -> usize {
    if packing.along_cols {
        LANES * 32 / packing.bits
    } else {
        LANES
    }
}

/// The part of the inner dimension whose values of x are in shared memory: at most 4 KiB.
const fn chunk_of(rows: usize) -> usize {
    if rows <= 2 { 512 } else { 1024 / rows }
}

/// Vectors of a unit's sums for one row.
const fn vectors_of(packing: Packing) -> usize {
    if packing.along_cols {
        8 / packing.bits
    } else {
        1
    }
}

/// `out = [sum +] x · W [+ low · B]`; see [`product`](super::product::product).
#[cube(launch_unchecked)]
pub fn few_rows<X: Float, L: Float, B: Float, S: Float, O: Float>(
    x: &[X],
    words: &[u32],
    scales: &[f32],
    low: &[L],
    b: &[B],
    sum: &[S],
    out: &mut [O],
    // The kernels of a product have the same arguments; this one has no ending with a second output.
    _other: &mut [O],
    lengths: Lengths,
    #[comptime] packing: Packing,
    #[comptime] rows: usize,
    #[comptime] ending: Ending,
    #[define(X, L, B, S, O)] _types: [ElemType; 5],
) {
    let chunk = comptime!(chunk_of(rows));
    let vectors = comptime!(vectors_of(packing));
    let unit = UNIT_POS as usize;
    let first_row = CUBE_POS_Y as usize * rows;
    let first_col = CUBE_POS_X as usize * comptime!(columns_of(packing));
    let mut x_tile = Shared::<[F4]>::new_slice(comptime!(rows * chunk / 4));
    let mut partial = Shared::<[F4]>::new_slice(comptime!(UNITS * vectors));
    let mut sums = Array::<F4>::new(comptime!(rows * vectors));
    #[unroll]
    for i in 0..comptime!(rows * vectors) {
        sums[i] = F4::new(0.0f32);
    }
    let (lane, part) = if packing.along_cols {
        (unit % LANES, unit / LANES)
    } else {
        (unit / PARTS, unit % PARTS)
    };

    let mut chunks = lengths.k.div_ceil(chunk);
    if comptime!(packing.fault == Fault::Depth) {
        chunks -= 1;
    }
    for step in 0..chunks {
        let first = step * chunk;
        for i in range_stepped(unit, comptime!(rows * chunk / 4), UNITS) {
            let row = first_row + i / comptime!(chunk / 4);
            let inner = first + (i % comptime!(chunk / 4)) * 4;
            let mut value = F4::new(0.0f32);
            #[unroll]
            for j in 0..4usize {
                if row < lengths.n && inner + j < lengths.k {
                    value.insert(j, f32::cast_from(x[row * lengths.x_row + inner + j]));
                }
            }
            x_tile[i] = value;
        }
        sync_cube();
        if packing.along_cols {
            along_columns(
                words, scales, &x_tile, &mut sums, first, first_col, lane, part, &lengths, packing,
                rows,
            );
        } else {
            along_inner(
                words, scales, &x_tile, &mut sums, first, first_col, lane, part, &lengths, packing,
                rows,
            );
        }
        sync_cube();
    }

    #[unroll]
    for i in 0..rows {
        #[unroll]
        for v in 0..vectors {
            partial[(part * LANES + lane) * vectors + v] = sums[comptime!(i * vectors + v)];
        }
        sync_cube();
        let row = first_row + i;
        if unit < comptime!(LANES * vectors) && row < lengths.n {
            let mut total = partial[unit];
            #[unroll]
            for other in 1..PARTS {
                total += partial[unit + comptime!(other * LANES * vectors)];
            }
            if packing.along_cols {
                #[unroll]
                for j in 0..4usize {
                    let col = first_col + unit * 4 + j;
                    finish::<L, B, S, O>(
                        total.extract(j),
                        row,
                        col,
                        low,
                        b,
                        sum,
                        out,
                        &lengths,
                        ending,
                    );
                }
            } else {
                let value = total.extract(0usize)
                    + total.extract(1usize)
                    + total.extract(2usize)
                    + total.extract(3usize);
                let col = first_col + unit;
                finish::<L, B, S, O>(value, row, col, low, b, sum, out, &lengths, ending);
            }
        }
        sync_cube();
    }
}

/// Four values of a word times its scale.
#[cube]
fn four(word: u32, scale: f32, #[comptime] first: usize, #[comptime] bits: usize) -> F4 {
    let mut values = F4::new(0.0f32);
    #[unroll]
    for j in 0..4usize {
        values.insert(j, widen(word, comptime!(first + j), bits));
    }
    values * F4::new(scale)
}

const fn skipped(fault: Fault) -> usize {
    match fault {
        Fault::Scale => 1,
        _ => 0,
    }
}

/// Adds the words of a unit in a chunk to its sums: four rows of the weight at a time.
#[cube]
fn along_columns(
    words: &[u32],
    scales: &[f32],
    x_tile: &Shared<[F4]>,
    sums: &mut Array<F4>,
    first: usize,
    first_col: usize,
    lane: usize,
    part: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] rows: usize,
) {
    let in_word = comptime!(32 / packing.bits);
    let vectors = comptime!(vectors_of(packing));
    let width = comptime!(chunk_of(rows) / 4);
    let col = first_col + lane * in_word;
    for group in range_stepped(part, width, PARTS) {
        let mut w = Array::<F4>::new(comptime!(4 * vectors));
        #[unroll]
        for step in 0..4usize {
            let inner = first + group * 4 + step;
            let mut word = 0u32;
            let mut scale = 0.0f32;
            if inner < lengths.k && col < lengths.m {
                word = words[inner * lengths.words_row + col / in_word];
                let block = col / packing.block + comptime!(skipped(packing.fault));
                scale = scales[inner * lengths.scales_row + block];
            }
            #[unroll]
            for v in 0..vectors {
                w[comptime!(step * vectors + v)] =
                    four(word, scale, comptime!(4 * v), packing.bits);
            }
        }
        #[unroll]
        for i in 0..rows {
            let x = x_tile[i * width + group];
            #[unroll]
            for step in 0..4usize {
                let factor = F4::new(x.extract(step));
                #[unroll]
                for v in 0..vectors {
                    let at = comptime!(i * vectors + v);
                    sums[at] = fma(factor, w[comptime!(step * vectors + v)], sums[at]);
                }
            }
        }
    }
}

/// As [`along_columns`], for words along the inner dimension; a sum's four parts belong to one output.
#[cube]
fn along_inner(
    words: &[u32],
    scales: &[f32],
    x_tile: &Shared<[F4]>,
    sums: &mut Array<F4>,
    first: usize,
    first_col: usize,
    lane: usize,
    part: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] rows: usize,
) {
    let in_word = comptime!(32 / packing.bits);
    let width = comptime!(chunk_of(rows) / 4);
    let col = first_col + lane;
    for group in range_stepped(part, comptime!(chunk_of(rows) / in_word), PARTS) {
        let inner = first + group * in_word;
        if inner < lengths.k && col < lengths.m {
            let word = words[col * lengths.words_row + inner / in_word];
            let block = inner / packing.block + comptime!(skipped(packing.fault));
            let scale = scales[col * lengths.scales_row + block];
            #[unroll]
            for v in 0..comptime!(in_word / 4) {
                let w = four(word, scale, comptime!(4 * v), packing.bits);
                #[unroll]
                for i in 0..rows {
                    let x = x_tile[i * width + group * comptime!(in_word / 4) + v];
                    sums[i] = fma(x, w, sums[i]);
                }
            }
        }
    }
}

/// Adds the other terms to an output and writes it.
#[cube]
fn finish<L: Float, B: Float, S: Float, O: Float>(
    product: f32,
    row: usize,
    col: usize,
    low: &[L],
    b: &[B],
    sum: &[S],
    out: &mut [O],
    lengths: &Lengths,
    #[comptime] ending: Ending,
) {
    if col < lengths.m {
        let mut value = product;
        for inner in 0..lengths.rank {
            let column = lengths.low_first + inner;
            let factor = f32::cast_from(low[row * lengths.low_row + column * lengths.low_col]);
            value += factor * f32::cast_from(b[inner * lengths.b_row + col * lengths.b_col]);
        }
        if comptime!(ending == Ending::Sum) {
            value += f32::cast_from(sum[row * lengths.sum_row + col]);
        }
        out[row * lengths.m + col] = O::cast_from(value);
    }
}
