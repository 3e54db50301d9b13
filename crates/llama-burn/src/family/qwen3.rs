//! Qwen 3 (Yang et al., 2025, <https://arxiv.org/abs/2505.09388>): transformers' `modeling_qwen3.py`.
//! Each head's queries and keys are normalized before they are rotated, and the width of a head is independent of the
//! hidden size.

use super::{Biases, Family, Traits, windows};
use crate::ConfigError;
use crate::keys::Keys;

/// llama.cpp rotates the halves of its heads, as transformers do.
pub const QWEN3: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    gguf_architecture: "qwen3",
    gguf_rotates_pairs: false,
    defaults: &[
        ("num_key_value_heads", 32),
        ("head_dim", 128),
        ("max_position_embeddings", 32_768),
        ("sliding_window", 4096),
        ("max_window_layers", 28),
    ],
    traits,
};

fn traits(keys: &Keys) -> Result<Traits, ConfigError> {
    Ok(Traits {
        biases: Biases::of_blocks(keys.flag("attention_bias")?, false),
        query_key_norm: true,
        windows: windows::of_upper_layers(keys)?,
    })
}
