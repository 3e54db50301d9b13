//! What this machine can run on: asked of its drivers, before anything of Burn is compiled.
//!
//! Drivers are other people's code and some crash while they load. They are asked in a process of
//! their own ([`probe`], which `cargo xtask` starts as `xtask __probe`), so that the worst one can
//! do is to be left out.

use std::env;
use std::process::Command;

use anyhow::Result;
use backends::cuda::LIBDEVICE;
use backends::{Backend, advice};

/// The name of the hidden sub-command that runs [`probe`].
pub const PROBE: &str = "__probe";

/// A graphics adapter as its Vulkan driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// The driver's name for it.
    pub name: String,
    /// Computes on the CPU (lavapipe, SwiftShader).
    pub software: bool,
}

/// What the drivers of this machine answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Number of NVIDIA devices that a CUDA driver offers.
    pub cuda_devices: usize,
    /// The CUDA toolkit's math library is where the compiler looks for it.
    pub cuda_toolkit: bool,
    /// Adapters that Vulkan offers.
    pub vulkan: Vec<Adapter>,
    /// The probe ended early, in words.
    pub trouble: Option<String>,
}

impl Machine {
    /// Asks the drivers of this machine, in a process of their own.
    pub fn ask() -> Machine {
        let answer = env::current_exe().and_then(|xtask| Command::new(xtask).arg(PROBE).output());
        match answer {
            Ok(output) => {
                let mut machine = Machine::from_lines(&String::from_utf8_lossy(&output.stdout));
                if !output.status.success() {
                    machine.trouble = Some(format!("a driver ended the probe: {}", output.status));
                }
                machine
            }
            Err(error) => Machine {
                trouble: Some(format!("the probe did not start: {error}")),
                ..Machine::default()
            },
        }
    }

    /// Reads what [`probe`] prints.
    fn from_lines(lines: &str) -> Machine {
        let mut machine = Machine {
            cuda_toolkit: backends::cuda::libdevice().is_some(),
            ..Machine::default()
        };
        for line in lines.lines() {
            match line.split_once('\t') {
                Some(("cuda", count)) => machine.cuda_devices = count.parse().unwrap_or(0),
                Some((kind @ ("gpu" | "software"), name)) => machine.vulkan.push(Adapter {
                    name: name.to_owned(),
                    software: kind == "software",
                }),
                _ => {}
            }
        }
        machine
    }

    /// The first adapter that is hardware.
    pub fn gpu(&self) -> Option<&Adapter> {
        self.vulkan.iter().find(|adapter| !adapter.software)
    }

    /// Whether wgpu finds an adapter, be it a software one. Direct3D 12 and Metal always offer one.
    pub fn has_wgpu(&self) -> bool {
        cfg!(any(windows, target_vendor = "apple")) || !self.vulkan.is_empty()
    }

    /// What `--backend auto` means here, with the reason.
    ///
    /// CUDA where an NVIDIA driver answers, else a real GPU through wgpu, else the CPU. A software
    /// adapter is never taken: the CPU itself is many times faster than a graphics driver that
    /// imitates a GPU on it.
    pub fn auto(&self) -> (Backend, String) {
        if cfg!(target_vendor = "apple") {
            return (Backend::Metal, "an Apple machine has Metal".to_owned());
        }
        let cuda = match (self.cuda_devices, self.cuda_toolkit) {
            (0, _) => "no NVIDIA driver answers".to_owned(),
            (n, true) => {
                let devices = if n == 1 { "device" } else { "devices" };
                return (
                    Backend::Cuda,
                    format!("an NVIDIA driver answers with {n} {devices}"),
                );
            }
            (_, false) => {
                "an NVIDIA driver answers, but the CUDA toolkit (libdevice.10.bc) is not \
                found: install it or set CUDA_PATH"
                    .to_owned()
            }
        };
        let trouble = match &self.trouble {
            Some(trouble) => format!(" ({trouble})"),
            None => String::new(),
        };
        match (self.gpu(), self.vulkan.first()) {
            (Some(gpu), _) => (Backend::Wgpu, format!("{cuda}; Vulkan offers {}", gpu.name)),
            // Without a Vulkan loader a Windows machine still has Direct3D 12. The trainer looks at
            // the adapter itself and continues with the CPU where it is Microsoft's software one.
            (None, None) if cfg!(windows) => (Backend::Wgpu, format!("{cuda}; Direct3D 12")),
            (None, Some(software)) => (
                Backend::Cpu,
                format!(
                    "{cuda}; Vulkan offers only {}, which is software{trouble}",
                    software.name
                ),
            ),
            (None, None) => (
                Backend::Cpu,
                format!("{cuda}; no GPU answers to Vulkan{trouble}"),
            ),
        }
    }

    /// What keeps `backend` from running here, and what to do about it: known before a build is
    /// spent on it.
    pub fn missing(&self, backend: Backend) -> Option<String> {
        let (missing, advice) = match backend {
            Backend::Cuda if self.cuda_devices == 0 => (
                "no NVIDIA driver answers (libcuda is missing or finds no device)".to_owned(),
                advice::CUDA_DRIVER,
            ),
            Backend::Cuda if !self.cuda_toolkit => (
                format!(
                    "an NVIDIA driver answers, but the CUDA toolkit's {LIBDEVICE} is not found"
                ),
                advice::CUDA_TOOLKIT,
            ),
            Backend::Wgpu if !self.has_wgpu() => (
                "no Vulkan driver answers".to_owned(),
                advice::GRAPHICS_DRIVER,
            ),
            Backend::Vulkan if self.gpu().is_none() => (
                "no GPU answers to Vulkan, and software drivers fail on SPIR-V kernels".to_owned(),
                advice::GPU_FOR_SPIRV,
            ),
            _ => return None,
        };
        Some(format!("{missing}; {advice}"))
    }

    /// Whether `backend` would run on real hardware here.
    pub fn is_hardware(&self, backend: Backend) -> bool {
        match backend {
            Backend::Auto | Backend::Cpu => false,
            Backend::Cuda => self.cuda_devices > 0,
            Backend::Metal => true,
            Backend::Wgpu if cfg!(target_vendor = "apple") => true,
            Backend::Wgpu | Backend::Vulkan => self.gpu().is_some(),
        }
    }
}

/// The hidden sub-command: asks each driver and prints one line for each answer.
pub fn probe() -> Result<()> {
    // Printed one by one, so that what came before a crash is not lost.
    let cuda = backends::cuda::driver().map_or(0, |driver| driver.devices);
    println!("cuda\t{cuda}");
    for adapter in vulkan_adapters() {
        let kind = if adapter.software { "software" } else { "gpu" };
        println!("{kind}\t{}", adapter.name);
    }
    Ok(())
}

/// The adapters that Vulkan offers; none without a loader or a driver.
#[cfg(not(target_vendor = "apple"))]
fn vulkan_adapters() -> Vec<Adapter> {
    use ash::vk;

    // SAFETY: the loader is the system's own, the instance is destroyed before the library is
    // unloaded (`entry` is dropped last), and nothing made from it outlives it.
    unsafe {
        let Ok(entry) = ash::Entry::load() else {
            return Vec::new();
        };
        let Ok(instance) = entry.create_instance(&vk::InstanceCreateInfo::default(), None) else {
            return Vec::new();
        };
        let adapters = instance
            .enumerate_physical_devices()
            .unwrap_or_default()
            .into_iter()
            .map(|device| {
                let properties = instance.get_physical_device_properties(device);
                let name = properties.device_name_as_c_str().unwrap_or(c"unnamed");
                Adapter {
                    name: name.to_string_lossy().into_owned(),
                    software: properties.device_type == vk::PhysicalDeviceType::CPU,
                }
            })
            .collect();
        instance.destroy_instance(None);
        adapters
    }
}

#[cfg(target_vendor = "apple")]
fn vulkan_adapters() -> Vec<Adapter> {
    Vec::new()
}

#[cfg(all(test, not(target_vendor = "apple")))]
mod tests {
    use super::*;

    fn machine(cuda_devices: usize, adapters: &[(&str, bool)]) -> Machine {
        Machine {
            cuda_devices,
            cuda_toolkit: true,
            vulkan: adapters
                .iter()
                .map(|&(name, software)| Adapter {
                    name: name.to_owned(),
                    software,
                })
                .collect(),
            trouble: None,
        }
    }

    #[test]
    fn auto_prefers_cuda_over_any_other_gpu() {
        let (backend, why) = machine(2, &[("Some GPU", false)]).auto();
        assert_eq!(backend, Backend::Cuda);
        assert!(why.contains("2 devices"), "{why}");
    }

    #[test]
    fn auto_leaves_cuda_where_its_math_library_is_missing() {
        let half = Machine {
            cuda_toolkit: false,
            ..machine(1, &[("Some GPU", false)])
        };
        let (backend, why) = half.auto();
        assert_eq!(backend, Backend::Wgpu);
        assert!(why.contains("CUDA_PATH"), "{why}");
    }

    #[test]
    fn auto_takes_the_real_gpu_behind_a_software_one() {
        let (backend, why) = machine(0, &[("llvmpipe", true), ("Some GPU", false)]).auto();
        assert_eq!(backend, Backend::Wgpu);
        assert!(why.contains("Some GPU"), "{why}");
    }

    #[cfg(not(windows))]
    #[test]
    fn auto_never_takes_a_software_adapter() {
        let (backend, why) = machine(0, &[("llvmpipe", true)]).auto();
        assert_eq!(backend, Backend::Cpu);
        assert!(
            why.contains("llvmpipe") && why.contains("software"),
            "{why}"
        );
    }

    #[test]
    fn only_hardware_counts_as_hardware() {
        let soft = machine(0, &[("llvmpipe", true)]);
        assert!(!soft.is_hardware(Backend::Wgpu) && !soft.is_hardware(Backend::Cuda));
        assert!(soft.has_wgpu());
        let real = machine(1, &[("Some GPU", false)]);
        assert!(real.is_hardware(Backend::Wgpu) && real.is_hardware(Backend::Cuda));
        assert!(!real.is_hardware(Backend::Cpu));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_backend_without_its_driver_is_refused_with_what_to_do() {
        let why = |machine: &Machine, backend| machine.missing(backend).unwrap_or_default();
        let bare = machine(0, &[]);
        assert!(why(&bare, Backend::Cuda).contains("--backend cpu"));
        assert!(why(&bare, Backend::Wgpu).contains("mesa-vulkan-drivers"));
        assert_eq!(why(&bare, Backend::Cpu), "");
        let half = Machine {
            cuda_toolkit: false,
            ..machine(1, &[])
        };
        assert!(why(&half, Backend::Cuda).contains("CUDA_PATH"));
        let soft = machine(0, &[("llvmpipe", true)]);
        assert!(why(&soft, Backend::Vulkan).contains("software drivers fail on SPIR-V"));
        assert_eq!(why(&soft, Backend::Wgpu), "");
    }

    #[test]
    fn the_lines_of_the_probe_read_back() {
        let read = Machine::from_lines("cuda\t1\nsoftware\tllvmpipe (LLVM 15)\ngpu\tA\tB\nnoise\n");
        assert_eq!(read.cuda_devices, 1);
        assert_eq!(read.vulkan.len(), 2);
        assert!(read.vulkan[0].software && !read.vulkan[1].software);
        assert_eq!(read.vulkan[0].name, "llvmpipe (LLVM 15)");
    }
}
