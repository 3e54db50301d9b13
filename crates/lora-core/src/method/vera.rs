//! VeRA: random matrices that are frozen and the same for all layers, and two trained vectors per layer.

use burn::module::{LoraAdapter, Module, Param, Reparameterization};
use burn::tensor::{DType, Device, Tensor};
use kernels::cpu;
use rand_mt::Mt;

use super::{Accumulate, Adapter, Facts, Method, Vector, Width, attached};
use crate::{Factors, LoraConfig, LoraLinear};

pub(super) static FACTS: Facts = Facts {
    name: "VeRA",
    peft_type: "VERA",
    flag: None,
    lacks: &[
        "lora_alpha",
        "use_rslora",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "lora_bias",
        "ensure_weight_tying",
        "trainable_token_indices",
    ],
    renamed: &[("lora_dropout", "vera_dropout")],
    shared: Some(["vera_A", "vera_B"]),
    vectors: &[
        Vector {
            name: "vera_lambda_b",
            width: Width::Outputs,
        },
        Vector {
            name: "vera_lambda_d",
            width: Width::Rank,
        },
    ],
    beyond_low_rank: None,
    scales_outputs: false,
    allows_lora_bias: false,
};

/// An adapter of VeRA (Kopiczko et al., 2023, <https://arxiv.org/abs/2310.11454>): `h = x·W₀ + ((x·A)⊙d)·B ⊙ b`.
///
/// A and B are random, frozen, and the same for all layers of a model: a layer uses their first d_in rows and d_out
/// columns. Trained are d, one number per rank, and b, one number per output. In terms of [`Adapter`], A is constant and
/// B is `diag(d)·B·diag(b)`, so that the passes are those of a LoRA.
#[derive(Module, Debug)]
pub struct Vera {
    /// b, `[1, d_out]`.
    pub lambda_b: Param<Tensor<2>>,
    /// d, `[1, r]`.
    pub lambda_d: Param<Tensor<2>>,
    /// γ, which is 1 in PEFT.
    scale: f64,
    /// Width of the layer's input.
    d_in: usize,
    /// A `[≥ d_in, r]` and B `[r, ≥ d_out]`, in f32 and outside the autodiff graph: clones of the same two tensors in
    /// all layers.
    #[module(skip)]
    shared: [Tensor<2>; 2],
    /// The cached `diag(d)·B·diag(b)` of a layer that is not trained.
    #[module(skip)]
    cached_b: Option<Tensor<2>>,
}

/// The layer with the matrices of `lora` as the shared ones. The vectors are b and d; without them the layer stays as it
/// is.
pub(super) fn attach(
    mut layer: LoraLinear,
    lora: LoraAdapter,
    vectors: Option<Vec<Tensor<2>>>,
) -> LoraLinear {
    let Some(Ok([lambda_b, lambda_d])) = vectors.map(<[Tensor<2>; 2]>::try_from) else {
        return layer;
    };
    let adapter = Vera {
        lambda_b: Param::from_tensor(lambda_b),
        lambda_d: Param::from_tensor(lambda_d),
        scale: lora.scale,
        d_in: layer.dims()[0],
        shared: [lora.a, lora.b].map(|matrix| matrix.val().without_autodiff()),
        cached_b: None,
    };
    layer.weight = attached(layer.bare_weight(), adapter);
    layer
}

/// b = 0, so that the output does not change, and d = `d_initial`.
pub(super) fn initial_vectors(
    config: &LoraConfig,
    d_out: usize,
    device: &Device,
) -> Vec<Tensor<2>> {
    let options = (device, DType::F32);
    let b = Tensor::zeros([1, d_out], options);
    let d = Tensor::full([1, config.r], config.d_initial, options);
    vec![b, d]
}

/// A and B as PEFT draws them for a model whose largest input and output are `largest`: Kaiming-uniform numbers of a
/// Mersenne Twister (MT19937) with the seed `projection_prng_key`, A first.
///
/// The numbers are those of torch's generator on a CPU with fused multiplication and addition, bit for bit: 24 bits of a
/// word each, in the row-major order of `[r, d_in]` and `[d_out, r]`.
pub(super) fn projections(config: &LoraConfig, [d_in, d_out]: [usize; 2]) -> Factors {
    let r = config.r;
    // torch seeds this generator with the lower 32 bits.
    let mut words = Mt::new(config.projection_prng_key as u32);
    let mut uniform = |count: usize, fan_in: usize| -> Vec<f32> {
        let deviation = 2f64.sqrt() / (fan_in as f64).sqrt();
        let bound = (3f64.sqrt() * deviation) as f32;
        let draw = |_| {
            let unit = (words.next_u32() & 0xff_ffff) as f32 * 2f32.powi(-24);
            unit.mul_add(bound - -bound, -bound)
        };
        (0..count).map(draw).collect()
    };
    let a = uniform(r * d_in, d_in);
    let b = uniform(d_out * r, r);
    Factors {
        a: cpu::transposed(&a, [r, d_in]),
        b: cpu::transposed(&b, [d_out, r]),
        shape: [d_in, r, d_out],
    }
}

/// A and `diag(d)·B·diag(b)` of a layer. `vectors` are b and d; the shared matrices are at least as wide as the layer.
pub(super) fn factors(shared: &Factors, layer: [usize; 2], vectors: &[&[f32]]) -> Factors {
    let [_, r, widest] = shared.shape;
    let [d_in, d_out] = layer;
    let [lambda_b, lambda_d] = [0, 1].map(|index| vectors.get(index).copied().unwrap_or_default());
    let rows = shared.b.chunks_exact(widest.max(1)).zip(lambda_d);
    let b = rows.flat_map(|(row, d)| {
        row[..d_out]
            .iter()
            .zip(lambda_b)
            .map(move |(x, b)| x * d * b)
    });
    Factors {
        a: shared.a[..d_in * r].to_vec(),
        b: b.collect(),
        shape: [d_in, r, d_out],
    }
}

impl Reparameterization for Vera {
    const NAME: &'static str = "vera";

    /// The dense merged weight, for `Module::materialize()` and for `Param::val()`.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let [a, b] = self.factors();
        let delta = a.matmul(b).mul_scalar(self.scale).reshape(base.shape());
        // A quantized base is dequantized by the sum.
        let base = if base.dtype().is_float() && base.dtype() != delta.dtype() {
            base.cast(delta.dtype())
        } else {
            base
        };
        base + delta
    }
}

impl Vera {
    /// A `[d_in, r]` and B `[r, d_out]` of this layer, without the vectors.
    fn sliced(&self) -> [Tensor<2>; 2] {
        let [_, d_out] = self.lambda_b.lazy_shape().dims();
        let [a, b] = self.shared.clone();
        [a.narrow(0, 0, self.d_in), b.narrow(1, 0, d_out)]
    }

    /// A and `diag(d)·B·diag(b)`, in the vectors' autodiff graph if they are in one.
    fn factors_with(&self, [lambda_b, lambda_d]: [Tensor<2>; 2]) -> [Tensor<2>; 2] {
        let tracked = lambda_b.is_autodiff();
        let [a, b] = self
            .sliced()
            .map(|matrix| if tracked { matrix.autodiff() } else { matrix });
        let b = match &self.cached_b {
            Some(cached) if tracked => cached.clone().autodiff(),
            Some(cached) => cached.clone(),
            None => b * lambda_d.transpose() * lambda_b,
        };
        [a, b]
    }
}

impl Adapter for Vera {
    fn method(&self) -> Method {
        Method::Vera
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn rank(&self) -> usize {
        self.lambda_d.lazy_shape()[1]
    }

    fn factors(&self) -> [Tensor<2>; 2] {
        let vectors = [self.lambda_b.val(), self.lambda_d.val()];
        self.factors_with(vectors)
    }

    fn detached_factors(&self) -> [Tensor<2>; 2] {
        let vectors = [&self.lambda_b, &self.lambda_d];
        self.factors_with(vectors.map(|vector| vector.val().without_autodiff()))
    }

    fn trainable(&self) -> Vec<&Param<Tensor<2>>> {
        self.vectors()
    }

    fn vectors(&self) -> Vec<&Param<Tensor<2>>> {
        vec![&self.lambda_b, &self.lambda_d]
    }

    fn shared(&self) -> Option<[Tensor<2>; 2]> {
        Some(self.shared.clone())
    }

    fn trains_a(&self) -> bool {
        false
    }

    fn gradient_of_a(&self, _gradient: Tensor<2>, _accumulate: &mut Accumulate<'_>) {}

    /// With G the gradient of `diag(d)·B·diag(b)`: ∂b is the sum of `G ⊙ diag(d)·B` over the ranks, ∂d that of
    /// `G ⊙ B·diag(b)` over the outputs.
    fn gradient_of_b(&self, gradient: Tensor<2>, accumulate: &mut Accumulate<'_>) {
        let [_, b] = self.sliced();
        let [lambda_b, lambda_d] =
            [&self.lambda_b, &self.lambda_d].map(|vector| vector.val().without_autodiff());
        let product = gradient * b;
        let d_b = (product.clone() * lambda_d.transpose()).sum_dim(0);
        let d_d = (product * lambda_b).sum_dim(1).transpose();
        accumulate(&self.lambda_b, d_b);
        accumulate(&self.lambda_d, d_d);
    }

    fn attach_to(
        &self,
        weight: Param<Tensor<2>>,
        _dense: &dyn Fn() -> Tensor<2>,
    ) -> Param<Tensor<2>> {
        attached(weight, self.clone())
    }

    /// With `diag(d)·B·diag(b)` computed.
    fn attach_for_inference(&self, weight: Param<Tensor<2>>) -> Param<Tensor<2>> {
        let mut adapter = self.clone();
        adapter.cached_b = None;
        let [_, b] = adapter.detached_factors();
        adapter.cached_b = Some(b);
        attached(weight, adapter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LoraError;
    use burn::nn::LinearConfig;
    use kernels::{CounterRng, Quantization, normal};

    const SCALE: f64 = 1.5;

    fn random(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
        normal(shape, 0.3, &mut CounterRng::new(seed), device)
    }

    /// A layer of 64 inputs and 96 outputs with a bias, whose matrices are for 80 and 100.
    fn layer(device: &Device, quantization: Quantization) -> LoraLinear {
        let matrices = [random([80, 4], 1, device), random([4, 100], 2, device)];
        let vectors = vec![random([1, 96], 5, device), random([1, 4], 6, device)];
        LoraLinear::frozen(LinearConfig::new(64, 96).init(device))
            .with_adapter_of(Method::Vera, matrices, SCALE, Some(vectors))
            .unwrap()
            .quantize(quantization)
            .unwrap()
    }

    fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
        let norm = |x: Tensor<2>| x.powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        norm(a.clone() - b.clone()) / norm(b.clone())
    }

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().try_to_vec().unwrap()
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

            let [lambda_b, lambda_d] = layer.trainable()[..] else {
                panic!("two trainable tensors");
            };
            let plain = |param: &Param<Tensor<2>>| param.val().inner();
            let (b, d) = (plain(lambda_b), plain(lambda_d));
            // ((x·A)⊙d)·B ⊙ b, in the order of the paper.
            let matrix_a = random([80, 4], 1, &Device::flex()).narrow(0, 0, 64);
            let matrix_b = random([4, 100], 2, &Device::flex()).narrow(1, 0, 96);
            let (x_plain, grad) = (x.clone().inner(), grad.inner());
            let xa = x_plain.clone().matmul(matrix_a.clone());
            let xadb = (xa.clone() * d.clone()).matmul(matrix_b.clone());
            let bias = layer.bias.as_ref().unwrap().val().inner().unsqueeze();
            let base = x_plain.clone().matmul(layer.dense_base());
            let expected = base + xadb.clone() * b.clone() * SCALE + bias;
            // f32 sums of 64 products.
            assert!(distance(&y.inner(), &expected) < 3e-6);
            let delta = (matrix_a.clone() * d.clone()).matmul(matrix_b.clone() * b.clone()) * SCALE;
            let weight = layer.dense_base() + delta;
            assert!(distance(&layer.merge().weight.val(), &weight) < 1e-6);
            let restored = layer.unmerge(layer.merge()).unwrap();
            assert!(distance(&restored.weight.val(), &layer.dense_base()) < 3e-6);

            let d_low = (grad.clone() * b).matmul(matrix_b.transpose()) * SCALE;
            for (got, expected) in [
                (
                    lambda_b.val().grad(&gradients),
                    (grad.clone() * xadb * SCALE).sum_dim(0),
                ),
                (lambda_d.val().grad(&gradients), (d_low * xa).sum_dim(0)),
                (x.grad(&gradients), grad.matmul(weight.transpose())),
            ] {
                let difference = distance(&got.unwrap(), &expected);
                assert!(difference < 3e-6, "{quantization:?}: {difference}");
            }
        }
    }

    #[test]
    fn a_new_adapter_keeps_the_output_and_has_the_initial_values() {
        let device = Device::flex();
        let config = LoraConfig {
            r: 4,
            method: Method::Vera,
            d_initial: 0.25,
            ..LoraConfig::default()
        };
        let base = LoraLinear::frozen(LinearConfig::new(64, 96).init(&device));
        let x = random([5, 64], 3, &device);
        let before = values(base.forward(x.clone()));
        let new = base.with_new_adapter(&config, 7).unwrap();
        assert_eq!(values(new.forward(x)), before);
        let [b, d] = [0, 1].map(|index| values(new.trainable()[index].val()));
        assert_eq!((b, d), (vec![0.0; 96], vec![0.25; 4]));
        assert_eq!(new.adapter().unwrap().scale(), 1.0);
    }

    #[test]
    fn the_matrices_are_those_that_peft_draws() {
        // `_kaiming_init` of PEFT 0.21 with torch 2.15 and the seed 7: a `[5, 24]`, then a `[24, 5]`.
        let config = |projection_prng_key| LoraConfig {
            r: 5,
            projection_prng_key,
            ..LoraConfig::default()
        };
        let Factors { a, b, shape } = projections(&config(7), [24, 24]);
        assert_eq!(shape, [24, 5, 24]);
        // In the file's order.
        let (a, b) = (cpu::transposed(&a, [24, 5]), cpu::transposed(&b, [5, 24]));
        let bits = |x: f32| x.to_bits();
        assert_eq!(
            [a[0], a[1], a[2], a[119]].map(bits),
            [0x3d0f_0af0, 0xbe9a_3678, 0x3e23_0864, 0x3db5_9470]
        );
        assert_eq!(
            [b[0], b[1], b[2], b[119]].map(bits),
            [0x3e60_1a84, 0xbee9_099a, 0x3f36_d010, 0xbed6_6e2d]
        );
        // The lower 32 bits of the seed count.
        let again = projections(&config((1 << 32) + 7), [24, 24]);
        assert_eq!(again, projections(&config(7), [24, 24]));
        assert_ne!(again, projections(&config(8), [24, 24]));
    }

    #[test]
    fn factors_on_the_host_are_those_of_the_layer() {
        let layer = layer(&Device::flex(), Quantization::None);
        let adapter = layer.adapter().unwrap();
        let [a, b] = adapter.shared().unwrap().map(values);
        let shared = Factors {
            a,
            b,
            shape: [80, 4, 100],
        };
        let vectors = adapter
            .vectors()
            .into_iter()
            .map(|vector| values(vector.val()));
        let vectors: Vec<Vec<f32>> = vectors.collect();
        let vectors: Vec<&[f32]> = vectors.iter().map(Vec::as_slice).collect();
        let host = factors(&shared, [64, 96], &vectors);
        assert_eq!(host.shape, [64, 4, 96]);
        let [a, b] = adapter.factors().map(values);
        assert_eq!((host.a, host.b), (a, b));
    }

    #[test]
    fn layers_of_a_model_share_their_matrices() {
        let device = Device::flex();
        let config = LoraConfig {
            r: 4,
            method: Method::Vera,
            ..LoraConfig::default()
        };
        let shared = config.shared_matrices([[64, 96], [96, 32]], &device);
        let dims = shared.as_ref().unwrap().each_ref().map(Tensor::dims);
        assert_eq!(dims, [[96, 4], [4, 96]]);
        let layers = [[64, 96], [96, 32]].map(|[d_in, d_out]| {
            let linear = LinearConfig::new(d_in, d_out).init(&device);
            let layer = LoraLinear::frozen(linear);
            layer
                .with_new_adapter_sharing(&config, 1, shared.as_ref())
                .unwrap()
        });
        let widths = layers.each_ref().map(|layer| {
            let [a, b] = layer.adapter().unwrap().factors();
            [a.dims(), b.dims()]
        });
        assert_eq!(widths, [[[64, 4], [4, 96]], [[96, 4], [4, 32]]]);
        let [first, second] = layers.map(|layer| layer.adapter().unwrap().factors().map(values));
        assert_eq!(first[0], second[0][..64 * 4]);
    }

    #[test]
    fn a_cached_factor_keeps_the_output_and_a_layer_without_its_adapter_is_plain() {
        let device = Device::flex();
        let layer = layer(&device, Quantization::Bits8);
        let x = random([5, 64], 3, &device);
        let cached = layer.clone().for_inference();
        let outputs = [&cached, &layer].map(|layer| values(layer.forward(x.clone())));
        assert_eq!(outputs[0], outputs[1]);
        let plain = layer.without_adapter();
        assert!(plain.adapter().is_none() && plain.trainable().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_a_typed_error() {
        let device = Device::flex();
        let plain = LoraLinear::frozen(LinearConfig::new(8, 4).init(&device));
        let vectors = || {
            Some(vec![
                Tensor::ones([1, 4], &device),
                Tensor::ones([1, 2], &device),
            ])
        };
        let with = |a: [usize; 2], b: [usize; 2], vectors| {
            let matrices = [a, b].map(|shape| Tensor::ones(shape, &device));
            plain
                .clone()
                .with_adapter_of(Method::Vera, matrices, 1.0, vectors)
        };
        assert!(with([9, 2], [2, 5], vectors()).is_ok());
        for (a, b, vectors) in [
            ([7, 2], [2, 5], vectors()),
            ([9, 2], [2, 3], vectors()),
            ([9, 2], [3, 5], vectors()),
            ([9, 2], [2, 5], None),
            ([9, 2], [2, 5], vectors().map(|mut both| both.split_off(1))),
            ([9, 3], [3, 5], vectors()),
        ] {
            let error = with(a, b, vectors).unwrap_err();
            assert!(matches!(error, LoraError::Shape { .. }), "{error}");
        }
        for (field, change) in [
            (
                "lora_alpha",
                (|c| c.lora_alpha = 8.0) as fn(&mut LoraConfig),
            ),
            ("use_rslora", |c| c.use_rslora = true),
            ("init_lora_weights", |c| c.init = crate::Init::Pissa),
            ("rank_pattern", |c| c.rank_pattern = vec![("q".into(), 2)]),
        ] {
            let mut config = LoraConfig {
                method: Method::Vera,
                ..LoraConfig::default()
            };
            assert_eq!(config.validate(), Ok(()));
            change(&mut config);
            let method = Method::Vera;
            let expected = LoraError::FieldOfMethod { field, method };
            assert_eq!(config.validate(), Err(expected));
        }
    }

    #[test]
    fn burns_materialize_is_the_merged_weight() {
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
    fn records_and_valid_keep_the_vectors_and_training_restores_them() {
        let device = Device::flex().autodiff();
        let trained = layer(&device, Quantization::None);
        let x = random([5, 64], 3, &Device::flex());
        let expected = trained.forward(x.clone().autodiff()).inner();
        let valid = trained.valid();
        assert_eq!(distance(&valid.forward(x.clone()), &expected), 0.0);
        let again = valid.train();
        let trainable = again.trainable();
        assert_eq!(trainable.len(), 2);
        assert!(trainable.iter().all(|param| param.val().is_require_grad()));
        // A record has the vectors; the matrices are those of the layer that loads it.
        let other = layer(&device, Quantization::None);
        let zeros = [[1, 96], [1, 4]].map(|shape| Tensor::zeros(shape, &device));
        let matrices = other.adapter().unwrap().shared().unwrap();
        let other = other.without_adapter();
        let other = other.with_adapter_of(Method::Vera, matrices, SCALE, Some(zeros.into()));
        let loaded = other.unwrap().load_record(trained.into_record()).valid();
        assert_eq!(distance(&loaded.forward(x), &expected), 0.0);
    }
}
