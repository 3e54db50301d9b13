//! `lora-parity`: our numbers against those of transformers and PEFT, or of another backend.

use std::process::ExitCode;

use clap::Parser;
use parity::ParityOptions;

/// Compares with reference numbers of transformers and PEFT, or backends with each other.
#[derive(Parser)]
#[command(name = "lora-parity", version, after_help = EXIT_CODE)]
struct Cli {
    #[command(flatten)]
    options: ParityOptions,
}

const EXIT_CODE: &str = "The exit code is 1 if a difference exceeds its tolerance.";

fn main() -> ExitCode {
    let options = Cli::parse().options;
    command_line::run(|screen| -> anyhow::Result<_> {
        let report = parity::parity(&options)?;
        screen.line(&report.to_string());
        Ok(ExitCode::from(u8::from(!report.passed())))
    })
}
