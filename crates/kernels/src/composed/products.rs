//! Products with Burn's `matmul`.

use burn::tensor::{DType, Tensor};

use crate::frozen_linear::{Direction, quantized_product};
use crate::gpu_products::product;
use crate::limits::{by_rows, rows_at_once};
use crate::spoil::spoilt;

pub fn multiply_add(
    sum: Option<Tensor<2>>,
    scale: f64,
    left: Tensor<2>,
    right: Tensor<2>,
) -> Tensor<2> {
    let ([n, k], m) = (left.dims(), right.dims()[1]);
    let rows = rows_at_once([n, k, m]);
    if rows < n {
        return by_rows(sum, left, rows, |sum, left| {
            multiply_add(sum, scale, left, right.clone())
        });
    }
    let product = spoilt("low_rank", scaled(scale, left, right));
    match sum {
        Some(sum) => {
            let dtype = sum.dtype();
            sum + product.cast(dtype)
        }
        None => product,
    }
}

/// Multiplies the smaller operand by the scale.
fn scaled(scale: f64, left: Tensor<2>, right: Tensor<2>) -> Tensor<2> {
    if scale == 1.0 {
        return product(left, right);
    }
    if left.shape().num_elements() < right.shape().num_elements() {
        product(left.mul_scalar(scale), right)
    } else {
        product(left, right.mul_scalar(scale))
    }
}

pub fn frozen_product(
    sum: Option<Tensor<2>>,
    x: Tensor<2>,
    weight: Tensor<2>,
    direction: Direction,
) -> Tensor<2> {
    if !matches!(weight.dtype(), DType::QFloat(_)) {
        return match direction {
            Direction::Forward => multiply_add(sum, 1.0, x, weight),
            Direction::Backward => multiply_add(sum, 1.0, x, weight.transpose()),
        };
    }
    let (n, [d_in, d_out]) = (x.dims()[0], weight.dims());
    let rows = rows_at_once([n, d_in, d_out]);
    if rows < n {
        return by_rows(sum, x, rows, |sum, x| {
            frozen_product(sum, x, weight.clone(), direction)
        });
    }
    let operation = match direction {
        Direction::Forward => "quantized_product",
        Direction::Backward => "quantized_product_backward",
    };
    spoilt(operation, quantized_product(sum, x, weight, direction))
}
