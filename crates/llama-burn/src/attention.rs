//! The attention block's parameters: grouped queries (Ainslie et al., 2023, <https://arxiv.org/abs/2305.13245>).

use burn::module::Module;
use kernels::Heads;
use lora_core::LoraLinear;

use crate::RmsNorm;

/// The attention block of a decoder layer (`self_attn`).
#[derive(Module, Debug)]
#[allow(missing_docs)] // Hugging Face's names.
pub struct Attention {
    pub q_proj: LoraLinear,
    pub k_proj: LoraLinear,
    pub v_proj: LoraLinear,
    pub o_proj: LoraLinear,
    /// Normalizes each head's queries before they are rotated, `[head_dim]`.
    pub q_norm: Option<RmsNorm>,
    /// As `q_norm`, for keys. A layer has both or none.
    pub k_norm: Option<RmsNorm>,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// How many tokens a token attends to, itself included; `None` means all earlier ones.
    pub sliding_window: Option<usize>,
}

impl Attention {
    /// Whether a norm of queries or keys is trained.
    pub(crate) fn trains_norms(&self) -> bool {
        let mut norms = [&self.q_norm, &self.k_norm].into_iter().flatten();
        norms.any(|norm| norm.trained().is_some())
    }

    pub(crate) fn heads(&self) -> Heads {
        Heads {
            query: self.num_attention_heads,
            key: self.num_key_value_heads,
            d: self.head_dim,
        }
    }
}
