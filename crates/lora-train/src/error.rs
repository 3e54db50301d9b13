//! Why a run does not start, or stops.

use std::path::PathBuf;

use lora_core::LoraError;

use crate::checkpoint::CheckpointError;
use crate::continued::StartError;
use crate::fit::FitError;
use crate::guard::DeviceFault;
use crate::metrics::MetricsError;
use crate::output::OutputError;
use crate::step::NotFinite;
use data::DataError;
use device::DeviceError;
use durable::faults::FaultError;
use hub::HubError;
use peft::AdapterError;
use run_config::Problems;
use run_config::embedded::EmbeddedError;

/// Why a run did not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum TrainError {
    #[error(transparent)]
    Files(#[from] Problems),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Model(#[from] llama_burn::ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Fit(#[from] FitError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Write(#[from] durable::WriteError),
    #[error(transparent)]
    Load(#[from] llama_burn::LoadError),
    #[error(transparent)]
    Lora(#[from] LoraError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    OnDemand(#[from] FaultError),
    /// A loss or gradient that is not a number.
    #[error(
        "{problem}.{skipped} Nothing of this step was kept. A lower learning_rate or a longer warm-up usually helps, \
         and on_non_finite = \"skip\" leaves such steps out; see whether the rows named are what you expect. {resume}"
    )]
    NotFinite {
        /// What is not a number, and where it comes from.
        problem: NotFinite,
        /// How many steps were skipped for it before; empty if none was.
        skipped: String,
        /// How to go on, in words.
        resume: String,
    },
    /// The device failed.
    #[error("step {step}: {fault}. {advice}. {resume}")]
    Fault {
        /// The step under way.
        step: usize,
        /// What happened.
        fault: DeviceFault,
        /// What it may come from.
        advice: String,
        /// How to go on, in words.
        resume: String,
        /// Whether there is a checkpoint.
        resumable: bool,
    },
    /// The device failed in [`evaluate()`](crate::evaluate()).
    #[error("validation: {0}. A smaller batch_size or max_seq_len needs less memory")]
    Evaluation(#[source] DeviceFault),
    /// The device computed something wrong while the run went on.
    #[error(transparent)]
    WrongNumbers(Box<WrongNumbers>),
    /// A data file that somebody writes to.
    #[error("{} changed while it was read; start again when it is complete", path.display())]
    DataChanged {
        /// The file.
        path: PathBuf,
    },
}

/// A comparison with the CPU, in the middle of a run, that did not go well.
#[derive(Debug, thiserror::Error)]
#[error(
    "step {step}: {error}. It was found in layer {layer}, and nothing of this step was kept; what the steps after step \
     {checked} computed, the last that was compared with the CPU, is in doubt. {resume}"
)]
pub struct WrongNumbers {
    /// The step under way.
    pub step: usize,
    /// The decoder layer that was compared.
    pub layer: usize,
    /// The last step whose comparison went well.
    pub checked: usize,
    /// The operation, and what to do.
    #[source]
    pub error: DeviceError,
    /// How to go on, in words.
    pub resume: String,
    /// Whether there is a checkpoint.
    pub resumable: bool,
}
