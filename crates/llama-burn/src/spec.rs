//! A decoder layer and a whole model, described once: linear modules with names, shapes and biases, norms, and every
//! tensor of a checkpoint. Loading, LoRA targets, planning, merging, checks and GGUF read these lists.

use lora_core::{LoraLinear, ModuleShape};

use crate::weights::{EMBEDDING_WEIGHT, HEAD_WEIGHT};
use crate::{Attention, DecoderLayer, LlamaConfig, Mlp, RmsNorm};

/// Names of a module within its layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    pub hugging_face: &'static str,
    pub llama_cpp: &'static str,
}

const fn names(hugging_face: &'static str, llama_cpp: &'static str) -> Names {
    Names {
        hugging_face,
        llama_cpp,
    }
}

/// The linear modules, in the order of every list of them.
pub(crate) const LINEARS: [Names; 7] = [
    names("self_attn.q_proj", "attn_q"),
    names("self_attn.k_proj", "attn_k"),
    names("self_attn.v_proj", "attn_v"),
    names("self_attn.o_proj", "attn_output"),
    names("mlp.gate_proj", "ffn_gate"),
    names("mlp.up_proj", "ffn_up"),
    names("mlp.down_proj", "ffn_down"),
];

/// The names of a decoder layer's linear modules without their block: `q_proj`, `k_proj`, ...
pub fn linear_names() -> [&'static str; 7] {
    LINEARS.map(|names| match names.hugging_face.rsplit_once('.') {
        Some((_, name)) => name,
        None => names.hugging_face,
    })
}

/// The norms, in the order of every list of them; not every family has the last two.
pub(crate) const NORMS: [Names; 4] = [
    names("input_layernorm", "attn_norm"),
    names("post_attention_layernorm", "ffn_norm"),
    names("self_attn.q_norm", "attn_q_norm"),
    names("self_attn.k_norm", "attn_k_norm"),
];

/// A linear module of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearSpec {
    /// Hugging Face's name within the layer, such as `self_attn.q_proj`.
    pub name: &'static str,
    /// The input's width.
    pub d_in: usize,
    /// The output's width.
    pub d_out: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

impl LinearSpec {
    /// Elements of its weight.
    pub fn elements(&self) -> usize {
        self.d_in * self.d_out
    }
}

/// A norm of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormSpec {
    /// Hugging Face's name within the layer, such as `input_layernorm`.
    pub name: &'static str,
    /// The length of its weight.
    pub width: usize,
}

impl LlamaConfig {
    /// The width of the queries of all heads together.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// The width of the keys (or values) of all heads together.
    pub fn key_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// The linear modules of a decoder layer.
    pub fn layer_linears(&self) -> Vec<LinearSpec> {
        let (hidden, inter) = (self.hidden_size, self.intermediate_size);
        let (q, kv, biases) = (self.query_width(), self.key_width(), self.biases);
        let shapes = [
            (hidden, q, biases.q),
            (hidden, kv, biases.k),
            (hidden, kv, biases.v),
            (q, hidden, biases.o),
            (hidden, inter, biases.gate),
            (hidden, inter, biases.up),
            (inter, hidden, biases.down),
        ];
        let specs = LINEARS.into_iter().zip(shapes);
        let specs = specs.map(|(names, (d_in, d_out, bias))| LinearSpec {
            name: names.hugging_face,
            d_in,
            d_out,
            bias,
        });
        specs.collect()
    }

    /// The norms of a decoder layer.
    pub fn layer_norms(&self) -> Vec<NormSpec> {
        let of_heads = self.query_key_norm.then_some(self.head_dim);
        let widths = [
            Some(self.hidden_size),
            Some(self.hidden_size),
            of_heads,
            of_heads,
        ];
        let specs = NORMS.into_iter().zip(widths);
        let specs = specs.filter_map(|(names, width)| {
            Some(NormSpec {
                name: names.hugging_face,
                width: width?,
            })
        });
        specs.collect()
    }

    /// Every tensor of the checkpoint with Hugging Face's name and shape (linear weights `[out, in]`).
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (vocab, hidden) = (self.vocab_size, self.hidden_size);
        let mut shapes = vec![(EMBEDDING_WEIGHT.to_string(), vec![vocab, hidden])];
        for layer in 0..self.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            for LinearSpec {
                name,
                d_in,
                d_out,
                bias,
            } in self.layer_linears()
            {
                shapes.push((format!("{prefix}.{name}.weight"), vec![d_out, d_in]));
                if bias {
                    shapes.push((format!("{prefix}.{name}.bias"), vec![d_out]));
                }
            }
            for NormSpec { name, width } in self.layer_norms() {
                shapes.push((format!("{prefix}.{name}.weight"), vec![width]));
            }
        }
        shapes.push(("model.norm.weight".into(), vec![hidden]));
        if !self.tie_word_embeddings {
            shapes.push((HEAD_WEIGHT.into(), vec![vocab, hidden]));
        }
        shapes
    }

    /// The modules in lora-core's form: linear weights `[d_in, d_out]`.
    pub fn module_shapes(&self) -> Vec<ModuleShape> {
        let in_layer = |name: &str| {
            LINEARS
                .iter()
                .any(|linear| name.ends_with(linear.hugging_face))
        };
        let linear = |name: &str| name == "lm_head" || in_layer(name);
        self.tensor_shapes()
            .into_iter()
            .map(|(tensor, mut shape)| {
                let is_weight = tensor.ends_with(".weight");
                let name = match tensor.strip_suffix(".weight") {
                    Some(module) => module.to_string(),
                    None => tensor,
                };
                let is_linear = is_weight && linear(&name);
                if is_linear {
                    shape.reverse();
                }
                ModuleShape {
                    name,
                    shape,
                    is_linear,
                }
            })
            .collect()
    }
}

impl DecoderLayer {
    /// Builds layer `index` of the model from the modules that [`LlamaConfig::layer_linears`] and [`LlamaConfig::layer_norms`] list,
    /// in their order.
    ///
    /// # Panics
    ///
    /// If their numbers differ from those of the lists.
    pub fn from_parts(
        config: &LlamaConfig,
        index: usize,
        norms: Vec<RmsNorm>,
        linears: Vec<LoraLinear>,
    ) -> Self {
        let [
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
        ] = linears
            .try_into()
            .expect("as many linear modules as the configuration lists");
        assert_eq!(norms.len(), config.layer_norms().len(), "norms of a layer");
        let mut norms = norms.into_iter();
        let mut norm = || norms.next();
        let (input_layernorm, post_attention_layernorm) = match (norm(), norm()) {
            (Some(input), Some(post_attention)) => (input, post_attention),
            _ => unreachable!("every layer has these two"),
        };
        Self {
            input_layernorm,
            self_attn: Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                q_norm: norm(),
                k_norm: norm(),
                num_attention_heads: config.num_attention_heads,
                num_key_value_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                sliding_window: config.window(index),
            },
            post_attention_layernorm,
            mlp: Mlp {
                gate_proj,
                up_proj,
                down_proj,
            },
        }
    }

    /// The linear modules with their names within the layer, in the order of [`LlamaConfig::layer_linears`].
    pub fn linears(&self) -> [(&'static str, &LoraLinear); 7] {
        let (attention, mlp) = (&self.self_attn, &self.mlp);
        let linears = [
            &attention.q_proj,
            &attention.k_proj,
            &attention.v_proj,
            &attention.o_proj,
            &mlp.gate_proj,
            &mlp.up_proj,
            &mlp.down_proj,
        ];
        std::array::from_fn(|index| (LINEARS[index].hugging_face, linears[index]))
    }

    /// As [`linears`](Self::linears), mutable.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut LoraLinear)> {
        let (attention, mlp) = (&mut self.self_attn, &mut self.mlp);
        let linears = [
            &mut attention.q_proj,
            &mut attention.k_proj,
            &mut attention.v_proj,
            &mut attention.o_proj,
            &mut mlp.gate_proj,
            &mut mlp.up_proj,
            &mut mlp.down_proj,
        ];
        LINEARS.iter().map(|names| names.hugging_face).zip(linears)
    }

    /// The norms with their names within the layer, in the order of [`LlamaConfig::layer_norms`].
    pub fn norms(&self) -> impl Iterator<Item = (&'static str, &RmsNorm)> {
        let norms = [
            Some(&self.input_layernorm),
            Some(&self.post_attention_layernorm),
            self.self_attn.q_norm.as_ref(),
            self.self_attn.k_norm.as_ref(),
        ];
        let named = NORMS.iter().map(|names| names.hugging_face).zip(norms);
        named.filter_map(|(name, norm)| Some((name, norm?)))
    }

    /// As [`norms`](Self::norms), mutable.
    pub fn norms_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut RmsNorm)> {
        let norms = [
            Some(&mut self.input_layernorm),
            Some(&mut self.post_attention_layernorm),
            self.self_attn.q_norm.as_mut(),
            self.self_attn.k_norm.as_mut(),
        ];
        let named = NORMS.iter().map(|names| names.hugging_face).zip(norms);
        named.filter_map(|(name, norm)| Some((name, norm?)))
    }
}
