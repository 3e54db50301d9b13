//! One decoder layer.

use burn::module::Module;
use lora_core::CounterRng;

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
    /// Whether anything of the layer is trained.
    pub fn trains(&self) -> bool {
        let linears = self.linears();
        let linears = linears.iter().any(|(_, linear)| linear.trains());
        linears || self.norms().any(|(_, norm)| norm.trained().is_some())
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
