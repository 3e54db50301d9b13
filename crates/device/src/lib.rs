//! The device that a run computes on. Nothing outside this crate names a backend.
//!
//! [`select`] turns the word after `--backend` into a Burn [`Device`] that is known to start, or
//! into one sentence that says what is missing and what to do. [`self_test`] and
//! [`check_device`] then compare it with the CPU.

mod backend;
mod check;
mod cuda;
mod error;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod gentle;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod graphics;
mod hardware;
mod kernels;
mod machine;
mod memory;
mod open_model;
pub mod process_memory;
mod quiet;
mod self_test;

use std::sync::{Mutex, PoisonError};

use burn::tensor::{Device, FloatDType};

pub use backend::Backend;
pub use check::{Check, CheckOptions, check_device, check_layer, verdict};
pub use error::DeviceError;
pub use hardware::{Hardware, hardware, type_name, types};
pub use kernels::{KeptKernels, KernelArgs, first_step, kept_kernels, switches};
pub use machine::Machine;
pub use memory::{DeviceMemory, Known, device_memory, largest_buffer};
pub use open_model::{ModelLoader, ModelOptions};
pub use self_test::{SELF_TEST_TOLERANCE, self_test};

/// A device that has started.
#[derive(Debug, Clone)]
pub struct Selected {
    /// Burn's device, without autodiff.
    pub device: Device,
    /// What it is reached through; never [`Backend::Auto`].
    pub backend: Backend,
    /// For the screen: `CPU (Flex, 2 threads, AVX2)`, `WGSL on Vulkan: llvmpipe, software`.
    pub name: String,
    /// The driver and its version in its own words; empty on the CPU.
    pub driver: String,
    /// Why this one, in words that continue "… because".
    pub reason: String,
    /// A graphics driver that computes on the CPU. Right, but many times slower than the CPU
    /// itself.
    pub is_software: bool,
}

impl Selected {
    /// What to warn of before the run starts.
    pub fn warning(&self) -> Option<String> {
        self.is_software.then(|| {
            format!(
                "{} imitates a GPU on the CPU and is very slow; --backend cpu is many times faster",
                self.name
            )
        })
    }
}

/// Selects and starts a device.
///
/// `Auto` takes the first of CUDA, Metal, Vulkan and wgpu that is in this build and has real
/// hardware, else the CPU; never a software adapter, and it never fails. An adapter of a certain
/// kind can be forced with CubeCL's `CUBECL_WGPU_DEFAULT_DEVICE` (say `IntegratedGpu(0)`), a CUDA
/// device with `CUDA_VISIBLE_DEVICES`.
///
/// # Errors
///
/// [`DeviceError`], where a backend asked for by its name is not in this build or not on this
/// machine, or does not start. A panic inside a driver's Rust bindings is caught and becomes such
/// an error.
pub fn select(asked: Backend) -> Result<Selected, DeviceError> {
    kernels::set_fusion();
    match asked {
        Backend::Auto => Ok(automatic()),
        Backend::Cpu => Ok(cpu("it was asked for".to_owned())),
        gpu => started(gpu, "it was asked for"),
    }
}

fn automatic() -> Selected {
    let mut passed_over = Vec::new();
    for backend in [
        Backend::Cuda,
        Backend::Metal,
        Backend::Vulkan,
        Backend::Wgpu,
    ] {
        if !backend.is_compiled_in() || backend.missing_on_this_platform().is_some() {
            continue;
        }
        let found = match is_hardware(backend) {
            Ok(true) => started(backend, "it is the fastest this build finds here"),
            Ok(false) => {
                passed_over.push(format!("{backend} has only a software adapter"));
                continue;
            }
            Err(error) => Err(error),
        };
        match found {
            Ok(selected) => return selected,
            // What to install belongs to the answer to `--backend X`, not to a reason.
            Err(DeviceError::NoHardware { missing, .. }) => {
                passed_over.push(format!("{backend}: {missing}"));
            }
            Err(error) => passed_over.push(error.to_string()),
        }
    }
    cpu(if passed_over.is_empty() {
        "no GPU backend is in this build".to_owned()
    } else {
        passed_over.join(", ")
    })
}

/// The CPU, which is always there.
fn cpu(reason: String) -> Selected {
    let threads = std::env::var("RAYON_NUM_THREADS")
        .ok()
        .and_then(|n| n.parse().ok())
        .filter(|&n: &usize| n > 0)
        .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
        .unwrap_or(1);
    let plural = if threads == 1 { "thread" } else { "threads" };
    Selected {
        device: Device::flex(),
        backend: Backend::Cpu,
        name: format!("CPU (Flex, {threads} {plural}{})", simd()),
        driver: String::new(),
        reason,
        is_software: false,
    }
}

/// The widest vectors that the matrix products use here.
fn simd() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return ", AVX-512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return ", AVX2";
        }
    }
    if cfg!(target_arch = "aarch64") {
        return ", NEON";
    }
    ""
}

/// Whether `backend` has a device that is no imitation, without starting it.
fn is_hardware(backend: Backend) -> Result<bool, DeviceError> {
    match backend {
        Backend::Auto | Backend::Cpu => Ok(false),
        Backend::Cuda => cuda::driver().map(|_| true),
        #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
        Backend::Wgpu | Backend::Vulkan | Backend::Metal => graphics::is_hardware(backend),
        #[cfg(not(any(feature = "wgpu", feature = "vulkan", feature = "metal")))]
        Backend::Wgpu | Backend::Vulkan | Backend::Metal => {
            Err(DeviceError::NotCompiled { backend })
        }
    }
}

/// A GPU's device, started once in a process: drivers do not like to be started from several
/// threads.
fn started(backend: Backend, reason: &str) -> Result<Selected, DeviceError> {
    static STARTED: Mutex<Vec<Selected>> = Mutex::new(Vec::new());

    let mut all = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    let selected = match all.iter().find(|selected| selected.backend == backend) {
        Some(selected) => selected.clone(),
        None => {
            let selected = start(backend)?;
            lora_core::use_exact_f32(lora_core::has_tf32(&selected.device));
            all.push(selected.clone());
            selected
        }
    };
    Ok(Selected {
        reason: reason.to_owned(),
        ..selected
    })
}

fn start(backend: Backend) -> Result<Selected, DeviceError> {
    if let Some(why) = backend.missing_on_this_platform() {
        return Err(DeviceError::WrongPlatform { backend, why });
    }
    if backend == Backend::Cuda {
        // Asked before "is it in this build?": on a machine without NVIDIA's driver no build would
        // help.
        let driver = cuda::driver()?;
        kernels::keep(false);
        return cuda::start(&driver);
    }
    if backend == Backend::Wgpu {
        let natives = [Backend::Vulkan, Backend::Metal].into_iter();
        let taken_over = natives
            .filter(|native| native.is_compiled_in())
            .find(|native| native.missing_on_this_platform().is_none());
        if let Some(native) = taken_over {
            return Err(DeviceError::NativeShaders { native });
        }
    }
    if !backend.is_compiled_in() {
        return Err(DeviceError::NotCompiled { backend });
    }
    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
    return graphics::start(backend);
    #[cfg(not(any(feature = "wgpu", feature = "vulkan", feature = "metal")))]
    Err(DeviceError::NotCompiled { backend })
}

/// What this program means by Burn's `Flex32`: f32 tensors whose products NVIDIA's matrix units compute in TF32, with 11
/// bits of each factor.
pub const TF32: FloatDType = FloatDType::Flex32;

/// The type that products are computed in.
///
/// | device | `None` (auto) | on request |
/// | --- | --- | --- |
/// | CPU | f32 | bf16 where the processor has AVX512-BF16: products with 8-bit weights only |
/// | CUDA | bf16 where the GPU has it (Ampere and later), else f32 | f32, f16; [`TF32`] where the GPU has it |
/// | Vulkan, Metal | f16 where the adapter has matrix units for it, else f32 | f32, f16 |
/// | wgpu (WGSL) | f32 | f16 where the adapter has it |
///
/// Sums of products, hidden states, norms, softmax, loss, adapters, their gradients and the optimizer's state are f32
/// everywhere.
///
/// # Errors
///
/// [`DeviceError::Precision`], with what the device has.
pub fn compute_dtype(
    selected: &Selected,
    requested: Option<FloatDType>,
) -> Result<FloatDType, DeviceError> {
    let offered: &[FloatDType] = match selected.backend {
        Backend::Cuda => &[FloatDType::BF16, FloatDType::F32, FloatDType::F16, TF32],
        Backend::Vulkan | Backend::Metal if lora_core::has_f16_matrix_units(&selected.device) => {
            &[FloatDType::F16, FloatDType::F32]
        }
        Backend::Wgpu | Backend::Vulkan | Backend::Metal => &[FloatDType::F32, FloatDType::F16],
        Backend::Auto | Backend::Cpu if lora_core::has_bf16_products() => {
            &[FloatDType::F32, FloatDType::BF16]
        }
        Backend::Auto | Backend::Cpu => &[FloatDType::F32],
    };
    let cpu = selected.backend == Backend::Cpu;
    let mut has = offered.iter().copied().filter(|&dtype| match dtype {
        FloatDType::F32 => true,
        TF32 => lora_core::has_tf32(&selected.device),
        _ => cpu || selected.device.supports_dtype(dtype),
    });
    let wanted = match requested {
        None => return Ok(has.next().unwrap_or(FloatDType::F32)),
        Some(wanted) => wanted,
    };
    let has: Vec<_> = has.collect();
    if has.contains(&wanted) {
        return Ok(wanted);
    }
    Err(DeviceError::Precision {
        requested: dtype_name(wanted),
        name: selected.name.clone(),
        allowed: has
            .into_iter()
            .map(dtype_name)
            .collect::<Vec<_>>()
            .join(" or "),
    })
}

/// Sets the device up to compute in this type, and returns the type that its tensors have: on the CPU tensors are f32
/// and only products with quantized weights are in bf16; under [`TF32`] they are f32 too.
///
/// # Errors
///
/// If the processor computes them wrong.
pub fn prepare(selected: &Selected, compute: FloatDType) -> Result<FloatDType, DeviceError> {
    if selected.backend != Backend::Cpu {
        lora_core::use_exact_f32(compute != TF32 && lora_core::has_tf32(&selected.device));
        return Ok(match compute {
            TF32 => FloatDType::F32,
            compute => compute,
        });
    }
    lora_core::use_bf16_products(compute == FloatDType::BF16)
        .map_err(|reason| DeviceError::Bf16Products { reason })?;
    Ok(FloatDType::F32)
}

/// A type's name as a config spells it.
fn dtype_name(dtype: FloatDType) -> &'static str {
    match dtype {
        FloatDType::F64 => "f64",
        FloatDType::F32 => "f32",
        TF32 => "tf32",
        FloatDType::F16 => "f16",
        FloatDType::BF16 => "bf16",
    }
}

/// Bytes that live tensors take on the device; `None` where the backend does not count them (the
/// CPU: there the process's resident memory says it).
pub fn memory_in_use(device: &Device) -> Option<u64> {
    device.memory_pool_usage().map(|usage| usage.bytes_in_use)
}

/// Bytes that Burn holds on the device, pages kept for reuse included; what other programs cannot
/// have.
pub fn memory_reserved(device: &Device) -> Option<u64> {
    device.memory_pool_usage().map(|usage| usage.bytes_reserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there_and_says_what_it_is() {
        let selected = select(Backend::Cpu).unwrap();
        assert_eq!(selected.backend, Backend::Cpu);
        assert!(
            selected.name.starts_with("CPU (Flex, "),
            "{}",
            selected.name
        );
        assert_eq!(selected.warning(), None);
        self_test(&selected).unwrap();
        assert_eq!(memory_in_use(&selected.device), None);
    }

    #[test]
    fn auto_never_takes_a_software_adapter_and_gives_a_reason() {
        let selected = select(Backend::Auto).unwrap();
        assert_ne!(selected.backend, Backend::Auto);
        assert!(!selected.is_software, "{selected:?}");
        assert!(!selected.reason.is_empty());
    }

    #[cfg(not(target_vendor = "apple"))]
    #[test]
    fn metal_elsewhere_than_on_apple_machines_is_one_clear_line() {
        let message = select(Backend::Metal).unwrap_err().to_string();
        assert!(
            message.contains("Apple") && !message.contains('\n'),
            "{message}"
        );
    }

    #[test]
    fn cuda_without_a_driver_is_one_clear_line() {
        match select(Backend::Cuda) {
            Ok(selected) => assert!(selected.name.starts_with("CUDA: "), "{}", selected.name),
            Err(error) => {
                let message = error.to_string();
                assert!(
                    message.starts_with("backend cuda") && !message.contains('\n'),
                    "{message}"
                );
            }
        }
    }

    #[cfg(not(feature = "wgpu"))]
    #[test]
    fn a_backend_outside_this_build_names_the_command_that_builds_it() {
        let message = select(Backend::Wgpu).unwrap_err().to_string();
        assert!(message.contains("--backend wgpu"), "{message}");
    }

    #[test]
    fn the_cpu_computes_in_f32_unless_it_has_bf16_products_and_is_asked() {
        let selected = select(Backend::Cpu).unwrap();
        assert_eq!(compute_dtype(&selected, None), Ok(FloatDType::F32));
        if lora_core::has_bf16_products() {
            let bf16 = compute_dtype(&selected, Some(FloatDType::BF16));
            return assert_eq!(bf16, Ok(FloatDType::BF16));
        }
        let error = compute_dtype(&selected, Some(FloatDType::BF16)).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("bf16") && message.contains("use f32"),
            "{message}"
        );
    }

    /// wgpu, where this build and this machine have it; its absence is a failure where CI demands
    /// it.
    #[cfg(all(feature = "wgpu", not(feature = "vulkan"), not(feature = "metal")))]
    fn wgpu() -> Option<Selected> {
        match select(Backend::Wgpu) {
            Ok(selected) => Some(selected),
            Err(error) if std::env::var_os("LORA_REQUIRE_WGPU").is_none() => {
                eprintln!("not tested: {error}");
                None
            }
            Err(error) => panic!("LORA_REQUIRE_WGPU is set: {error}"),
        }
    }

    #[cfg(all(feature = "wgpu", not(feature = "vulkan"), not(feature = "metal")))]
    #[test]
    fn wgpu_starts_once_and_computes_what_the_cpu_does() {
        let Some(selected) = wgpu() else { return };
        assert_eq!(selected.backend, Backend::Wgpu);
        assert!(selected.name.starts_with("WGSL on "), "{}", selected.name);
        assert_eq!(selected.warning().is_some(), selected.is_software);
        self_test(&selected).unwrap();
        assert_eq!(wgpu().unwrap().device, selected.device);
        assert!(memory_reserved(&selected.device) >= memory_in_use(&selected.device));
        assert!(memory_reserved(&selected.device) > Some(0));
    }

    #[cfg(all(feature = "wgpu", not(feature = "vulkan"), not(feature = "metal")))]
    #[test]
    fn wgpu_computes_in_f32_and_has_no_bf16() {
        let Some(selected) = wgpu() else { return };
        assert_eq!(compute_dtype(&selected, None), Ok(FloatDType::F32));
        let error = compute_dtype(&selected, Some(FloatDType::BF16)).unwrap_err();
        assert!(error.to_string().contains("f32"), "{error}");
    }
}
