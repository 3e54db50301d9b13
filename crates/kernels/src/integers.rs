//! Pre-quantized frozen weights, such as GGUF's Q8_0: integers and scales of another program, in blocks along the
//! input.
//!
//! In llama.cpp's formats 32 weights of the same output share a scale: blocks along `d_in`, while
//! [`quantize_data`](crate::quantize_data) makes blocks along `d_out`. Quantizing such a weight again would lose
//! accuracy a second time; here its integers and scales are used unchanged.

use burn::tensor::quantization::{QuantScheme, QuantStore, QuantValue, ScaleDtype};
use burn::tensor::{Bytes, DType, Device, Tensor, TensorData};

use crate::cpu;

/// An 8-bit weight with one scale per `block` rows of a column of `[d_in, d_out]`.
#[derive(Debug, Clone, PartialEq)]
pub struct IntegerWeight {
    /// `[d_out, d_in]`, the layout of other programs: the weights of one output are contiguous.
    integers: Vec<i8>,
    /// `[d_out, d_in / block]`.
    scales: Vec<f32>,
    block: usize,
    dims: [usize; 2],
}

impl IntegerWeight {
    /// A weight from its parts.
    ///
    /// # Shapes
    ///
    /// - `integers`: `[d_out, d_in]`, row-major
    /// - `scales`: `[d_out, d_in / block]`
    ///
    /// # Panics
    ///
    /// If the lengths do not fit, or `block` is not a multiple of 4 below 256.
    pub fn new(
        integers: Vec<i8>,
        scales: Vec<f32>,
        block: usize,
        [d_in, d_out]: [usize; 2],
    ) -> Self {
        assert!(
            block.is_multiple_of(4) && (4..256).contains(&block) && d_in.is_multiple_of(block),
            "blocks of {block} along {d_in}"
        );
        assert_eq!(integers.len(), d_in * d_out, "a [{d_in}, {d_out}] weight");
        assert_eq!(scales.len() * block, integers.len(), "one scale per block");
        Self {
            integers,
            scales,
            block,
            dims: [d_in, d_out],
        }
    }

    /// The quantized tensor `[d_in, d_out]` on a device.
    ///
    /// GPUs keep the layout `[d_out, d_in]` and use a transposed view, so that the four integers of a word share a
    /// scale. The CPU's products read rows of `[d_in, d_out]`, so the CPU stores the transposed weight.
    pub fn on(self, device: &Device) -> Tensor<2> {
        let scheme = QuantScheme::default().with_value(QuantValue::Q8S);
        let block = self.block as u8;
        let [d_in, d_out] = self.dims;
        if cpu::is_cpu(device) && !device.is_autodiff() {
            let integers = cpu::transposed(&self.integers, [d_out, d_in]);
            let scales = cpu::transposed(&self.scales, [d_out, d_in / self.block]);
            let scheme = scheme
                .with_store(QuantStore::Native)
                .per_block([block, 1], ScaleDtype::F32);
            let data = data(integers, &scales, [d_in, d_out], scheme);
            crate::compact(Tensor::from_data(data, device))
        } else {
            let scheme = scheme
                .with_store(QuantStore::PackedU32(0))
                .per_block([block], ScaleDtype::F32);
            let data = data(self.integers, &self.scales, [d_out, d_in], scheme);
            Tensor::<2>::from_data(data, device).transpose()
        }
    }
}

/// Burn's layout: the values, then the scales.
fn data(integers: Vec<i8>, scales: &[f32], shape: [usize; 2], scheme: QuantScheme) -> TensorData {
    // The scales start at a multiple of four bytes, because blocks have at least four integers.
    let mut bytes = integers;
    bytes.reserve_exact(scales.len() * 4);
    for scale in scales {
        bytes.extend(scale.to_ne_bytes().map(|byte| byte as i8));
    }
    TensorData::from_bytes(Bytes::from_elems(bytes), shape, DType::QFloat(scheme))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, frozen_linear, frozen_linear_backward, init};

    /// A weight and its dense values, `[d_in, d_out]`.
    fn weight([d_in, d_out]: [usize; 2], block: usize) -> (IntegerWeight, Vec<f32>) {
        let integers: Vec<i8> = (0..d_in * d_out)
            .map(|i| (i * 37 % 256) as u8 as i8)
            .collect();
        let scales: Vec<f32> = (0..d_in * d_out / block)
            .map(|i| (i % 23) as f32 * 1e-4 - 1e-3)
            .collect();
        let mut dense = vec![0f32; d_in * d_out];
        for output in 0..d_out {
            for input in 0..d_in {
                let place = output * d_in + input;
                dense[input * d_out + output] = f32::from(integers[place]) * scales[place / block];
            }
        }
        (
            IntegerWeight::new(integers, scales, block, [d_in, d_out]),
            dense,
        )
    }

    fn distance(a: Tensor<2>, b: Tensor<2>) -> f32 {
        let norm = b.clone().powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        (a - b).powf_scalar(2.0).sum().sqrt().into_scalar::<f32>() / norm
    }

    /// Compares products in both directions with the dense weight, which includes negative scales and -128.
    fn check_products(device: &Device) {
        let mut rng = CounterRng::new(3);
        for (n, dims, block) in [
            (1, [64, 96], 32),
            (3, [96, 172], 32),
            (4, [576, 192], 16),
            (40, [160, 100], 32),
            (130, [1536, 576], 32),
        ] {
            let [d_in, d_out] = dims;
            let (weight, dense) = weight(dims, block);
            let dense = Tensor::<2>::from_data(TensorData::new(dense, dims), device);
            let weight = weight.on(device);
            assert_eq!(weight.dims(), dims);
            weight
                .clone()
                .dequantize()
                .into_data()
                .assert_eq(&dense.clone().into_data(), true);
            let x = init::normal([n, d_in], 1.0, &mut rng, device);
            let forward = frozen_linear(x.clone(), weight.clone());
            // f32 sums of up to 1,536 products in another order.
            let error = distance(forward, x.matmul(dense.clone()));
            assert!(error < 2e-6, "{n} {dims:?} {block} forward: {error}");
            let gradient = init::normal([n, d_out], 1.0, &mut rng, device);
            let backward = frozen_linear_backward(gradient.clone(), weight);
            let error = distance(backward, gradient.matmul(dense.transpose()));
            assert!(error < 2e-6, "{n} {dims:?} {block} backward: {error}");
        }
    }

    #[test]
    fn products_on_the_cpu_are_those_of_integers_times_scales() {
        check_products(&Device::flex());
    }
}
