//! The programs, started as a user starts them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A program of this workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Package `trainer`.
    Trainer,
    /// Package `bench`.
    Bench,
    /// Package `parity`.
    Parity,
    /// Package `make-assets`.
    MakeAssets,
}

impl Program {
    /// The names of its binary and of its package.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Trainer => ("trainer", "trainer"),
            Self::Bench => ("lora-bench", "bench"),
            Self::Parity => ("lora-parity", "parity"),
            Self::MakeAssets => ("make-assets", "make-assets"),
        }
    }

    /// The binary. The trainer's is `TRAINER_BIN`, else beside the folder of this test's executable; the
    /// others lie beside the trainer's.
    ///
    /// # Panics
    ///
    /// If it is missing; the message contains the command that builds it.
    pub fn binary(self) -> PathBuf {
        let (name, package) = self.names();
        let beside = || {
            let executable = std::env::current_exe().ok()?;
            Some(executable.parent()?.with_file_name("trainer"))
        };
        let named = std::env::var_os("TRAINER_BIN").map(PathBuf::from);
        let trainer = named.or_else(beside).unwrap_or_default();
        let path = if self == Self::Trainer && trainer.is_file() {
            trainer
        } else {
            trainer.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX))
        };
        assert!(
            path.is_file(),
            "{} is missing: `cargo xtask test` builds it, or `cargo build --release -p {package}`",
            path.display()
        );
        path
    }

    /// Runs the program with these arguments, without a terminal.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn run(self, arguments: &[&str]) -> Outcome {
        self.run_in(Path::new("."), arguments, &[])
    }

    fn run_in(self, folder: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
        let mut command = Command::new(self.binary());
        command.current_dir(folder);
        command
            .args(arguments)
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG");
        command.envs(environment.iter().copied());
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().expect("the program starts");
        let text = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Outcome {
            code: status.code(),
            text: text.concat(),
        }
    }
}

/// The trainer's binary, see [`Program::binary`].
///
/// # Panics
///
/// If it does not exist; the message describes how to build it.
pub fn binary() -> PathBuf {
    Program::Trainer.binary()
}

/// The output and the exit of a run of the program.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output, then standard error.
    pub text: String,
}

/// Runs the trainer with these arguments, without a terminal.
///
/// # Panics
///
/// If it cannot be started.
pub fn run(arguments: &[&str]) -> Outcome {
    run_with(arguments, &[])
}

/// As [`run`], with environment variables.
///
/// # Panics
///
/// If it cannot be started.
pub fn run_with(arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
    run_in(Path::new("."), arguments, environment)
}

/// As [`run_with`], in this folder.
///
/// # Panics
///
/// If it cannot be started.
pub fn run_in(folder: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
    Program::Trainer.run_in(folder, arguments, environment)
}

impl Outcome {
    /// Asserts that the run succeeded.
    ///
    /// # Panics
    ///
    /// With the program's output.
    pub fn succeeded(self) -> String {
        assert_eq!(self.code, Some(0), "the program failed:\n{}", self.text);
        self.text
    }

    /// Asserts that the run failed with an exit code that is not zero, without a panic, and with a
    /// message that contains all of `words`.
    ///
    /// # Panics
    ///
    /// With the program's output.
    pub fn failed_saying(self, words: &[&str]) {
        let Self { code, text } = self;
        assert!(
            code.is_some_and(|code| code != 0 && code != 101),
            "exit code {code:?}, expected an error's:\n{text}"
        );
        assert!(!text.contains("panicked"), "the program panicked:\n{text}");
        for word in words {
            assert!(text.contains(word), "the message lacks {word:?}:\n{text}");
        }
    }
}
