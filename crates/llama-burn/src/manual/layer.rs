//! A decoder layer's forward and backward pass.
//!
//! The forward pass saves only what the backward pass reads, and of element-wise chains only their inputs. The backward
//! pass recomputes norms, and attention's weights tile by tile.
//!
//! Hidden states and their gradients are f32 from layer to layer, because each block adds small values to large ones.
//! Within a block, products and the operations between them have the batch's type ([`PackedContext::new`]).

use burn::module::Param;
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use kernels::{
    AttentionLayout, InverseRms, KvCache, Rotation, SavedAttention, attention, attention_backward,
    query_scale, rotate,
};
use lora_core::{Accumulate, LinearGroup, LowRank};

use crate::decoder_layer::DropoutSeeds;
use crate::{DecoderLayer, PackedContext, RmsNorm};

/// The passes of one layer on a packed batch.
#[derive(Debug, Clone, Copy)]
pub struct LayerPass<'a> {
    /// The layer.
    pub layer: &'a DecoderLayer,
    /// The batch.
    pub context: &'a PackedContext,
    /// Turns dropout on and fixes its masks.
    pub dropout_seed: Option<u64>,
    /// The tokens whose output is computed, `[m]`; `None` means all. In the last layer only the loss positions are
    /// needed: the other tokens affect them through keys and values only.
    pub output_positions: Option<&'a Tensor<1, Int>>,
}

/// What a forward pass saves for the backward pass, in addition to the layer's input.
#[derive(Debug, Clone)]
pub struct Activations {
    attention: SavedAttention,
    before: BeforeAttention,
    after: AfterAttention,
}

/// The part of [`Activations`] that comes before attention.
#[derive(Debug, Clone)]
struct BeforeAttention {
    inverse_rms: InverseRms,
    low: LowRank<3>,
    q_norm: Option<SavedNorm>,
    k_norm: Option<SavedNorm>,
}

/// What the norm of queries or keys saves.
#[derive(Debug, Clone)]
struct SavedNorm {
    /// Its input, `[n, heads · d]`.
    input: Tensor<2>,
    /// Of each head, `[n · heads, 1]`.
    inverse_rms: InverseRms,
}

/// The part of [`Activations`] that comes after attention.
#[derive(Debug, Clone)]
struct AfterAttention {
    output_low: LowRank<1>,
    /// The attention output before `o_proj`, `[m, heads · d]`, if `o_proj` has an adapter or is trained: nothing else
    /// reads it again.
    mixed: Option<Tensor<2>>,
    /// The input and residual of the feed-forward block, `[m, hidden]`.
    middle: Tensor<2>,
    inverse_rms: InverseRms,
    gate: Tensor<2>,
    up: Tensor<2>,
    gate_up_low: LowRank<2>,
    down_low: LowRank<1>,
}

impl Activations {
    /// The rotated keys and the values of all tokens, `[n, key heads · d]` each.
    pub(crate) fn into_keys_values(self) -> [Tensor<2>; 2] {
        self.attention.into_keys_values()
    }
}

/// The gradient of a layer's output or input, `[n, hidden]`.
#[derive(Debug, Clone)]
pub struct HiddenGradient {
    /// In f32.
    pub whole: Tensor<2>,
    /// In the type of products, if that is known already.
    rounded: Option<Tensor<2>>,
}

impl From<Tensor<2>> for HiddenGradient {
    fn from(whole: Tensor<2>) -> Self {
        Self {
            whole,
            rounded: None,
        }
    }
}

impl LayerPass<'_> {
    /// The layer's output, and what the backward pass needs.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`, f32
    /// - output: `[n, hidden]`, or `[m, hidden]` for `m` output positions, f32
    pub fn forward(&self, x: &Tensor<2>) -> (Tensor<2>, Activations) {
        let ([q, k, v], before) = self.queries_keys_values(x);
        let heads = self.layer.self_attn.heads();
        let (mixed, saved) = attention(q, k, v, self.layout(), heads);
        let (output, after) = self.after_attention(self.select(mixed), self.select(x.clone()));
        let activations = Activations {
            attention: saved,
            before,
            after,
        };
        (output, activations)
    }

    /// As [`forward`](Self::forward), for the next token of every sequence. It attends to `cache` and to itself; its
    /// key and value are added to the cache.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[sequences, hidden]`, f32
    pub(crate) fn decode(&self, x: &Tensor<2>, cache: &mut dyn KvCache) -> Tensor<2> {
        let ([q, k, v], _) = self.queries_keys_values(x);
        let mixed = cache.attend(q, k, v, self.layer.self_attn.heads());
        self.after_attention(mixed, x.clone()).0
    }

    /// Rotated queries and keys, and values. The queries are multiplied by [`query_scale`].
    fn queries_keys_values(&self, x: &Tensor<2>) -> ([Tensor<2>; 3], BeforeAttention) {
        let norm = &self.layer.input_layernorm;
        let (normalized, inverse_rms) = norm.manual_forward(x, self.context.dtype);
        let ([q, k, v], low) = self
            .attention_group()
            .forward(&normalized, [const { None }; 3]);
        let attention = &self.layer.self_attn;
        let (q, q_norm) = normalize_heads(&attention.q_norm, q);
        let (k, k_norm) = normalize_heads(&attention.k_norm, k);
        let scale = query_scale(&q, attention.heads());
        let q = self.rotate(q, Rotation::Forward, scale);
        let k = self.rotate(k, Rotation::Forward, 1.0);
        let before = BeforeAttention {
            inverse_rms,
            low,
            q_norm,
            k_norm,
        };
        ([q, k, v], before)
    }

    /// From the attention output before `o_proj` to the layer's output. `residual` is the layer's input at these
    /// tokens.
    fn after_attention(
        &self,
        mixed: Tensor<2>,
        residual: Tensor<2>,
    ) -> (Tensor<2>, AfterAttention) {
        let group = self.output_group();
        let ([middle], output_low) = group.forward(&mixed, [Some(residual)]);
        let mixed = group.reads_input().then_some(mixed);

        let norm = &self.layer.post_attention_layernorm;
        let (normalized, inverse_rms) = norm.manual_forward(&middle, self.context.dtype);
        let ([gate, up, product], gate_up_low) = self.gate_up_group().forward_gated(&normalized);
        drop(normalized);
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

    /// Returns the gradient of the layer's input if `input_gradient` is set. The gradients of the adapters, and of what
    /// else is trained, go to `accumulate`, in f32.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[n, hidden]`, f32
    /// - `d_output`: as [`forward`](Self::forward)'s output
    pub fn backward(
        &self,
        x: &Tensor<2>,
        activations: Activations,
        d_output: HiddenGradient,
        input_gradient: bool,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) -> Option<HiddenGradient> {
        let Activations {
            attention: saved,
            before:
                BeforeAttention {
                    inverse_rms,
                    low: attention_low,
                    q_norm,
                    k_norm,
                },
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
        // Which gradients are needed, from the first block of the layer to the last.
        let (attention, output) = (self.attention_group(), self.output_group());
        let (gate_up, down) = (self.gate_up_group(), self.down_group());
        let d_x_normalized_needed = input_gradient || layer.input_layernorm.trained().is_some();
        let d_mixed_needed =
            d_x_normalized_needed || attention.trains() || layer.self_attn.trains_norms();
        let d_middle_needed = d_mixed_needed || output.trains();
        let d_normalized_needed =
            d_middle_needed || layer.post_attention_layernorm.trained().is_some();
        let d_product_needed = d_normalized_needed || gate_up.trains();
        let dtype = self.context.dtype;
        let HiddenGradient {
            whole: d_output,
            rounded,
        } = d_output;
        let d_block = rounded.unwrap_or_else(|| d_output.clone().cast(dtype));
        let (d_gate, d_up) =
            down.backward_gated(gate, up, down_low, d_block, d_product_needed, accumulate)?;
        let norm = &layer.post_attention_layernorm;
        let gain = norm.gain();
        let normalized = norm.output(&middle, &middle_rms, gain.clone(), dtype);
        let d_normalized = gate_up.backward(
            normalized,
            gate_up_low,
            [d_gate, d_up],
            d_normalized_needed,
            accumulate,
        )?;
        norm.gradient_of_gain(&middle, &middle_rms, &d_normalized, accumulate);
        if !d_middle_needed {
            return None;
        }
        let (d_middle, rounded) =
            norm.backward(&middle, middle_rms, gain, d_normalized, d_output, dtype);
        drop(middle);

        // Called only if `o_proj` has an adapter or is trained.
        let mixed = || mixed.unwrap_or_else(|| unreachable!("saved if it is read"));
        let d_mixed = output.backward(mixed, output_low, [rounded], d_mixed_needed, accumulate)?;
        let d_mixed = self.scatter(d_mixed, x.dims()[0]);
        let heads = layer.self_attn.heads();
        let [d_q, d_k, d_v] = attention_backward(saved, d_mixed, self.layout(), heads);
        let scale = query_scale(&d_q, heads);
        let d_q = self.rotate(d_q, Rotation::Inverse, scale);
        let d_k = self.rotate(d_k, Rotation::Inverse, 1.0);
        let d_q = normalize_heads_backward(&layer.self_attn.q_norm, q_norm, d_q, accumulate);
        let d_k = normalize_heads_backward(&layer.self_attn.k_norm, k_norm, d_k, accumulate);
        let norm = &layer.input_layernorm;
        let residual = input_gradient.then(|| self.scatter(d_middle, x.dims()[0]));
        let gain = norm.gain();
        let normalized = norm.output(x, &inverse_rms, gain.clone(), dtype);
        let d_normalized = attention.backward(
            normalized,
            attention_low,
            [d_q, d_k, d_v],
            d_x_normalized_needed,
            accumulate,
        )?;
        norm.gradient_of_gain(x, &inverse_rms, &d_normalized, accumulate);
        let (whole, rounded) = norm.backward(x, inverse_rms, gain, d_normalized, residual?, dtype);
        let rounded = Some(rounded);
        Some(HiddenGradient { whole, rounded })
    }

    fn layout(&self) -> &AttentionLayout {
        self.context.attention(self.layer.self_attn.sliding_window)
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

    /// The rows at the output positions.
    fn select(&self, x: Tensor<2>) -> Tensor<2> {
        match self.output_positions {
            Some(positions) => x.select(0, positions.clone()),
            None => x,
        }
    }

    /// The opposite of [`select`](Self::select): rows among `n`, summed for a position that occurs several times.
    fn scatter(&self, x: Tensor<2>, n: usize) -> Tensor<2> {
        let Some(positions) = self.output_positions else {
            return x;
        };
        let zeros = Tensor::zeros([n, x.dims()[1]], (&x.device(), x.dtype()));
        zeros.select_assign(0, positions.clone(), x, IndexingUpdateOp::Add)
    }
}

/// Queries or keys, each head normalized if the layer has this norm, and what the backward pass needs.
fn normalize_heads(norm: &Option<RmsNorm>, x: Tensor<2>) -> (Tensor<2>, Option<SavedNorm>) {
    let Some(norm) = norm else {
        return (x, None);
    };
    let (output, inverse_rms) = norm.heads_forward(&x);
    let saved = SavedNorm {
        input: x,
        inverse_rms,
    };
    (output, Some(saved))
}

/// The gradient of the input of [`normalize_heads`] from that of its output.
fn normalize_heads_backward(
    norm: &Option<RmsNorm>,
    saved: Option<SavedNorm>,
    gradient: Tensor<2>,
    accumulate: &mut Accumulate<'_>,
) -> Tensor<2> {
    match (norm, saved) {
        (Some(norm), Some(saved)) => {
            norm.heads_backward(saved.input, saved.inverse_rms, gradient, accumulate)
        }
        _ => gradient,
    }
}
