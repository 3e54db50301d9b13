//! The options of the benchmark.

use std::path::PathBuf;

use device::Backend;

/// The options of the benchmark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchOptions {
    /// The device of this trainer and of Burn's contender.
    pub device: Backend,
    /// A Python with torch, transformers and peft.
    pub peft: Option<PathBuf>,
    /// The model's folder.
    pub model: Option<PathBuf>,
    /// Lines of `{"context", "target"}`.
    pub data: Option<PathBuf>,
    /// Measured rounds per scenario.
    pub rounds: Option<usize>,
    /// Optimizer steps per round.
    pub steps: Option<usize>,
    /// Scenarios; `main` if empty.
    pub only: Vec<String>,
    /// All scenarios except those that need a data-centre GPU.
    pub all: bool,
    /// Contenders; all if empty.
    pub contenders: Vec<String>,
    /// Measure PEFT in bfloat16 even if the processor has no instructions for it.
    pub bf16: bool,
    /// A quick check: the embedded model, two rounds of two steps, small roofline measurements.
    pub quick: bool,
    /// The folder for the results.
    pub output: PathBuf,
}

impl BenchOptions {
    /// Measured rounds.
    pub(super) fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 })
    }

    /// Steps per round, if the scenario does not set another number.
    pub(super) fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.quick { 2 } else { 5 })
    }
}
