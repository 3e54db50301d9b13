//! `cargo xtask ci`: everything that a change has to pass, in one command, here as in CI.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use backends::Backend;

use crate::bundle::{self, BundleArgs};
use crate::cargo::{self, LLVM_HINT, exit_code, llvm_is_in_place};
use crate::detect::Machine;
use crate::test::{self, Totals};
use crate::{gpu_offline, gpu_report, interop};

/// Formatting, lints and types of every backend, documentation, tests, interop tests; stops at the
/// first that fails.
///
/// The GPU backends are compiled twice at most: once as metadata for clippy and rustdoc, which
/// share it, with every backend that this platform has, and once to run, with `wgpu`. Clippy is a
/// `cargo check` that also warns, so the CUDA, SPIR-V and MSL code is checked there and needs no
/// pass of its own.
///
/// `full` adds the processors and the GPUs that this machine does not have, and the GPU bundle: its
/// builds, each optimised as a whole, and its script on the software driver.
pub fn run(full: bool) -> Result<ExitCode> {
    let started = Instant::now();
    let mut format = cargo::cargo("fmt");
    format.args(["--all", "--", "--check"]);
    if let Some(code) = step("formatting", &mut format)? {
        eprintln!("xtask: `cargo fmt --all` puts it right");
        return Ok(code);
    }

    let backends = checked_backends()?;
    let features = features(&backends);
    let mut clippy = cargo::cargo("clippy");
    clippy
        .args(["--release", "--workspace", "--all-targets"])
        .args(cargo::features(&features))
        .args(["--", "--deny", "warnings"]);
    let names: Vec<_> = backends.iter().map(|backend| backend.name()).collect();
    let heading = format!("lints and types, with {}", names.join(", "));
    if let Some(code) = step(&heading, &mut clippy)? {
        return Ok(code);
    }

    let mut docs = cargo::cargo("doc");
    docs.args(["--release", "--workspace", "--no-deps"])
        .args(cargo::features(&features))
        .env("RUSTDOCFLAGS", "--deny warnings");
    if let Some(code) = step("documentation", &mut docs)? {
        return Ok(code);
    }

    announce("tests");
    let since = Instant::now();
    let mut totals = Totals::default();
    let mut code = test::run_all(&[], &mut totals)?;
    eprintln!("xtask: tests took {}", clock(since.elapsed()));
    if code == 0 {
        announce("interop: transformers, PEFT, llama.cpp");
        let since = Instant::now();
        code = interop::run_and_count(&[], &mut totals)?;
        eprintln!("xtask: interop tests took {}", clock(since.elapsed()));
    }
    if code == 0 && Machine::ask().has_wgpu() {
        code = timed("GPU report on the software driver", gpu_report::quick)?;
    }
    if code == 0 && full {
        code = timed("other processors", || other_processors(&mut totals))?;
    }
    if code == 0 && full {
        code = timed("matrix units of a software driver", || {
            matrix_units(&mut totals)
        })?;
    }
    if code == 0 && full {
        let name = "GPU kernels compiled for GPUs that are not here";
        code = timed(name, || {
            gpu_offline::run(&["--for=cuda,nvrtc,spirv".into()])
        })?;
    }
    if code == 0 && full {
        code = timed(
            "GPU bundle, and its script on the software driver",
            || match bundle::bundle(&BundleArgs::default())? {
                Ok(file) => gpu_report::bundle(&file),
                Err(_) => Ok(1),
            },
        )?;
    }
    eprintln!("xtask: everything took {}", clock(started.elapsed()));
    totals.print();
    Ok(ExitCode::from(code))
}

/// `.ci/other-processors`: x86-64 without AVX-512 and aarch64 under qemu, Windows checked.
///
/// The script installs Debian packages. Outside CI that is not xtask's decision.
fn other_processors(totals: &mut Totals) -> Result<u8> {
    script("other-processors", "qemu and cross compilers", totals)
}

/// `.ci/matrix-units`: the GPU kernels on a software driver with cooperative matrices.
fn matrix_units(totals: &mut Totals) -> Result<u8> {
    script("matrix-units", "a newer Debian in a folder", totals)
}

/// Runs a script of `.ci` that installs something.
fn script(name: &str, installs: &str, totals: &mut Totals) -> Result<u8> {
    if !test::in_ci() {
        eprintln!(
            "xtask: NOT CHECKED: {name}. With CI=true, as root on Debian: installs {installs}"
        );
        return Ok(0);
    }
    let root =
        cargo::workspace_root().context("`cargo xtask` runs it, which names the workspace")?;
    let mut script = Command::new(root.join(".ci").join(name));
    script
        .args(test::packages(Machine::ask().has_wgpu()))
        .env("TRAINER_BIN", cargo::trainer_binary()?);
    test::run_and_count(&mut script, totals)
}

/// The GPU backends to check: all that this platform can build.
fn checked_backends() -> Result<Vec<Backend>> {
    let cuda = match llvm_is_in_place() {
        Some(false) if test::in_ci() => {
            eprintln!("{LLVM_HINT}");
            bail!("CI has to check the CUDA code, and LLVM 23 is not in place")
        }
        Some(false) => {
            eprintln!("xtask: NOT CHECKED: the CUDA code, because LLVM 23 is not in place");
            eprintln!("{LLVM_HINT}");
            false
        }
        _ => true,
    };
    Ok(Backend::ALL
        .into_iter()
        .filter(|backend| backend.feature().is_some())
        .filter(|backend| backend.missing_on_this_platform().is_none())
        .filter(|&backend| backend != Backend::Cuda || cuda)
        .collect())
}

/// Their features, as the workspace's packages name them.
fn features(backends: &[Backend]) -> Vec<String> {
    // What compiles kernels without a GPU links LLVM, as the CUDA backend does.
    let compilers = backends
        .contains(&Backend::Cuda)
        .then(|| "gpu-offline/compilers".to_owned());
    backends
        .iter()
        .flat_map(|backend| ["trainer", "tests"].map(|package| format!("{package}/{backend}")))
        .chain(["trainer/autotune".to_owned()])
        .chain(compilers)
        .collect()
}

/// Runs one step under a heading; an exit code if it failed.
fn step(name: &str, command: &mut Command) -> Result<Option<ExitCode>> {
    announce(name);
    let since = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("cannot start cargo for {name}"))?;
    let took = clock(since.elapsed());
    if status.success() {
        eprintln!("xtask: {name}: passed in {took}");
        return Ok(None);
    }
    eprintln!("xtask: {name}: FAILED after {took}");
    Ok(Some(ExitCode::from(exit_code(status).max(1))))
}

/// Runs a part that returns an exit code of its own, and prints how long it took.
fn timed(name: &str, part: impl FnOnce() -> Result<u8>) -> Result<u8> {
    announce(name);
    let since = Instant::now();
    let code = part()?;
    eprintln!("xtask: {name} took {}", clock(since.elapsed()));
    Ok(code)
}

fn announce(name: &str) {
    eprintln!("\nxtask: ──── {name} ────");
}

/// `12 min 05 s`
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{} min {:02} s", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_is_a_feature_of_both_packages() {
        assert_eq!(
            features(&[Backend::Wgpu]),
            ["trainer/wgpu", "tests/wgpu", "trainer/autotune"]
        );
        let compilers = "gpu-offline/compilers".to_owned();
        assert!(features(&[Backend::Cuda]).contains(&compilers));
    }

    #[test]
    fn a_duration_reads_as_minutes_and_seconds() {
        assert_eq!(clock(Duration::from_secs(725)), "12 min 05 s");
        assert_eq!(clock(Duration::from_millis(900)), "0 min 00 s");
    }
}
