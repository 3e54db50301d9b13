//! Copies a model's tensors into new files and changes some of them.

use safetensors::Dtype;
use std::path::Path;

use super::MergeError;
use super::tensors::ModelTensors;
use super::write::{Planned, ShardFile, Shards, to_bytes};

/// Elements that are copied at a time: 4 MiB of f32.
const AT_ONCE: usize = 1 << 20;

/// The number of rows of `columns` elements that are copied at a time.
pub(super) fn rows_at_once(columns: usize) -> usize {
    (AT_ONCE / columns.max(1)).max(1)
}

/// A change of some tensors.
pub(super) trait Change {
    /// Whether this tensor changes.
    fn is_changed(&self, name: &str) -> bool;
    /// Returns a changed tensor's new values.
    fn changed(&mut self, name: &str, values: Vec<f32>) -> Result<Vec<f32>, MergeError>;
    /// Called with the bytes of a changed tensor that were read.
    fn read(&mut self, name: &str, bytes: &[u8], dtype: Dtype);
    /// Called with the bytes of a changed tensor that were written.
    fn wrote(&mut self, name: &str, bytes: &[u8], dtype: Dtype);
}

/// Writes the planned files into `folder`. A tensor that keeps its values and its type is copied byte for byte.
/// A changed tensor is in memory as a whole, in f32; the others a few rows at a time.
pub(super) fn rewrite(
    source: &mut ModelTensors,
    shards: &Shards,
    folder: &Path,
    change: &mut dyn Change,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), MergeError> {
    let total = shards
        .files()
        .iter()
        .map(|(_, tensors)| tensors.len())
        .sum();
    let mut done = 0;
    for (file, tensors) in shards.files() {
        let mut output = ShardFile::create(&folder.join(file), tensors)?;
        for tensor in tensors {
            if change.is_changed(&tensor.name) {
                write_changed(source, tensor, change, &mut output)?
            } else {
                copy(source, tensor, &mut output)?
            }
            done += 1;
            progress(done, total);
        }
        output.finish()?;
    }
    Ok(())
}

fn copy(
    source: &mut ModelTensors,
    tensor: &Planned,
    output: &mut ShardFile,
) -> Result<(), MergeError> {
    let place = source.planned(tensor);
    let mut at = 0;
    source.for_each_run(&tensor.source, |bytes, values| {
        if tensor.dtype == place.dtype {
            return output.write(bytes);
        }
        let values = values();
        let bytes = to_bytes(&values, tensor.dtype);
        let bytes = bytes.map_err(|(index, value)| out_of_range(tensor, at + index, value))?;
        at += values.len();
        output.write(&bytes)
    })
}

fn write_changed(
    source: &mut ModelTensors,
    tensor: &Planned,
    change: &mut dyn Change,
    output: &mut ShardFile,
) -> Result<(), MergeError> {
    let place = source.planned(tensor);
    let mut all = Vec::with_capacity(place.rows * place.columns);
    source.for_each_run(&tensor.source, |bytes, values| {
        change.read(&tensor.name, bytes, place.dtype);
        all.extend(values());
        Ok(())
    })?;
    let all = change.changed(&tensor.name, all)?;
    for (run, values) in all.chunks(AT_ONCE).enumerate() {
        let bytes = to_bytes(values, tensor.dtype)
            .map_err(|(index, value)| out_of_range(tensor, run * AT_ONCE + index, value))?;
        output.write(&bytes)?;
        change.wrote(&tensor.name, &bytes, tensor.dtype);
    }
    Ok(())
}

fn out_of_range(tensor: &Planned, index: usize, value: f32) -> MergeError {
    let widest = value.is_finite() && value.abs() > f32::from(half::bf16::MAX);
    MergeError::OutOfRange {
        name: tensor.name.clone(),
        index,
        value,
        dtype: format!("{:?}", tensor.dtype),
        remedy: if widest { "f32" } else { "bf16 or f32" },
    }
}
