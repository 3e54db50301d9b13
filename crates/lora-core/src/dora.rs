//! DoRA: an adapter that changes the direction of each output's weights, and a trained length for each.

use burn::module::{LoraAdapter, Module, Param};
use burn::tensor::{DType, Tensor};

use kernels::{Direction, frozen_product, product};

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
                if adapter.b.val().is_autodiff() {
                    norms.autodiff()
                } else {
                    norms
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
        + product(product(turned, a), b.clone()).mul_scalar(scale * scale);
    let squares = squared_norms.clone() + (b * inner).sum_dim(0);
    // A column of zeros has no direction; a factor that is not a number would spoil the whole output.
    squares.clamp_min(f32::MIN_POSITIVE).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LoraConfig, LoraError, LoraLinear};
    use burn::nn::LinearConfig;
    use burn::tensor::Device;
    use kernels::{CounterRng, Quantization, normal};

    const SCALE: f64 = 1.5;

    fn random(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
        normal(shape, 0.3, &mut CounterRng::new(seed), device)
    }

    /// A layer of 64 inputs and 96 outputs with a bias and a DoRA whose magnitude is not the norm.
    fn layer(device: &Device, quantization: Quantization) -> LoraLinear {
        let magnitude = random([1, 96], 5, device).add_scalar(2.0);
        LoraLinear::frozen(LinearConfig::new(64, 96).init(device))
            .with_adapter(
                random([64, 4], 1, device),
                random([4, 96], 2, device),
                SCALE,
            )
            .unwrap()
            .with_dora(Some(magnitude))
            .unwrap()
            .quantize(quantization)
            .unwrap()
    }

    fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
        let norm = |x: Tensor<2>| x.powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        norm(a.clone() - b.clone()) / norm(b.clone())
    }

    #[test]
    fn forward_merge_and_gradients_are_those_of_the_dense_formula() {
        let device = Device::flex().autodiff();
        for quantization in [Quantization::None, Quantization::Bits8] {
            let layer = layer(&device, quantization);
            let x = random([7, 64], 3, &device).require_grad();
            let grad = random([7, 96], 4, &device);
            let y = layer.forward(x.clone());
            let gradients = (y.clone() * grad.clone()).sum().backward();

            let [a, b, magnitude] = layer.trainable()[..] else {
                panic!("three trainable tensors");
            };
            let plain = |param: &Param<Tensor<2>>| param.val().inner();
            let sum = layer.dense_base() + plain(a).matmul(plain(b)) * SCALE;
            let norms = sum.clone().square().sum_dim(0).sqrt();
            let factor = plain(magnitude) / norms.clone();
            let (x_plain, grad) = (x.clone().inner(), grad.inner());
            let weight = sum.clone() * factor.clone();
            let bias = layer.bias.as_ref().unwrap().val().inner().unsqueeze();
            let expected = x_plain.clone().matmul(weight.clone()) + bias;
            // f32 sums of 64 products, and a norm that is put together from three sums.
            assert!(distance(&y.inner(), &expected) < 3e-6);
            assert!(distance(&layer.merge().weight.val(), &weight) < 1e-6);
            let restored = layer.unmerge(layer.merge()).unwrap();
            assert!(distance(&restored.weight.val(), &layer.dense_base()) < 3e-6);

            // Where the norm is a constant, the scaled gradient takes the gradient's place.
            let scaled = grad.clone() * factor;
            let through = scaled.clone().matmul(plain(b).transpose()) * SCALE;
            let low = x_plain.clone().matmul(plain(a)) * SCALE;
            let unscaled = x_plain.clone().matmul(sum);
            for (got, expected) in [
                (
                    a.val().grad(&gradients),
                    x_plain.transpose().matmul(through),
                ),
                (b.val().grad(&gradients), low.transpose().matmul(scaled)),
                (
                    magnitude.val().grad(&gradients),
                    (grad.clone() * unscaled).sum_dim(0) / norms,
                ),
                (x.grad(&gradients), grad.matmul(weight.transpose())),
            ] {
                let difference = distance(&got.unwrap(), &expected);
                assert!(difference < 3e-6, "{quantization:?}: {difference}");
            }
        }
    }

    #[test]
    fn a_fresh_one_has_the_norms_of_the_weights_that_are_used_and_leaves_the_output() {
        let device = Device::flex();
        let config = LoraConfig {
            r: 4,
            use_dora: true,
            ..LoraConfig::default()
        };
        for quantization in [Quantization::None, Quantization::Bits8, Quantization::Bits4] {
            let linear = LinearConfig::new(64, 96).init(&device);
            let base = LoraLinear::frozen(linear).quantize(quantization).unwrap();
            let x = random([5, 64], 3, &device);
            let before = base.forward(x.clone());
            let dense = base.dense_base();
            let fresh = base.with_new_adapter(&config, 7).unwrap();
            let magnitude = fresh.dora.as_ref().unwrap().magnitude.val();
            let norms = dense.square().sum_dim(0).sqrt();
            assert!(distance(&magnitude, &norms) < 1e-6);
            assert!(distance(&fresh.forward(x), &before) < 1e-6);
        }
    }

    #[test]
    fn settling_changes_no_output_and_leaving_the_adapter_out_none_of_the_base_s() {
        let device = Device::flex();
        let layer = layer(&device, Quantization::Bits8);
        let x = random([5, 64], 3, &device);
        let settled = layer.clone().settled();
        assert!(distance(&settled.forward(x.clone()), &layer.forward(x.clone())) < 1e-6);
        let plain = layer.without_adapter();
        assert!(plain.dora.is_none() && plain.trainable().is_empty());
    }

    #[test]
    fn a_column_of_zeros_stays_one() {
        let device = Device::flex();
        let mut linear = LinearConfig::new(8, 4).with_bias(false).init(&device);
        linear.weight = Param::from_tensor(Tensor::zeros([8, 4], &device));
        let config = LoraConfig {
            r: 2,
            use_dora: true,
            ..LoraConfig::default()
        };
        let layer = LoraLinear::new(linear, &config, 1).unwrap();
        let y = layer.forward(random([3, 8], 1, &device)).abs().max();
        assert_eq!(y.into_scalar::<f32>(), 0.0);
    }

    #[test]
    fn what_does_not_fit_is_a_typed_error() {
        let device = Device::flex();
        let plain = LoraLinear::frozen(LinearConfig::new(8, 4).init(&device));
        assert_eq!(
            plain.clone().with_dora(None).unwrap_err(),
            LoraError::NoAdapter
        );
        let adapted = plain.with_new_adapter(&LoraConfig::default(), 1).unwrap();
        let wrong = adapted.with_dora(Some(Tensor::ones([1, 5], &device)));
        assert!(matches!(wrong, Err(LoraError::Shape { .. })));
    }
}
