//! Frozen weights in 8 or 4 bits: Burn's symmetric, per-block scheme, quantized on the host.
//!
//! The host quantizes, not the device, for two reasons: every backend has the same integers and scales, so that results
//! can be compared, and the dense weight never needs memory on the device.

use burn::tensor::quantization::{QuantScheme, QuantStore, QuantValue, ScaleDtype};
use burn::tensor::{Bytes, DType, Tensor, TensorData};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// The number of weights that share a scale, along the output dimension. A layer whose width is not a multiple of 32
/// uses the largest power of two that divides it.
pub const BLOCK: usize = 32;

/// How a frozen weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Quantization {
    /// Not quantized, in the device's float type.
    None,
    /// 8 bits: integers in ±127 and an f32 scale per block.
    #[default]
    Bits8,
    /// 4 bits: integers in ±7 and an f32 scale per block. Burn's CPU backend widens them to a byte each, so that they
    /// save memory on GPUs only.
    Bits4,
}

impl Quantization {
    /// The setting for a number of bits: 16 and 32 mean none.
    pub fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            4 => Some(Self::Bits4),
            8 => Some(Self::Bits8),
            16 | 32 => Some(Self::None),
            _ => None,
        }
    }

    /// The number of weights that share a scale in a row of `d_out` weights. `None` if the row cannot be packed into
    /// 32-bit words and stays dense.
    pub fn block(self, d_out: usize) -> Option<usize> {
        let (_, _, smallest) = self.format()?;
        let block = 1usize << d_out.trailing_zeros().min(BLOCK.trailing_zeros());
        (block >= smallest).then_some(block)
    }

    /// Bytes of a `[d_in, d_out]` weight, scales included; `dense_bytes` per element if it is not quantized.
    pub fn bytes(self, d_in: usize, d_out: usize, dense_bytes: usize) -> usize {
        let weights = d_in * d_out;
        match (self.block(d_out), self) {
            (Some(block), Self::Bits4) => weights / 2 + 4 * weights / block,
            (Some(block), _) => weights + 4 * weights / block,
            (None, _) => weights * dense_bytes,
        }
    }

    /// Burn's value type, its largest integer, and the fewest values that fill a 32-bit word.
    fn format(self) -> Option<(QuantValue, f32, usize)> {
        match self {
            Self::None => None,
            Self::Bits8 => Some((QuantValue::Q8S, 127.0, 4)),
            Self::Bits4 => Some((QuantValue::Q4S, 7.0, 8)),
        }
    }
}

/// The weight to be quantized is quantized already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this weight is quantized already")]
pub struct AlreadyQuantized;

/// The error of a quantized weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantizationError {
    /// Largest absolute difference of an element.
    pub max_abs: f32,
    /// Frobenius norm of the difference over that of the original.
    pub relative: f32,
}

/// Quantizes a `[d_in, d_out]` row-major weight: round to nearest, scale = largest magnitude of the
/// block over 127 (8 bits) or 7 (4 bits), as Burn's `quantize_dynamic` and llama.cpp's Q8_0 do.
///
/// Returns the data for [`Tensor::from_data`] and its error, or `None` if `quantization` is off or the row cannot be
/// packed.
///
/// # Panics
///
/// If `values.len()` is not `d_in * d_out`.
pub fn quantize_data(
    values: &[f32],
    [d_in, d_out]: [usize; 2],
    quantization: Quantization,
) -> Option<(TensorData, QuantizationError)> {
    assert_eq!(values.len(), d_in * d_out, "a [{d_in}, {d_out}] weight");
    let (value, largest, _) = quantization.format()?;
    let block = quantization.block(d_out)?;
    let mut integers = vec![0i8; values.len()];
    let mut scales = vec![0f32; values.len() / block];
    // Rows in parallel; each returns its largest error and its sums of squares.
    let (max_abs, difference, norm) = integers
        .par_chunks_mut(d_out)
        .zip(scales.par_chunks_mut(d_out / block))
        .zip(values.par_chunks(d_out))
        .map(|((integers, scales), row)| quantize_row(integers, scales, row, block, largest))
        .reduce(
            || (0f32, 0f64, 0f64),
            |a, b| (a.0.max(b.0), a.1 + b.1, a.2 + b.2),
        );
    let scheme = scheme(value, block);
    let bits = scheme.size_bits_value();
    let mut words = pack(&integers, bits);
    drop(integers);
    // Burn's layout of quantized data: the packed values, then the blocks' scales.
    words.extend(scales.iter().map(|scale| scale.to_bits()));
    let data = TensorData::from_bytes(
        Bytes::from_elems(words),
        [d_in, d_out],
        DType::QFloat(scheme),
    );
    let relative = if norm > 0.0 {
        (difference / norm).sqrt() as f32
    } else {
        0.0
    };
    Some((data, QuantizationError { max_abs, relative }))
}

fn scheme(value: QuantValue, block: usize) -> QuantScheme {
    QuantScheme::default()
        .with_value(value)
        .with_store(QuantStore::PackedU32(0))
        .per_block([block as u8], ScaleDtype::F32)
}

/// As [`quantize`], computed on the tensor's device, for weights that were made there. An integer may differ from the
/// host's if a weight lies halfway between two integers.
///
/// # Shapes
///
/// - `weight`, output: `[d_in, d_out]`
pub fn quantize_on_device(weight: Tensor<2>, quantization: Quantization) -> Tensor<2> {
    let d_out = weight.dims()[1];
    match (quantization.format(), quantization.block(d_out)) {
        (Some((value, ..)), Some(block)) => weight.quantize_dynamic(&scheme(value, block)),
        _ => weight,
    }
}

/// Integers of 4 or 8 bits in 32-bit words, the first in the lowest bits.
///
/// `TensorData::quantized` packs 8 bits only.
fn pack(integers: &[i8], bits: usize) -> Vec<u32> {
    let mask = (1u32 << bits) - 1;
    let in_word = |word: &[i8]| {
        let shifted = word.iter().enumerate();
        shifted.fold(0, |packed, (i, x)| {
            packed | (*x as u32 & mask) << (i * bits)
        })
    };
    integers.par_chunks(32 / bits).map(in_word).collect()
}

fn quantize_row(
    integers: &mut [i8],
    scales: &mut [f32],
    row: &[f32],
    block: usize,
    largest: f32,
) -> (f32, f64, f64) {
    let (mut max_abs, mut difference, mut norm) = (0f32, 0f64, 0f64);
    let blocks = integers
        .chunks_exact_mut(block)
        .zip(row.chunks_exact(block))
        .zip(scales);
    for ((integers, row), scale) in blocks {
        let peak = row.iter().fold(0f32, |peak, x| peak.max(x.abs()));
        // A scale of zero would divide by zero; a block of zeros stays zero under any scale.
        *scale = match peak / largest {
            scale if scale >= f32::MIN_POSITIVE => scale,
            _ => f32::MIN_POSITIVE,
        };
        let inverse = 1.0 / *scale;
        for (integer, x) in integers.iter_mut().zip(row) {
            let rounded = (x * inverse).round().clamp(-largest, largest);
            *integer = rounded as i8;
            let error = rounded * *scale - x;
            max_abs = max_abs.max(error.abs());
            difference += (error as f64).powi(2);
            norm += (*x as f64).powi(2);
        }
    }
    (max_abs, difference, norm)
}

/// Quantizes a weight of a device on the host and copies it back.
///
/// A weight that cannot be packed is returned unchanged.
///
/// # Shapes
///
/// - `weight`: `[d_in, d_out]`, float
/// - output: `[d_in, d_out]`, quantized, outside an autodiff graph
///
/// # Errors
///
/// [`AlreadyQuantized`].
pub fn quantize(
    weight: Tensor<2>,
    quantization: Quantization,
) -> Result<Tensor<2>, AlreadyQuantized> {
    if matches!(weight.dtype(), DType::QFloat(_)) {
        return Err(AlreadyQuantized);
    }
    let weight = weight.without_autodiff();
    if quantization.block(weight.dims()[1]).is_none() {
        return Ok(weight);
    }
    let (device, shape) = (weight.device(), weight.dims());
    let data = weight.into_data().convert::<f32>();
    let values = data.as_slice::<f32>().expect("converted to f32 above");
    let (data, _) = quantize_data(values, shape, quantization).expect("the row can be packed");
    Ok(compact(Tensor::from_data(data, &device)))
}

/// The same weight without unused memory.
///
/// Burn's CPU backend stores the scales of a quantized tensor separately, but keeps the buffer that held them too, an
/// eighth more than the integers need. Tensors of other backends are returned unchanged.
pub fn compact(weight: Tensor<2>) -> Tensor<2> {
    crate::cpu::compact(weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CounterRng;
    use burn::tensor::Device;

    fn weight(d_in: usize, d_out: usize) -> Vec<f32> {
        let mut rng = CounterRng::new(5);
        (0..d_in * d_out).map(|_| rng.normal() as f32).collect()
    }

    #[test]
    fn the_block_is_the_largest_power_of_two_that_divides_the_row() {
        assert_eq!(Quantization::Bits8.block(576), Some(32));
        assert_eq!(Quantization::Bits8.block(172), Some(4));
        assert_eq!(Quantization::Bits8.block(6), None);
        assert_eq!(Quantization::Bits4.block(172), None);
        assert_eq!(Quantization::None.block(576), None);
    }

    #[test]
    fn burn_dequantizes_what_the_host_quantized_and_the_reported_error_is_correct() {
        for quantization in [Quantization::Bits8, Quantization::Bits4] {
            let values = weight(48, 96);
            let (data, error) = quantize_data(&values, [48, 96], quantization).unwrap();
            let tensor = Tensor::<2>::from_data(data, &Device::flex());
            let back = tensor.dequantize().into_data().try_to_vec::<f32>().unwrap();
            let max_abs = values
                .iter()
                .zip(&back)
                .map(|(a, b)| (a - b).abs())
                .fold(0., f32::max);
            assert!(
                (max_abs - error.max_abs).abs() < 1e-6,
                "{max_abs} {error:?}"
            );
            // Half a step of the largest block: its peak over 127 or 7, over 2.
            let peak = values.iter().fold(0f32, |m, x| m.max(x.abs()));
            let steps = if quantization == Quantization::Bits8 {
                254.
            } else {
                14.
            };
            assert!(max_abs <= peak / steps * 1.0001 && max_abs > 0.0);
        }
    }

    #[test]
    fn the_host_and_burns_quantizer_return_the_same_weight() {
        let values = weight(64, 64);
        let (data, _) = quantize_data(&values, [64, 64], Quantization::Bits8).unwrap();
        let ours = Tensor::<2>::from_data(data, &Device::flex()).dequantize();
        let scheme = QuantScheme::default()
            .with_value(QuantValue::Q8S)
            .per_block([32], ScaleDtype::F32);
        let dense = Tensor::<2>::from_data(TensorData::new(values, [64, 64]), &Device::flex());
        let burns = dense.quantize_dynamic(&scheme).dequantize();
        let difference = (ours - burns).abs().max().into_scalar::<f32>();
        // Both scales are the block's peak over 127, rounded once or twice to f32.
        assert!(difference < 1e-5, "{difference}");
    }

    #[test]
    fn zeros_stay_zeros_and_rows_that_cannot_be_packed_stay_dense() {
        let zeros = Tensor::<2>::zeros([2, 32], &Device::flex());
        let quantized = quantize(zeros, Quantization::Bits8).unwrap();
        assert!(matches!(quantized.dtype(), DType::QFloat(_)));
        assert_eq!(quantized.dequantize().sum().into_scalar::<f32>(), 0.0);
        let odd = Tensor::<2>::ones([2, 6], &Device::flex());
        assert_eq!(
            quantize(odd, Quantization::Bits8).unwrap().dtype(),
            DType::F32
        );
    }

    #[test]
    fn bytes_count_values_and_scales() {
        assert_eq!(
            Quantization::Bits8.bytes(64, 64, 4),
            64 * 64 + 64 * 64 / 32 * 4
        );
        assert_eq!(
            Quantization::Bits4.bytes(64, 64, 4),
            64 * 64 / 2 + 64 * 64 / 32 * 4
        );
        assert_eq!(Quantization::None.bytes(64, 64, 2), 64 * 64 * 2);
    }
}
