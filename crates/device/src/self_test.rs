//! The start-up test: a small quantized product compared with the CPU's.

use burn::tensor::{Device, Tensor, TensorData};
use lora_core::{CounterRng, Quantization, frozen_linear, quantize_data};

use super::check::{Check, refused, verdict};
use super::{Backend, DeviceError, Selected, quiet};

/// Largest relative Frobenius distance from the CPU's result that is accepted.
///
/// The device computes in f32 here, so 1e-6 is usual. TF32 tensor cores keep 10 bits of each
/// factor, which gives up to 1e-3. A wrong driver is off by the order of 1 (measured: SwiftShader's
/// SPIR-V).
pub const SELF_TEST_TOLERANCE: f64 = 5e-3;

const N: usize = 64;
const D_IN: usize = 96;
const D_OUT: usize = 64;

/// A device's results, row-major.
struct Product {
    /// `x · W`, `[N, D_OUT]`
    result: Vec<f32>,
    /// Gradient of `sum(x · W ∘ c)` with respect to `x`, `[N, D_IN]`
    gradient: Vec<f32>,
}

/// Compares `frozen_linear` over an 8-bit weight with the CPU's, forward and backward through the
/// autodiff graph: the first requirement of a device.
///
/// It takes some hundredths of a second on a GPU, a few seconds on a software driver. It also fixes
/// the device's default types, as the first tensor of a device does; later tensors of other types
/// than f32 must name their type.
///
/// # Errors
///
/// [`DeviceError::WrongNumbers`] past [`SELF_TEST_TOLERANCE`]; [`DeviceError::Unchecked`] if the
/// driver refuses a kernel.
pub fn self_test(selected: &Selected) -> Result<(), DeviceError> {
    verdict(selected, &small_product(selected)?)
}

/// As [`self_test`], as checks; empty on the CPU.
pub(super) fn small_product(selected: &Selected) -> Result<Vec<Check>, DeviceError> {
    if selected.backend == Backend::Cpu {
        return Ok(Vec::new());
    }
    let refused = |message| refused(selected, message);
    let got = quiet::catch(|| product(&selected.device))
        .and_then(|read| read)
        .map_err(refused)?;
    let expected = product(&Device::flex()).map_err(refused)?;
    Ok(vec![
        compare("small_product", &got.result, &expected.result),
        compare("small_product_backward", &got.gradient, &expected.gradient),
    ])
}

/// The same numbers on every device: from a seed, quantized on the host.
fn product(device: &Device) -> Result<Product, String> {
    let mut rng = CounterRng::new(7);
    let mut normal = |len| -> Vec<f32> { (0..len).map(|_| rng.normal() as f32).collect() };
    let (x, weight, c) = (normal(N * D_IN), normal(D_IN * D_OUT), normal(N * D_OUT));
    let (weight, _) = quantize_data(&weight, [D_IN, D_OUT], Quantization::Bits8)
        .ok_or("the test's weight cannot be quantized")?;

    let graph = device.clone().autodiff();
    let weight = Tensor::<2>::from_data(weight, device);
    let x = Tensor::<2>::from_data(TensorData::new(x, [N, D_IN]), &graph).require_grad();
    let c = Tensor::<2>::from_data(TensorData::new(c, [N, D_OUT]), &graph);
    let y = frozen_linear(x.clone(), weight);
    let gradients = (y.clone() * c).sum().backward();
    let gradient = x.grad(&gradients).ok_or("the product has no gradient")?;
    Ok(Product {
        result: read(y.inner())?,
        gradient: read(gradient)?,
    })
}

fn read(tensor: Tensor<2>) -> Result<Vec<f32>, String> {
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    data.convert::<f32>()
        .try_to_vec::<f32>()
        .map_err(|error| format!("{error:?}"))
}

fn compare(name: &str, got: &[f32], expected: &[f32]) -> Check {
    let (mut square, mut norm) = (0f64, 0f64);
    for (&got, &expected) in got.iter().zip(expected) {
        square += f64::from(got - expected).powi(2);
        norm += f64::from(expected).powi(2);
    }
    let difference = if got.len() == expected.len() {
        (square / norm).sqrt()
    } else {
        f64::NAN
    };
    Check {
        name: name.into(),
        difference,
        tolerance: SELF_TEST_TOLERANCE,
        // A value that is not a number is not right.
        ok: difference <= SELF_TEST_TOLERANCE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers() -> Vec<f32> {
        (0..100).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    #[test]
    fn a_rounding_difference_passes() {
        let rounded: Vec<f32> = numbers().iter().map(|x| x * (1.0 + 1e-6)).collect();
        assert!(compare("product", &rounded, &numbers()).ok);
    }

    #[test]
    fn one_wrong_value_or_one_that_is_no_number_fails() {
        let mut wrong = numbers();
        wrong[41] += 0.5;
        let check = compare("product", &wrong, &numbers());
        assert!(!check.ok && check.difference > 0.01, "{check:?}");
        wrong[41] = f32::NAN;
        assert!(!compare("product", &wrong, &numbers()).ok);
        assert!(!compare("product", &[], &numbers()).ok);
    }

    #[test]
    fn the_product_is_not_trivially_zero() {
        let product = product(&Device::flex()).unwrap();
        assert_eq!(product.result.len(), N * D_OUT);
        assert_eq!(product.gradient.len(), N * D_IN);
        assert!(product.result.iter().any(|y| y.abs() > 1.0));
        assert!(product.gradient.iter().any(|g| g.abs() > 1.0));
    }
}
