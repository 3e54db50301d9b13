//! DoRA: an adapter that changes the direction of each output's weights, and a trained length for each.

use burn::module::{LoraAdapter, Module, Param};
use burn::tensor::{DType, Tensor};

use crate::frozen_linear::{Direction, frozen_product};

/// What DoRA (Liu et al., 2024, <https://arxiv.org/abs/2402.09353>) adds to an adapter.
///
/// The layer's weight is `(W₀ + γ·A·B)` with its columns scaled to the trained lengths m:
/// `h = (m / ‖W₀ + γ·A·B‖) ⊙ (x·W₀ + γ·(x·A)·B)`. As in PEFT (and the paper's section 4.3) the norm is a
/// constant in the backward pass.
#[derive(Module, Debug)]
pub struct Dora {
    /// The length m of each output's weights, `[1, d_out]`.
    pub magnitude: Param<Tensor<2>>,
    /// ‖W₀‖² of each output, `[1, d_out]`, f32 and off the tape.
    #[module(skip)]
    squared_norms: Tensor<2>,
    /// m / ‖W₀ + γ·A·B‖ where it is computed already, because nothing is trained.
    #[module(skip)]
    settled: Option<Tensor<2>>,
}

/// The factor of each output, m / n, and the norms n it is made of, `[1, d_out]`.
#[derive(Debug, Clone)]
pub(crate) struct Scaling {
    pub(crate) factor: Tensor<2>,
    pub(crate) norms: Tensor<2>,
}

impl Dora {
    /// For a weight whose columns have these squared norms; without a magnitude, that of the columns of
    /// `W₀ + γ·A·B`, so that the layer's output does not change.
    pub(crate) fn new(
        weight: &Tensor<2>,
        adapter: &LoraAdapter,
        dense: Tensor<2>,
        magnitude: Option<Tensor<2>>,
    ) -> Self {
        let squared_norms = dense.cast(DType::F32).square().sum_dim(0);
        let start = match magnitude {
            Some(magnitude) => magnitude,
            None => {
                let norms = norms(weight, adapter, &squared_norms);
                match adapter.b.val().is_autodiff() {
                    true => norms.autodiff(),
                    false => norms,
                }
            }
        };
        Self {
            magnitude: Param::from_tensor(start),
            squared_norms,
            settled: None,
        }
    }

    /// For another weight in the first one's place: its quantized form.
    pub(crate) fn with_weight(mut self, dense: Tensor<2>) -> Self {
        self.squared_norms = dense.cast(DType::F32).square().sum_dim(0);
        self.settled = None;
        self
    }

    /// Computes the factors once and for all: for a layer that is not trained.
    pub(crate) fn settle(mut self, weight: &Tensor<2>, adapter: &LoraAdapter) -> Self {
        self.settled = None;
        self.settled = Some(self.scaling(weight, adapter).factor);
        self
    }

    /// ‖W₀ + γ·A·B‖ of each output, `[1, d_out]`, off the tape.
    pub(crate) fn norms(&self, weight: &Tensor<2>, adapter: &LoraAdapter) -> Tensor<2> {
        norms(weight, adapter, &self.squared_norms)
    }

    /// The factor of each output in f32, off the tape.
    pub(crate) fn scaling(&self, weight: &Tensor<2>, adapter: &LoraAdapter) -> Scaling {
        if let Some(factor) = &self.settled {
            return Scaling {
                factor: factor.clone(),
                norms: self.magnitude.val().without_autodiff() / factor.clone(),
            };
        }
        let norms = self.norms(weight, adapter);
        Scaling {
            factor: self.magnitude.val().without_autodiff() / norms.clone(),
            norms,
        }
    }
}

/// ‖W₀ + γ·A·B‖ of each column without building the sum:
/// ‖w‖² + 2γ·b·(Aᵀw) + γ²·b·(AᵀA)·b, where Aᵀ·W₀ is a product of r rows with the frozen weight.
fn norms(weight: &Tensor<2>, adapter: &LoraAdapter, squared_norms: &Tensor<2>) -> Tensor<2> {
    let a = adapter.a.val().without_autodiff();
    let b = adapter.b.val().without_autodiff();
    let weight = weight.clone().without_autodiff();
    let turned = a.clone().transpose();
    let dtype = match weight.dtype() {
        DType::QFloat(_) => DType::F32,
        dtype => dtype,
    };
    let cross = frozen_product(None, turned.clone().cast(dtype), weight, Direction::Forward);
    let scale = adapter.scale;
    let inner = cross.cast(DType::F32).mul_scalar(2.0 * scale)
        + turned.matmul(a).matmul(b.clone()).mul_scalar(scale * scale);
    let squares = squared_norms.clone() + (b * inner).sum_dim(0);
    // A column of zeros has no direction; a factor that is not a number would spoil the whole output.
    squares.clamp_min(f32::MIN_POSITIVE).sqrt()
}
