//! Switches for drivers and compilers that cannot handle Burn's fused or tuned kernels.

use std::sync::atomic::{AtomicBool, Ordering};

use kernels::{Fusion, Kernel};

use super::DeviceError;

/// Whether `--no-fusion` was given.
static UNFUSED: AtomicBool = AtomicBool::new(false);
/// Whether `--no-autotune` was given.
static UNTUNED: AtomicBool = AtomicBool::new(false);

/// The switches as arguments.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct KernelArgs {
    /// Use Burn's operations instead of this program's own GPU kernels: "all", or some of product, few_rows, attention, low_rank,
    /// rms_norm, rope, swiglu, cross_entropy, adamw, separated by commas. For GPUs whose driver computes a kernel wrong
    #[arg(long, value_name = "KERNELS", value_delimiter = ',', value_parser = disabled)]
    pub disable_kernels: Vec<Disabled>,
    /// Launch every operation as its own kernel instead of fusing neighbouring operations. Slower; for GPUs
    /// whose driver computes fused kernels wrong
    #[arg(long)]
    pub no_fusion: bool,
    /// Use the first kernel that fits instead of timing several. A compile-time setting: `cargo xtask` makes a separate
    /// build
    #[arg(long)]
    pub no_autotune: bool,
}

/// An entry of `--disable-kernels`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disabled(Vec<Kernel>);

fn disabled(name: &str) -> Result<Disabled, String> {
    match (name, Kernel::from_name(name)) {
        ("all", _) => Ok(Disabled(Kernel::ALL.to_vec())),
        (_, Some(kernel)) => Ok(Disabled(vec![kernel])),
        (_, None) => {
            let names = Kernel::ALL.map(Kernel::name);
            Err(format!("no such kernel; use all, or {}", names.join(", ")))
        }
    }
}

impl KernelArgs {
    /// Applies the switches.
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
        let disabled = self
            .disable_kernels
            .iter()
            .flat_map(|Disabled(kernels)| kernels);
        kernels::switch_off(&disabled.copied().collect::<Vec<_>>());
        Ok(())
    }
}

/// Configures Burn's fusion. Burn reads the setting once, when the first device starts.
pub(super) fn set_fusion() {
    kernels::set_fusion(if UNFUSED.load(Ordering::Relaxed) {
        Fusion::Off
    } else {
        Fusion::InOrder
    });
}

/// Kernels that CubeCL caches on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeptKernels {
    /// Operations whose fastest kernel is known, each for a range of sizes.
    pub tuned: u64,
    /// Compiled kernels. WGSL has none: the driver compiles, and keeps its own cache.
    pub compiled: u64,
}

impl KeptKernels {
    /// The kernels in `self` that are not in `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            tuned: self.tuned.saturating_sub(before.tuned),
            compiled: self.compiled.saturating_sub(before.compiled),
        }
    }
}

/// Lets CubeCL cache tuned and compiled kernels in the user's cache folder, for the next start of
/// any process. Without a cache folder, CubeCL chooses one.
///
/// Call it before the first device starts. On a software driver all kernels are slow, so the fewest
/// candidates are timed, once each.
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
        // Unless another part of the program has already set it.
        CubeClRuntimeConfig::try_set(config);
        // A log of every start, which nothing here reads.
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

/// What the first step of a run also does, on a GPU whose cache held these kernels when the program
/// started.
pub fn first_step(kept: Option<KeptKernels>) -> String {
    match kept {
        None => "the first step compiles kernels; later steps do not".into(),
        Some(KeptKernels { tuned: 0, .. }) => {
            "the first step compiles kernels and times several of each to find the fastest. That takes minutes, once: \
             the result is cached for later steps and starts"
                .into()
        }
        Some(kept) => format!(
            "the fastest kernels of {} operations are known from earlier starts; new sizes are tuned on first use",
            kept.tuned
        ),
    }
}

/// The switches that are on, as on the command line.
pub fn switches() -> Vec<String> {
    let all = [(&UNFUSED, "--no-fusion"), (&UNTUNED, "--no-autotune")];
    let on = all.into_iter().filter(|(on, _)| on.load(Ordering::Relaxed));
    let mut on: Vec<String> = on.map(|(_, name)| name.to_owned()).collect();
    let off: Vec<_> = Kernel::ALL
        .into_iter()
        .filter(|kernel| !kernel.is_on())
        .collect();
    if off.len() == Kernel::ALL.len() {
        on.push("--disable-kernels all".to_owned());
    } else if !off.is_empty() {
        let names: Vec<_> = off.into_iter().map(Kernel::name).collect();
        on.push(format!("--disable-kernels {}", names.join(",")));
    }
    on
}

/// Whether any of the program's own GPU kernels is used, so that switching it off could help.
pub(super) fn uses_own_kernels() -> bool {
    Kernel::ALL.into_iter().any(Kernel::is_on)
}

/// Whether operations are fused and kernels tuned, so that switching it off could help.
pub(super) fn fuses_and_tunes() -> [bool; 2] {
    [!UNFUSED.load(Ordering::Relaxed), cfg!(feature = "autotune")]
}
