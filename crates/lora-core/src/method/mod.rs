//! The methods of adapting a layer, each in a file of its own, and the table of them.
//!
//! A method is a type that Burn attaches to a weight ([`burn::module::Reparameterization`]) and that answers
//! [`Adapter`]. Everything else asks it: the passes, merging, counting, planning, PEFT's files. How to add one:
//! `docs/how-to-add-a-method.md`.

mod dora;
mod lora;

pub use dora::Dora;

use std::fmt;

use burn::module::{LoraAdapter, Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{LoraError, LoraLinear};

/// The methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Method {
    /// LoRA (Hu et al., 2021): `W₀ + γ·A·B`.
    #[default]
    Lora,
    /// DoRA (Liu et al., 2024): as LoRA, with a trained magnitude per output.
    Dora,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 2] = [Self::Lora, Self::Dora];

    /// What is known of the method without a layer.
    pub fn facts(self) -> &'static Facts {
        match self {
            Self::Lora => &lora::FACTS,
            Self::Dora => &dora::FACTS,
        }
    }

    /// The method that this field of PEFT's `LoraConfig` switches on.
    pub fn of_flag(flag: &str) -> Option<Self> {
        let mut methods = Self::ALL.into_iter();
        methods.find(|method| method.facts().flag == Some(flag))
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
        }
    }

    /// The factor of each output of a merged weight, computed on the host in the order of
    /// [`vectors`](Facts::vectors) from the method's vectors and from ‖W₀ + γ·A·B‖² per output. `None` if the merged
    /// weight is the sum itself.
    pub fn output_factors(self, vectors: &[&[f32]], squares: &[f64]) -> Option<Vec<f32>> {
        match self {
            Self::Lora => None,
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
const TYPES: [Of; 2] = [of::<LoraAdapter>, of::<Dora>];

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
    /// The field of PEFT's `LoraConfig` that switches it on; `None` for the plain LoRA.
    pub flag: Option<&'static str>,
    /// The trained vectors of one number per output, by the end of PEFT's names.
    pub vectors: &'static [&'static str],
    /// If an adapter does more than add γ·A·B: what, as the reason why it can be neither taken out of a merged model
    /// without the base model nor written as two matrices.
    pub beyond_low_rank: Option<&'static str>,
    /// Whether the passes keep a layer's output before it is scaled.
    pub scales_outputs: bool,
    /// Whether PEFT trains a bias of B with it (`lora_bias`).
    pub allows_lora_bias: bool,
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

    /// The trained tensors in a fixed order, in which PEFT's names are [`Facts::vectors`] after those of A and B.
    fn trainable(&self) -> Vec<&Param<Tensor<2>>>;

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
    /// the output does not change.
    ///
    /// # Shapes
    ///
    /// - `vectors`: `[1, d_out]` each, in the order of [`Facts::vectors`]
    ///
    /// # Errors
    ///
    /// If there is no plain LoRA, or a number of vectors or a shape does not fit.
    pub fn with_method(
        self,
        method: Method,
        vectors: Option<Vec<Tensor<2>>>,
    ) -> Result<Self, LoraError> {
        let names = method.facts().vectors;
        let [_, d_out] = self.dims();
        if let Some(vectors) = &vectors {
            if vectors.len() != names.len() {
                return Err(LoraError::Shape {
                    name: "the method's vectors",
                    expected: vec![names.len()],
                    got: vec![vectors.len()],
                });
            }
            for (name, vector) in names.iter().zip(vectors) {
                crate::linear::check_shape(name, vector, [1, d_out])?;
            }
        }
        let lora = self.weight.adapter().cloned();
        let lora = lora.ok_or(LoraError::NoAdapter)?;
        Ok(method.attach(self, lora, vectors))
    }
}
