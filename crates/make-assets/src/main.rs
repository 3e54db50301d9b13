//! `make-assets`: generates the embedded model, tokenizer and data again from their seed.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

/// Generates the embedded model, tokenizer and data again from their seed.
#[derive(Parser)]
#[command(name = "make-assets", version)]
struct Cli {
    /// The folder to write to
    #[arg(long, default_value = "assets")]
    output: PathBuf,
    /// The seed that determines all of them
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
