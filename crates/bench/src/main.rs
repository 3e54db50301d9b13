//! `lora-bench`: speed and memory of training, compared with Burn's `apply_qlora` and PEFT.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use bench::BenchOptions;
use clap::Parser;

/// Measures speed and memory of training: the machine's roofline, then this trainer, Burn's
/// apply_qlora and, with --peft, PEFT, on the same examples in turn, each in its own process.
#[derive(Parser)]
#[command(name = "lora-bench", version)]
struct Cli {
    #[command(flatten)]
    options: BenchOptions,
    /// Runs as one of the benchmark's own processes; FILE holds what to train, in JSON
    #[arg(long = bench::WORKER, value_name = "FILE", hide = true, exclusive = true)]
    worker: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Cli { options, worker } = Cli::parse();
    command_line::run(|screen| -> anyhow::Result<_> {
        match worker {
            Some(spec) => {
                bench::serve(&spec).context("the benchmark does not listen any more")?;
            }
            None => {
                bench::run(&options, &screen)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}
