//! The device's roofline: the peak rates of its matrix products and its memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use lora_core::CounterRng;

use super::error::BenchError;
use super::ours::sync;
use super::protocol::{Bandwidth, DeviceDescription, Floors, Product, ProductRate};
use device::{Backend, Selected};

/// A measurement repeats the work until it has taken this long, because short times are noisy.
const AT_LEAST: Duration = Duration::from_millis(20);

/// The device and its types.
pub(super) fn describe(selected: &Selected) -> DeviceDescription {
    let has = |dtype| device::compute_dtype(selected, Some(dtype)).is_ok();
    let default = device::compute_dtype(selected, None).unwrap_or(FloatDType::F32);
    let types = [FloatDType::F32, FloatDType::BF16, FloatDType::F16];
    let others = types
        .into_iter()
        .filter(|dtype| *dtype != default && has(*dtype));
    let word = |dtype: FloatDType| format!("{dtype:?}").to_lowercase();
    let bf16 = device::compute_dtype(selected, Some(FloatDType::BF16));
    DeviceDescription {
        backend: selected.backend.name().into(),
        name: selected.name.clone(),
        on_gpu: selected.backend != Backend::Cpu,
        compute_dtypes: [default].into_iter().chain(others).map(word).collect(),
        no_bf16: bf16.err().map(|error| error.to_string()),
    }
}

/// Measures products in f32, and in bf16 if the device supports it, and memory.
///
/// # Errors
///
/// If the device fails.
pub(super) fn measure(
    selected: &Selected,
    products: &[Product],
    buffer_bytes: usize,
    repeats: usize,
) -> Result<Floors, BenchError> {
    let device = &selected.device;
    let mut rates = Vec::new();
    for dtype in [FloatDType::F32, FloatDType::BF16] {
        if device::compute_dtype(selected, Some(dtype)).is_err() {
            continue;
        }
        // Burn's own bf16 products on the CPU are slower than its f32 products, so they are not a
        // peak.
        let ours = selected.backend == Backend::Cpu && dtype == FloatDType::BF16;
        for product in products {
            let gflops = if ours {
                our_product_rates(product.shape, repeats, selected)?
            } else {
                product_rates(product.shape, dtype, repeats, device)?
            };
            rates.push(ProductRate {
                product: product.clone(),
                dtype: format!("{dtype:?}").to_lowercase(),
                gflops,
            });
        }
    }
    let bandwidths = match selected.backend {
        Backend::Cpu => on_the_host(buffer_bytes, repeats),
        _ => vec![on_the_device(buffer_bytes, repeats, device)?],
    };
    Ok(Floors {
        products: rates,
        bandwidths,
    })
}

/// 10⁹ operations per second of `[m, k] × [k, n]`, for each measurement.
fn product_rates(
    [m, k, n]: [usize; 3],
    dtype: FloatDType,
    repeats: usize,
    device: &Device,
) -> Result<Vec<f64>, BenchError> {
    let options = (device, DType::from(dtype));
    let matrix = |rows, columns, seed| Tensor::<2>::from_data(noise(rows, columns, seed), options);
    let (a, b) = (matrix(m, k, 1), matrix(k, n, 2));
    let operations = 2.0 * m as f64 * k as f64 * n as f64;
    let product = || {
        // Submitted one by one and kept until then: fusion computes no result that is dropped.
        let _product = a.clone().matmul(b.clone());
        let flushed = device.flush();
        flushed.map_err(|error| BenchError::Execution(format!("{error:?}")))
    };
    let seconds = repeated(repeats, product, device)?;
    let rates = seconds.iter().map(|seconds| operations / seconds / 1e9);
    Ok(rates.collect())
}

/// As [`product_rates`], for this trainer's bf16 product with an 8-bit weight.
fn our_product_rates(
    [m, k, n]: [usize; 3],
    repeats: usize,
    selected: &Selected,
) -> Result<Vec<f64>, BenchError> {
    let device = &selected.device;
    let x = Tensor::<2>::from_data(noise(m, k, 1), device);
    let weight = Tensor::<2>::from_data(noise(k, n, 2), device);
    let weight = lora_core::quantize(weight, lora_core::Quantization::Bits8)
        .map_err(|error| BenchError::Execution(error.to_string()))?;
    device::prepare(selected, FloatDType::BF16)?;
    let product = || {
        black_box(lora_core::frozen_linear(x.clone(), weight.clone()));
        Ok(())
    };
    let seconds = repeated(repeats, product, device);
    device::prepare(selected, FloatDType::F32)?;
    let operations = 2.0 * m as f64 * k as f64 * n as f64;
    Ok(seconds?
        .iter()
        .map(|seconds| operations / seconds / 1e9)
        .collect())
}

/// Cheap numbers around zero: with constants a GPU would reach higher clocks than with real data.
fn noise(rows: usize, columns: usize, seed: u64) -> TensorData {
    let mut rng = CounterRng::new(seed);
    let values = (0..rows * columns).map(|_| rng.uniform() as f32 - 0.5);
    TensorData::new(values.collect::<Vec<f32>>(), [rows, columns])
}

/// Reading and copying with all threads.
fn on_the_host(bytes: usize, repeats: usize) -> Vec<Bandwidth> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // Written once, so that the pages exist; one half is copied into the other.
    let mut buffer: Vec<u64> = (0..(bytes / 8) as u64).collect();
    let half = buffer.len() / 2;
    let part = half.div_ceil(threads).max(1);
    let mut read = Vec::new();
    let mut copy = Vec::new();
    // The first run of each is a warm-up.
    for _ in 0..=repeats {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for part in buffer.chunks(2 * part) {
                scope.spawn(|| black_box(part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x))));
            }
        });
        read.push(8.0 * buffer.len() as f64 / started.elapsed().as_secs_f64() / 1e9);
        let (from, to) = buffer.split_at_mut(half);
        let started = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
                scope.spawn(|| to[..from.len()].copy_from_slice(from));
            }
        });
        copy.push(16.0 * half as f64 / started.elapsed().as_secs_f64() / 1e9);
    }
    black_box(&buffer);
    let named = |name: &str, rates: &[f64]| Bandwidth {
        name: name.into(),
        bytes,
        gb_per_s: rates[1..].to_vec(),
    };
    vec![named("read", &read), named("copy", &copy)]
}

/// One element-wise operation over a large tensor: reads it and writes another.
fn on_the_device(bytes: usize, repeats: usize, device: &Device) -> Result<Bandwidth, BenchError> {
    let elements = bytes / 8;
    let tensor = Tensor::<1>::ones([elements], (device, DType::F32));
    let copy = || {
        // Kept until the device is done: fusion computes no result that is dropped.
        let _copy = tensor.clone().add_scalar(1.0);
        sync(device)
    };
    let seconds = repeated(repeats, copy, device)?;
    let moved = 8.0 * elements as f64;
    Ok(Bandwidth {
        name: "copy".into(),
        bytes,
        gb_per_s: seconds
            .iter()
            .map(|seconds| moved / seconds / 1e9)
            .collect(),
    })
}

/// The seconds that `work` takes, `repeats` times, each the mean over as many runs as fill
/// [`AT_LEAST`].
fn repeated(
    repeats: usize,
    work: impl Fn() -> Result<(), BenchError>,
    device: &Device,
) -> Result<Vec<f64>, BenchError> {
    let time = |runs: u32| -> Result<f64, BenchError> {
        let started = Instant::now();
        for _ in 0..runs {
            work()?;
        }
        sync(device)?;
        Ok(started.elapsed().as_secs_f64() / f64::from(runs))
    };
    // The first run compiles kernels and starts threads; the second measures how long one takes.
    time(1)?;
    let once = time(1)?;
    let runs = (AT_LEAST.as_secs_f64() / once).ceil().clamp(1.0, 1000.0) as u32;
    (0..repeats).map(|_| time(runs)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_floor_is_measured_as_often_as_asked() {
        let selected = device::select(Backend::Cpu).unwrap();
        let product = Product {
            name: "small".into(),
            shape: [32, 16, 8],
        };
        let floors = measure(&selected, std::slice::from_ref(&product), 1 << 20, 3).unwrap();
        assert_eq!(floors.products[0].product, product);
        let names: Vec<&str> = floors.bandwidths.iter().map(|b| b.name.as_str()).collect();
        assert_eq!(names, ["read", "copy"]);
        let products = floors.products.iter().map(|rate| &rate.gflops);
        let memory = floors
            .bandwidths
            .iter()
            .map(|bandwidth| &bandwidth.gb_per_s);
        for rates in products.chain(memory) {
            assert!(
                rates.len() == 3 && rates.iter().all(|rate| *rate > 0.0),
                "{rates:?}"
            );
        }
    }

    #[test]
    fn the_cpu_has_f32_and_says_why_it_has_no_bf16() {
        let description = describe(&device::select(Backend::Cpu).unwrap());
        assert_eq!(description.compute_dtypes[0], "f32");
        let has_bf16 = description
            .compute_dtypes
            .iter()
            .any(|dtype| dtype == "bf16");
        assert_eq!(description.no_bf16.is_none(), has_bf16);
    }
}
