//! Qwen 2 and 2.5 (Yang et al., 2024, <https://arxiv.org/abs/2407.10671>): transformers' `modeling_qwen2.py`.
//! A Llama with biases on queries, keys and values. Published models have a sliding window that is switched off.

use super::{Biases, Family, Traits, windows};
use crate::ConfigError;
use crate::keys::Keys;

/// llama.cpp rotates the halves of its heads, as transformers do.
pub const QWEN2: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    gguf_architecture: "qwen2",
    gguf_rotates_pairs: false,
    defaults: &[
        ("num_key_value_heads", 32),
        ("max_position_embeddings", 32_768),
        ("sliding_window", 4096),
        ("max_window_layers", 28),
    ],
    traits,
};

fn traits(keys: &Keys) -> Result<Traits, ConfigError> {
    let biases = Biases {
        q: true,
        k: true,
        v: true,
        ..Biases::default()
    };
    Ok(Traits {
        biases,
        windows: windows::of_upper_layers(keys)?,
        ..Traits::default()
    })
}
