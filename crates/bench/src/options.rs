//! The options of the benchmark.

use std::path::PathBuf;

use device::Backend;

/// The options of the benchmark, as command-line arguments.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct BenchOptions {
    /// The device of this trainer and of Burn's contender.
    #[arg(long, visible_alias = "backend", default_value = "auto", help = Backend::help())]
    pub device: Backend,
    /// A Python with torch, transformers and peft (and bitsandbytes for int8 on CUDA)
    #[arg(long, value_name = "PYTHON")]
    pub peft: Option<PathBuf>,
    /// A Hugging Face model folder [default: models/SmolLM2-135M-Instruct]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Examples to train on [default: data/fpb_train.jsonl]
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Measured rounds per scenario [default: 5]
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
    /// Optimizer steps per round [default: 5, or the scenario's own]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Scenarios: floors, main, all-linear, r64, long, accumulation, scaling, 8b [default: main]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Every scenario except 8b
    #[arg(long, conflicts_with = "only")]
    pub all: bool,
    /// Systems to measure, such as ours,burn,peft-f32 [default: all of the scenario]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub contenders: Vec<String>,
    /// Measure PEFT in bfloat16 even if the processor has no instructions for it
    #[arg(long)]
    pub bf16: bool,
    /// A quick check of the benchmark: the embedded model, two rounds of two steps
    #[arg(long)]
    pub quick: bool,
    /// The folder for the results: results.json, results.md, speed.svg
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
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
