//! Why a benchmark, or one of its contenders, stops.

use std::io;
use std::path::PathBuf;

use data::DataError;
use device::{DeviceError, UnknownBackend};
use peft::AdapterError;
use run_config::embedded::EmbeddedError;

/// Why a benchmark, or one of its contenders, stops.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Variants without fields of their own carry the error of the part that failed.
pub enum BenchError {
    #[error(transparent)]
    Model(#[from] llama_burn::ConfigError),
    #[error(transparent)]
    Load(#[from] llama_burn::LoadError),
    #[error(transparent)]
    Lora(#[from] lora_core::LoraError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Backend(#[from] UnknownBackend),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Output(#[from] durable::WriteError),
    /// No model was named, or it is not there.
    #[error(
        "{} holds no config.json. The benchmark compares on SmolLM2-135M-Instruct: `hf download \
         HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct`, then --model \
         models/SmolLM2-135M-Instruct; any other Llama folder will do, and --quick measures the embedded \
         model",
        folder.display()
    )]
    NoModel {
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// The rows are not there.
    #[error(
        "{} is not there. The benchmark trains on FinLoRA's fpb_train.jsonl, or any file of lines \
         {{\"context\": \"…\", \"target\": \"…\"}}: name one with --data FILE",
        path.display()
    )]
    NoData {
        /// Where they were looked for.
        path: PathBuf,
    },
    /// A number of rounds or steps that measures nothing.
    #[error("--{flag} is 0; it must be at least 1")]
    Zero {
        /// The flag.
        flag: &'static str,
    },
    /// A scenario or contender that does not exist.
    #[error("--{flag}: there is no {what} {word:?}; there are {}", known.join(", "))]
    Unknown {
        /// The flag.
        flag: &'static str,
        /// Scenario or contender.
        what: &'static str,
        /// What was given.
        word: String,
        /// What would be right.
        known: Vec<String>,
    },
    /// The scenario's rows do not fit the model.
    #[error(
        "the rows of {scenario} have {tokens} tokens, but this model's positions end at {limit}; --model names \
         another"
    )]
    RowsTooLong {
        /// The scenario.
        scenario: String,
        /// The longest row.
        tokens: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },
    /// A file or a process.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or program.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A contender reported an error.
    #[error("{name}: {message}")]
    Contender {
        /// Which.
        name: String,
        /// Its words.
        message: String,
    },
    /// A contender's process ended when an answer was due.
    #[error(
        "{name} ended without an answer ({how}); the whole of its messages is in {}{tail}",
        log.display()
    )]
    Ended {
        /// Which.
        name: String,
        /// Exit code or signal.
        how: String,
        /// Where its standard error went.
        log: PathBuf,
        /// A colon and the last line of it.
        tail: String,
    },
    /// A line that is not part of the protocol.
    #[error(
        "{name} answered {line:?} where an answer of the benchmark's protocol was due: {reason}"
    )]
    Protocol {
        /// Which.
        name: String,
        /// The line, cut.
        line: String,
        /// What the parser says.
        reason: String,
    },
    /// Burn's own adapters are not where they were asked for.
    #[error("Burn put no adapter on {module}")]
    NoAdapter {
        /// The module's full name.
        module: String,
    },
    /// A step before the model was loaded.
    #[error("a round was asked for before the model was loaded")]
    NotLoaded,
    /// A step that the specification does not have.
    #[error("step {step} was asked for; the specification has {steps}")]
    NoSuchStep {
        /// Asked for.
        step: usize,
        /// There are.
        steps: usize,
    },
    /// A device did not finish.
    #[error("the device failed: {0}")]
    Execution(String),
    /// The contender is another program's.
    #[error("this worker does not run {0}")]
    NotHere(&'static str),
}

impl BenchError {
    /// An error of the system about a file or program.
    pub(super) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
