//! Grouped-query attention (Ainslie et al., 2023, <https://arxiv.org/abs/2305.13245>) within packed rows.

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{FloatDType, Tensor};
use lora_core::LoraLinear;

use crate::decoder_layer::DropoutSeeds;
use crate::packed::PackedContext;
use crate::rope;

/// The attention block of a decoder layer (`self_attn`).
#[derive(Module, Debug)]
#[allow(missing_docs)] // Hugging Face's names.
pub struct Attention {
    pub q_proj: LoraLinear,
    pub k_proj: LoraLinear,
    pub v_proj: LoraLinear,
    pub o_proj: LoraLinear,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
}

impl Attention {
    /// Causal attention of each row to itself.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`
    /// - output: `[n, hidden]`
    pub(crate) fn forward(
        &self,
        x: Tensor<2>,
        context: &PackedContext,
        seeds: &DropoutSeeds,
    ) -> Tensor<2> {
        let (n, d) = (context.tokens, self.head_dim);
        let heads = |x: Tensor<2>, count| x.reshape([n, count, d]);
        let q = heads(
            self.q_proj.forward_seeded(x.clone(), seeds.module(0)),
            self.num_attention_heads,
        );
        let k = heads(
            self.k_proj.forward_seeded(x.clone(), seeds.module(1)),
            self.num_key_value_heads,
        );
        let v = heads(
            self.v_proj.forward_seeded(x, seeds.module(2)),
            self.num_key_value_heads,
        );
        let q = rope::rotate(q, &context.cos, &context.sin);
        let k = rope::rotate(k, &context.cos, &context.sin);
        let mixed = self.attend(
            context.spread(q),
            context.spread(k),
            context.spread(v),
            context,
        );
        self.o_proj
            .forward_seeded(context.gather(mixed), seeds.module(3))
    }

    /// `softmax(q·kᵀ/√d + mask)·v` with `[rows, longest, heads, d]` in and out.
    ///
    /// The query heads that share a key head are stacked along the queries, so that keys and values
    /// are never repeated.
    fn attend(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        context: &PackedContext,
    ) -> Tensor<4> {
        let [rows, length, heads, d] = q.dims();
        let kv_heads = self.num_key_value_heads;
        let group = heads / kv_heads;
        let dtype = FloatDType::from(q.dtype());
        let q = q
            .swap_dims(1, 2)
            .reshape([rows, kv_heads, group * length, d]);
        let (k, v) = (k.swap_dims(1, 2), v.swap_dims(1, 2));
        // The scale goes onto the queries, the smaller tensor; scores and softmax are f32.
        let q = q.mul_scalar(1.0 / (d as f64).sqrt());
        let scores = q.matmul(k.swap_dims(2, 3)).cast(FloatDType::F32);
        let scores = scores.reshape([rows, heads, length, length]) + context.mask.clone();
        let weights = softmax(scores, 3).cast(dtype);
        let weights = weights.reshape([rows, kv_heads, group * length, length]);
        weights
            .matmul(v)
            .reshape([rows, heads, length, d])
            .swap_dims(1, 2)
    }
}
