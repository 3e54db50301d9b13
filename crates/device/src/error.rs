//! Why a device cannot be used, in messages for the user.

use thiserror::Error;

use super::Backend;
#[cfg(doc)]
use super::{check_device, self_test};

/// Why a device cannot be used. Each message is one line that also names a remedy.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum DeviceError {
    /// The backend is not supported on this operating system.
    #[error("backend {backend}: {why}; use --backend auto or --backend cpu")]
    WrongPlatform {
        /// The selected backend.
        backend: Backend,
        /// The reason.
        why: &'static str,
    },
    /// This build does not include the backend.
    #[error(
        "backend {backend} is not in this build; `cargo xtask train --backend {backend}` builds \
         it in (cargo feature `{backend}` of the package `trainer`)"
    )]
    NotCompiled {
        /// The selected backend.
        backend: Backend,
    },
    /// wgpu was selected in a build whose native shader compiler takes over its devices.
    #[error(
        "this build has `{native}`, which excludes wgpu; use --backend {native}, or rebuild: \
         `cargo xtask train --backend wgpu`"
    )]
    NativeShaders {
        /// The backend that this build includes.
        native: Backend,
    },
    /// No driver, or a driver without a device.
    #[error("backend {backend}: {missing}; {advice}")]
    NoHardware {
        /// The selected backend.
        backend: Backend,
        /// What is missing.
        missing: String,
        /// What to install, or to use instead.
        advice: String,
    },
    /// The device exists and did not start.
    #[error("{name} did not start: {message}; use --backend cpu, or update its driver")]
    Initialization {
        /// The backend or the device.
        name: String,
        /// The driver's message.
        message: String,
    },
    /// [`self_test`] or [`check_device`] found results that differ from the CPU's.
    #[error(
        "{name} computes wrong numbers: {operation} differs from the CPU's result by {difference:.1e} relative, and \
         rounding explains at most {tolerance:.0e}. Results of this device cannot be trusted: {advice}"
    )]
    WrongNumbers {
        /// The device, its driver included.
        name: String,
        /// The operation that differs most.
        operation: String,
        /// The largest relative distance; not a number if the device returned one.
        difference: f64,
        /// The difference that rounding explains.
        tolerance: f64,
        /// Switches that may help, or another driver.
        advice: String,
    },
    /// The device failed during the comparison with the CPU.
    #[error(
        "{name} failed during the comparison with the CPU: {message}; update its driver, or use --backend cpu"
    )]
    Unchecked {
        /// The device, its driver included.
        name: String,
        /// The driver's message.
        message: String,
    },
    /// `--no-autotune` in a build that can only tune.
    #[error(
        "--no-autotune: this build always autotunes; `cargo xtask train --no-autotune` builds one that does not"
    )]
    Tunes,
    /// Products in bf16 that are wrong.
    #[error("{reason}; compute_dtype = \"f32\" works")]
    Bf16Products {
        /// The wrong result.
        reason: String,
    },
    /// A `compute_dtype` that the device does not support.
    #[error("compute_dtype {requested}: {name} has no {requested} arithmetic; use {allowed}")]
    Precision {
        /// The requested type.
        requested: &'static str,
        /// The device.
        name: String,
        /// The supported types.
        allowed: String,
    },
}
