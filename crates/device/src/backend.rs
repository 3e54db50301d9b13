//! The names that `--backend` accepts.

use std::fmt;
use std::str::FromStr;

use super::DeviceError;

/// A backend, as named by `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Backend {
    /// The best backend that this build includes and this machine supports: CUDA, Metal, Vulkan,
    /// wgpu, CPU.
    #[default]
    Auto,
    /// Burn's Flex on the CPU; in every build.
    Cpu,
    /// NVIDIA GPUs through the CUDA driver.
    Cuda,
    /// WGSL shaders, on Vulkan, Direct3D 12 or Metal.
    Wgpu,
    /// SPIR-V shaders on Vulkan.
    Vulkan,
    /// Metal Shading Language on Apple GPUs.
    Metal,
}

impl Backend {
    /// Every backend, in the order of lists for the user.
    pub const ALL: [Backend; 6] = [
        Backend::Auto,
        Backend::Cpu,
        Backend::Cuda,
        Backend::Wgpu,
        Backend::Vulkan,
        Backend::Metal,
    ];

    /// The name that `--backend` accepts.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Auto => "auto",
            Backend::Cpu => "cpu",
            Backend::Cuda => "cuda",
            Backend::Wgpu => "wgpu",
            Backend::Vulkan => "vulkan",
            Backend::Metal => "metal",
        }
    }

    /// Whether this build has the backend compiled in.
    pub fn is_compiled_in(self) -> bool {
        match self {
            Backend::Auto | Backend::Cpu => true,
            Backend::Cuda => cfg!(feature = "cuda"),
            Backend::Wgpu => cfg!(feature = "wgpu"),
            Backend::Vulkan => cfg!(feature = "vulkan"),
            Backend::Metal => cfg!(feature = "metal"),
        }
    }

    /// Why the backend is not supported on this platform; `None` if it is.
    pub(super) fn missing_on_this_platform(self) -> Option<&'static str> {
        let apple = cfg!(target_vendor = "apple");
        match self {
            Backend::Metal if !apple => Some("Metal is available on Apple machines only"),
            Backend::Cuda if apple => Some("CUDA is not available on Apple machines"),
            Backend::Vulkan if apple => Some("Apple machines use Metal instead of Vulkan"),
            _ => None,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = DeviceError;

    fn from_str(word: &str) -> Result<Self, DeviceError> {
        Backend::ALL
            .into_iter()
            .find(|backend| backend.name() == word)
            .ok_or_else(|| DeviceError::Unknown {
                word: word.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_back_as_its_backend() {
        for backend in Backend::ALL {
            assert_eq!(backend.name().parse(), Ok(backend));
        }
    }

    #[test]
    fn an_unknown_backend_lists_the_known_ones() {
        let message = "rocm".parse::<Backend>().unwrap_err().to_string();
        assert!(message.contains("\"rocm\""), "{message}");
        assert!(
            message.contains("auto, cpu, cuda, wgpu, vulkan, metal"),
            "{message}"
        );
    }
}
