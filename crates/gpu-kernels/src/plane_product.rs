//! [`product`](super::product) for drivers that emulate a GPU on a CPU.
//!
//! Such a driver runs the units of a plane as the lanes of a SIMD instruction. Arithmetic is as fast as the CPU's. A
//! read from memory is a loop over lanes, from shared memory too, and costs as much as twenty multiplications. This
//! kernel reads little and has no shared memory: a workgroup is one plane, a unit owns 8 columns of 32 rows,
//! and x comes to all units from the unit that read it, by a broadcast, which is one instruction.
//!
//! ```text
//!                 unit 0: 8 columns  │ unit 1: 8 columns  │ …      each unit widens its words in registers
//!   unit 0: row 0 ───────────────────┼────────────────────┼─ …     4 values of x, sent to all units
//!   unit 1: row 1 ───────────────────┼────────────────────┼─ …
//! ```

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::ending::{Ending, finish};
use super::fault::Fault;
use super::product::{Lengths, Packing, vector_of, widen};

type F4 = Vector<f32, Const<4>>;

/// The shape of a workgroup's tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows of the output; a multiple of `units`.
    pub rows: usize,
    /// Columns of a unit.
    pub cols: usize,
    /// Units of a plane.
    pub units: usize,
}

impl Tile {
    /// The tile for a software driver; `None` on a GPU, or if the size of a plane is not known.
    pub fn of_software_driver(client: &Client, packing: Packing) -> Option<Self> {
        let tile = Self {
            rows: 32,
            cols: 8,
            units: super::plane_of_software_driver(client)?,
        };
        // Words and scales of a unit's columns must not be shared with its neighbours.
        let fits = tile.rows.is_multiple_of(tile.units) && packing.block.is_multiple_of(tile.cols);
        fits.then_some(tile)
    }

    /// One workgroup per tile of an output `[n, m]`.
    pub fn cubes(self, n: usize, m: usize) -> CubeCount {
        let columns = self.cols * self.units;
        CubeCount::Static(m.div_ceil(columns) as u32, n.div_ceil(self.rows) as u32, 1)
    }
}

/// As [`product`](super::product::product).
#[cube(launch_unchecked)]
pub fn plane_product<X: Float, NX: Size, L: Float, B: Float, S: Float, NM: Size, O: Float>(
    x: &[Vector<X, NX>],
    words: &[u32],
    scales: &[f32],
    low: &[L],
    b: &[B],
    sum: &[Vector<S, NM>],
    out: &mut [Vector<O, NM>],
    other: &mut [Vector<O, NM>],
    lengths: Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: Tile,
    #[comptime] ending: Ending,
    #[define(X, L, B, S, O)] _types: [ElemType; 5],
) {
    let lane = UNIT_POS as usize;
    let first_row = CUBE_POS_Y as usize * tile.rows;
    let first_col = (CUBE_POS_X as usize * tile.units + lane) * tile.cols;
    let vectors = comptime!(tile.cols / 4);
    let mut sums = Array::<F4>::new(comptime!(tile.rows * vectors));
    #[unroll]
    for i in 0..comptime!(tile.rows * vectors) {
        sums[i] = F4::new(0.0f32);
    }

    accumulate(
        x, words, scales, low, b, &mut sums, first_row, first_col, &lengths, packing, tile,
    );

    let in_vector = NM::value();
    #[unroll]
    for i in 0..tile.rows {
        let row = first_row + i;
        #[unroll]
        for j in 0..comptime!(tile.cols / in_vector) {
            let col = first_col + comptime!(j * in_vector);
            if row < lengths.n && col < lengths.m {
                finish::<S, O, NM>(
                    vector_of::<NM>(&sums, comptime!(i * tile.cols + j * in_vector)),
                    sum,
                    out,
                    other,
                    row,
                    col,
                    &lengths,
                    ending,
                    comptime!(packing.fault),
                );
            }
        }
    }
}

/// Adds `x · W [+ low · B]` to the sums of a plane's units.
#[cube]
pub fn accumulate<X: Float, NX: Size, L: Float, B: Float>(
    x: &[Vector<X, NX>],
    words: &[u32],
    scales: &[f32],
    low: &[L],
    b: &[B],
    sums: &mut Array<F4>,
    first_row: usize,
    first_col: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: Tile,
) {
    let lane = UNIT_POS as usize;
    let vectors = comptime!(tile.cols / 4);
    let mut steps = lengths.k.div_ceil(4usize);
    if comptime!(packing.fault == Fault::Depth) {
        steps -= 1;
    }
    for step in 0..steps {
        let first = step * 4;
        let mut w = Array::<F4>::new(tile.cols);
        if packing.along_cols {
            read_along_columns(
                words, scales, &mut w, first, first_col, lengths, packing, tile,
            );
        } else {
            read_along_rows(
                words, scales, &mut w, first, first_col, lengths, packing, tile,
            );
        }
        #[unroll]
        for group in 0..comptime!(tile.rows / tile.units) {
            let mine = read_x(x, first_row + group * tile.units + lane, first, lengths);
            #[unroll]
            for i in 0..tile.units {
                let value = plane_broadcast(mine, comptime!(i as u32));
                #[unroll]
                for j in 0..vectors {
                    let at = comptime!((group * tile.units + i) * vectors + j);
                    let mut added = sums[at];
                    #[unroll]
                    for inner in 0..4usize {
                        added = fma(
                            F4::new(value.extract(inner)),
                            w[comptime!(inner * vectors + j)],
                            added,
                        );
                    }
                    sums[at] = added;
                }
            }
        }
    }

    add_low_rank(low, b, sums, first_row, first_col, lane, lengths, tile);
}

/// Four values of a row of x; zeros behind its end. Rows behind the last are the last, and not written.
#[cube]
fn read_x<X: Float, NX: Size>(
    x: &[Vector<X, NX>],
    row: usize,
    first: usize,
    lengths: &Lengths,
) -> F4 {
    let at = min(row, lengths.n - 1) * lengths.x_row + first;
    let in_vector = NX::value();
    let mut value = F4::new(0.0f32);
    if comptime!(in_vector == 4) {
        value = Vector::cast_from(x[at / 4]);
    } else {
        #[unroll]
        for j in 0..4usize {
            if first + j < lengths.k {
                value.insert(j, f32::cast_from(x[at + j].extract(0usize)));
            }
        }
    }
    value
}

/// Four rows of a unit's columns of W, from words along columns: `[4, cols]`.
#[cube]
fn read_along_columns(
    words: &[u32],
    scales: &[f32],
    w: &mut Array<F4>,
    first: usize,
    first_col: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: Tile,
) {
    let in_word = comptime!(32 / packing.bits);
    let vectors = comptime!(tile.cols / 4);
    let skipped = comptime!(if packing.fault == Fault::Scale {
        1usize
    } else {
        0usize
    });
    let col = min(first_col, lengths.m - 1);
    #[unroll]
    for inner in 0..4usize {
        let row = min(first + inner, lengths.k - 1);
        let scale = scales[row * lengths.scales_row + col / packing.block + skipped];
        #[unroll]
        for i in 0..comptime!(tile.cols / in_word) {
            let at = min(first_col + comptime!(i * in_word), lengths.m - 1) / in_word;
            let word = words[row * lengths.words_row + at];
            #[unroll]
            for part in 0..comptime!(in_word / 4) {
                let mut values = F4::new(0.0f32);
                #[unroll]
                for j in 0..4usize {
                    values.insert(
                        j,
                        widen(word, comptime!(4 * part + j), packing.bits) * scale,
                    );
                }
                w[comptime!(inner * vectors + i * in_word / 4 + part)] = values;
            }
        }
    }
}

/// As [`read_along_columns`], from words along rows.
#[cube]
fn read_along_rows(
    words: &[u32],
    scales: &[f32],
    w: &mut Array<F4>,
    first: usize,
    first_col: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: Tile,
) {
    let in_word = comptime!(32 / packing.bits);
    let vectors = comptime!(tile.cols / 4);
    let skipped = comptime!(if packing.fault == Fault::Scale {
        1usize
    } else {
        0usize
    });
    // The four values are the lowest of the word after this shift.
    let shift = ((first % in_word) * packing.bits) as u32;
    #[unroll]
    for j in 0..vectors {
        let mut four = Array::<u32>::new(4usize);
        let mut factors = Array::<f32>::new(4usize);
        #[unroll]
        for part in 0..4usize {
            let col = min(first_col + comptime!(4 * j + part), lengths.m - 1);
            four[part] = words[col * lengths.words_row + first / in_word] >> shift;
            factors[part] = scales[col * lengths.scales_row + first / packing.block + skipped];
        }
        #[unroll]
        for inner in 0..4usize {
            let mut values = F4::new(0.0f32);
            #[unroll]
            for part in 0..4usize {
                values.insert(part, widen(four[part], inner, packing.bits) * factors[part]);
            }
            w[comptime!(inner * vectors + j)] = values;
        }
    }
}

/// Adds `low · B` to a unit's sums.
#[cube]
fn add_low_rank<L: Float, B: Float>(
    low: &[L],
    b: &[B],
    sums: &mut Array<F4>,
    first_row: usize,
    first_col: usize,
    lane: usize,
    lengths: &Lengths,
    #[comptime] tile: Tile,
) {
    let vectors = comptime!(tile.cols / 4);
    for inner in 0..lengths.rank {
        let mut b_row = Array::<F4>::new(vectors);
        #[unroll]
        for j in 0..vectors {
            let mut values = F4::new(0.0f32);
            #[unroll]
            for part in 0..4usize {
                let col = min(first_col + comptime!(4 * j + part), lengths.m - 1);
                values.insert(
                    part,
                    f32::cast_from(b[inner * lengths.b_row + col * lengths.b_col]),
                );
            }
            b_row[j] = values;
        }
        #[unroll]
        for group in 0..comptime!(tile.rows / tile.units) {
            let row = min(first_row + group * tile.units + lane, lengths.n - 1);
            let mine = f32::cast_from(
                low[row * lengths.low_row + (lengths.low_first + inner) * lengths.low_col],
            );
            #[unroll]
            for i in 0..tile.units {
                let factor = F4::new(plane_broadcast(mine, comptime!(i as u32)));
                #[unroll]
                for j in 0..vectors {
                    let at = comptime!((group * tile.units + i) * vectors + j);
                    sums[at] = fma(factor, b_row[j], sums[at]);
                }
            }
        }
    }
}
