//! Why the command `generate` fails.

use std::path::PathBuf;

use data::{DataError, PromptFileError};
use durable::WriteError;

use super::GenerateError;
use crate::model::InferenceError;

/// Why the command fails.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the argument that is wrong, or the error of the part that failed.
pub enum GenerateCommandError {
    #[error("--temperature is {0}; expected 0 or more")]
    Temperature(f64),
    #[error("--top-p is {0}; expected a probability from 0 to 1")]
    TopP(f64),
    #[error("--repetition-penalty is {0}; expected more than 0, usually from 1 to 1.3")]
    RepetitionPenalty(f64),
    #[error("--batch-size is 0; expected at least 1")]
    BatchSize,
    #[error("--stop is empty: every text would end at once")]
    EmptyStop,
    #[error(
        "{0}; leave --merge out (the adapter is then computed beside the weights), merge with --quant-bits 16, or use \
         --force"
    )]
    LostInMerge(String),
    #[error("{}, line {line}: the prompt is empty", source_file.display())]
    EmptyPrompt { source_file: PathBuf, line: usize },
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}, line {line}: not valid JSON: {source}", path.display())]
    NotJson {
        path: PathBuf,
        line: usize,
        source: serde_json::Error,
    },
    #[error(
        "{}, line {line}: expected an object with the key \"prompt\" or \"context\" and a string as its value",
        path.display()
    )]
    NoPromptKey { path: PathBuf, line: usize },
    #[error("{} holds no prompt", .0.display())]
    NoPrompts(PathBuf),
    #[error("cannot read standard input: {0}")]
    Input(std::io::Error),
    #[error("an answer cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error(transparent)]
    Inference(Box<InferenceError>),
    #[error(transparent)]
    Output(#[from] WriteError),
    #[error(transparent)]
    PromptFile(#[from] PromptFileError),
}

impl From<InferenceError> for GenerateCommandError {
    fn from(error: InferenceError) -> Self {
        Self::Inference(Box::new(error))
    }
}
