//! The names that `--backend` accepts.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

/// A backend, as named by `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Backend {
    /// The best backend that the build includes and the machine supports: CUDA, Metal, Vulkan, wgpu,
    /// CPU.
    #[default]
    Auto,
    /// Burn's Flex on the CPU; in every build.
    Cpu,
    /// NVIDIA GPUs through the CUDA driver; kernels compiled by LLVM.
    Cuda,
    /// WGSL shaders, on Vulkan, Direct3D 12 or Metal.
    Wgpu,
    /// SPIR-V shaders on Vulkan.
    Vulkan,
    /// Metal Shading Language on Apple GPUs.
    Metal,
}

/// `--backend` with an unknown name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no backend {word:?}; the known ones are {}",
    Backend::ALL.map(Backend::name).join(", ")
)]
pub struct UnknownBackend {
    /// The given name.
    pub word: String,
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

    /// The cargo feature of each program's package; the CPU needs none. [`Backend::Auto`] has to be
    /// resolved first.
    pub fn feature(self) -> Option<&'static str> {
        match self {
            Backend::Auto | Backend::Cpu => None,
            gpu => Some(gpu.name()),
        }
    }

    /// Why the backend is not supported on this platform, as a sentence; `None` if it is.
    pub fn missing_on_this_platform(self) -> Option<&'static str> {
        let apple = cfg!(target_vendor = "apple");
        match self {
            Backend::Metal if !apple => Some("Metal is available on Apple machines only"),
            Backend::Cuda if apple => Some("CUDA is not available on Apple machines"),
            Backend::Vulkan if apple => Some("Apple machines use Metal instead of Vulkan"),
            _ => None,
        }
    }

    /// The names of the backends that this platform supports, for messages.
    pub fn on_this_platform() -> String {
        let present = Backend::ALL
            .into_iter()
            .filter(|backend| backend.missing_on_this_platform().is_none());
        present.map(Backend::name).collect::<Vec<_>>().join(", ")
    }

    /// The help of a program's `--backend`.
    pub fn help() -> &'static str {
        static HELP: LazyLock<String> = LazyLock::new(|| help_of(&Backend::ALL));
        &HELP
    }

    /// The help of a `--backend` that accepts GPUs only.
    pub fn help_for_gpus() -> &'static str {
        static HELP: LazyLock<String> = LazyLock::new(|| {
            let gpus = Backend::ALL.into_iter().filter(|&it| it != Backend::Cpu);
            help_of(&gpus.collect::<Vec<_>>())
        });
        &HELP
    }
}

/// `a, b or c, if this build includes it`
fn help_of(backends: &[Backend]) -> String {
    let names: Vec<_> = backends.iter().map(|backend| backend.name()).collect();
    let list = match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => names.concat(),
    };
    format!("{list}, if this build includes it")
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(word: &str) -> Result<Self, UnknownBackend> {
        let found = Backend::ALL.into_iter().find(|it| it.name() == word);
        found.ok_or_else(|| UnknownBackend { word: word.into() })
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

    #[test]
    fn metal_and_cuda_never_share_a_platform() {
        let missing = |b: Backend| b.missing_on_this_platform().is_some();
        assert_ne!(missing(Backend::Metal), missing(Backend::Cuda));
        assert!(!missing(Backend::Cpu) && !missing(Backend::Wgpu) && !missing(Backend::Auto));
    }

    #[test]
    fn only_gpus_have_a_feature() {
        assert_eq!(Backend::Auto.feature(), None);
        assert_eq!(Backend::Cpu.feature(), None);
        assert_eq!(Backend::Vulkan.feature(), Some("vulkan"));
    }

    #[test]
    fn the_help_lists_the_names_that_the_option_accepts() {
        assert_eq!(
            Backend::help(),
            "auto, cpu, cuda, wgpu, vulkan or metal, if this build includes it"
        );
        assert!(Backend::help_for_gpus().starts_with("auto, cuda, wgpu, vulkan or metal,"));
    }
}
