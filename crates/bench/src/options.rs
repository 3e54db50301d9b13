//! What can be asked of the benchmark.

use std::path::PathBuf;

use device::Backend;

/// What can be asked of the benchmark, as command-line arguments.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct BenchOptions {
    /// Where our training and Burn's compute.
    #[arg(long, visible_alias = "backend", default_value = "auto", help = Backend::help())]
    pub device: Backend,
    /// A Python with torch, transformers and peft (and bitsandbytes for int8 on CUDA)
    #[arg(long, value_name = "PYTHON")]
    pub peft: Option<PathBuf>,
    /// A Hugging Face model folder; models/SmolLM2-135M-Instruct without it
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Rows to train on; data/fpb_train.jsonl without it
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Measured rounds of each scenario [default: 5]
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
    /// Optimizer steps of a round [default: 5, or the scenario's own]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Scenarios: floors, main, all-linear, r64, long, accumulation, scaling, 8b [default: main]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Every scenario but 8b
    #[arg(long, conflicts_with = "only")]
    pub all: bool,
    /// Contenders, such as ours,burn,peft-f32 [default: all that the scenario has]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub contenders: Vec<String>,
    /// Measure PEFT in bfloat16 even where the processor has no instructions for it
    #[arg(long)]
    pub bf16: bool,
    /// The embedded model, two rounds of two steps: whether it works, not how fast
    #[arg(long)]
    pub quick: bool,
    /// Where the results go: results.json, results.md, speed.svg
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
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
