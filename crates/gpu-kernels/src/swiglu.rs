//! SwiGLU, forward and backward, each in one launch. A unit computes one vector, in f32.

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::fault::{self, Fault};
use super::launch::{dims, element, empty, owned, per_unit};

type F4 = Vector<f32, Const<4>>;

/// `1 / (1 + exp(−x))`. For a large −x the exponential is infinite and the result 0, as it should be.
#[cube]
fn sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    one / (one + (Vector::<f32, N>::new(0.0f32) - x).exp())
}

/// `gate · σ(gate) · up`.
#[cube]
pub fn gated<N: Size>(gate: Vector<f32, N>, up: Vector<f32, N>) -> Vector<f32, N> {
    gate * sigmoid::<N>(gate) * up
}

/// With the gradient G of [`gated`]: `G·up·σ·(1 + gate·(1 − σ))` and `G·gate·σ`.
#[cube]
pub fn gated_backward<N: Size>(
    gate: Vector<f32, N>,
    up: Vector<f32, N>,
    gradient: Vector<f32, N>,
    #[comptime] fault: Fault,
) -> (Vector<f32, N>, Vector<f32, N>) {
    let one = Vector::<f32, N>::new(1.0f32);
    let s = sigmoid::<N>(gate);
    let slope = if comptime!(fault == Fault::Slope) {
        s
    } else {
        s * (one + gate * (one - s))
    };
    (gradient * up * slope, gradient * gate * s)
}

/// `output = gate · σ(gate) · up`.
#[cube(launch_unchecked)]
pub fn swiglu<F: Float>(
    gate: &[Vector<F, Const<4>>],
    up: &[Vector<F, Const<4>>],
    output: &mut [Vector<F, Const<4>>],
    count: usize,
    #[define(F)] _type: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let value = gated::<Const<4>>(F4::cast_from(gate[at]), F4::cast_from(up[at]));
        output[at] = Vector::cast_from(value);
    }
}

/// With the gradient G: `G·up·σ·(1 + gate·(1 − σ))` in the place of gate, and `G·gate·σ` in the place of up.
#[cube(launch_unchecked)]
pub fn swiglu_backward<F: Float, G: Float>(
    gate: &mut [Vector<F, Const<4>>],
    up: &mut [Vector<F, Const<4>>],
    gradient: &[Vector<G, Const<4>>],
    count: usize,
    #[comptime] fault: Fault,
    #[define(F, G)] _types: [ElemType; 2],
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let (x, g) = (F4::cast_from(gate[at]), F4::cast_from(gradient[at]));
        let (d_gate, d_up) = gated_backward::<Const<4>>(x, F4::cast_from(up[at]), g, fault);
        gate[at] = Vector::cast_from(d_gate);
        up[at] = Vector::cast_from(d_up);
    }
}

/// Launches [`swiglu`].
///
/// # Shapes
///
/// - `gate`, `up`, output: `[n, width]`, of one type; `width` a multiple of 4
pub fn launch(gate: CubeTensor, up: CubeTensor) -> CubeTensor {
    let [gate, up] = [gate, up].map(into_contiguous);
    let [n, width] = dims(&gate);
    let (output, element) = (empty(&gate, [n, width], gate.dtype), element(gate.dtype));
    let count = n * width / 4;
    let client = gate.client.clone();
    let (cubes, units) = per_unit(count);
    unsafe {
        swiglu::launch_unchecked(
            &client,
            cubes,
            units,
            gate.into_buffer_arg(),
            up.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            count,
            element,
        );
    }
    output
}

/// Launches [`swiglu_backward`]: the gradients of `gate` and `up`, in their memory if nothing else holds it. Shapes as
/// in [`launch`].
pub fn launch_backward(
    gate: CubeTensor,
    up: CubeTensor,
    gradient: CubeTensor,
) -> (CubeTensor, CubeTensor) {
    let [gate, up] = [gate, up].map(owned);
    let gradient = into_contiguous(gradient);
    let [n, width] = dims(&gate);
    let elements = [element(gate.dtype), element(gradient.dtype)];
    let count = n * width / 4;
    let client = gate.client.clone();
    let (cubes, units) = per_unit(count);
    unsafe {
        swiglu_backward::launch_unchecked(
            &client,
            cubes,
            units,
            gate.clone().into_buffer_arg(),
            up.clone().into_buffer_arg(),
            gradient.into_buffer_arg(),
            count,
            fault::current(),
            elements,
        );
    }
    (gate, up)
}
