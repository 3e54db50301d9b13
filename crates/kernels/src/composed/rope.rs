//! RoPE as a composition of Burn's operations. It selects both operands of the rotation by index, so that Burn fuses
//! everything into one kernel.

use burn::tensor::{DType, Tensor};

use crate::rope::{RotaryTables, Rotation};

/// # Panics
///
/// If the tables were made for a kernel that rotates halves in place.
pub fn rotate(x: Tensor<2>, tables: &RotaryTables, rotation: Rotation, scale: f64) -> Tensor<2> {
    let Some(whole) = &tables.whole else {
        panic!("these rotary tables were made for another kernel");
    };
    let ([n, width], half) = (x.dims(), tables.cos.dims()[1]);
    let dtype = x.dtype();
    let heads = x.reshape([n, width / (2 * half), 2 * half]);
    let exchanged = heads.clone().select(2, whole.exchanged.clone());
    let exchanged = exchanged.cast(DType::F32) * whole.sin.clone();
    let kept = heads.select(2, whole.straight.clone());
    let kept = kept.cast(DType::F32) * whole.cos.clone();
    let rotated = match rotation {
        Rotation::Forward => kept + exchanged,
        Rotation::Inverse => kept - exchanged,
    };
    let rotated = if scale == 1.0 {
        rotated
    } else {
        rotated.mul_scalar(scale)
    };
    rotated.cast(dtype).reshape([n, width])
}
