//! Limits and features of a device.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use burn::tensor::{Device, Tensor};

/// The largest number of floating-point operations per launch; 0 without a limit.
static MOST_FLOPS: AtomicU64 = AtomicU64::new(0);

/// Splits matrix products on this process's GPUs into chunks of rows with at most this many floating-point operations
/// each; `None` removes the limit. For weak GPUs: a driver resets a device that one launch keeps busy for too long
/// (Windows after 2 seconds), and a display on the same GPU freezes meanwhile.
pub fn limit_launches(flops: Option<u64>) {
    MOST_FLOPS.store(flops.unwrap_or(0), Ordering::Relaxed);
}

/// Rows of a product `[n, k] · [k, m]` that one launch computes under the limit.
pub(crate) fn rows_at_once([n, k, m]: [usize; 3]) -> usize {
    match MOST_FLOPS.load(Ordering::Relaxed) {
        0 => n,
        most => {
            let of_row = 2 * (k as u64) * (m as u64);
            ((most / of_row.max(1)) as usize).clamp(1, n.max(1))
        }
    }
}

/// Applies `product` to chunks of this many rows of `x`, and of `sum`, and concatenates the results.
pub(crate) fn by_rows(
    sum: Option<Tensor<2>>,
    x: Tensor<2>,
    rows: usize,
    product: impl Fn(Option<Tensor<2>>, Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let n = x.dims()[0];
    let pieces = (0..n).step_by(rows).map(|first| {
        let part = |x: Tensor<2>| x.narrow(0, first, rows.min(n - first));
        product(sum.clone().map(part), part(x.clone()))
    });
    Tensor::cat(pieces.collect(), 0)
}

/// The assumed limit; 0 if none is assumed.
static ASSUMED: AtomicUsize = AtomicUsize::new(0);

/// The largest buffer that a kernel on this device reads or writes, in bytes; `None` on the CPU.
pub fn largest_buffer(device: &Device) -> Option<usize> {
    let largest = known(device)?;
    match ASSUMED.load(Ordering::Relaxed) {
        0 => Some(largest),
        assumed => Some(assumed),
    }
}

/// Overrides [`largest_buffer`] for every GPU of this process until it is dropped. For counting, on any device, the
/// work of a larger one. Kernels on buffers that are larger than the device's limit fail.
#[derive(Debug)]
#[must_use = "the override ends when it is dropped"]
pub struct AssumedBuffer(());

impl AssumedBuffer {
    /// Assumes `bytes`.
    pub fn new(bytes: usize) -> Self {
        ASSUMED.store(bytes, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for AssumedBuffer {
    fn drop(&mut self) {
        ASSUMED.store(0, Ordering::Relaxed);
    }
}

/// Whether a GPU multiplies f32 in TF32, which keeps 11 bits of each factor. [`use_exact_f32`](crate::use_exact_f32)
/// prevents it.
pub fn has_tf32(device: &Device) -> bool {
    units(device).is_some_and(|units| units.tf32)
}

/// Whether a GPU has matrix units that multiply f16 and accumulate in f32.
pub fn has_f16_matrix_units(device: &Device) -> bool {
    units(device).is_some_and(|units| units.f16)
}

/// The matrix units of a GPU.
struct Units {
    tf32: bool,
    f16: bool,
}

#[cfg(feature = "cube")]
pub(crate) fn client(device: &Device) -> Option<burn_cubecl::cubecl::client::Client> {
    use burn::backend::DispatchDevice;
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => Some(device.client()),
        _ => None,
    }
}

#[cfg(feature = "cube")]
fn known(device: &Device) -> Option<usize> {
    let largest = client(device)?.properties().memory.max_page_size;
    usize::try_from(largest).ok()
}

#[cfg(feature = "cube")]
fn units(device: &Device) -> Option<Units> {
    use burn_cubecl::cubecl::ir::{ElemType, FloatKind};
    let [f16, f32, tf32] = [FloatKind::F16, FloatKind::F32, FloatKind::TF32].map(ElemType::Float);
    let client = client(device)?;
    let properties = client.properties();
    let matmul = &properties.features.matmul;
    Some(Units {
        tf32: properties.supports_type(tf32),
        f16: matmul
            .cmma
            .iter()
            .chain(&matmul.mma)
            .any(|unit| (unit.a_type, unit.b_type, unit.cd_type) == (f16, f16, f32)),
    })
}

#[cfg(not(feature = "cube"))]
fn known(_device: &Device) -> Option<usize> {
    None
}

#[cfg(not(feature = "cube"))]
fn units(_device: &Device) -> Option<Units> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, normal};

    #[test]
    fn a_product_in_chunks_of_rows_equals_the_whole_product() {
        assert_eq!(rows_at_once([100, 8, 4]), 100);
        let device = Device::flex();
        let mut rng = CounterRng::new(1);
        let mut random = |shape| normal(shape, 1.0, &mut rng, &device);
        let (x, w, sum) = (random([23, 8]), random([8, 4]), random([23, 4]));
        let product = |sum: Option<Tensor<2>>, x: Tensor<2>| {
            let product = x.matmul(w.clone());
            sum.map_or(product.clone(), |sum| sum + product)
        };
        for sum in [None, Some(sum)] {
            let whole = product(sum.clone(), x.clone()).into_data();
            for rows in [1, 5, 22, 23] {
                let pieces = by_rows(sum.clone(), x.clone(), rows, product);
                let tolerance = burn::tensor::Tolerance::absolute(1e-6);
                pieces
                    .into_data()
                    .assert_approx_eq::<f32>(&whole, tolerance);
            }
        }
    }
}
