//! What a section found: a line of JSON from its process to the report.

use serde::{Deserialize, Serialize};

use device::Hardware;

/// One thing that was found. Each is told as soon as it is known, so that a section that is stopped leaves the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// What the device says of itself.
    Device(Box<Hardware>),
    /// A comparison with the CPU.
    Check(Check),
    /// How fast something is.
    Rate(Rate),
    /// What a step asks of the device.
    Counts(Box<StepFinding>),
    /// Training steps of a model.
    Training(Training),
    /// Something that was not done, and why.
    LeftOut(LeftOut),
    /// Something that failed, in the device's or the program's words.
    Failed(Failed),
    /// The section is through. A process that ends without it was ended by something else.
    Done,
}

/// A comparison with the CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What was compared, and in which type.
    pub name: String,
    /// The measured difference; none where it is not a number.
    pub difference: Option<f64>,
    /// The largest difference that passes.
    pub tolerance: f64,
    /// Whether it passes.
    pub ok: bool,
    /// How the difference is measured, or what was wrong.
    pub note: String,
}

impl Check {
    /// A check that passes within `tolerance`; a difference that is not a number does not.
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

/// How fast something is: medians, after kernels are compiled and tuned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// What was run.
    pub what: String,
    /// What sort of thing, which says what its peak is.
    pub group: Group,
    /// The type that it was computed in.
    #[serde(rename = "type")]
    pub dtype: String,
    /// Its sizes.
    pub size: String,
    /// 10¹² operations per second; none for what is bound by memory.
    pub tflops: Option<f64>,
    /// 10⁹ bytes per second; none for what is bound by multiplications.
    pub gbs: Option<f64>,
    /// Milliseconds: median, smallest, largest.
    pub milliseconds: [f64; 3],
}

/// Sorts of rates.
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

/// What a step asks of the device, counted.
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
    /// Kernel launches of a step.
    pub launches_per_step: u64,
    /// Tensors copied to the device in a step.
    pub uploads_per_step: u64,
    /// Times that a step waits for numbers from the device.
    pub reads_per_step: u64,
    /// Bytes that a step reads and writes on the device, in 16 bits where it has them; `rule` has the rest.
    pub bytes_per_step: u64,
    /// Operations of a step's matrix products.
    pub flops_per_step: u64,
    /// How the numbers were scaled to the whole model.
    pub rule: String,
    /// By kind of launch, for a step.
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
    /// Who trained: `ours`, `PEFT bfloat16`.
    pub program: String,
    /// The model's name.
    pub shape: String,
    /// The type that it computes in.
    #[serde(rename = "type")]
    pub dtype: String,
    /// Bits of a frozen weight.
    pub bits: u8,
    /// Tokens of an example.
    pub tokens_per_example: usize,
    /// Examples of a step.
    pub examples_per_step: usize,
    /// Useful tokens per second, by the median step.
    pub tokens_per_s: f64,
    /// Seconds a step: median, smallest, largest; three times the mean where only that is known.
    pub seconds_per_step: [f64; 3],
    /// Steps measured.
    pub steps: usize,
    /// The device's memory at its peak, in MiB; the process's on the CPU.
    pub peak_mib: Option<f64>,
    /// Whether activations were computed again in the backward pass.
    pub gradient_checkpointing: bool,
    /// The mean loss a supervised token of the first and the last step.
    pub losses: Option<[f64; 2]>,
    /// Seconds until the first measured step: making the model, compiling and tuning kernels.
    pub warm_up_s: Option<f64>,
}

/// Something that was not done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeftOut {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
}

/// Something that failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    /// What.
    pub what: String,
    /// The device's or the program's words.
    pub message: String,
    /// Whether the device was lost.
    pub lost: bool,
}
