//! `cargo xtask gpu-offline`: the GPU kernels compiled for real GPUs, on a machine without one.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::cargo::{self, LLVM_HINT, exit_code, llvm_is_in_place, workspace_root};
use crate::interop::last_line_of;

/// Installs NVIDIA's tools, builds the program and runs it; `arguments` go to the program.
pub fn run(arguments: &[OsString]) -> Result<u8> {
    let setup = workspace_root()
        .context("cannot tell where the workspace is; run it as `cargo xtask gpu-offline`")?
        .join("crates/gpu-offline/setup");
    let tools = last_line_of(&setup)?;

    if llvm_is_in_place() == Some(false) {
        eprintln!("{LLVM_HINT}");
    }
    let mut build = cargo::cargo("build");
    build.args([
        "--release",
        "--package",
        "gpu-offline",
        "--features",
        "gpu-offline/compilers",
    ]);
    let status = build.status().context("cannot start cargo")?;
    if !status.success() {
        return Ok(exit_code(status));
    }

    let mut program = Command::new(cargo::binary("gpu-offline")?);
    program
        .arg("--tools")
        .arg(&tools)
        .args(arguments)
        // Where CubeCL looks for NVIDIA's mathematical functions.
        .env("CUDA_PATH", tools.join("cuda_nvcc"));
    let status = program.status().context("cannot start gpu-offline")?;
    Ok(exit_code(status))
}

/// As [`run`], as a command of xtask.
pub fn command(arguments: &[OsString]) -> Result<ExitCode> {
    run(arguments).map(ExitCode::from)
}
