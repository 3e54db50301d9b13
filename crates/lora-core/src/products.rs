//! Float products that add to what is there, outside any tape.

use burn::tensor::{DType, Tensor};

use crate::cpu::{self, Matrix, MatrixMut, Threads};
use crate::gpu_products::{product, product_in_f32};
use crate::limits::{by_rows, rows_at_once};
use crate::spoil::spoilt;

/// `sum + scale · left · right`; without a sum, the product alone. The sum's memory is used again where
/// nobody else has it, and operands may be transposed or narrowed views.
///
/// The output has the sum's type, without a sum the factors'.
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
    let native = cpu::is_native(&left) && cpu::is_native(&right);
    let ([n, k], m) = (left.dims(), right.dims()[1]);
    let rows = rows_at_once([n, k, m]);
    if rows < n && !native {
        return by_rows(sum, left, rows, |sum, left| {
            multiply_add(sum, scale, left, right.clone())
        });
    }
    match sum {
        Some(sum) if native && cpu::is_native(&sum) => {
            let (left, right) = (View::new(left), View::new(right));
            let mut sum = cpu::values(sum);
            let output = MatrixMut::new(sum.as_mut_slice(), n, m, m);
            let scale = scale as f32;
            let (left, right) = (left.matrix(n, k), right.matrix(k, m));
            cpu::multiply(output, true, scale, left, right, Threads::All);
            sum.into_tensor()
        }
        Some(sum) => {
            let product = spoilt("low_rank", scaled(scale, left, right));
            let dtype = sum.dtype();
            sum + product.cast(dtype)
        }
        None if native => {
            let (left, right) = (View::new(left), View::new(right));
            let (left, right) = (left.matrix(n, k), right.matrix(k, m));
            let values = cpu::product(scale as f32, left, right, Threads::All);
            cpu::tensor(values, [n, m])
        }
        None => spoilt("low_rank", scaled(scale, left, right)),
    }
}

/// `left · right` in f32, whatever the type of the factors: sums of products of 16-bit factors are not rounded.
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

/// The scale goes onto the smaller operand.
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

/// A tensor's memory with its strides, so that a transposed or narrowed operand needs no copy.
struct View {
    tensor: cpu::FlexTensor,
    strides: [usize; 2],
    start: usize,
}

impl View {
    fn new(x: Tensor<2>) -> Self {
        let tensor = cpu::primitive_of(x);
        let layout = tensor.layout();
        let strides = layout.strides();
        // A view that runs backwards is copied; nothing here makes one.
        if strides.iter().all(|stride| *stride >= 0) {
            Self {
                strides: [strides[0] as usize, strides[1] as usize],
                start: layout.start_offset(),
                tensor,
            }
        } else {
            let tensor = tensor.to_contiguous();
            let strides = tensor.layout().strides();
            Self {
                strides: [strides[0] as usize, strides[1] as usize],
                start: 0,
                tensor,
            }
        }
    }

    fn matrix(&self, rows: usize, columns: usize) -> Matrix<'_> {
        let data = &self.tensor.storage::<f32>()[self.start..];
        Matrix::strided(data, [rows, columns], self.strides)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, init};
    use burn::tensor::{Device, Tolerance};

    #[test]
    fn sums_and_views_give_what_burns_operations_give() {
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
        // A sum that somebody else holds too keeps its values.
        let (kept, before) = (sum.clone(), sum.clone().into_data());
        same(
            multiply_add(Some(sum.clone()), 0.5, x, right),
            sum + product,
        );
        kept.into_data().assert_eq(&before, true);
    }
}
