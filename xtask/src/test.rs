//! `cargo xtask test`: every test, on every backend that can run on this machine.

use std::env;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::cargo::{self, exit_code, trainer_binary};
use crate::ci::clock;
use crate::detect::Machine;

/// Whether a missing requirement is a failure rather than a skip.
pub fn in_ci() -> bool {
    env::var("CI").is_ok_and(|ci| ci == "true" || ci == "1")
}

/// Builds and runs the tests of all crates; `filter` goes to cargo's test harness.
pub fn run(filter: Vec<OsString>) -> Result<ExitCode> {
    let mut totals = Totals::default();
    let code = run_all(&filter, &mut totals)?;
    totals.print();
    Ok(ExitCode::from(code))
}

/// As [`run`], adding the tests' numbers to `totals` and without a closing line.
///
/// `cargo build --all-targets` and `cargo test` name the same profile, packages and features, so
/// the libraries, the tests and the trainer's binary that the end-to-end tests start come from one
/// build of Burn.
pub fn run_all(filter: &[OsString], totals: &mut Totals) -> Result<u8> {
    let machine = Machine::ask();
    let wgpu = machine.has_wgpu();
    if in_ci() && !wgpu {
        bail!(
            "CI has to run the wgpu tests, and no Vulkan driver answers: install \
             mesa-vulkan-drivers"
        );
    }
    let adapter = match machine.gpu().or(machine.vulkan.first()) {
        Some(adapter) if adapter.software => format!("{} (software)", adapter.name),
        Some(adapter) => adapter.name.clone(),
        None => "the platform's own graphics API".to_owned(),
    };
    if wgpu {
        eprintln!("xtask: testing the CPU and wgpu on {adapter}");
    } else {
        eprintln!("{}", without_wgpu());
    }

    let mut build = cargo::cargo("build");
    build
        .args(["--release", "--all-targets"])
        .args(packages(wgpu));
    let since = Instant::now();
    let status = build.status().context("cannot start cargo")?;
    if !status.success() {
        return Ok(exit_code(status));
    }
    eprintln!("xtask: building the tests took {}", clock(since.elapsed()));

    // xtask's own tests run separately: a build of the whole workspace would replace the running
    // xtask.
    let mut own = cargo::cargo("test");
    own.args(["--release", "--package", "xtask"]);
    let mut tests = cargo::cargo("test");
    tests
        .args(["--release", "--no-fail-fast"])
        .args(packages(wgpu))
        .env("TRAINER_BIN", trainer_binary()?);
    if wgpu && in_ci() {
        tests.env("LORA_REQUIRE_WGPU", "1");
    }
    let mut worst = 0;
    for mut suite in [own, tests] {
        suite.arg("--").args(filter);
        if std::io::stdout().is_terminal() {
            suite.args(["--color", "always"]);
        }
        worst = worst.max(run_and_count(&mut suite, totals)?);
    }
    if !wgpu {
        eprintln!("{}", without_wgpu());
    }
    Ok(worst)
}

/// The packages and features of every cargo command of the tests.
pub fn packages(wgpu: bool) -> Vec<OsString> {
    let mut args: Vec<OsString> = ["--workspace", "--exclude", "xtask"]
        .map(Into::into)
        .to_vec();
    if wgpu {
        args.extend(cargo::features(
            &["trainer/wgpu", "tests/wgpu"].map(str::to_owned),
        ));
    }
    args
}

fn without_wgpu() -> &'static str {
    "xtask: ************************************************************************\n\
     xtask: NOT TESTED: everything that runs on a GPU. No Vulkan driver answers here.\n\
     xtask: On Debian or Ubuntu: apt install mesa-vulkan-drivers (a software driver).\n\
     xtask: ************************************************************************"
}

/// Sums of libtest's summary lines; the interop tests write such a line too.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Totals {
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Totals {
    /// The last line of a log, in a form that programs can read.
    pub fn print(&self) {
        println!(
            "\n{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.ignored
        );
    }

    /// Adds a line such as `test result: ok. 12 passed; 0 failed; 1 ignored; …`; other lines are
    /// ignored.
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line.split_once("test result: ") else {
            return;
        };
        for part in counts.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(Ok(count)), Some(what)) =
                (words.next().map(str::parse::<usize>), words.next())
            else {
                continue;
            };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }
}

/// Runs a test command, shows its output while it runs, and returns its exit code.
pub fn run_and_count(command: &mut Command, totals: &mut Totals) -> Result<u8> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let output = child.stdout.take().context("the tests have no output")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read the tests' output")?;
        totals.add(&String::from_utf8_lossy(&line));
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(&line)?;
        stdout.write_all(b"\n")?;
    }
    Ok(exit_code(
        child.wait().context("cannot wait for the tests")?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_lines_of_several_binaries_add_up() {
        let mut totals = Totals::default();
        totals.add("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out");
        totals.add(
            "test result: \u{1b}[31mFAILED\u{1b}[m. 4 passed; 2 failed; 0 ignored; 0 measured",
        );
        totals.add("test frozen::passes ... ok");
        assert_eq!(
            totals,
            Totals {
                passed: 16,
                failed: 2,
                ignored: 1
            }
        );
    }

    #[test]
    fn without_an_adapter_no_gpu_feature_is_built() {
        assert_eq!(packages(false), ["--workspace", "--exclude", "xtask"]);
        assert!(
            packages(true)
                .iter()
                .any(|arg| arg == "trainer/wgpu,tests/wgpu")
        );
    }
}
