//! Tolerances for a device's difference from the CPU, and the measure of the difference.

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use lora_core::CounterRng;

use super::error::ReportError;
use super::finding::Check;

/// How composite the compared computation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// One operation or a short chain: its output is rounded, and perhaps an intermediate result.
    Operation,
    /// A layer or a model, with many roundings in sequence.
    Model,
}

/// The largest relative Frobenius distance that passes.
///
/// In f32 the order of sums and the last bits of exponentials differ: 1e-7 to 1e-5. TF32, which
/// keeps 10 bits of a mantissa, is meant to fail. In 16 bits it is the type's unit roundoff (2⁻¹¹
/// in f16, 2⁻⁸ in bf16) times the number of roundings that one operation, or a layer of some
/// twenty, may accumulate. Sums over a wrong block or a wrong row are off by the order of 1.
pub fn tolerance(dtype: FloatDType, depth: Depth) -> f64 {
    let (roundoff, operation, model) = match dtype {
        FloatDType::F16 => (f64::from(2f32.powi(-11)), 8.0, 32.0),
        FloatDType::BF16 => (f64::from(2f32.powi(-8)), 8.0, 32.0),
        _ => (f64::from(2f32.powi(-24)), 340.0, 1700.0),
    };
    match depth {
        Depth::Operation => roundoff * operation,
        Depth::Model => roundoff * model,
    }
}

/// The Frobenius norm of the difference over that of the reference; not a number if a value of
/// `got` is not a number, infinite if the lengths differ.
pub fn distance(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let square = |x: f64| x * x;
    let pairs = got.iter().zip(expected);
    let difference: f64 = pairs
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let norm: f64 = expected.iter().map(|x| square(f64::from(*x))).sum();
    if norm > 0.0 {
        (difference / norm).sqrt()
    } else {
        difference.sqrt()
    }
}

/// The largest value; not a number if one of them is not.
pub fn largest(distances: impl Iterator<Item = f64>) -> f64 {
    distances.fold(0.0, |largest: f64, next| {
        if largest.is_nan() || next.is_nan() {
            f64::NAN
        } else {
            next.max(largest)
        }
    })
}

/// The check of several outputs, by the largest difference; `name` in `dtype`.
pub fn check(
    name: &str,
    dtype: FloatDType,
    depth: Depth,
    got: &[Vec<f32>],
    expected: &[Vec<f32>],
) -> Check {
    let worst = largest(got.iter().zip(expected).map(|(a, b)| distance(a, b)));
    let worst = if got.len() == expected.len() {
        worst
    } else {
        f64::INFINITY
    };
    let name = format!("{name}, {}", device::type_name(dtype));
    Check::new(name, worst, tolerance(dtype, depth), "relative, Frobenius")
}

/// A tensor's values, row-major.
///
/// # Errors
///
/// The device's message if it does not return them.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ReportError> {
    let data = tensor.try_into_data();
    let data = data.map_err(|error| ReportError::Device(error.to_string()))?;
    let values = data.convert::<f32>().try_to_vec::<f32>();
    values.map_err(|error| ReportError::Device(format!("{error:?}")))
}

/// Normal numbers from a seed, rounded to `dtype`, so that a device and the CPU start from the same
/// numbers.
pub fn input(
    [rows, columns]: [usize; 2],
    seed: u64,
    dtype: FloatDType,
    device: &Device,
) -> Tensor<2> {
    let mut rng = CounterRng::new(seed);
    let numbers = (0..rows * columns).map(|_| round(rng.normal() as f32, dtype));
    let data = TensorData::new(numbers.collect::<Vec<f32>>(), [rows, columns]);
    let stored = if device == &Device::flex() {
        FloatDType::F32
    } else {
        dtype
    };
    Tensor::from_data(data, (device, DType::from(stored)))
}

fn round(value: f32, dtype: FloatDType) -> f32 {
    match dtype {
        FloatDType::F16 => half::f16::from_f32(value).to_f32(),
        FloatDType::BF16 => half::bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_none_or_too_few_never_pass() {
        let expected = vec![vec![1.0, 2.0], vec![3.0]];
        let f32 = FloatDType::F32;
        let check = |got: &[Vec<f32>]| check("x", f32, Depth::Operation, got, &expected);
        assert!(check(&expected).ok);
        assert!(!check(&[vec![f32::NAN, 2.0], vec![3.0]]).ok);
        assert!(!check(&[vec![1.0], vec![3.0]]).ok);
        assert!(!check(&expected[..1]).ok);
        assert!(!check(&[vec![1.0, 2.0], vec![3.01]]).ok);
    }

    #[test]
    fn tf32_fails_where_f32_is_asked_for_and_a_rounding_passes() {
        let values: Vec<f32> = (1..200).map(|i| (i as f32 * 0.7).sin()).collect();
        // The 13 low bits of the mantissa, which TF32 does not have.
        let tf32 = |x: &f32| f32::from_bits(x.to_bits() & !0x1fff);
        let cut: Vec<f32> = values.iter().map(tf32).collect();
        let operation = tolerance(FloatDType::F32, Depth::Operation);
        assert!(distance(&cut, &values) > operation);
        for dtype in [FloatDType::F16, FloatDType::BF16] {
            let rounded: Vec<f32> = values.iter().map(|x| round(*x, dtype)).collect();
            let off = distance(&rounded, &values);
            assert!(off > operation && off < tolerance(dtype, Depth::Operation));
        }
    }
}
