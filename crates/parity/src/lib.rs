//! `cargo xtask parity`: this trainer's numbers compared with another implementation's, or with another
//! device's.
//!
//! | file | contents |
//! | --- | --- |
//! | `reference` | a folder written by `tests/fixtures/make_fixtures.py` |
//! | `against_reference` | one device compared with such a folder |
//! | `between_devices` | a quantized model on each pair of devices |
//! | `run` | forward, backward, training steps with this trainer's code |
//! | `difference`, `report` | measures of difference, and the table |

mod against_reference;
mod between_devices;
mod difference;
mod reference;
mod report;
mod run;

use std::path::{Path, PathBuf};

use burn::tensor::Device;

use device::{Backend, DeviceError, Selected};
use peft::AdapterError;
use reference::Reference;

pub use report::{Check, Report, Section};

/// Options of a comparison, as command-line arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct ParityOptions {
    /// A folder written by tests/fixtures/make_fixtures.py, such as tests/fixtures/tied; without it, backends are compared
    /// with each other
    #[arg(long, value_name = "DIR")]
    pub reference: Option<PathBuf>,
    /// The reference's model, if it is not in that folder
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// The backends to run on, separated by commas; missing ones are reported, not failed
    #[arg(long, value_delimiter = ',', default_value = "cpu")]
    pub backends: Vec<Backend>,
    /// The learning rate of the reference's training steps
    #[arg(long = "lr", value_name = "LR", default_value_t = LEARNING_RATE)]
    pub learning_rate: f64,
}

/// `make_fixtures.py`'s learning rate.
const LEARNING_RATE: f64 = 1e-3;

impl Default for ParityOptions {
    /// The CPU, without a reference, and `make_fixtures.py`'s learning rate.
    fn default() -> Self {
        Self {
            reference: None,
            model: None,
            backends: vec![Backend::Cpu],
            learning_rate: LEARNING_RATE,
        }
    }
}

/// Why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub enum ParityError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The reference is not a safetensors file, or is truncated.
    #[error("{} is not a valid safetensors file: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        reason: String,
    },
    /// A tensor of the reference is missing or not as expected.
    #[error("{}: {name}: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The folder holds no model and none was named.
    #[error(
        "{} has no model/ folder; give the reference's model with --model",
        folder.display()
    )]
    NoModel {
        /// The reference's folder.
        folder: PathBuf,
    },
    /// The reference was made with another model.
    #[error(
        "the reference has {got} logits per position, but the model's vocabulary has {expected} entries: this is another model"
    )]
    Vocabulary {
        /// The model's vocabulary.
        expected: usize,
        /// The reference's.
        got: usize,
    },
    /// A tensor that only one side has.
    #[error("{quantity}: only {side} has {name}")]
    OneSided {
        /// What was being compared.
        quantity: String,
        /// The tensor.
        name: String,
        /// The side that has it.
        side: &'static str,
    },
    /// The backward pass returned no gradient for an adapter.
    #[error("{name} has no gradient")]
    NoGradient {
        /// PEFT's name of the tensor.
        name: String,
    },
    /// A device does not return a tensor.
    #[error("{name} cannot be read from the device: {reason}")]
    Unreadable {
        /// What the tensor is.
        name: String,
        /// The device's message.
        reason: String,
    },
    /// The model's configuration.
    #[error(transparent)]
    Config(#[from] llama_burn::ConfigError),
    /// The model's weights.
    #[error(transparent)]
    Load(#[from] llama_burn::LoadError),
    /// The merged model's weights.
    #[error("merged model: {0}")]
    Merged(#[from] llama_burn::WeightsError),
    /// The reference's tokens.
    #[error("input_ids: {0}")]
    Tokens(#[from] llama_burn::PackedError),
    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A layer of the model that devices are compared with.
    #[error(transparent)]
    Lora(#[from] lora_core::LoraError),
    /// None of the backends is available.
    #[error("no backend to run on:{0}")]
    NoBackend(String),
    /// Without a reference there must be two devices.
    #[error(
        "there is no other device to compare {name} with; name more --backends, or a --reference folder{others}"
    )]
    OneDevice {
        /// The only available device.
        name: String,
        /// The reasons for the others, one per line.
        others: String,
    },
}

/// Selects the backends and makes the comparisons that `options` selects.
///
/// A backend that is not in this build or not supported on this machine gets a line in the report;
/// that is not a failure, unless nothing is left to compare. A backend that computes wrong numbers,
/// or does not start, fails the report.
///
/// # Errors
///
/// If the reference's folder is incomplete or wrong, or if no backend is available. Differences
/// beyond their tolerance are not an error of this function: see [`Report::passed`].
pub fn parity(options: &ParityOptions) -> Result<Report, ParityError> {
    let (mut absent, mut broken) = (Vec::new(), Vec::new());
    let mut devices: Vec<(String, Device)> = Vec::new();
    for backend in &options.backends {
        match start(*backend) {
            Ok(selected) => {
                // `auto` may be a backend that is already in the list.
                let name = format!("{} [{}]", selected.backend, selected.name);
                if devices.iter().all(|(known, _)| *known != name) {
                    devices.push((name, selected.device));
                }
            }
            // The device exists: parity is meant to find a driver that computes wrong numbers.
            Err(
                error @ (DeviceError::WrongNumbers { .. } | DeviceError::Initialization { .. }),
            ) => broken.push(format!("FAIL  {backend}: {error}")),
            Err(error) => absent.push(format!("{backend}: skipped: {error}")),
        }
    }
    let mut report = match (&options.reference, &devices[..]) {
        (_, []) => return Err(ParityError::NoBackend(lines(&absent, &broken))),
        (Some(folder), devices) => {
            let model = options.model.as_deref();
            against_reference(folder, model, options.learning_rate, devices)?
        }
        (None, [(name, _)]) => {
            return Err(ParityError::OneDevice {
                name: name.clone(),
                others: lines(&absent, &broken),
            });
        }
        (None, devices) => between_devices(devices)?,
    };
    report.absent = absent;
    report.broken = broken;
    Ok(report)
}

/// Lines after a message, one below the other.
fn lines(absent: &[String], broken: &[String]) -> String {
    let all = broken.iter().chain(absent);
    all.map(|line| format!("\n  {line}")).collect()
}

/// A device that starts and passes its self-test.
fn start(backend: Backend) -> Result<Selected, DeviceError> {
    let selected = device::select(backend)?;
    device::self_test(&selected)?;
    Ok(selected)
}

/// Compares each device with the numbers that `make_fixtures.py` wrote into `folder`, in f32 with
/// dense weights: logits with and without the adapter, loss, the gradient of every LoRA matrix, the
/// losses of AdamW steps, the trained adapter, and the merged weights.
///
/// # Errors
///
/// If the folder is incomplete or wrong.
pub fn against_reference(
    folder: &Path,
    model: Option<&Path>,
    learning_rate: f64,
    devices: &[(String, Device)],
) -> Result<Report, ParityError> {
    let reference = Reference::read(folder, model)?;
    let sections = devices
        .iter()
        .map(|(name, device)| against_reference::check(&reference, learning_rate, device, name));
    Ok(Report {
        sections: sections.collect::<Result<_, _>>()?,
        absent: vec![],
        broken: vec![],
    })
}

/// Compares every pair of devices on a small LoRA Llama with 8-bit weights. The model is made from
/// a seed and has the same integers on all devices. Compared are logits, loss, gradients, and the
/// losses of ten training steps.
///
/// # Errors
///
/// [`ParityError::Unreadable`] if a device does not return its numbers.
pub fn between_devices(devices: &[(String, Device)]) -> Result<Report, ParityError> {
    between_devices::compare(devices)
}
