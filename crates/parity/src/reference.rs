//! A folder of numbers computed by transformers and PEFT.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::ParityError;
use data::{Batch, BatchRow, Prefixes};
use lora_core::Init;
use peft::{self, AdapterConfig, AdapterTensors};

const NUMBERS: &str = "reference.safetensors";
/// The label that transformers excludes from the loss.
const IGNORED: i64 = -100;

/// The contents of a reference folder, except its model and merged model, which are read tensor by
/// tensor.
pub(super) struct Reference {
    /// The model's folder.
    pub model: PathBuf,
    /// The merged model's folder, if it exists.
    pub merged: Option<PathBuf>,
    /// The sequences, packed, and their labels.
    pub batch: Batch,
    /// Logits of every token at every position of the batch, without the adapter.
    pub base_logits: Vec<f32>,
    /// The same with the adapter.
    pub logits: Vec<f32>,
    /// Size of the vocabulary.
    pub vocab: usize,
    pub loss: f64,
    /// Gradients of the mean loss by PEFT's tensor name, each as in the file: A `[r, d_in]`, B
    /// `[d_out, r]`.
    pub gradients: BTreeMap<String, Vec<f32>>,
    /// `None` if the reference's training has no counterpart here.
    pub train_losses: Option<Vec<f64>>,
    /// The ratio of learning rates if the reference was trained with LoRA+.
    pub loraplus_lr_ratio: Option<f64>,
    /// The initialization, if the adapter is a part of the base model's weights that these lack.
    pub init: Option<Init>,
    pub config: AdapterConfig,
    pub adapter: AdapterTensors,
    /// As saved for the base model: its rank may differ.
    pub trained_config: AdapterConfig,
    pub trained: AdapterTensors,
}

impl Reference {
    /// Reads `folder`; `model` is the model's folder if that is not in `folder`.
    pub fn read(folder: &Path, model: Option<&Path>) -> Result<Self, ParityError> {
        let path = folder.join(NUMBERS);
        let bytes = fs::read(&path).map_err(|source| ParityError::Read {
            path: path.clone(),
            source,
        })?;
        let inside = folder.join("model");
        let model = match model {
            Some(model) => model.to_path_buf(),
            None if inside.is_dir() => inside,
            None => {
                return Err(ParityError::NoModel {
                    folder: folder.into(),
                });
            }
        };
        let merged = Some(folder.join("merged")).filter(|merged| merged.is_dir());
        let numbers = Numbers::new(&path, &bytes)?;

        let ids = numbers.integers("input_ids")?;
        let labels = numbers.integers("labels")?;
        let rows = numbers.row_lengths(ids.shape)?;
        if labels.shape != ids.shape {
            return Err(numbers.wrong("labels", &ids.shape, &labels.shape));
        }
        let [count, length] = ids.shape;
        let base_logits = numbers.floats("base_logits")?;
        let vocab = base_logits.0.last().copied().unwrap_or(0);
        let logits = numbers.floats("logits")?;
        for (name, shape) in [("base_logits", &base_logits.0), ("logits", &logits.0)] {
            if shape[..] != [count, length, vocab] {
                return Err(numbers.wrong(name, &[count, length, vocab], shape));
            }
        }
        let at_positions = |logits: &[f32]| -> Vec<f32> {
            let by_row = logits.chunks_exact((length * vocab).max(1)).zip(&rows);
            by_row
                .flat_map(|(row, length)| row[..length * vocab].to_vec())
                .collect()
        };
        let gradients = numbers.file.names().into_iter().filter_map(|name| {
            let parameter = name.strip_prefix("grad.")?;
            let gradient = numbers.floats(name).map(|(_, values)| values);
            Some(gradient.map(|gradient| (parameter.to_string(), gradient)))
        });
        let (config, adapter) = peft::read_adapter(&folder.join("adapter"))?;
        let (trained_config, trained) = peft::read_adapter(&folder.join("trained"))?;
        let first = |values: Vec<f32>| values.first().map_or(f64::NAN, |value| *value as f64);
        let optional = |name: &str| {
            let has = numbers.file.names().contains(&name);
            has.then(|| numbers.floats(name)).transpose()
        };
        let losses = optional("train_losses")?.map(|(_, losses)| losses);
        let ratio = optional("loraplus_lr_ratio")?.map(|(_, ratio)| first(ratio));
        let losses = losses.map(|losses| losses.into_iter().map(f64::from).collect());
        Ok(Self {
            model,
            merged,
            batch: batch(&path, &ids, &labels, &rows)?,
            base_logits: at_positions(&base_logits.1),
            logits: at_positions(&logits.1),
            vocab,
            loss: first(numbers.floats("loss")?.1),
            gradients: gradients.collect::<Result<_, _>>()?,
            train_losses: losses,
            loraplus_lr_ratio: ratio,
            init: numbers.init(&bytes)?,
            config,
            adapter,
            trained_config,
            trained,
        })
    }
}

/// The sequences without their padding, and the tokens in the loss as transformers counts them:
/// label `i` of a sequence is predicted at position `i − 1`, so the first label of a sequence is
/// not in the loss.
fn batch(
    path: &Path,
    ids: &Integers,
    labels: &Integers,
    lengths: &[usize],
) -> Result<Batch, ParityError> {
    let width = ids.shape[1];
    let token = |id: i64| {
        u32::try_from(id).map_err(|_| ParityError::Tensor {
            path: path.into(),
            name: "input_ids or labels".into(),
            reason: format!("{id} is not a token id"),
        })
    };
    let mut rows = Vec::new();
    for (row, length) in lengths.iter().enumerate() {
        let row = row * width..row * width + length;
        let ids: Result<Vec<u32>, _> = ids.values[row.clone()]
            .iter()
            .map(|id| token(*id))
            .collect();
        let mut targets = Vec::new();
        for (before, label) in labels.values[row].iter().skip(1).enumerate() {
            if *label != IGNORED {
                targets.push((before, token(*label)?));
            }
        }
        rows.push((ids?, targets));
    }
    let rows: Vec<BatchRow> = rows
        .iter()
        .enumerate()
        .map(|(index, (ids, targets))| BatchRow {
            ids,
            targets: targets.clone(),
            line: index + 1,
        })
        .collect();
    // Their order is the reference's, whose logits are compared position by position.
    Ok(Batch::new(&rows, Prefixes::Apart))
}

struct Integers {
    shape: [usize; 2],
    values: Vec<i64>,
}

/// The tensors of `reference.safetensors`.
struct Numbers<'a> {
    path: &'a Path,
    file: SafeTensors<'a>,
}

impl<'a> Numbers<'a> {
    fn new(path: &'a Path, bytes: &'a [u8]) -> Result<Self, ParityError> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| ParityError::Safetensors {
            path: path.into(),
            reason: error.to_string(),
        })?;
        Ok(Self { path, file })
    }

    fn floats(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ParityError> {
        let view = self
            .file
            .tensor(name)
            .map_err(|error| self.bad(name, error))?;
        match peft::read_floats(view.dtype(), view.data()) {
            Some(values) => Ok((view.shape().to_vec(), values)),
            None => Err(self.bad(name, format!("its type is {:?}, not a float", view.dtype()))),
        }
    }

    /// The name of the initialization in the file's metadata.
    fn init(&self, bytes: &[u8]) -> Result<Option<Init>, ParityError> {
        const NAME: &str = "init_lora_weights";
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(|error| self.bad(NAME, error))?;
        let metadata = header.metadata().as_ref();
        let Some(name) = metadata.and_then(|metadata| metadata.get(NAME)) else {
            return Ok(None);
        };
        let init = Init::from_name(name);
        let init = init.ok_or_else(|| self.bad(NAME, format!("{name:?} is not known")))?;
        Ok(Some(init))
    }

    fn integers(&self, name: &str) -> Result<Integers, ParityError> {
        let view = self
            .file
            .tensor(name)
            .map_err(|error| self.bad(name, error))?;
        if view.dtype() != Dtype::I64 {
            return Err(self.bad(
                name,
                format!("its type is {:?}, expected I64", view.dtype()),
            ));
        }
        let &[rows, length] = view.shape() else {
            return Err(self.bad(name, format!("its shape is {:?}", view.shape())));
        };
        let words = view.data().chunks_exact(8);
        let values = words.map(|bytes| {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            i64::from_le_bytes(word)
        });
        Ok(Integers {
            shape: [rows, length],
            values: values.collect(),
        })
    }

    /// The number of tokens of each sequence that are not padding.
    fn row_lengths(&self, shape: [usize; 2]) -> Result<Vec<usize>, ParityError> {
        const NAME: &str = "attention_mask";
        let [rows, length] = shape;
        if !self.file.names().contains(&NAME) {
            return Ok(vec![length; rows]);
        }
        let mask = self.integers(NAME)?;
        if mask.shape != shape {
            return Err(self.wrong(NAME, &shape, &mask.shape));
        }
        let lengths = mask.values.chunks_exact(length.max(1)).map(|row| {
            let tokens = row.iter().take_while(|place| **place == 1).count();
            // With padding on the left transformers gives the tokens other positions than packing.
            if row[tokens..].iter().all(|place| *place == 0) && tokens > 0 {
                Ok(tokens)
            } else {
                Err(self.bad(NAME, "a row must be ones, then zeros"))
            }
        });
        lengths.collect()
    }

    fn wrong(&self, name: &str, expected: &[usize], got: &[usize]) -> ParityError {
        self.bad(name, format!("its shape is {got:?}, expected {expected:?}"))
    }

    fn bad(&self, name: &str, reason: impl ToString) -> ParityError {
        ParityError::Tensor {
            path: self.path.into(),
            name: name.into(),
            reason: reason.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_predicted_one_position_earlier_and_padding_is_left_out() {
        let integers = |values: &[i64]| Integers {
            shape: [2, 4],
            values: values.to_vec(),
        };
        let ids = integers(&[5, 6, 7, 8, 9, 10, 0, 0]);
        // The first label of the first sequence has no token before it.
        let labels = integers(&[5, IGNORED, 7, 8, IGNORED, 10, IGNORED, IGNORED]);
        let batch = batch(Path::new("x"), &ids, &labels, &[4, 2]).unwrap();
        assert_eq!(batch.tokens.ids, [5, 6, 7, 8, 9, 10]);
        let lengths = batch.tokens.segments.iter().map(|segment| segment.length);
        assert_eq!(lengths.collect::<Vec<_>>(), [4, 2]);
        assert_eq!(batch.target_positions, [1, 2, 4]);
        assert_eq!(batch.target_ids, [7, 8, 10]);
        let negative = integers(&[-1; 8]);
        assert!(super::batch(Path::new("x"), &negative, &labels, &[4, 2]).is_err());
    }
}
