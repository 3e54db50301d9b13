//! `trainer tokenize`: the token ids of given texts, to compare with another tokenizer.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use data::{DataError, ModelFiles, PromptTemplate, RowTokenizer};
use durable::WriteError;
use hub::{self, HubError, Need};
use run_config::EMBEDDED;
use run_config::embedded::{self, EmbeddedError};

/// The command's arguments.
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// A Hugging Face model folder, a GGUF file, or `embedded`
    #[arg(long, value_name = "PATH", default_value = EMBEDDED)]
    model: String,
    /// A JSON file: a list of strings
    #[arg(long, value_name = "FILE")]
    texts: PathBuf,
    /// The JSON file to write: a list of token ids per string, with the tokenizer's special tokens
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Why the command fails.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum TokenizeError {
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot read {}: expected a JSON list of strings: {source}", path.display())]
    Texts {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("the token ids cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Output(#[from] WriteError),
}

/// Runs the command.
///
/// # Errors
///
/// An error of the model's tokenizer or the texts.
pub fn run(args: &TokenizeArgs) -> Result<(), TokenizeError> {
    let model = if args.model == EMBEDDED {
        embedded::materialise()?.model_dir
    } else {
        hub::model_folder(&args.model, Need::Model)?
    };
    let tokenizer = RowTokenizer::new(&ModelFiles::read(&model)?, &PromptTemplate::Raw)?;
    let bytes = fs::read(&args.texts).map_err(|source| TokenizeError::Read {
        path: args.texts.clone(),
        source,
    })?;
    let texts: Vec<String> =
        serde_json::from_slice(&bytes).map_err(|source| TokenizeError::Texts {
            path: args.texts.clone(),
            source,
        })?;
    let mut ids = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        ids.push(tokenizer.prompt(text, Path::new(&args.texts), index + 1)?);
    }
    durable::write_atomically(&args.output, serde_json::to_string(&ids)?.as_bytes())?;
    Ok(())
}
