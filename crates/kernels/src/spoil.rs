//! Fault injection: makes an operation of the device wrong, for tests of the checks that must detect it.
//!
//! It simulates a driver's bug. Without a call of [`spoil`] it has no effect and costs one relaxed load per operation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::cpu;

/// The operations into which a fault can be injected.
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

/// Injects a fault into one of [`OPERATIONS`], for the whole process; `None` removes it.
pub fn spoil(operation: Option<&str>) {
    *SPOILT.lock().unwrap_or_else(PoisonError::into_inner) = operation.map(String::from);
    ACTIVE.store(operation.is_some(), Ordering::Relaxed);
}

/// The output of an operation, a tenth too large if the operation has the fault. Results of the CPU are not changed:
/// they are the reference.
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
