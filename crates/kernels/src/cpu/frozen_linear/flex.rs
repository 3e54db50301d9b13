//! Products with 8-bit weights on the CPU, unpacked panel by panel (see `panels.rs`).
//!
//! Flex's `dequantize` is a scalar loop with a division per element to find its block, and takes longer than the
//! product. Here a block's scale is applied to a run of integers at once, in the processor's widest vectors.

use std::ops::Range;

use burn::backend::ops::{FloatTensorOps, QTensorOps};
use burn::backend::tensor::QuantizedTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::DType;

use super::panels::{self, Stored};
use super::tiles::{Lanes, Output, SEGMENT, Sums, transposed_words};
use super::{Direction, bf16, columns, few_rows, precision};
use crate::cpu::{self, FlexTensor, Values};

/// `sum + x · W` or `sum + x · Wᵀ` for W `[d_in, d_out]`; without a sum, the product alone.
pub fn product(
    sum: Option<FlexTensor>,
    x: FlexTensor,
    weight: QuantizedTensor<Flex>,
    direction: Direction,
) -> FlexTensor {
    let Some(packed) = Packed::read(&x, &weight) else {
        if let Some(weight) = columns::Weight::read(&x, &weight) {
            return weight.product(sum, x, direction);
        }
        let dense = Flex::dequantize(weight, x.dtype().into());
        let product = match direction {
            Direction::Forward => Flex::float_matmul(x, dense),
            Direction::Backward => Flex::float_matmul(x, Flex::float_transpose(dense)),
        };
        return match sum {
            Some(sum) => Flex::float_add(sum, product),
            None => product,
        };
    };
    let n = x.shape()[0];
    let x = Values::new(x);
    let d_in = packed.d_in;
    let sum = sum.map(Values::new);
    // A pair of weights must have one scale.
    if precision::is_bf16() && packed.block.is_multiple_of(2) && n > 0 && d_in > 0 {
        return in_bf16(sum, x.as_slice(), n, &packed, direction);
    }
    let block = packed.block;
    let is_few = (1..=few_rows::AT_MOST).contains(&n) && block == few_rows::BLOCK && d_in > 0;
    if direction == Direction::Forward && is_few {
        return of_few_rows(sum, x.as_slice(), n, &packed);
    }
    panels::product(sum, x.as_slice(), n, &packed, direction)
}

/// As [`product`] forward, for few rows (decoding).
fn of_few_rows(sum: Option<Values>, x: &[f32], n: usize, packed: &Packed) -> FlexTensor {
    let weight = few_rows::Weight {
        integers: packed.integers,
        scales: packed.scales,
        d_in: packed.d_in,
        d_out: packed.d_out,
    };
    match sum {
        Some(mut sum) => {
            few_rows::add_product(x, n, weight, sum.as_mut_slice());
            sum.into_primitive()
        }
        None => {
            let mut new = vec![0f32; n * packed.d_out];
            few_rows::add_product(x, n, weight, &mut new);
            cpu::primitive(new, [n, packed.d_out])
        }
    }
}

/// As [`product`], with operands rounded to bf16.
fn in_bf16(
    sum: Option<Values>,
    x: &[f32],
    n: usize,
    packed: &Packed,
    direction: Direction,
) -> FlexTensor {
    let (_, width) = direction.inner_and_outer([packed.d_in, packed.d_out]);
    let weight = bf16::Weight {
        integers: packed.integers,
        scales: packed.scales,
        d_in: packed.d_in,
        d_out: packed.d_out,
        block: packed.block,
    };
    Output::of(sum, [n, width], |output| match direction {
        Direction::Forward => bf16::forward(x, n, weight, output),
        Direction::Backward => bf16::backward(x, n, weight, output),
    })
}

/// A quantized weight's integers and scales, in the layout that this file supports.
pub(super) struct Packed<'a> {
    pub(super) integers: &'a [i8],
    pub(super) scales: &'a [f32],
    pub(super) d_in: usize,
    pub(super) d_out: usize,
    pub(super) block: usize,
}

impl<'a> Packed<'a> {
    /// `None` for layouts and types that the general product must handle: a transposed or per-tensor weight, blocks
    /// over several rows, a second level of scales, activations that are not f32.
    fn read(x: &FlexTensor, weight: &'a QuantizedTensor<Flex>) -> Option<Self> {
        let tensor = weight.tensor();
        let DType::QFloat(scheme) = weight.dtype() else {
            return None;
        };
        let [d_in, d_out] = weight.shape().dims::<2>();
        let block = match scheme.block_size() {
            Some(size) => match size.to_dim_vec(2)[..] {
                [1, block] => block as usize,
                _ => return None,
            },
            None => return None,
        };
        let plain = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
        let fits = block > 0
            && d_out.is_multiple_of(block)
            && weight.scales().len() * block == d_in * d_out;
        let one_level = scheme.num_levels() == 1;
        let usable =
            plain && fits && one_level && x.dtype() == DType::F32 && x.shape().num_dims() == 2;
        usable.then(|| Self {
            integers: &tensor.storage::<i8>()[..d_in * d_out],
            scales: weight.scales(),
            d_in,
            d_out,
            block,
        })
    }
}

impl Stored for Packed<'_> {
    fn shape(&self) -> [usize; 2] {
        [self.d_in, self.d_out]
    }

    fn block(&self) -> usize {
        self.block
    }

    #[inline(always)]
    fn unpack(&self, first: usize, panel: &mut [f32]) {
        let integers = &self.integers[first..][..panel.len()];
        // With the usual block size as a constant, the compiler unrolls the inner loop without remainders.
        if self.block == 32 && first.is_multiple_of(32) && panel.len().is_multiple_of(32) {
            let scales = &self.scales[first / 32..][..panel.len() / 32];
            return unpack_fixed::<32>(panel, integers, scales);
        }
        let mut start = 0;
        while start < panel.len() {
            let (index, within) = ((first + start) / self.block, (first + start) % self.block);
            let end = (start + self.block - within).min(panel.len());
            let scale = self.scales[index];
            for (value, integer) in panel[start..end].iter_mut().zip(&integers[start..end]) {
                *value = *integer as f32 * scale;
            }
            start = end;
        }
    }

    #[inline(always)]
    fn unpack_rows<S: Sums>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        tile: &mut [Lanes<u32>],
    ) {
        let blocks_in_row = self.d_out / self.block;
        let mut scales: [Lanes<f32>; SEGMENT] = [[[0.0; 16]; 2]; SEGMENT];
        let segments = tile.chunks_mut(SEGMENT);
        for (tile, first) in segments.zip(columns.step_by(SEGMENT)) {
            let from = &self.integers[rows.start * self.d_out + first..];
            let words = transposed_words::<S>(from, self.d_out, rows.len(), tile.len());
            // A row's scales lie side by side, a column's rows apart.
            let (start, end) = (
                first / self.block,
                (first + tile.len()).div_ceil(self.block),
            );
            for (lane, row) in rows.clone().enumerate() {
                let from = &self.scales[row * blocks_in_row..][start..end];
                for (scales, scale) in scales.iter_mut().zip(from) {
                    scales.as_flattened_mut()[lane] = *scale;
                }
            }
            for (i, lanes) in tile.iter_mut().enumerate() {
                // One of a word's four bytes, with its sign.
                let shift = 24 - i % 4 * 8;
                let (words, scales) = (&words[i / 4], &scales[(first + i) / self.block - start]);
                let mut new: Lanes<u32> = [[0; 16]; 2];
                for half in 0..2 {
                    for lane in 0..16 {
                        let integer = (words[half][lane] << shift) as i32 >> 24;
                        new[half][lane] = (integer as f32 * scales[half][lane]).to_bits();
                    }
                }
                *lanes = new;
            }
        }
    }
}

#[inline(always)]
fn unpack_fixed<const BLOCK: usize>(panel: &mut [f32], integers: &[i8], scales: &[f32]) {
    let (panel, _) = panel.as_chunks_mut::<BLOCK>();
    let (integers, _) = integers.as_chunks::<BLOCK>();
    for ((panel, integers), scale) in panel.iter_mut().zip(integers).zip(scales) {
        // Computed before it is written, so that the compiler need not check whether the two overlap.
        let mut values = [0f32; BLOCK];
        for i in 0..BLOCK {
            values[i] = integers[i] as f32 * scale;
        }
        *panel = values;
    }
}
