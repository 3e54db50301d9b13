//! Root-mean-square normalization (Zhang and Sennrich, 2019, <https://arxiv.org/abs/1910.07467>):
//! `x / sqrt(mean(x²) + eps) · gain` over the last dimension, computed in f32 for every type of `x`.

use burn::tensor::{DType, Tensor};

use crate::dispatch::of;
use crate::spoil::spoilt;

/// `1 / sqrt(mean(x²) + eps)` of each row, `[n, 1]` in f32, saved for the backward pass. On GPUs a recomputation would
/// take additional kernels. `None` for a kernel that recomputes it while it reads the row.
#[derive(Debug, Clone)]
pub struct InverseRms(pub(crate) Option<Tensor<2>>);

/// A norm's gain `[hidden]` as a row `[1, hidden]`, in f32 and outside an autodiff graph.
///
/// Must be called before the arithmetic that uses it: Burn fuses consecutive operations, and a change of shape ends a
/// group.
pub fn gain_row(gain: Tensor<1>) -> Tensor<2> {
    gain.without_autodiff().cast(DType::F32).unsqueeze()
}

/// Normalizes each row. Also returns what the backward pass needs.
///
/// # Shapes
///
/// - `x`, output: `[n, hidden]`; the output has type `dtype`
/// - `gain`: `[1, hidden]`, from [`gain_row`]
pub fn rms_norm(x: &Tensor<2>, gain: Tensor<2>, eps: f64, dtype: DType) -> (Tensor<2>, InverseRms) {
    let (output, inverse) = of(x).rms_norm(x, gain, eps, dtype);
    (spoilt("rms_norm", output), inverse)
}

/// The second result of [`rms_norm`].
pub fn inverse_rms(x: &Tensor<2>, eps: f64) -> InverseRms {
    of(x).inverse_rms(x, eps)
}

/// Recomputes the output of [`rms_norm`] from the saved value.
pub fn rms_norm_again(
    x: &Tensor<2>,
    inverse: &InverseRms,
    gain: Tensor<2>,
    eps: f64,
    dtype: DType,
) -> Tensor<2> {
    match &inverse.0 {
        Some(inverse) => crate::composed::rms_norm::scale(x, inverse.clone(), gain, dtype),
        None => of(x).rms_norm(x, gain, eps, dtype).0,
    }
}

/// `sum` plus the gradient of `x` from the output's gradient G: with ρ = 1/sqrt(mean(x²) + eps) and w the gain,
/// ρ·w∘G − x·ρ³·mean(w∘G∘x). Returned in the type of `sum`, and in `dtype` for the products that read it next.
///
/// # Shapes
///
/// - `x`, `gradient`, `sum`, outputs: `[n, hidden]`
/// - `gain`: `[1, hidden]`
pub fn rms_norm_backward(
    x: &Tensor<2>,
    inverse: InverseRms,
    gain: Tensor<2>,
    eps: f64,
    gradient: Tensor<2>,
    sum: Tensor<2>,
    dtype: DType,
) -> (Tensor<2>, Tensor<2>) {
    of(x).rms_norm_backward(x, inverse, gain, eps, gradient, sum, dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, composed, normal};
    use burn::tensor::{Device, Tolerance};

    #[test]
    fn the_kernel_and_the_composition_compute_what_the_autodiff_graph_computes() {
        let device = Device::flex().autodiff();
        let mut rng = CounterRng::new(1);
        let mut random = |shape| normal(shape, 1.0, &mut rng, &device);
        let weight = random([1, 70]).inner().reshape([70]);
        let (x, gradient, sum) = (random([9, 70]), random([9, 70]).inner(), random([9, 70]));
        let (x, sum, eps) = (x.require_grad(), sum.inner(), 1e-5);
        let mean = x.clone().square().mean_dim(1);
        let rows = Tensor::<2>::autodiff(gain_row(weight.clone()));
        let y = x.clone() * mean.add_scalar(eps).sqrt().recip() * rows;
        let graph = (y.clone() * gradient.clone().autodiff()).sum().backward();
        let (y, expected) = (y.into_data(), x.grad(&graph).unwrap() + sum.clone());
        let expected = expected.into_data();
        let x = x.inner();
        // f32 sums of 70 squares in another order.
        let tolerance = Tolerance::absolute(2e-6);
        let gain = || gain_row(weight.clone());
        let (got, native) = rms_norm(&x, gain(), eps, DType::F32);
        got.into_data().assert_approx_eq::<f32>(&y, tolerance);
        assert!(native.0.is_none(), "the CPU's kernel saves nothing");
        let (got, composed) = composed::rms_norm::forward(&x, gain(), eps, DType::F32);
        got.into_data().assert_approx_eq::<f32>(&y, tolerance);
        for inverse in [native, composed] {
            let again = rms_norm_again(&x, &inverse, gain(), eps, DType::F32);
            again.into_data().assert_approx_eq::<f32>(&y, tolerance);
            let (gradient, sum) = (gradient.clone(), sum.clone());
            let (got, same) =
                rms_norm_backward(&x, inverse, gain(), eps, gradient, sum, DType::F32);
            let got = got.into_data();
            got.assert_approx_eq::<f32>(&expected, tolerance);
            same.into_data().assert_eq(&got, true);
        }
    }
}
