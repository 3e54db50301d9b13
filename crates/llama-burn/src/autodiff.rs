//! The model in Burn's autodiff graph: the forward pass of every part, in the order of `modeling_llama.py`.
//!
//! Full fine-tuning and Rust programs that put the model into a larger graph use it, and the tests compare the manual
//! passes with it. Training an adapter runs the manual passes ([`LayerPass`]), which build no graph.

use burn::tensor::activation::silu;
use burn::tensor::{DType, FloatDType, Tensor};
use kernels::{attention_in_graph, rotate_in_graph};

use crate::decoder_layer::DropoutSeeds;
use crate::{
    Attention, DecoderLayer, HeadAdapter, LayerPass, Llama, Mlp, PackedContext, PackedTokens,
    RmsNorm,
};

impl RmsNorm {
    /// Normalizes each row.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`
    /// - output: `[n, hidden]`, of `x`'s type
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = FloatDType::from(x.dtype());
        let x = x.cast(FloatDType::F32);
        let mean_of_squares = x.clone().square().mean_dim(1);
        let inverse_root = mean_of_squares.add_scalar(self.eps).sqrt().recip();
        let normalized = x * inverse_root * self.weight.val().cast(FloatDType::F32).unsqueeze();
        normalized.cast(dtype)
    }
}

impl Attention {
    /// Causal self-attention within each packed sequence.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[n, hidden]`
    fn forward(&self, x: Tensor<2>, context: &PackedContext, seeds: &DropoutSeeds) -> Tensor<2> {
        let (n, heads) = (x.dims()[0], self.heads());
        let q = self.q_proj.forward_seeded(x.clone(), seeds.module(0));
        let k = self.k_proj.forward_seeded(x.clone(), seeds.module(1));
        let v = self.v_proj.forward_seeded(x, seeds.module(2));
        let normalize_and_rotate = |x: Tensor<2>, norm: &Option<RmsNorm>, count: usize| {
            let x = match norm {
                Some(norm) => norm.forward(x.reshape([n * count, heads.d])),
                None => x,
            };
            let x = x.reshape([n, count, heads.d]);
            rotate_in_graph(x, &context.rotary).reshape([n, count * heads.d])
        };
        let q = normalize_and_rotate(q, &self.q_norm, heads.query);
        let k = normalize_and_rotate(k, &self.k_norm, heads.key);
        let layout = context.attention(self.sliding_window);
        let output = attention_in_graph(q, k, v, layout, heads);
        self.o_proj.forward_seeded(output, seeds.module(3))
    }
}

impl Mlp {
    /// # Shapes
    ///
    /// - `x`, output: `[n, hidden]`
    fn forward(&self, x: Tensor<2>, seeds: &DropoutSeeds) -> Tensor<2> {
        let gate = self.gate_proj.forward_seeded(x.clone(), seeds.module(4));
        let up = self.up_proj.forward_seeded(x, seeds.module(5));
        self.down_proj
            .forward_seeded(silu(gate) * up, seeds.module(6))
    }
}

impl DecoderLayer {
    /// Runs the layer in the autodiff graph of `x`. Outside a graph it runs the manual forward pass ([`LayerPass`]).
    /// The same `dropout_seed` always drops the same elements.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[n, hidden]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        context: &PackedContext,
        dropout_seed: Option<u64>,
    ) -> Tensor<2> {
        if !x.is_autodiff() {
            let pass = LayerPass {
                layer: self,
                context,
                dropout_seed,
                output_positions: None,
            };
            return pass.forward(&x).0;
        }
        let seeds = DropoutSeeds(dropout_seed);
        let normalized = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normalized, context, &seeds);
        let normalized = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(normalized, &seeds)
    }
}

impl HeadAdapter {
    /// Adds the adapter's output to `logits`.
    fn forward(&self, hidden: Tensor<2>, logits: Tensor<2>) -> Tensor<2> {
        let dtype = hidden.dtype();
        let xa = hidden
            .matmul(self.a.val().cast(dtype))
            .mul_scalar(self.scale);
        let delta = xa.matmul(self.b.val().cast(dtype));
        logits.clone() + delta.cast(logits.dtype())
    }
}

impl Llama {
    /// Prepares a packed batch for [`embed`](Self::embed) and the layers.
    pub fn context(&self, packed: &PackedTokens) -> PackedContext {
        PackedContext::new(packed, &self.config, self.dtype(), &self.device())
    }

    /// The embeddings of the tokens, `[n, hidden]`. Trained rows put them into the model's autodiff graph.
    ///
    /// # Panics
    ///
    /// If a token is outside the vocabulary; [`PackedTokens::check`] reports it as an error.
    pub fn embed(&self, packed: &PackedTokens) -> Tensor<2> {
        self.embedded(&packed.ids)
    }

    /// The last layer's output, before the final norm.
    ///
    /// # Shapes
    ///
    /// - output: `[n, hidden]`
    pub fn hidden_states(&self, packed: &PackedTokens) -> Tensor<2> {
        let context = self.context(packed);
        let mut hidden = self.embed(packed);
        if self.device().is_autodiff() {
            hidden = hidden.autodiff();
        }
        for layer in &self.layers {
            hidden = layer.forward(hidden, &context, None);
        }
        hidden
    }

    /// Final norm and head: the logits in f32.
    ///
    /// Pass only the positions whose logits are needed: the head is most of the work of a small model.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[m, hidden]`
    /// - output: `[m, vocab]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        let hidden = self.norm.forward(hidden);
        let logits = match (&self.quantized_lm_head[..], &self.lm_head) {
            ([], head) => {
                let table = head.as_ref().unwrap_or(&self.embed_tokens);
                table.logits(hidden.clone())
            }
            (pieces, _) => {
                let logits = pieces.iter().map(|piece| piece.forward(hidden.clone()));
                Tensor::cat(logits.collect(), 1)
            }
        };
        let logits = match self.rows_of_head() {
            Some(rows) => rows.logits(hidden.clone(), logits),
            None => logits,
        };
        let logits = match &self.lm_head_adapter {
            Some(adapter) => adapter.forward(hidden, logits),
            None => logits,
        };
        logits.cast(DType::F32)
    }
}
