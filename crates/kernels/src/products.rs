//! Float products that add to a sum, outside an autodiff graph.

use burn::tensor::{DType, Tensor};

use crate::dispatch::of;
use crate::gpu_products::product_in_f32;
use crate::limits::{by_rows, rows_at_once};
use crate::spoil::spoilt;

/// `sum + scale · left · right`; without a sum, the product alone. The result uses the sum's memory if it is not
/// shared. Operands may be transposed or narrowed views.
///
/// The output has the sum's type, or without a sum the factors' type.
///
/// # Shapes
///
/// - `left`: `[n, k]`
/// - `right`: `[k, m]`
/// - `sum`, output: `[n, m]`
pub fn multiply_add(
    sum: Option<Tensor<2>>,
    scale: f64,
    left: Tensor<2>,
    right: Tensor<2>,
) -> Tensor<2> {
    of(&left).multiply_add(sum, scale, left, right)
}

/// Whether the hidden activations x·A of several adapters are computed transposed, `[Σ r, n]`: see
/// [`Kernels::transposes_low_rank`](crate::Kernels::transposes_low_rank).
pub fn transposes_low_rank(x: &Tensor<2>) -> bool {
    of(x).transposes_low_rank()
}

/// `left · right` in f32, for every type of the factors: sums of products of 16-bit factors are not rounded.
///
/// # Shapes
///
/// - `left`: `[n, k]`
/// - `right`: `[k, m]`
/// - output: `[n, m]`
pub fn multiply_in_f32(left: Tensor<2>, right: Tensor<2>) -> Tensor<2> {
    if left.dtype() == DType::F32 {
        return multiply_add(None, 1.0, left, right);
    }
    let ([n, k], m) = (left.dims(), right.dims()[1]);
    let rows = rows_at_once([n, k, m]);
    if rows < n {
        return by_rows(None, left, rows, |_, left| {
            multiply_in_f32(left, right.clone())
        });
    }
    spoilt("low_rank", product_in_f32(left, right))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, init};
    use burn::tensor::{Device, Tolerance};

    #[test]
    fn sums_and_views_equal_burns_operations() {
        let device = Device::flex();
        let mut rng = CounterRng::new(3);
        let mut random = |shape| init::normal(shape, 1.0, &mut rng, &device);
        let (x, wide, sum) = (random([70, 33]), random([40, 90]), random([70, 20]));
        // A narrowed transposed view: [33, 20] within [90, 40].
        let right = wide.transpose().narrow(0, 5, 33).narrow(1, 11, 20);
        let product = x.clone().matmul(right.clone()) * 0.5;
        let tolerance = Tolerance::absolute(2e-5);
        let same = |got: Tensor<2>, expected: Tensor<2>| {
            got.into_data()
                .assert_approx_eq::<f32>(&expected.into_data(), tolerance);
        };
        same(
            multiply_add(None, 0.5, x.clone(), right.clone()),
            product.clone(),
        );
        // A shared sum keeps its values.
        let (kept, before) = (sum.clone(), sum.clone().into_data());
        same(
            multiply_add(Some(sum.clone()), 0.5, x, right),
            sum + product,
        );
        kept.into_data().assert_eq(&before, true);
    }
}
