//! Reads a model folder's tensors a few rows at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::MergeError;
use super::rewrite::rows_at_once;
use super::write::Planned;
use peft::read_floats;

/// Largest header of a safetensors file, in bytes: the format's own limit.
const LONGEST_HEADER: u64 = 100_000_000;

/// The open weight files of a model folder.
pub(super) struct ModelTensors {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor is, its type and its shape.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    file: usize,
    start: u64,
    /// The type of its elements: F32, F16 or BF16.
    pub(super) dtype: Dtype,
    /// Rows; 1 for a vector.
    pub(super) rows: usize,
    /// Elements of a row.
    pub(super) columns: usize,
}

impl Place {
    /// Size of a row in bytes.
    fn row_bytes(&self) -> usize {
        self.columns * self.dtype.bitsize() / 8
    }
}

impl ModelTensors {
    /// Opens the weight files of a folder and reads their headers.
    ///
    /// # Errors
    ///
    /// If there are none, if one cannot be read or is cut off, or if a tensor is not a vector or matrix of floats.
    pub(super) fn open(folder: &Path) -> Result<Self, MergeError> {
        let mut model = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for path in llama_burn::weight_files(folder)? {
            let unreadable = |reason: String| MergeError::Unreadable {
                file: path.clone(),
                reason,
            };
            let mut file = File::open(&path).map_err(|error| unreadable(error.to_string()))?;
            let (metadata, start) = header(&mut file).map_err(unreadable)?;
            for (name, info) in metadata.tensors() {
                let (rows, columns) = match info.shape[..] {
                    [columns] => (1, columns),
                    [rows, columns] => (rows, columns),
                    _ => return Err(unreadable(format!("{name} is not a vector or a matrix"))),
                };
                if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                    return Err(MergeError::NotFloat {
                        name,
                        got: format!("{:?}", info.dtype),
                    });
                }
                let place = Place {
                    file: model.files.len(),
                    start: start + info.data_offsets.0 as u64,
                    dtype: info.dtype,
                    rows,
                    columns,
                };
                model.tensors.insert(name, place);
            }
            model.files.push((path, file));
        }
        Ok(model)
    }

    /// The place of a tensor, if the folder has it.
    pub(super) fn place(&self, name: &str) -> Option<&Place> {
        self.tensors.get(name)
    }

    /// The place of a planned tensor's source.
    ///
    /// # Panics
    ///
    /// If the folder has no such tensor.
    pub(super) fn planned(&self, tensor: &Planned) -> Place {
        let place = self.tensors.get(&tensor.source).cloned();
        place.expect("only tensors that the source has are planned")
    }

    /// Calls `work(bytes, numbers)` for a few rows of a tensor at a time. `numbers()` returns their values.
    pub(super) fn for_each_run(
        &mut self,
        name: &str,
        mut work: impl FnMut(&[u8], &dyn Fn() -> Vec<f32>) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        let place = self.tensors[name].clone();
        let at_once = rows_at_once(place.columns);
        for start in (0..place.rows).step_by(at_once) {
            let bytes = self.bytes(name, start..(start + at_once).min(place.rows))?;
            work(&bytes, &|| to_floats(&bytes, place.dtype))?;
        }
        Ok(())
    }

    /// All values of a tensor.
    pub(super) fn values(&mut self, name: &str) -> Result<Vec<f32>, MergeError> {
        let place = &self.tensors[name];
        let mut all = Vec::with_capacity(place.rows * place.columns);
        self.for_each_run(name, |_, values| {
            all.extend(values());
            Ok(())
        })?;
        Ok(all)
    }

    /// The bytes of some rows.
    fn bytes(&mut self, name: &str, rows: Range<usize>) -> Result<Vec<u8>, MergeError> {
        let place = &self.tensors[name];
        let width = place.row_bytes();
        let start = place.start + (rows.start * width) as u64;
        let (path, file) = &mut self.files[place.file];
        let mut bytes = vec![0; rows.len() * width];
        let read = file
            .seek(SeekFrom::Start(start))
            .and_then(|_| file.read_exact(&mut bytes));
        match read {
            Ok(()) => Ok(bytes),
            Err(error) => Err(MergeError::Unreadable {
                file: path.clone(),
                reason: format!("{name}: {error}"),
            }),
        }
    }
}

/// Bytes of a file as f32. The type is one that [`ModelTensors::open`] accepts.
pub(super) fn to_floats(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    read_floats(dtype, bytes).unwrap_or_default()
}

/// A file's header, checked against the file's length, and the offset of its data.
///
/// `SafeTensors::read_metadata` needs the whole file in memory, or mapped into it. [`Metadata`] checks the
/// header itself while it is deserialized.
fn header(file: &mut File) -> Result<(Metadata, u64), String> {
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    let mut size = [0u8; 8];
    file.read_exact(&mut size)
        .map_err(|_| "it is not a safetensors file".to_string())?;
    let size = u64::from_le_bytes(size);
    if size > LONGEST_HEADER || size + 8 > length {
        return Err("it is not a safetensors file, or is cut off in its header".into());
    }
    let mut text = vec![0; size as usize];
    file.read_exact(&mut text)
        .map_err(|error| error.to_string())?;
    let metadata: Metadata =
        serde_json::from_slice(&text).map_err(|error| format!("its header is damaged: {error}"))?;
    let expected = 8 + size + metadata.data_len() as u64;
    if length == expected {
        Ok((metadata, 8 + size))
    } else {
        Err(format!(
            "it has {length} bytes, its header calls for {expected}; it may be cut off, download it again"
        ))
    }
}
