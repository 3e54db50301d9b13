//! From a kernel to SPIR-V, and its check by Khronos's validator.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow};
use cubecl::{Compiler as _, VulkanCompilationOptions, WgpuCompilationOptions};
use cubecl_spirv::SpirvCompiler;

use crate::cuda::run;
use crate::recorder::Kernel;

/// A version of Vulkan: its name for `spirv-val`, its newest SPIR-V, and the bytes of its push constants.
#[derive(Debug, Clone, Copy)]
pub struct Version {
    /// As `--target-env` takes it.
    pub environment: &'static str,
    spirv: (u8, u8),
    push_constants: usize,
}

/// Current drivers, and older ones. Drivers with nothing newer than SPIR-V 1.3 are left out: for them CubeCL 0.11.3 names
/// variables in the entry point that SPIR-V 1.3 does not allow there.
pub const VERSIONS: [Version; 3] = [
    Version {
        environment: "vulkan1.3",
        spirv: (1, 6),
        push_constants: 256,
    },
    Version {
        environment: "vulkan1.2",
        spirv: (1, 5),
        push_constants: 128,
    },
    Version {
        environment: "vulkan1.1spv1.4",
        spirv: (1, 4),
        push_constants: 128,
    },
];

/// The program `spirv-val`: from Python's packages, else the system's.
pub fn validator(packages: &Path) -> Result<PathBuf> {
    let installed = packages
        .with_file_name("cmeel.prefix")
        .join("bin/spirv-val");
    let program = if installed.is_file() {
        installed
    } else {
        "spirv-val".into()
    };
    run(Command::new(&program).arg("--version")).context(
        "spirv-val checks SPIR-V: crates/gpu-offline/setup installs it, or apt install spirv-tools, of 2025 or newer; \
         --for cuda leaves it out",
    )?;
    Ok(program)
}

/// Compiles for a driver of this version.
pub fn compile(kernel: &Kernel, version: Version) -> Result<Vec<u32>> {
    let options = WgpuCompilationOptions {
        supports_u64: true,
        supports_vulkan_compiler: true,
        vulkan: VulkanCompilationOptions {
            supports_uniform_standard_layout: true,
            // Every current driver has it. Without it CubeCL 0.11.3 declares shared memory as a pointer to a pointer.
            supports_explicit_smem: true,
            max_spirv_version: version.spirv,
            max_vector_size: 4,
            push_constant_size: version.push_constants,
            ..Default::default()
        },
        ..Default::default()
    };
    let definition = cubecl::define_kernel(&**kernel).map_err(|error| anyhow!("{error}"))?;
    let compiled = SpirvCompiler
        .compile(definition, &options)
        .map_err(|error| anyhow!("{error}"))?;
    Ok(compiled.assembled_module)
}

/// Checks a module; an error holds the validator's message.
pub fn validate(
    module: &[u32],
    version: Version,
    validator: &Path,
    folder: &Path,
    stem: &str,
) -> Result<()> {
    let file = folder.join(format!("{stem}.{}.spv", version.environment));
    let bytes: Vec<u8> = module.iter().flat_map(|word| word.to_le_bytes()).collect();
    fs::write(&file, bytes)?;
    let mut check = Command::new(validator);
    check.args(["--target-env", version.environment]).arg(&file);
    run(&mut check).map(|_| ())
}
