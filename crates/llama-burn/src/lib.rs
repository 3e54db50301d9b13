//! Llama-family models in Burn, with Hugging Face's configuration, weights and module names.
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`family`] | what distinguishes the families, one file each |
//! | `spec` | the tensors and modules of a model, described once |
//! | `config`, `keys`, `unsupported` | [`LlamaConfig`] from `config.json`; settings that are rejected |
//! | `weights`, `load` | safetensors and GGUF to a [`Llama`], quantized one tensor at a time |
//! | [`floats`] | f32, f16 and bf16 from bytes |
//! | [`gguf`] | llama.cpp's file format, read and written |
//! | `packed` | sequences packed into one batch, with shared prefixes in a prefix tree |
//! | `model`, `decoder_layer`, `attention`, `mlp`, `rms_norm`, `vocab_table` | the modules and their parameters, with Hugging Face's names |
//! | `autodiff` | the forward pass in Burn's autodiff graph, as in `modeling_llama.py` |
//! | [`manual`] | the manual forward and backward pass without a graph, which training runs |
//! | [`operations`] | the operations of a layer one by one, for checks of a device |
//! | `rope`, `rope_scaling` | the angles of rotary position embeddings |
//! | `kv_cache` | generation token by token |
//! | `head_adapter`, `token_rows` | a LoRA adapter of the output layer; trained rows of embedding and output layer |
//! | `whole` | biases and whole modules that are trained themselves |
//! | `initial` | adapters taken out of the weights while these are loaded: PiSSA and OLoRA |
//! | `replace` | single tensors, replaced or read back by name |
//! | `random` | a model with random weights made on the device, for measurements |
//! | [`limited`] | untrusted files: reads up to a size limit |
//!
//! The reference is `transformers`' `LlamaForCausalLM` and the classes of the other families; the workspace's tests
//! compare with them.

mod attention;
mod autodiff;
mod config;
mod decoder_layer;
pub mod family;
pub mod floats;
pub mod gguf;
mod head_adapter;
mod initial;
mod keys;
mod kv_cache;
pub mod limited;
mod load;
pub mod manual;
mod mlp;
mod model;
mod packed;
mod random;
mod replace;
mod rms_norm;
mod rope;
mod rope_scaling;
mod spec;
mod token_rows;
mod unsupported;
mod vocab_table;
mod weights;
mod whole;

pub use attention::Attention;
pub use config::{ConfigError, LlamaConfig};
pub use decoder_layer::DecoderLayer;
pub use family::{Biases, Family};
pub use head_adapter::HeadAdapter;
pub use initial::InitialAdapters;
pub use kernels::{SCORES_AT_ONCE, Segment, heads_apart};
pub use kv_cache::KvCache;
pub use load::{LoadError, LoadOptions, TensorReport, load, load_with};
pub use manual::operations;
pub use manual::{Activations, HiddenGradient, LayerPass, ManualInputs};
pub use mlp::Mlp;
pub use model::Llama;
pub use packed::{PackedContext, PackedError, PackedTokens};
pub use rms_norm::RmsNorm;
pub use rope::inverse_frequencies;
pub use rope_scaling::{RopeScaling, Yarn};
pub use spec::{LinearSpec, NormSpec, linear_names};
pub use token_rows::TokenRows;
pub use vocab_table::{PIECE_BYTES, VocabTable};
pub use weights::{
    EMBEDDING_WEIGHT, HEAD_WEIGHT, MAPPED_BYTES, Stored, Weights, WeightsError, weight_files,
};
pub use whole::{WholeElements, saved_whole};
