//! Running cargo, and what cargo built.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result};

/// The exit code for a wrong command line or a backend that this machine cannot have.
pub const USAGE: u8 = 2;

/// `cargo SUB-COMMAND` on this workspace, whatever folder the user stands in.
pub fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(subcommand);
    if let Some(root) = workspace_root() {
        command.arg("--manifest-path").arg(root.join("Cargo.toml"));
    }
    forget_package(&mut command);
    quiet_display_server(&mut command);
    command
}

/// Keeps what `cargo run` told xtask of its package from the cargo that xtask starts: build scripts that watch these
/// variables (ring's) would run again, and half the program with them, whenever a user calls cargo directly.
fn forget_package(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let told = name.to_str().is_some_and(|name| {
            name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
        });
        if told {
            command.env_remove(name);
        }
    }
}

/// The folder of the workspace's Cargo.toml. `cargo run` sets CARGO_MANIFEST_DIR to the folder of xtask's own manifest.
pub fn workspace_root() -> Option<PathBuf> {
    let manifest_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR")?);
    Some(manifest_dir.parent()?.to_owned())
}

/// Where cargo puts, or will put, the release binary of this name.
///
/// xtask is built with the same profile into the same folder, so the binary lies beside xtask itself,
/// whatever `CARGO_TARGET_DIR` or the user's cargo configuration say.
pub fn binary(name: &str) -> Result<PathBuf> {
    let xtask = env::current_exe().context("cannot tell where xtask itself is")?;
    Ok(xtask.with_file_name(format!("{name}{}", env::consts::EXE_SUFFIX)))
}

/// The trainer's [`binary`].
pub fn trainer_binary() -> Result<PathBuf> {
    binary("trainer")
}

/// Gives a child process an `XDG_RUNTIME_DIR` where there is none (containers, CI): graphics
/// drivers print a warning without one, although nothing is ever drawn.
pub fn quiet_display_server(command: &mut Command) {
    if cfg!(target_os = "linux") && env::var_os("XDG_RUNTIME_DIR").is_none() {
        command.env("XDG_RUNTIME_DIR", env::temp_dir());
    }
}

/// The exit code to hand on: the child's own, or 128 + signal as a shell would say it.
pub fn exit_code(status: ExitStatus) -> u8 {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        eprintln!("xtask: ended by signal {signal}");
        return 128u8.saturating_add(u8::try_from(signal).unwrap_or(0));
    }
    status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1)
}

/// Features as cargo's `--features` takes them.
pub fn features(names: &[String]) -> [OsString; 2] {
    ["--features".into(), names.join(",").into()]
}

/// Whether LLVM 23, which the CUDA backend links, is where its build script looks
/// (tracel-llvm-bundler's
/// `llvm_path`). `None` where the lock file does not say which version that is.
pub fn llvm_is_in_place() -> Option<bool> {
    let lock = std::fs::read_to_string(workspace_root()?.join("Cargo.lock")).ok()?;
    let version = lock
        .split_once("name = \"tracel-llvm-bundler\"\nversion = \"")?
        .1
        .split_once('"')?
        .0;
    let data = if cfg!(windows) {
        PathBuf::from(env::var_os("LOCALAPPDATA")?)
    } else {
        match env::var_os("XDG_DATA_HOME") {
            Some(data) => data.into(),
            None => PathBuf::from(env::var_os("HOME")?).join(".local/share"),
        }
    };
    let folder = data.join("tracel").join(format!("tracel-llvm-{version}"));
    Some(folder.join(".tracel-llvm-installed").is_file())
}

/// What to do when a build with `cuda` fails for want of LLVM.
pub const LLVM_HINT: &str =
    "xtask: the CUDA backend links LLVM 23, which its build script downloads from GitHub.
xtask: Where that is out of reach, `.ci/llvm-for-cuda` puts the same together from Debian's packages
xtask: (as root, about a minute); the build then goes through.";
