//! The adapter of the output layer, forward and backward.

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use kernels::{multiply_add, multiply_in_f32};

use crate::HeadAdapter;

impl HeadAdapter {
    /// Adds the adapter's output to `logits`.
    pub(super) fn manual_forward(&self, hidden: &Tensor<2>, logits: Tensor<2>) -> Tensor<2> {
        let xa = multiply_add(None, 1.0, hidden.clone(), factor(&self.a, hidden.dtype()));
        let b = factor(&self.b, hidden.dtype());
        multiply_add(Some(logits), self.scale, xa, b)
    }

    /// Adds the adapter's part of the gradient of `hidden` to `d_hidden`. The factors' gradients go to `accumulate`, in
    /// f32.
    pub(super) fn backward(
        &self,
        hidden: Tensor<2>,
        d_logits: Tensor<2>,
        d_hidden: Tensor<2>,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) -> Tensor<2> {
        let dtype = hidden.dtype();
        let a = factor(&self.a, dtype);
        let xa = multiply_add(None, 1.0, hidden.clone(), a.clone());
        let xa = xa.mul_scalar(self.scale);
        accumulate(&self.b, multiply_in_f32(xa.transpose(), d_logits.clone()));
        let b = factor(&self.b, dtype).transpose();
        let d_xa = multiply_add(None, self.scale, d_logits, b);
        accumulate(&self.a, multiply_in_f32(hidden.transpose(), d_xa.clone()));
        multiply_add(Some(d_hidden), 1.0, d_xa, a.transpose())
    }
}

fn factor(param: &Param<Tensor<2>>, dtype: DType) -> Tensor<2> {
    param.val().without_autodiff().cast(dtype)
}
