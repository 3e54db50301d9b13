//! Llama-family models in Burn, with Hugging Face's configuration, weights and module names.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `config` | [`LlamaConfig`] from `config.json` |
//! | `weights`, `load` | safetensors, one tensor at a time, quantized as they come |
//! | [`floats`] | f32, f16 and bf16 from bytes |
//! | [`gguf`] | llama.cpp's files: read as they are, and written |
//! | `packed` | rows packed into one sequence, each attending within itself |
//! | `rope`, `rms_norm`, `attention`, `mlp`, `decoder_layer` | the parts, as in `modeling_llama.py` |
//! | `passes` | a layer's forward and backward pass written out, for training without a tape |
//! | [`pieces`] | the operations of a pass one by one, for comparisons of devices |
//! | `kv_cache` | keys and values of what was read, for writing token by token |
//! | `vocab_table` | the embedding and the output layer |
//! | [`limited`] | files and messages of bounded length |
//! | `head_adapter` | a low-rank path beside the output layer |
//! | `replace` | single tensors, replaced or read back by name |
//! | `model` | [`Llama`] |
//!
//! The reference is `transformers`' `LlamaForCausalLM`; the workspace's tests compare with it.

mod attention;
mod config;
mod decoder_layer;
pub mod floats;
pub mod gguf;
mod head_adapter;
mod kv_cache;
pub mod limited;
mod load;
mod mlp;
mod model;
mod packed;
mod padded;
mod passes;
pub mod pieces;
mod random;
mod replace;
mod rms_norm;
mod rope;
mod rope_scaling;
mod token_rows;
mod unsupported;
mod uploads;
mod vocab_table;
mod weights;

pub use attention::{Attention, SCORES_AT_ONCE, heads_apart};
pub use config::{ConfigError, LlamaConfig};
pub use decoder_layer::DecoderLayer;
pub use head_adapter::HeadAdapter;
pub use kv_cache::KvCache;
pub use load::{LoadError, LoadOptions, TensorReport, load};
pub use mlp::Mlp;
pub use model::{Llama, PassInputs, decoder_layer};
pub use packed::{PackedContext, PackedError, PackedTokens, Segment};
pub use passes::{Activations, LayerPass};
pub use rms_norm::RmsNorm;
pub use rope::inverse_frequencies;
pub use rope_scaling::{RopeScaling, Yarn};
pub use token_rows::TokenRows;
pub use vocab_table::{PIECE_BYTES, VocabTable};
pub use weights::{
    EMBEDDING_WEIGHT, HEAD_WEIGHT, MAPPED_BYTES, Stored, Weights, WeightsError, weight_files,
};
