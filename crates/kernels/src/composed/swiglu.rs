//! SwiGLU as Burn's element-wise operations.

use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::{DType, Tensor};

pub fn forward(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    let dtype = gate.dtype();
    let [gate, up] = [gate, up].map(|x| x.clone().cast(DType::F32));
    (silu(gate) * up).cast(dtype)
}

pub fn backward(gate: Tensor<2>, up: Tensor<2>, gradient: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let dtype = gate.dtype();
    let [gate, up, gradient] = [gate, up, gradient].map(|x| x.cast(DType::F32));
    let s = sigmoid(gate.clone());
    let d_up = gradient.clone() * gate.clone() * s.clone();
    let slope = s.clone() * (gate * (s.neg().add_scalar(1.0))).add_scalar(1.0);
    ((gradient * up * slope).cast(dtype), d_up.cast(dtype))
}
