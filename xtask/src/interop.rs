//! `cargo xtask interop`: transformers, PEFT and llama.cpp load this trainer's files, and the
//! trainer loads theirs.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, exit_code, trainer_binary, workspace_root};
use crate::detect::Machine;
use crate::test::{self, Totals};

/// Creates the Python environment, builds the trainer and runs pytest; `arguments` go to pytest.
pub fn run(arguments: Vec<OsString>) -> Result<ExitCode> {
    let mut totals = Totals::default();
    let code = run_and_count(&arguments, &mut totals)?;
    totals.print();
    Ok(ExitCode::from(code))
}

/// As [`run`], adding the tests' numbers to `totals` and without a closing line.
pub fn run_and_count(arguments: &[OsString], totals: &mut Totals) -> Result<u8> {
    let folder = workspace_root()
        .context("cannot tell where the workspace is; run it as `cargo xtask interop`")?
        .join("tests/interop");
    let python = set_up(&folder.join("setup"))?;

    // The tests' packages and features, so that Burn is not compiled again.
    let mut build = cargo::cargo("build");
    build
        .args(["--release", "--bin", "trainer"])
        .args(test::packages(Machine::ask().has_wgpu()));
    let status = build.status().context("cannot start cargo")?;
    if !status.success() {
        return Ok(exit_code(status));
    }

    let mut pytest = Command::new(python);
    pytest
        .args(["-m", "pytest"])
        .args(arguments)
        .current_dir(&folder)
        .env("TRAINER_BIN", trainer_binary()?)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    test::run_and_count(&mut pytest, totals)
}

/// Runs the setup script, whose last line is the environment's Python.
fn set_up(script: &Path) -> Result<PathBuf> {
    if cfg!(windows) && env::var_os("LORA_INTEROP_PYTHON").is_none() {
        bail!("the setup script needs a Unix shell; name a Python in LORA_INTEROP_PYTHON");
    }
    if let Some(python) = env::var_os("LORA_INTEROP_PYTHON") {
        return Ok(python.into());
    }
    last_line_of(script)
}

/// Runs a setup script. The last line that it prints is a path.
pub fn last_line_of(script: &Path) -> Result<PathBuf> {
    let output = Command::new(script)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", script.display()))?;
    if !output.status.success() {
        bail!("{} failed; its messages are above", script.display());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    last_line(&text)
        .map(PathBuf::from)
        .with_context(|| format!("{} printed no path", script.display()))
}

fn last_line(text: &str) -> Option<&str> {
    text.lines().rev().find(|line| !line.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_that_says_something_is_the_python() {
        assert_eq!(
            last_line("a\n/venv/bin/python\n\n"),
            Some("/venv/bin/python")
        );
        assert_eq!(last_line("\n"), None);
    }
}
