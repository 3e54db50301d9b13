//! Llama-family models in Burn, with Hugging Face's configuration, weights and module names.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `config` | [`LlamaConfig`] from `config.json` |
//! | `weights`, `load` | safetensors, one tensor at a time, quantized as they come |
//! | [`gguf`] | llama.cpp's files: read as they are, and written |
//! | `packed` | sequences packed into one, each attending within itself |
//! | `model`, `decoder_layer`, `attention`, `mlp`, `rms_norm`, `vocab_table` | the parts and their parameters, with Hugging Face's names |
//! | `autodiff` | the forward pass in Burn's autodiff graph, as in `modeling_llama.py` |
//! | [`manual`] | the forward and backward pass without a graph, which training runs |
//! | `rope`, `rope_scaling` | the angles of rotary position embeddings |
//! | `kv_cache` | generation token by token |
//! | `head_adapter`, `token_rows` | an adapter of the output layer; trained rows of the embedding |
//! | `replace` | single tensors, replaced or read back by name |
//! | [`limited`] | files and messages of bounded length |
//!
//! The reference is `transformers`' `LlamaForCausalLM`; the workspace's tests compare with it.

mod attention;
mod autodiff;
mod config;
mod decoder_layer;
pub mod gguf;
mod head_adapter;
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
mod token_rows;
mod unsupported;
mod vocab_table;
mod weights;

pub use attention::Attention;
pub use config::{ConfigError, LlamaConfig};
pub use decoder_layer::DecoderLayer;
pub use head_adapter::HeadAdapter;
pub use kernels::{SCORES_AT_ONCE, Segment, heads_apart};
pub use kv_cache::KvCache;
pub use load::{LoadError, LoadOptions, TensorReport, load};
pub use manual::operations;
pub use manual::{Activations, LayerPass, ManualInputs};
pub use mlp::Mlp;
pub use model::{Llama, decoder_layer};
pub use packed::{PackedContext, PackedError, PackedTokens};
pub use rms_norm::RmsNorm;
pub use rope::inverse_frequencies;
pub use rope_scaling::{RopeScaling, Yarn};
pub use token_rows::TokenRows;
pub use vocab_table::{PIECE_BYTES, VocabTable};
pub use weights::{MAPPED_BYTES, Stored, Weights, WeightsError, weight_files};
