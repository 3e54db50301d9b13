//! The findings of a section: a line of JSON each, from its process to the report.

use serde::{Deserialize, Serialize};

use device::Hardware;

/// A finding. Each is sent as soon as it is known, so that a stopped section leaves the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The device's properties.
    Device(Box<Hardware>),
    /// A comparison with the CPU.
    Check(Check),
    /// A measured speed.
    Rate(Rate),
    /// The counted work of a step.
    Counts(Box<StepFinding>),
    /// Training steps of a model.
    Training(Training),
    /// A measurement that was skipped, and why.
    LeftOut(LeftOut),
    /// A failure, with the message of the device or the program.
    Failed(Failed),
    /// The section finished. A process that ends without it was ended by something else.
    Done,
}

/// A comparison with the CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What was compared, and in which type.
    pub name: String,
    /// The measured difference; `None` if it is not a number.
    pub difference: Option<f64>,
    /// The largest difference that passes.
    pub tolerance: f64,
    /// Whether the difference is within the tolerance.
    pub ok: bool,
    /// How the difference is measured, or what is wrong.
    pub note: String,
}

impl Check {
    /// A check that passes within `tolerance`; a difference that is not a number does not pass.
    pub fn new(name: String, difference: f64, tolerance: f64, note: impl Into<String>) -> Self {
        Self {
            name,
            difference: difference.is_finite().then_some(difference),
            tolerance,
            ok: difference <= tolerance,
            note: note.into(),
        }
    }
}

/// A measured speed: medians, after kernels are compiled and tuned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// What was run.
    pub what: String,
    /// The group, which determines the peak to compare with.
    pub group: Group,
    /// The type that it was computed in.
    #[serde(rename = "type")]
    pub dtype: String,
    /// Its sizes.
    pub size: String,
    /// 10¹² operations per second; `None` for operations bound by memory.
    pub tflops: Option<f64>,
    /// 10⁹ bytes per second; `None` for operations bound by arithmetic.
    pub gbs: Option<f64>,
    /// Milliseconds: median, smallest, largest.
    pub milliseconds: [f64; 3],
}

/// Groups of speeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// The largest matrix product: the peak of its type.
    PeakProduct,
    /// A large copy: the peak of memory.
    PeakCopy,
    /// Products of a layer's shapes.
    Product,
    /// Attention.
    Attention,
    /// A whole decoder layer.
    Layer,
    /// Element-wise chains and reductions.
    ElementWise,
}

/// The counted work of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepFinding {
    /// The model's name.
    pub shape: String,
    /// The type that it computes in.
    #[serde(rename = "type")]
    pub dtype: String,
    /// Tokens of the step's one example.
    pub tokens: usize,
    /// Kernel launches of a decoder layer, forward and backward.
    pub launches_per_layer: u64,
    /// Kernel launches per step.
    pub launches_per_step: u64,
    /// Tensors copied to the device per step.
    pub uploads_per_step: u64,
    /// How often a step waits for numbers from the device.
    pub reads_per_step: u64,
    /// Bytes that a step reads and writes on the device, in 16 bits if supported; see `rule`.
    pub bytes_per_step: u64,
    /// Operations of the step's matrix products.
    pub flops_per_step: u64,
    /// How the numbers were scaled to the whole model.
    pub rule: String,
    /// The launches of a step by kind.
    pub kinds: Vec<KindFinding>,
}

/// The launches of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KindFinding {
    /// The kind's name.
    pub kind: String,
    /// Launches.
    pub launches: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Operations of matrix products.
    pub flops: u64,
}

/// Training steps of a model with random weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// The program: `ours`, `PEFT bfloat16`.
    pub program: String,
    /// The model's name.
    pub shape: String,
    /// The type that it computes in.
    #[serde(rename = "type")]
    pub dtype: String,
    /// Bits per frozen weight.
    pub bits: u8,
    /// Tokens per example.
    pub tokens_per_example: usize,
    /// Examples per step.
    pub examples_per_step: usize,
    /// Useful tokens per second, by the median step.
    pub tokens_per_s: f64,
    /// Seconds per step: median, smallest, largest; three times the mean if only that is known.
    pub seconds_per_step: [f64; 3],
    /// Steps measured.
    pub steps: usize,
    /// Peak memory of the device in MiB; of the process on the CPU.
    pub peak_mib: Option<f64>,
    /// Whether gradient checkpointing was on.
    pub gradient_checkpointing: bool,
    /// The mean loss per token in the loss of the first and the last step.
    pub losses: Option<[f64; 2]>,
    /// Seconds before the first measured step: creating the model, compiling and tuning kernels.
    pub warm_up_s: Option<f64>,
}

/// A measurement that was skipped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The measurement.
    pub what: String,
    /// The reason.
    pub why: String,
}

/// A failure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    /// The part that failed.
    pub what: String,
    /// The message of the device or the program.
    pub message: String,
    /// Whether the device was lost.
    pub lost: bool,
}
