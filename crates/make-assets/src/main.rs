//! `make-assets`: makes the embedded model, tokenizer and data again from their seed.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

/// Makes the embedded model, tokenizer and data again from their seed.
#[derive(Parser)]
#[command(name = "make-assets", version)]
struct Cli {
    /// Where to write them
    #[arg(long, default_value = "assets")]
    output: PathBuf,
    /// Decides everything
    #[arg(long, default_value_t = make_assets::SEED)]
    seed: u64,
}

fn main() -> ExitCode {
    let Cli { output, seed } = Cli::parse();
    command_line::run(|screen| -> anyhow::Result<_> {
        make_assets::run(&output, seed, &mut |line| screen.line(line))
            .with_context(|| format!("cannot make {}", output.display()))?;
        Ok(ExitCode::SUCCESS)
    })
}
