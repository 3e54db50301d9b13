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
        "{problem}.{skipped} This step was discarded. A lower learning_rate or a longer warm-up usually helps, \
         and on_non_finite = \"skip\" skips such steps; check these lines. {resume}"
    )]
    NotFinite {
        /// The value that is not a number, and its cause.
        problem: NotFinite,
        /// How many steps were skipped before it, as a sentence; empty without skipped steps.
        skipped: String,
        /// How to resume, as a sentence.
        resume: String,
    },
    /// The device failed.
    #[error("step {step}: {fault}. {advice}. {resume}")]
    Fault {
        /// The step that was being computed.
        step: usize,
        /// What happened.
        fault: DeviceFault,
        /// The possible cause, and what to do.
        advice: String,
        /// How to resume, as a sentence.
        resume: String,
        /// Whether there is a checkpoint.
        resumable: bool,
    },
    /// The device failed in [`evaluate()`](crate::evaluate()).
    #[error("validation: {0}. A smaller batch_size or max_seq_len needs less memory")]
    Evaluation(#[source] DeviceFault),
    /// The device computed wrong numbers during the run.
    #[error(transparent)]
    WrongNumbers(Box<WrongNumbers>),
    /// What is trained does not fit into one buffer of the device.
    #[error(
        "modules_to_save, biases and adapters have {needed} of trained parameters, which are updated as one tensor; \
         the largest buffer of this device is {limit}. Train fewer modules as a whole, or use --backend cpu"
    )]
    TrainedTooLarge {
        /// Their size.
        needed: String,
        /// The device's limit.
        limit: String,
    },
    /// A data file that changed while it was read.
    #[error("{} changed while it was read; start the run again when the file is complete", path.display())]
    DataChanged {
        /// The file.
        path: PathBuf,
    },
}

/// A device that disagrees with the CPU during a run.
#[derive(Debug, thiserror::Error)]
#[error(
    "step {step}: {error}. It was found in layer {layer}, and this step was discarded. The results of the steps after \
     step {checked}, the last step that agreed with the CPU, may be wrong. {resume}"
)]
pub struct WrongNumbers {
    /// The step that was being computed.
    pub step: usize,
    /// The decoder layer that was compared.
    pub layer: usize,
    /// The last step that agreed with the CPU.
    pub checked: usize,
    /// The operation, and what to do.
    #[source]
    pub error: DeviceError,
    /// How to resume, as a sentence.
    pub resume: String,
    /// Whether there is a checkpoint.
    pub resumable: bool,
}
