//! Matrix units: the fragments that a device multiplies at a time, and their way from shared memory.

use burn::tensor::DType;
use cubecl::cmma::{self, MatrixIdent, MatrixLayout};
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{DeviceProperties, ElemType, FloatKind};
use cubecl::prelude::*;

use super::launch::element;

/// What a device's matrix units multiply at a time: `[m, k] · [k, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fragment {
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
    /// Units of a plane.
    pub plane: usize,
}

impl Fragment {
    /// The fragment for factors of this type and sums in f32; `None` without one, or if the size of a plane varies.
    pub fn of(properties: &DeviceProperties, dtype: DType) -> Option<Self> {
        let hardware = &properties.hardware;
        if hardware.plane_size_min != hardware.plane_size_max {
            return None;
        }
        let sizes = units(properties, dtype).map(|unit| Self {
            m: unit.m as usize,
            n: unit.n as usize,
            k: unit.k as usize,
            plane: hardware.plane_size_max as usize,
        });
        // Square fragments of 16 are the ones that every vendor's compilers are tuned for.
        sizes
            .filter(|size| 32 % size.m == 0 && 32 % size.n == 0 && 32 % size.k == 0)
            .min_by_key(|size| {
                (
                    size.m.abs_diff(16),
                    size.n.abs_diff(16),
                    size.k.abs_diff(16),
                )
            })
    }
}

/// Whether Burn multiplies this type on matrix units for which no kernel here is written.
pub fn only_burn_has_units(properties: &DeviceProperties, dtype: DType) -> bool {
    Fragment::of(properties, dtype).is_none() && units(properties, dtype).next().is_some()
}

/// The matrix units for 16-bit factors of this type and sums in f32.
fn units(properties: &DeviceProperties, dtype: DType) -> impl Iterator<Item = &MmaConfig> {
    let (f32, factor) = (ElemType::Float(FloatKind::F32), element(dtype));
    let units = properties.features.matmul.cmma.iter();
    units.filter(move |unit| {
        dtype != DType::F32 && (unit.a_type, unit.b_type, unit.cd_type) == (factor, factor, f32)
    })
}

/// A fragment of zeros for sums.
#[cube]
pub fn zeros(#[comptime] fragment: Fragment) -> cmma::Matrix<f32> {
    cmma::Matrix::<f32>::from_value(
        MatrixIdent::Accumulator,
        fragment.m,
        fragment.n,
        fragment.k,
        MatrixLayout::Undefined,
        0.0,
    )
}

/// Reads a fragment of factors that begins at vector `at` of shared memory, in rows of `row` values.
#[cube]
pub fn read<F: Float, NV: Size>(
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
    cmma::load(&mut matrix, &from[at..end], comptime!(row as u32));
    matrix
}
