//! A decoder layer's forward and backward pass.
//!
//! What the backward pass reads is kept, and nothing else: of element-wise chains only their inputs.
//! Norms are computed again, attention's weights tile by tile.
//!
//! Hidden states, and their gradients, are f32 from layer to layer: what is added to them is small beside them. Products
//! and what lies between them within a block have the batch's type ([`PackedContext::new`]).

use burn::module::Param;
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use kernels::{
    InverseRms, KvCache, Rotation, SavedAttention, attention, attention_backward, query_scale,
    rotate, swiglu, swiglu_backward,
};
use lora_core::{LinearGroup, LowRank};

use crate::decoder_layer::DropoutSeeds;
use crate::{DecoderLayer, PackedContext};

/// A layer about to be run on a packed batch.
#[derive(Debug, Clone, Copy)]
pub struct LayerPass<'a> {
    /// The layer.
    pub layer: &'a DecoderLayer,
    /// The batch.
    pub context: &'a PackedContext,
    /// Makes dropout act, and fixes its masks.
    pub dropout_seed: Option<u64>,
    /// The tokens whose output is wanted, `[m]`; all where there is none. In the last layer only those
    /// that predict something: beyond its keys and values nothing else has an effect.
    pub output_positions: Option<&'a Tensor<1, Int>>,
}

/// What a forward pass leaves for the backward pass, beside the layer's input.
#[derive(Debug, Clone)]
pub struct Activations {
    attention: SavedAttention,
    attention_low: LowRank<3>,
    inverse_rms: InverseRms,
    after: AfterAttention,
}

/// The part of [`Activations`] that comes after attention.
#[derive(Debug, Clone)]
struct AfterAttention {
    output_low: LowRank<1>,
    /// What attention mixed, `[m, heads · d]`, where the output module has an adapter: nothing else
    /// reads it again.
    mixed: Option<Tensor<2>>,
    /// What the feed-forward block gets and is added to, `[m, hidden]`.
    middle: Tensor<2>,
    inverse_rms: InverseRms,
    gate: Tensor<2>,
    up: Tensor<2>,
    gate_up_low: LowRank<2>,
    down_low: LowRank<1>,
}

impl Activations {
    /// The keys, rotated, and the values of all tokens, `[n, key heads · d]` each.
    pub(crate) fn into_keys_values(self) -> [Tensor<2>; 2] {
        self.attention.into_keys_values()
    }
}

impl LayerPass<'_> {
    /// The layer's output, and what the backward pass needs.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`, f32
    /// - output: `[n, hidden]`, or `[m, hidden]` for `m` wanted tokens, f32
    pub fn forward(&self, x: &Tensor<2>) -> (Tensor<2>, Activations) {
        let ([q, k, v], attention_low, inverse_rms) = self.queries_keys_values(x);
        let heads = self.layer.self_attn.heads();
        let (mixed, saved) = attention(q, k, v, &self.context.attention, heads);
        let (output, after) = self.after_attention(self.select(mixed), self.select(x.clone()));
        let activations = Activations {
            attention: saved,
            attention_low,
            inverse_rms,
            after,
        };
        (output, activations)
    }

    /// As [`forward`](Self::forward) for the next token of every row, which attends to `cache` and to
    /// itself; its key and value are added to the cache.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[rows, hidden]`, f32
    pub(crate) fn decode(&self, x: &Tensor<2>, cache: &mut dyn KvCache) -> Tensor<2> {
        let ([q, k, v], ..) = self.queries_keys_values(x);
        let mixed = cache.attend(q, k, v, self.layer.self_attn.heads());
        self.after_attention(mixed, x.clone()).0
    }

    /// Rotated queries and keys, and values; the queries times [`query_scale`].
    fn queries_keys_values(&self, x: &Tensor<2>) -> ([Tensor<2>; 3], LowRank<3>, InverseRms) {
        let norm = &self.layer.input_layernorm;
        let (normalised, inverse_rms) = norm.manual_forward(x, self.context.dtype);
        let ([q, k, v], low) = self
            .attention_group()
            .forward(&normalised, [const { None }; 3]);
        let scale = query_scale(&q, self.layer.self_attn.heads());
        let q = self.rotate(q, Rotation::Forward, scale);
        let k = self.rotate(k, Rotation::Forward, 1.0);
        ([q, k, v], low, inverse_rms)
    }

    /// From what attention mixed to the layer's output. `residual` is the layer's input at these tokens.
    fn after_attention(
        &self,
        mixed: Tensor<2>,
        residual: Tensor<2>,
    ) -> (Tensor<2>, AfterAttention) {
        let group = self.output_group();
        let ([middle], output_low) = group.forward(&mixed, [Some(residual)]);
        let mixed = group.has_adapters().then_some(mixed);

        let norm = &self.layer.post_attention_layernorm;
        let (normalised, inverse_rms) = norm.manual_forward(&middle, self.context.dtype);
        let ([gate, up], gate_up_low) = self.gate_up_group().forward(&normalised, [None, None]);
        drop(normalised);
        let product = swiglu(&gate, &up);
        let ([output], down_low) = self.down_group().forward(&product, [Some(middle.clone())]);
        let after = AfterAttention {
            output_low,
            mixed,
            middle,
            inverse_rms,
            gate,
            up,
            gate_up_low,
            down_low,
        };
        (output, after)
    }

    /// The gradient of the layer's input from that of its output, if `input_gradient` is set; those of
    /// the adapters go to `accumulate`, in f32.
    ///
    /// # Shapes
    ///
    /// - `x`, the result: `[n, hidden]`, f32
    /// - `gradient`: as [`forward`](Self::forward)'s output
    pub fn backward(
        &self,
        x: &Tensor<2>,
        activations: Activations,
        gradient: Tensor<2>,
        input_gradient: bool,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) -> Option<Tensor<2>> {
        let Activations {
            attention: saved,
            attention_low,
            inverse_rms,
            after:
                AfterAttention {
                    output_low,
                    mixed,
                    middle,
                    inverse_rms: middle_rms,
                    gate,
                    up,
                    gate_up_low,
                    down_low,
                },
        } = activations;
        let layer = self.layer;
        let below_adapters = input_gradient || self.attention_group().has_adapters();

        let needed = below_adapters || self.output_group().has_adapters();
        let through_gate = needed || self.gate_up_group().has_adapters();
        let product = || swiglu(&gate, &up);
        let down = self.down_group();
        let dtype = self.context.dtype;
        let of_block = [gradient.clone().cast(dtype)];
        let through = down.backward(product, down_low, of_block, through_gate, accumulate)?;
        let (gate, up) = swiglu_backward(gate, up, through);
        let norm = &layer.post_attention_layernorm;
        let normalised = || norm.again(&middle, &middle_rms, dtype);
        let gain = norm.gain();
        let gate_up = self.gate_up_group();
        let through = gate_up.backward(normalised, gate_up_low, [gate, up], needed, accumulate)?;
        let gradient = norm.backward(&middle, middle_rms, gain, through, gradient);
        drop(middle);

        // Asked for only where the module has an adapter.
        let mixed = || mixed.unwrap_or_else(|| unreachable!("kept for the output's adapter"));
        let output = self.output_group();
        let of_block = [gradient.clone().cast(dtype)];
        let through = output.backward(mixed, output_low, of_block, below_adapters, accumulate)?;
        let through = self.scatter(through, x.dims()[0]);
        let heads = layer.self_attn.heads();
        let [q, k, v] = attention_backward(saved, through, &self.context.attention, heads);
        let scale = query_scale(&q, heads);
        let q = self.rotate(q, Rotation::Inverse, scale);
        let k = self.rotate(k, Rotation::Inverse, 1.0);
        let norm = &layer.input_layernorm;
        let normalised = || norm.again(x, &inverse_rms, dtype);
        let attention = self.attention_group();
        let residual = input_gradient.then(|| self.scatter(gradient, x.dims()[0]));
        let gain = norm.gain();
        let through = attention.backward(
            normalised,
            attention_low,
            [q, k, v],
            input_gradient,
            accumulate,
        )?;
        Some(norm.backward(x, inverse_rms, gain, through, residual?))
    }

    fn attention_group(&self) -> LinearGroup<'_, 3> {
        let attention = &self.layer.self_attn;
        let layers = [&attention.q_proj, &attention.k_proj, &attention.v_proj];
        LinearGroup::new(layers, self.seeds([0, 1, 2]))
    }

    fn output_group(&self) -> LinearGroup<'_, 1> {
        LinearGroup::new([&self.layer.self_attn.o_proj], self.seeds([3]))
    }

    fn gate_up_group(&self) -> LinearGroup<'_, 2> {
        let mlp = &self.layer.mlp;
        LinearGroup::new([&mlp.gate_proj, &mlp.up_proj], self.seeds([4, 5]))
    }

    fn down_group(&self) -> LinearGroup<'_, 1> {
        LinearGroup::new([&self.layer.mlp.down_proj], self.seeds([6]))
    }

    fn seeds<const N: usize>(&self, modules: [u64; N]) -> [Option<u64>; N] {
        modules.map(|module| DropoutSeeds(self.dropout_seed).module(module))
    }

    fn rotate(&self, x: Tensor<2>, rotation: Rotation, scale: f64) -> Tensor<2> {
        rotate(x, &self.context.rotary, rotation, scale)
    }

    /// The wanted rows.
    fn select(&self, x: Tensor<2>) -> Tensor<2> {
        match self.output_positions {
            Some(positions) => x.select(0, positions.clone()),
            None => x,
        }
    }

    /// Wanted rows back among `n`; a token that is wanted several times gets the sum.
    fn scatter(&self, x: Tensor<2>, n: usize) -> Tensor<2> {
        let Some(positions) = self.output_positions else {
            return x;
        };
        let nothing = Tensor::zeros([n, x.dims()[1]], (&x.device(), x.dtype()));
        nothing.select_assign(0, positions.clone(), x, IndexingUpdateOp::Add)
    }
}
