//! The gate of a feed-forward block, SwiGLU (Shazeer, 2020, <https://arxiv.org/abs/2002.05202>).

use burn::tensor::Tensor;

use crate::dispatch::of;
use crate::low_rank::LowRankTerm;
use crate::spoil::spoilt;

/// `silu(gate) · up`, computed in f32 and returned in the type of `gate`.
///
/// # Shapes
///
/// - `gate`, `up`, output: `[n, intermediate]`
pub fn swiglu(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    spoilt("swiglu", of(gate).swiglu(gate, up))
}

/// The gradients of `gate` and `up` from the gradient G of [`swiglu`]'s output, in their memory if it is not shared:
/// with σ the sigmoid of gate, `G·up·σ·(1 + gate·(1 − σ))` and `G·gate·σ`.
pub fn swiglu_backward(
    gate: Tensor<2>,
    up: Tensor<2>,
    gradient: Tensor<2>,
) -> (Tensor<2>, Tensor<2>) {
    let (d_gate, d_up) = of(&gate).swiglu_backward(gate, up, gradient);
    let spoilt = |x| spoilt("swiglu_backward", x);
    (spoilt(d_gate), spoilt(d_up))
}

/// SwiGLU's up, `x · W [+ low · b]`, and `silu(gate) · up`, in one launch where there is a kernel.
///
/// # Shapes
///
/// - `x`: `[n, d_in]`
/// - `weight`: `[d_in, intermediate]`
/// - `gate`, up, output: `[n, intermediate]`
pub fn gated_product(
    gate: &Tensor<2>,
    x: Tensor<2>,
    weight: Tensor<2>,
    low_rank: Option<LowRankTerm>,
) -> (Tensor<2>, Tensor<2>) {
    let weight = weight.without_autodiff();
    let (up, output) = of(&x).gated_product(gate, x, weight, low_rank);
    (up, spoilt("swiglu", output))
}

/// The gradients of `gate` and `up`, in their memory if it is not shared; that of SwiGLU's output is `gradient · Wᵀ
/// [+ low · b]`. One launch where there is a kernel.
///
/// # Shapes
///
/// - `gradient`: `[n, d_out]`
/// - `weight`: `[intermediate, d_out]`
/// - `gate`, `up`, outputs: `[n, intermediate]`
pub fn gated_product_backward(
    gate: Tensor<2>,
    up: Tensor<2>,
    gradient: Tensor<2>,
    weight: Tensor<2>,
    low_rank: Option<LowRankTerm>,
) -> (Tensor<2>, Tensor<2>) {
    let weight = weight.without_autodiff();
    let kernels = of(&gradient);
    let (d_gate, d_up) = kernels.gated_product_backward(gate, up, gradient, weight, low_rank);
    let spoilt = |x| spoilt("swiglu_backward", x);
    (spoilt(d_gate), spoilt(d_up))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, composed, normal};
    use burn::tensor::activation::silu;
    use burn::tensor::{Device, Tolerance};

    #[test]
    fn the_kernel_and_the_composition_compute_what_the_autodiff_graph_computes() {
        let device = Device::flex().autodiff();
        let mut rng = CounterRng::new(1);
        let mut random = |std| normal([9, 70], std, &mut rng, &device);
        let (gate, up) = (random(3.0).require_grad(), random(1.0).require_grad());
        let gradient = random(1.0);
        let y = silu(gate.clone()) * up.clone();
        let graph = (y.clone() * gradient.clone()).sum().backward();
        let expected = [gate.grad(&graph), up.grad(&graph)].map(|x| x.unwrap().into_data());
        // Burn's exponential and ours differ in the last bits.
        let tolerance = Tolerance::absolute(3e-6);
        let (gate, up, gradient, y) = (gate.inner(), up.inner(), gradient.inner(), y.into_data());
        for output in [swiglu(&gate, &up), composed::swiglu::forward(&gate, &up)] {
            output.into_data().assert_approx_eq::<f32>(&y, tolerance);
        }
        let inputs = || (gate.clone(), up.clone(), gradient.clone());
        let (a, b, c) = inputs();
        let native = swiglu_backward(a, b, c);
        let (a, b, c) = inputs();
        for (d_gate, d_up) in [native, composed::swiglu::backward(a, b, c)] {
            for (got, expected) in [d_gate, d_up].into_iter().zip(&expected) {
                got.into_data().assert_approx_eq::<f32>(expected, tolerance);
            }
        }
    }
}
