//! Tensors of a Hugging Face model folder: `model.safetensors`, or shards with their index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use burn_store::{ModuleStore, SafetensorsStore};
use half::{bf16, f16};

/// What is wrong with the weight files.
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
    /// The folder has weights in PyTorch's pickle format only, which can run any code when it is read.
    #[error(
        "{folder} has no safetensors weights, only {file}, a pickle file, which is never read here; load the model with transformers and save it again with save_pretrained, which writes safetensors"
    )]
    Pickle {
        /// The folder.
        folder: PathBuf,
        /// One of its pickle files.
        file: String,
    },
    /// A file cannot be read or is no safetensors file.
    #[error("{file} cannot be read: {reason}; it may be cut off, download it again")]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the reader says.
        reason: String,
    },
    /// The index is not what it should be.
    #[error("{file}: {reason}")]
    Index {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor that the model needs is absent.
    #[error("the weights lack the tensor {name} (expected shape {expected:?})")]
    MissingTensor {
        /// Its name.
        name: String,
        /// The shape that config.json calls for.
        expected: Vec<usize>,
    },
    /// A tensor that the model does not have.
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
    /// A tensor of a type that holds no weights.
    #[error("the tensor {name} is of type {got}; f32, f16 and bf16 are supported")]
    WrongType {
        /// Its name.
        name: String,
        /// Its type.
        got: String,
    },
    /// A weight that is not a number.
    #[error(
        "the tensor {name} holds {value} at element {index}; the file is damaged or the model diverged"
    )]
    NotFinite {
        /// Its name.
        name: String,
        /// The first such element.
        index: usize,
        /// Its value.
        value: f32,
    },
}

/// The open, memory-mapped weight files of a folder. Tensors are read one at a time, when asked for.
pub struct Weights {
    shards: Vec<(PathBuf, SafetensorsStore)>,
    /// Name → shard, shape.
    tensors: BTreeMap<String, (usize, Vec<usize>)>,
}

impl Weights {
    /// Opens the weights of a folder and reads their headers.
    ///
    /// # Errors
    ///
    /// If there are none, or a file is cut off or damaged.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        let files = weight_files(folder)?;
        let mut weights = Self {
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for file in files {
            // Whatever is in the name map, burn-store's defaults would rename numbered keys.
            let mut store = SafetensorsStore::from_file(&file).map_indices_contiguous(false);
            let unreadable = |reason: String| WeightsError::Unreadable {
                file: file.clone(),
                reason,
            };
            let tensors = store
                .get_all_tensors()
                .map_err(|e| unreadable(e.to_string()))?;
            for (name, tensor) in tensors {
                let place = (weights.shards.len(), tensor.shape.to_vec());
                weights.tensors.insert(name.clone(), place);
            }
            weights.shards.push((file, store));
        }
        Ok(weights)
    }

    /// Compares names and shapes with those that the model calls for.
    ///
    /// Tensors that some exporters add and nobody reads are let pass: `rotary_emb.inv_freq`, and the
    /// copy of a tied head.
    ///
    /// # Errors
    ///
    /// The first missing, ill-shaped or unexpected tensor.
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
        let tolerated =
            |name: &str| name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
        for (name, (_, shape)) in &self.tensors {
            if !known.contains(name.as_str()) && !tolerated(name) {
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
    /// If it is absent, cut off, of another type, or holds something that is not a number.
    pub fn read(&mut self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let shard = match self.tensors.get(name) {
            Some((shard, _)) => *shard,
            None => {
                return Err(WeightsError::MissingTensor {
                    name: name.into(),
                    expected: vec![],
                });
            }
        };
        let (file, store) = &mut self.shards[shard];
        let unreadable = |reason: String| WeightsError::Unreadable {
            file: file.clone(),
            reason,
        };
        let tensor = match store.get_tensor(name) {
            Ok(Some(tensor)) => tensor,
            Ok(None) => return Err(unreadable(format!("{name} is gone"))),
            Err(error) => return Err(unreadable(error.to_string())),
        };
        let dtype = tensor.dtype;
        let bytes = tensor
            .to_bytes()
            .map_err(|error| unreadable(error.to_string()))?;
        let values =
            to_f32(&bytes, &format!("{dtype:?}")).ok_or_else(|| WeightsError::WrongType {
                name: name.into(),
                got: format!("{dtype:?}"),
            })?;
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(WeightsError::NotFinite {
                name: name.into(),
                index,
                value: values[index],
            }),
            None => Ok(values),
        }
    }
}

fn to_f32(bytes: &[u8], dtype: &str) -> Option<Vec<f32>> {
    // Compared by name: burn-pack's type list is its own.
    let is = |wanted: DType| dtype.eq_ignore_ascii_case(&format!("{wanted:?}"));
    if is(DType::F32) {
        let values = bytes.as_chunks::<4>().0.iter();
        Some(values.map(|b| f32::from_le_bytes(*b)).collect())
    } else if is(DType::F16) {
        let values = bytes.as_chunks::<2>().0.iter();
        Some(values.map(|b| f16::from_le_bytes(*b).to_f32()).collect())
    } else if is(DType::BF16) {
        let values = bytes.as_chunks::<2>().0.iter();
        Some(values.map(|b| bf16::from_le_bytes(*b).to_f32()).collect())
    } else {
        None
    }
}

/// The weight files of a model folder: `model.safetensors`, else those that its index names.
///
/// # Errors
///
/// If there are none, or pickle files only, or one that the index names is not there.
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

/// The name of a file with weights in PyTorch's own format.
fn pickle_file(folder: &Path) -> Option<String> {
    let entries = std::fs::read_dir(folder).ok()?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_pickle = |name: &String| {
        (name.starts_with("pytorch_model") && name.ends_with(".bin"))
            || [".pth", ".pt"].iter().any(|end| name.ends_with(end))
    };
    names.filter(is_pickle).min()
}

/// The files that the index names, each once. A name that leads out of the folder is refused.
fn shard_files(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let wrong = |reason: String| WeightsError::Index {
        file: index.to_path_buf(),
        reason,
    };
    let text = std::fs::read_to_string(index).map_err(|error| wrong(error.to_string()))?;
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
                    "{tensor} is in {file}, which is no file name"
                )));
            }
        };
    }
    let files: Vec<PathBuf> = names.into_iter().map(|name| folder.join(name)).collect();
    match files.iter().find(|file| !file.is_file()) {
        Some(missing) => Err(wrong(format!(
            "it names {}, which is not there",
            missing.display()
        ))),
        None => Ok(files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pickle_only_folder_is_told_from_an_empty_one() {
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
