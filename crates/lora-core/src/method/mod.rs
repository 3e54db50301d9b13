//! The methods of adapting a layer, each in a file of its own, and the table of them.
//!
//! A method is a type that Burn attaches to a weight ([`burn::module::Reparameterization`]) and that answers
//! [`Adapter`]. Everything else asks it: the passes, merging, counting, planning, PEFT's files. How to add one:
//! `docs/how-to-add-a-method.md`.

mod dora;
mod lora;
mod vera;

pub use dora::Dora;
pub use vera::Vera;

use std::fmt;

use burn::module::{LoraAdapter, Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Factors, LoraConfig, LoraError, LoraLinear};

/// The methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Method {
    /// LoRA (Hu et al., 2021): `W₀ + γ·A·B`.
    #[default]
    Lora,
    /// DoRA (Liu et al., 2024): as LoRA, with a trained magnitude per output.
    Dora,
    /// VeRA (Kopiczko et al., 2023): frozen random A and B, the same for all layers, and two trained vectors.
    Vera,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 3] = [Self::Lora, Self::Dora, Self::Vera];

    /// What is known of the method without a layer.
    pub fn facts(self) -> &'static Facts {
        match self {
            Self::Lora => &lora::FACTS,
            Self::Dora => &dora::FACTS,
            Self::Vera => &vera::FACTS,
        }
    }

    /// The method that this field of PEFT's `LoraConfig` switches on.
    pub fn of_flag(flag: &str) -> Option<Self> {
        let mut methods = Self::ALL.into_iter();
        methods.find(|method| method.facts().flag == Some(flag))
    }

    /// The method of PEFT's `peft_type`, in letters of any case, without a field that switches on another.
    pub fn of_peft_type(peft_type: &str) -> Option<Self> {
        let mut methods = Self::ALL.into_iter();
        methods.find(|method| {
            let facts = method.facts();
            facts.flag.is_none() && facts.peft_type.eq_ignore_ascii_case(peft_type)
        })
    }

    /// The layer, which has a plain LoRA, with an adapter of this method.
    fn attach(
        self,
        layer: LoraLinear,
        lora: LoraAdapter,
        vectors: Option<Vec<Tensor<2>>>,
    ) -> LoraLinear {
        match self {
            Self::Lora => layer,
            Self::Dora => dora::attach(layer, lora, vectors),
            Self::Vera => vera::attach(layer, lora, vectors),
        }
    }

    /// The vectors of a new adapter of a layer with `d_out` outputs. `None` if [`attach`](Self::attach) computes them.
    pub(crate) fn initial_vectors(
        self,
        config: &LoraConfig,
        d_out: usize,
        device: &Device,
    ) -> Option<Vec<Tensor<2>>> {
        match self {
            Self::Lora | Self::Dora => None,
            Self::Vera => Some(vera::initial_vectors(config, d_out, device)),
        }
    }

    /// The shared matrices of a new adapter ([`LoraConfig::shared_factors`]).
    fn shared_factors(self, config: &LoraConfig, largest: [usize; 2]) -> Option<Factors> {
        match self {
            Self::Lora | Self::Dora => None,
            Self::Vera => Some(vera::projections(config, largest)),
        }
    }

    /// A and B of a layer of `[d_in, d_out]`, on the host, from the matrices in PEFT's file, shared or the layer's own, and
    /// from the method's vectors in the order of [`vectors`](Facts::vectors). `None` if A and B are these matrices.
    pub fn factors_of(
        self,
        matrices: &Factors,
        layer: [usize; 2],
        vectors: &[&[f32]],
    ) -> Option<Factors> {
        match self {
            Self::Lora | Self::Dora => None,
            Self::Vera => Some(vera::factors(matrices, layer, vectors)),
        }
    }

    /// The factor of each output of a merged weight, computed on the host in the order of
    /// [`vectors`](Facts::vectors) from the method's vectors and from ‖W₀ + γ·A·B‖² per output. `None` if the merged
    /// weight is the sum itself.
    pub fn output_factors(self, vectors: &[&[f32]], squares: &[f64]) -> Option<Vec<f32>> {
        match self {
            Self::Lora | Self::Vera => None,
            Self::Dora => Some(dora::output_factors(vectors, squares)),
        }
    }
}

/// The method's name in messages.
impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.facts().name)
    }
}

/// Finds an adapter of one type on a weight.
type Of = fn(&Param<Tensor<2>>) -> Option<&dyn Adapter>;

/// The types that a weight can have attached.
const TYPES: [Of; 3] = [of::<LoraAdapter>, of::<Dora>, of::<Vera>];

fn of<A: Adapter + Reparameterization>(weight: &Param<Tensor<2>>) -> Option<&dyn Adapter> {
    let adapter = weight.reparameterization::<A>()?;
    Some(adapter)
}

/// The adapter that is attached to a weight.
pub(crate) fn adapter_of(weight: &Param<Tensor<2>>) -> Option<&dyn Adapter> {
    TYPES.iter().find_map(|of| of(weight))
}

/// What is known of a method without a layer.
#[derive(Debug)]
pub struct Facts {
    /// Its name in messages.
    pub name: &'static str,
    /// PEFT's `peft_type`.
    pub peft_type: &'static str,
    /// The field of PEFT's configuration that switches it on; `None` for the methods that have a `peft_type` of their own.
    pub flag: Option<&'static str>,
    /// The fields of [`LoraConfig`] that PEFT's configuration of the method lacks.
    pub lacks: &'static [&'static str],
    /// Other fields of [`LoraConfig`], with their names in PEFT's configuration of the method.
    pub renamed: &'static [(&'static str, &'static str)],
    /// If A and B are not trained and the same for all modules: their names in PEFT's file.
    pub shared: Option<[&'static str; 2]>,
    /// The trained vectors.
    pub vectors: &'static [Vector],
    /// If an adapter does more than add γ·A·B: what, as the reason why it can be neither taken out of a merged model
    /// without the base model nor written as two matrices.
    pub beyond_low_rank: Option<&'static str>,
    /// Whether the passes keep a layer's output before it is scaled.
    pub scales_outputs: bool,
    /// Whether PEFT trains a bias of B with it (`lora_bias`).
    pub allows_lora_bias: bool,
}

impl Facts {
    /// The vector of this name.
    pub fn vector(&self, name: &str) -> Option<&'static Vector> {
        self.vectors.iter().find(|vector| vector.name == name)
    }

    /// Whether PEFT's configuration of the method has this field of [`LoraConfig`].
    pub fn has(&self, field: &str) -> bool {
        !self.lacks.contains(&field)
    }

    /// The name of a field of [`LoraConfig`] in PEFT's configuration of the method.
    pub fn field<'a>(&self, field: &'a str) -> &'a str {
        let mut renamed = self.renamed.iter();
        let found = renamed.find(|(ours, _)| *ours == field);
        found.map_or(field, |(_, theirs)| theirs)
    }
}

/// A trained vector of every adapter, `[1, width]`.
#[derive(Debug)]
pub struct Vector {
    /// The end of PEFT's name.
    pub name: &'static str,
    /// How many numbers it has.
    pub width: Width,
}

impl Vector {
    /// Its length in an adapter of rank `r` with `d_out` outputs.
    pub fn length(&self, r: usize, d_out: usize) -> usize {
        match self.width {
            Width::Outputs => d_out,
            Width::Rank => r,
        }
    }
}

/// The length of a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// One number per output.
    Outputs,
    /// One number per rank.
    Rank,
}

/// A function that takes the gradient of a parameter.
pub type Accumulate<'a> = dyn FnMut(&Param<Tensor<2>>, Tensor<2>) + 'a;

/// A layer's adapter: `h = f ⊙ (x·W₀ + γ·(x·A)·B)`, where most methods have no factor f.
///
/// A and B may be parameters or computed from parameters. The factor f, `[1, d_out]`, is a factor of each output.
pub trait Adapter: fmt::Debug {
    /// Its method.
    fn method(&self) -> Method;

    /// The scale γ.
    fn scale(&self) -> f64;

    /// The rank r.
    fn rank(&self) -> usize;

    /// A `[d_in, r]` and B `[r, d_out]`, in the parameters' autodiff graph if they are in one.
    fn factors(&self) -> [Tensor<2>; 2];

    /// As [`factors`](Self::factors), outside an autodiff graph. A method that computes them builds no graph for it.
    fn detached_factors(&self) -> [Tensor<2>; 2] {
        self.factors().map(Tensor::without_autodiff)
    }

    /// The matrices of PEFT's file, if the adapter has its own: A and B without the method's vectors.
    fn matrices(&self) -> [Tensor<2>; 2] {
        self.factors()
    }

    /// The trained tensors in a fixed order: A and B, if they are trained, and the [`vectors`](Self::vectors).
    fn trainable(&self) -> Vec<&Param<Tensor<2>>>;

    /// The method's trained vectors, `[1, width]` each, in the order of [`Facts::vectors`].
    fn vectors(&self) -> Vec<&Param<Tensor<2>>> {
        Vec::new()
    }

    /// The frozen matrices that all adapters of the model share, `[≥ d_in, r]` and `[r, ≥ d_out]`.
    fn shared(&self) -> Option<[Tensor<2>; 2]> {
        None
    }

    /// Whether A depends on parameters, so that its gradient is needed.
    fn trains_a(&self) -> bool {
        true
    }

    /// The gradients of the parameters behind A, from A's.
    fn gradient_of_a(&self, gradient: Tensor<2>, accumulate: &mut Accumulate<'_>);

    /// The gradients of the parameters behind B, from B's.
    fn gradient_of_b(&self, gradient: Tensor<2>, accumulate: &mut Accumulate<'_>);

    /// The factor f outside an autodiff graph, for the frozen weight `base`.
    fn scaling(&self, _base: &Tensor<2>) -> Option<Scaling> {
        None
    }

    /// The factor f in the autodiff graph, if `tracked`.
    fn scaling_in_graph(&self, _base: &Tensor<2>, _tracked: bool) -> Option<Tensor<2>> {
        None
    }

    /// The gradients of the parameters behind the factor f, from f's.
    fn gradient_of_scaling(
        &self,
        _scaling: &Scaling,
        _gradient: Tensor<2>,
        _accumulate: &mut Accumulate<'_>,
    ) {
    }

    /// Attaches the adapter to another form of its weight, whose dense values `dense` returns.
    fn attach_to(
        &self,
        weight: Param<Tensor<2>>,
        dense: &dyn Fn() -> Tensor<2>,
    ) -> Param<Tensor<2>>;

    /// Attaches the adapter to its weight with everything computed that does not change while the layer is not trained.
    fn attach_for_inference(&self, weight: Param<Tensor<2>>) -> Param<Tensor<2>>;
}

/// A factor per output, `[1, d_out]`, and what its backward pass reads.
#[derive(Debug, Clone)]
pub struct Scaling {
    /// The factor f.
    pub factor: Tensor<2>,
    /// A tensor of the method.
    pub saved: Tensor<2>,
}

/// Attaches an existing adapter to a weight: Burn's own reparameterizers only create new ones.
pub(crate) fn attached<R: Reparameterization>(
    weight: Param<Tensor<2>>,
    adapter: R,
) -> Param<Tensor<2>> {
    weight.apply_reparameterization(Attach(Some(adapter)))
}

struct Attach<R>(Option<R>);

impl<R: Reparameterization> Reparameterizer for Attach<R> {
    type Reparam = R;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<R>) {
        (param, self.0.take())
    }
}

impl LoraLinear {
    /// The adapter, if there is one.
    pub fn adapter(&self) -> Option<&dyn Adapter> {
        adapter_of(&self.weight)
    }

    /// Makes the layer's plain LoRA an adapter of another method. Without the method's vectors, these are chosen so that
    /// the output does not change. A method with shared matrices takes A and B as these.
    ///
    /// # Shapes
    ///
    /// - `vectors`: `[1, width]` each, in the order of [`Facts::vectors`]
    ///
    /// # Errors
    ///
    /// If there is no plain LoRA, or a number of vectors or a shape does not fit. Without vectors, if the method does not
    /// compute them.
    pub fn with_method(
        self,
        method: Method,
        vectors: Option<Vec<Tensor<2>>>,
    ) -> Result<Self, LoraError> {
        let lora = self.weight.adapter().cloned();
        let lora = lora.ok_or(LoraError::NoAdapter)?;
        let [_, d_out] = self.dims();
        method.check_vectors(vectors.as_deref(), lora.rank(), d_out)?;
        Ok(method.attach(self, lora, vectors))
    }

    /// Adds an adapter of a method with these matrices: A and B, or those that all adapters of a model share.
    ///
    /// # Shapes
    ///
    /// - `a`: `[d_in, r]`, a shared one `[≥ d_in, r]`
    /// - `b`: `[r, d_out]`, a shared one `[r, ≥ d_out]`
    /// - `vectors`: as in [`with_method`](Self::with_method)
    ///
    /// # Errors
    ///
    /// As [`with_method`](Self::with_method) and [`with_adapter`](Self::with_adapter).
    pub fn with_adapter_of(
        self,
        method: Method,
        [a, b]: [Tensor<2>; 2],
        scale: f64,
        vectors: Option<Vec<Tensor<2>>>,
    ) -> Result<Self, LoraError> {
        if method.facts().shared.is_none() {
            let layer = self.with_adapter(a, b, scale)?;
            return layer.with_method(method, vectors);
        }
        if self.adapter().is_some() {
            return Err(LoraError::Already("has an adapter; merge it first"));
        }
        let ([d_in, d_out], r) = (self.dims(), a.dims()[1]);
        crate::linear::check_shape("the shared A", &a, [a.dims()[0].max(d_in), r])?;
        crate::linear::check_shape("the shared B", &b, [r, b.dims()[1].max(d_out)])?;
        method.check_vectors(vectors.as_deref(), r, d_out)?;
        let lora = LoraAdapter {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            scale,
        };
        Ok(method.attach(self, lora, vectors))
    }
}

impl Method {
    /// Checks the number and the shapes of a layer's vectors.
    fn check_vectors(
        self,
        vectors: Option<&[Tensor<2>]>,
        r: usize,
        d_out: usize,
    ) -> Result<(), LoraError> {
        let facts = self.facts();
        let expected = facts.vectors.len();
        let got = match vectors {
            Some(vectors) => vectors.len(),
            None if facts.shared.is_some() => 0,
            None => return Ok(()),
        };
        if got != expected {
            return Err(LoraError::Shape {
                name: "the method's vectors",
                expected: vec![expected],
                got: vec![got],
            });
        }
        for (vector, tensor) in facts.vectors.iter().zip(vectors.unwrap_or_default()) {
            let shape = [1, vector.length(r, d_out)];
            crate::linear::check_shape(vector.name, tensor, shape)?;
        }
        Ok(())
    }
}

impl LoraConfig {
    /// The frozen matrices that the adapters of these layers, `[d_in, d_out]` each, share: A `[d_in, r]` and B
    /// `[r, d_out]` of the largest widths. `None` if every adapter has its own A and B, or if there is no layer.
    pub fn shared_factors(&self, layers: impl IntoIterator<Item = [usize; 2]>) -> Option<Factors> {
        let largest = layers
            .into_iter()
            .reduce(|[a, b], [c, d]| [a.max(c), b.max(d)]);
        self.method.shared_factors(self, largest?)
    }

    /// As [`shared_factors`](Self::shared_factors), on a device and outside an autodiff graph.
    pub fn shared_matrices(
        &self,
        layers: impl IntoIterator<Item = [usize; 2]>,
        device: &Device,
    ) -> Option<[Tensor<2>; 2]> {
        Some(self.shared_factors(layers)?.on(device))
    }
}
