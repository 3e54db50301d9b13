//! The type in which the CPU multiplies quantized weights.

use std::sync::atomic::{AtomicBool, Ordering};

use super::bf16;

static BF16: AtomicBool = AtomicBool::new(false);

/// Whether this processor multiplies bf16 numbers (AVX512-BF16).
pub fn has_bf16_products() -> bool {
    bf16::is_supported()
}

/// Makes the CPU multiply quantized weights in bf16, in the whole process, or in f32 again.
///
/// Everything else stays f32: activations between products, sums, adapters. See docs/decisions/precision.md
/// for the error. Comparisons of results between machines need f32.
///
/// # Errors
///
/// If the processor has no such products, or computes them incorrectly (a small product is compared with an emulation
/// first).
pub fn use_bf16_products(on: bool) -> Result<(), String> {
    if on {
        if !has_bf16_products() {
            return Err("this processor has no bf16 products (AVX512-BF16)".into());
        }
        bf16::self_check()?;
    }
    BF16.store(on, Ordering::Relaxed);
    Ok(())
}

pub(super) fn is_bf16() -> bool {
    BF16.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_bf16_products_is_an_error() {
        if has_bf16_products() {
            // Switching it on would change the results of tests that run at the same time.
            assert_eq!(bf16::self_check(), Ok(()))
        } else {
            let error = use_bf16_products(true).unwrap_err();
            assert!(error.contains("AVX512-BF16"), "{error}");
            assert!(!is_bf16());
        }
    }
}
