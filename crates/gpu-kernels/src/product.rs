//! Products with a frozen weight whose packed words are widened while a tile is loaded: no dense weight in memory.
//!
//! ```text
//!               W: cols = 64 columns, depth = 16 of the inner dimension at a time
//!              ┌────────────┐
//!              │ w_tile     │ packed words → f32 (times the block's scale) in shared memory
//!   x_tile     └────────────┘
//!  ┌────────┐  ┌────────────┐
//!  │ rows   │  │ 8 × 8 sums │ in registers of each unit; 64 units
//!  └────────┘  └────────────┘
//! ```
//!
//! A workgroup computes `rows × cols` outputs, each of its units `unit_rows × unit_cols` of them. For every step of
//! `depth` along the inner dimension, the units copy a tile of x and a tile of W into shared memory, wait, and multiply
//! them. After that each unit adds its part of the low-rank term `low · B` straight from memory, because the rank is
//! small. Then the sum is read and the output written, once each.

use burn::backend::ops::FloatTensorOps as _;
use burn::tensor::{DType, Slice};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::cast;
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::kernel::quantization::dequantize;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::choice::{self, Candidate, Product};
use super::ending::{Ending, finish};
use super::fault::{self, Fault};
use super::few_rows::{self, FEW_ROWS, columns_of, rows_of};
use super::fragment::Fragment;
use super::launch::{dims, element, empty, launch, owned, strides, with_contiguous_rows};
use super::{matrix_product, plane_product, swiglu};

/// The shape of a workgroup's tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows of the output.
    pub rows: usize,
    /// Columns of the output.
    pub cols: usize,
    /// The part of the inner dimension that is in shared memory at a time.
    pub depth: usize,
    /// Rows of the output of one unit.
    pub unit_rows: usize,
    /// Columns of the output of one unit.
    pub unit_cols: usize,
}

/// Few registers per unit, so that many workgroups run at a time.
pub const TILE: Tile = Tile {
    rows: 64,
    cols: 64,
    depth: 16,
    unit_rows: 8,
    unit_cols: 8,
};

impl Tile {
    /// The units of a workgroup.
    pub const fn units(self) -> usize {
        (self.rows / self.unit_rows) * (self.cols / self.unit_cols)
    }

    /// One workgroup per tile of an output `[n, m]`.
    pub fn cubes(self, n: usize, m: usize) -> CubeCount {
        let (across, down) = (m.div_ceil(self.cols), n.div_ceil(self.rows));
        CubeCount::Static(across as u32, down as u32, 1)
    }

    /// Vectors of a row of x in shared memory: one more than the tile has, so that units of different rows read
    /// different banks.
    pub const fn row_of_x(self) -> usize {
        self.depth / 4 + 1
    }

    /// Vectors of a tile of W in shared memory.
    pub const fn w_vectors(self, along_cols: bool) -> usize {
        if along_cols {
            self.depth * self.cols / 4
        } else {
            self.cols * self.row_of_x()
        }
    }
}

/// How a weight lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Packing {
    /// Bits of an integer: 4 or 8.
    pub bits: usize,
    /// Integers that share a scale.
    pub block: usize,
    /// Whether words lie along the output's columns (else along the inner dimension).
    pub along_cols: bool,
    /// For tests.
    pub fault: Fault,
}

/// The lengths of a product.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Lengths {
    /// Rows of x and of the output.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
    /// Columns of the output.
    pub m: usize,
    /// The inner dimension of the low-rank term; 0 without one.
    pub rank: usize,
    /// The first column of `low`.
    pub low_first: usize,
    /// The distance of two rows of x, of the sum, of the packed words and of the scales.
    pub x_row: usize,
    /// See `x_row`.
    pub sum_row: usize,
    /// See `x_row`.
    pub words_row: usize,
    /// See `x_row`.
    pub scales_row: usize,
    /// The distances of rows and of columns of `low`, `[n, rank]`, and of B, `[rank, m]`.
    pub low_row: usize,
    /// See `low_row`.
    pub low_col: usize,
    /// See `low_row`.
    pub b_row: usize,
    /// See `low_row`.
    pub b_col: usize,
}

/// `x · W [+ low · B]` with an [`Ending`].
#[cube(launch_unchecked)]
pub fn product<X: Float, NX: Size, L: Float, B: Float, S: Float, NM: Size, O: Float>(
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
    let first_row = CUBE_POS_Y as usize * tile.rows;
    let first_col = CUBE_POS_X as usize * tile.cols;
    let (unit_row, unit_col) = place_of_unit(tile);

    let mut x_tile =
        Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(tile.rows * tile.row_of_x()));
    let mut w_tile =
        Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(tile.w_vectors(packing.along_cols)));
    let mut sums =
        Array::<Vector<f32, Const<4>>>::new(comptime!(tile.unit_rows * tile.unit_cols / 4));
    #[unroll]
    for i in 0..comptime!(tile.unit_rows * tile.unit_cols / 4) {
        sums[i] = Vector::new(0.0f32);
    }

    accumulate(
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

    let in_vector = NM::value();
    #[unroll]
    for i in 0..tile.unit_rows {
        let row = first_row + unit_row + i;
        #[unroll]
        for j in 0..comptime!(tile.unit_cols / in_vector) {
            let col = first_col + unit_col + comptime!(j * in_vector);
            if row < lengths.n && col < lengths.m {
                finish::<S, O, NM>(
                    vector_of::<NM>(&sums, comptime!(i * tile.unit_cols + j * in_vector)),
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

/// The first row and column of a unit's outputs in a workgroup's tile.
#[cube]
pub fn place_of_unit(#[comptime] tile: Tile) -> (usize, usize) {
    let per_row = comptime!(tile.cols / tile.unit_cols);
    let unit = UNIT_POS as usize;
    (
        (unit / per_row) * tile.unit_rows,
        (unit % per_row) * tile.unit_cols,
    )
}

/// The vector of a unit's sums that begins with the value number `first`.
#[cube]
pub fn vector_of<N: Size>(
    sums: &Array<Vector<f32, Const<4>>>,
    #[comptime] first: usize,
) -> Vector<f32, N> {
    let width = N::value();
    let mut value = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for part in 0..width {
        let at = comptime!(first + part);
        value.insert(part, sums[comptime!(at / 4)].extract(comptime!(at % 4)));
    }
    value
}

/// Adds `x · W [+ low · B]` to the sums of a workgroup's units.
#[cube]
pub fn accumulate<X: Float, NX: Size, L: Float, B: Float>(
    x: &[Vector<X, NX>],
    words: &[u32],
    scales: &[f32],
    low: &[L],
    b: &[B],
    x_tile: &mut Shared<[Vector<f32, Const<4>>]>,
    w_tile: &mut Shared<[Vector<f32, Const<4>>]>,
    sums: &mut Array<Vector<f32, Const<4>>>,
    first_row: usize,
    first_col: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: Tile,
) {
    let unit = UNIT_POS as usize;
    let (unit_row, unit_col) = place_of_unit(tile);
    let mut steps = lengths.k.div_ceil(tile.depth);
    if comptime!(packing.fault == Fault::Depth) {
        steps -= 1;
    }
    for step in 0..steps {
        let first = step * tile.depth;
        load_x(x, x_tile, first, first_row, unit, lengths, tile);
        load_packed(
            words, scales, w_tile, first, first_col, unit, lengths, packing, tile,
        );
        sync_cube();
        if packing.along_cols {
            multiply_outer(&*x_tile, &*w_tile, sums, unit_row, unit_col, tile);
        } else {
            multiply_dots(&*x_tile, &*w_tile, sums, unit_row, unit_col, tile);
        }
        sync_cube();
    }
    add_low_rank(
        low,
        b,
        sums,
        first_row + unit_row,
        first_col + unit_col,
        lengths,
        tile,
    );
}

/// Copies a tile of x to shared memory, `[rows, depth]`; zeros outside x.
#[cube]
fn load_x<X: Float, NX: Size>(
    x: &[Vector<X, NX>],
    x_tile: &mut Shared<[Vector<f32, Const<4>>]>,
    first: usize,
    first_row: usize,
    unit: usize,
    lengths: &Lengths,
    #[comptime] tile: Tile,
) {
    let width = comptime!(tile.depth / 4);
    let in_vector = NX::value();
    for i in range_stepped(
        unit,
        comptime!(tile.rows * tile.depth / 4),
        comptime!(tile.units()),
    ) {
        let row = first_row + i / width;
        let inner = first + (i % width) * 4;
        let mut value = Vector::<f32, Const<4>>::new(0.0f32);
        if row < lengths.n {
            let at = row * lengths.x_row + inner;
            if comptime!(in_vector == 4) {
                if inner < lengths.k {
                    value = Vector::cast_from(x[at / 4]);
                }
            } else {
                #[unroll]
                for j in 0..4 {
                    if inner + j < lengths.k {
                        value.insert(j, f32::cast_from(x[at + j].extract(0usize)));
                    }
                }
            }
        }
        x_tile[(i / width) * comptime!(tile.row_of_x()) + i % width] = value;
    }
}

/// Copies a tile of a packed weight to shared memory; zeros outside the weight. Words along columns: `[depth, cols]`,
/// words along the inner dimension: `[cols, depth]`.
#[cube]
fn load_packed(
    words: &[u32],
    scales: &[f32],
    w_tile: &mut Shared<[Vector<f32, Const<4>>]>,
    first: usize,
    first_col: usize,
    unit: usize,
    lengths: &Lengths,
    #[comptime] packing: Packing,
    #[comptime] tile: Tile,
) {
    let in_word = comptime!(32 / packing.bits);
    let units = comptime!(tile.units());
    let (outer, along) = comptime!(if packing.along_cols {
        (tile.depth, tile.cols)
    } else {
        (tile.cols, tile.depth)
    });
    let skipped = comptime!(if packing.fault == Fault::Scale {
        1usize
    } else {
        0usize
    });
    let in_row = comptime!(along / in_word);
    let width = comptime!(if packing.along_cols {
        tile.cols / 4
    } else {
        tile.row_of_x()
    });
    for i in range_stepped(unit, comptime!(outer * in_row), units) {
        let at_outer = i / in_row;
        let at_along = (i % in_row) * in_word;
        let mut word = 0u32;
        let mut scale = 0.0f32;
        if packing.along_cols {
            let (row, col) = (first + at_outer, first_col + at_along);
            if row < lengths.k && col < lengths.m {
                word = words[row * lengths.words_row + col / in_word];
                scale = scales[row * lengths.scales_row + col / packing.block + skipped];
            }
        } else {
            let (row, col) = (first + at_along, first_col + at_outer);
            if row < lengths.k && col < lengths.m {
                word = words[col * lengths.words_row + row / in_word];
                scale = scales[col * lengths.scales_row + row / packing.block + skipped];
            }
        }
        #[unroll]
        for part in 0..comptime!(in_word / 4) {
            let mut values = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for j in 0..4 {
                values.insert(
                    j,
                    widen(word, comptime!(4 * part + j), packing.bits) * scale,
                );
            }
            w_tile[at_outer * width + at_along / 4 + part] = values;
        }
    }
}

/// The signed integer at a place of a word, the first in the lowest bits.
#[cube]
pub fn widen(word: u32, #[comptime] place: usize, #[comptime] bits: usize) -> f32 {
    let up = comptime!((32 - bits * (place + 1)) as u32);
    let down = comptime!((32 - bits) as i32);
    f32::cast_from(i32::cast_from(word << up) >> down)
}

/// Adds a unit's part of the product of two tiles in shared memory to its sums; W is `[depth, cols]`.
#[cube]
fn multiply_outer(
    x_tile: &Shared<[Vector<f32, Const<4>>]>,
    w_tile: &Shared<[Vector<f32, Const<4>>]>,
    sums: &mut Array<Vector<f32, Const<4>>>,
    unit_row: usize,
    unit_col: usize,
    #[comptime] tile: Tile,
) {
    let vectors = comptime!(tile.unit_cols / 4);
    for inner in 0..comptime!(tile.depth / 4) {
        let mut w = Array::<Vector<f32, Const<4>>>::new(comptime!(4 * vectors));
        #[unroll]
        for step in 0..4 {
            #[unroll]
            for j in 0..vectors {
                w[comptime!(step * vectors + j)] =
                    w_tile[(inner * 4 + step) * comptime!(tile.cols / 4) + unit_col / 4 + j];
            }
        }
        #[unroll]
        for i in 0..tile.unit_rows {
            let x = x_tile[(unit_row + i) * comptime!(tile.row_of_x()) + inner];
            #[unroll]
            for step in 0..4 {
                let factor = Vector::<f32, Const<4>>::new(x.extract(step));
                #[unroll]
                for j in 0..vectors {
                    let at = comptime!(i * vectors + j);
                    sums[at] = fma(factor, w[comptime!(step * vectors + j)], sums[at]);
                }
            }
        }
    }
}

/// As [`multiply_outer`], with W as `[cols, depth]`.
#[cube]
fn multiply_dots(
    x_tile: &Shared<[Vector<f32, Const<4>>]>,
    w_tile: &Shared<[Vector<f32, Const<4>>]>,
    sums: &mut Array<Vector<f32, Const<4>>>,
    unit_row: usize,
    unit_col: usize,
    #[comptime] tile: Tile,
) {
    let vectors = comptime!(tile.unit_cols / 4);
    for inner in 0..comptime!(tile.depth / 4) {
        let mut w = Array::<Vector<f32, Const<4>>>::new(tile.unit_cols);
        #[unroll]
        for j in 0..tile.unit_cols {
            w[j] = w_tile[(unit_col + j) * comptime!(tile.row_of_x()) + inner];
        }
        #[unroll]
        for i in 0..tile.unit_rows {
            let x = x_tile[(unit_row + i) * comptime!(tile.row_of_x()) + inner];
            #[unroll]
            for j in 0..vectors {
                let at = comptime!(i * vectors + j);
                let mut added = sums[at];
                #[unroll]
                for part in 0..4 {
                    let product = x * w[comptime!(4 * j + part)];
                    let dot = product.extract(0usize)
                        + product.extract(1usize)
                        + product.extract(2usize)
                        + product.extract(3usize);
                    added.insert(part, added.extract(part) + dot);
                }
                sums[at] = added;
            }
        }
    }
}

/// Adds `low · B` to a unit's sums, straight from memory: the rank is small.
#[cube]
fn add_low_rank<L: Float, B: Float>(
    low: &[L],
    b: &[B],
    sums: &mut Array<Vector<f32, Const<4>>>,
    first_row: usize,
    first_col: usize,
    lengths: &Lengths,
    #[comptime] tile: Tile,
) {
    let vectors = comptime!(tile.unit_cols / 4);
    for inner in 0..lengths.rank {
        let mut b_row = Array::<Vector<f32, Const<4>>>::new(vectors);
        #[unroll]
        for j in 0..vectors {
            let mut values = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for part in 0..4 {
                let col = first_col + comptime!(4 * j + part);
                if col < lengths.m {
                    values.insert(
                        part,
                        f32::cast_from(b[inner * lengths.b_row + col * lengths.b_col]),
                    );
                }
            }
            b_row[j] = values;
        }
        #[unroll]
        for i in 0..tile.unit_rows {
            let row = first_row + i;
            let mut value = 0.0f32;
            if row < lengths.n {
                value = f32::cast_from(
                    low[row * lengths.low_row + (lengths.low_first + inner) * lengths.low_col],
                );
            }
            let factor = Vector::<f32, Const<4>>::new(value);
            #[unroll]
            for j in 0..vectors {
                let at = comptime!(i * vectors + j);
                sums[at] = fma(factor, b_row[j], sums[at]);
            }
        }
    }
}

/// A term `low · B` of low rank.
pub struct LowRankTerm {
    /// `[n, columns of all layers]`, any strides.
    pub low: CubeTensor,
    /// The first column of this layer.
    pub first: usize,
    /// The number of columns of this layer.
    pub rank: usize,
    /// `[rank, m]`, any strides.
    pub b: CubeTensor,
}

/// The tensors of a product, ready for a launch.
#[derive(Clone)]
pub struct Operands {
    pub product: Product,
    pub packing: Packing,
    pub x: CubeTensor,
    weight: CubeTensor,
    transposed: bool,
    /// The parts of `weight`.
    pub words: CubeTensor,
    pub scales: CubeTensor,
    pub ending: Ending,
    /// SwiGLU's gate and up, if their gradients take their places.
    gate_up: Option<[CubeTensor; 2]>,
    /// `x` in place of a term that is not there, as are the next two.
    pub low: CubeTensor,
    pub b: CubeTensor,
    pub sum: CubeTensor,
    rank: usize,
    low_first: usize,
}

impl Operands {
    /// Operands of a product `[sum +] x · W [+ low · B]`, or with Wᵀ if `transposed`, in `dtype`.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, k]`
    /// - `weight`: `[k, m]`, with `transposed` `[m, k]`, quantized
    /// - `sum`, output: `[n, m]`
    pub fn new(
        sum: Option<CubeTensor>,
        x: CubeTensor,
        weight: CubeTensor,
        transposed: bool,
        low_rank: Option<LowRankTerm>,
        dtype: DType,
    ) -> Self {
        let DType::QFloat(scheme) = weight.dtype else {
            unreachable!("only quantized weights reach this kernel")
        };
        let (x, sum) = (with_contiguous_rows(x), sum.map(with_contiguous_rows));
        let types = [x.dtype, dtype];
        let product = Product::new(dims(&x)[0], dims(&weight), &scheme, transposed, types);
        let (words, scales) = weight
            .quantized_handles()
            .unwrap_or_else(|| unreachable!("a quantized weight has integers and scales"));
        let ending = match sum {
            Some(_) => Ending::Sum,
            None => Ending::Plain,
        };
        // An operand that is not there is never read; something has to be bound in its place.
        let nothing = || LowRankTerm {
            low: x.clone(),
            first: 0,
            rank: 0,
            b: x.clone(),
        };
        let LowRankTerm {
            low,
            first: low_first,
            rank,
            b,
        } = low_rank.unwrap_or_else(nothing);
        Self {
            product,
            packing: Packing {
                bits: product.bits,
                block: product.block,
                along_cols: product.along_cols,
                fault: fault::current(),
            },
            sum: sum.unwrap_or_else(|| x.clone()),
            x,
            weight,
            transposed,
            words,
            scales,
            ending,
            gate_up: None,
            low,
            b,
            rank,
            low_first,
        }
    }

    /// With a sum, `[n, m]`.
    pub fn with_sum(self, sum: CubeTensor) -> Self {
        Self {
            sum: with_contiguous_rows(sum),
            ending: Ending::Sum,
            ..self
        }
    }

    /// The product is SwiGLU's up; the outputs are up and SwiGLU's output. `gate`: `[n, m]`, of the output's type.
    pub fn behind_gate(self, gate: CubeTensor) -> Self {
        Self {
            sum: with_contiguous_rows(gate),
            ending: Ending::Gate,
            ..self
        }
    }

    /// The product is the gradient of SwiGLU's output; the outputs are the gradients of gate and up, in their memory if
    /// nothing else holds it. `gate`, `up`: `[n, m]`, of the output's type.
    pub fn before_gate(self, gate: CubeTensor, up: CubeTensor) -> Self {
        Self {
            gate_up: Some([gate, up].map(owned)),
            ending: Ending::GateBackward,
            ..self
        }
    }

    /// Whether a candidate can compute this product.
    pub fn can(&self, candidate: Candidate) -> bool {
        match candidate {
            Candidate::Composed => true,
            Candidate::MatrixLarge | Candidate::MatrixSmall => {
                matrix_product::tile(self, candidate).is_some()
            }
            // Matrix units are always faster.
            Candidate::Units => Fragment::of(self.x.client.properties(), self.x.dtype).is_none(),
        }
    }

    /// Launches a candidate that [can](Self::can). The second output means something if there is a gate.
    pub fn launch(self, candidate: Candidate) -> [CubeTensor; 2] {
        match matrix_product::tile(&self, candidate) {
            Some(tile) => matrix_product::launch(&self, tile),
            None if candidate == Candidate::Composed => launch_composed(self),
            None => launch_on_units(&self),
        }
    }

    fn has_gate(&self) -> bool {
        matches!(self.ending, Ending::Gate | Ending::GateBackward)
    }

    /// The product alone.
    #[cfg(feature = "autotune")]
    pub fn without_terms(&self) -> Self {
        Self {
            rank: 0,
            ending: Ending::Plain,
            gate_up: None,
            ..self.clone()
        }
    }

    /// Both outputs, to be written. The second is the first if there is none.
    pub fn outputs(&self) -> [CubeTensor; 2] {
        let ([n, _, m], [_, dtype]) = (self.product.lengths, self.product.types);
        let output = || empty(&self.x, [n, m], dtype);
        match (&self.gate_up, self.ending) {
            (Some(gate_up), _) => gate_up.clone(),
            (None, Ending::Gate) => [output(), output()],
            (None, _) => {
                let output = output();
                [output.clone(), output]
            }
        }
    }

    /// The distances of rows of x, of the sum, of the packed words and of the scales.
    pub fn rows(&self) -> [usize; 4] {
        // Words lie along one dimension of the weight; the other one is that of rows in memory.
        let words_lie_along_d_out = self.packing.along_cols != self.transposed;
        let row = usize::from(!words_lie_along_d_out);
        [
            strides(&self.x)[0],
            strides(&self.sum)[0],
            self.words.meta.strides()[row],
            self.scales.meta.strides()[row],
        ]
    }

    /// Values of a vector of x: 4 where rows allow it.
    pub fn x_vector(&self) -> usize {
        let aligned = self.product.lengths[1].is_multiple_of(4) && self.rows()[0].is_multiple_of(4);
        if aligned { 4 } else { 1 }
    }

    /// Values of a vector of the sum and of the output: 4 where rows allow it.
    pub fn out_vector(&self) -> usize {
        let sum_allows = !self.ending.reads_sum() || self.rows()[1].is_multiple_of(4);
        let aligned = self.product.lengths[2].is_multiple_of(4) && sum_allows;
        if aligned { 4 } else { 1 }
    }

    /// The types of x, both factors of the low-rank term, the sum and the output.
    pub fn elements(&self) -> [ElemType; 5] {
        let tensors = [&self.x, &self.low, &self.b, &self.sum].map(|tensor| tensor.dtype);
        let [x, low, b, sum] = tensors.map(element);
        [x, low, b, sum, element(self.product.types[1])]
    }

    pub fn lengths_arg(&self) -> LengthsLaunch {
        let [n, k, m] = self.product.lengths;
        let [x_row, sum_row, words_row, scales_row] = self.rows();
        let ([low_row, low_col], [b_row, b_col]) = (strides(&self.low), strides(&self.b));
        LengthsLaunch::new(
            n,
            k,
            m,
            self.rank,
            self.low_first,
            x_row,
            sum_row,
            words_row,
            scales_row,
            low_row,
            low_col,
            b_row,
            b_col,
        )
    }
}

/// Launches the forced candidate or else the fastest one. The second output means something if there is a gate.
pub fn launch(operands: Operands) -> [CubeTensor; 2] {
    match choice::forced().filter(|candidate| operands.can(*candidate)) {
        Some(candidate) => operands.launch(candidate),
        None if operands.product.lengths[0] < FEW_ROWS && !operands.has_gate() => {
            launch_few_rows(&operands)
        }
        None => {
            let candidate = choice::fastest(&operands);
            operands.launch(candidate)
        }
    }
}

/// Launches one of the kernels that take the same tensors, lengths and types: [`product`] and its variants.
macro_rules! launch_product {
    ($kernel:path, $operands:expr, $cubes:expr, $units:expr, [$($size:expr),*], $tile:expr) => {{
        let (operands, [output, other]) = ($operands, $operands.outputs());
        launch!(
            $kernel,
            operands.x.client,
            $cubes,
            CubeDim::new_1d($units as u32),
            [$($size),*],
            [operands.x, operands.words, operands.scales, operands.low, operands.b, operands.sum, output, other],
            operands.lengths_arg(),
            operands.packing,
            $tile,
            operands.ending,
            operands.elements(),
        );
        [output, other]
    }};
}

/// For few rows.
fn launch_few_rows(operands: &Operands) -> [CubeTensor; 2] {
    let [n, _, m] = operands.product.lengths;
    let (rows, columns) = (rows_of(n), columns_of(operands.packing));
    let cubes = CubeCount::Static(m.div_ceil(columns) as u32, n.div_ceil(rows) as u32, 1);
    launch_product!(
        few_rows::few_rows::launch_unchecked,
        operands,
        cubes,
        few_rows::UNITS,
        [],
        rows
    )
}

/// Burn's kernels: the weight dequantized into memory, then a product.
fn launch_composed(operands: Operands) -> [CubeTensor; 2] {
    let Operands {
        product,
        x,
        weight,
        transposed,
        ending,
        gate_up,
        low,
        b,
        sum,
        rank,
        low_first,
        ..
    } = operands;
    let [factors, dtype] = product.types;
    let mut weight = dequantize(weight, factors);
    if transposed {
        weight.meta.swap(0, 1);
    }
    let multiply = |left, right| {
        let product = matmul(left, right, None, MatmulStrategy::default(), factors);
        cast(product.unwrap_or_else(|error| panic!("{error:?}")), dtype)
    };
    let mut result = multiply(x, weight);
    if rank > 0 {
        let columns = Slice::from(low_first..low_first + rank);
        let low = CubeBackend::float_slice(low, &[Slice::from(..), columns]);
        let term = multiply(cast(low, factors), cast(b, factors));
        result = CubeBackend::float_add(result, term);
    }
    match (ending, gate_up) {
        (Ending::Gate, _) => [result.clone(), swiglu::launch(sum, result)],
        (_, Some([gate, up])) => {
            let (d_gate, d_up) = swiglu::launch_backward(gate, up, result);
            [d_gate, d_up]
        }
        (Ending::Sum, None) => {
            let sum = CubeBackend::float_add(sum, result);
            [sum.clone(), sum]
        }
        (_, None) => [result.clone(), result],
    }
}

/// Without matrix units.
fn launch_on_units(operands: &Operands) -> [CubeTensor; 2] {
    let [n, _, m] = operands.product.lengths;
    let vector = operands.x_vector();
    let (client, packing) = (&operands.x.client, operands.packing);
    if let Some(tile) = plane_product::Tile::of_software_driver(client, packing) {
        return launch_product!(
            plane_product::plane_product::launch_unchecked,
            operands,
            tile.cubes(n, m),
            tile.units,
            [vector, operands.out_vector()],
            tile
        );
    }
    launch_product!(
        product::launch_unchecked,
        operands,
        TILE.cubes(n, m),
        TILE.units(),
        [vector, operands.out_vector()],
        TILE
    )
}
