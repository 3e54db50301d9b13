//! A model folder's tensors, read in runs of rows: no more of the model is in memory than one run.

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

/// What the header of a safetensors file may take; the format's own limit.
const LONGEST_HEADER: u64 = 100_000_000;

/// The open weight files of a model folder.
pub(super) struct ModelTensors {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor lies, and what it is.
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
    /// Bytes of a row.
    fn row_bytes(&self) -> usize {
        self.columns * self.dtype.bitsize() / 8
    }
}

impl ModelTensors {
    /// Opens the weight files of a folder and reads their headers.
    ///
    /// # Errors
    ///
    /// If there are none, one cannot be read or is cut off, or a tensor is no vector or matrix of floats.
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
                    _ => return Err(unreadable(format!("{name} is no vector or matrix"))),
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

    /// What the folder knows of a tensor.
    pub(super) fn place(&self, name: &str) -> Option<&Place> {
        self.tensors.get(name)
    }

    /// Where a planned tensor's numbers come from.
    ///
    /// # Panics
    ///
    /// If there is no such tensor; only what is there is planned.
    pub(super) fn planned(&self, tensor: &Planned) -> Place {
        let place = self.tensors.get(&tensor.source).cloned();
        place.expect("only tensors that the source has are planned")
    }

    /// Calls `work(bytes, numbers)` for a tensor's rows, some at a time; `numbers()` are those of the bytes.
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

    /// All of a tensor's numbers.
    pub(super) fn values(&mut self, name: &str) -> Result<Vec<f32>, MergeError> {
        let place = &self.tensors[name];
        let mut all = Vec::with_capacity(place.rows * place.columns);
        self.for_each_run(name, |_, values| {
            all.extend(values());
            Ok(())
        })?;
        Ok(all)
    }

    /// Some rows as the file holds them.
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

/// Bytes of a file as numbers. The type is one of those that [`ModelTensors::open`] lets pass.
pub(super) fn to_floats(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    read_floats(dtype, bytes).unwrap_or_default()
}

/// A file's header, checked against the file's length, and where the data begin.
fn header(file: &mut File) -> Result<(Metadata, u64), String> {
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    let mut size = [0u8; 8];
    file.read_exact(&mut size)
        .map_err(|_| "it is no safetensors file".to_string())?;
    let size = u64::from_le_bytes(size);
    if size > LONGEST_HEADER || size + 8 > length {
        return Err("it is no safetensors file, or cut off in its header".into());
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
