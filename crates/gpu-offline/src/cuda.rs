//! From a kernel to machine code for an NVIDIA GPU, and what became of it.

use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use cubecl::Compiler as _;
use cubecl::ir::nvidia::SmArch;
use cubecl_llvm::nvptx::ptx_version::PtxVersion;
use cubecl_llvm::{LlvmTarget, PlironArtifact, PlironCompiler, PlironOptions};

use gpu_offline::assembly::{Resources, for_one_workgroup, instructions, resources};
use gpu_offline::occupancy::Multiprocessor;
use gpu_offline::table::Row;

use crate::recorder::Kernel;

/// The driver whose PTX is made: CUDA 12.8, as `cuDriverGetVersion` numbers it. The assembler is newer.
const DRIVER: i32 = 12_080;

/// NVIDIA's tools.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The assembler.
    pub ptxas: PathBuf,
    /// The disassembler.
    pub nvdisasm: PathBuf,
}

impl Tools {
    /// In the folder `nvidia` of Python's packages.
    pub fn find(packages: &Path) -> Result<Self> {
        let find = |file: &str| {
            let path = packages.join(file);
            let missing = "is missing; crates/gpu-offline/setup installs it";
            if path.is_file() {
                Ok(path)
            } else {
                Err(anyhow!("{} {missing}", path.display()))
            }
        };
        Ok(Self {
            ptxas: find("cuda_nvcc/bin/ptxas")?,
            nvdisasm: find("cu13/bin/nvdisasm")?,
        })
    }
}

impl Tools {
    /// Writes PTX to a file and its machine code to another.
    fn assemble(
        &self,
        text: &str,
        target: Multiprocessor,
        ptx: &Path,
        cubin: &Path,
    ) -> Result<Resources> {
        fs::write(ptx, text)?;
        let mut ptxas = Command::new(&self.ptxas);
        ptxas
            .arg("-v")
            .arg(format!("-arch={}", architecture(target.version)));
        let said = run(ptxas.arg(ptx).arg("-o").arg(cubin))?;
        resources(&said).with_context(|| format!("ptxas named no registers:\n{said}"))
    }
}

/// What the table and the kept files call a kernel.
#[derive(Debug, Clone)]
pub struct Described {
    /// The kernel and its settings.
    pub name: String,
    /// The same as the name of a file, without an ending.
    pub file: String,
    /// Threads of a workgroup.
    pub threads: u32,
}

/// PTX, and the shared memory that the launch asks for.
pub struct Ptx {
    /// The assembly.
    pub text: String,
    /// In bytes.
    pub dynamic_shared: u32,
}

/// The name of an architecture as the tools spell it. CubeCL asks for Hopper's own instructions.
pub fn architecture(version: u32) -> String {
    let own = if version >= 90 { "a" } else { "" };
    format!("sm_{version}{own}")
}

/// Compiles with LLVM, as Burn does by default.
pub fn llvm(kernel: &Kernel, target: Multiprocessor) -> Result<Ptx> {
    let options = PlironOptions {
        sm_arch: Some(SmArch::new(target.version, true)),
        ptx_version: PtxVersion::for_driver(DRIVER),
        grid_constants: true,
        ..Default::default()
    };
    let mut compiler = PlironCompiler {
        target: LlvmTarget::Nvptx,
    };
    let definition = cubecl::define_kernel(&**kernel).map_err(|error| anyhow!("{error}"))?;
    let artifact = compiler
        .compile(definition, &options)
        .map_err(|error| anyhow!("{error}"))?;
    let PlironArtifact::NvptxCode(module) = artifact else {
        bail!("CubeCL compiled for something else than NVPTX");
    };
    let bytes: Vec<u8> = module.ptx.iter().map(|byte| *byte as u8).collect();
    let text = CStr::from_bytes_until_nul(&bytes).context("PTX without an end")?;
    Ok(Ptx {
        text: text.to_string_lossy().into_owned(),
        dynamic_shared: u32::try_from(module.shared_memory_size)?,
    })
}

/// Assembles PTX, and measures the result. `folder` holds the files.
pub fn assemble(
    ptx: &Ptx,
    target: Multiprocessor,
    tools: &Tools,
    folder: &Path,
    kernel: Described,
) -> Result<Row> {
    let file =
        |ending: &str| folder.join(format!("{}.sm_{}.{ending}", kernel.file, target.version));
    let resources = tools.assemble(&ptx.text, target, &file("ptx"), &file("cubin"))?;
    let mut without_spills = None;
    if resources.spill_stores > 0
        && let Some(text) = for_one_workgroup(&ptx.text)
    {
        let (ptx, cubin) = (file("one.ptx"), file("one.cubin"));
        let alone = tools.assemble(&text, target, &ptx, &cubin)?;
        without_spills = (alone.spill_stores == 0).then_some(alone.registers);
    }
    let listing = run(Command::new(&tools.nvdisasm).arg(file("cubin")))?;
    fs::write(file("sass"), &listing)?;
    Ok(Row {
        kernel: kernel.name,
        target,
        threads: kernel.threads,
        dynamic_shared: ptx.dynamic_shared,
        resources,
        without_spills,
        instructions: instructions(&listing),
    })
}

/// What a tool prints.
pub fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let text = text.concat();
    if !output.status.success() {
        bail!("{program} failed:\n{text}");
    }
    Ok(text)
}
