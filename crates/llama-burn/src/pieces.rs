//! The operations of a layer's pass one by one, as [`LayerPass`](crate::LayerPass) runs them: what a check of a
//! device compares with the CPU, so that a difference has a name.
//!
//! Here is also where an operation can be made wrong on purpose ([`lora_core::spoil`]).

use burn::tensor::{DType, Tensor};
use lora_core::spoil::spoilt;

use crate::attention::{self, Attended, Heads};
use crate::rope::{self, Angles, Turn};
use crate::{Attention, PackedContext, RmsNorm, mlp};

pub(crate) fn attend(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    context: &PackedContext,
    heads: Heads,
) -> (Tensor<2>, Attended) {
    let (output, attended) = attention::attend(q, k, v, context, heads);
    (spoilt("attention", output), attended)
}

pub(crate) fn attend_backward(
    attended: Attended,
    gradient: Tensor<2>,
    context: &PackedContext,
    heads: Heads,
) -> [Tensor<2>; 3] {
    attention::attend_backward(attended, gradient, context, heads)
        .map(|gradient| spoilt("attention_backward", gradient))
}

pub(crate) fn gated(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    spoilt("swiglu", mlp::gated(gate, up))
}

pub(crate) fn gated_backward(
    gate: Tensor<2>,
    up: Tensor<2>,
    gradient: Tensor<2>,
) -> (Tensor<2>, Tensor<2>) {
    let (gate, up) = mlp::gated_backward(gate, up, gradient);
    (
        spoilt("swiglu_backward", gate),
        spoilt("swiglu_backward", up),
    )
}

pub(crate) fn rotate_plain(x: Tensor<2>, angles: &Angles, turn: Turn, scale: f64) -> Tensor<2> {
    let operation = match turn {
        Turn::Forward => "rope",
        Turn::Back => "rope_backward",
    };
    spoilt(operation, rope::rotate_plain(x, angles, turn, scale))
}

/// [`RmsNorm`] of each row of `x`, f32, in the type that products are computed in. `[n, hidden]`
pub fn rms_norm(norm: &RmsNorm, x: &Tensor<2>, dtype: DType) -> Tensor<2> {
    norm.forward_plain(x, dtype).0
}

/// The gradient of the norm's input from that of its output, all `[n, hidden]`; of `x`'s type.
pub fn rms_norm_backward(norm: &RmsNorm, x: &Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
    let roots = norm.roots(x);
    let nothing = x.zeros_like();
    norm.backward(x, roots, norm.gain(), gradient, nothing)
}

/// Queries or keys `[n, heads · d]` turned by their positions' angles, or back.
pub fn rope(x: Tensor<2>, context: &PackedContext, back: bool) -> Tensor<2> {
    let turn = if back { Turn::Back } else { Turn::Forward };
    rotate_plain(x, &context.angles, turn, 1.0)
}

/// What attention mixes from rotated queries and keys, and the gradients of the three from that of the output.
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
    let heads = layer.heads();
    let scale = attention::score_scale(&q, heads);
    let scaled = |x: Tensor<2>| if scale == 1.0 { x } else { x.mul_scalar(scale) };
    let (output, attended) = attend(scaled(q), k, v, context, heads);
    let [d_q, d_k, d_v] = attend_backward(attended, gradient, context, heads);
    (output, [scaled(d_q), d_k, d_v])
}

/// `silu(gate) · up`, `[n, intermediate]` each.
pub fn swiglu(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    gated(gate, up)
}

/// The gradients of `gate` and `up` from that of [`swiglu`]'s output.
pub fn swiglu_backward(gate: Tensor<2>, up: Tensor<2>, gradient: Tensor<2>) -> [Tensor<2>; 2] {
    let (gate, up) = gated_backward(gate, up, gradient);
    [gate, up]
}
