//! Decodes ggml's blocks.
//!
//! Kinds whose blocks have scales but no offsets (Q8_0, Q4_0, Q5_0, Q6_K) are integers of at most 8 bits times a scale,
//! so that they fit 8-bit tensors without another quantization. The layouts are those of ggml's `dequantize_row_*`.

use half::{bf16, f16};

use super::TensorKind;

/// Decodes the integers and scales of `bytes`, whole blocks; `None` for other kinds.
///
/// `integers` has one element per element of the tensor, `scales` one per [`integer_block`] elements.
pub(super) fn integers(
    kind: TensorKind,
    bytes: &[u8],
    integers: &mut [i8],
    scales: &mut [f32],
) -> Option<()> {
    let scales_a_block = kind.block() / integer_block(kind)?;
    let blocks = bytes
        .chunks_exact(kind.block_bytes())
        .zip(integers.chunks_exact_mut(kind.block()))
        .zip(scales.chunks_exact_mut(scales_a_block));
    for ((block, integers), scales) in blocks {
        match kind {
            TensorKind::Q8_0 => {
                scales[0] = half(block);
                integers
                    .iter_mut()
                    .zip(&block[2..])
                    .for_each(|(integer, byte)| *integer = *byte as i8);
            }
            TensorKind::Q4_0 => {
                scales[0] = half(block);
                nibbles(&block[2..], integers, |nibble, _| nibble as i8 - 8);
            }
            TensorKind::Q5_0 => {
                scales[0] = half(block);
                let high = high_bits(&block[2..]);
                nibbles(&block[6..], integers, |nibble, i| {
                    (nibble | fifth_bit(high, i)) as i8 - 16
                });
            }
            _ => six_bits(block, integers, scales),
        }
    }
    Some(())
}

/// The number of elements that share a scale, for kinds that are integers times scales.
pub(super) fn integer_block(kind: TensorKind) -> Option<usize> {
    match kind {
        TensorKind::Q8_0 | TensorKind::Q4_0 | TensorKind::Q5_0 => Some(32),
        TensorKind::Q6_K => Some(16),
        _ => None,
    }
}

/// Decodes the values of `bytes`, whole blocks.
pub(super) fn dequantize(kind: TensorKind, bytes: &[u8], values: &mut [f32]) {
    let blocks = bytes
        .chunks_exact(kind.block_bytes())
        .zip(values.chunks_exact_mut(kind.block()));
    for (block, values) in blocks {
        match kind {
            TensorKind::F32 => {
                values[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
            }
            TensorKind::F16 => values[0] = half(block),
            TensorKind::BF16 => values[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            TensorKind::Q4_1 => {
                let (scale, least) = (half(block), half(&block[2..]));
                nibbles(&block[4..], values, |nibble, _| {
                    f32::from(nibble) * scale + least
                });
            }
            TensorKind::Q5_1 => {
                let (scale, least) = (half(block), half(&block[2..]));
                let high = high_bits(&block[4..]);
                nibbles(&block[8..], values, |nibble, i| {
                    f32::from(nibble | fifth_bit(high, i)) * scale + least
                });
            }
            TensorKind::Q4_K => {
                let (low, high) = (&block[16..], &[0; 32]);
                super_block(&block[..16], low, high, values);
            }
            TensorKind::Q5_K => {
                let mut high = [0; 32];
                high.copy_from_slice(&block[16..48]);
                super_block(&block[..16], &block[48..], &high, values);
            }
            TensorKind::Q8_0 | TensorKind::Q4_0 | TensorKind::Q5_0 | TensorKind::Q6_K => {
                let mut whole = [0i8; 256];
                let whole = &mut whole[..kind.block()];
                let mut scales = [0f32; 16];
                let shared = integer_block(kind).unwrap_or(kind.block());
                integers(kind, block, whole, &mut scales[..kind.block() / shared]);
                for (i, (value, integer)) in values.iter_mut().zip(whole).enumerate() {
                    *value = scales[i / shared] * f32::from(*integer);
                }
            }
        }
    }
}

/// The f16 at the beginning of `bytes`.
fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// 16 bytes of two 4-bit numbers each: the low halves are the first 16 elements, the high halves the others.
fn nibbles<T>(bytes: &[u8], values: &mut [T], number: impl Fn(u8, usize) -> T) {
    for (i, byte) in bytes[..16].iter().enumerate() {
        values[i] = number(byte & 15, i);
        values[i + 16] = number(byte >> 4, i + 16);
    }
}

fn high_bits(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn fifth_bit(high: u32, i: usize) -> u8 {
    ((high >> i & 1) as u8) << 4
}

/// Q6_K: four low bits, two high bits, one scale per 16 elements and a common scale.
fn six_bits(block: &[u8], integers: &mut [i8], scales: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let common = half(&rest[16..]);
    for (scale, byte) in scales.iter_mut().zip(rest) {
        *scale = common * f32::from(*byte as i8);
    }
    for side in 0..2 {
        for i in 0..32 {
            let high = high[side * 32 + i];
            let (first, second) = (low[side * 64 + i], low[side * 64 + 32 + i]);
            let six = |four: u8, shift: u8| (four | (high >> shift & 3) << 4) as i8 - 32;
            let to = &mut integers[side * 128..];
            to[i] = six(first & 15, 0);
            to[i + 32] = six(second & 15, 2);
            to[i + 64] = six(first >> 4, 4);
            to[i + 96] = six(second >> 4, 6);
        }
    }
}

/// Q4_K and Q5_K: eight groups of 32 elements, each with a scale and an offset of six bits, and a common scale and
/// offset.
fn super_block(head: &[u8], low: &[u8], high: &[u8; 32], values: &mut [f32]) {
    let (scale, least) = (half(head), half(&head[2..]));
    let packed = &head[4..];
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let (six, offset) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => (
                packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                packed[group + 4] >> 4 | packed[group] >> 6 << 4,
            ),
        };
        let (scale, least) = (scale * f32::from(six), least * f32::from(offset));
        let low = &low[group / 2 * 32..];
        for (i, value) in values.iter_mut().enumerate() {
            let four = low[i] >> (group % 2 * 4) & 15;
            let fifth = (high[i] >> group & 1) << 4;
            *value = scale * f32::from(four | fifth) - least;
        }
    }
}

/// Encodes Q8_0 as ggml's reference quantizer: scale = largest magnitude over 127, in f16. The integers are computed
/// with the scale before this rounding.
pub(super) fn quantize_q8_0(values: &[f32], out: &mut Vec<u8>) {
    for block in values.chunks_exact(32) {
        let peak = block.iter().fold(0f32, |peak, x| peak.max(x.abs()));
        let scale = peak / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        out.extend(f16::from_f32(scale).to_le_bytes());
        out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
    }
}
