//! Methods whose modules share their frozen matrices: the matrices in PEFT's file, and what they are for one module.

use std::borrow::Cow;

use kernels::cpu;
use llama_burn::LlamaConfig;
use lora_core::{Factors, LoraConfig};

use super::check::widths;
use super::tensors::Values;
use super::{AdapterError, AdapterPair, AdapterTensors, Floats};

const PREFIX: &str = "base_model.";

/// PEFT's name of a shared matrix; `end` is from [`Facts::shared`](lora_core::Facts::shared).
pub(super) fn shared_name(end: &str) -> String {
    format!("{PREFIX}{end}")
}

/// The frozen matrices that all modules of an adapter share.
#[derive(Debug, Clone, PartialEq)]
pub struct Shared {
    /// The ends of PEFT's names of A and B.
    pub names: [&'static str; 2],
    /// A and B, as wide as the widest module.
    pub factors: Factors,
}

impl Shared {
    /// The matrices of PEFT's file, where both are transposed.
    pub(super) fn from_file(
        names: [&'static str; 2],
        read: [Option<Values>; 2],
        r: usize,
    ) -> Result<Self, AdapterError> {
        let [a_name, b_name] = names.map(shared_name);
        let [a, b] = read;
        let missing = |name: &str| AdapterError::Missing { name: name.into() };
        let a = a.ok_or_else(|| missing(&a_name))?;
        let b = b.ok_or_else(|| missing(&b_name))?;
        let ([a_r, d_in], [d_out, b_r]) = (a.matrix(&a_name)?, b.matrix(&b_name)?);
        if a_r != r {
            return Err(AdapterError::shape(a_name, &[r, d_in], &[a_r, d_in]));
        }
        if b_r != r {
            return Err(AdapterError::shape(b_name, &[d_out, r], &[d_out, b_r]));
        }
        let factors = Factors {
            a: cpu::transposed(&a.values, [r, d_in]),
            b: cpu::transposed(&b.values, [d_out, r]),
            shape: [d_in, r, d_out],
        };
        Ok(Self { names, factors })
    }

    /// The tensors of PEFT's file.
    pub(super) fn entries(&self) -> [(String, Floats<'_>); 2] {
        let [a, b] = self.names.map(shared_name);
        let [d_in, r, d_out] = self.factors.shape;
        [
            (a, Floats::transposed(&self.factors.a, [d_in, r])),
            (b, Floats::transposed(&self.factors.b, [r, d_out])),
        ]
    }

    /// Checks that the matrices are at least as wide as a module.
    pub(super) fn check(&self, [d_in, d_out]: [usize; 2]) -> Result<(), AdapterError> {
        let [a, b] = self.names.map(shared_name);
        let [widest_in, r, widest_out] = self.factors.shape;
        if widest_in < d_in {
            return Err(AdapterError::shape(a, &[r, d_in], &[r, widest_in]));
        }
        if widest_out < d_out {
            return Err(AdapterError::shape(b, &[d_out, r], &[widest_out, r]));
        }
        Ok(())
    }

    /// Whether two sets of matrices are the same up to rounding.
    pub(super) fn is_near(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.factors, &other.factors);
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6);
        ours.shape == theirs.shape && near(&ours.a, &theirs.a) && near(&ours.b, &theirs.b)
    }

    /// Those that the settings make for these modules, `[d_in, d_out]` each; `None` for a method without shared matrices.
    pub(super) fn of_seed(
        lora: &LoraConfig,
        modules: impl IntoIterator<Item = [usize; 2]>,
    ) -> Option<Self> {
        let names = lora.method.facts().shared?;
        let factors = lora.shared_factors(modules)?;
        Some(Self { names, factors })
    }
}

impl AdapterTensors {
    /// Makes the shared matrices from the seed in the settings, if the adapter's file does not contain them. Nothing
    /// changes for a method without shared matrices.
    pub fn complete(&mut self, model: &LlamaConfig, lora: &LoraConfig) {
        if self.shared.is_none() {
            self.shared = self.made_for(model, lora);
        }
    }

    /// The matrices that the settings make for the adapted modules.
    pub(super) fn made_for(&self, model: &LlamaConfig, lora: &LoraConfig) -> Option<Shared> {
        let all = widths(model).into_iter();
        let adapted = all.filter(|(module, _)| self.modules.contains_key(module));
        Shared::of_seed(lora, adapted.map(|(_, widths)| widths))
    }

    /// The matrices A and B of a module, whether they are its own or made of shared ones and its vectors. `None` if the
    /// module is not adapted.
    pub fn low_rank(
        &self,
        model: &LlamaConfig,
        lora: &LoraConfig,
        module: &str,
    ) -> Option<Cow<'_, AdapterPair>> {
        let pair = self.modules.get(module)?;
        if pair.has_matrices() {
            return Some(Cow::Borrowed(pair));
        }
        let layer = widths(model).remove(module)?;
        let made = match self.shared {
            Some(_) => None,
            None => self.made_for(model, lora),
        };
        let shared = self.shared.as_ref().or(made.as_ref())?;
        let vectors = lora.method.facts().vectors.iter();
        let vectors =
            vectors.map(|vector| pair.vectors.get(vector.name).map_or(&[][..], Vec::as_slice));
        let vectors: Vec<&[f32]> = vectors.collect();
        let factors = lora.method.factors_of(&shared.factors, layer, &vectors)?;
        let [d_in, r, d_out] = factors.shape;
        let pair = AdapterPair::new(d_in, r, d_out, factors.a, factors.b);
        Some(Cow::Owned(pair))
    }
}
