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
        "use_dora",
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
        let (lambda_b, lambda_d) = (self.lambda_b.val(), self.lambda_d.val());
        let tracked = lambda_b.is_autodiff();
        let [a, b] = self
            .sliced()
            .map(|matrix| if tracked { matrix.autodiff() } else { matrix });
        let b = match &self.cached_b {
            Some(b) => b.clone(),
            None => b * lambda_d.transpose() * lambda_b,
        };
        [a, b]
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
        let [_, b] = adapter.factors();
        adapter.cached_b = Some(b);
        attached(weight, adapter)
    }
}
