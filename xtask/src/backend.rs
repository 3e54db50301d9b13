//! The backends that can be asked for, and what each needs from cargo and from this platform.

use std::fmt;
use std::str::FromStr;

use anyhow::{Error, bail};

/// A backend as `--backend` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// Chosen from what this machine has, see [`crate::detect`].
    Auto,
    /// Flex, in every build.
    Cpu,
    /// NVIDIA's driver; kernels compiled by LLVM.
    Cuda,
    /// WGSL shaders on whichever graphics API there is.
    Wgpu,
    /// SPIR-V shaders on Vulkan.
    Vulkan,
    /// Metal Shading Language on Apple's GPUs.
    Metal,
}

impl Backend {
    /// Every backend, in the order in which they are listed to the user.
    pub const ALL: [Backend; 6] = [
        Backend::Auto,
        Backend::Cpu,
        Backend::Cuda,
        Backend::Wgpu,
        Backend::Vulkan,
        Backend::Metal,
    ];

    /// The word that `--backend` takes.
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

    /// The trainer's cargo feature; the CPU needs none. [`Backend::Auto`] has to be resolved first.
    pub fn feature(self) -> Option<&'static str> {
        match self {
            Backend::Auto | Backend::Cpu => None,
            gpu => Some(gpu.name()),
        }
    }

    /// One sentence that says why this platform cannot build the backend, if it cannot.
    pub fn missing_on_this_platform(self) -> Option<&'static str> {
        let apple = cfg!(target_vendor = "apple");
        match self {
            Backend::Metal if !apple => Some("Metal exists on Apple machines only"),
            Backend::Cuda if apple => Some("NVIDIA publishes no CUDA for Apple machines"),
            Backend::Vulkan if apple => Some("Apple machines have Metal in Vulkan's place"),
            _ => None,
        }
    }

    /// The backends that this platform can build, for an error that has to name what would work.
    pub fn on_this_platform() -> String {
        let names: Vec<_> = Backend::ALL
            .into_iter()
            .filter(|backend| backend.missing_on_this_platform().is_none())
            .map(Backend::name)
            .collect();
        names.join(", ")
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        match Backend::ALL.into_iter().find(|b| b.name() == word) {
            Some(backend) => Ok(backend),
            None => bail!(
                "there is no backend {word:?}; the known ones are {}",
                Backend::ALL.map(Backend::name).join(", ")
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_back_as_its_backend() {
        for backend in Backend::ALL {
            assert_eq!(backend.name().parse::<Backend>().unwrap(), backend);
        }
    }

    #[test]
    fn an_unknown_backend_lists_the_known_ones() {
        let message = "opencl".parse::<Backend>().unwrap_err().to_string();
        assert!(message.contains("\"opencl\""), "{message}");
        assert!(
            message.contains("auto, cpu, cuda, wgpu, vulkan, metal"),
            "{message}"
        );
    }

    #[test]
    fn metal_and_cuda_never_share_a_platform() {
        let missing = |b: Backend| b.missing_on_this_platform().is_some();
        assert_ne!(missing(Backend::Metal), missing(Backend::Cuda));
        assert!(!missing(Backend::Cpu) && !missing(Backend::Wgpu) && !missing(Backend::Auto));
    }
}
