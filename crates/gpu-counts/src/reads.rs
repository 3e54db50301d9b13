//! The only function that reads training's numbers back to the host, so that reads can be counted.

use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::Tensor;

static READS: AtomicU64 = AtomicU64::new(0);

/// A tensor's values in f32, row-major. The caller waits until the device has computed them.
///
/// # Errors
///
/// The device's message if it does not return them.
pub fn read_floats<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, String> {
    READS.fetch_add(1, Ordering::Relaxed);
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    let data = data.convert::<f32>();
    data.try_to_vec::<f32>()
        .map_err(|error| format!("{error:?}"))
}

/// The number of calls of [`read_floats`] in this process so far.
pub fn reads() -> u64 {
    READS.load(Ordering::Relaxed)
}
