//! The device that a run computes on. Nothing outside this crate names a backend.
//!
//! [`select`] turns the value of `--backend` into a Burn [`Device`] that has started, or into a
//! sentence that names what is missing and a remedy. [`self_test`] and [`check_device`] then
//! compare the device with the CPU.

mod check;
mod cuda;
mod error;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod gentle;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod graphics;
mod hardware;
mod kernel_cache;
mod machine;
mod memory;
mod open_model;
pub mod process_memory;
mod quiet;
mod self_test;

use std::sync::{Mutex, PoisonError};

use burn::tensor::{Device, FloatDType};

pub use backends::{Backend, UnknownBackend};
pub use check::{Check, CheckOptions, check_device, check_layer, verdict};
pub use error::DeviceError;
pub use hardware::{Hardware, hardware, type_name, types};
pub use kernel_cache::{KeptKernels, KernelArgs, first_step, kept_kernels, switches};
pub use machine::Machine;
pub use memory::{DeviceMemory, Known, device_memory, largest_buffer};
pub use open_model::{ModelLoader, ModelOptions};
pub use self_test::{SELF_TEST_TOLERANCE, self_test};

/// A device that has started.
#[derive(Debug, Clone)]
pub struct Selected {
    /// Burn's device, without autodiff.
    pub device: Device,
    /// Its backend; never [`Backend::Auto`].
    pub backend: Backend,
    /// For the screen: `CPU (Flex, 2 threads, AVX2)`, `WGSL on Vulkan: llvmpipe, software`.
    pub name: String,
    /// The driver and its version as the driver reports them; empty on the CPU.
    pub driver: String,
    /// The reason for the selection, as shown after the device's name.
    pub reason: String,
    /// A graphics driver that computes on the CPU: correct, but many times slower than the CPU
    /// backend.
    pub is_software: bool,
}

impl Selected {
    /// A warning for the user before the run starts.
    pub fn warning(&self) -> Option<String> {
        self.is_software.then(|| {
            format!(
                "{} emulates a GPU on the CPU and is very slow; --backend cpu is many times faster",
                self.name
            )
        })
    }
}

/// Whether this build has the backend compiled in.
pub fn is_compiled_in(backend: Backend) -> bool {
    match backend {
        Backend::Auto | Backend::Cpu => true,
        Backend::Cuda => cfg!(feature = "cuda"),
        Backend::Wgpu => cfg!(feature = "wgpu"),
        Backend::Vulkan => cfg!(feature = "vulkan"),
        Backend::Metal => cfg!(feature = "metal"),
    }
}

/// Selects and starts a device.
///
/// `Auto` takes the first of CUDA, Metal, Vulkan and wgpu that this build includes and that has
/// real hardware, else the CPU. It never takes a software driver, and it never fails. A GPU of a
/// certain kind can be forced with CubeCL's `CUBECL_WGPU_DEFAULT_DEVICE` (such as
/// `IntegratedGpu(0)`), a CUDA device with `CUDA_VISIBLE_DEVICES`.
///
/// # Errors
///
/// [`DeviceError`] if a named backend is not in this build, is not supported on this machine, or
/// does not start. A panic inside a driver's Rust bindings is caught and becomes such an error.
pub fn select(asked: Backend) -> Result<Selected, DeviceError> {
    kernel_cache::set_fusion();
    match asked {
        Backend::Auto => Ok(automatic()),
        Backend::Cpu => Ok(cpu("selected with --backend".to_owned())),
        gpu => started(gpu, "selected with --backend"),
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
        if !is_compiled_in(backend) || backend.missing_on_this_platform().is_some() {
            continue;
        }
        let found = match is_hardware(backend) {
            Ok(true) => started(backend, "the fastest that this build finds on this machine"),
            Ok(false) => {
                passed_over.push(format!("{backend} has only a software driver"));
                continue;
            }
            Err(error) => Err(error),
        };
        match found {
            Ok(selected) => return selected,
            // The installation advice belongs to an explicit `--backend X`, not to this reason.
            Err(DeviceError::NoHardware { missing, .. }) => {
                passed_over.push(format!("{backend}: {missing}"));
            }
            Err(error) => passed_over.push(error.to_string()),
        }
    }
    cpu(if passed_over.is_empty() {
        "this build has no GPU backend".to_owned()
    } else {
        passed_over.join(", ")
    })
}

/// The CPU, which is always available.
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

/// The widest vectors that the matrix products use on this processor.
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

/// Whether `backend` has a real device, without starting it.
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

/// A GPU's device, started once per process: drivers may fail if they are started from several
/// threads.
fn started(backend: Backend, reason: &str) -> Result<Selected, DeviceError> {
    static STARTED: Mutex<Vec<Selected>> = Mutex::new(Vec::new());

    let mut all = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    let selected = match all.iter().find(|selected| selected.backend == backend) {
        Some(selected) => selected.clone(),
        None => {
            let selected = start(backend)?;
            kernels::use_exact_f32(kernels::has_tf32(&selected.device));
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
        // Checked before whether this build includes the backend: on a machine without NVIDIA's
        // driver no build would help.
        let driver = cuda::driver()?;
        kernel_cache::keep(false);
        return cuda::start(&driver);
    }
    if backend == Backend::Wgpu {
        let natives = [Backend::Vulkan, Backend::Metal].into_iter();
        let taken_over = natives
            .filter(|&native| is_compiled_in(native))
            .find(|native| native.missing_on_this_platform().is_none());
        if let Some(native) = taken_over {
            return Err(DeviceError::NativeShaders { native });
        }
    }
    if !is_compiled_in(backend) {
        return Err(DeviceError::NotCompiled { backend });
    }
    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
    return graphics::start(backend);
    #[cfg(not(any(feature = "wgpu", feature = "vulkan", feature = "metal")))]
    Err(DeviceError::NotCompiled { backend })
}

/// The meaning of Burn's `Flex32` in this program: f32 tensors whose products NVIDIA's matrix units
/// compute in TF32, with 11 bits of each factor.
pub const TF32: FloatDType = FloatDType::Flex32;

/// The type that products are computed in.
///
/// | device | `None` (auto) | on request |
/// | --- | --- | --- |
/// | CPU | f32 | bf16 where the processor has AVX512-BF16: products with 8-bit weights only |
/// | CUDA | bf16 if the GPU supports it (Ampere and later), else f32 | f32, f16; [`TF32`] if the GPU supports it |
/// | Vulkan, Metal | f16 where the adapter has matrix units for it, else f32 | f32, f16 |
/// | wgpu (WGSL) | f32 | f16 if the GPU supports it |
///
/// Sums of products, hidden states, norms, softmax, loss, adapters, their gradients and the
/// optimizer's state are f32 everywhere.
///
/// # Errors
///
/// [`DeviceError::Precision`], with the types that the device supports.
pub fn compute_dtype(
    selected: &Selected,
    requested: Option<FloatDType>,
) -> Result<FloatDType, DeviceError> {
    let offered: &[FloatDType] = match selected.backend {
        Backend::Cuda => &[FloatDType::BF16, FloatDType::F32, FloatDType::F16, TF32],
        Backend::Vulkan | Backend::Metal if kernels::has_f16_matrix_units(&selected.device) => {
            &[FloatDType::F16, FloatDType::F32]
        }
        Backend::Wgpu | Backend::Vulkan | Backend::Metal => &[FloatDType::F32, FloatDType::F16],
        Backend::Auto | Backend::Cpu if kernels::has_bf16_products() => {
            &[FloatDType::F32, FloatDType::BF16]
        }
        Backend::Auto | Backend::Cpu => &[FloatDType::F32],
    };
    let cpu = selected.backend == Backend::Cpu;
    let mut has = offered.iter().copied().filter(|&dtype| match dtype {
        FloatDType::F32 => true,
        TF32 => kernels::has_tf32(&selected.device),
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

/// Sets the device up to compute in this type, and returns the type of its tensors: on the CPU
/// tensors are f32 and only products with quantized weights are in bf16; under [`TF32`] tensors are
/// f32 too.
///
/// # Errors
///
/// If the processor's bf16 products are wrong.
pub fn prepare(selected: &Selected, compute: FloatDType) -> Result<FloatDType, DeviceError> {
    if selected.backend != Backend::Cpu {
        kernels::use_exact_f32(compute != TF32 && kernels::has_tf32(&selected.device));
        return Ok(match compute {
            TF32 => FloatDType::F32,
            compute => compute,
        });
    }
    kernels::use_bf16_products(compute == FloatDType::BF16)
        .map_err(|reason| DeviceError::Bf16Products { reason })?;
    Ok(FloatDType::F32)
}

/// A type's name as in a configuration.
fn dtype_name(dtype: FloatDType) -> &'static str {
    match dtype {
        FloatDType::F64 => "f64",
        FloatDType::F32 => "f32",
        TF32 => "tf32",
        FloatDType::F16 => "f16",
        FloatDType::BF16 => "bf16",
    }
}

/// Bytes of live tensors on the device; `None` if the backend does not count them (on the CPU, the
/// process's resident memory is the measure).
pub fn memory_in_use(device: &Device) -> Option<u64> {
    device.memory_pool_usage().map(|usage| usage.bytes_in_use)
}

/// Bytes that Burn has allocated on the device, including pages kept for reuse, which other
/// programs cannot use.
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
        if kernels::has_bf16_products() {
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

    /// wgpu, if this build and this machine have it. If it is missing and CI requires it, the test
    /// fails.
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
