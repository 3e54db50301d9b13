//! `lora-parity`: our numbers against those of transformers and PEFT, or of another backend.

use std::process::ExitCode;

use clap::Parser;
use parity::ParityOptions;

/// Compares with a reference that transformers and PEFT computed, or backends with each other.
///
/// The exit code is 1 if a difference is past its tolerance.
#[derive(Parser)]
#[command(name = "lora-parity", version)]
struct Cli {
    #[command(flatten)]
    options: ParityOptions,
}

fn main() -> ExitCode {
    let options = Cli::parse().options;
    command_line::run(|screen| -> anyhow::Result<_> {
        let report = parity::parity(&options)?;
        screen.line(&report.to_string());
        Ok(ExitCode::from(u8::from(!report.passed())))
    })
}
