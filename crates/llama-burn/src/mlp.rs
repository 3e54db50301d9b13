//! The gated feed-forward block, SwiGLU (Shazeer, 2020, <https://arxiv.org/abs/2002.05202>).

use burn::module::Module;
use lora_core::LoraLinear;

/// `down(silu(gate(x)) · up(x))`.
#[derive(Module, Debug)]
#[allow(missing_docs)] // Hugging Face's names.
pub struct Mlp {
    pub gate_proj: LoraLinear,
    pub up_proj: LoraLinear,
    pub down_proj: LoraLinear,
}
