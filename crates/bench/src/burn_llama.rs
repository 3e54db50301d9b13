//! A Llama of Burn's own modules, written as in Burn's book: `Linear`, `Embedding` and `RmsNorm`,
//! padded batches, logits at every position, one autodiff graph over everything.

use burn::module::{Module, Param};
use burn::nn::{Embedding, Linear, RmsNorm};
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Bool, Device, FloatDType, Int, Tensor, TensorData};
use llama_burn::{Llama, LlamaConfig, VocabTable, inverse_frequencies};
use lora_core::LoraLinear;

/// The model, without adapters until `apply_qlora`.
#[derive(Module, Debug)]
pub(super) struct BurnLlama {
    embed_tokens: Embedding,
    pub layers: Vec<Layer>,
    norm: RmsNorm,
    /// `None` if the head is tied to the embedding.
    lm_head: Option<Embedding>,
    #[module(skip)]
    inverse_frequencies: Vec<f32>,
}

#[derive(Module, Debug)]
pub(super) struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    /// Norms of each head, in the families that have them.
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    heads: usize,
    key_value_heads: usize,
}

#[derive(Module, Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// The inputs of every layer for a padded batch.
struct Context {
    /// `[1, 1, length, head_dim / 2]`.
    cos: Tensor<4>,
    sin: Tensor<4>,
    /// True if a key comes after its query, `[1, 1, length, length]`.
    hidden: Tensor<4, Bool>,
}

impl BurnLlama {
    /// Copies the weights of a model that is not quantized.
    pub fn new(model: Llama, config: &LlamaConfig) -> Self {
        let norm = |norm: llama_burn::RmsNorm| RmsNorm {
            gamma: norm.weight,
            epsilon: norm.eps,
        };
        let layers = model.layers.into_iter().map(|layer| Layer {
            input_layernorm: norm(layer.input_layernorm),
            self_attn: Attention {
                q_proj: linear(layer.self_attn.q_proj),
                k_proj: linear(layer.self_attn.k_proj),
                v_proj: linear(layer.self_attn.v_proj),
                o_proj: linear(layer.self_attn.o_proj),
                q_norm: layer.self_attn.q_norm.map(norm),
                k_norm: layer.self_attn.k_norm.map(norm),
                heads: config.num_attention_heads,
                key_value_heads: config.num_key_value_heads,
            },
            post_attention_layernorm: norm(layer.post_attention_layernorm),
            mlp: Mlp {
                gate_proj: linear(layer.mlp.gate_proj),
                up_proj: linear(layer.mlp.up_proj),
                down_proj: linear(layer.mlp.down_proj),
            },
        });
        Self {
            layers: layers.collect(),
            embed_tokens: table(model.embed_tokens),
            norm: norm(model.norm),
            lm_head: model.lm_head.map(table),
            inverse_frequencies: inverse_frequencies(config),
        }
    }

    /// The logits of every token at every position.
    ///
    /// # Shapes
    ///
    /// - `ids`: `[rows, length]`
    /// - output: `[rows, length, vocab]`
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [_, length] = ids.dims();
        let context = self.context(length, &ids.device());
        let mut x = self.embed_tokens.forward(ids);
        for layer in &self.layers {
            x = layer.forward(x, &context);
        }
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        let weight = head.weight.val().transpose();
        self.norm.forward(x).matmul(weight.unsqueeze())
    }

    /// The linear modules of each layer by name within the layer.
    pub fn linears(layer: &Layer) -> [(&'static str, &Linear); 7] {
        let (attention, mlp) = (&layer.self_attn, &layer.mlp);
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

    fn context(&self, length: usize, device: &Device) -> Context {
        let angles = (0..length).flat_map(|position| {
            let frequencies = self.inverse_frequencies.iter();
            frequencies.map(move |frequency| position as f32 * frequency)
        });
        let shape = [1, 1, length, self.inverse_frequencies.len()];
        let angles = TensorData::new(angles.collect::<Vec<f32>>(), shape);
        let angles = Tensor::<4>::from_data(angles, device);
        let ahead = (0..length).flat_map(|query| (0..length).map(move |key| key > query));
        let ahead = TensorData::new(ahead.collect::<Vec<bool>>(), [1, 1, length, length]);
        Context {
            cos: angles.clone().cos(),
            sin: angles.sin(),
            hidden: Tensor::from_data(ahead, device),
        }
    }
}

impl Layer {
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let attended = self
            .self_attn
            .forward(self.input_layernorm.forward(x.clone()), context);
        let x = x + attended;
        let mlp = self
            .mlp
            .forward(self.post_attention_layernorm.forward(x.clone()));
        x + mlp
    }
}

impl Attention {
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let [rows, length, _] = x.dims();
        let heads = |x: Tensor<3>, heads: usize| -> Tensor<4> {
            let width = x.dims()[2] / heads;
            x.reshape([rows, length, heads, width]).swap_dims(1, 2)
        };
        let normalize = |x: Tensor<4>, norm: &Option<RmsNorm>| match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let q = heads(self.q_proj.forward(x.clone()), self.heads);
        let k = heads(self.k_proj.forward(x.clone()), self.key_value_heads);
        let q = rotate(normalize(q, &self.q_norm), context);
        let k = rotate(normalize(k, &self.k_norm), context);
        let v = heads(self.v_proj.forward(x), self.key_value_heads);
        let width = q.dims()[3];
        let scores = q.matmul(self.repeated(k).swap_dims(2, 3)) / (width as f64).sqrt();
        let [_, count, ..] = scores.dims();
        let hidden = context.hidden.clone().expand([rows, count, length, length]);
        let weights = softmax(scores.mask_fill(hidden, f32::NEG_INFINITY), 3);
        let mixed = weights.matmul(self.repeated(v)).swap_dims(1, 2);
        self.o_proj
            .forward(mixed.reshape([rows, length, count * width]))
    }

    /// Repeats every key head for each query head that uses it.
    fn repeated(&self, x: Tensor<4>) -> Tensor<4> {
        let [rows, kv, length, width] = x.dims();
        let group = self.heads / self.key_value_heads;
        x.reshape([rows, kv, 1, length, width])
            .expand([rows, kv, group, length, width])
            .reshape([rows, kv * group, length, width])
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = silu(self.gate_proj.forward(x.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(x))
    }
}

/// The halves of each head, as in Hugging Face's Llama.
fn rotate(x: Tensor<4>, context: &Context) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let (cos, sin) = (context.cos.clone(), context.sin.clone());
    let left = first.clone() * cos.clone() - second.clone() * sin.clone();
    Tensor::cat(vec![left, second * cos + first * sin], 3)
}

fn linear(layer: LoraLinear) -> Linear {
    Linear {
        weight: layer.weight,
        bias: layer.bias,
    }
}

fn table(table: VocabTable) -> Embedding {
    // Burn's embedding is in the compute type; this model's may be in the 16 bits of its file.
    let dtype = FloatDType::from(table.compute_dtype());
    let pieces = table.pieces.into_iter().map(Param::into_value);
    let mut pieces: Vec<Tensor<2>> = pieces.map(|piece| piece.cast(dtype)).collect();
    let whole = match pieces.len() {
        1 => pieces.remove(0),
        _ => Tensor::cat(pieces, 0),
    };
    Embedding {
        weight: Param::from_tensor(whole).set_require_grad(false),
    }
}
