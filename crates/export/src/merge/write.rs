//! Writes weight files tensor by tensor. Headers come first, because all shapes are known.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::json;

use super::MergeError;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    pub(super) name: String,
    /// The name of the source's tensor that its values come from.
    pub(super) source: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Planned {
    pub(super) fn bytes(&self) -> u64 {
        let elements: usize = self.shape.iter().product();
        elements as u64 * (self.dtype.bitsize() / 8) as u64
    }
}

/// The files to write, with their tensors in order.
#[derive(Debug, PartialEq)]
pub(super) struct Shards {
    /// File name and tensors.
    files: Vec<(String, Vec<Planned>)>,
}

impl Shards {
    /// Fills files up to `largest` bytes of data each. A larger tensor gets a file of its own.
    pub(super) fn plan(tensors: Vec<Planned>, largest: u64) -> Self {
        let mut groups: Vec<Vec<Planned>> = Vec::new();
        let mut filled = u64::MAX;
        for tensor in tensors {
            let bytes = tensor.bytes();
            if filled.saturating_add(bytes) > largest || groups.is_empty() {
                groups.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            if let Some(group) = groups.last_mut() {
                group.push(tensor);
            }
        }
        let count = groups.len();
        let name = |index: usize| match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let files = groups.into_iter().enumerate();
        Self {
            files: files.map(|(index, group)| (name(index), group)).collect(),
        }
    }

    /// File names with their tensors.
    pub(super) fn files(&self) -> &[(String, Vec<Planned>)] {
        &self.files
    }

    /// Size of all tensors in bytes.
    pub(super) fn bytes(&self) -> u64 {
        let tensors = self.files.iter().flat_map(|(_, tensors)| tensors);
        tensors.map(Planned::bytes).sum()
    }

    /// The content of `model.safetensors.index.json`, if there are several files.
    pub(super) fn index(&self) -> Option<serde_json::Value> {
        if self.files.len() == 1 {
            return None;
        }
        let files = self.files.iter();
        let places = files.flat_map(|(file, tensors)| {
            let names = tensors.iter().map(|tensor| tensor.name.clone());
            names.map(move |name| (name, json!(file)))
        });
        let mut places: Vec<_> = places.collect();
        places.sort_by(|a, b| a.0.cmp(&b.0));
        let weight_map: serde_json::Map<_, _> = places.into_iter().collect();
        Some(json!({"metadata": {"total_size": self.bytes()}, "weight_map": weight_map}))
    }
}

/// A weight file that is being written.
pub(super) struct ShardFile {
    path: PathBuf,
    file: BufWriter<File>,
    /// Bytes of data that are still to be written.
    left: u64,
}

impl ShardFile {
    /// Creates the file and writes its header.
    pub(super) fn create(path: &Path, tensors: &[Planned]) -> Result<Self, MergeError> {
        let failed = |source| MergeError::Write {
            path: path.into(),
            source,
        };
        let infos = tensors.iter().map(|tensor| {
            let bytes = tensor.bytes() as usize;
            (
                tensor.name.clone(),
                tensor.dtype,
                tensor.shape.clone(),
                bytes,
            )
        });
        let format = HashMap::from([("format".to_string(), "pt".to_string())]);
        let header = durable::tensors_header(infos, format).map_err(failed)?;
        let file = File::create(path).map_err(failed)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header).map_err(failed)?;
        Ok(Self {
            path: path.into(),
            file,
            left: tensors.iter().map(Planned::bytes).sum(),
        })
    }

    /// Writes the next bytes of data.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), MergeError> {
        self.left = self
            .left
            .checked_sub(bytes.len() as u64)
            .expect("no more is written than the header promises");
        self.file
            .write_all(bytes)
            .map_err(|source| MergeError::Write {
                path: self.path.clone(),
                source,
            })
    }

    /// Waits until the file is on the disk: only then it is certain that the disk was large enough.
    pub(super) fn finish(mut self) -> Result<(), MergeError> {
        assert_eq!(self.left, 0, "every tensor of the header is written");
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all())
            .map_err(|source| MergeError::Write {
                path: self.path,
                source,
            })
    }
}

/// The bytes of `values` in a type, rounded to nearest, ties to even.
///
/// # Errors
///
/// The first value that is NaN or outside the range of the type, with its index.
pub(super) fn to_bytes(values: &[f32], dtype: Dtype) -> Result<Vec<u8>, (usize, f32)> {
    let bytes: Vec<u8> = match dtype {
        Dtype::F16 => {
            let halves = values.iter().map(|value| f16::from_f32(*value));
            halves.flat_map(f16::to_le_bytes).collect()
        }
        Dtype::BF16 => {
            let halves = values.iter().map(|value| bf16::from_f32(*value));
            halves.flat_map(bf16::to_le_bytes).collect()
        }
        _ => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    };
    let infinite = |value: &f32| match dtype {
        Dtype::F16 => !f16::from_f32(*value).is_finite(),
        Dtype::BF16 => !bf16::from_f32(*value).is_finite(),
        _ => !value.is_finite(),
    };
    match values.iter().position(infinite) {
        None => Ok(bytes),
        Some(index) => Err((index, values[index])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, elements: usize) -> Planned {
        Planned {
            name: name.into(),
            source: name.into(),
            dtype: Dtype::F16,
            shape: vec![elements],
        }
    }

    #[test]
    fn files_are_filled_in_order_and_a_large_tensor_has_one_of_its_own() {
        let tensors = vec![
            tensor("a", 3),
            tensor("b", 2),
            tensor("c", 20),
            tensor("d", 1),
        ];
        let shards = Shards::plan(tensors.clone(), 10);
        let names: Vec<_> = shards.files().iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names[0], "model-00001-of-00003.safetensors");
        let sizes: Vec<_> = shards.files().iter().map(|(_, t)| t.len()).collect();
        assert_eq!(sizes, [2, 1, 1]);
        let index = shards.index().unwrap();
        assert_eq!(index["metadata"]["total_size"], 52);
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00003.safetensors");
        let one = Shards::plan(tensors, 1000);
        assert_eq!(one.files()[0].0, "model.safetensors");
        assert_eq!(one.index(), None);
    }

    #[test]
    fn a_file_reads_back_in_the_safetensors_crate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensors = [tensor("x", 3), tensor("y.weight", 2)];
        let mut file = ShardFile::create(&path, &tensors).unwrap();
        let values = [1.0, -0.5, 65504.0, 3e-8, 0.1];
        file.write(&to_bytes(&values, Dtype::F16).unwrap()).unwrap();
        file.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let x = read.tensor("x").unwrap();
        let x = super::super::tensors::to_floats(x.data(), x.dtype());
        assert_eq!(x, [1.0, -0.5, 65504.0]);
        let y = read.tensor("y.weight").unwrap();
        // 3e-8 is half of the smallest f16 and a little: it becomes that.
        let y = super::super::tensors::to_floats(y.data(), y.dtype());
        assert_eq!(y, [5.9604645e-8, 0.099975586]);
    }

    #[test]
    fn a_number_that_a_type_has_no_room_for_is_an_error_with_its_place() {
        assert_eq!(to_bytes(&[0.0, 7e4], Dtype::F16), Err((1, 7e4)));
        assert!(to_bytes(&[7e4], Dtype::BF16).is_ok());
        let (index, value) = to_bytes(&[f32::NAN], Dtype::F32).unwrap_err();
        assert!(index == 0 && value.is_nan());
    }
}
