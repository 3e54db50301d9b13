//! llama.cpp's file format: models in GGUF, read and written.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `value` | [`Value`]: what a metadata key can hold |
//! | `header` | [`Header`]: metadata and tensor list, read with every count checked against the file |
//! | `kind` | [`TensorKind`]: how tensors are stored |
//! | `blocks` | ggml's blocks to floats, and to integers with their scales |
//! | `file` | [`GgufFile`]: an open file and its tensors |
//! | `names`, `config` | a Llama's tensors and shape: llama.cpp's names to Hugging Face's |
//! | `write` | [`GgufWriter`] |
//!
//! Written after the format's description (ggml's `docs/gguf.md`) and checked against the Python package
//! `gguf` and llama.cpp. The crates that read GGUF allocate what a damaged file asks them to, so the
//! reader is ours.

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
