//! Why a GGUF file cannot be written.

use std::io;
use std::path::PathBuf;

use data::DataError;
use durable::WriteError;
use hub::HubError;
use llama_burn::gguf::GgufError;
use llama_burn::{ConfigError, WeightsError};
use lora_core::LoraError;
use peft::AdapterError;
use run_config::embedded::EmbeddedError;

/// Why a GGUF file cannot be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The messages are the documentation.
pub enum ExportGgufError {
    #[error("--output is the folder {}; name a file in it", .0.display())]
    OutputIsFolder(PathBuf),
    #[error("{} already exists; choose another --output, or replace it with --overwrite", .0.display())]
    Exists(PathBuf),
    #[error("--output is {}, which is also read from; choose another file", .0.display())]
    OutputIsInput(PathBuf),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Lora(#[from] LoraError),
    #[error("the adapter in {}: {source}", folder.display())]
    Adapter {
        folder: PathBuf,
        source: AdapterError,
    },
    /// A setting of the model that GGUF has no key for.
    #[error("{0}")]
    Metadata(String),
    #[error("llama.cpp has no name for the tensor {0}")]
    Tensor(String),
    #[error("the adapter in {}: llama.cpp has no name for {module}", folder.display())]
    Module { folder: PathBuf, module: String },
    #[error(
        "the adapter in {} has {what}, which llama.cpp's LoRA file has no place for; leave --lora out to \
         write the model with the adapter in its weights",
        folder.display()
    )]
    NotLora { folder: PathBuf, what: String },
    #[error(
        "--type q8_0 is not supported with --lora (the rank is smaller than a block); use --type f16 or f32"
    )]
    QuantizedAdapter,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Write(#[from] WriteError),
    /// An error while the file was being written. The file that was there before is unchanged.
    #[error("cannot write {}: {source}", path.display())]
    File {
        path: PathBuf,
        source: Box<ExportGgufError>,
    },
}
