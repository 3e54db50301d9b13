//! Integrated GPUs also draw the screen. Work is submitted to them in small portions, because
//! Windows and macOS reset a GPU that is busy for long.

use std::time::Instant;

use burn::tensor::{DType, Device, Tensor};

/// Kernels that are submitted together.
pub const LAUNCHES: usize = 4;

/// The time that one kernel may take, in seconds: [`LAUNCHES`] of them take about half a second, a
/// quarter of the time after which Windows resets a GPU.
const SECONDS: f64 = 0.12;

/// Rows and width of the timed product: 4.3 GFLOP, some hundredths of a second.
const SIZE: [usize; 2] = [512, 2048];

/// Measures how fast the device multiplies and limits its launches accordingly.
///
/// # Panics
///
/// If the device panics.
pub fn limit(device: &Device) {
    let [rows, width] = SIZE;
    let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, (device, DType::F32));
    let (x, w) = (ones([rows, width]), ones([width, width]));
    let product = || {
        let product = x.clone().matmul(w.clone());
        // Read, so that it has been computed.
        product.narrow(0, 0, 1).into_data()
    };
    // The first product compiles and chooses the kernel.
    product();
    let started = Instant::now();
    product();
    let flops = 2.0 * (rows * width * width) as f64;
    kernels::limit_launches(Some(most(flops / started.elapsed().as_secs_f64())));
}

/// Floating-point operations per launch, for a device with so many per second.
fn most(flops_per_s: f64) -> u64 {
    // A wrong measurement must not limit too much: an integrated GPU reaches 50 GFLOP/s at least.
    (flops_per_s.max(5e10) * SECONDS) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_takes_about_an_eighth_of_a_second_at_most() {
        assert_eq!(most(1e12), 120_000_000_000);
        assert_eq!(most(0.0), most(5e10));
    }
}
