//! `frozen_linear` on every backend of this build, compared with the dense product on the CPU.

use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_core::{
    CounterRng, IntegerWeight, Quantization, frozen_linear, frozen_linear_backward, quantize_data,
};
use tests::devices;

/// Rows, inputs, outputs: one row, many rows, and widths that are not multiples of 32 (blocks of 4
/// and 8).
const SHAPES: [[usize; 3]; 4] = [[1, 64, 32], [7, 100, 172], [33, 96, 200], [70, 320, 256]];

/// f32 sums of up to 320 products in another order: 1e-7 to 1e-6. A scale from the wrong block
/// gives 1e-1, half precision 1e-3.
const TOLERANCE: f64 = 1e-5;

fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = CounterRng::new(seed);
    (0..count).map(|_| rng.normal() as f32).collect()
}

fn tensor(values: &[f32], shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor
        .into_data()
        .try_to_vec()
        .expect("the device gives its tensors back, in f32")
}

/// `x · w` for row-major matrices, in f64 so that its own rounding is negligible.
fn product(x: &[f32], w: &[f32], [n, d_in, d_out]: [usize; 3]) -> Vec<f32> {
    let element = |row: usize, column: usize| {
        let terms =
            (0..d_in).map(|k| f64::from(x[row * d_in + k]) * f64::from(w[k * d_out + column]));
        terms.sum::<f64>() as f32
    };
    (0..n * d_out)
        .map(|i| element(i / d_out, i % d_out))
        .collect()
}

fn transposed(w: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..rows * columns)
        .map(|i| w[i % rows * columns + i / rows])
        .collect()
}

/// Relative Frobenius distance.
fn distance(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let pairs = got.iter().zip(expected);
    let difference: f64 = pairs
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|b| f64::from(*b).powi(2)).sum();
    (difference / norm).sqrt()
}

/// The quantized weight on a device, and its dense form as dequantized on the CPU.
fn weights(
    d_in: usize,
    d_out: usize,
    quantization: Quantization,
) -> Option<(TensorData, Vec<f32>)> {
    let dense = normal(d_in * d_out, 1);
    let (data, _) = quantize_data(&dense, [d_in, d_out], quantization)?;
    let unpacked = Tensor::<2>::from_data(data.clone(), &Device::flex()).dequantize();
    Some((data, values(unpacked)))
}

fn compare(quantization: Quantization) {
    for (name, device) in devices() {
        for shape in SHAPES {
            let [n, d_in, d_out] = shape;
            let Some((packed, dense)) = weights(d_in, d_out, quantization) else {
                println!("{name} {quantization:?} {shape:?}: such a row stays dense");
                continue;
            };
            let weight = Tensor::<2>::from_data(packed, &device);
            assert!(matches!(weight.dtype(), DType::QFloat(_)));
            let (x, grad) = (normal(n * d_in, 2), normal(n * d_out, 3));
            let input = tensor(&x, [n, d_in], &device).autodiff().require_grad();

            let output = frozen_linear(input.clone(), weight.clone());
            let weighted = output.clone() * tensor(&grad, [n, d_out], &device).autodiff();
            let gradients = weighted.sum().backward();
            let gradient = input.grad(&gradients).expect("the input has a gradient");

            let forward = distance(&values(output.inner()), &product(&x, &dense, shape));
            let back = product(&grad, &transposed(&dense, [d_in, d_out]), [n, d_out, d_in]);
            let backward = distance(&values(gradient), &back);
            println!(
                "{name} {quantization:?} {shape:?}: forward {forward:.1e}, backward {backward:.1e}, \
                 tolerance {TOLERANCE:.0e}"
            );
            assert!(
                forward < TOLERANCE && backward < TOLERANCE,
                "{name} {quantization:?} {shape:?}: forward {forward:e}, backward {backward:e}"
            );
            assert!(
                weight.grad(&gradients).is_none(),
                "the frozen weight has a gradient"
            );
        }
    }
}

#[test]
fn eight_bit_products_and_gradients_equal_those_of_the_dequantized_weight_on_every_backend() {
    compare(Quantization::Bits8);
}

#[test]
fn four_bit_products_and_gradients_equal_those_of_the_dequantized_weight_on_every_backend() {
    compare(Quantization::Bits4);
}

#[test]
fn every_backend_unpacks_the_same_weight() {
    for (name, device) in devices() {
        for quantization in [Quantization::Bits8, Quantization::Bits4] {
            let (packed, expected) = weights(64, 96, quantization).expect("96 is a multiple of 8");
            let got = values(Tensor::<2>::from_data(packed, &device).dequantize());
            // One product of the same two numbers per element: no difference in rounding.
            assert_eq!(got, expected, "{name} {quantization:?}");
        }
    }
}

/// As in llama.cpp's files: blocks along the input dimension. One row, few rows, many; blocks of 16
/// and of 32.
#[test]
fn integers_of_another_program_multiply_as_they_are_on_every_backend() {
    for (name, device) in devices() {
        for ([n, d_in, d_out], block) in [([1, 64, 36], 32), ([3, 96, 40], 16), ([33, 160, 96], 32)]
        {
            let integers: Vec<i8> = (0..d_in * d_out)
                .map(|i| (i * 37 % 255) as u8 as i8)
                .collect();
            let scales: Vec<f32> = normal(d_in * d_out / block, 4);
            let mut dense = vec![0.0; d_in * d_out];
            for (i, integer) in integers.iter().enumerate() {
                let (output, input) = (i / d_in, i % d_in);
                dense[input * d_out + output] = f32::from(*integer) * scales[i / block];
            }
            let weight = IntegerWeight::new(integers, scales, block, [d_in, d_out]).on(&device);
            let (x, gradient) = (normal(n * d_in, 2), normal(n * d_out, 3));
            // One product of the same two numbers per element.
            assert_eq!(values(weight.clone().dequantize()), dense, "{name}");
            let forward = frozen_linear(tensor(&x, [n, d_in], &device), weight.clone());
            let backward = frozen_linear_backward(tensor(&gradient, [n, d_out], &device), weight);
            let forward = distance(&values(forward), &product(&x, &dense, [n, d_in, d_out]));
            let back = product(
                &gradient,
                &transposed(&dense, [d_in, d_out]),
                [n, d_out, d_in],
            );
            let backward = distance(&values(backward), &back);
            assert!(
                forward < TOLERANCE && backward < TOLERANCE,
                "{name} {n} {d_in} {d_out}: forward {forward:e}, backward {backward:e}"
            );
        }
    }
}
