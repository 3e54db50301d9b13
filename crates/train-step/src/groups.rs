//! Groups of parameters that the optimizer updates differently: other learning rates, no weight decay.

use std::collections::{HashMap, HashSet};

use burn::module::ParamId;
use llama_burn::Llama;
use lora_core::Trained;

/// What differs from the step's settings, by parameter.
#[derive(Debug, Clone, Default)]
pub(crate) struct Groups {
    /// Learning rates, as multiples of the step's.
    pub(crate) rates: HashMap<ParamId, f64>,
    /// Parameters without weight decay.
    pub(crate) undecayed: HashSet<ParamId>,
}

/// The settings of a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Group {
    /// The learning rate, as a multiple of the step's.
    pub(crate) rate: f64,
    /// Whether weight decay applies.
    pub(crate) decays: bool,
}

impl Groups {
    /// The group of a parameter.
    pub(crate) fn of(&self, id: ParamId) -> Group {
        Group {
            rate: self.rates.get(&id).copied().unwrap_or(1.0),
            decays: !self.undecayed.contains(&id),
        }
    }
}

impl Default for Group {
    /// The step's settings.
    fn default() -> Self {
        Self {
            rate: 1.0,
            decays: true,
        }
    }
}

impl Group {
    /// The order of groups in a flat tensor.
    pub(crate) fn order(&self, other: &Self) -> std::cmp::Ordering {
        let rates = self.rate.total_cmp(&other.rate);
        rates.then(other.decays.cmp(&self.decays))
    }
}

/// The parameters that weight decay leaves alone: biases and the gains of norms, as in transformers' `Trainer`.
pub fn undecayed(model: &Llama) -> HashSet<ParamId> {
    let parts = model.trained_whole().into_iter();
    let parts = parts.flat_map(|(_, parts)| parts);
    let vectors = parts.filter(|part| matches!(part, Trained::Vector(_)));
    vectors.map(Trained::id).collect()
}
