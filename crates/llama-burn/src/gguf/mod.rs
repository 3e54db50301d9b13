//! llama.cpp's file format: models in GGUF, read and written.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `value` | [`Value`]: the value of a metadata key |
//! | `header` | [`Header`]: metadata and tensor list; every count is checked against the file's length |
//! | `kind` | [`TensorKind`]: how tensors are stored |
//! | `blocks` | ggml's blocks to floats, and to integers with their scales |
//! | `file` | [`GgufFile`]: an open file and its tensors |
//! | `names`, `config` | a model's tensors and shape: llama.cpp's names to Hugging Face's |
//! | `write` | [`GgufWriter`] |
//!
//! Implements the format's specification (ggml's `docs/gguf.md`), tested against the Python package `gguf` and
//! llama.cpp. Existing crates for GGUF allocate whatever size a damaged file states, so this reader is a separate
//! implementation.

mod blocks;
mod config;
mod error;
mod file;
mod header;
mod kind;
mod names;
mod value;
mod write;

pub use config::{config_json, config_metadata, rope_factors};
pub use error::GgufError;
pub use file::{GgufFile, IntegerTensor, is_gguf};
pub use header::{Header, TensorPlace};
pub use kind::TensorKind;
pub use names::{Rows, hugging_face_name, llama_cpp_name, rows_of};
pub use value::{Array, Value};
pub use write::{GgufWriter, TensorPlan};

#[cfg(test)]
mod tests;
