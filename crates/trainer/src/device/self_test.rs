//! The start-up test: one small quantized product against the CPU's.

use burn::tensor::{Device, Tensor, TensorData};
use lora_core::{CounterRng, Quantization, frozen_linear, quantize_data};

use super::{Backend, DeviceError, Selected, quiet};

/// Largest relative Frobenius distance from the CPU's numbers that counts as right.
///
/// The device computes in f32 here, so 1e-6 is usual; TF32 tensor cores keep 10 bits of each
/// factor, which gives up to 1e-3. A driver that is wrong is off by the order of 1 (measured:
/// SwiftShader's SPIR-V).
pub const SELF_TEST_TOLERANCE: f32 = 5e-3;

const N: usize = 64;
const D_IN: usize = 96;
const D_OUT: usize = 64;

/// What the product of a device gave, row-major.
struct Product {
    /// `x · W`, `[N, D_OUT]`
    result: Vec<f32>,
    /// Gradient of `sum(x · W ∘ c)` by `x`, `[N, D_IN]`
    gradient: Vec<f32>,
}

/// Compares `frozen_linear` over an 8-bit weight, forward and backward, with the CPU's.
///
/// It takes some hundredths of a second on a GPU, a few seconds on a software adapter. It also
/// fixes the device's default types, as the first tensor of a device does: types other than f32 are
/// to be asked for by name after it.
///
/// # Errors
///
/// [`DeviceError::WrongNumbers`] past [`SELF_TEST_TOLERANCE`]; [`DeviceError::Initialization`] if
/// the driver refuses a kernel.
pub fn self_test(selected: &Selected) -> Result<(), DeviceError> {
    if selected.backend == Backend::Cpu {
        return Ok(());
    }
    let name = format!("{} (driver: {})", selected.name, selected.driver);
    let refused = |message| DeviceError::Initialization {
        name: name.clone(),
        message,
    };
    let got = quiet::catch(|| product(&selected.device))
        .and_then(|read| read)
        .map_err(refused)?;
    let expected = product(&Device::flex()).map_err(refused)?;
    compare(&name, "result", &got.result, &expected.result)?;
    compare(&name, "gradient", &got.gradient, &expected.gradient)
}

/// The same numbers on every device: they come from a seed and are quantized on the host.
fn product(device: &Device) -> Result<Product, String> {
    let mut rng = CounterRng::new(7);
    let mut normal = |len| -> Vec<f32> { (0..len).map(|_| rng.normal() as f32).collect() };
    let (x, weight, c) = (normal(N * D_IN), normal(D_IN * D_OUT), normal(N * D_OUT));
    let (weight, _) = quantize_data(&weight, [D_IN, D_OUT], Quantization::Bits8)
        .ok_or("the test's weight cannot be quantized")?;

    let tape = device.clone().autodiff();
    let weight = Tensor::<2>::from_data(weight, device);
    let x = Tensor::<2>::from_data(TensorData::new(x, [N, D_IN]), &tape).require_grad();
    let c = Tensor::<2>::from_data(TensorData::new(c, [N, D_OUT]), &tape);
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

fn compare(
    name: &str,
    quantity: &'static str,
    got: &[f32],
    expected: &[f32],
) -> Result<(), DeviceError> {
    let mut square = 0f64;
    let mut norm = 0f64;
    let mut worst = (0f32, 0f32, 0f32);
    for (&got, &expected) in got.iter().zip(expected) {
        let off = (got - expected).abs();
        square += f64::from(off).powi(2);
        norm += f64::from(expected).powi(2);
        // NaN is off by more than anything.
        if off > worst.0 || off.is_nan() && !worst.0.is_nan() {
            worst = (off, got, expected);
        }
    }
    let difference = (square / norm).sqrt() as f32;
    if got.len() == expected.len() && difference <= SELF_TEST_TOLERANCE {
        return Ok(());
    }
    Err(DeviceError::WrongNumbers {
        name: name.to_owned(),
        quantity,
        difference,
        tolerance: SELF_TEST_TOLERANCE,
        got: worst.1,
        expected: worst.2,
    })
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
        compare("a GPU", "result", &rounded, &numbers()).unwrap();
    }

    #[test]
    fn one_wrong_value_is_told_with_the_driver_and_both_numbers() {
        let mut wrong = numbers();
        wrong[41] += 0.5;
        let error = compare("a GPU (driver 1.2)", "gradient", &wrong, &numbers()).unwrap_err();
        let text = error.to_string();
        for part in [
            "a GPU (driver 1.2)",
            "gradient",
            &wrong[41].to_string(),
            &numbers()[41].to_string(),
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_result_that_is_no_number_fails() {
        let mut wrong = numbers();
        wrong[3] = f32::NAN;
        assert!(compare("a GPU", "result", &wrong, &numbers()).is_err());
        assert!(compare("a GPU", "result", &[], &numbers()).is_err());
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
