//! Compiles every GPU kernel for NVIDIA's GPUs and for Vulkan, without a GPU, and prints what became of it.

mod cases;
mod cuda;
mod nvrtc;
mod recorder;
mod spirv;
mod targets;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use gpu_offline::occupancy::{MULTIPROCESSORS, Multiprocessor};
use gpu_offline::table::{Row, markdown};

use crate::cases::{Case, Tensors};
use crate::cuda::{Described, Tools};
use crate::nvrtc::Nvrtc;
use crate::recorder::{Kernel, recorded};
use crate::spirv::VERSIONS;
use crate::targets::{Compiler, Target};

/// Compiles every GPU kernel for CUDA (sm_80, sm_89, sm_90) and for Vulkan. Needs no GPU and no driver. Prints a table
/// of registers, spills, shared memory and occupancy. The exit code is 1 if a kernel has to spill registers, is not
/// compiled, or is not valid SPIR-V.
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
    /// Also fail where the assembler spills to fit more workgroups on a multiprocessor
    #[arg(long)]
    strict: bool,
    /// What to compile: `cuda`, with LLVM as Burn does by default; `nvrtc`, CUDA C++ with NVRTC; `spirv`
    #[arg(
        long = "for",
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "cuda,spirv"
    )]
    parts: Vec<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Cuda,
    Nvrtc,
    Spirv,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(problems) => {
            eprintln!("gpu-offline: {problems} problems");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("gpu-offline: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Prints the tables and what is wrong with kernels; returns how much is.
fn run(arguments: &Arguments) -> Result<usize> {
    let tools = Tools::find(&arguments.tools)?;
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let folder = arguments.keep.as_deref().unwrap_or(scratch.path());
    let made = |part: &str| {
        let folder = folder.join(part);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        anyhow::Ok(folder)
    };
    let cases = cases::all();
    let mut problems = Problems::default();
    for part in &arguments.parts {
        match part {
            Part::Cuda => {
                let folder = made("cuda")?;
                let rows = cuda_rows(
                    &cases,
                    arguments,
                    Compiler::Llvm,
                    &mut problems,
                    |kernel, sm| {
                        cuda::assemble(
                            &cuda::llvm(&kernel.kernel, sm)?,
                            sm,
                            &tools,
                            &folder,
                            kernel.described(),
                        )
                    },
                );
                print_rows("CubeCL's LLVM compiler, which Burn uses by default", rows);
            }
            Part::Nvrtc => {
                let folder = made("nvrtc")?;
                let nvrtc = Nvrtc::load(&arguments.tools)?;
                let rows = cuda_rows(
                    &cases,
                    arguments,
                    Compiler::Nvrtc,
                    &mut problems,
                    |kernel, sm| {
                        cuda::assemble(
                            &nvrtc.compile(&kernel.kernel, sm)?,
                            sm,
                            &tools,
                            &folder,
                            kernel.described(),
                        )
                    },
                );
                print_rows("CubeCL's CUDA C++ compiler and NVRTC", rows);
            }
            Part::Spirv => {
                let folder = made("spirv")?;
                let validator = spirv::validator(&arguments.tools)?;
                for version in VERSIONS {
                    let mut valid = 0;
                    for kernel in cases
                        .iter()
                        .flat_map(|case| launched(case, Target::Vulkan, arguments))
                    {
                        let checked = spirv::compile(&kernel.kernel, version).and_then(|module| {
                            spirv::validate(
                                &module,
                                version,
                                &validator,
                                &folder,
                                &kernel.file_name(),
                            )
                        });
                        match checked {
                            Ok(()) => valid += 1,
                            Err(error) => problems.add(
                                &kernel.name,
                                version.environment,
                                &format!("{error:#}"),
                            ),
                        }
                    }
                    println!(
                        "SPIR-V for {}: {valid} kernels are valid.",
                        version.environment
                    );
                }
            }
        }
    }
    Ok(problems.count)
}

/// What is wrong, printed at once: a run takes minutes.
#[derive(Default)]
struct Problems {
    count: usize,
}

impl Problems {
    fn add(&mut self, kernel: &str, target: &str, problem: &str) {
        eprintln!("gpu-offline: {kernel}, {target}: {problem}");
        self.count += 1;
    }
}

/// Compiles every kernel for every multiprocessor.
fn cuda_rows(
    cases: &[Case],
    arguments: &Arguments,
    compiler: Compiler,
    problems: &mut Problems,
    compile: impl Fn(&Launched, Multiprocessor) -> Result<Row>,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for multiprocessor in MULTIPROCESSORS {
        let target = Target::Cuda(compiler, multiprocessor);
        let name = format!("sm_{}", multiprocessor.version);
        for kernel in cases
            .iter()
            .flat_map(|case| launched(case, target, arguments))
        {
            match compile(&kernel, multiprocessor) {
                Ok(row) => {
                    if let Some(registers) = row.without_spills {
                        eprintln!(
                            "gpu-offline: {}, {name}: the assembler spills {} bytes to fit more workgroups; {registers} \
                             registers would do without",
                            row.kernel, row.resources.spill_stores
                        );
                    }
                    if row.has_to_spill() || row.spills() && arguments.strict {
                        problems.add(&row.kernel, &name, "registers are spilled");
                    }
                    rows.push(row);
                }
                Err(error) => problems.add(&kernel.name, &name, &format!("{error:#}")),
            }
        }
    }
    rows
}

/// Prints rows, those of a kernel side by side.
fn print_rows(compiler: &str, mut rows: Vec<Row>) {
    rows.sort_by(|a, b| (&a.kernel, a.target.version).cmp(&(&b.kernel, b.target.version)));
    let targets = MULTIPROCESSORS.map(|it| format!("sm_{}", it.version));
    println!(
        "Compiled by {compiler}. Values of {}:\n",
        targets.join(" · ")
    );
    println!("{}\n", markdown(&rows));
}

/// A kernel of ours that a case launched.
struct Launched {
    /// Its name and settings.
    name: String,
    kernel: Kernel,
}

impl Launched {
    /// As the table names it.
    fn described(&self) -> Described {
        let size = self.kernel.id().cube_dim;
        Described {
            name: self.name.clone(),
            file: self.file_name(),
            threads: size.x * size.y * size.z,
        }
    }

    fn file_name(&self) -> String {
        let letters = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        self.name.chars().map(letters).collect()
    }
}

/// The kernels of ours that a case launches on a target.
fn launched(case: &Case, target: Target, arguments: &Arguments) -> Vec<Launched> {
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
        name.contains(&arguments.only)
            .then_some(Launched { name, kernel })
    });
    named.collect()
}
