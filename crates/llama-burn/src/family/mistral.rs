//! Mistral 7B and its kin (Jiang et al., 2023, <https://arxiv.org/abs/2310.06825>): transformers' `modeling_mistral.py`.
//! A Llama whose layers may attend to a sliding window. Version 0.1 has a window of 4096 tokens, later ones have none.

use super::{Family, Traits, windows};
use crate::ConfigError;
use crate::keys::Keys;

/// llama.cpp has no architecture of its own for it.
pub const MISTRAL: Family = Family {
    model_type: "mistral",
    class: "MistralForCausalLM",
    gguf_architecture: "llama",
    gguf_rotates_pairs: true,
    defaults: &[
        ("num_key_value_heads", 8),
        ("max_position_embeddings", 131_072),
        ("sliding_window", 4096),
    ],
    traits,
};

fn traits(keys: &Keys) -> Result<Traits, ConfigError> {
    Ok(Traits {
        windows: windows::of_all_layers(keys)?,
        ..Traits::default()
    })
}
