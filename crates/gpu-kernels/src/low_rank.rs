//! The products of low rank of up to three layers, one launch for all of them: γ·x·A and γ·G·Bᵀ (long sums, few
//! columns), and the gradients of A and B (sums over tokens).
//!
//! ```text
//! columns: 16 rows × 4 units, each with a quarter of    gradients: 64 columns × 4 units, each with a quarter of the
//!          the sum and 8 columns in registers            tokens and 8 rows in registers
//!   x ──┐                                                  low, transposed ──┐
//!       × A (64 × 8 in shared memory)                                       × x or G (read in order)
//! ```
//!
//! The four partial sums of an output meet in shared memory and are added in order: results do not depend on timing.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::fault::{self, Fault};
use super::launch::{dims, element, empty, strides, with_contiguous_rows};

type F4 = Vector<f32, Const<4>>;

/// Layers of a launch.
pub const MEMBERS: usize = 3;
const UNITS: usize = 64;
/// Units that share an output, each with its part of the sum.
const PARTS: usize = 4;
/// Rows of a workgroup of [`columns`].
const ROWS: usize = UNITS / PARTS;
/// The part of the sum whose factors are in shared memory, in [`columns`].
const DEPTH: usize = 64;
/// Rows or columns of low rank in a unit's registers.
const FEW: usize = 8;
/// Columns of a workgroup of [`gradients`].
const WIDE: usize = (UNITS / PARTS) * 4;
/// Tokens whose factors of low rank are in shared memory, in [`gradients`].
const TOKENS: usize = 32;

const fn parts_of(fault: Fault) -> usize {
    match fault {
        Fault::Part => PARTS - 1,
        _ => PARTS,
    }
}

/// The sizes of one layer's product.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Member {
    /// Rows or columns of low rank; 0 for a layer that is not there.
    rank: usize,
    /// The first column of the layer's part of the tensor that all share.
    first: usize,
    /// The length of the sum, or the number of columns.
    length: usize,
    /// The distance of two rows of the wide factor.
    wide_row: usize,
    /// The distances of rows and of columns of the small factor or of the output.
    row: usize,
    /// See `row`.
    col: usize,
    /// The product's factor.
    scale: f32,
}

/// `output[row, first..first + rank] = scale · x[row, ..] · factor[.., ..rank]` of one layer.
#[cube]
fn columns_of<X: Float, A: Float, O: Float>(
    x: &[Vector<X, Const<4>>],
    factor: &[A],
    output: &mut [O],
    tile: &mut Shared<[F4]>,
    partial: &mut Shared<[F4]>,
    member: &Member,
    rows: usize,
    all: usize,
    #[comptime] fault: Fault,
) {
    let unit = UNIT_POS as usize;
    let part = unit % PARTS;
    let row = CUBE_POS_X as usize * ROWS + unit / PARTS;
    let first_col = CUBE_POS_Z as usize * FEW;
    let mut sums = Array::<F4>::new(comptime!(FEW / 4));
    #[unroll]
    for i in 0..comptime!(FEW / 4) {
        sums[i] = F4::new(0.0f32);
    }
    for step in 0..member.length.div_ceil(DEPTH) {
        for i in range_stepped(unit, comptime!(DEPTH * FEW / 4), UNITS) {
            let inner = step * DEPTH + i / comptime!(FEW / 4);
            let col = first_col + (i % comptime!(FEW / 4)) * 4;
            let mut values = F4::new(0.0f32);
            #[unroll]
            for j in 0..4usize {
                if inner < member.length && col + j < member.rank {
                    values.insert(
                        j,
                        f32::cast_from(factor[inner * member.row + (col + j) * member.col]),
                    );
                }
            }
            tile[i] = values;
        }
        sync_cube();
        for i in range_stepped(part, comptime!(DEPTH / 4), PARTS) {
            let inner = step * DEPTH + i * 4;
            let mut values = F4::new(0.0f32);
            if row < rows && inner < member.length {
                values = F4::cast_from(x[(row * member.wide_row + inner) / 4]);
            }
            #[unroll]
            for j in 0..4usize {
                let value = F4::new(values.extract(j));
                #[unroll]
                for col in 0..comptime!(FEW / 4) {
                    sums[col] = fma(
                        value,
                        tile[(i * 4 + j) * comptime!(FEW / 4) + col],
                        sums[col],
                    );
                }
            }
        }
        sync_cube();
    }
    #[unroll]
    for col in 0..comptime!(FEW / 4) {
        partial[unit * comptime!(FEW / 4) + col] = sums[col];
    }
    sync_cube();
    if part == 0 && row < rows {
        #[unroll]
        for col in 0..comptime!(FEW / 4) {
            let mut sum = partial[unit * comptime!(FEW / 4) + col];
            #[unroll]
            for other in 1..comptime!(parts_of(fault)) {
                sum += partial[(unit + other) * comptime!(FEW / 4) + col];
            }
            #[unroll]
            for j in 0..4usize {
                let at = first_col + comptime!(col * 4 + j);
                if at < member.rank {
                    output[row * all + member.first + at] =
                        O::cast_from(sum.extract(j) * member.scale);
                }
            }
        }
    }
}

/// `output[a, b] = scale · Σ low[token, first + a] · wide[token, b]` of one layer. If `normed`, `wide` is the input of an
/// RMSNorm whose output is meant: times `inverse[token] · gain[b]`.
#[cube]
fn gradient_of<L: Float, X: Float>(
    low: &[L],
    wide: &[Vector<X, Const<4>>],
    inverse: &[f32],
    gain: &[f32],
    output: &mut [f32],
    tile: &mut Shared<[F4]>,
    partial: &mut Shared<[F4]>,
    member: &Member,
    tokens: usize,
    all: usize,
    #[comptime] normed: bool,
    #[comptime] fault: Fault,
) {
    let unit = UNIT_POS as usize;
    let part = unit / comptime!(UNITS / PARTS);
    let col = CUBE_POS_X as usize * WIDE + (unit % comptime!(UNITS / PARTS)) * 4;
    let first_row = CUBE_POS_Z as usize * FEW;
    let mut sums = Array::<F4>::new(FEW);
    #[unroll]
    for i in 0..FEW {
        sums[i] = F4::new(0.0f32);
    }
    for step in 0..tokens.div_ceil(TOKENS) {
        for i in range_stepped(unit, comptime!(TOKENS * FEW / 4), UNITS) {
            let token = step * TOKENS + i / comptime!(FEW / 4);
            let row = first_row + (i % comptime!(FEW / 4)) * 4;
            let mut values = F4::new(0.0f32);
            #[unroll]
            for j in 0..4usize {
                if token < tokens && row + j < member.rank {
                    let mut value = f32::cast_from(low[token * all + member.first + row + j]);
                    if normed {
                        value *= inverse[token];
                    }
                    values.insert(j, value);
                }
            }
            tile[i] = values;
        }
        sync_cube();
        for i in range_stepped(part, TOKENS, PARTS) {
            let token = step * TOKENS + i;
            if token < tokens && col < member.length {
                let values = F4::cast_from(wide[(token * member.wide_row + col) / 4]);
                #[unroll]
                for quarter in 0..comptime!(FEW / 4) {
                    let factors = tile[i * comptime!(FEW / 4) + quarter];
                    #[unroll]
                    for j in 0..4usize {
                        let at = comptime!(quarter * 4 + j);
                        sums[at] = fma(F4::new(factors.extract(j)), values, sums[at]);
                    }
                }
            }
        }
        sync_cube();
    }
    #[unroll]
    for i in 0..FEW {
        partial[i * UNITS + unit] = sums[i];
    }
    sync_cube();
    // Each of the four units of a column finishes a quarter of the rows.
    #[unroll]
    for i in 0..comptime!(FEW / PARTS) {
        let row = part * comptime!(FEW / PARTS) + i;
        let at = row * UNITS + unit % comptime!(UNITS / PARTS);
        let mut sum = partial[at];
        #[unroll]
        for other in 1..comptime!(parts_of(fault)) {
            sum += partial[at + comptime!(other * UNITS / PARTS)];
        }
        if first_row + row < member.rank && col < member.length {
            #[unroll]
            for j in 0..4usize {
                let mut value = sum.extract(j) * member.scale;
                if comptime!(normed && fault != Fault::Gain) {
                    value *= gain[col + j];
                }
                output[(first_row + row) * member.row + (col + j) * member.col] = value;
            }
        }
    }
}

/// [`columns_of`] for each layer; all write their columns of one output.
#[cube(launch_unchecked)]
pub fn columns<X: Float, A: Float, O: Float>(
    x0: &[Vector<X, Const<4>>],
    x1: &[Vector<X, Const<4>>],
    x2: &[Vector<X, Const<4>>],
    factor0: &[A],
    factor1: &[A],
    factor2: &[A],
    output: &mut [O],
    member0: Member,
    member1: Member,
    member2: Member,
    rows: usize,
    all: usize,
    #[comptime] fault: Fault,
    #[define(X, A, O)] _types: [ElemType; 3],
) {
    let mut tile = Shared::<[F4]>::new_slice(comptime!(DEPTH * FEW / 4));
    let mut partial = Shared::<[F4]>::new_slice(comptime!(UNITS * FEW / 4));
    if CUBE_POS_Y == 0 {
        columns_of::<X, A, O>(
            x0,
            factor0,
            output,
            &mut tile,
            &mut partial,
            &member0,
            rows,
            all,
            fault,
        );
    } else if CUBE_POS_Y == 1 {
        columns_of::<X, A, O>(
            x1,
            factor1,
            output,
            &mut tile,
            &mut partial,
            &member1,
            rows,
            all,
            fault,
        );
    } else {
        columns_of::<X, A, O>(
            x2,
            factor2,
            output,
            &mut tile,
            &mut partial,
            &member2,
            rows,
            all,
            fault,
        );
    }
}

/// [`gradient_of`] for each layer.
#[cube(launch_unchecked)]
pub fn gradients<L: Float, X: Float>(
    low: &[L],
    wide0: &[Vector<X, Const<4>>],
    wide1: &[Vector<X, Const<4>>],
    wide2: &[Vector<X, Const<4>>],
    inverse: &[f32],
    gain: &[f32],
    output0: &mut [f32],
    output1: &mut [f32],
    output2: &mut [f32],
    member0: Member,
    member1: Member,
    member2: Member,
    tokens: usize,
    all: usize,
    #[comptime] normed: bool,
    #[comptime] fault: Fault,
    #[define(L, X)] _types: [ElemType; 2],
) {
    let mut tile = Shared::<[F4]>::new_slice(comptime!(TOKENS * FEW / 4));
    let mut partial = Shared::<[F4]>::new_slice(comptime!(UNITS * FEW));
    if CUBE_POS_Y == 0 {
        gradient_of::<L, X>(
            low,
            wide0,
            inverse,
            gain,
            output0,
            &mut tile,
            &mut partial,
            &member0,
            tokens,
            all,
            normed,
            fault,
        );
    } else if CUBE_POS_Y == 1 {
        gradient_of::<L, X>(
            low,
            wide1,
            inverse,
            gain,
            output1,
            &mut tile,
            &mut partial,
            &member1,
            tokens,
            all,
            normed,
            fault,
        );
    } else {
        gradient_of::<L, X>(
            low,
            wide2,
            inverse,
            gain,
            output2,
            &mut tile,
            &mut partial,
            &member2,
            tokens,
            all,
            normed,
            fault,
        );
    }
}

fn launched([rank, first, length, wide_row, row, col]: [usize; 6], scale: f32) -> MemberLaunch {
    MemberLaunch::new(rank, first, length, wide_row, row, col, scale)
}

/// Launches [`columns`]: `[x₀·F₀·γ₀ | x₁·F₁·γ₁ | x₂·F₂·γ₂]`. Layers that are not there have the rank 0.
///
/// # Shapes
///
/// - `wide`: `[n, length]` each, of one type
/// - `factors`: `[length, rank]` each, any strides, of one type
/// - output: `[n, Σ rank]`
pub fn launch_columns(
    wide: [CubeTensor; MEMBERS],
    factors: [CubeTensor; MEMBERS],
    ranks: [usize; MEMBERS],
    scales: [f32; MEMBERS],
    dtype: DType,
) -> CubeTensor {
    let wide = wide.map(with_contiguous_rows);
    let (n, all) = (dims(&wide[0])[0], ranks.iter().sum());
    let output = empty(&wide[0], [n, all], dtype);
    let elements = [
        element(wide[0].dtype),
        element(factors[0].dtype),
        element(dtype),
    ];
    let mut first = 0;
    let [member0, member1, member2] = std::array::from_fn(|i| {
        first += ranks[i];
        let [row, col] = strides(&factors[i]);
        let sizes = [
            ranks[i],
            first - ranks[i],
            dims(&wide[i])[1],
            strides(&wide[i])[0],
            row,
            col,
        ];
        launched(sizes, scales[i])
    });
    let largest = ranks.iter().copied().max().unwrap_or(0);
    let members = ranks.iter().filter(|rank| **rank > 0).count();
    let client = output.client.clone();
    let [x0, x1, x2] = wide.map(CubeTensor::into_buffer_arg);
    let [factor0, factor1, factor2] = factors.map(CubeTensor::into_buffer_arg);
    unsafe {
        columns::launch_unchecked(
            &client,
            CubeCount::Static(
                n.div_ceil(ROWS) as u32,
                members as u32,
                largest.div_ceil(FEW) as u32,
            ),
            CubeDim::new_1d(UNITS as u32),
            x0,
            x1,
            x2,
            factor0,
            factor1,
            factor2,
            output.clone().into_buffer_arg(),
            member0,
            member1,
            member2,
            n,
            all,
            fault::current(),
            elements,
        );
    }
    output
}

/// Launches [`gradients`]: per layer `γ · lowᵀ · wide`, transposed to `[length, rank]` if `transposed`, in f32. With a
/// `norm`, the factors of rows and the gain of an RMSNorm, `wide` is the norm's input and its output is meant.
///
/// # Shapes
///
/// - `low`: `[n, Σ rank]`
/// - `wide`: `[n, length]` each, of one type
/// - `norm`: `[n, 1]` and `[1, length]`, f32
/// - outputs: `[rank, length]` each
pub fn launch_gradients(
    low: CubeTensor,
    wide: [CubeTensor; MEMBERS],
    ranks: [usize; MEMBERS],
    scales: [f32; MEMBERS],
    transposed: bool,
    norm: Option<[CubeTensor; 2]>,
) -> [CubeTensor; MEMBERS] {
    let normed = norm.is_some();
    // Something has to be bound in the place of what is not read.
    let norm = norm.unwrap_or_else(|| [low.clone(), low.clone()]);
    let [inverse, gain] = norm.map(|tensor| into_contiguous(tensor).into_buffer_arg());
    let (low, wide) = (with_contiguous_rows(low), wide.map(with_contiguous_rows));
    let (n, all) = (dims(&low)[0], strides(&low)[0]);
    let outputs: [CubeTensor; MEMBERS] = std::array::from_fn(|i| {
        let (rank, length) = (ranks[i].max(1), dims(&wide[i])[1]);
        let shape = if transposed {
            [length, rank]
        } else {
            [rank, length]
        };
        // A layer that is not there has an output that is not read.
        empty(&low, if ranks[i] == 0 { [1, 1] } else { shape }, DType::F32)
    });
    let mut first = 0;
    let [member0, member1, member2] = std::array::from_fn(|i| {
        first += ranks[i];
        let length = dims(&wide[i])[1];
        let [row, col] = if transposed {
            [1, ranks[i]]
        } else {
            [length, 1]
        };
        let sizes = [
            ranks[i],
            first - ranks[i],
            length,
            strides(&wide[i])[0],
            row,
            col,
        ];
        launched(sizes, scales[i])
    });
    let largest = ranks.iter().copied().max().unwrap_or(0);
    let longest = wide.iter().map(|wide| dims(wide)[1]).max().unwrap_or(0);
    let members = ranks.iter().filter(|rank| **rank > 0).count();
    let elements = [element(low.dtype), element(wide[0].dtype)];
    let client = low.client.clone();
    let [wide0, wide1, wide2] = wide.map(CubeTensor::into_buffer_arg);
    let [output0, output1, output2] = outputs.clone().map(CubeTensor::into_buffer_arg);
    unsafe {
        gradients::launch_unchecked(
            &client,
            CubeCount::Static(
                longest.div_ceil(WIDE) as u32,
                members as u32,
                largest.div_ceil(FEW) as u32,
            ),
            CubeDim::new_1d(UNITS as u32),
            low.into_buffer_arg(),
            wide0,
            wide1,
            wide2,
            inverse,
            gain,
            output0,
            output1,
            output2,
            member0,
            member1,
            member2,
            n,
            all,
            normed,
            fault::current(),
            elements,
        );
    }
    outputs
}
