//! Products with a frozen weight on matrix units (CUDA's mma, Vulkan's cooperative matrices, Metal's simdgroups).
//!
//! ```text
//!                  W: cols columns, depth = 32 of the inner dimension at a time
//!                 ┌───────────────┐
//!                 │ w_tile        │ packed words → 16 bits (integer · scale, rounded once) in shared memory
//!      x_tile     └───────────────┘
//!  ┌───────────┐  ┌───────┬───────┐
//!  │           │  │ plane │ plane │ each plane (CUDA: warp) sums plane_rows × plane_cols outputs in fragments
//!  │ rows      │  ├───────┼───────┤ of 16 × 16: f32, in the matrix units' own registers
//!  └───────────┘  └───────┴───────┘
//! ```
//!
//! **Pipeline.** While the matrix units work on one step of `depth`, every unit has the next step's values of x and
//! words of W on their way from memory to registers. Two copies of the tiles in shared memory take turns, so that a
//! step needs one barrier. Where shared memory is too small for two copies, there is one, and a step needs two.
//!
//! **The low-rank term** `low · B` is further steps along the inner dimension, in the same fragments. The sum is added
//! when fragments are written: through shared memory, because no unit knows which outputs its registers hold.
//!
//! **Order.** Workgroups along x share columns, so that a tile of W is read from memory once and x stays in the cache.

use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::cmma::{self, MatrixIdent, MatrixLayout};
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::choice::Candidate;
use super::ending::{Ending, finish};
use super::fault::Fault;
use super::fragment::{Fragment, read, zeros};
use super::launch::launch;
use super::product::{Lengths, Operands, Packing};

/// The shape of a workgroup's tile and of its planes' parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixTile {
    /// Rows of the output.
    pub rows: usize,
    /// Columns of the output.
    pub cols: usize,
    /// The part of the inner dimension that is in shared memory at a time.
    pub depth: usize,
    /// Rows of the output of one plane.
    pub plane_rows: usize,
    /// Columns of the output of one plane.
    pub plane_cols: usize,
    /// Copies of the tiles in shared memory: 1 or 2.
    pub copies: usize,
    /// The fragments of the matrix units.
    pub fragment: Fragment,
}

/// Padding of a row in shared memory in values of 16 bits: 16 bytes, so that the rows of a fragment lie in different
/// banks.
const PADDING: usize = 8;

impl MatrixTile {
    /// 128 × 128 outputs by 8 planes: for products that fill the device with such tiles.
    pub const fn large(fragment: Fragment, copies: usize) -> Self {
        Self {
            rows: 128,
            cols: 128,
            depth: 32,
            plane_rows: 64,
            plane_cols: 32,
            copies,
            fragment,
        }
    }

    /// 64 × 64 outputs by 4 planes.
    pub const fn small(fragment: Fragment, copies: usize) -> Self {
        Self {
            rows: 64,
            cols: 64,
            depth: 32,
            plane_rows: 32,
            plane_cols: 32,
            copies,
            fragment,
        }
    }

    /// The planes of a workgroup.
    pub const fn planes(self) -> usize {
        (self.rows / self.plane_rows) * (self.cols / self.plane_cols)
    }

    /// The units of a workgroup.
    pub const fn units(self) -> usize {
        self.planes() * self.fragment.plane
    }

    /// One workgroup per tile of an output `[n, m]`.
    pub fn cubes(self, n: usize, m: usize) -> CubeCount {
        let (down, across) = (n.div_ceil(self.rows), m.div_ceil(self.cols));
        CubeCount::Static(down as u32, across as u32, 1)
    }

    /// Values of a row of x in shared memory.
    const fn x_row(self) -> usize {
        self.depth + PADDING
    }

    /// Values of a row of W in shared memory.
    const fn w_row(self, along_cols: bool) -> usize {
        if along_cols {
            self.cols + PADDING
        } else {
            self.depth + PADDING
        }
    }

    /// The length of the dimension of W that words lie along.
    const fn along(self, packing: Packing) -> usize {
        if packing.along_cols {
            self.cols
        } else {
            self.depth
        }
    }

    /// Values of x in shared memory.
    pub const fn x_values(self) -> usize {
        self.rows * self.x_row()
    }

    /// Values of W in shared memory.
    pub const fn w_values(self, along_cols: bool) -> usize {
        let rows = if along_cols { self.depth } else { self.cols };
        rows * self.w_row(along_cols)
    }

    /// Values of a fragment of sums.
    pub const fn fragment_values(self) -> usize {
        self.fragment.m * self.fragment.n
    }

    /// Bytes of shared memory.
    pub const fn shared_bytes(self, along_cols: bool) -> usize {
        let tiles = self.x_values() + self.w_values(along_cols);
        2 * self.copies * tiles + 4 * self.planes() * self.fragment_values()
    }
}

/// `x · W [+ low · B]` with an [`Ending`], with factors rounded to `T` and sums in f32.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn matrix_product<
    X: Float,
    T: Float,
    L: Float,
    B: Float,
    S: Float,
    O: Float,
    NX: Size,
    NW: Size,
    NO: Size,
    NV: Size,
>(
    x: &[Vector<X, NX>],
    words: &[Vector<u32, NW>],
    scales: &[f32],
    low: &[L],
    b: &[B],
    sum: &[Vector<S, NO>],
    out: &mut [Vector<O, NO>],
    other: &mut [Vector<O, NO>],
    lengths: Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: MatrixTile,
    #[comptime] ending: Ending,
    #[define(X, T, L, B, S, O)] _types: [ElemType; 6],
    #[define(NV)] _size: usize,
) {
    let (width, out_width) = (NV::value(), NO::value());
    let plane = UNIT_POS_Y as usize;
    let first_row = CUBE_POS_X as usize * tile.rows;
    let first_col = CUBE_POS_Y as usize * tile.cols;
    let (plane_row, plane_col) = place_of_plane(tile);

    let x_size = comptime!(tile.x_values() / width);
    let w_size = comptime!(tile.w_values(packing.along_cols) / width);
    let mut x_tile = Shared::<[Vector<T, NV>]>::new_slice(comptime!(tile.copies * x_size));
    let mut w_tile = Shared::<[Vector<T, NV>]>::new_slice(comptime!(tile.copies * w_size));
    let mut results = Shared::<[Vector<f32, NO>]>::new_slice(comptime!(
        tile.planes() * tile.fragment_values() / out_width
    ));

    let down = comptime!(tile.plane_rows / tile.fragment.m);
    let across = comptime!(tile.plane_cols / tile.fragment.n);
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(down * across) {
        sums.push(zeros(comptime!(tile.fragment)));
    }

    accumulate::<X, T, L, B, NX, NW, NV>(
        x,
        words,
        scales,
        low,
        b,
        &mut x_tile,
        &mut w_tile,
        &mut sums,
        first_row,
        first_col,
        &lengths,
        packing,
        tile,
    );

    let lane = UNIT_POS_X as usize;
    let in_fragment = comptime!(tile.fragment_values() / out_width);
    let in_row = comptime!(tile.fragment.n / out_width);
    #[unroll]
    for i in 0..down {
        #[unroll]
        for j in 0..across {
            let begin = plane * in_fragment;
            cmma::store(
                &mut results[begin..begin + in_fragment],
                &sums[comptime!(i * across + j)],
                comptime!(tile.fragment.n as u32),
                MatrixLayout::RowMajor,
            );
            sync_cube();
            let row = first_row + plane_row + comptime!(i * tile.fragment.m);
            let col = first_col + plane_col + comptime!(j * tile.fragment.n);
            for at in range_stepped(lane, in_fragment, tile.fragment.plane) {
                let row = row + at / in_row;
                let col = col + (at % in_row) * out_width;
                if row < lengths.n && col < lengths.m {
                    finish::<S, O, NO>(
                        results[begin + at],
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
            sync_cube();
        }
    }
}

/// Adds `x · W [+ low · B]` to the sums of a workgroup's planes. Nothing else may be using the tiles in shared memory.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn accumulate<X: Float, T: Float, L: Float, B: Float, NX: Size, NW: Size, NV: Size>(
    x: &[Vector<X, NX>],
    words: &[Vector<u32, NW>],
    scales: &[f32],
    low: &[L],
    b: &[B],
    x_tile: &mut Shared<[Vector<T, NV>]>,
    w_tile: &mut Shared<[Vector<T, NV>]>,
    sums: &mut Sequence<cmma::Matrix<f32>>,
    first_row: usize,
    first_col: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: MatrixTile,
) {
    let (width, word_vector) = (NV::value(), NW::value());
    let unit = UNIT_POS as usize;
    let (plane_row, plane_col) = place_of_plane(tile);
    let x_size = comptime!(tile.x_values() / width);
    let w_size = comptime!(tile.w_values(packing.along_cols) / width);
    let mut next_x = Array::<Vector<T, NV>>::new(comptime!(x_loads(tile, width)));
    let mut next_words =
        Array::<Vector<u32, NW>>::new(comptime!(w_loads(tile, packing, word_vector)));
    let mut next_scales = Array::<f32>::new(comptime!(w_loads(tile, packing, word_vector)));

    let mut steps = lengths.k.div_ceil(tile.depth);
    if comptime!(packing.fault == Fault::Depth) {
        steps -= 1;
    }
    fetch_x::<X, T, NX, NV>(x, &mut next_x, 0, first_row, unit, lengths, tile);
    fetch_words::<NW>(
        words,
        scales,
        &mut next_words,
        &mut next_scales,
        0,
        first_col,
        unit,
        lengths,
        packing,
        tile,
    );
    keep_x::<T, NV>(&next_x, x_tile, 0, unit, tile);
    keep_words::<T, NW, NV>(&next_words, &next_scales, w_tile, 0, unit, packing, tile);
    sync_cube();
    for step in 0..steps {
        let copy = step % tile.copies;
        let is_last = step + 1 >= steps;
        if !is_last {
            let first = (step + 1) * tile.depth;
            fetch_x::<X, T, NX, NV>(x, &mut next_x, first, first_row, unit, lengths, tile);
            fetch_words::<NW>(
                words,
                scales,
                &mut next_words,
                &mut next_scales,
                first,
                first_col,
                unit,
                lengths,
                packing,
                tile,
            );
        }
        multiply::<T, NV>(
            &*x_tile,
            &*w_tile,
            sums,
            copy * x_size,
            copy * w_size,
            plane_row,
            plane_col,
            packing,
            tile,
        );
        if comptime!(tile.copies == 1) {
            sync_cube();
        }
        if !is_last {
            let other = (step + 1) % tile.copies;
            keep_x::<T, NV>(&next_x, x_tile, other * x_size, unit, tile);
            keep_words::<T, NW, NV>(
                &next_words,
                &next_scales,
                w_tile,
                other * w_size,
                unit,
                packing,
                tile,
            );
        }
        sync_cube();
    }

    for step in 0..lengths.rank.div_ceil(tile.depth) {
        let first = step * tile.depth;
        load_low::<L, T, NV>(low, x_tile, first, first_row, unit, lengths, tile);
        load_b::<B, T, NV>(b, w_tile, first, first_col, unit, lengths, packing, tile);
        sync_cube();
        multiply::<T, NV>(
            &*x_tile, &*w_tile, sums, 0, 0, plane_row, plane_col, packing, tile,
        );
        sync_cube();
    }
}

/// The first row and column of a plane's outputs in a workgroup's tile.
#[cube]
pub fn place_of_plane(#[comptime] tile: MatrixTile) -> (usize, usize) {
    let plane = UNIT_POS_Y as usize;
    let planes_across = comptime!(tile.cols / tile.plane_cols);
    (
        (plane / planes_across) * tile.plane_rows,
        (plane % planes_across) * tile.plane_cols,
    )
}

/// Vectors of x that a unit copies per step.
const fn x_loads(tile: MatrixTile, width: usize) -> usize {
    (tile.rows * tile.depth / width).div_ceil(tile.units())
}

/// Vectors of words that a unit copies per step.
const fn w_loads(tile: MatrixTile, packing: Packing, vector: usize) -> usize {
    w_vectors(tile, packing, vector).div_ceil(tile.units())
}

const fn w_vectors(tile: MatrixTile, packing: Packing, vector: usize) -> usize {
    tile.depth * tile.cols / (vector * 32 / packing.bits)
}

/// Reads a unit's part of the next tile of x, `[rows, depth]`, to registers; zeros outside x.
#[cube]
fn fetch_x<X: Float, T: Float, NX: Size, NV: Size>(
    x: &[Vector<X, NX>],
    next: &mut Array<Vector<T, NV>>,
    first: usize,
    first_row: usize,
    unit: usize,
    lengths: &Lengths,
    #[comptime] tile: MatrixTile,
) {
    let (width, x_width) = (NV::value(), NX::value());
    let in_row = comptime!(tile.depth / width);
    #[unroll]
    for load in 0..comptime!(x_loads(tile, width)) {
        let at = unit + comptime!(load * tile.units());
        let row = first_row + at / in_row;
        let inner = first + (at % in_row) * width;
        let mut value = Vector::<T, NV>::new(T::from_int(0));
        if row < lengths.n {
            let from = row * lengths.x_row + inner;
            if comptime!(x_width == width) {
                if inner < lengths.k {
                    let read = x[from / width];
                    #[unroll]
                    for j in 0..width {
                        value.insert(j, T::cast_from(read.extract(j)));
                    }
                }
            } else {
                #[unroll]
                for j in 0..width {
                    if inner + j < lengths.k {
                        value.insert(j, T::cast_from(x[from + j].extract(0usize)));
                    }
                }
            }
        }
        next[load] = value;
    }
}

/// Writes what [`fetch_x`] read to shared memory.
#[cube]
fn keep_x<T: Float, NV: Size>(
    next: &Array<Vector<T, NV>>,
    x_tile: &mut Shared<[Vector<T, NV>]>,
    begin: usize,
    unit: usize,
    #[comptime] tile: MatrixTile,
) {
    let width = NV::value();
    let in_row = comptime!(tile.depth / width);
    let total = comptime!(tile.rows * in_row);
    #[unroll]
    for load in 0..comptime!(x_loads(tile, width)) {
        let at = unit + comptime!(load * tile.units());
        if comptime!(total % tile.units() == 0) || at < total {
            x_tile[begin + (at / in_row) * comptime!(tile.x_row() / width) + at % in_row] =
                next[load];
        }
    }
}

/// Reads a unit's words of the next tile of W, and their scales, to registers; zeros outside W. All values of a
/// vector of words share a scale.
#[cube]
fn fetch_words<NW: Size>(
    words: &[Vector<u32, NW>],
    scales: &[f32],
    next: &mut Array<Vector<u32, NW>>,
    next_scales: &mut Array<f32>,
    first: usize,
    first_col: usize,
    unit: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: MatrixTile,
) {
    let vector = NW::value();
    let values = comptime!(vector * 32 / packing.bits);
    let in_row = comptime!(tile.along(packing) / values);
    let skipped = comptime!(if packing.fault == Fault::Scale {
        1usize
    } else {
        0usize
    });
    #[unroll]
    for load in 0..comptime!(w_loads(tile, packing, vector)) {
        let at = unit + comptime!(load * tile.units());
        let (outer, along) = (at / in_row, (at % in_row) * values);
        let mut read = Vector::<u32, NW>::new(0u32);
        let mut scale = 0.0f32;
        let (row, col) = if packing.along_cols {
            (first + outer, first_col + along)
        } else {
            (first + along, first_col + outer)
        };
        if row < lengths.k && col < lengths.m {
            let (line, place) = if packing.along_cols {
                (row, col)
            } else {
                (col, row)
            };
            read = words[line * (lengths.words_row / vector) + place / values];
            scale = scales[line * lengths.scales_row + place / packing.block + skipped];
        }
        next[load] = read;
        next_scales[load] = scale;
    }
}

/// Widens the words that [`fetch_words`] read and writes them to shared memory: `[depth, cols]` if words lie along
/// columns, else `[cols, depth]`.
#[cube]
fn keep_words<T: Float, NW: Size, NV: Size>(
    next: &Array<Vector<u32, NW>>,
    scales: &Array<f32>,
    w_tile: &mut Shared<[Vector<T, NV>]>,
    begin: usize,
    unit: usize,
    #[comptime] packing: Packing,
    #[comptime] tile: MatrixTile,
) {
    let (width, vector) = (NV::value(), NW::value());
    let in_word = comptime!(32 / packing.bits);
    let values = comptime!(vector * in_word);
    let in_row = comptime!(tile.along(packing) / values);
    let total = comptime!(w_vectors(tile, packing, vector));
    #[unroll]
    for load in 0..comptime!(w_loads(tile, packing, vector)) {
        let at = unit + comptime!(load * tile.units());
        if comptime!(total % tile.units() == 0) || at < total {
            let row = begin + (at / in_row) * comptime!(tile.w_row(packing.along_cols) / width);
            let to = row + (at % in_row) * comptime!(values / width);
            let read = next[load];
            let scale = scales[load];
            #[unroll]
            for part in 0..comptime!(values / width) {
                let mut wide = Vector::<T, NV>::new(T::from_int(0));
                #[unroll]
                for j in 0..width {
                    let value = comptime!(part * width + j);
                    let word = read.extract(comptime!(value / in_word));
                    let integer = widen(word, comptime!(value % in_word), packing.bits);
                    wide.insert(j, T::cast_from(integer * scale));
                }
                w_tile[to + part] = wide;
            }
        }
    }
}

/// The signed integer at a place of a word, the first in the lowest bits. The integer, shifted to be unsigned, becomes
/// the lowest bits of a float of 2²³: a subtraction leaves it, without the slow conversion from integers.
#[cube]
fn widen(word: u32, #[comptime] place: usize, #[comptime] bits: usize) -> f32 {
    let mask = comptime!((1u32 << bits) - 1);
    let half = comptime!(1u32 << (bits - 1));
    let unsigned = ((word >> comptime!((bits * place) as u32)) & mask) ^ half;
    f32::reinterpret(unsigned | 0x4B00_0000u32) - comptime!((8_388_608u32 + half) as f32)
}

/// Copies a tile of `low`, `[rows, depth]`, to shared memory.
#[cube]
fn load_low<L: Float, T: Float, NV: Size>(
    low: &[L],
    x_tile: &mut Shared<[Vector<T, NV>]>,
    first: usize,
    first_row: usize,
    unit: usize,
    lengths: &Lengths,
    #[comptime] tile: MatrixTile,
) {
    let width = NV::value();
    let in_row = comptime!(tile.depth / width);
    for at in range_stepped(unit, comptime!(tile.rows * in_row), comptime!(tile.units())) {
        let row = first_row + at / in_row;
        let mut value = Vector::<T, NV>::new(T::from_int(0));
        #[unroll]
        for j in 0..width {
            let inner = first + (at % in_row) * width + j;
            if row < lengths.n && inner < lengths.rank {
                let from = row * lengths.low_row + (lengths.low_first + inner) * lengths.low_col;
                value.insert(j, T::cast_from(low[from]));
            }
        }
        x_tile[(at / in_row) * comptime!(tile.x_row() / width) + at % in_row] = value;
    }
}

/// Copies a tile of B to shared memory, in the layout of [`keep_words`].
#[cube]
fn load_b<B: Float, T: Float, NV: Size>(
    b: &[B],
    w_tile: &mut Shared<[Vector<T, NV>]>,
    first: usize,
    first_col: usize,
    unit: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: MatrixTile,
) {
    let width = NV::value();
    let in_row = comptime!(tile.along(packing) / width);
    let total = comptime!(tile.depth * tile.cols / width);
    for at in range_stepped(unit, total, comptime!(tile.units())) {
        let mut value = Vector::<T, NV>::new(T::from_int(0));
        #[unroll]
        for j in 0..width {
            let along = (at % in_row) * width + j;
            let (inner, col) = if packing.along_cols {
                (first + at / in_row, first_col + along)
            } else {
                (first + along, first_col + at / in_row)
            };
            if inner < lengths.rank && col < lengths.m {
                value.insert(
                    j,
                    T::cast_from(b[inner * lengths.b_row + col * lengths.b_col]),
                );
            }
        }
        w_tile[(at / in_row) * comptime!(tile.w_row(packing.along_cols) / width) + at % in_row] =
            value;
    }
}

/// Adds a plane's part of the product of the tiles that begin at these places of shared memory to its sums.
#[cube]
fn multiply<T: Float, NV: Size>(
    x_tile: &Shared<[Vector<T, NV>]>,
    w_tile: &Shared<[Vector<T, NV>]>,
    sums: &mut Sequence<cmma::Matrix<f32>>,
    x_begin: usize,
    w_begin: usize,
    plane_row: usize,
    plane_col: usize,
    #[comptime] packing: Packing,
    #[comptime] tile: MatrixTile,
) {
    let width = NV::value();
    let fragment = comptime!(tile.fragment);
    let down = comptime!(tile.plane_rows / fragment.m);
    let across = comptime!(tile.plane_cols / fragment.n);
    let (x_row, w_row) = comptime!((tile.x_row(), tile.w_row(packing.along_cols)));
    let steps = comptime!(tile.depth / tile.fragment.k);
    #[unroll(steps <= 2)]
    for step in 0..steps {
        let inner = step * tile.fragment.k;
        let mut columns = Sequence::<cmma::Matrix<T>>::new();
        #[unroll]
        for j in 0..across {
            let col = plane_col + comptime!(j * tile.fragment.n);
            let (at, layout) = if packing.along_cols {
                (inner * w_row + col, MatrixLayout::RowMajor)
            } else {
                (col * w_row + inner, MatrixLayout::ColMajor)
            };
            columns.push(read::<T, NV>(
                w_tile,
                w_begin + at / width,
                w_row,
                MatrixIdent::B,
                layout,
                fragment,
            ));
        }
        #[unroll]
        for i in 0..down {
            let row = plane_row + comptime!(i * tile.fragment.m);
            let at = x_begin + (row * x_row + inner) / width;
            let rows = read::<T, NV>(
                x_tile,
                at,
                x_row,
                MatrixIdent::A,
                MatrixLayout::RowMajor,
                fragment,
            );
            #[unroll]
            for j in 0..across {
                let sum = &sums[comptime!(i * across + j)];
                cmma::execute(&rows, &columns[j], sum, sum);
            }
        }
    }
}

/// The tile that a candidate computes a product with; `None` if it does not use matrix units, or the device has none for
/// these types.
pub fn tile(operands: &Operands, candidate: Candidate) -> Option<MatrixTile> {
    let tile: fn(Fragment, usize) -> MatrixTile = match candidate {
        Candidate::MatrixLarge => MatrixTile::large,
        Candidate::MatrixSmall => MatrixTile::small,
        Candidate::Units | Candidate::Composed => return None,
    };
    let properties = operands.x.client.properties();
    let fragment = Fragment::of(properties, operands.x.dtype)?;
    let hardware = &properties.hardware;
    [2, 1]
        .map(|copies| tile(fragment, copies))
        .into_iter()
        .find(|tile| {
            tile.shared_bytes(operands.packing.along_cols) <= hardware.max_shared_memory_size
                && tile.units() <= hardware.max_units_per_cube as usize
        })
}

/// Values of a vector in shared memory: 16 bytes where the compiler has such vectors, else 8.
pub fn width(client: &Client) -> usize {
    if client.properties().hardware.max_vector_size >= 8 {
        8
    } else {
        4
    }
}

/// Values of a vector of x, and words of a vector of W, that this product allows.
pub fn vectors(operands: &Operands, width: usize) -> (usize, usize) {
    let ([_, k, m], packing) = (operands.product.lengths, operands.packing);
    let [x_row, _, words_row, _] = operands.rows();
    let wide = k.is_multiple_of(width) && x_row.is_multiple_of(width);
    let values = 4 * 32 / packing.bits;
    let along = if packing.along_cols { m } else { k };
    let four_words = along.is_multiple_of(values)
        && words_row.is_multiple_of(4)
        && packing.block.is_multiple_of(values);
    (if wide { width } else { 1 }, if four_words { 4 } else { 1 })
}

/// Launches [`matrix_product`].
pub fn launch(operands: &Operands, tile: MatrixTile) -> [CubeTensor; 2] {
    let ([n, _, m], packing) = (operands.product.lengths, operands.packing);
    let width = width(&operands.x.client);
    let (x_vector, word_vector) = vectors(operands, width);
    let [x, low, b, sum, out] = operands.elements();
    let [output, other] = operands.outputs();
    launch!(
        matrix_product::launch_unchecked,
        operands.x.client,
        tile.cubes(n, m),
        CubeDim::new_2d(tile.fragment.plane as u32, tile.planes() as u32),
        [x_vector, word_vector, operands.out_vector()],
        [
            operands.x,
            operands.words,
            operands.scales,
            operands.low,
            operands.b,
            operands.sum,
            output,
            other
        ],
        operands.lengths_arg(),
        packing,
        tile,
        operands.ending,
        [x, x, low, b, sum, out],
        width,
    );
    [output, other]
}
