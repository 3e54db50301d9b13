//! Root-mean-square normalization (Zhang and Sennrich, 2019, <https://arxiv.org/abs/1910.07467>).

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use kernels::{InverseRms, Normalized};
use lora_core::{Accumulate, LinearInput, Trained, column_sums};

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, as Hugging Face's `LlamaRMSNorm`:
/// computed in f32 for every type of `x`.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// The gain, `[hidden]`, or `[head_dim]` of the norms of queries and keys; frozen unless it requires a gradient.
    pub weight: Param<Tensor<1>>,
    /// Keeps the square root away from zero.
    pub eps: f64,
}

/// The manual passes: functions of crate `kernels` with this norm's parameters.
impl RmsNorm {
    pub(crate) fn gain(&self) -> Tensor<2> {
        kernels::gain_row(self.weight.val())
    }

    /// The output in type `dtype`, and the saved value for [`again`](Self::again) and [`backward`](Self::backward).
    pub(crate) fn manual_forward(&self, x: &Tensor<2>, dtype: DType) -> (Tensor<2>, InverseRms) {
        kernels::rms_norm(x, self.gain(), self.eps, dtype)
    }

    pub(crate) fn inverse_rms(&self, x: &Tensor<2>) -> InverseRms {
        kernels::inverse_rms(x, self.eps)
    }

    /// The output of [`manual_forward`](Self::manual_forward), recomputed.
    pub(crate) fn again(&self, x: &Tensor<2>, inverse: &InverseRms, dtype: DType) -> Tensor<2> {
        kernels::rms_norm_again(x, inverse, self.gain(), self.eps, dtype)
    }

    /// The same for the backward pass of linear layers. `gain` as in [`backward`](Self::backward).
    pub(crate) fn output<'a>(
        &'a self,
        x: &'a Tensor<2>,
        inverse: &'a InverseRms,
        gain: Tensor<2>,
        dtype: DType,
    ) -> NormOutput<'a> {
        NormOutput {
            norm: self,
            x,
            inverse,
            gain,
            dtype,
        }
    }

    /// `sum` plus the gradient of `x`, and the same in `dtype`. `gain` is [`gain`](Self::gain), called before the
    /// operations that compute `gradient`.
    pub(crate) fn backward(
        &self,
        x: &Tensor<2>,
        inverse: InverseRms,
        gain: Tensor<2>,
        gradient: Tensor<2>,
        sum: Tensor<2>,
        dtype: DType,
    ) -> (Tensor<2>, Tensor<2>) {
        kernels::rms_norm_backward(x, inverse, gain, self.eps, gradient, sum, dtype)
    }

    /// The gain, if it is trained.
    pub(crate) fn trained(&self) -> Option<Trained<'_>> {
        Trained::vector(&self.weight)
    }

    /// The gradient of a trained gain: the sum of the output's gradient times the input over its root mean square. All
    /// in f32.
    ///
    /// # Shapes
    ///
    /// - `x`, `gradient`: `[n, width]`
    pub(crate) fn gradient_of_gain(
        &self,
        x: &Tensor<2>,
        inverse: &InverseRms,
        gradient: &Tensor<2>,
        accumulate: &mut Accumulate<'_>,
    ) {
        let Some(gain) = self.trained() else {
            return;
        };
        let ones = Tensor::ones(self.gain().dims(), (&x.device(), DType::F32));
        let normalized = kernels::rms_norm_again(x, inverse, ones, self.eps, DType::F32);
        let product = normalized * gradient.clone().cast(DType::F32);
        gain.accumulate(column_sums(product), accumulate);
    }

    /// Normalizes each head: rows `[n, heads · d]` as `[n · heads, d]`. Types and saved values as in
    /// [`manual_forward`](Self::manual_forward); the output has `x`'s type.
    pub(crate) fn heads_forward(&self, x: &Tensor<2>) -> (Tensor<2>, InverseRms) {
        let (output, inverse) = self.manual_forward(&self.by_heads(x.clone()), x.dtype());
        (output.reshape(x.dims()), inverse)
    }

    /// The gradient of the input of [`heads_forward`](Self::heads_forward) from that of its output, in `x`'s type. That
    /// of a trained gain goes to `accumulate`.
    pub(crate) fn heads_backward(
        &self,
        x: Tensor<2>,
        inverse: InverseRms,
        gradient: Tensor<2>,
        accumulate: &mut Accumulate<'_>,
    ) -> Tensor<2> {
        let (dims, dtype, gain) = (x.dims(), x.dtype(), self.gain());
        let (x, gradient) = (self.by_heads(x), self.by_heads(gradient));
        self.gradient_of_gain(&x, &inverse, &gradient, accumulate);
        let zeros = x.zeros_like();
        let (d_x, _) = self.backward(&x, inverse, gain, gradient, zeros, dtype);
        d_x.reshape(dims)
    }

    fn by_heads(&self, x: Tensor<2>) -> Tensor<2> {
        let [d] = self.weight.dims();
        let [n, width] = x.dims();
        x.reshape([n * (width / d), d])
    }
}

/// A norm's output that is computed again if it is needed.
pub(crate) struct NormOutput<'a> {
    norm: &'a RmsNorm,
    x: &'a Tensor<2>,
    inverse: &'a InverseRms,
    gain: Tensor<2>,
    dtype: DType,
}

impl LinearInput for NormOutput<'_> {
    fn tensor(self) -> Tensor<2> {
        self.norm.again(self.x, self.inverse, self.dtype)
    }

    fn normalized(&self) -> Option<Normalized> {
        Some(Normalized {
            x: self.x.clone(),
            inverse: self.inverse.clone(),
            gain: self.gain.clone(),
        })
    }
}
