//! What the launches of the kernels share.

use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::prelude::{CubeCount, CubeDim};

/// Launches a kernel: its client, workgroups and units, the sizes of its vectors, its tensors, and the rest of its
/// arguments. Buffers have the lengths that the kernel assumes; a kernel checks none.
macro_rules! launch {
    ($kernel:path, $client:expr, $cubes:expr, $units:expr, [$($size:expr),*], [$($tensor:expr),*], $($rest:expr),+ $(,)?) => {
        unsafe {
            $kernel(
                &$client,
                $cubes,
                $units,
                $($size,)*
                $($tensor.clone().into_buffer_arg(),)*
                $($rest,)+
            )
        }
    };
}
pub(crate) use launch;

/// The element type of a float tensor.
pub fn element(dtype: DType) -> ElemType {
    ElemType::Float(match dtype {
        DType::F16 => FloatKind::F16,
        DType::BF16 => FloatKind::BF16,
        DType::F64 => FloatKind::F64,
        _ => FloatKind::F32,
    })
}

/// The element type of an integer tensor.
pub fn element_of_ints(dtype: DType) -> ElemType {
    match dtype {
        DType::I64 => ElemType::Int(IntKind::I64),
        DType::U32 => ElemType::UInt(UIntKind::U32),
        _ => ElemType::Int(IntKind::I32),
    }
}

/// Rows and columns of a matrix.
pub fn dims(tensor: &CubeTensor) -> [usize; 2] {
    [tensor.meta.shape()[0], tensor.meta.shape()[1]]
}

/// The distances of rows and of columns of a matrix in memory.
pub fn strides(tensor: &CubeTensor) -> [usize; 2] {
    [tensor.meta.strides()[0], tensor.meta.strides()[1]]
}

/// A matrix whose rows are contiguous: itself, or a copy.
pub fn with_contiguous_rows(tensor: CubeTensor) -> CubeTensor {
    if strides(&tensor)[1] == 1 || dims(&tensor)[1] == 1 {
        tensor
    } else {
        into_contiguous(tensor)
    }
}

/// A contiguous tensor that a kernel may overwrite: itself, or a copy if others hold it.
pub fn owned(tensor: CubeTensor) -> CubeTensor {
    let tensor = into_contiguous(tensor);
    if tensor.handle.can_mut() {
        tensor
    } else {
        tensor.copy()
    }
}

/// Workgroups of 64 units, for one unit per value.
pub fn per_unit(count: usize) -> (CubeCount, CubeDim) {
    (workgroups(count.div_ceil(64)), CubeDim::new_1d(64))
}

/// This many workgroups and perhaps a few more: a dimension has at most 65,535.
pub fn workgroups(count: usize) -> CubeCount {
    let wide = count.clamp(1, 32_768);
    CubeCount::Static(wide as u32, count.div_ceil(wide) as u32, 1)
}

/// Memory for an output on the device of `like`.
pub fn empty(like: &CubeTensor, shape: [usize; 2], dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::from(shape), dtype)
}

/// As [`empty`], with one dimension.
pub fn empty_vector(like: &CubeTensor, length: usize, dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::from([length]), dtype)
}
