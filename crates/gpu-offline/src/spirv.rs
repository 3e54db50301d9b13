//! From a kernel to SPIR-V, and its check by Khronos's validator.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, anyhow};
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

/// What CubeCL compiles for: a current driver, and the oldest that it accepts, with the least push constants.
pub const VERSIONS: [Version; 2] = [
    Version {
        environment: "vulkan1.3",
        spirv: (1, 6),
        push_constants: 256,
    },
    Version {
        environment: "vulkan1.1",
        spirv: (1, 3),
        push_constants: 128,
    },
];

/// Compiles for a driver of this version.
pub fn compile(kernel: &Kernel, version: Version) -> Result<Vec<u32>> {
    let options = WgpuCompilationOptions {
        supports_u64: true,
        supports_vulkan_compiler: true,
        vulkan: VulkanCompilationOptions {
            supports_uniform_standard_layout: true,
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

/// Checks a module; an error holds what the validator says.
pub fn validate(module: &[u32], version: Version, folder: &Path, stem: &str) -> Result<()> {
    let file = folder.join(format!("{stem}.{}.spv", version.environment));
    let bytes: Vec<u8> = module.iter().flat_map(|word| word.to_le_bytes()).collect();
    fs::write(&file, bytes)?;
    let mut validator = Command::new("spirv-val");
    validator
        .args(["--target-env", version.environment])
        .arg(&file);
    run(&mut validator).map(|_| ())
}
