//! Root-mean-square normalisation (Zhang and Sennrich, 2019, <https://arxiv.org/abs/1910.07467>).

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, as Hugging Face's `LlamaRMSNorm`:
/// computed in f32 whatever the type of `x`.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// The gain, `[hidden]`.
    pub weight: Param<Tensor<1>>,
    /// Keeps the root away from zero.
    pub eps: f64,
}

impl RmsNorm {
    /// Normalises each row.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`
    /// - output: `[n, hidden]`, of `x`'s type
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = FloatDType::from(x.dtype());
        let x = x.cast(FloatDType::F32);
        let mean_of_squares = x.clone().square().mean_dim(1);
        let inverse_root = mean_of_squares.add_scalar(self.eps).sqrt().recip();
        let normalised = x * inverse_root * self.weight.val().cast(FloatDType::F32).unsqueeze();
        normalised.cast(dtype)
    }
}
