//! What can be asked of the benchmark.

use std::path::PathBuf;

use device::Backend;

/// What can be asked of the benchmark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchOptions {
    /// Where ours and Burn's compute.
    pub device: Backend,
    /// A Python with torch, transformers and peft.
    pub peft: Option<PathBuf>,
    /// The model's folder.
    pub model: Option<PathBuf>,
    /// Lines of `{"context", "target"}`.
    pub data: Option<PathBuf>,
    /// Measured rounds of each scenario.
    pub rounds: Option<usize>,
    /// Optimizer steps of a round.
    pub steps: Option<usize>,
    /// Scenarios; `main` where empty.
    pub only: Vec<String>,
    /// All scenarios but those that need a data-centre GPU.
    pub all: bool,
    /// Contenders; all where empty.
    pub contenders: Vec<String>,
    /// PEFT in bfloat16 where the processor has no instructions for it.
    pub bf16: bool,
    /// The embedded model, two rounds of two steps, small floors: whether it works, not how fast.
    pub quick: bool,
    /// Where the results go.
    pub output: PathBuf,
}

impl BenchOptions {
    /// Measured rounds.
    pub(super) fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 })
    }

    /// Steps of a round, where the scenario does not say otherwise.
    pub(super) fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.quick { 2 } else { 5 })
    }
}
