//! Switches for those whose driver or compiler does not bear what Burn does with kernels.

use std::env;
use std::sync::atomic::{AtomicBool, Ordering};

use super::DeviceError;

/// What Burn reads its fusion's settings from (burn-std, `config/base.rs`), once, when the first device starts.
const EXPLORATIONS: &str = "BURN_FUSION_MAX_EXPLORATIONS";

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
    /// Call it before the first device starts and before the program has a second thread.
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
        if self.no_fusion {
            // With no exploration left, Burn hands every operation on as it comes (burn-fusion,
            // `stream/execution/explorer.rs`). The variable is laid over a burn.toml that the user may have.
            // SAFETY: no other thread runs yet that could read or write the environment.
            unsafe { env::set_var(EXPLORATIONS, "0") };
        }
        Ok(())
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
