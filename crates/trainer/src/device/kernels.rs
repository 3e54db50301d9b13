//! Switches for those whose driver or compiler does not bear what Burn does with kernels.

use std::sync::atomic::{AtomicBool, Ordering};

use lora_core::Fusion;

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
    lora_core::set_fusion(match UNFUSED.load(Ordering::Relaxed) {
        true => Fusion::Off,
        false => Fusion::InOrder,
    });
}

/// What the first step of a run does besides, on a GPU.
pub fn first_step() -> &'static str {
    match cfg!(feature = "autotune") {
        true => {
            "the first step compiles kernels and times several of each to find the fastest, which takes minutes; \
             later steps do not"
        }
        false => "the first step compiles kernels; later steps do not",
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
