//! Merges an adapter into a model's weights, and takes it out again: from folder to folder, on the host.
//!
//! No model is loaded. Unchanged tensors are copied some rows at a time, changed ones one at a time. The memory
//! needed is that of the adapter, of the largest changed tensor in f32, and a few MiB. The new folder gets its
//! name when it is complete: a full disk or an interrupted run leaves nothing that looks like a model.

mod adapter;
mod command;
mod folder;
mod record;
mod rewrite;
mod survival;
mod tensors;
mod unmerge;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hub::HubError;
use llama_burn::limited::{self, LARGEST_SETTINGS};
use llama_burn::{ConfigError, EMBEDDING_WEIGHT, HEAD_WEIGHT, LlamaConfig, Weights, WeightsError};
use lora_core::Quantization;
use safetensors::Dtype;
use serde_json::{Map, Value};

use peft::{self, AdapterError};

pub use command::{MergeArgs, UnmergeArgs, run_merge, run_unmerge};
pub use survival::{Survival, SurvivalReport};
pub use unmerge::{UnmergeOptions, UnmergeReport, unmerge};

use adapter::Adapter;
use folder::NewFolder;
use record::{Changed, RECORD_FILE, Record, Sum};
use rewrite::{Change, rewrite};
use tensors::ModelTensors;
use write::{Planned, Shards};

/// Default of the largest size of a weight file, in bytes.
pub const LARGEST_SHARD: u64 = 5_000_000_000;

/// Why an adapter cannot be merged into a model or taken out of it.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A model or an adapter that cannot be found on the Hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The base model is the embedded one.
    #[error(
        "merge needs a Hugging Face folder, and the embedded model has none; `export-gguf --model embedded --adapter DIR` \
         writes it with the adapter as a GGUF file"
    )]
    EmbeddedBase,
    /// The model's folder does not exist.
    #[error("--model {}: there is no such folder", .0.display())]
    NoFolder(PathBuf),
    /// An unknown number of bits.
    #[error("--check-bits is {bits}; expected 8 or 4")]
    CheckBits {
        /// The number.
        bits: u8,
    },
    /// The model's `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model's weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The adapter cannot be read, or does not fit the model.
    #[error("the adapter in {}: {source}", folder.display())]
    Adapter {
        /// Its folder.
        folder: PathBuf,
        /// What is wrong.
        source: AdapterError,
    },
    /// A file cannot be read.
    #[error("{} cannot be read: {reason}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file or folder cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error, for example a full disk.
        source: std::io::Error,
    },
    /// The output folder exists and is not empty.
    #[error("{} already exists; choose another --output, or replace it with --overwrite", folder.display())]
    Exists {
        /// The folder.
        folder: PathBuf,
    },
    /// The output would replace the model or the adapter that it is made from.
    #[error("--output is {}, which is also read from; choose another folder", folder.display())]
    OutputIsInput {
        /// The folder.
        folder: PathBuf,
    },
    /// The base model has no tokenizer.
    #[error(
        "{} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt), so the merged model would have none; copy it there first, or merge only the weights with --without-tokenizer",
        folder.display()
    )]
    NoTokenizer {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A tensor whose elements are not floats.
    #[error(
        "the tensor {name} is of type {got}; only F32, F16 and BF16 can be merged into: use the model from before it was quantized"
    )]
    NotFloat {
        /// Its name.
        name: String,
        /// Its type.
        got: String,
    },
    /// The base model is a GGUF file.
    #[error(
        "{} is a GGUF file, and merge writes Hugging Face folders from such folders; `export-gguf --model FILE --adapter DIR` merges into a GGUF file",
        file.display()
    )]
    GgufBase {
        /// The file.
        file: PathBuf,
    },
    /// A number outside the range of the output's type.
    #[error(
        "{name} becomes {value} at element {index}, which is outside the range of {dtype}; choose --dtype {remedy}"
    )]
    OutOfRange {
        /// The tensor.
        name: String,
        /// Which element, counted row by row.
        index: usize,
        /// Its value.
        value: f32,
        /// The output's type.
        dtype: String,
        /// A type with a sufficient range.
        remedy: &'static str,
    },
    /// The adapter adds a bias to a module without one.
    #[error(
        "the adapter adds a bias to {module} (lora_bias), which has none in the model, so there is no tensor to merge it into; keep the adapter separate"
    )]
    NoBias {
        /// The module.
        module: String,
    },
    /// The base cannot be computed from the merged model.
    #[error("the adapter in {} cannot be unmerged: {reason}; use the base model itself{base}", folder.display())]
    NotInvertible {
        /// The adapter's folder.
        folder: PathBuf,
        /// Why.
        reason: &'static str,
        /// The base model's folder at the time of the merge, after a comma; or empty.
        base: String,
    },
    /// Too little of the adapter's update survives quantization.
    #[error(
        "{reason}; merge without --check-bits and use the result in 16 bits, keep the adapter separate, or use --force"
    )]
    LostToQuantization {
        /// What was measured, and what is expected.
        reason: String,
    },
    /// The merged folder was not made with this adapter, or has no record of it.
    #[error("{reason}; --force unmerges it anyway")]
    OtherAdapter {
        /// What differs.
        reason: String,
    },
}

/// What to merge.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// The base model, a Hugging Face folder.
    pub model: PathBuf,
    /// The adapter, in PEFT's format.
    pub adapter: PathBuf,
    /// The folder to write.
    pub output: PathBuf,
    /// The type of all tensors. `None` keeps the type of each.
    pub dtype: Option<Dtype>,
    /// Largest size of a weight file, in bytes.
    pub largest_shard: u64,
    /// Replace what is in the output folder.
    pub overwrite: bool,
    /// Merge even if the model has no tokenizer.
    pub without_tokenizer: bool,
}

/// What was merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeReport {
    /// Modules that the adapter changed.
    pub modules: usize,
    /// Tensors that the adapter replaced.
    pub replaced: usize,
    /// Weight files.
    pub files: usize,
    /// Their size in bytes, without headers.
    pub bytes: u64,
    /// The type that most bytes have.
    pub dtype: String,
}

/// Merges an adapter into a model and writes a complete Hugging Face folder. `progress` is called with the number
/// of tensors done and the number of all tensors.
///
/// The sum is computed in f32, as by PEFT on a model loaded in f32, and then rounded to the output's type.
///
/// # Errors
///
/// [`MergeError`] for a model, an adapter or an output folder that cannot be used. Nothing is written to `output` then.
pub fn merge(
    options: &MergeOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<MergeReport, MergeError> {
    let base = Base::read(&options.model)?;
    if !options.without_tokenizer && !folder::has_tokenizer(&options.model) {
        return Err(MergeError::NoTokenizer {
            folder: options.model.clone(),
        });
    }
    let adapter = Adapter::read(&options.adapter, &base.config)?;
    refuse_input_as_output(&options.output, &[&options.model, &options.adapter])?;
    let adapter_sha256 = record::file_sum(&options.adapter.join(peft::WEIGHTS_FILE))?;

    let mut source = ModelTensors::open(&options.model)?;
    let mut planned = base.planned(&source, |_, own| options.dtype.unwrap_or(own));
    let base_dtypes = planned.iter().filter_map(|tensor| {
        let place = source.place(&tensor.name)?;
        Some((tensor.name.clone(), format!("{:?}", place.dtype)))
    });
    let base_dtypes = base_dtypes.collect();
    let mut config = base.object;
    if adapter.unties() {
        // Before the merge, the output layer equals the embedding.
        let embedding = planned
            .iter()
            .find(|tensor| tensor.name == EMBEDDING_WEIGHT);
        let head = embedding.cloned().map(|tensor| Planned {
            name: HEAD_WEIGHT.into(),
            ..tensor
        });
        planned.extend(head);
        config.insert("tie_word_embeddings".into(), false.into());
    }
    let dtype = largest_dtype(&planned);
    let shards = Shards::plan(planned, options.largest_shard);
    let folder = NewFolder::create(&options.output, options.overwrite)?;
    let mut merging = Merging {
        adapter: &adapter,
        sums: BTreeMap::new(),
    };
    rewrite(&mut source, &shards, folder.path(), &mut merging, progress)?;

    let changed = merging.sums.into_iter().map(|(name, [before, after])| {
        let changed = Changed {
            base_sha256: before.finish(),
            merged_sha256: after.finish(),
        };
        (name, changed)
    });
    let record = Record {
        version: 1,
        base_model: options.model.display().to_string(),
        adapter: options.adapter.display().to_string(),
        adapter_sha256,
        base_dtypes,
        changed: changed.collect(),
    };
    let record = serde_json::to_value(&record).expect("a record is plain JSON");
    folder.write(RECORD_FILE, &format!("{record:#}\n"))?;
    finish(folder, config, dtype, &shards, &options.model)?;
    let [modules, replaced] = adapter.counts();
    Ok(MergeReport {
        modules,
        replaced,
        files: shards.files().len(),
        bytes: shards.bytes(),
        dtype: format!("{dtype:?}").to_lowercase(),
    })
}

/// Measures how much of an adapter's update would survive if the merged weights were quantized to `bits`. Nothing
/// is written.
///
/// # Errors
///
/// [`MergeError`] for a model or an adapter that cannot be used.
pub fn survival(
    model: &Path,
    adapter: &Path,
    bits: u8,
    quantization: Quantization,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<SurvivalReport, MergeError> {
    let base = Base::read(model)?;
    let adapter = Adapter::read(adapter, &base.config)?;
    let mut source = ModelTensors::open(model)?;
    // Only the linear modules of decoder layers are quantized.
    let linears = adapter.modules().filter(|m| m.starts_with("model.layers."));
    let linears: Vec<&String> = linears.collect();
    let mut modules = BTreeMap::new();
    for (done, module) in linears.iter().enumerate() {
        let name = format!("{module}.weight");
        let mut sums = Survival::default();
        if let Some(place) = source.place(&name) {
            let (d_out, d_in) = (place.rows, place.columns);
            // A weight whose width cannot be packed is not quantized: all of the update survives.
            if let Some(block) = quantization.block(d_out) {
                let mut base = source.values(&name)?;
                survival::round(&mut base, d_in, quantization, block);
                let merged = adapter.merged(&name, base.clone())?;
                sums = survival::of_merged(&base, merged, d_in, quantization, block);
            }
        }
        modules.insert(module.to_string(), sums);
        progress(done + 1, linears.len());
    }
    Ok(SurvivalReport { bits, modules })
}

/// A model folder's configuration.
struct Base {
    config: LlamaConfig,
    object: Map<String, Value>,
}

impl Base {
    /// Reads `config.json` and checks the weights' names and shapes against it.
    fn read(folder: &Path) -> Result<Self, MergeError> {
        if llama_burn::gguf::is_gguf(folder) {
            return Err(MergeError::GgufBase {
                file: folder.into(),
            });
        }
        if !folder.exists() {
            return Err(MergeError::NoFolder(folder.into()));
        }
        let config = LlamaConfig::from_file(folder)?;
        let path = folder.join("config.json");
        let unreadable = |reason: String| MergeError::Unreadable {
            file: path.clone(),
            reason,
        };
        let text = limited::read_to_string(&path, LARGEST_SETTINGS)
            .map_err(|error| unreadable(error.to_string()))?;
        let object: Map<String, Value> =
            serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        Weights::open(folder)?.check(&config.tensor_shapes())?;
        Ok(Self { config, object })
    }

    /// The tensors of the new model, in the model's order, without those that transformers does not read (the
    /// copy of a tied head, tables of rotary angles).
    fn planned(&self, source: &ModelTensors, dtype: impl Fn(&str, Dtype) -> Dtype) -> Vec<Planned> {
        let shapes = self.config.tensor_shapes().into_iter();
        let planned = shapes.filter_map(|(name, shape)| {
            let own = source.place(&name)?.dtype;
            let dtype = dtype(&name, own);
            Some(Planned {
                source: name.clone(),
                name,
                dtype,
                shape,
            })
        });
        planned.collect()
    }
}

fn refuse_input_as_output(output: &Path, sources: &[&Path]) -> Result<(), MergeError> {
    let Ok(output) = output.canonicalize() else {
        return Ok(());
    };
    let same = |source: &&&Path| source.canonicalize().is_ok_and(|source| source == output);
    if sources.iter().any(|source| same(&source)) {
        Err(MergeError::OutputIsInput { folder: output })
    } else {
        Ok(())
    }
}

/// The type that most bytes have.
fn largest_dtype(tensors: &[Planned]) -> Dtype {
    let mut bytes: BTreeMap<Dtype, u64> = BTreeMap::new();
    for tensor in tensors {
        *bytes.entry(tensor.dtype).or_default() += tensor.bytes();
    }
    let most = bytes.into_iter().max_by_key(|(_, bytes)| *bytes);
    most.map_or(Dtype::F32, |(dtype, _)| dtype)
}

/// Writes the files beside the weights. `config.json` comes last: without it the folder is not taken for a model.
fn finish(
    folder: NewFolder,
    mut config: Map<String, Value>,
    dtype: Dtype,
    shards: &Shards,
    base: &Path,
) -> Result<(), MergeError> {
    if let Some(index) = shards.index() {
        folder.write("model.safetensors.index.json", &format!("{index:#}\n"))?;
    }
    folder.copy_from(base)?;
    folder::set_dtype(&mut config, dtype);
    let config = Value::Object(config);
    folder.write("config.json", &format!("{config:#}\n"))?;
    folder.finish()
}

/// Merges the adapter, and hashes the tensors that it changes before and after.
struct Merging<'a> {
    adapter: &'a Adapter<'a>,
    sums: BTreeMap<String, [Sum; 2]>,
}

impl Change for Merging<'_> {
    fn is_changed(&self, name: &str) -> bool {
        self.adapter.changes(name)
    }

    fn changed(&mut self, name: &str, values: Vec<f32>) -> Result<Vec<f32>, MergeError> {
        self.adapter.merged(name, values)
    }

    fn read(&mut self, name: &str, bytes: &[u8], dtype: Dtype) {
        let [base, _] = self.sums.entry(name.into()).or_default();
        base.add_numbers(bytes, dtype.bitsize() / 8);
    }

    fn wrote(&mut self, name: &str, bytes: &[u8], _: Dtype) {
        let [_, merged] = self.sums.entry(name.into()).or_default();
        merged.add(bytes);
    }
}
