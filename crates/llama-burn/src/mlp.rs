//! The gated feed-forward block, SwiGLU (Shazeer, 2020, <https://arxiv.org/abs/2002.05202>).

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::silu;
use lora_core::LoraLinear;

use crate::decoder_layer::DropoutSeeds;

/// `down(silu(gate(x)) · up(x))`.
#[derive(Module, Debug)]
#[allow(missing_docs)] // Hugging Face's names.
pub struct Mlp {
    pub gate_proj: LoraLinear,
    pub up_proj: LoraLinear,
    pub down_proj: LoraLinear,
}

impl Mlp {
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`
    /// - output: `[n, hidden]`
    pub(crate) fn forward(&self, x: Tensor<2>, seeds: &DropoutSeeds) -> Tensor<2> {
        let gate = self.gate_proj.forward_seeded(x.clone(), seeds.module(4));
        let up = self.up_proj.forward_seeded(x, seeds.module(5));
        self.down_proj
            .forward_seeded(silu(gate) * up, seeds.module(6))
    }
}
