//! What can keep a device from being used, in words for the user.

use thiserror::Error;

use super::Backend;
#[cfg(doc)]
use super::{check_device, self_test};

/// Why there is no such device. Each message is one line that also says what to do.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum DeviceError {
    /// No build for this operating system has it.
    #[error("backend {backend}: {why}; use --backend auto or --backend cpu")]
    WrongPlatform {
        /// What was asked for.
        backend: Backend,
        /// The reason.
        why: &'static str,
    },
    /// This binary was built without it.
    #[error(
        "backend {backend} is not in this build; `cargo xtask train --backend {backend}` builds \
         it in (cargo feature `{backend}` of the package `trainer`)"
    )]
    NotCompiled {
        /// What was asked for.
        backend: Backend,
    },
    /// WGSL was asked of a build whose native shader compiler takes over its devices.
    #[error(
        "backend wgpu is not in a build with `{native}`, which compiles every shader natively; \
         use --backend {native}, or build without it: `cargo xtask train --backend wgpu`"
    )]
    NativeShaders {
        /// The backend that is in the build.
        native: Backend,
    },
    /// No driver, or a driver without a device.
    #[error("backend {backend}: {missing}; {advice}")]
    NoHardware {
        /// What was asked for.
        backend: Backend,
        /// What is not there.
        missing: String,
        /// What to install, or to use instead.
        advice: String,
    },
    /// The device is there and did not start.
    #[error("{name} did not start: {message}; use --backend cpu, or update its driver")]
    Initialization {
        /// The backend or the device.
        name: String,
        /// The driver's words.
        message: String,
    },
    /// [`self_test`] or [`check_device`] found numbers that are not the CPU's.
    #[error(
        "{name} computes wrong numbers: {operation} differs from the CPU's result by {difference:.1e} relative, and \
         rounding explains at most {tolerance:.0e}. Results of this device cannot be trusted: {advice}"
    )]
    WrongNumbers {
        /// The device, its driver included.
        name: String,
        /// The operation that differs most.
        operation: String,
        /// The largest relative distance; not a number where the device gave none.
        difference: f64,
        /// What rounding explains.
        tolerance: f64,
        /// Switches that may help, or a driver.
        advice: String,
    },
    /// A comparison with the CPU that the device did not come to the end of.
    #[error(
        "{name} failed in the comparison with the CPU: {message}; update its driver, or use --backend cpu"
    )]
    Unchecked {
        /// The device, its driver included.
        name: String,
        /// The driver's words.
        message: String,
    },
    /// `--no-autotune` in a build that has no other way.
    #[error(
        "--no-autotune: this build times its kernels and has no switch for it; `cargo xtask train --no-autotune` \
         builds the trainer without"
    )]
    Tunes,
    /// Products in bf16 that come out wrong.
    #[error("{reason}; compute_dtype = \"f32\" works")]
    Bf16Products {
        /// What was found.
        reason: String,
    },
    /// A `compute_dtype` that the device does not have.
    #[error("compute_dtype {requested}: {name} has no {requested} arithmetic; use {allowed}")]
    Precision {
        /// What was asked for.
        requested: &'static str,
        /// The device.
        name: String,
        /// What it has.
        allowed: String,
    },
}
