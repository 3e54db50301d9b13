//! Adapters that are taken out of the weights while these are loaded: PiSSA and OLoRA.

use std::collections::BTreeMap;

use kernels::CounterRng;
use lora_core::{Factors, LoraConfig, LoraError, ModuleSelector, Quantization};

use crate::LlamaConfig;

/// Makes adapters from the weights that [`load_with`](crate::load_with) reads, before these are quantized.
///
/// What is taken out depends on the model's files, the settings and the seed only, so that a resumed run has the same
/// frozen weights again.
#[derive(Debug)]
pub struct InitialAdapters {
    lora: LoraConfig,
    selector: ModuleSelector,
    seed: u64,
    /// The factors by their module's full name, once the model is loaded.
    pub factors: BTreeMap<String, Factors>,
}

impl InitialAdapters {
    /// For a model of this shape. `None` if the initialization of `lora` does not change weights.
    ///
    /// # Errors
    ///
    /// If `lora` is invalid, selects nothing or `lm_head`, or has a rank that is larger than a side of a weight.
    pub fn new(
        lora: &LoraConfig,
        model: &LlamaConfig,
        seed: u64,
    ) -> Result<Option<Self>, LoraError> {
        if !lora.init.changes_weights() {
            return Ok(None);
        }
        model.count(lora, Quantization::None, 4)?;
        let selector = lora.selector()?;
        if selector.matches("lm_head") {
            return Err(LoraError::PlainHead);
        }
        for layer in 0..model.num_hidden_layers {
            for linear in model.layer_linears() {
                let module = format!("model.layers.{layer}.{}", linear.name);
                let (r, largest) = (selector.r(&module), linear.d_in.min(linear.d_out));
                if selector.matches(&module) && r > largest {
                    return Err(LoraError::RankOfWeight { r, largest });
                }
            }
        }
        Ok(Some(Self {
            lora: lora.clone(),
            selector,
            seed,
            factors: BTreeMap::new(),
        }))
    }

    /// Whether the weight of this module changes.
    pub(crate) fn selects(&self, module: &str) -> bool {
        self.selector.matches(module)
    }

    /// Makes the module's factors, and subtracts their product from its weight, `[d_in, d_out]`.
    pub(crate) fn take_out_of(
        &mut self,
        module: &str,
        weight: &mut [f32],
        shape: [usize; 2],
    ) -> Result<(), LoraError> {
        let lora = self.lora.of_module(&self.selector, module);
        let root = CounterRng::new(self.seed);
        let mut rng = module.bytes().fold(root, |rng, byte| rng.fork(byte.into()));
        let factors = lora.take_out_of(weight, shape, rng.next_u64())?;
        self.factors
            .extend(factors.map(|factors| (module.to_string(), factors)));
        Ok(())
    }
}
