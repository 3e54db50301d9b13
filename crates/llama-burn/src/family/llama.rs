//! Llama 1 to 3.3, and models of the same shape (TinyLlama, SmolLM2, ...): transformers' `modeling_llama.py`.

use super::{Biases, Family, Traits};
use crate::ConfigError;
use crate::keys::Keys;

/// The family that every other is described by its differences from.
pub const LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    gguf_architecture: "llama",
    gguf_rotates_pairs: true,
    defaults: &[],
    traits,
};

fn traits(keys: &Keys) -> Result<Traits, ConfigError> {
    let biases = Biases::of_blocks(keys.flag("attention_bias")?, keys.flag("mlp_bias")?);
    Ok(Traits {
        biases,
        ..Traits::default()
    })
}
