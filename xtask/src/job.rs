//! Building a program with the backend asked for, and running it with the user's own arguments.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use backends::Backend;

use crate::cargo::{self, LLVM_HINT, exit_code, llvm_is_in_place};
use crate::detect::Machine;
use crate::program::{PACKAGES, Program, asks_for_help};

/// One build of a program and the arguments of the run that follows it.
#[derive(Debug, PartialEq, Eq)]
struct Job {
    program: Program,
    features: Vec<String>,
    args: Vec<OsString>,
}

/// Runs a program on one backend: the one that `--backend` (or the benchmark's name for it,
/// `--device`) in `args` names, else `default`.
pub fn run(program: Program, args: Vec<OsString>, default: Backend) -> Result<ExitCode> {
    if asks_for_help(&args) {
        return program.help();
    }
    config_exists(&args)?;
    let asked = match backend_of(&args)? {
        Some(word) => word.parse()?,
        None => default,
    };
    let machine = Machine::ask();
    let backend = match asked {
        Backend::Auto => {
            let (backend, why) = machine.auto();
            eprintln!("xtask: backend {backend} ({why})");
            backend
        }
        named => named,
    };
    if let Some(why) = backend.missing_on_this_platform() {
        bail!(
            "--backend {backend}: {why}; this platform has {}",
            Backend::on_this_platform()
        );
    }
    if let Some(why) = machine.missing(backend) {
        bail!("--backend {backend}: {why}");
    }
    let job = Job {
        program,
        features: as_asked(features(&[backend], &machine), &args),
        args,
    };
    match job.build()? {
        Some(failed) => Ok(failed),
        None => job.replace_this_process(),
    }
}

/// The features, without tuning where the arguments say so.
fn as_asked(mut features: Vec<String>, args: &[OsString]) -> Vec<String> {
    if args.iter().any(|argument| argument == UNTUNED) {
        features.retain(|feature| feature != AUTOTUNE);
    }
    features
}

/// The feature of builds that time several kernels for each shape, and the trainer's flag for those that must not:
/// there is no such switch at run time, so the flag is answered here with another build.
const AUTOTUNE: &str = "autotune";
const UNTUNED: &str = "--no-autotune";

/// Runs the parity program on every backend that `--backends` lists, in as many builds as they need.
pub fn parity(args: Vec<OsString>) -> Result<ExitCode> {
    if asks_for_help(&args) {
        return Program::Parity.help();
    }
    let machine = Machine::ask();
    let jobs = parity_jobs(args, &machine)?;
    if let [job] = jobs.as_slice() {
        return match job.build()? {
            Some(failed) => Ok(failed),
            None => job.replace_this_process(),
        };
    }
    eprintln!(
        "xtask: WGSL and the native shaders (SPIR-V, MSL) cannot share a build, so each is \
         compared with the CPU in a run of its own"
    );
    let mut worst = 0;
    for job in &jobs {
        if let Some(failed) = job.build()? {
            return Ok(failed);
        }
        let status = job.program.command(&job.args)?.status();
        worst = worst.max(exit_code(
            status.context("cannot start the parity program")?,
        ));
    }
    Ok(ExitCode::from(worst))
}

/// Splits `--backends` into builds.
///
/// A build that has `vulkan` (or `metal`) compiles every kernel for that graphics API to SPIR-V
/// (MSL), on the device that `wgpu` means as well: cubecl-wgpu's `AutoCompiler` goes by what was
/// compiled in. `wgpu` therefore gets a build without them. The CPU is in each build and is what
/// all are compared with.
fn parity_jobs(args: Vec<OsString>, machine: &Machine) -> Result<Vec<Job>> {
    let Some(list) = value_of(&args, "--backends")? else {
        return Ok(vec![Job {
            program: Program::Parity,
            features: Vec::new(),
            args,
        }]);
    };
    let mut backends = Vec::new();
    for word in list.split(',').filter(|word| !word.is_empty()) {
        let backend = match word.trim().parse()? {
            Backend::Auto => machine.auto().0,
            named => named,
        };
        if !backends.contains(&backend) {
            backends.push(backend);
        }
    }
    // What is not on this machine stays in the arguments: the program prints a line for it.
    let buildable = |backend: Backend| {
        backend.missing_on_this_platform().is_none() && machine.missing(backend).is_none()
    };
    let present: Vec<_> = backends.iter().copied().filter(|&b| buildable(b)).collect();
    let native = |&backend: &Backend| matches!(backend, Backend::Vulkan | Backend::Metal);
    if !(present.contains(&Backend::Wgpu) && present.iter().any(native)) {
        return Ok(vec![Job {
            program: Program::Parity,
            features: features(&present, machine),
            args,
        }]);
    }
    let (second, mut first): (Vec<_>, Vec<_>) = backends
        .into_iter()
        .partition(|b| native(b) && buildable(*b));
    if !first.contains(&Backend::Cpu) {
        first.insert(0, Backend::Cpu);
    }
    let second = [vec![Backend::Cpu], second].concat();
    Ok([first, second]
        .map(|group| Job {
            program: Program::Parity,
            features: features(
                &group
                    .iter()
                    .copied()
                    .filter(|&b| buildable(b))
                    .collect::<Vec<_>>(),
                machine,
            ),
            args: with_backends(&args, &group),
        })
        .into())
}

/// The programs' cargo features for `backends`.
///
/// `autotune` times several kernels for each new shape and keeps the fastest. CubeCL has no switch
/// for it at run time (`CUBECL_AUTOTUNE_LEVEL` only sets how many candidates there are, never
/// none), so it is decided here: a real GPU earns it back within seconds, a software adapter
/// compiles giant candidates for minutes. The tests are built without it, which also makes them
/// repeatable.
fn features(backends: &[Backend], machine: &Machine) -> Vec<String> {
    let gpus: Vec<_> = backends
        .iter()
        .copied()
        .filter(|b| b.feature().is_some())
        .collect();
    let mut names: Vec<_> = gpus
        .iter()
        .filter_map(|backend| backend.feature())
        .map(str::to_owned)
        .collect();
    if !gpus.is_empty() && gpus.iter().all(|&backend| machine.is_hardware(backend)) {
        names.push(AUTOTUNE.to_owned());
    }
    names
}

impl Job {
    /// `cargo build` of the program with this job's features; cargo's exit code if it failed.
    fn build(&self) -> Result<Option<ExitCode>> {
        let what = if self.features.is_empty() {
            "for the CPU".to_owned()
        } else {
            format!("for the CPU and {}", self.features.join(", "))
        };
        let patience = match (self.program.binary()?.exists(), self.features.is_empty()) {
            (true, _) => "what is built already is kept",
            (false, true) => "the first build takes about ten minutes, later ones seconds",
            (false, false) => {
                "the first build compiles Burn's GPU kernels: about 15 minutes on 2 cores, 3 on \
                 16; later ones take seconds"
            }
        };
        let program = self.program.called();
        eprintln!("xtask: building {program} {what} ({patience})");
        let status = self.cargo_build().status().context("cannot start cargo")?;
        if status.success() {
            return Ok(None);
        }
        if self.features.iter().any(|f| f == "cuda") && llvm_is_in_place() == Some(false) {
            eprintln!("{LLVM_HINT}");
        }
        eprintln!("xtask: {program} was not built; cargo's messages are above");
        Ok(Some(ExitCode::from(exit_code(status))))
    }

    fn cargo_build(&self) -> Command {
        let mut build = cargo::cargo("build");
        build.args(["--release", "--bin", self.program.name()]);
        build.arg("--no-default-features");
        for package in PACKAGES {
            build.args(["--package", package]);
        }
        if !self.features.is_empty() {
            // One package's suffice: all programs share the crate `device`, which they lead to.
            let features = self.features.iter().map(|name| format!("trainer/{name}"));
            build.args(cargo::features(&features.collect::<Vec<_>>()));
        }
        build
    }

    /// Becomes the program, so that Ctrl-C, signals and the exit code are its own. Windows has no
    /// such call: there xtask waits and hands the exit code on.
    fn replace_this_process(&self) -> Result<ExitCode> {
        let mut command = self.program.command(&self.args)?;
        #[cfg(unix)]
        {
            let error = std::os::unix::process::CommandExt::exec(&mut command);
            Err(error).with_context(|| format!("cannot start {}", self.program.called()))
        }
        #[cfg(not(unix))]
        {
            let status = command.status();
            let status =
                status.with_context(|| format!("cannot start {}", self.program.called()))?;
            Ok(ExitCode::from(exit_code(status)))
        }
    }
}

/// The word that names the backend.
fn backend_of(args: &[OsString]) -> Result<Option<String>> {
    match value_of(args, "--backend")? {
        Some(word) => Ok(Some(word)),
        None => value_of(args, "--device"),
    }
}

/// The value of `--flag VALUE` or `--flag=VALUE`; the last one where there are several.
fn value_of(args: &[OsString], flag: &str) -> Result<Option<String>> {
    let mut value = None;
    let mut rest = args.iter().map(OsString::as_os_str);
    while let Some(arg) = rest.next() {
        let found = if arg == OsStr::new(flag) {
            match rest.next() {
                Some(next) => next,
                None => bail!("{flag} wants a value"),
            }
        } else {
            match arg
                .to_str()
                .and_then(|arg| arg.strip_prefix(flag)?.strip_prefix('='))
            {
                Some(inline) => OsStr::new(inline),
                None => continue,
            }
        };
        match found.to_str() {
            Some(text) => value = Some(text.to_owned()),
            None => bail!("{flag}: {found:?} is not readable text"),
        }
    }
    Ok(value)
}

/// `args` with the value of `--backends` replaced.
fn with_backends(args: &[OsString], backends: &[Backend]) -> Vec<OsString> {
    let names = backends
        .iter()
        .map(|b| b.name())
        .collect::<Vec<_>>()
        .join(",");
    let mut replaced: Vec<OsString> = Vec::with_capacity(args.len());
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--backends" {
            rest.next();
        } else if !arg
            .to_str()
            .is_some_and(|arg| arg.starts_with("--backends="))
        {
            replaced.push(arg.clone());
        }
    }
    replaced.extend(["--backends".into(), names.into()]);
    replaced
}

/// A mistyped path should not cost a build: reports it before cargo starts.
fn config_exists(args: &[OsString]) -> Result<()> {
    match value_of(args, "--config")? {
        Some(path) if !Path::new(&path).exists() => {
            bail!("--config {path}: there is no such file; `configs/` holds commented examples")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::Adapter;

    fn os(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    fn machine(cuda_devices: usize, software: &[bool]) -> Machine {
        Machine {
            cuda_devices,
            cuda_toolkit: true,
            vulkan: software
                .iter()
                .map(|&software| Adapter {
                    name: "adapter".to_owned(),
                    software,
                })
                .collect(),
            trouble: None,
        }
    }

    #[test]
    fn every_program_is_built_with_the_packages_of_all_so_that_burn_is_compiled_once() {
        let arguments = |program, features: &[&str]| {
            let job = Job {
                program,
                features: features.iter().map(|&name| name.to_owned()).collect(),
                args: Vec::new(),
            };
            let build = job.cargo_build();
            let arguments = build.get_args().map(|it| it.display().to_string());
            arguments.collect::<Vec<_>>().join(" ")
        };
        let packages = "--package trainer --package bench --package parity --package make-assets";
        for program in [Program::Trainer("train"), Program::Bench, Program::Parity] {
            let text = arguments(program, &["cuda", "autotune"]);
            assert!(text.contains(packages), "{text}");
            assert!(
                text.contains(&format!("--bin {}", program.name())),
                "{text}"
            );
            assert!(
                text.ends_with("--features trainer/cuda,trainer/autotune"),
                "{text}"
            );
        }
        assert!(!arguments(Program::MakeAssets, &[]).contains("--features"));
    }

    #[test]
    fn a_flag_is_read_in_both_spellings() {
        let args = os(&["--set", "a=1", "--backend", "cpu", "--backend=wgpu"]);
        assert_eq!(
            value_of(&args, "--backend").unwrap().as_deref(),
            Some("wgpu")
        );
        assert_eq!(value_of(&args, "--config").unwrap(), None);
        assert!(value_of(&os(&["--backend"]), "--backend").is_err());
        assert_eq!(
            value_of(&os(&["--backends=cpu"]), "--backend").unwrap(),
            None
        );
    }

    #[test]
    fn the_benchmark_may_call_the_backend_a_device() {
        let backend = |args| backend_of(&os(args)).unwrap();
        assert_eq!(backend(&["--device", "cuda"]).as_deref(), Some("cuda"));
        assert_eq!(backend(&["--backend=cpu"]).as_deref(), Some("cpu"));
        assert_eq!(backend(&["--quick"]), None);
    }

    #[test]
    fn autotune_is_for_real_hardware_only() {
        assert_eq!(features(&[Backend::Cpu], &machine(1, &[false])), [""; 0]);
        assert_eq!(features(&[Backend::Wgpu], &machine(0, &[true])), ["wgpu"]);
        assert_eq!(
            features(&[Backend::Cuda], &machine(1, &[])),
            ["cuda", "autotune"]
        );
        let both = [Backend::Cpu, Backend::Cuda, Backend::Wgpu];
        assert_eq!(features(&both, &machine(1, &[true])), ["cuda", "wgpu"]);
    }

    #[test]
    fn a_build_without_tuning_is_made_where_it_is_asked_for() {
        let machine = machine(1, &[]);
        let features = |args: &[&str]| as_asked(features(&[Backend::Cuda], &machine), &os(args));
        assert_eq!(features(&["--set", "seed=1"]), ["cuda", "autotune"]);
        assert_eq!(features(&["--no-autotune"]), ["cuda"]);
    }

    #[test]
    fn parity_without_backends_is_a_build_for_the_cpu() {
        let args = os(&["--reference", "fixtures"]);
        let jobs = parity_jobs(args.clone(), &machine(1, &[false])).unwrap();
        assert_eq!(
            jobs,
            [Job {
                program: Program::Parity,
                features: Vec::new(),
                args
            }]
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn parity_builds_only_what_this_machine_can_run_and_keeps_the_arguments() {
        let args = os(&["--backends", "cpu,wgpu,vulkan,cuda,metal"]);
        let jobs = parity_jobs(args.clone(), &machine(0, &[true])).unwrap();
        let features = vec!["wgpu".to_owned()];
        let program = Program::Parity;
        assert_eq!(
            jobs,
            [Job {
                program,
                features,
                args
            }]
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn parity_gives_wgsl_and_spirv_a_build_each() {
        let args = os(&["--backends=cpu,wgpu,vulkan,cuda", "--reference", "r"]);
        let jobs = parity_jobs(args, &machine(1, &[false])).unwrap();
        assert_eq!(jobs.len(), 2);
        assert_eq!(jobs[0].features, ["wgpu", "cuda", "autotune"]);
        assert_eq!(
            jobs[0].args,
            os(&["--reference", "r", "--backends", "cpu,wgpu,cuda"])
        );
        assert_eq!(jobs[1].features, ["vulkan", "autotune"]);
        assert_eq!(
            jobs[1].args,
            os(&["--reference", "r", "--backends", "cpu,vulkan"])
        );
    }

    #[test]
    fn a_backend_unknown_to_parity_is_an_error() {
        assert!(parity_jobs(os(&["--backends", "cpu,opencl"]), &machine(0, &[])).is_err());
    }

    #[test]
    fn a_missing_config_is_noticed_before_the_build() {
        let error = config_exists(&os(&["--config", "no/such.toml"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("no/such.toml"), "{error}");
    }
}
