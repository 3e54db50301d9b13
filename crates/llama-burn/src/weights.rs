//! Tensors of a Hugging Face model folder: `model.safetensors`, or shards with their index. The tensors of a GGUF file
//! have Hugging Face's names and order of rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::{Bytes, DType, Element, TensorData};
use burn_store::{ModuleStore, SafetensorsStore};
use half::{bf16, f16};

use crate::LlamaConfig;
use crate::floats::{first_not_finite, halves, to_f32};
use crate::gguf::{self, GgufError, GgufFile, IntegerTensor, Rows, TensorKind};
use crate::limited::{self, LARGEST_TABLE, clipped};

/// Why weight files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The folder has no weights.
    #[error(
        "{folder} has neither model.safetensors nor model.safetensors.index.json; is it a Hugging Face model folder with safetensors weights?"
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// The GGUF file is invalid.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The configuration in a GGUF file is invalid.
    #[error(transparent)]
    GgufConfig(#[from] Box<crate::ConfigError>),
    /// The folder has weights in PyTorch's pickle format only. Reading a pickle file can execute arbitrary code.
    #[error(
        "{folder} has no safetensors weights, only {file}, a pickle file, which is never read here; load the model with transformers and save it again with save_pretrained, which writes safetensors"
    )]
    Pickle {
        /// The folder.
        folder: PathBuf,
        /// One of its pickle files.
        file: String,
    },
    /// A file cannot be read or is not a safetensors file.
    #[error("{file} cannot be read: {reason}; it may be cut off, download it again")]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The reader's message.
        reason: String,
    },
    /// The index of the shards is invalid.
    #[error("{file}: {reason}")]
    Index {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor that the model needs is missing.
    #[error("the weights lack the tensor {name} (expected shape {expected:?})")]
    MissingTensor {
        /// Its name.
        name: String,
        /// The shape that config.json calls for.
        expected: Vec<usize>,
    },
    /// A tensor that the model does not need.
    #[error(
        "the weights hold a tensor that config.json does not call for: {name} {shape:?}; do config.json and weights belong together?"
    )]
    UnexpectedTensor {
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor of another shape.
    #[error("the tensor {name} has shape {got:?}, config.json calls for {expected:?}")]
    WrongShape {
        /// Its name.
        name: String,
        /// The shape that config.json calls for.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A tensor with an unsupported type.
    #[error("the tensor {name} is of type {got}; f32, f16 and bf16 are supported")]
    WrongType {
        /// Its name.
        name: String,
        /// Its type.
        got: String,
    },
    /// A weight that is infinite or NaN.
    #[error(
        "the tensor {name} holds {value} at element {index}; the file is damaged or the model diverged"
    )]
    NotFinite {
        /// Its name.
        name: String,
        /// The index of the first such element.
        index: usize,
        /// Its value.
        value: f32,
    },
}

/// The open, memory-mapped weight files of a folder. Tensors are read one at a time, on request.
pub struct Weights {
    shards: Vec<Shard>,
    /// Name → shard, shape.
    tensors: BTreeMap<String, (usize, Vec<usize>)>,
    gguf: Option<Gguf>,
}

/// Hugging Face's name of the embedding's weight.
pub const EMBEDDING_WEIGHT: &str = "model.embed_tokens.weight";
/// Hugging Face's name of the output layer's weight.
pub const HEAD_WEIGHT: &str = "lm_head.weight";

/// An open GGUF file.
struct Gguf {
    file: GgufFile,
    config: LlamaConfig,
}

/// One open file.
struct Shard {
    file: PathBuf,
    store: SafetensorsStore,
    /// Bytes of tensors that were read since the file was mapped.
    read: usize,
}

/// A file is mapped anew after this many bytes: until then, pages that were read count as this process's memory.
pub const MAPPED_BYTES: usize = 32 << 20;

impl Shard {
    fn open(file: PathBuf) -> Self {
        let store = Self::map(&file);
        Self {
            file,
            store,
            read: 0,
        }
    }

    fn map(file: &Path) -> SafetensorsStore {
        // burn-store's default would rename keys with numbers.
        SafetensorsStore::from_file(file).map_indices_contiguous(false)
    }

    fn unreadable(&self, reason: String) -> WeightsError {
        WeightsError::Unreadable {
            file: self.file.clone(),
            reason,
        }
    }
}

impl Weights {
    /// Opens the weights of a folder, or a GGUF file, and reads their headers.
    ///
    /// # Errors
    ///
    /// If the folder has no weights, or a file is truncated or damaged.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        if gguf::is_gguf(folder) {
            return Self::open_gguf(folder);
        }
        let files = weight_files(folder)?;
        let mut weights = Self {
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            gguf: None,
        };
        for file in files {
            let mut shard = Shard::open(file);
            let tensors = match shard.store.get_all_tensors() {
                Ok(tensors) => tensors,
                Err(error) => {
                    let reason = error.to_string();
                    return Err(shard.unreadable(reason));
                }
            };
            for (name, tensor) in tensors {
                let place = (weights.shards.len(), tensor.shape.to_vec());
                weights.tensors.insert(name.clone(), place);
            }
            weights.shards.push(shard);
        }
        Ok(weights)
    }

    fn open_gguf(path: &Path) -> Result<Self, WeightsError> {
        let file = GgufFile::open(path)?;
        let config = gguf::config_json(&file)?;
        let config = LlamaConfig::from_json(&config).map_err(Box::new)?;
        let mut tensors = BTreeMap::new();
        for (name, place) in &file.header.tensors {
            // The scaling of the rotary frequencies is part of the configuration.
            if name == "rope_freqs.weight" {
                continue;
            }
            let name = gguf::hugging_face_name(name).unwrap_or_else(|| name.clone());
            tensors.insert(name, (0, place.shape.clone()));
        }
        Ok(Self {
            shards: Vec::new(),
            tensors,
            gguf: Some(Gguf { file, config }),
        })
    }

    /// A matrix as the integers and scales of a GGUF file (Q8_0, Q4_0, Q5_0, Q6_K); `None` for other kinds of weights.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn integers(&self, name: &str) -> Result<Option<IntegerTensor>, WeightsError> {
        let (Some(gguf), Some((_, shape))) = (&self.gguf, self.tensors.get(name)) else {
            return Ok(None);
        };
        let (theirs, rows) = gguf.place(name, shape)?;
        let Some(mut tensor) = gguf.file.integers(&theirs)? else {
            return Ok(None);
        };
        if let Some(rows) = rows {
            let columns = shape.last().copied().unwrap_or(1);
            tensor.integers = rows.to_hugging_face(&tensor.integers, columns);
            tensor.scales = rows.to_hugging_face(&tensor.scales, columns / tensor.block);
        }
        match tensor.scales.iter().position(|scale| !scale.is_finite()) {
            Some(index) => Err(WeightsError::NotFinite {
                name: name.into(),
                index: index * tensor.block,
                value: tensor.scales[index],
            }),
            None => Ok(Some(tensor)),
        }
    }

    /// Whether a folder holds a weight of the output layer that differs from the embedding, even if its configuration
    /// ties the two: transformers 5 then uses both. Returns `false` for files that cannot be read; [`open`](Self::open)
    /// reports the error.
    pub(crate) fn has_untied_head(folder: &Path) -> bool {
        let Ok(mut weights) = Self::open(folder) else {
            return false;
        };
        let [embedding, head] =
            [EMBEDDING_WEIGHT, HEAD_WEIGHT].map(|name| weights.tensors.get(name).cloned());
        let (Some((_, embedding)), Some((_, head))) = (embedding, head) else {
            return false;
        };
        if embedding != head || weights.gguf.is_some() {
            return false;
        }
        match (weights.bytes(EMBEDDING_WEIGHT), weights.bytes(HEAD_WEIGHT)) {
            (Ok((embedding, a)), Ok((head, b))) => a != b || embedding[..] != head[..],
            _ => false,
        }
    }

    /// Compares names and shapes with those that the model needs.
    ///
    /// Two kinds of additional tensors are ignored because they are redundant: `rotary_emb.inv_freq`, which follows
    /// from the configuration, and a copy of the embedding as a tied head.
    ///
    /// # Errors
    ///
    /// The first tensor that is missing, has the wrong shape or is unexpected.
    pub fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<(), WeightsError> {
        for (name, shape) in expected {
            match self.tensors.get(name) {
                None => {
                    return Err(WeightsError::MissingTensor {
                        name: name.clone(),
                        expected: shape.clone(),
                    });
                }
                Some((_, got)) if got != shape => {
                    return Err(WeightsError::WrongShape {
                        name: name.clone(),
                        expected: shape.clone(),
                        got: got.clone(),
                    });
                }
                Some(_) => {}
            }
        }
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let table = self.tensors.get(EMBEDDING_WEIGHT).map(|(_, shape)| shape);
        let tolerated = |name: &str, shape: &Vec<usize>| {
            name.ends_with("rotary_emb.inv_freq") || name == HEAD_WEIGHT && Some(shape) == table
        };
        for (name, (_, shape)) in &self.tensors {
            if !known.contains(name.as_str()) && !tolerated(name, shape) {
                return Err(WeightsError::UnexpectedTensor {
                    name: name.clone(),
                    shape: shape.clone(),
                });
            }
        }
        Ok(())
    }

    /// A tensor's values as f32, row-major, in the file's orientation.
    ///
    /// # Errors
    ///
    /// If it is missing, truncated, of an unsupported type, or holds an infinite value or NaN.
    pub fn read(&mut self, name: &str) -> Result<Vec<f32>, WeightsError> {
        if let (Some(gguf), Some((_, shape))) = (&self.gguf, self.tensors.get(name)) {
            let values = gguf.read(name, shape)?;
            check_finite(name, values.iter().copied())?;
            return Ok(values);
        }
        let (bytes, dtype) = self.bytes(name)?;
        let values = to_f32(&bytes, &dtype).ok_or_else(|| wrong_type(name, &dtype))?;
        check_finite(name, values.iter().copied())?;
        Ok(values)
    }

    /// A tensor's values in the file's type, f32, f16 or bf16, flat and row-major. Quantized tensors of a GGUF file are
    /// returned in f32.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn read_as_stored(&mut self, name: &str) -> Result<Stored, WeightsError> {
        if let Some(kind) = self.gguf.as_ref().and_then(|gguf| gguf.kind(name)) {
            let values = self.read(name)?;
            // Exact: the file holds 16-bit values.
            return Ok(match kind {
                TensorKind::F16 => Stored::F16(values.into_iter().map(f16::from_f32).collect()),
                TensorKind::BF16 => Stored::Bf16(values.into_iter().map(bf16::from_f32).collect()),
                _ => Stored::F32(values),
            });
        }
        let (bytes, dtype) = self.bytes(name)?;
        if is(&dtype, DType::F16) {
            let values: Vec<f16> = halves(&bytes, f16::from_le_bytes);
            check_finite(name, values.iter().map(|value| value.to_f32()))?;
            return Ok(Stored::F16(values));
        }
        if is(&dtype, DType::BF16) {
            let values: Vec<bf16> = halves(&bytes, bf16::from_le_bytes);
            check_finite(name, values.iter().map(|value| value.to_f32()))?;
            return Ok(Stored::Bf16(values));
        }
        let values = to_f32(&bytes, &dtype).ok_or_else(|| wrong_type(name, &dtype))?;
        check_finite(name, values.iter().copied())?;
        Ok(Stored::F32(values))
    }

    /// A tensor's bytes and the name of its type.
    fn bytes(&mut self, name: &str) -> Result<(Bytes, String), WeightsError> {
        let shard = match self.tensors.get(name) {
            Some((shard, _)) => &mut self.shards[*shard],
            None => {
                return Err(WeightsError::MissingTensor {
                    name: name.into(),
                    expected: vec![],
                });
            }
        };
        if shard.read >= MAPPED_BYTES {
            shard.store = Shard::map(&shard.file);
            shard.read = 0;
        }
        let read = match shard.store.get_tensor(name) {
            Ok(Some(tensor)) => match tensor.to_bytes() {
                Ok(bytes) => Ok((bytes, format!("{:?}", tensor.dtype))),
                Err(error) => Err(error.to_string()),
            },
            Ok(None) => Err(format!("{name} is gone")),
            Err(error) => Err(error.to_string()),
        };
        match read {
            Ok((bytes, dtype)) => {
                shard.read += bytes.len();
                Ok((bytes, dtype))
            }
            Err(reason) => Err(shard.unreadable(reason)),
        }
    }
}

impl Gguf {
    fn kind(&self, name: &str) -> Option<TensorKind> {
        let theirs = gguf::llama_cpp_name(name)?;
        self.file.header.kind(&theirs).ok()
    }

    /// llama.cpp's name of a tensor, and the order of its rows.
    fn place(&self, name: &str, shape: &[usize]) -> Result<(String, Option<Rows>), WeightsError> {
        let theirs = gguf::llama_cpp_name(name).unwrap_or_else(|| name.into());
        let rows = gguf::rows_of(name, &self.config);
        let head_dim = self.config.head_dim;
        match shape.first() {
            Some(count) if rows.is_some() && !count.is_multiple_of(head_dim) => {
                let error = GgufError::Tensor {
                    file: self.file.header.path.clone(),
                    name: theirs,
                    reason: format!(
                        "has {count} rows, which is not a multiple of the head's {head_dim}"
                    ),
                };
                Err(error.into())
            }
            _ => Ok((theirs, rows)),
        }
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
        let (theirs, rows) = self.place(name, shape)?;
        let values = self.file.floats(&theirs)?;
        let columns = match shape {
            [_, columns] => *columns,
            _ => 1,
        };
        Ok(match rows {
            Some(rows) => rows.to_hugging_face(&values, columns),
            None => values,
        })
    }
}

/// Values in the type of their file.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // The types' names.
pub enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Stored {
    /// The values of `[rows, width]` in shards of at most `at_once` rows, in their type.
    pub fn into_pieces(self, width: usize, at_once: usize) -> Vec<TensorData> {
        fn cut<T: Element>(values: Vec<T>, width: usize, at_once: usize) -> Vec<TensorData> {
            if values.len() <= at_once * width {
                let rows = values.len() / width;
                return vec![TensorData::new(values, [rows, width])];
            }
            let pieces = values.chunks(at_once * width);
            pieces
                .map(|piece| TensorData::new(piece.to_vec(), [piece.len() / width, width]))
                .collect()
        }
        match self {
            Self::F32(values) => cut(values, width, at_once),
            Self::F16(values) => cut(values, width, at_once),
            Self::Bf16(values) => cut(values, width, at_once),
        }
    }
}

fn wrong_type(name: &str, dtype: &str) -> WeightsError {
    WeightsError::WrongType {
        name: name.into(),
        got: dtype.into(),
    }
}

fn check_finite(name: &str, values: impl Iterator<Item = f32>) -> Result<(), WeightsError> {
    match first_not_finite(values) {
        Some((index, value)) => Err(WeightsError::NotFinite {
            name: name.into(),
            index,
            value,
        }),
        None => Ok(()),
    }
}

/// Compared by name, because burn-pack has a separate type enum.
fn is(dtype: &str, expected: DType) -> bool {
    dtype.eq_ignore_ascii_case(&format!("{expected:?}"))
}

/// The weight files of a model folder: `model.safetensors`, else the files that its index names.
///
/// # Errors
///
/// If the folder has no weights or pickle files only, or a file that the index names is missing.
pub fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    match (single.is_file(), index.is_file()) {
        (true, _) => Ok(vec![single]),
        (false, true) => shard_files(folder, &index),
        (false, false) => Err(match pickle_file(folder) {
            Some(file) => WeightsError::Pickle {
                folder: folder.to_path_buf(),
                file,
            },
            None => WeightsError::NoWeights {
                folder: folder.to_path_buf(),
            },
        }),
    }
}

/// The name of a file with weights in PyTorch's pickle format.
fn pickle_file(folder: &Path) -> Option<String> {
    let entries = std::fs::read_dir(folder).ok()?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_pickle = |name: &String| {
        (name.starts_with("pytorch_model") && name.ends_with(".bin"))
            || [".pth", ".pt"].iter().any(|end| name.ends_with(end))
    };
    names.filter(is_pickle).min()
}

/// The files that the index names, each once. A name that leads out of the folder is rejected.
fn shard_files(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let wrong = |reason: String| WeightsError::Index {
        file: index.to_path_buf(),
        reason,
    };
    let text =
        limited::read_to_string(index, LARGEST_TABLE).map_err(|error| wrong(error.to_string()))?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| wrong(format!("not JSON: {error}")))?;
    let map = value.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| wrong("it has no \"weight_map\"".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        match file.as_str() {
            Some(name) if Path::new(name).file_name() == Some(name.as_ref()) => names.insert(name),
            _ => {
                return Err(wrong(format!(
                    "{} is in {}, which is not a file name",
                    clipped(tensor, 200),
                    clipped(&file.to_string(), 200)
                )));
            }
        };
    }
    let files: Vec<PathBuf> = names.into_iter().map(|name| folder.join(name)).collect();
    match files.iter().find(|file| !file.is_file()) {
        Some(missing) => Err(wrong(format!(
            "it names {}, which is missing",
            clipped(&missing.display().to_string(), 400)
        ))),
        None => Ok(files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_pickle_files_only_is_distinguished_from_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let error = || weight_files(folder.path()).unwrap_err();
        assert!(matches!(error(), WeightsError::NoWeights { .. }));
        let file = "pytorch_model-00001-of-00002.bin";
        std::fs::write(folder.path().join(file), "").unwrap();
        let message = error().to_string();
        assert!(
            message.contains(file) && message.contains("save_pretrained"),
            "{message}"
        );
    }
}
