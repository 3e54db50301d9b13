//! The one way by which training's numbers come back to the host, so that it can be counted.

use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::Tensor;

static READS: AtomicU64 = AtomicU64::new(0);

/// A tensor's values in f32, row-major. The caller waits until the device has computed them.
///
/// # Errors
///
/// The device's words, where it does not return them.
pub fn read_floats<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, String> {
    READS.fetch_add(1, Ordering::Relaxed);
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    let data = data.convert::<f32>();
    data.try_to_vec::<f32>()
        .map_err(|error| format!("{error:?}"))
}

/// Calls of [`read_floats`] in this process so far.
pub fn reads() -> u64 {
    READS.load(Ordering::Relaxed)
}
