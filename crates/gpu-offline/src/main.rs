//! Compiles every GPU kernel for NVIDIA's GPUs and for Vulkan, without a GPU, and prints what became of it.

mod cases;
mod cuda;
mod nvrtc;
mod recorder;
mod spirv;
mod targets;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use cubecl::prelude::KernelMetadata as _;

use gpu_offline::occupancy::MULTIPROCESSORS;
use gpu_offline::table::{Row, markdown};

use crate::cases::{Case, Tensors};
use crate::cuda::Tools;
use crate::nvrtc::Nvrtc;
use crate::recorder::{Kernel, recorded};
use crate::spirv::VERSIONS;
use crate::targets::{Compiler, Target};

/// Compiles every GPU kernel for CUDA (sm_80, sm_89, sm_90) and for Vulkan. Needs no GPU and no driver. Prints a table
/// of registers, spills, shared memory and occupancy. The exit code is 1 if a kernel spills registers, is not compiled,
/// or is not valid SPIR-V.
#[derive(Parser)]
struct Arguments {
    /// The folder `nvidia` of Python's packages with NVIDIA's tools (xtask names it)
    #[arg(long, value_name = "FOLDER")]
    tools: PathBuf,
    /// Compile only the kernels with this text in their names or settings
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Keep PTX, machine code, its listing and SPIR-V in this folder
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
    /// Also compile CubeCL's CUDA C++ with NVRTC, which Burn does not use by default
    #[arg(long)]
    nvrtc: bool,
    /// Compile for CUDA only
    #[arg(long)]
    no_spirv: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(problems) if problems.is_empty() => ExitCode::SUCCESS,
        Ok(problems) => {
            for problem in &problems {
                eprintln!("gpu-offline: {problem}");
            }
            eprintln!("gpu-offline: {} problems", problems.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("gpu-offline: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Prints the tables; returns what is wrong with kernels.
fn run(arguments: &Arguments) -> Result<Vec<String>> {
    let tools = Tools {
        ptxas: arguments.tools.join("cuda_nvcc/bin/ptxas"),
        nvdisasm: arguments.tools.join("cu13/bin/nvdisasm"),
    };
    for tool in [&tools.ptxas, &tools.nvdisasm] {
        if !tool.is_file() {
            bail!(
                "{} is missing; crates/gpu-offline/setup installs it",
                tool.display()
            );
        }
    }
    if !arguments.no_spirv
        && std::process::Command::new("spirv-val")
            .arg("--version")
            .output()
            .is_err()
    {
        bail!(
            "spirv-val is missing (Debian, Ubuntu: apt install spirv-tools); --no-spirv leaves its part out"
        );
    }
    let nvrtc = arguments
        .nvrtc
        .then(|| Nvrtc::load(&arguments.tools))
        .transpose()?;
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let folder = arguments.keep.as_deref().unwrap_or(scratch.path());
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;

    let cases = cases::all();
    let mut problems = Vec::new();
    let mut compilers = vec![(Compiler::Llvm, "LLVM, which Burn uses by default")];
    if nvrtc.is_some() {
        compilers.push((Compiler::Nvrtc, "CUDA C++ and NVRTC"));
    }
    for (compiler, name) in compilers {
        let mut rows = Vec::new();
        for case in &cases {
            let compile = |kernel: &Launched, target| match compiler {
                Compiler::Llvm => cuda::llvm(&kernel.kernel, target),
                Compiler::Nvrtc => nvrtc
                    .as_ref()
                    .context("not loaded")?
                    .compile(&kernel.kernel, target),
            };
            for multiprocessor in MULTIPROCESSORS {
                for kernel in launched(
                    case,
                    Target::Cuda(compiler, multiprocessor),
                    &arguments.only,
                ) {
                    let stem = format!(
                        "{}_sm_{}_{compiler:?}",
                        kernel.file_name(),
                        multiprocessor.version
                    );
                    let name = (kernel.name.clone(), kernel.threads());
                    let row = compile(&kernel, multiprocessor).and_then(|ptx| {
                        cuda::assemble(&ptx, multiprocessor, &tools, folder, &stem, name)
                    });
                    match row {
                        Ok(row) => {
                            if row.spills() {
                                problems.push(format!(
                                    "{}: spills on sm_{}",
                                    kernel.name, multiprocessor.version
                                ));
                            }
                            rows.push(row);
                        }
                        Err(error) => problems.push(format!(
                            "{}, sm_{}: {error:#}",
                            kernel.name, multiprocessor.version
                        )),
                    }
                }
            }
        }
        print_rows(name, &mut rows);
    }
    if !arguments.no_spirv {
        problems.extend(spirv(&cases, &arguments.only, folder));
    }
    Ok(problems)
}

/// Rows of a kernel side by side, whatever order they were compiled in.
fn print_rows(name: &str, rows: &mut [Row]) {
    rows.sort_by(|a, b| {
        a.kernel
            .cmp(&b.kernel)
            .then(a.target.version.cmp(&b.target.version))
    });
    let targets = MULTIPROCESSORS.map(|it| format!("sm_{}", it.version));
    println!("Compiled by {name}. Values of {}:\n", targets.join(" · "));
    println!("{}\n", markdown(rows));
}

/// Compiles for Vulkan and validates; returns what is wrong.
fn spirv(cases: &[Case], only: &str, folder: &Path) -> Vec<String> {
    let mut problems = Vec::new();
    for version in VERSIONS {
        let mut valid = 0;
        for case in cases {
            for kernel in launched(case, Target::Vulkan, only) {
                let checked = spirv::compile(&kernel.kernel, version).and_then(|module| {
                    spirv::validate(&module, version, folder, &kernel.file_name())
                });
                match checked {
                    Ok(()) => valid += 1,
                    Err(error) => {
                        problems.push(format!(
                            "{}, {}: {error:#}",
                            kernel.name, version.environment
                        ));
                    }
                }
            }
        }
        println!(
            "SPIR-V for {}: {valid} kernels are valid (spirv-val).",
            version.environment
        );
    }
    problems
}

/// A kernel of ours that a case launched.
struct Launched {
    /// Its name and settings.
    name: String,
    kernel: Kernel,
}

impl Launched {
    fn threads(&self) -> u32 {
        {
            let size = self.kernel.id().cube_dim;
            size.x * size.y * size.z
        }
    }

    fn file_name(&self) -> String {
        let letters = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        self.name.chars().map(letters).collect()
    }
}

/// The kernels of ours that a case launches on a target.
fn launched(case: &Case, target: Target, only: &str) -> Vec<Launched> {
    let client = recorder::client(target);
    let tensors = Tensors {
        client: client.clone(),
    };
    let kernels = recorded(&client, || (case.launch)(&tensors));
    let named = kernels.into_iter().filter_map(|kernel| {
        // The type `gpu_kernels::FILE::KERNEL::Kernel<…>`; others are Burn's.
        let path = kernel.name().strip_prefix("gpu_kernels::")?;
        let path = path.split('<').next().unwrap_or(path);
        let (path, _type) = path.rsplit_once("::")?;
        let name = format!("`{path}` {}", case.settings);
        name.contains(only).then_some(Launched { name, kernel })
    });
    named.collect()
}
