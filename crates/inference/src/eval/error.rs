//! Why an evaluation fails.

use std::path::PathBuf;

use data::{DataError, PromptFileError};
use durable::WriteError;
use hub::HubError;
use peft::AdapterError;
use run_config::embedded::EmbeddedError;

use super::answering::AnsweringError;
use super::named::NameError;
use super::suite::{BertScoreError, FolderError};
use crate::model::InferenceError;

/// Why an evaluation fails.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the argument that is wrong, or the error of the part that failed.
pub enum EvalError {
    #[error("{0} is 0; expected at least 1")]
    Zero(&'static str),
    #[error(
        "--held-out is {0}; expected a fraction of the examples below 1, or a whole number of examples"
    )]
    HeldOut(f64),
    #[error("--labels holds an empty label; write them as in --labels negative,neutral,positive")]
    EmptyLabel,
    #[error(
        "--lists cannot be scored by likelihood: a list is not a label; leave out --scorer, or write finlora,strict"
    )]
    ListsHaveNoLikelihood,
    #[error("there is no adapter folder {}", .0.display())]
    NoAdapterFolder(PathBuf),
    #[error("{}: {reason}", folder.display())]
    TrainingTemplate { folder: PathBuf, reason: String },
    #[error(
        "the adapter in {} was trained with the prompt template {trained:?}, and {evaluated:?} is to be evaluated: the \
         scores would measure the template, not the adapter. Evaluate it by itself without --template, or add --force",
        folder.display()
    )]
    OtherTemplate {
        folder: PathBuf,
        trained: String,
        evaluated: String,
    },
    #[error(
        "{}: the adapter in {} was {difference}; use --force to evaluate it nevertheless",
        path.display(), folder.display()
    )]
    OtherPrompts {
        path: PathBuf,
        folder: PathBuf,
        difference: String,
    },
    #[error("--held-out {size} of {}: {source}", path.display())]
    Split {
        size: f64,
        path: PathBuf,
        source: Box<DataError>,
    },
    #[error(
        "{}: the likelihood scorer needs labels, and the targets are free text; name the labels with --labels, or use \
         another scorer",
        .0.display()
    )]
    NoLabels(PathBuf),
    #[error("the adapter {name}: {}: {source}", folder.display())]
    AdapterConfig {
        name: String,
        folder: PathBuf,
        source: Box<AdapterError>,
    },
    #[error(
        "the adapter {} was trained on {:?} and {} on {:?}: one table has one base model. Give it with --model, or \
         evaluate them separately",
        first.0, first.1, second.0, second.1
    )]
    TwoBaseModels {
        /// An adapter and its base model.
        first: (String, String),
        second: (String, String),
    },
    #[error(
        "{model:?} is the base model that the adapters name; if it is in another folder, give that with --model: {source}"
    )]
    NamedModel {
        model: String,
        source: Box<InferenceError>,
    },
    #[error("--adapter {name}: {source}")]
    Adapter {
        name: String,
        source: Box<InferenceError>,
    },
    #[error("no task is left to evaluate:\n{}", .0.join("\n"))]
    NoTask(Vec<String>),
    #[error(
        "the answers and all other scores are in {}; BERTScore was not computed: {source}",
        output.display()
    )]
    NoBertScore {
        output: PathBuf,
        source: BertScoreError,
    },
    #[error("the results cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Answering(#[from] AnsweringError),
    #[error(transparent)]
    BertScore(#[from] BertScoreError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Inference(Box<InferenceError>),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Output(#[from] WriteError),
    #[error(transparent)]
    PromptFile(#[from] PromptFileError),
}

impl From<InferenceError> for EvalError {
    fn from(error: InferenceError) -> Self {
        Self::Inference(Box::new(error))
    }
}
