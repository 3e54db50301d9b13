//! The trainer's program, started as a user starts it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program's binary: `TRAINER_BIN`, else `trainer` beside the folder of this test's executable.
///
/// # Panics
///
/// If it does not exist; the message describes how to build it.
pub fn binary() -> PathBuf {
    let beside = || {
        let executable = std::env::current_exe().ok()?;
        let target = executable.parent()?.parent()?;
        Some(target.join(format!("trainer{}", std::env::consts::EXE_SUFFIX)))
    };
    let named = std::env::var_os("TRAINER_BIN").map(PathBuf::from);
    let path = named.or_else(beside).unwrap_or_default();
    assert!(
        path.is_file(),
        "{} is not there: `cargo xtask test` builds it, or `cargo build --release -p trainer`",
        path.display()
    );
    path
}

/// The output and the exit of a run of the program.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output, then standard error.
    pub text: String,
}

/// Runs the program with these arguments, without a terminal, on the CPU unless an argument selects
/// another backend.
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
    let mut command = Command::new(binary());
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
