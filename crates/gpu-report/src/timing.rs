//! The time of work on a device: the median of several measurements after a warm-up.

use std::time::Instant;

use burn::tensor::Device;

use terminal::statistics::Spread;

use super::error::ReportError;

/// Measurements of each computation.
const REPEATS: usize = 5;

/// A measurement repeats the computation until it has taken this long, because short times are
/// noisy.
const AT_LEAST: f64 = 0.02;

/// Waits for the device.
pub fn sync(device: &Device) -> Result<(), ReportError> {
    let synced = device.sync();
    synced.map_err(|error| ReportError::Device(format!("{error:?}")))
}

/// The seconds that `work` takes. The first two runs, which compile and tune kernels, do not count.
///
/// The result of `work` is kept until the work is submitted to the device: fusion computes nothing
/// whose result is dropped.
///
/// # Errors
///
/// If the device fails.
pub fn seconds<T>(device: &Device, mut work: impl FnMut() -> T) -> Result<Spread, ReportError> {
    let mut time = |runs: usize| -> Result<f64, ReportError> {
        let started = Instant::now();
        for _ in 0..runs {
            let kept = work();
            let flushed = device.flush();
            drop(kept);
            flushed.map_err(|error| ReportError::Device(format!("{error:?}")))?;
        }
        sync(device)?;
        Ok(started.elapsed().as_secs_f64() / runs as f64)
    };
    time(1)?;
    time(1)?;
    let once = time(1)?;
    let runs = (AT_LEAST / once).ceil().clamp(1.0, 1000.0) as usize;
    // For a computation of more than a second one measurement is enough.
    let repeats = if once > 1.0 { 1 } else { REPEATS };
    let measured: Vec<f64> = (0..repeats).map(|_| time(runs)).collect::<Result<_, _>>()?;
    Spread::of(&measured).ok_or(ReportError::NoTime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_runs_are_not_measured() {
        let mut runs = 0;
        let spread = seconds(&Device::flex(), || {
            runs += 1;
            let slow = if runs <= 2 { 50 } else { 25 };
            std::thread::sleep(std::time::Duration::from_millis(slow));
        })
        .unwrap();
        assert_eq!(runs, 3 + REPEATS);
        assert!(spread.median >= 0.025 && spread.median < 0.05, "{spread:?}");
    }
}
