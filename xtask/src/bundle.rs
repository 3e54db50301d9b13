//! `cargo xtask gpu-bundle`: the trainer for machines that have a GPU but no build tools.
//!
//! One compressed file with a build for CUDA, one for SPIR-V on Vulkan, one for WGSL, and `run.sh`,
//! which makes a report with each build that starts on the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use backends::Backend;
use clap::Args;

use crate::cargo::{self, LLVM_HINT, exit_code, llvm_is_in_place, trainer_binary};

/// A larger file cannot be sent.
const LARGEST: u64 = 60 << 20;

/// The cargo profile of the builds.
const PROFILE: &str = "bundle";

const RUN: &str = include_str!("bundle/run.sh");
const README: &str = include_str!("bundle/README.txt");

/// The backends, the most important first.
const BACKENDS: [Backend; 3] = [Backend::Cuda, Backend::Vulkan, Backend::Wgpu];

/// A program of the bundle.
#[derive(Debug, PartialEq)]
struct Build {
    /// The libraries that it needs; the program is in the folder named by the first entry.
    backends: Vec<Backend>,
}

impl Build {
    fn folder(&self) -> &'static str {
        self.backends[0].name()
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.backends.iter().map(|backend| backend.name()).collect();
        names.join(" and ")
    }
}

/// The contents of a bundle.
#[derive(Args, Debug, Default)]
pub struct BundleArgs {
    /// Only these of cuda, vulkan and wgpu
    #[arg(long, value_name = "BACKEND", value_delimiter = ',')]
    only: Vec<Backend>,
    /// A .tar.xz, for machines without zstd
    #[arg(long)]
    xz: bool,
    /// peft_bench.py, so that `run.sh --peft PYTHON` measures PEFT as well
    #[arg(long, value_name = "FILE")]
    peft_script: Option<PathBuf>,
    /// NVIDIA's libdevice.10.bc, for machines that have the driver and no toolkit
    #[arg(long, value_name = "FILE")]
    libdevice: Option<PathBuf>,
}

/// Builds, gathers and packs; returns the file's path.
pub fn run(args: &BundleArgs) -> Result<ExitCode> {
    match bundle(args)? {
        Ok(file) => {
            print!("{}", instructions(&file));
            Ok(ExitCode::SUCCESS)
        }
        Err(failed) => Ok(failed),
    }
}

/// The packed file, or the exit code of the step that failed.
pub fn bundle(args: &BundleArgs) -> Result<std::result::Result<PathBuf, ExitCode>> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        bail!("gpu-bundle is for Linux on x86-64; elsewhere run `cargo xtask gpu-report`");
    }
    let builds = builds(&args.only)?;
    let target = target_folder()?;
    let folder = target.join("gpu-bundle");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    for build in &builds {
        let since = Instant::now();
        if let Some(failed) = compile(build)? {
            return Ok(Err(failed));
        }
        let into = folder.join(build.folder());
        let binary = target.join(PROFILE).join("trainer");
        copy(&binary, &into.join("trainer"))?;
        for library in libraries(&binary)? {
            copy(&library, &into.join("lib").join(name(&library)?))?;
        }
        let lines = build.backends.iter().map(|backend| format!("{backend}\n"));
        write(&into.join("backends"), &lines.collect::<String>())?;
        eprintln!(
            "xtask: {}: {} MiB, {} s",
            build.names(),
            fs::metadata(&binary)?.len() >> 20,
            since.elapsed().as_secs()
        );
    }
    write(&folder.join("run.sh"), RUN)?;
    executable(&folder.join("run.sh"))?;
    write(&folder.join("README.txt"), README)?;
    if let Some(script) = &args.peft_script {
        copy(script, &folder.join("peft_bench.py"))?;
    }
    if let Some(file) = &args.libdevice {
        copy(file, &folder.join("cuda/nvvm/libdevice/libdevice.10.bc"))?;
    }
    if let Some(loader) = vulkan_loader() {
        copy(&loader, &folder.join("lib/libvulkan.so.1"))?;
    }
    let file = target_of_workspace()?.join(if args.xz {
        "gpu-bundle.tar.xz"
    } else {
        "gpu-bundle.tar.zst"
    });
    if let Some(failed) = pack(&folder, &file)? {
        return Ok(Err(failed));
    }
    let bytes = fs::metadata(&file)?.len();
    eprintln!(
        "xtask: {}: {:.1} MiB",
        file.display(),
        bytes as f64 / (1 << 20) as f64
    );
    if bytes > LARGEST {
        bail!(
            "{} is larger than {} MiB; --only leaves builds out",
            file.display(),
            LARGEST >> 20
        );
    }
    Ok(Ok(file))
}

/// The builds for the selected backends. CUDA and WGSL share one, which is smaller than two; SPIR-V
/// and WGSL cannot share one, because CubeCL compiles for only one of them.
fn builds(only: &[Backend]) -> Result<Vec<Build>> {
    for backend in only {
        if !BACKENDS.contains(backend) {
            bail!("--only {backend}: a bundle has cuda, vulkan and wgpu");
        }
    }
    let asked = |backend: &Backend| only.is_empty() || only.contains(backend);
    let of = |backends: &[Backend]| Build {
        backends: backends.iter().copied().filter(asked).collect(),
    };
    let builds = [of(&[Backend::Cuda, Backend::Wgpu]), of(&[Backend::Vulkan])];
    Ok(builds
        .into_iter()
        .filter(|build| !build.backends.is_empty())
        .collect())
}

/// `cargo build` with exactly these backends; returns cargo's exit code if it failed.
fn compile(for_these: &Build) -> Result<Option<ExitCode>> {
    eprintln!(
        "xtask: building the trainer for {}, optimised as a whole: a quarter of an hour and more on 2 cores",
        for_these.names()
    );
    let backends = for_these
        .backends
        .iter()
        .map(|backend| backend.name().to_owned());
    let features: Vec<String> = backends.chain(["autotune".to_owned()]).collect();
    let mut build = cargo::cargo("build");
    build
        .args([
            "--profile",
            PROFILE,
            "--package",
            "trainer",
            "--no-default-features",
        ])
        .args(cargo::features(&features));
    let status = build.status().context("cannot start cargo")?;
    if status.success() {
        return Ok(None);
    }
    if for_these.backends.contains(&Backend::Cuda) && llvm_is_in_place() == Some(false) {
        eprintln!("{LLVM_HINT}");
    }
    Ok(Some(ExitCode::from(exit_code(status).max(1))))
}

/// Packs `folder` with a separate program, so that xtask itself needs no C compiler.
fn pack(folder: &Path, file: &Path) -> Result<Option<ExitCode>> {
    eprintln!("xtask: packing: about a minute for each build");
    if let Some(parent) = file.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    let mut pack = cargo::cargo("run");
    pack.args(["--quiet", "--release", "--package", "pack", "--"])
        .arg(folder)
        .arg(file);
    let status = pack.status().context("cannot start cargo")?;
    Ok((!status.success()).then(|| ExitCode::from(exit_code(status).max(1))))
}

/// The commands that unpack and run the file, with and without zstd.
fn instructions(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().display();
    let unpack = if file.extension().is_some_and(|extension| extension == "zst") {
        format!(
            "  tar --zstd -xf {name}\n  \
         python3 -c 'import tarfile; tarfile.open(\"{name}\").extractall()'     (Python 3.14, where there is no zstd; \
         or make a .tar.xz with --xz)\n"
        )
    } else {
        format!(
            "  tar -xJf {name}\n  \
         python3 -c 'import tarfile; tarfile.open(\"{name}\").extractall()'     (where there is no xz)\n"
        )
    };
    format!(
        "{}\nOn the machine with the GPU, in an empty folder:\n{unpack}  ./run.sh\n",
        file.display()
    )
}

/// The shared libraries that a program needs and that are not part of every Linux.
fn libraries(binary: &Path) -> Result<Vec<PathBuf>> {
    let ldd = Command::new("ldd").arg(binary).output();
    let ldd = ldd.context("cannot start ldd")?;
    Ok(beyond_the_c_library(&String::from_utf8_lossy(&ldd.stdout)))
}

/// The paths in `ldd`'s output, except those of the C library itself, which must be the machine's
/// own.
fn beyond_the_c_library(ldd: &str) -> Vec<PathBuf> {
    let own = [
        "libc.",
        "libm.",
        "libdl.",
        "libpthread.",
        "librt.",
        "ld-linux",
        "linux-vdso",
    ];
    let lines = ldd
        .lines()
        .filter_map(|line| line.trim().split_once(" => "));
    let others = lines.filter(|(name, _)| !own.iter().any(|own| name.starts_with(own)));
    let paths = others.filter_map(|(_, path)| path.split_once(" (").map(|(path, _)| path));
    paths
        .filter(|path| path.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

/// Vulkan's loader of this machine, for machines that have a driver but no loader.
fn vulkan_loader() -> Option<PathBuf> {
    let folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"];
    let paths = folders.map(|folder| Path::new(folder).join("libvulkan.so.1"));
    paths.into_iter().find(|path| path.is_file())
}

/// Cargo's target folder: xtask is in its `release`.
fn target_folder() -> Result<PathBuf> {
    let binary = trainer_binary()?;
    let target = binary.parent().and_then(Path::parent);
    Ok(target
        .context("cannot tell cargo's target folder")?
        .to_owned())
}

/// `target` of this workspace, whatever `CARGO_TARGET_DIR` is: the place where users look for the
/// file.
pub fn target_of_workspace() -> Result<PathBuf> {
    let root = cargo::workspace_root().context("start it with `cargo xtask`")?;
    Ok(root.join("target"))
}

fn name(path: &Path) -> Result<&std::ffi::OsStr> {
    path.file_name()
        .with_context(|| format!("{} has no name", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(unix)]
fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot change {}", path.display()))
}

#[cfg(not(unix))]
fn executable(_path: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_comes_first_and_only_gpu_builds_are_bundled() {
        let of = |only: &[Backend]| {
            let builds = builds(only).unwrap();
            builds.iter().map(Build::names).collect::<Vec<_>>()
        };
        assert_eq!(of(&[]), ["cuda and wgpu", "vulkan"]);
        assert_eq!(of(&[Backend::Wgpu, Backend::Cuda]), ["cuda and wgpu"]);
        assert_eq!(of(&[Backend::Vulkan, Backend::Wgpu]), ["wgpu", "vulkan"]);
        assert!(builds(&[Backend::Metal]).is_err());
    }

    #[test]
    fn the_c_library_stays_behind_and_the_others_come_along() {
        let ldd = "\tlinux-vdso.so.1 (0x1)\n\tlibzstd.so.1 => /lib/x/libzstd.so.1 (0x2)\n\tlibgone.so => not found\n\
                   \tlibm.so.6 => /lib/x/libm.so.6 (0x3)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x4)\n\
                   \tlibgcc_s.so.1 => /lib/x/libgcc_s.so.1 (0x5)\n\t/lib64/ld-linux-x86-64.so.2 (0x6)\n";
        let expected = ["/lib/x/libzstd.so.1", "/lib/x/libgcc_s.so.1"].map(PathBuf::from);
        assert_eq!(beyond_the_c_library(ldd), expected);
    }

    #[test]
    fn there_is_a_way_to_unpack_without_the_compressors_program() {
        for name in ["gpu-bundle.tar.zst", "gpu-bundle.tar.xz"] {
            let text = instructions(Path::new(name));
            assert!(text.contains("python3") && text.contains(name) && text.contains("./run.sh"));
        }
    }

    #[cfg(unix)]
    #[test]
    fn run_sh_is_a_script_that_says_what_it_takes_and_refuses_the_rest() {
        let folder = std::env::temp_dir().join(format!("gpu-bundle-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let script = folder.join("run.sh");
        write(&script, RUN).unwrap();
        let output = folder.join("results");
        let sh = |args: &[&str]| Command::new("sh").arg(&script).args(args).output().unwrap();
        let help = sh(&["--help"]);
        let text = String::from_utf8_lossy(&help.stdout).into_owned();
        for option in ["--seconds", "--output", "--quick", "--peft"] {
            assert!(text.contains(option), "{text}");
        }
        assert_eq!(sh(&["--fast"]).status.code(), Some(2));
        assert_eq!(sh(&["--seconds", "soon"]).status.code(), Some(2));
        // A folder without builds.
        let empty = sh(&["--output", output.to_str().unwrap()]);
        assert_eq!(empty.status.code(), Some(1));
        let summary = fs::read_to_string(output.join("summary.txt")).unwrap();
        assert!(summary.contains("there is no build"), "{summary}");
        fs::remove_dir_all(&folder).unwrap();
    }
}
