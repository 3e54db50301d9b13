//! DoRA: an adapter that changes the direction of each output's weights, with a trained magnitude per output.

use burn::module::{LoraAdapter, Module, Param};
use burn::tensor::{DType, Tensor};

use kernels::{Direction, frozen_product, product};

/// The magnitudes that DoRA (Liu et al., 2024, <https://arxiv.org/abs/2402.09353>) adds to an adapter.
///
/// The layer's weight is `W₀ + γ·A·B` with its columns scaled to the trained magnitudes m:
/// `h = (m / ‖W₀ + γ·A·B‖) ⊙ (x·W₀ + γ·(x·A)·B)`. As in PEFT (and the paper's section 4.3) the norm is a
/// constant in the backward pass.
#[derive(Module, Debug)]
pub struct Dora {
    /// The magnitude m of each output, `[1, d_out]`: the norm of its column of weights.
    pub magnitude: Param<Tensor<2>>,
    /// ‖W₀‖² per column, `[1, d_out]`, f32 and outside the autodiff graph.
    #[module(skip)]
    squared_norms: Tensor<2>,
    /// The cached m / ‖W₀ + γ·A·B‖ of a layer that is not trained.
    #[module(skip)]
    cached_factor: Option<Tensor<2>>,
}

/// The factor m / n per output, and the norms n, `[1, d_out]` each.
#[derive(Debug, Clone)]
pub(crate) struct Scaling {
    pub(crate) factor: Tensor<2>,
    pub(crate) norms: Tensor<2>,
}

impl Dora {
    /// For the weight whose dense values are `dense`. Without a magnitude, the norms of the columns of `W₀ + γ·A·B`, so
    /// that the layer's output does not change.
    pub(crate) fn new(
        weight: &Tensor<2>,
        adapter: &LoraAdapter,
        dense: Tensor<2>,
        magnitude: Option<Tensor<2>>,
    ) -> Self {
        let squared_norms = dense.cast(DType::F32).square().sum_dim(0);
        let magnitude = match magnitude {
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
            magnitude: Param::from_tensor(magnitude),
            squared_norms,
            cached_factor: None,
        }
    }

    /// The same magnitudes for another weight: the quantized form of the first.
    pub(crate) fn with_weight(mut self, dense: Tensor<2>) -> Self {
        self.squared_norms = dense.cast(DType::F32).square().sum_dim(0);
        self.cached_factor = None;
        self
    }

    /// Caches the factors, for a layer that is not trained.
    pub(crate) fn cache_factor(mut self, weight: &Tensor<2>, adapter: &LoraAdapter) -> Self {
        self.cached_factor = None;
        self.cached_factor = Some(self.scaling(weight, adapter).factor);
        self
    }

    /// ‖W₀ + γ·A·B‖ per column, `[1, d_out]`, outside the autodiff graph.
    pub(crate) fn norms(&self, weight: &Tensor<2>, adapter: &LoraAdapter) -> Tensor<2> {
        norms(weight, adapter, &self.squared_norms)
    }

    /// The factor per output in f32, outside the autodiff graph.
    pub(crate) fn scaling(&self, weight: &Tensor<2>, adapter: &LoraAdapter) -> Scaling {
        if let Some(factor) = &self.cached_factor {
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

/// ‖W₀ + γ·A·B‖ per column without building the sum: the square root of
/// ‖w‖² + 2γ·b·(Aᵀw) + γ²·b·(AᵀA)·b, where Aᵀ·W₀ is a product of r rows with the frozen weight.
fn norms(weight: &Tensor<2>, adapter: &LoraAdapter, squared_norms: &Tensor<2>) -> Tensor<2> {
    let a = adapter.a.val().without_autodiff();
    let b = adapter.b.val().without_autodiff();
    let weight = weight.clone().without_autodiff();
    let a_transposed = a.clone().transpose();
    let dtype = match weight.dtype() {
        DType::QFloat(_) => DType::F32,
        dtype => dtype,
    };
    let left = a_transposed.clone().cast(dtype);
    let cross = frozen_product(None, left, weight, Direction::Forward);
    let scale = adapter.scale;
    let inner = cross.cast(DType::F32).mul_scalar(2.0 * scale)
        + product(product(a_transposed, a), b.clone()).mul_scalar(scale * scale);
    let squares = squared_norms.clone() + (b * inner).sum_dim(0);
    // A column of zeros has norm 0; the factor m / 0 would make the output NaN.
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
            // f32 sums of 64 products, and a norm that is computed from three sums.
            assert!(distance(&y.inner(), &expected) < 3e-6);
            assert!(distance(&layer.merge().weight.val(), &weight) < 1e-6);
            let restored = layer.unmerge(layer.merge()).unwrap();
            assert!(distance(&restored.weight.val(), &layer.dense_base()) < 3e-6);

            // With the norm a constant, the scaled gradient replaces the gradient.
            let scaled = grad.clone() * factor;
            let d_xa = scaled.clone().matmul(plain(b).transpose()) * SCALE;
            let xa = x_plain.clone().matmul(plain(a)) * SCALE;
            let unscaled = x_plain.clone().matmul(sum);
            for (got, expected) in [
                (a.val().grad(&gradients), x_plain.transpose().matmul(d_xa)),
                (b.val().grad(&gradients), xa.transpose().matmul(scaled)),
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
    fn a_new_dora_has_the_norms_of_the_dequantized_weights_and_keeps_the_output() {
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
            let new = base.with_new_adapter(&config, 7).unwrap();
            let magnitude = new.dora.as_ref().unwrap().magnitude.val();
            let norms = dense.square().sum_dim(0).sqrt();
            assert!(distance(&magnitude, &norms) < 1e-6);
            assert!(distance(&new.forward(x), &before) < 1e-6);
        }
    }

    #[test]
    fn a_cached_scaling_keeps_the_output_and_a_layer_without_its_adapter_has_no_dora() {
        let device = Device::flex();
        let layer = layer(&device, Quantization::Bits8);
        let x = random([5, 64], 3, &device);
        let cached = layer.clone().for_inference();
        assert!(distance(&cached.forward(x.clone()), &layer.forward(x.clone())) < 1e-6);
        let plain = layer.without_adapter();
        assert!(plain.dora.is_none() && plain.trainable().is_empty());
    }

    #[test]
    fn a_column_of_zeros_stays_zero() {
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
