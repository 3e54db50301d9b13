//! DoRA: an adapter that changes the direction of each output's weights, with a trained magnitude per output.

use burn::module::{LoraAdapter, Module, Param, Reparameterization};
use burn::tensor::{DType, Tensor};

use kernels::{Direction, frozen_product, product};

use super::{Accumulate, Adapter, Facts, Method, Scaling, Vector, Width, attached};
use crate::LoraLinear;

pub(super) static FACTS: Facts = Facts {
    name: "DoRA",
    peft_type: "LORA",
    flag: Some("use_dora"),
    lacks: &super::lora::LACKS,
    renamed: &[],
    shared: None,
    vectors: &[Vector {
        name: "lora_magnitude_vector",
        width: Width::Outputs,
    }],
    beyond_low_rank: Some(
        "a DoRA scales each output by a norm of the base's weight, which the merged model does not contain",
    ),
    scales_outputs: true,
    allows_lora_bias: false,
};

/// An adapter of DoRA (Liu et al., 2024, <https://arxiv.org/abs/2402.09353>).
///
/// The layer's weight is `W₀ + γ·A·B` with its columns scaled to the trained magnitudes m:
/// `h = (m / ‖W₀ + γ·A·B‖) ⊙ (x·W₀ + γ·(x·A)·B)`. As in PEFT (and the paper's section 4.3) the norm is a
/// constant in the backward pass.
#[derive(Module, Debug)]
pub struct Dora {
    /// A, B and γ.
    pub lora: LoraAdapter,
    /// The magnitude m of each output, `[1, d_out]`: the norm of its column of weights.
    pub magnitude: Param<Tensor<2>>,
    /// ‖W₀‖² per column, `[1, d_out]`, f32 and outside the autodiff graph.
    #[module(skip)]
    squared_norms: Tensor<2>,
    /// The cached m / ‖W₀ + γ·A·B‖ of a layer that is not trained.
    #[module(skip)]
    cached_factor: Option<Tensor<2>>,
}

/// The layer with its LoRA made a DoRA. Without a magnitude, the norms of the columns of `W₀ + γ·A·B`, so that the
/// layer's output does not change.
pub(super) fn attach(
    mut layer: LoraLinear,
    lora: LoraAdapter,
    vectors: Option<Vec<Tensor<2>>>,
) -> LoraLinear {
    let (base, dense) = (layer.weight.base(), layer.dense_base());
    let squared_norms = squares(dense);
    let magnitude = vectors.and_then(|vectors| vectors.into_iter().next());
    let magnitude = magnitude.unwrap_or_else(|| {
        let norms = norms(&base, &lora, &squared_norms);
        if lora.b.val().is_autodiff() {
            norms.autodiff()
        } else {
            norms
        }
    });
    let adapter = Dora {
        lora,
        magnitude: Param::from_tensor(magnitude),
        squared_norms,
        cached_factor: None,
    };
    layer.weight = attached(layer.bare_weight(), adapter);
    layer
}

/// m / ‖W₀ + γ·A·B‖ per output, on the host. `squares` are the squared norms.
pub(super) fn output_factors(vectors: &[&[f32]], squares: &[f64]) -> Vec<f32> {
    let magnitude = vectors.first().copied().unwrap_or_default();
    let norms = squares.iter().map(|square| square.sqrt().max(1e-19));
    let factors = magnitude.iter().zip(norms);
    factors
        .map(|(magnitude, norm)| (f64::from(*magnitude) / norm) as f32)
        .collect()
}

/// ‖w‖² per column, `[1, d_out]`.
fn squares(dense: Tensor<2>) -> Tensor<2> {
    dense.cast(DType::F32).square().sum_dim(0)
}

impl Reparameterization for Dora {
    const NAME: &'static str = "dora";

    /// The dense merged weight, for `Module::materialize()` and for `Param::val()`.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let shape = base.shape();
        let sum = self.lora.apply(base);
        let [_, d_out] = self.magnitude.lazy_shape().dims();
        let sum: Tensor<2> = sum.reshape([shape.num_elements() / d_out, d_out]);
        let tracked = sum.is_autodiff();
        let squares = squares(sum.clone().without_autodiff());
        let norms = squares.clamp_min(f32::MIN_POSITIVE).sqrt();
        let norms = if tracked { norms.autodiff() } else { norms };
        let factor = (self.magnitude.val() / norms).cast(sum.dtype());
        (sum * factor).reshape(shape)
    }
}

impl Dora {
    /// ‖W₀ + γ·A·B‖ per column, `[1, d_out]`, outside the autodiff graph.
    fn norms(&self, base: &Tensor<2>) -> Tensor<2> {
        norms(base, &self.lora, &self.squared_norms)
    }
}

impl Adapter for Dora {
    fn method(&self) -> Method {
        Method::Dora
    }

    fn scale(&self) -> f64 {
        self.lora.scale
    }

    fn rank(&self) -> usize {
        self.lora.rank()
    }

    fn factors(&self) -> [Tensor<2>; 2] {
        self.lora.factors()
    }

    fn trainable(&self) -> Vec<&Param<Tensor<2>>> {
        vec![&self.lora.a, &self.lora.b, &self.magnitude]
    }

    fn vectors(&self) -> Vec<&Param<Tensor<2>>> {
        vec![&self.magnitude]
    }

    fn gradient_of_a(&self, gradient: Tensor<2>, accumulate: &mut Accumulate<'_>) {
        self.lora.gradient_of_a(gradient, accumulate);
    }

    fn gradient_of_b(&self, gradient: Tensor<2>, accumulate: &mut Accumulate<'_>) {
        self.lora.gradient_of_b(gradient, accumulate);
    }

    /// The factor m / n; the norms n are saved.
    fn scaling(&self, base: &Tensor<2>) -> Option<Scaling> {
        let magnitude = self.magnitude.val().without_autodiff();
        Some(match &self.cached_factor {
            Some(factor) => Scaling {
                factor: factor.clone(),
                saved: magnitude / factor.clone(),
            },
            None => {
                let norms = self.norms(base);
                Scaling {
                    factor: magnitude / norms.clone(),
                    saved: norms,
                }
            }
        })
    }

    fn scaling_in_graph(&self, base: &Tensor<2>, tracked: bool) -> Option<Tensor<2>> {
        let norms = self.norms(base);
        let norms = if tracked { norms.autodiff() } else { norms };
        Some(self.magnitude.val() / norms)
    }

    fn gradient_of_scaling(
        &self,
        scaling: &Scaling,
        gradient: Tensor<2>,
        accumulate: &mut Accumulate<'_>,
    ) {
        accumulate(&self.magnitude, gradient / scaling.saved.clone());
    }

    fn attach_to(
        &self,
        weight: Param<Tensor<2>>,
        dense: &dyn Fn() -> Tensor<2>,
    ) -> Param<Tensor<2>> {
        let adapter = Self {
            squared_norms: squares(dense()),
            cached_factor: None,
            ..self.clone()
        };
        attached(weight, adapter)
    }

    /// With the factors computed.
    fn attach_for_inference(&self, weight: Param<Tensor<2>>) -> Param<Tensor<2>> {
        let mut adapter = self.clone();
        adapter.cached_factor = None;
        let scaling = adapter.scaling(&weight.base());
        adapter.cached_factor = scaling.map(|scaling| scaling.factor);
        attached(weight, adapter)
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
    use crate::{LoraConfig, LoraError};
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
            .with_method(Method::Dora, Some(vec![magnitude]))
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
            method: Method::Dora,
            ..LoraConfig::default()
        };
        for quantization in [Quantization::None, Quantization::Bits8, Quantization::Bits4] {
            let linear = LinearConfig::new(64, 96).init(&device);
            let base = LoraLinear::frozen(linear).quantize(quantization).unwrap();
            let x = random([5, 64], 3, &device);
            let before = base.forward(x.clone());
            let dense = base.dense_base();
            let new = base.with_new_adapter(&config, 7).unwrap();
            let magnitude = new.adapter().unwrap().trainable()[2].val();
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
        assert!(plain.adapter().is_none() && plain.trainable().is_empty());
    }

    #[test]
    fn a_column_of_zeros_stays_zero() {
        let device = Device::flex();
        let mut linear = LinearConfig::new(8, 4).with_bias(false).init(&device);
        linear.weight = Param::from_tensor(Tensor::zeros([8, 4], &device));
        let config = LoraConfig {
            r: 2,
            method: Method::Dora,
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
            plain.clone().with_method(Method::Dora, None).unwrap_err(),
            LoraError::NoAdapter
        );
        let adapted = plain.with_new_adapter(&LoraConfig::default(), 1).unwrap();
        let wrong = adapted
            .clone()
            .with_method(Method::Dora, Some(vec![Tensor::ones([1, 5], &device)]));
        assert!(matches!(wrong, Err(LoraError::Shape { .. })));
        let none = adapted.with_method(Method::Dora, Some(Vec::new()));
        assert!(matches!(none, Err(LoraError::Shape { .. })));
    }

    #[test]
    fn burns_materialize_keeps_the_magnitude() {
        let device = Device::flex();
        for quantization in [Quantization::None, Quantization::Bits8] {
            let layer = layer(&device, quantization);
            let x = random([5, 64], 3, &device);
            let expected = layer.forward(x.clone());
            let materialized = layer.clone().materialize();
            assert!(materialized.adapter().is_none());
            assert!(distance(&materialized.forward(x), &expected) < 3e-6);
            let merged = layer.merge().weight.val();
            assert!(distance(&layer.weight.val(), &merged) < 1e-6);
        }
    }

    #[test]
    fn records_and_valid_keep_the_magnitude_and_training_restores_it() {
        let device = Device::flex().autodiff();
        let trained = layer(&device, Quantization::None);
        let x = random([5, 64], 3, &Device::flex());
        let expected = trained.forward(x.clone().autodiff()).inner();
        let valid = trained.valid();
        assert_eq!(distance(&valid.forward(x.clone()), &expected), 0.0);
        let again = valid.train();
        let trainable = again.trainable();
        assert_eq!(trainable.len(), 3);
        assert!(trainable.iter().all(|param| param.val().is_require_grad()));
        // Another layer's magnitude and factors, on the same weight.
        let mut other = LoraLinear::frozen(LinearConfig::new(64, 96).init(&device));
        other.weight = trained.clone().without_adapter().weight;
        let zeros = [[64, 4], [4, 96]].map(|shape| Tensor::zeros(shape, &device));
        let [a, b] = zeros;
        let other = other.with_adapter(a, b, SCALE).unwrap();
        let other = other.with_method(Method::Dora, None).unwrap();
        let loaded = other.load_record(trained.into_record()).valid();
        assert_eq!(distance(&loaded.forward(x), &expected), 0.0);
    }
}
