//! Reads and writes adapters in PEFT's format: a folder with `adapter_config.json` and
//! `adapter_model.safetensors`, which `PeftModel.from_pretrained` loads unchanged.
//!
//! Reading is strict. An unsupported field or tensor that would change what the adapter computes is an
//! error that names it. Nothing is ignored silently.

mod check;
mod combine;
mod config;
mod floats;
mod initial;
mod merged;
mod model;
mod module;
mod shared;
mod tensors;
mod token_rows;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use llama_burn::limited::{self, LARGEST_SETTINGS};

pub use combine::{Combination, CombineError, Weighted, combine};
pub use config::AdapterConfig;
pub use floats::Floats;
pub use module::{load_module, save_module};
pub use shared::Shared;
pub use tensors::read_floats;
pub use tensors::{
    AdapterPair, AdapterTensors, WholeTensor, tensor_names, trained_names, vector_name,
};
pub use token_rows::{check_tokens, name_tables, trains_embedding, with_fresh_rows};

/// Name of the file with an adapter's settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the file with an adapter's weights.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Why an adapter cannot be read, written or put on a model.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The failed action, `read` or `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The folder holds an adapter only in PyTorch's pickle format.
    #[error(
        "{} has no {WEIGHTS_FILE}, only adapter_model.bin; load it with PEFT and save it again with save_pretrained, which writes safetensors",
        folder.display()
    )]
    Pickle {
        /// The adapter's folder.
        folder: PathBuf,
    },
    /// An error, with the file that it is in.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error.
        source: Box<AdapterError>,
    },
    /// `adapter_config.json` is not a JSON object.
    #[error("not a valid adapter configuration: {reason}")]
    Json {
        /// The JSON parser's message.
        reason: String,
    },
    /// A field of `adapter_config.json` is wrong or not supported.
    #[error("{field} is {got}; expected {expected}")]
    Config {
        /// The field's name.
        field: String,
        /// Its value, as JSON.
        got: String,
        /// The possible values.
        expected: String,
    },
    /// A setting of the LoRA is invalid.
    #[error(transparent)]
    Lora(#[from] lora_core::LoraError),
    /// The weights are not a safetensors file, or are cut off.
    #[error("not a valid safetensors file: {reason}")]
    Safetensors {
        /// The parser's message.
        reason: String,
    },
    /// A tensor that the adapter needs is not in the file.
    #[error("tensor {name} is missing")]
    Missing {
        /// PEFT's name of the tensor.
        name: String,
    },
    /// A tensor that belongs to no adapted module.
    #[error(
        "tensor {name} is unexpected: the adapter's configuration and the model have no place for it; was it trained on another model?"
    )]
    Unexpected {
        /// The tensor's name.
        name: String,
    },
    /// A saved module is in the file twice, with different values.
    #[error(
        "the tensor {tensor} is in the adapter's file twice with different values, by itself and under modules_to_save; \
         remove one of them"
    )]
    TwoVersions {
        /// The base model's name of the tensor.
        tensor: String,
    },
    /// A tensor of the wrong shape.
    #[error("tensor {name} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The tensor's name.
        name: String,
        /// The shape that the model and the rank require.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A tensor that is not a matrix.
    #[error("tensor {name} has shape {got:?}, expected a matrix")]
    Rank {
        /// The tensor's name.
        name: String,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A tensor whose elements are not floats.
    #[error("tensor {name} has type {got}, expected F32, F16 or BF16")]
    Dtype {
        /// The tensor's name.
        name: String,
        /// The type in the file.
        got: String,
    },
    /// A layer rejects its adapter.
    #[error("{module}: {source}")]
    Module {
        /// The module's full name.
        module: String,
        /// The layer's error.
        source: Box<lora_core::LoraError>,
    },
    /// A tensor cannot be read from the device.
    #[error("tensor {name} cannot be read from the device: {reason}")]
    Unreadable {
        /// PEFT's name of the tensor.
        name: String,
        /// The device's message.
        reason: String,
    },
    /// NaN or infinity in a tensor.
    #[error(
        "tensor {name} holds {value} at element {index}; the training that made it has diverged"
    )]
    NotFinite {
        /// The tensor's name.
        name: String,
        /// Which element, counted row by row.
        index: usize,
        /// NaN, or an infinity.
        value: f32,
    },
}

impl AdapterError {
    pub(crate) fn shape(name: String, expected: &[usize], got: &[usize]) -> Self {
        Self::Shape {
            name,
            expected: expected.to_vec(),
            got: got.to_vec(),
        }
    }

    /// Adds the file that the error is in.
    pub fn in_file(self, path: &Path) -> Self {
        Self::File {
            path: path.into(),
            source: Box::new(self),
        }
    }
}

/// Writes an adapter into `folder`, which is created if it is missing.
///
/// Each file is replaced atomically (temporary file, sync, rename), the weights before the
/// configuration. An interrupted run never leaves a part of a file.
///
/// # Errors
///
/// [`AdapterError::Io`] for a folder that cannot be written; [`AdapterError::NotFinite`].
pub fn write_adapter(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &AdapterTensors,
) -> Result<(), AdapterError> {
    let weights = folder.join(WEIGHTS_FILE);
    if tensors.shared.is_some() && !config.lora.save_projection {
        let without = AdapterTensors {
            shared: None,
            ..tensors.clone()
        };
        without.write(&weights)?;
    } else {
        tensors.write(&weights)?;
    }
    let text = format!("{:#}\n", config.to_json());
    replace_file(&folder.join(CONFIG_FILE), text.as_bytes())
}

/// Reads the adapter in `folder`.
///
/// The tensors are checked against each other and against `r`. [`AdapterTensors::put_on`] checks them
/// against a model.
///
/// # Errors
///
/// A file that is missing or wrong, by its path; see [`AdapterConfig::from_json`] and
/// [`AdapterTensors::from_bytes`].
pub fn read_adapter(folder: &Path) -> Result<(AdapterConfig, AdapterTensors), AdapterError> {
    let config = read_adapter_config(folder)?;
    let path = folder.join(WEIGHTS_FILE);
    if !path.exists() && folder.join("adapter_model.bin").exists() {
        return Err(AdapterError::Pickle {
            folder: folder.into(),
        });
    }
    let bytes = fs::read(&path).map_err(|source| cannot_read(&path, source))?;
    let tensors = AdapterTensors::from_bytes(&bytes, &config.lora);
    Ok((config, tensors.map_err(|error| error.in_file(&path))?))
}

/// Reads `adapter_config.json` in `folder`.
///
/// # Errors
///
/// As [`read_adapter`].
pub fn read_adapter_config(folder: &Path) -> Result<AdapterConfig, AdapterError> {
    let path = folder.join(CONFIG_FILE);
    let text = limited::read_to_string(&path, LARGEST_SETTINGS)
        .map_err(|source| cannot_read(&path, source))?;
    AdapterConfig::from_json(&text).map_err(|error| error.in_file(&path))
}

fn cannot_read(path: &Path, source: io::Error) -> AdapterError {
    AdapterError::Io {
        action: "read",
        path: path.into(),
        source,
    }
}

/// Replaces a file atomically.
fn replace_file(path: &Path, content: &[u8]) -> Result<(), AdapterError> {
    durable::write_atomically(path, content).map_err(not_written)
}

fn not_written(error: durable::WriteError) -> AdapterError {
    AdapterError::Io {
        action: "write",
        path: error.path,
        source: error.source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AdapterConfig {
        AdapterConfig {
            lora: lora_core::LoraConfig {
                r: 3,
                ..lora_core::LoraConfig::default()
            },
            base_model_name_or_path: None,
        }
    }

    #[test]
    fn an_adapter_reads_back_as_it_was_written_and_leaves_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let adapter = folder.path().join("deep/adapter");
        for _ in 0..2 {
            write_adapter(&adapter, &config(), &tensors::tests::example()).unwrap();
        }
        let read = read_adapter(&adapter).unwrap();
        assert_eq!(read, (config(), tensors::tests::example()));
        assert_eq!(fs::read_dir(&adapter).unwrap().count(), 2);
    }

    #[test]
    fn a_refused_adapter_leaves_the_one_that_was_there() {
        let folder = tempfile::tempdir().unwrap();
        write_adapter(folder.path(), &config(), &tensors::tests::example()).unwrap();
        let mut broken = tensors::tests::example();
        broken.modules.values_mut().next().unwrap().a[0] = f32::NAN;
        assert!(write_adapter(folder.path(), &config(), &broken).is_err());
        assert_eq!(
            read_adapter(folder.path()).unwrap().1,
            tensors::tests::example()
        );
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = || read_adapter(folder.path()).unwrap_err().to_string();
        assert!(error().contains(CONFIG_FILE));
        fs::write(folder.path().join(CONFIG_FILE), "{}").unwrap();
        assert!(
            error().contains(CONFIG_FILE) && error().contains("peft_type"),
            "{}",
            error()
        );
        fs::write(
            folder.path().join(CONFIG_FILE),
            config().to_json().to_string(),
        )
        .unwrap();
        assert!(error().contains(WEIGHTS_FILE));
        fs::write(folder.path().join(WEIGHTS_FILE), "short").unwrap();
        assert!(
            error().contains(WEIGHTS_FILE) && error().contains("safetensors"),
            "{}",
            error()
        );
        fs::remove_file(folder.path().join(WEIGHTS_FILE)).unwrap();
        fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
        assert!(error().contains("save_pretrained"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = write_adapter(&file.join("adapter"), &config(), &AdapterTensors::default());
        assert!(error.unwrap_err().to_string().contains("adapter"));
    }
}
