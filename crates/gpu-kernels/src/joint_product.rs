//! Sums of up to three products with packed weights in one launch: the gradient of an input that several layers share.
//!
//! ```text
//!            W₀ᵀ (q)                   W₁ᵀ (k)    W₂ᵀ (v)
//!   dQ  ───────────────────  dK ──────────  dV ──────────      the inner dimensions one behind the other,
//!           └──────────────── same sums in registers ─────┘    written once
//! ```
//!
//! The tiles are those of the product with one weight. Its partial sums stay in registers from one product to the next,
//! and never go through memory.

use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::{self, MatrixLayout};
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::choice::{self, Candidate};
use super::fault::Fault;
use super::few_rows::FEW_ROWS;
use super::fragment::zeros;
use super::launch::{empty, launch};
use super::low_rank::MEMBERS;
use super::matrix_product::{self, MatrixTile};
use super::plane_product;
use super::product::{self, Lengths, Operands, Packing, TILE, Tile};

type F4 = Vector<f32, Const<4>>;

/// Tensors of a launch. Some devices bind fewer.
const BINDINGS: usize = 4 * MEMBERS + 2;

const fn members_of(members: usize, fault: Fault) -> usize {
    match fault {
        Fault::Member => members - 1,
        _ => members,
    }
}

/// Writes the vector of outputs that begins at this row and column.
#[cube]
fn finish<O: Float, N: Size>(
    value: Vector<f32, N>,
    out: &mut [Vector<O, N>],
    row: usize,
    col: usize,
    lengths: &Lengths,
) {
    let width = N::value();
    if row < lengths.n && col < lengths.m {
        out[(row * lengths.m + col) / width] = Vector::cast_from(value);
    }
}

/// [`product::product`] of several members.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn on_units<X: Float, NX: Size, L: Float, B: Float, NM: Size, O: Float>(
    x0: &[Vector<X, NX>],
    x1: &[Vector<X, NX>],
    x2: &[Vector<X, NX>],
    words0: &[u32],
    words1: &[u32],
    words2: &[u32],
    scales0: &[f32],
    scales1: &[f32],
    scales2: &[f32],
    low: &[L],
    b0: &[B],
    b1: &[B],
    b2: &[B],
    out: &mut [Vector<O, NM>],
    lengths0: Lengths,
    lengths1: Lengths,
    lengths2: Lengths,
    #[comptime] members: usize,
    #[comptime] packing: Packing,
    #[comptime] tile: Tile,
    #[define(X, L, B, O)] _types: [ElemType; 4],
) {
    let first_row = CUBE_POS_Y as usize * tile.rows;
    let first_col = CUBE_POS_X as usize * tile.cols;
    let (unit_row, unit_col) = product::place_of_unit(tile);
    let mut x_tile = Shared::<[F4]>::new_slice(comptime!(tile.rows * tile.row_of_x()));
    let mut w_tile = Shared::<[F4]>::new_slice(comptime!(tile.w_vectors(packing.along_cols)));
    let mut sums = Array::<F4>::new(comptime!(tile.unit_rows * tile.unit_cols / 4));
    #[unroll]
    for i in 0..comptime!(tile.unit_rows * tile.unit_cols / 4) {
        sums[i] = F4::new(0.0f32);
    }
    product::accumulate(
        x0,
        words0,
        scales0,
        low,
        b0,
        &mut x_tile,
        &mut w_tile,
        &mut sums,
        first_row,
        first_col,
        &lengths0,
        packing,
        tile,
    );
    if comptime!(members > 1) {
        product::accumulate(
            x1,
            words1,
            scales1,
            low,
            b1,
            &mut x_tile,
            &mut w_tile,
            &mut sums,
            first_row,
            first_col,
            &lengths1,
            packing,
            tile,
        );
    }
    if comptime!(members > 2) {
        product::accumulate(
            x2,
            words2,
            scales2,
            low,
            b2,
            &mut x_tile,
            &mut w_tile,
            &mut sums,
            first_row,
            first_col,
            &lengths2,
            packing,
            tile,
        );
    }
    let in_vector = NM::value();
    #[unroll]
    for i in 0..tile.unit_rows {
        #[unroll]
        for j in 0..comptime!(tile.unit_cols / in_vector) {
            let col = first_col + unit_col + comptime!(j * in_vector);
            finish::<O, NM>(
                product::vector_of::<NM>(&sums, comptime!(i * tile.unit_cols + j * in_vector)),
                out,
                first_row + unit_row + i,
                col,
                &lengths0,
            );
        }
    }
}

/// [`plane_product::plane_product`] of several members.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn on_planes<X: Float, NX: Size, L: Float, B: Float, NM: Size, O: Float>(
    x0: &[Vector<X, NX>],
    x1: &[Vector<X, NX>],
    x2: &[Vector<X, NX>],
    words0: &[u32],
    words1: &[u32],
    words2: &[u32],
    scales0: &[f32],
    scales1: &[f32],
    scales2: &[f32],
    low: &[L],
    b0: &[B],
    b1: &[B],
    b2: &[B],
    out: &mut [Vector<O, NM>],
    lengths0: Lengths,
    lengths1: Lengths,
    lengths2: Lengths,
    #[comptime] members: usize,
    #[comptime] packing: Packing,
    #[comptime] tile: plane_product::Tile,
    #[define(X, L, B, O)] _types: [ElemType; 4],
) {
    let first_row = CUBE_POS_Y as usize * tile.rows;
    let first_col = (CUBE_POS_X as usize * tile.units + UNIT_POS as usize) * tile.cols;
    let mut sums = Array::<F4>::new(comptime!(tile.rows * tile.cols / 4));
    #[unroll]
    for i in 0..comptime!(tile.rows * tile.cols / 4) {
        sums[i] = F4::new(0.0f32);
    }
    plane_product::accumulate(
        x0, words0, scales0, low, b0, &mut sums, first_row, first_col, &lengths0, packing, tile,
    );
    if comptime!(members > 1) {
        plane_product::accumulate(
            x1, words1, scales1, low, b1, &mut sums, first_row, first_col, &lengths1, packing, tile,
        );
    }
    if comptime!(members > 2) {
        plane_product::accumulate(
            x2, words2, scales2, low, b2, &mut sums, first_row, first_col, &lengths2, packing, tile,
        );
    }
    let in_vector = NM::value();
    #[unroll]
    for i in 0..tile.rows {
        #[unroll]
        for j in 0..comptime!(tile.cols / in_vector) {
            finish::<O, NM>(
                product::vector_of::<NM>(&sums, comptime!(i * tile.cols + j * in_vector)),
                out,
                first_row + i,
                first_col + comptime!(j * in_vector),
                &lengths0,
            );
        }
    }
}

/// [`matrix_product::matrix_product`] of several members.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn on_matrix_units<
    X: Float,
    L: Float,
    B: Float,
    O: Float,
    NX: Size,
    NW: Size,
    NO: Size,
    NV: Size,
>(
    x0: &[Vector<X, NX>],
    x1: &[Vector<X, NX>],
    x2: &[Vector<X, NX>],
    words0: &[Vector<u32, NW>],
    words1: &[Vector<u32, NW>],
    words2: &[Vector<u32, NW>],
    scales0: &[f32],
    scales1: &[f32],
    scales2: &[f32],
    low: &[L],
    b0: &[B],
    b1: &[B],
    b2: &[B],
    out: &mut [Vector<O, NO>],
    lengths0: Lengths,
    lengths1: Lengths,
    lengths2: Lengths,
    #[comptime] members: usize,
    #[comptime] packing: Packing,
    #[comptime] tile: MatrixTile,
    #[define(X, L, B, O)] _types: [ElemType; 4],
    #[define(NV)] _size: usize,
) {
    let (width, out_width) = (NV::value(), NO::value());
    let first_row = CUBE_POS_X as usize * tile.rows;
    let first_col = CUBE_POS_Y as usize * tile.cols;
    let (plane_row, plane_col) = matrix_product::place_of_plane(tile);
    let x_size = comptime!(tile.copies * tile.x_values() / width);
    let w_size = comptime!(tile.copies * tile.w_values(packing.along_cols) / width);
    let mut x_tile = Shared::<[Vector<X, NV>]>::new_slice(x_size);
    let mut w_tile = Shared::<[Vector<X, NV>]>::new_slice(w_size);
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
    matrix_product::accumulate::<X, X, L, B, NX, NW, NV>(
        x0,
        words0,
        scales0,
        low,
        b0,
        &mut x_tile,
        &mut w_tile,
        &mut sums,
        first_row,
        first_col,
        &lengths0,
        packing,
        tile,
    );
    if comptime!(members > 1) {
        matrix_product::accumulate::<X, X, L, B, NX, NW, NV>(
            x1,
            words1,
            scales1,
            low,
            b1,
            &mut x_tile,
            &mut w_tile,
            &mut sums,
            first_row,
            first_col,
            &lengths1,
            packing,
            tile,
        );
    }
    if comptime!(members > 2) {
        matrix_product::accumulate::<X, X, L, B, NX, NW, NV>(
            x2,
            words2,
            scales2,
            low,
            b2,
            &mut x_tile,
            &mut w_tile,
            &mut sums,
            first_row,
            first_col,
            &lengths2,
            packing,
            tile,
        );
    }
    let in_fragment = comptime!(tile.fragment_values() / out_width);
    let in_row = comptime!(tile.fragment.n / out_width);
    let begin = UNIT_POS_Y as usize * in_fragment;
    #[unroll]
    for i in 0..down {
        #[unroll]
        for j in 0..across {
            cmma::store(
                &mut results[begin..begin + in_fragment],
                &sums[comptime!(i * across + j)],
                comptime!(tile.fragment.n as u32),
                MatrixLayout::RowMajor,
            );
            sync_cube();
            let row = first_row + plane_row + comptime!(i * tile.fragment.m);
            let col = first_col + plane_col + comptime!(j * tile.fragment.n);
            for at in range_stepped(UNIT_POS_X as usize, in_fragment, tile.fragment.plane) {
                finish::<O, NO>(
                    results[begin + at],
                    out,
                    row + at / in_row,
                    col + (at % in_row) * out_width,
                    &lengths0,
                );
            }
            sync_cube();
        }
    }
}

/// Whether one launch can compute the sum of these products: of many rows, with weights that are packed alike, on a
/// device that binds enough tensors.
fn joins(members: &[Operands]) -> bool {
    let first = &members[0];
    let [n, _, m] = first.product.lengths;
    let like_the_first = |other: &Operands| {
        other.packing == first.packing
            && (other.product.lengths[0], other.product.lengths[2]) == (n, m)
            && other.product.types == first.product.types
            && other.elements() == first.elements()
    };
    members.len() <= MEMBERS
        && n >= FEW_ROWS
        && members.iter().all(like_the_first)
        && first.x.client.properties().hardware.max_bindings as usize >= BINDINGS
}

/// The sum of products that have no sum. Their low-rank terms are parts of one tensor, which all of them bind; where
/// there is no term, B is another member's.
pub fn launch_sum(members: Vec<Operands>) -> CubeTensor {
    let candidate = choice::forced()
        .filter(|candidate| members[0].can(*candidate))
        .unwrap_or_else(|| choice::fastest(&members[0]));
    if candidate == Candidate::Composed || !joins(&members) {
        return one_by_one(members);
    }
    match matrix_product::tile(&members[0], candidate) {
        Some(tile) => launch_on_matrix_units(&members, tile),
        None => launch_on_units(&members),
    }
}

/// A launch per product.
fn one_by_one(members: Vec<Operands>) -> CubeTensor {
    let mut sum = None;
    for member in members {
        let member = match sum.take() {
            Some(sum) => member.with_sum(sum),
            None => member,
        };
        let [output, _] = product::launch(member);
        sum = Some(output);
    }
    sum.unwrap_or_else(|| unreachable!("there is a product"))
}

/// The members, with the first in the place of those that are not there.
fn all(members: &[Operands]) -> [&Operands; MEMBERS] {
    std::array::from_fn(|i| members.get(i).unwrap_or(&members[0]))
}

/// Launches one of the kernels.
macro_rules! launch_joint {
    ($kernel:path, $members:expr, $cubes:expr, $units:expr, [$($size:expr),*], $tile:expr $(, $rest:expr)?) => {{
        let [first, second, third] = all($members);
        let ([n, _, m], [_, dtype]) = (first.product.lengths, first.product.types);
        let output = empty(&first.x, [n, m], dtype);
        let [x, low, b, _, out] = first.elements();
        launch!(
            $kernel,
            first.x.client,
            $cubes,
            $units,
            [$($size),*],
            [
                first.x, second.x, third.x,
                first.words, second.words, third.words,
                first.scales, second.scales, third.scales,
                first.low, first.b, second.b, third.b, output
            ],
            first.lengths_arg(),
            second.lengths_arg(),
            third.lengths_arg(),
            members_of($members.len(), first.packing.fault),
            first.packing,
            $tile,
            [x, low, b, out],
            $($rest,)?
        );
        output
    }};
}

fn launch_on_units(members: &[Operands]) -> CubeTensor {
    let first = &members[0];
    let [n, _, m] = first.product.lengths;
    // 4 where every member allows it.
    let vector = members.iter().map(Operands::x_vector).min().unwrap_or(1);
    let software = plane_product::Tile::of_software_driver(&first.x.client, first.packing);
    if let Some(tile) = software {
        return launch_joint!(
            on_planes::launch_unchecked,
            members,
            tile.cubes(n, m),
            CubeDim::new_1d(tile.units as u32),
            [vector, first.out_vector()],
            tile
        );
    }
    launch_joint!(
        on_units::launch_unchecked,
        members,
        TILE.cubes(n, m),
        CubeDim::new_1d(TILE.units() as u32),
        [vector, first.out_vector()],
        TILE
    )
}

fn launch_on_matrix_units(members: &[Operands], tile: MatrixTile) -> CubeTensor {
    let first = &members[0];
    let [n, _, m] = first.product.lengths;
    let width = matrix_product::width(&first.x.client);
    let vectors = members
        .iter()
        .map(|member| matrix_product::vectors(member, width));
    let (x, words): (Vec<usize>, Vec<usize>) = vectors.unzip();
    let [x, words] = [x, words].map(|sizes| sizes.into_iter().min().unwrap_or(1));
    launch_joint!(
        on_matrix_units::launch_unchecked,
        members,
        tile.cubes(n, m),
        CubeDim::new_2d(tile.fragment.plane as u32, tile.planes() as u32),
        [x, words, first.out_vector()],
        tile,
        width
    )
}
