//! Switches for those whose driver or compiler does not bear what Burn does with kernels.

use std::sync::atomic::{AtomicBool, Ordering};

use kernels::Fusion;

use super::DeviceError;

/// Whether `--no-fusion` was given.
static UNFUSED: AtomicBool = AtomicBool::new(false);
/// Whether `--no-autotune` was given.
static UNTUNED: AtomicBool = AtomicBool::new(false);

/// The switches as arguments.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct KernelArgs {
    /// Launch every operation as a kernel of its own, instead of fusing neighbours into one. Slower; for GPUs
    /// whose driver gets fused kernels wrong
    #[arg(long)]
    pub no_fusion: bool,
    /// Take the first kernel that fits instead of timing several. It is decided when the program is built:
    /// `cargo xtask` builds accordingly
    #[arg(long)]
    pub no_autotune: bool,
}

impl KernelArgs {
    /// Makes the switches count.
    ///
    /// Call it before the first device starts.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Tunes`] for `no_autotune` in a build that tunes: CubeCL has no switch for it at run time.
    pub fn apply(self) -> Result<(), DeviceError> {
        if self.no_autotune && cfg!(feature = "autotune") {
            return Err(DeviceError::Tunes);
        }
        UNTUNED.store(self.no_autotune, Ordering::Relaxed);
        UNFUSED.store(self.no_fusion, Ordering::Relaxed);
        Ok(())
    }
}

/// Tells Burn what to fuse, which it reads once, when the first device starts.
pub(super) fn set_fusion() {
    kernels::set_fusion(if UNFUSED.load(Ordering::Relaxed) {
        Fusion::Off
    } else {
        Fusion::InOrder
    });
}

/// Kernels that CubeCL keeps on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeptKernels {
    /// Operations whose fastest kernel is known, each for sizes of a kind.
    pub tuned: u64,
    /// Kernels in the driver's or the device's own form. WGSL has none: the driver compiles, and keeps what it likes.
    pub compiled: u64,
}

impl KeptKernels {
    /// Those of `self` that are not of `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            tuned: self.tuned.saturating_sub(before.tuned),
            compiled: self.compiled.saturating_sub(before.compiled),
        }
    }
}

/// Has CubeCL keep tuned and compiled kernels in the user's cache folder, for the next start of any process. Without one,
/// CubeCL takes a folder of its own choice.
///
/// Call it before the first device starts. On a software driver every kernel takes long and none is fast: the fewest
/// candidates are timed there, once each.
#[cfg(feature = "autotune")]
pub(super) fn keep(for_software: bool) {
    use burn_cubecl::cubecl::config::autotune::AutotuneLevel;
    use burn_cubecl::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
    use burn_cubecl::cubecl::{environment, records};

    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let mut config = CubeClRuntimeConfig::from_current_dir();
        if for_software {
            config.autotune.level = AutotuneLevel::Minimal;
            config.autotune.bench.min_samples = 1;
            config.autotune.bench.max_samples = 1;
            config.autotune.bench.adaptive = false;
        }
        let mut config = config.override_from_env();
        config.compilation.cache = true;
        // Not set where another part of the program has set it already.
        CubeClRuntimeConfig::try_set(config);
        // An account of every start, which nothing here reads.
        records::configure(records::RecordsConfig {
            level: records::RecordLevel::Off,
            keep_sessions: None,
        });
        if let Some(folder) = durable::cache_folder() {
            environment::set_root(folder.join("llama-lora-trainer/kernels"));
        }
    });
}

#[cfg(not(feature = "autotune"))]
pub(super) fn keep(_for_software: bool) {}

/// The kernels on disk; `None` in a build that keeps none.
#[cfg(feature = "autotune")]
pub fn kept_kernels() -> Option<KeptKernels> {
    let namespaces = burn_cubecl::cubecl::environment::namespaces();
    let entries = |of: &dyn Fn(&str) -> bool| {
        let found = namespaces.iter().filter(|found| of(&found.namespace));
        found.map(|found| found.entries).sum()
    };
    let is_tuned = |name: &str| name.starts_with("autotune/");
    let is_compiled = |name: &str| {
        ["cuda/", "vulkan/", "metal/"]
            .iter()
            .any(|kind| name.starts_with(kind))
    };
    Some(KeptKernels {
        tuned: entries(&is_tuned),
        compiled: entries(&is_compiled),
    })
}

/// The kernels on disk; `None` in a build that keeps none.
#[cfg(not(feature = "autotune"))]
pub fn kept_kernels() -> Option<KeptKernels> {
    None
}

/// What the first step of a run does besides, on a GPU where these kernels were on disk when the program started.
pub fn first_step(kept: Option<KeptKernels>) -> String {
    match kept {
        None => "the first step compiles kernels; later steps do not".into(),
        Some(KeptKernels { tuned: 0, .. }) => {
            "the first step compiles kernels and times several of each to find the fastest. That takes minutes, once: \
             later steps and later starts find the result on disk"
                .into()
        }
        Some(kept) => format!(
            "the fastest kernels of {} operations are known from earlier starts; new sizes are tuned when they first \
             come",
            kept.tuned
        ),
    }
}

/// The switches that are on, as they are written.
pub fn switches() -> Vec<&'static str> {
    let all = [(&UNFUSED, "--no-fusion"), (&UNTUNED, "--no-autotune")];
    let on = all.into_iter().filter(|(on, _)| on.load(Ordering::Relaxed));
    on.map(|(_, name)| name).collect()
}

/// Whether operations are fused and kernels tuned here, so that switching it off could help.
pub(super) fn fuses_and_tunes() -> [bool; 2] {
    [!UNFUSED.load(Ordering::Relaxed), cfg!(feature = "autotune")]
}
