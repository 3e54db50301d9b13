//! The operations of a layer one by one, as [`LayerPass`](crate::LayerPass) runs them. A check of a device compares
//! each with the CPU, so that a difference can be attributed to an operation.

use burn::tensor::{DType, Tensor};
use kernels::{Rotation, attention, attention_backward, query_scale, rotate};

use crate::{Attention, PackedContext, RmsNorm};

/// [`RmsNorm`] of each row of `x`, f32, in the type that products are computed in. `[n, hidden]`
pub fn rms_norm(norm: &RmsNorm, x: &Tensor<2>, dtype: DType) -> Tensor<2> {
    norm.manual_forward(x, dtype).0
}

/// The gradient of the norm's input from that of its output, all `[n, hidden]`; of `x`'s type.
pub fn rms_norm_backward(norm: &RmsNorm, x: &Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
    let inverse = norm.inverse_rms(x);
    let zeros = x.zeros_like();
    norm.backward(x, inverse, norm.gain(), gradient, zeros, x.dtype())
        .0
}

/// Queries or keys `[n, heads · d]`, each head normalized, in `x`'s type.
pub fn head_norm(norm: &RmsNorm, x: &Tensor<2>) -> Tensor<2> {
    norm.heads_forward(x).0
}

/// The gradient of the input of [`head_norm`] from that of its output, `[n, heads · d]`.
pub fn head_norm_backward(norm: &RmsNorm, x: Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
    let (_, inverse) = norm.heads_forward(&x);
    norm.heads_backward(x, inverse, gradient, &mut |_, _| {})
}

/// Queries or keys `[n, heads · d]` rotated by their positions' angles, or with `back` by the negative angles.
pub fn rope(x: Tensor<2>, context: &PackedContext, back: bool) -> Tensor<2> {
    let rotation = if back {
        Rotation::Inverse
    } else {
        Rotation::Forward
    };
    rotate(x, &context.rotary, rotation, 1.0)
}

/// The attention output from rotated queries and keys, and the gradients of `q`, `k` and `v` from that of the output.
///
/// # Shapes
///
/// - `q`, `gradient`, output: `[n, heads · d]`
/// - `k`, `v`: `[n, key heads · d]`
pub fn attend_and_back(
    layer: &Attention,
    [q, k, v]: [Tensor<2>; 3],
    gradient: Tensor<2>,
    context: &PackedContext,
) -> (Tensor<2>, [Tensor<2>; 3]) {
    let (heads, layout) = (layer.heads(), context.attention(layer.sliding_window));
    let scale = query_scale(&q, heads);
    let scaled = |x: Tensor<2>| if scale == 1.0 { x } else { x.mul_scalar(scale) };
    let (output, saved) = attention(scaled(q), k, v, layout, heads);
    let [d_q, d_k, d_v] = attention_backward(saved, gradient, layout, heads);
    (output, [scaled(d_q), d_k, d_v])
}

/// `silu(gate) · up`, `[n, intermediate]` each.
pub fn swiglu(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    kernels::swiglu(gate, up)
}

/// The gradients of `gate` and `up` from that of [`swiglu`]'s output.
pub fn swiglu_backward(gate: Tensor<2>, up: Tensor<2>, gradient: Tensor<2>) -> [Tensor<2>; 2] {
    let (gate, up) = kernels::swiglu_backward(gate, up, gradient);
    [gate, up]
}
