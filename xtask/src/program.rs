//! The programs that xtask builds and starts, and their help.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::cargo::{self, exit_code, quiet_display_server};

/// The packages of all programs. A build selects them all, whichever program it is for: cargo then
/// resolves the same features of shared dependencies each time and compiles Burn once.
pub const PACKAGES: [&str; 4] = ["trainer", "bench", "parity", "make-assets"];

/// A program that xtask builds and starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The trainer, for one of its commands.
    Trainer(&'static str),
    /// The benchmark.
    Bench,
    /// The comparison with a reference or between backends.
    Parity,
    /// The generator of the embedded model and data.
    MakeAssets,
}

impl Program {
    /// The name of the executable.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trainer(_) => "trainer",
            Self::Bench => "lora-bench",
            Self::Parity => "lora-parity",
            Self::MakeAssets => "make-assets",
        }
    }

    /// What messages call it.
    pub fn called(self) -> &'static str {
        match self {
            Self::Trainer(_) => "the trainer",
            Self::Bench => "the benchmark",
            Self::Parity => "the parity program",
            Self::MakeAssets => "the asset generator",
        }
    }

    /// Where cargo puts, or will put, the executable.
    pub fn binary(self) -> Result<PathBuf> {
        cargo::binary(self.name())
    }

    /// The program, to be started with these arguments.
    pub fn command(self, args: &[OsString]) -> Result<Command> {
        let mut command = Command::new(self.binary()?);
        if let Self::Trainer(subcommand) = self {
            command.arg(subcommand);
        }
        command.args(args);
        quiet_display_server(&mut command);
        Ok(command)
    }

    /// `--help`: the program's own, from the executable that is there. None is built for it: where
    /// Burn is not compiled yet, the help would appear after ten minutes.
    pub fn help(self) -> Result<ExitCode> {
        if !self.binary()?.exists() {
            println!("{BACKEND_HELP}\n\n{HELP_BEFORE_THE_FIRST_BUILD}");
            return Ok(ExitCode::SUCCESS);
        }
        println!("{BACKEND_HELP}\n");
        let status = self.command(&["--help".into()])?.status();
        let status = status.with_context(|| format!("cannot start {}", self.called()))?;
        Ok(ExitCode::from(exit_code(status)))
    }
}

/// What xtask adds to a program's own help.
const BACKEND_HELP: &str = "\
xtask builds the program for the CPU and for what --backend (parity: --backends) names, nothing else,
and starts it with the same arguments.";

/// What `--help` prints while the executable is missing.
const HELP_BEFORE_THE_FIRST_BUILD: &str = "\
The program itself lists its options, and it is not built yet. Run the command to build it: about ten
minutes on 2 cores if Burn is not compiled yet. From then on, --help lists the options at once. Until
then, docs/README.md names the page that describes the command.";

/// Whether the user asks for help.
pub fn asks_for_help(args: &[OsString]) -> bool {
    args.iter().any(|arg| arg == "--help" || arg == "-h")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn only_the_trainer_has_commands() {
        let args = os(&["--quick"]);
        let arguments = |program: Program| {
            let command = program.command(&args).unwrap();
            command.get_args().map(OsString::from).collect::<Vec<_>>()
        };
        assert_eq!(
            arguments(Program::Trainer("plan")),
            os(&["plan", "--quick"])
        );
        assert_eq!(arguments(Program::Bench), args);
    }

    #[test]
    fn help_is_asked_for_in_both_spellings() {
        assert!(asks_for_help(&os(&["--backend", "cpu", "--help"])) && asks_for_help(&os(&["-h"])));
        assert!(!asks_for_help(&os(&["--set", "help=1"])));
    }
}
