//! Vulkan, Metal and Direct3D through wgpu: which GPU, and whether it is real.

use std::env;

use backends::advice;
use burn::tensor::wgpu::{WgpuBackend, wgpu};
use burn::tensor::{Device, DeviceKind, DeviceType};

use super::{Backend, DeviceError, Selected, gentle, kernel_cache, quiet};

/// CubeCL's own variable, which names a GPU.
const CHOSEN_BY_USER: &str = "CUBECL_WGPU_DEFAULT_DEVICE";

/// The best GPU that `backend` finds: discrete, integrated, virtual, software, in this order.
///
/// # Errors
///
/// [`DeviceError::NoHardware`] if there is none, or only a software driver that cannot run the
/// backend's shaders.
fn find(backend: Backend) -> Result<DeviceKind, DeviceError> {
    let missing = |missing: &str, advice: &str| DeviceError::NoHardware {
        backend,
        missing: missing.to_owned(),
        advice: advice.to_owned(),
    };
    let found = quiet::catch(|| Device::enumerate(device_type(backend)))
        .map_err(|message| initialization(backend, message))?;
    let kind = [
        DeviceKind::DiscreteGpu(0),
        DeviceKind::IntegratedGpu(0),
        DeviceKind::VirtualGpu(0),
        DeviceKind::Cpu,
    ]
    .into_iter()
    .find(|kind| found.contains(&device(backend, kind.clone())));
    match kind {
        // lavapipe crashes inside its SPIR-V compiler, which ends the program; SwiftShader computes
        // wrong numbers.
        Some(DeviceKind::Cpu) if backend == Backend::Vulkan => Err(missing(
            "the only device is a software driver, and such drivers fail on SPIR-V kernels",
            advice::GPU_FOR_SPIRV,
        )),
        Some(kind) => Ok(kind),
        None => Err(missing("no GPU was found", advice::GRAPHICS_DRIVER)),
    }
}

/// Whether the best device of `backend` is a real GPU.
///
/// # Errors
///
/// As [`find`].
pub fn is_hardware(backend: Backend) -> Result<bool, DeviceError> {
    Ok(find(backend)? != DeviceKind::Cpu)
}

/// Starts Burn's backend on the best GPU, or on the one that `CUBECL_WGPU_DEFAULT_DEVICE` names.
pub fn start(backend: Backend) -> Result<Selected, DeviceError> {
    let best = find(backend)?;
    kernel_cache::keep(best == DeviceKind::Cpu);
    let kind = match (best, env::var_os(CHOSEN_BY_USER)) {
        (best, None) => best,
        (_, Some(_)) => DeviceKind::DefaultDevice,
    };
    let weak = matches!(kind, DeviceKind::IntegratedGpu(_));
    let mut options = Device::wgpu_options()
        .device_kind(kind)
        .graphics_api(graphics_api(backend));
    if weak {
        options = options.tasks_max(gentle::LAUNCHES);
    }
    let (device, setup) = quiet::catch(|| options.init_with_setup())
        .and_then(|started| started.map_err(|error| error.to_string()))
        .map_err(|message| initialization(backend, message))?;

    let adapter = setup.adapter.get_info();
    if weak || adapter.device_type == wgpu::DeviceType::IntegratedGpu {
        let limited = quiet::catch(|| gentle::limit(&device));
        limited.map_err(|message| initialization(backend, message))?;
    }
    let is_software = adapter.device_type == wgpu::DeviceType::Cpu;
    let has_planes = setup.device.features().contains(wgpu::Features::SUBGROUP);
    kernels::gpu::set_software_driver(is_software && has_planes);
    let driver = [adapter.driver.as_str(), adapter.driver_info.as_str()].join(" ");
    let shaders = match backend {
        Backend::Vulkan => "SPIR-V",
        Backend::Metal => "MSL",
        _ => "WGSL",
    };
    let api = match adapter.backend {
        wgpu::Backend::Vulkan => "Vulkan",
        wgpu::Backend::Metal => "Metal",
        wgpu::Backend::Dx12 => "Direct3D 12",
        wgpu::Backend::Gl => "OpenGL",
        _ => "WebGPU",
    };
    Ok(Selected {
        device,
        backend,
        name: format!(
            "{shaders} on {api}: {}{}",
            adapter.name,
            if is_software { ", software" } else { "" }
        ),
        driver: driver.trim().to_owned(),
        reason: String::new(),
        is_software,
    })
}

fn initialization(backend: Backend, message: String) -> DeviceError {
    DeviceError::Initialization {
        name: format!("backend {backend}"),
        message: message.split_whitespace().collect::<Vec<_>>().join(" "),
    }
}

fn graphics_api(backend: Backend) -> WgpuBackend {
    match backend {
        Backend::Vulkan => WgpuBackend::Vulkan,
        Backend::Metal => WgpuBackend::Metal,
        _ => WgpuBackend::Auto,
    }
}

/// Burn's name for all devices of `backend`. [`super::start`] has refused backends that this build
/// does not include.
fn device_type(backend: Backend) -> DeviceType {
    match backend {
        #[cfg(feature = "vulkan")]
        Backend::Vulkan => DeviceType::Vulkan,
        #[cfg(feature = "metal")]
        Backend::Metal => DeviceType::Metal,
        _ => DeviceType::Wgpu,
    }
}

fn device(backend: Backend, kind: DeviceKind) -> Device {
    match backend {
        #[cfg(feature = "vulkan")]
        Backend::Vulkan => Device::vulkan(kind),
        #[cfg(feature = "metal")]
        Backend::Metal => Device::metal(kind),
        _ => Device::wgpu(kind),
    }
}
