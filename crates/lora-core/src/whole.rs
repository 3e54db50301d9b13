//! Parameters of a layer that are trained themselves, beside or in place of an adapter: biases and dense weights (PEFT's
//! `bias`, `lora_bias` and `modules_to_save`).
//!
//! For `y = x·W + b + γ·c` with B's bias c and the gradient G of y: ∂W = xᵀ·G, ∂b = Σ G and ∂c = γ·Σ G over the rows.

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Gradients, Tensor};
use kernels::{Normalized, multiply_in_f32};

use crate::method::Accumulate;
use crate::{LinearGroup, LinearInput, LoraLinear};

/// A parameter that is trained itself, in f32.
#[derive(Debug, Clone, Copy)]
pub enum Trained<'a> {
    /// A bias or the gain of a norm, `[n]`.
    Vector(&'a Param<Tensor<1>>),
    /// A weight.
    Matrix(&'a Param<Tensor<2>>),
}

impl<'a> Trained<'a> {
    /// The parameter if it requires a gradient.
    pub fn vector(param: &'a Param<Tensor<1>>) -> Option<Self> {
        requires_gradient(param).then_some(Self::Vector(param))
    }

    /// The parameter if it requires a gradient. What is attached to it does not count.
    pub fn matrix(param: &'a Param<Tensor<2>>) -> Option<Self> {
        param
            .base()
            .is_require_grad()
            .then_some(Self::Matrix(param))
    }

    /// Its id.
    pub fn id(self) -> ParamId {
        match self {
            Self::Vector(param) => param.id,
            Self::Matrix(param) => param.id,
        }
    }

    /// Its value outside an autodiff graph; a vector as a row `[1, n]`.
    pub fn value(self) -> Tensor<2> {
        match self {
            Self::Vector(param) => param.val().without_autodiff().unsqueeze(),
            Self::Matrix(param) => param.base().without_autodiff(),
        }
    }

    /// Takes its gradient from those of a graph, in the shape of [`value`](Self::value).
    pub fn take_gradient(self, gradients: &mut Gradients) -> Option<Tensor<2>> {
        match self {
            Self::Vector(param) => Some(param.val().grad_remove(gradients)?.unsqueeze()),
            Self::Matrix(param) => param.base().grad_remove(gradients),
        }
    }

    /// Passes on a gradient in the shape of [`value`](Self::value), in f32.
    pub fn accumulate(self, gradient: Tensor<2>, accumulate: &mut Accumulate<'_>) {
        match self {
            // Only the id of the parameter is needed, and its type is one for matrices.
            Self::Vector(param) => {
                accumulate(&Param::initialized(param.id, self.value()), gradient)
            }
            Self::Matrix(param) => accumulate(param, gradient),
        }
    }
}

fn requires_gradient(param: &Param<Tensor<1>>) -> bool {
    param.val().is_require_grad()
}

/// The sums of the columns of `x`, in f32.
///
/// # Shapes
///
/// - `x`: `[n, width]`
/// - output: `[1, width]`
pub fn column_sums(x: Tensor<2>) -> Tensor<2> {
    x.cast(DType::F32).sum_dim(0)
}

impl LoraLinear {
    /// Adds a trained bias of B, `[d_out]`, which γ multiplies.
    pub fn with_lora_bias(mut self, bias: Tensor<1>) -> Self {
        self.lora_bias = Some(Param::from_tensor(bias));
        self
    }

    /// The trained parameters that are not the adapter's factors or vectors, by their names within the module in PEFT's
    /// files: `weight`, `bias`, `lora_B.bias`.
    pub fn trained_whole(&self) -> impl Iterator<Item = (&'static str, Trained<'_>)> {
        let bias = self.bias.as_ref().and_then(Trained::vector);
        let lora_bias = self.lora_bias.as_ref().and_then(Trained::vector);
        let all = [
            ("weight", Trained::matrix(&self.weight)),
            ("bias", bias),
            ("lora_B.bias", lora_bias),
        ];
        all.into_iter()
            .filter_map(|(name, param)| Some((name, param?)))
    }

    /// Whether anything of the layer is trained.
    pub fn trains(&self) -> bool {
        self.adapter().is_some() || self.trained_whole().next().is_some()
    }

    /// Whether the layer adds a bias to its products.
    pub(crate) fn adds_bias(&self) -> bool {
        self.bias.is_some() || self.lora_bias.is_some()
    }

    /// What the layer adds to each row of its products, `b + γ·c` with B's bias c, outside an autodiff graph, `[d_out]`.
    pub(crate) fn added_bias(&self, dtype: DType) -> Option<Tensor<1>> {
        let detached = |bias: &Option<Param<Tensor<1>>>| {
            let bias = bias.as_ref()?;
            Some(bias.val().without_autodiff())
        };
        let bias = detached(&self.bias);
        let scale = self.adapter().map_or(1.0, |adapter| adapter.scale());
        let Some(of_b) = detached(&self.lora_bias) else {
            return bias.map(|bias| bias.cast(dtype));
        };
        let of_b = of_b.mul_scalar(scale);
        let sum = match bias {
            Some(bias) => bias.cast(DType::F32) + of_b,
            None => of_b,
        };
        Some(sum.cast(dtype))
    }

    /// The weight without the adapter for products in `dtype`: a trained one is stored in f32.
    pub(crate) fn weight_in(&self, dtype: DType) -> Tensor<2> {
        let weight = self.weight.base();
        if weight.is_require_grad() {
            weight.without_autodiff().cast(dtype)
        } else {
            weight
        }
    }
}

impl<const N: usize> LinearGroup<'_, N> {
    /// Whether anything of the layers is trained.
    pub fn trains(&self) -> bool {
        self.layers.iter().any(|layer| layer.trains())
    }

    /// Whether the backward pass reads the input: for an adapter or a trained weight.
    pub fn reads_input(&self) -> bool {
        self.has_adapters() || self.trains_weight()
    }

    pub(crate) fn trains_weight(&self) -> bool {
        let mut layers = self.layers.iter();
        layers.any(|layer| Trained::matrix(&layer.weight).is_some())
    }

    /// The gradients of biases, and of the weights if `x` is there.
    pub(crate) fn gradients_of_whole(
        &self,
        x: Option<&Tensor<2>>,
        d_outputs: &[Tensor<2>; N],
        accumulate: &mut Accumulate<'_>,
    ) {
        for (layer, d_output) in self.layers.iter().zip(d_outputs) {
            if let (Some(weight), Some(x)) = (Trained::matrix(&layer.weight), x) {
                let x = x.clone().cast(d_output.dtype()).transpose();
                weight.accumulate(multiply_in_f32(x, d_output.clone()), accumulate);
            }
            let bias = layer.bias.as_ref().and_then(Trained::vector);
            let of_b = layer.lora_bias.as_ref().and_then(Trained::vector);
            if bias.is_none() && of_b.is_none() {
                continue;
            }
            let sums = column_sums(d_output.clone());
            if let Some(of_b) = of_b {
                let scale = layer.adapter().map_or(1.0, |adapter| adapter.scale());
                of_b.accumulate(sums.clone().mul_scalar(scale), accumulate);
            }
            if let Some(bias) = bias {
                bias.accumulate(sums, accumulate);
            }
        }
    }
}

/// The input of a group: computed already, or not yet.
#[allow(clippy::large_enum_variant)] // It lives for a few lines.
pub(crate) enum Input<X> {
    Known(Tensor<2>),
    Later(X),
}

impl<X> Input<X> {
    /// The input, if it is known.
    pub(crate) fn known(&self) -> Option<&Tensor<2>> {
        match self {
            Self::Known(x) => Some(x),
            Self::Later(_) => None,
        }
    }
}

impl<X: LinearInput> LinearInput for Input<X> {
    fn tensor(self) -> Tensor<2> {
        match self {
            Self::Known(x) => x,
            Self::Later(x) => x.tensor(),
        }
    }

    fn normalized(&self) -> Option<Normalized> {
        match self {
            Self::Known(_) => None,
            Self::Later(x) => x.normalized(),
        }
    }
}
