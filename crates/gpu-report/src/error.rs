//! Why a report cannot be made, or a section fails.

use std::io;
use std::path::PathBuf;

use data::DataError;
use device::DeviceError;
use durable::WriteError;
use llama_burn::{ConfigError, LoadError};
use lora_core::LoraError;
use parity::ParityError;
use peft::AdapterError;
use run_config::embedded::EmbeddedError;

/// Why a report cannot be made, or a section fails.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries what failed: a file, a process, the device.
pub enum ReportError {
    #[error("cannot make {}: {source}", path.display())]
    MakeFolder { path: PathBuf, source: io::Error },
    #[error("cannot write {}: {source}", path.display())]
    WriteFile { path: PathBuf, source: io::Error },
    #[error("cannot read {}: {source}", path.display())]
    ReadFile { path: PathBuf, source: io::Error },
    #[error(
        "no GPU was found: {0}. For a report about a software driver use --backend wgpu --quick"
    )]
    NoGpu(String),
    #[error("the path of this program is not known: {0}")]
    OwnProgram(io::Error),
    #[error("cannot start {program}: {source}")]
    Start { program: String, source: io::Error },
    #[error("cannot wait for {program}: {source}")]
    Wait { program: String, source: io::Error },
    #[error("the process of a section has no output")]
    NoOutput,
    #[error("the device failed: {0}")]
    Device(String),
    #[error("the weight of {0:?} cannot be quantized in blocks")]
    Blocks([usize; 2]),
    #[error("{0} has no gradient")]
    NoGradient(String),
    #[error("no time was measured that is a number")]
    NoTime,
    #[error("it was stopped after {0:.0} s")]
    PeftTimeOut(f64),
    #[error("{0}")]
    PeftFailed(String),
    #[error("the last line of its output is not a line of results: {0}")]
    PeftLine(serde_json::Error),
    #[error("the config.json of {shape} is not valid JSON: {source}")]
    ShapeJson {
        shape: &'static str,
        source: serde_json::Error,
    },
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Select(#[from] DeviceError),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Lora(#[from] LoraError),
    #[error(transparent)]
    Parity(#[from] ParityError),
    #[error(transparent)]
    Output(#[from] WriteError),
}
