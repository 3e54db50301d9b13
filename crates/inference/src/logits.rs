//! `trainer logits`: a model's logits for given tokens, to compare with another implementation.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use clap::Args;
use llama_burn::{PackedError, PackedTokens};

use crate::model::{Inference, InferenceError, ModelArgs};
use peft::Floats;
use terminal::Screen;

/// The command's arguments.
#[derive(Debug, Clone, Args)]
pub struct LogitsArgs {
    /// The model
    #[command(flatten)]
    pub model: ModelArgs,
    /// A PEFT adapter: a folder or a name on the Hub
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Merge the adapter into the weights instead of computing it separately
    #[arg(long, requires = "adapter")]
    pub merge: bool,
    /// A JSON file: a list of sequences, each a list of token ids
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// The safetensors file to write: one f32 tensor [tokens, vocabulary] per sequence, named row.N (N is the sequence's
    /// index from 0)
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Why the logits cannot be computed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum LogitsError {
    #[error(transparent)]
    Inference(Box<InferenceError>),
    #[error(transparent)]
    Output(#[from] durable::WriteError),
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: expected a list of lists of token ids: {reason}", path.display())]
    Tokens { path: PathBuf, reason: String },
    #[error("sequence {row}: {source}")]
    Row { row: usize, source: PackedError },
    #[error("sequence {row}: its logits cannot be read from the device: {reason}")]
    Unreadable { row: usize, reason: String },
}

impl From<InferenceError> for LogitsError {
    fn from(error: InferenceError) -> Self {
        Self::Inference(Box::new(error))
    }
}

/// Computes the logits of every sequence on its own, each token given those before it.
///
/// # Errors
///
/// An error of the model, the adapter, the sequences or the output.
pub fn run(args: &LogitsArgs, screen: &Screen) -> Result<(), LogitsError> {
    let text = std::fs::read_to_string(&args.tokens).map_err(|source| LogitsError::Read {
        path: args.tokens.clone(),
        source,
    })?;
    let wrong = |reason: String| LogitsError::Tokens {
        path: args.tokens.clone(),
        reason,
    };
    let rows: Vec<Vec<u32>> =
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if let Some(empty) = rows.iter().position(Vec::is_empty) {
        return Err(wrong(format!(
            "sequence {empty} is empty; give at least one token id"
        )));
    }
    let inference = Inference::load(&args.model, screen)?;
    let model = match &args.adapter {
        None => inference.base.clone(),
        Some(folder) => {
            let (_, adapted) = inference.with_adapter(folder)?;
            if args.merge {
                inference.merged(adapted)?
            } else {
                adapted
            }
        }
    };
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for (row, ids) in rows.iter().enumerate() {
        let packed = PackedTokens::from_sequences([&ids[..]]);
        packed
            .check(&inference.config)
            .map_err(|source| LogitsError::Row { row, source })?;
        let logits = model.logits(model.hidden_states(&packed));
        let shape = logits.dims().to_vec();
        let data = logits.into_data().convert::<f32>();
        let values: Vec<f32> = data.try_to_vec().map_err(|error| LogitsError::Unreadable {
            row,
            reason: format!("{error:?}"),
        })?;
        tensors.insert(format!("row.{row}"), (shape, values));
    }
    let views = tensors
        .iter()
        .map(|(name, (shape, values))| (name.clone(), Floats::new(values, shape.clone())));
    let views: Vec<(String, Floats)> = views.collect();
    let write = |path: &Path| durable::write_tensors(path, views, HashMap::new());
    Ok(durable::write_atomically_by(&args.output, write)?)
}
