//! One decoder layer.

use burn::module::Module;
use lora_core::{CounterRng, LoraLinear};

use crate::{Attention, Mlp, RmsNorm};

/// A pre-norm decoder layer: attention and feed-forward, each added to its input.
#[derive(Module, Debug)]
#[allow(missing_docs)] // Hugging Face's names.
pub struct DecoderLayer {
    pub input_layernorm: RmsNorm,
    pub self_attn: Attention,
    pub post_attention_layernorm: RmsNorm,
    pub mlp: Mlp,
}

impl DecoderLayer {
    /// The linear modules with their names within the layer, in Hugging Face's order.
    pub fn linears(&self) -> [(&'static str, &LoraLinear); 7] {
        let (attention, mlp) = (&self.self_attn, &self.mlp);
        [
            ("self_attn.q_proj", &attention.q_proj),
            ("self_attn.k_proj", &attention.k_proj),
            ("self_attn.v_proj", &attention.v_proj),
            ("self_attn.o_proj", &attention.o_proj),
            ("mlp.gate_proj", &mlp.gate_proj),
            ("mlp.up_proj", &mlp.up_proj),
            ("mlp.down_proj", &mlp.down_proj),
        ]
    }

    /// As [`linears`](Self::linears), mutable.
    pub fn linears_mut(&mut self) -> [(&'static str, &mut LoraLinear); 7] {
        let (attention, mlp) = (&mut self.self_attn, &mut self.mlp);
        [
            ("self_attn.q_proj", &mut attention.q_proj),
            ("self_attn.k_proj", &mut attention.k_proj),
            ("self_attn.v_proj", &mut attention.v_proj),
            ("self_attn.o_proj", &mut attention.o_proj),
            ("mlp.gate_proj", &mut mlp.gate_proj),
            ("mlp.up_proj", &mut mlp.up_proj),
            ("mlp.down_proj", &mut mlp.down_proj),
        ]
    }
}

/// Derives a dropout seed per module from the layer's seed.
pub(crate) struct DropoutSeeds(pub(crate) Option<u64>);

impl DropoutSeeds {
    pub(crate) fn module(&self, index: u64) -> Option<u64> {
        self.0
            .map(|seed| CounterRng::new(seed).fork(index).next_u64())
    }
}
