//! A model's tensors from its files into new ones, some of them changed on the way.

use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;

use super::MergeError;
use super::tensors::{ModelTensors, to_floats};
use super::write::{ShardFile, Shards, to_bytes};

/// Elements that are in memory at a time: 4 MiB of f32.
const AT_ONCE: usize = 1 << 20;

/// Rows of so many columns that are computed at a time.
pub(super) fn rows_at_once(columns: usize) -> usize {
    (AT_ONCE / columns.max(1)).max(1)
}

/// What happens to tensors between files.
pub(super) trait Change {
    /// Whether this tensor's numbers change.
    fn is_changed(&self, name: &str) -> bool;
    /// Changes rows of a tensor.
    fn change(&mut self, name: &str, rows: Range<usize>, values: &mut [f32]);
    /// The bytes of a changed tensor's rows as they were read and as they were written, with their types.
    fn wrote(&mut self, name: &str, before: (&[u8], Dtype), after: (&[u8], Dtype));
}

/// Writes the planned files into `folder`. What neither changes nor gets another type is copied byte for byte.
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
            let name = &tensor.name;
            let place = source.place(name).cloned();
            let place = place.expect("only tensors that the source has are planned");
            let is_changed = change.is_changed(name);
            let at_once = rows_at_once(place.columns);
            for start in (0..place.rows).step_by(at_once) {
                let rows = start..(start + at_once).min(place.rows);
                let before = source.bytes(name, rows.clone())?;
                if !is_changed && tensor.dtype == place.dtype {
                    output.write(&before)?;
                    continue;
                }
                let mut values = to_floats(&before, place.dtype);
                if is_changed {
                    change.change(name, rows, &mut values);
                }
                let after = to_bytes(&values, tensor.dtype).map_err(|(index, value)| {
                    let widest = value.is_finite() && value.abs() > f32::from(half::bf16::MAX);
                    MergeError::NoRoom {
                        name: name.clone(),
                        index: start * place.columns + index,
                        value,
                        dtype: format!("{:?}", tensor.dtype),
                        remedy: if widest { "f32" } else { "bf16 or f32" },
                    }
                })?;
                output.write(&after)?;
                if is_changed {
                    change.wrote(name, (&before, place.dtype), (&after, tensor.dtype));
                }
            }
            done += 1;
            progress(done, total);
        }
        output.finish()?;
    }
    Ok(())
}
