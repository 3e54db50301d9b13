//! Takes an adapter out of a merged model.

use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::Dtype;

use super::adapter::Adapter;
use super::folder::NewFolder;
use super::record::{self, Record, Sum};
use super::rewrite::{Change, rewrite};
use super::tensors::ModelTensors;
use super::write::Shards;
use super::{Base, MergeError, finish, largest_dtype, refuse_input_as_output};

/// What to restore.
#[derive(Debug, Clone)]
pub struct UnmergeOptions {
    /// The merged model, a Hugging Face folder.
    pub model: PathBuf,
    /// The adapter that was merged into it.
    pub adapter: PathBuf,
    /// The folder to write.
    pub output: PathBuf,
    /// The type of all tensors. `None` restores the base's types, or keeps the merged ones without a record.
    pub dtype: Option<Dtype>,
    /// Largest size of a weight file, in bytes.
    pub largest_shard: u64,
    /// Replace what is in the output folder.
    pub overwrite: bool,
    /// Continue even if the folder does not record that this adapter was merged into it.
    pub force: bool,
}

/// How close the result is to the base.
#[derive(Debug, Clone, PartialEq)]
pub struct UnmergeReport {
    /// Tensors that the adapter was taken out of.
    pub changed: usize,
    /// How many of them equal the base's exactly. `None` if the merged folder has no record.
    pub exact: Option<usize>,
    /// Largest possible difference of the other elements from the base's: half a step of the merged type at the
    /// largest merged weight, half a step of the output's type, and half a step of f32 per term of both sums.
    pub rounding: f32,
    /// The type of the merged tensors.
    pub merged_dtype: String,
    /// The type that most of the written bytes have.
    pub dtype: String,
}

/// Takes an adapter out of a merged model and writes a complete Hugging Face folder. An adapter that scales outputs, or
/// one that replaces tensors, cannot be taken out.
///
/// The merged weight was rounded to its type, and that rounding stays. A model merged in f32 restores a 16-bit
/// base exactly, one merged in f16 or bf16 up to a step. The record that [`merge`](super::merge) leaves in the
/// folder shows which case it is.
///
/// # Errors
///
/// [`MergeError`] for a model, an adapter or an output folder that cannot be used. [`MergeError::OtherAdapter`] if
/// the record names another adapter, if a merged tensor was changed since, or if there is no record. `force` skips
/// these checks.
pub fn unmerge(
    options: &UnmergeOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<UnmergeReport, MergeError> {
    let merged = Base::read(&options.model)?;
    let adapter = Adapter::read(&options.adapter, &merged.config)?;
    refuse_input_as_output(&options.output, &[&options.model, &options.adapter])?;
    let record = Record::read(&options.model)?;
    if let Some(reason) = adapter.not_invertible() {
        let base = record.as_ref().map(|record| &record.base_model);
        return Err(MergeError::NotInvertible {
            folder: options.adapter.clone(),
            reason,
            base: base.map_or_else(String::new, |base| format!(", {base}")),
        });
    }
    if let (Some(reason), false) = (objection(options, &record)?, options.force) {
        return Err(MergeError::OtherAdapter { reason });
    }
    let mut source = ModelTensors::open(&options.model)?;
    let base_dtype = |name: &str| record.as_ref().and_then(|record| record.base_dtype(name));
    let planned = merged.planned(&source, |name, own| {
        options.dtype.or_else(|| base_dtype(name)).unwrap_or(own)
    });
    let dtype = largest_dtype(&planned);
    let changed = planned.iter().map(|tensor| &tensor.name);
    let changed: Vec<String> = changed
        .filter(|name| adapter.changes(name))
        .cloned()
        .collect();
    let merged_dtype = changed.iter().find_map(|name| source.place(name));
    let merged_dtype = merged_dtype.map_or(Dtype::F32, |place| place.dtype);
    let shards = Shards::plan(planned, options.largest_shard);
    let folder = NewFolder::create(&options.output, options.overwrite)?;
    let mut unmerging = Unmerging {
        adapter: &adapter,
        sums: BTreeMap::new(),
        largest: 0.0,
        largest_after: 0.0,
    };
    rewrite(
        &mut source,
        &shards,
        folder.path(),
        &mut unmerging,
        progress,
    )?;

    let (largest, largest_after) = (unmerging.largest, unmerging.largest_after);
    let mut exact = record.as_ref().map(|_| 0);
    for (name, [before, after]) in unmerging.sums {
        let Some(known) = record.as_ref().and_then(|r| r.changed.get(&name)) else {
            continue;
        };
        if before.finish() != known.merged_sha256 && !options.force {
            return Err(MergeError::OtherAdapter {
                reason: format!(
                    "{name} in {} is not what the merge wrote: it was trained or edited afterwards",
                    options.model.display()
                ),
            });
        }
        if after.finish() == known.base_sha256 {
            exact = exact.map(|exact| exact + 1);
        }
    }
    finish(folder, merged.object, dtype, &shards, &options.model)?;
    Ok(UnmergeReport {
        changed: changed.len(),
        exact,
        rounding: half_step(merged_dtype, largest)
            + half_step(dtype, largest_after)
            + 2.0 * adapter.terms() as f32 * half_step(Dtype::F32, largest.max(largest_after)),
        merged_dtype: format!("{merged_dtype:?}").to_lowercase(),
        dtype: format!("{dtype:?}").to_lowercase(),
    })
}

/// The reason to doubt that this adapter was merged, if there is one.
fn objection(
    options: &UnmergeOptions,
    record: &Option<Record>,
) -> Result<Option<String>, MergeError> {
    let folder = options.model.display();
    let Some(record) = record else {
        return Ok(Some(format!(
            "{folder} has no {}, so it is unknown what was merged into it",
            record::RECORD_FILE
        )));
    };
    let sum = record::file_sum(&options.adapter.join(peft::WEIGHTS_FILE))?;
    if sum != record.adapter_sha256 {
        return Ok(Some(format!(
            "{folder} was merged with {}, whose weights are not those in {}",
            record.adapter,
            options.adapter.display()
        )));
    }
    Ok(None)
}

/// Half the distance between neighboring numbers of a type at this magnitude.
fn half_step(dtype: Dtype, magnitude: f32) -> f32 {
    let bits = match dtype {
        Dtype::F16 => 11,
        Dtype::BF16 => 8,
        _ => 24,
    };
    // The largest power of two up to the magnitude, from its exponent bits.
    let power = f32::from_bits(magnitude.abs().to_bits() & 0x7f80_0000);
    power * 0.5f32.powi(bits)
}

struct Unmerging<'a> {
    adapter: &'a Adapter<'a>,
    sums: BTreeMap<String, [Sum; 2]>,
    /// The largest magnitude of a merged element, and of a restored one.
    largest: f32,
    largest_after: f32,
}

impl Change for Unmerging<'_> {
    fn is_changed(&self, name: &str) -> bool {
        self.adapter.changes(name)
    }

    fn changed(&mut self, name: &str, values: Vec<f32>) -> Result<Vec<f32>, MergeError> {
        let largest = |values: &[f32]| values.iter().fold(0f32, |peak, x| peak.max(x.abs()));
        self.largest = self.largest.max(largest(&values));
        let values = self.adapter.unmerged(name, values)?;
        self.largest_after = self.largest_after.max(largest(&values));
        Ok(values)
    }

    fn read(&mut self, name: &str, bytes: &[u8], _: Dtype) {
        let [merged, _] = self.sums.entry(name.into()).or_default();
        merged.add(bytes);
    }

    fn wrote(&mut self, name: &str, bytes: &[u8], dtype: Dtype) {
        let [_, base] = self.sums.entry(name.into()).or_default();
        base.add_numbers(bytes, dtype.bitsize() / 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_step_is_what_rounding_can_cost() {
        // Neighbors of 1.5 in f16 are 2⁻¹⁰ apart, in bf16 2⁻⁷, in f32 2⁻²³.
        assert_eq!(half_step(Dtype::F16, 1.5), 0.5f32.powi(11));
        assert_eq!(half_step(Dtype::BF16, -1.5), 0.5f32.powi(8));
        assert_eq!(half_step(Dtype::F32, 1.0), 0.5f32.powi(24));
        assert_eq!(half_step(Dtype::F16, 0.3), 0.5f32.powi(13));
        let values =
            super::super::tensors::to_floats(&half::f16::from_f32(0.3).to_le_bytes(), Dtype::F16);
        assert!((values[0] - 0.3).abs() <= half_step(Dtype::F16, 0.3));
    }
}
