//! Why a benchmark, or one of its contenders, fails.

use std::io;
use std::path::PathBuf;

use data::DataError;
use device::{DeviceError, UnknownBackend};
use peft::AdapterError;
use run_config::embedded::EmbeddedError;

/// Why a benchmark, or one of its contenders, fails.
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
    /// No model was named, or it is missing.
    #[error(
        "{} holds no config.json. The benchmark compares on SmolLM2-135M-Instruct: `hf download \
         HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct`, then --model \
         models/SmolLM2-135M-Instruct; any other Llama folder works too, and --quick measures the embedded \
         model",
        folder.display()
    )]
    NoModel {
        /// The path.
        folder: PathBuf,
    },
    /// The file of examples is missing.
    #[error(
        "{} does not exist. The benchmark trains on FinLoRA's fpb_train.jsonl, or any file of lines \
         {{\"context\": \"…\", \"target\": \"…\"}}: set it with --data FILE",
        path.display()
    )]
    NoData {
        /// The path.
        path: PathBuf,
    },
    /// A number of rounds or steps that is 0.
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
        /// The given name.
        word: String,
        /// The known names.
        known: Vec<String>,
    },
    /// The scenario's examples do not fit the model.
    #[error(
        "the examples of {scenario} have {tokens} tokens, but this model has {limit} positions; --model names \
         another"
    )]
    RowsTooLong {
        /// The scenario.
        scenario: String,
        /// The longest example.
        tokens: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },
    /// A file or a process.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The action.
        action: &'static str,
        /// The file or program.
        path: PathBuf,
        /// The system's message.
        source: io::Error,
    },
    /// A contender reported an error.
    #[error("{name}: {message}")]
    Contender {
        /// The contender.
        name: String,
        /// Its message.
        message: String,
    },
    /// A contender's process ended before it answered.
    #[error(
        "{name} ended without an answer ({how}); its messages are in {}{tail}",
        log.display()
    )]
    Ended {
        /// The contender.
        name: String,
        /// Exit code or signal.
        how: String,
        /// The file with its standard error.
        log: PathBuf,
        /// A colon and the last line of it.
        tail: String,
    },
    /// A line that is not part of the protocol.
    #[error(
        "{name} answered {line:?}, which is not an answer of the benchmark's protocol: {reason}"
    )]
    Protocol {
        /// The contender.
        name: String,
        /// The line, shortened.
        line: String,
        /// The parser's message.
        reason: String,
    },
    /// Burn applied no adapter to a module.
    #[error("Burn applied no adapter to {module}")]
    NoAdapter {
        /// The module's full name.
        module: String,
    },
    /// A step before the model was loaded.
    #[error("a round was requested before the model was loaded")]
    NotLoaded,
    /// A step that the specification does not have.
    #[error("step {step} was requested; the specification has {steps} steps")]
    NoSuchStep {
        /// The requested step.
        step: usize,
        /// The number of steps.
        steps: usize,
    },
    /// A device did not finish.
    #[error("the device failed: {0}")]
    Execution(String),
    /// The contender is run by another program.
    #[error("this worker does not run {0}")]
    NotHere(&'static str),
}

impl BenchError {
    /// The system's error about a file or program.
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
