//! An operation made wrong on purpose on the device, for tests of what has to notice it.
//!
//! A driver's bug cannot be had on demand; this stands in for one. Nothing acts until [`spoil`] is called, and
//! until then an operation pays for one relaxed load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::cpu;

/// The operations that can be made wrong.
pub const OPERATIONS: [&str; 12] = [
    "rms_norm",
    "rms_norm_backward",
    "quantized_product",
    "quantized_product_backward",
    "low_rank",
    "rope",
    "rope_backward",
    "attention",
    "attention_backward",
    "swiglu",
    "swiglu_backward",
    "cross_entropy",
];

static ACTIVE: AtomicBool = AtomicBool::new(false);
static SPOILT: Mutex<Option<String>> = Mutex::new(None);

/// Makes one of [`OPERATIONS`] wrong from here on, or, with `None`, none any more. It counts for the process.
pub fn spoil(operation: Option<&str>) {
    *SPOILT.lock().unwrap_or_else(PoisonError::into_inner) = operation.map(String::from);
    ACTIVE.store(operation.is_some(), Ordering::Relaxed);
}

/// The output of an operation, or something that is a tenth too large where it is the one that is wrong. What
/// the CPU computes stays right: it is what others are compared with.
#[inline]
pub fn spoilt<const D: usize>(operation: &str, x: Tensor<D>) -> Tensor<D> {
    if ACTIVE.load(Ordering::Relaxed) {
        wrong(operation, x)
    } else {
        x
    }
}

#[cold]
fn wrong<const D: usize>(operation: &str, x: Tensor<D>) -> Tensor<D> {
    let spoilt = SPOILT.lock().unwrap_or_else(PoisonError::into_inner);
    if spoilt.as_deref() == Some(operation) && !cpu::is_cpu(&x.device()) {
        x.mul_scalar(1.1)
    } else {
        x
    }
}
