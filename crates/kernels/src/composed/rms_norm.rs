//! RMSNorm as Burn's element-wise operations; Burn fuses each of these functions into one or two kernels.

use burn::tensor::{DType, Tensor};

use crate::rms_norm::InverseRms;
use crate::spoil::spoilt;

pub fn forward(x: &Tensor<2>, gain: Tensor<2>, eps: f64, dtype: DType) -> (Tensor<2>, InverseRms) {
    let inverse = inverse(x, eps);
    let normalized = scale(x, inverse.clone(), gain, dtype);
    (normalized, InverseRms(Some(inverse)))
}

/// `1 / sqrt(mean(x²) + eps)`, `[n, 1]`.
pub fn inverse(x: &Tensor<2>, eps: f64) -> Tensor<2> {
    let mean_of_squares = x.clone().cast(DType::F32).square().mean_dim(1);
    mean_of_squares.add_scalar(eps).sqrt().recip()
}

/// The output from the inverse root mean squares.
pub fn scale(x: &Tensor<2>, inverse: Tensor<2>, gain: Tensor<2>, dtype: DType) -> Tensor<2> {
    let normalized = x.clone().cast(DType::F32) * inverse * gain;
    normalized.cast(dtype)
}

pub fn backward(
    x: &Tensor<2>,
    inverse: Tensor<2>,
    gain: Tensor<2>,
    gradient: Tensor<2>,
    sum: Tensor<2>,
) -> Tensor<2> {
    let dtype = sum.dtype();
    let x = x.clone().cast(DType::F32);
    let weighted = gradient.cast(DType::F32) * gain;
    let along = (weighted.clone() * x.clone()).mean_dim(1);
    let along = along * inverse.clone() * inverse.clone() * inverse.clone();
    let d_x = (weighted * inverse - x * along).cast(dtype);
    sum + spoilt("rms_norm_backward", d_x)
}
