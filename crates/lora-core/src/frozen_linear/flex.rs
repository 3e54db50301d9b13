//! The CPU: weight panels are unpacked into a cache-sized buffer that the product then reads.
//!
//! Flex's own `dequantize` is a scalar loop that divides to find each element's block, and takes
//! longer than the product it feeds. Here the block's scale is applied to a run of integers at
//! once, in the widest vectors that the processor has, on all threads.

use burn::backend::ops::{FloatTensorOps, QTensorOps};
use burn::backend::tensor::QuantizedTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::DType;
use rayon::prelude::*;

use super::Direction;
use crate::cpu::{self, FlexTensor, Matrix, MatrixMut, Threads, Values};

/// Floats in a panel: 1 MiB, so that a panel stays in the cache between its unpacking and its use.
const PANEL: usize = 256 * 1024;

/// `sum + x · W` or `sum + x · Wᵀ` for W `[d_in, d_out]`; without a sum, the product alone.
pub fn product(
    sum: Option<FlexTensor>,
    x: FlexTensor,
    weight: QuantizedTensor<Flex>,
    direction: Direction,
) -> FlexTensor {
    let Some(packed) = Packed::read(&x, &weight) else {
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
    let (d_in, d_out) = (packed.d_in, packed.d_out);
    let width = match direction {
        Direction::Forward => d_out,
        Direction::Backward => d_in,
    };
    let accumulate = sum.is_some();
    let mut sum = sum.map(Values::new);
    let mut new = Vec::new();
    let output = match &mut sum {
        Some(sum) => {
            let sum = sum.as_mut_slice();
            assert_eq!(
                sum.len(),
                n * width,
                "the sum has another shape than the product"
            );
            sum.as_mut_ptr()
        }
        None => {
            new.reserve_exact(n * width);
            new.as_mut_ptr()
        }
    };
    packed.for_each_panel(|first, rows, panel| {
        let panel = Matrix::new(panel, rows, d_out, d_out);
        match direction {
            // Panels are rows of W: each adds its share of the inner sum to the whole output.
            Direction::Forward => {
                let x = Matrix::new(&x.as_slice()[first.min(n * d_in)..], n, rows, d_in);
                // SAFETY: `output` has n · d_out elements; the first panel writes without reading
                // where they are new.
                let output = unsafe { MatrixMut::from_raw(output, n, d_out, d_out) };
                let accumulate = accumulate || first > 0;
                cpu::multiply(output, accumulate, 1.0, x, panel, Threads::All);
            }
            // Panels are rows of W, that is columns of Wᵀ: each gives some columns of the output.
            Direction::Backward => {
                let x = Matrix::new(x.as_slice(), n, d_out, d_out);
                // SAFETY: `output` has n · d_in elements, and these columns are this call's.
                let output = unsafe { MatrixMut::from_raw(output.add(first), n, rows, d_in) };
                cpu::multiply(output, accumulate, 1.0, x, panel.transposed(), Threads::All);
            }
        }
    });
    match sum {
        Some(sum) => sum.into_primitive(),
        None => {
            // SAFETY: the panels cover the whole output, and a product writes all of its part.
            unsafe { new.set_len(n * width) };
            cpu::primitive(new, [n, width])
        }
    }
}

/// A quantized weight's integers and scales, where they lie as this file expects them.
struct Packed<'a> {
    integers: &'a [i8],
    scales: &'a [f32],
    d_in: usize,
    d_out: usize,
    block: usize,
}

impl<'a> Packed<'a> {
    /// `None` for layouts and types that the general path must handle: a transposed or per-tensor
    /// weight, blocks over several rows, a second scale level, activations that are not f32.
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

    /// Calls `work(first_row, rows, panel)` for panels of whole rows, in order.
    fn for_each_panel(&self, mut work: impl FnMut(usize, usize, &[f32])) {
        let rows = (PANEL / self.d_out.max(1)).clamp(1, self.d_in.max(1));
        let mut buffer = vec![0f32; rows * self.d_out];
        let mut first = 0;
        while first < self.d_in {
            let rows = rows.min(self.d_in - first);
            let panel = &mut buffer[..rows * self.d_out];
            self.unpack(first, panel);
            work(first, rows, panel);
            first += rows;
        }
    }

    /// Dequantizes the rows from `first` on into `panel`.
    fn unpack(&self, first: usize, panel: &mut [f32]) {
        let integers = &self.integers[first * self.d_out..][..panel.len()];
        let scales = &self.scales[first * self.d_out / self.block..][..panel.len() / self.block];
        // Pieces of about 64 KiB of floats, whole blocks each.
        let piece = (16 * 1024 / self.block).max(1) * self.block;
        panel
            .par_chunks_mut(piece)
            .zip(integers.par_chunks(piece))
            .zip(scales.par_chunks(piece / self.block))
            .for_each(|((panel, integers), scales)| {
                cpu::vectorized(|| unpack_blocks(panel, integers, scales, self.block))
            });
    }
}

/// `panel[i] = integers[i] · scales[i / block]`.
#[inline(always)]
fn unpack_blocks(panel: &mut [f32], integers: &[i8], scales: &[f32], block: usize) {
    // The usual block as a constant lets the compiler unroll the inner loop without remainders.
    match block {
        32 => unpack_fixed::<32>(panel, integers, scales),
        _ => {
            let blocks = panel
                .chunks_exact_mut(block)
                .zip(integers.chunks_exact(block));
            for ((panel, integers), scale) in blocks.zip(scales) {
                for (value, integer) in panel.iter_mut().zip(integers) {
                    *value = *integer as f32 * scale;
                }
            }
        }
    }
}

#[inline(always)]
fn unpack_fixed<const BLOCK: usize>(panel: &mut [f32], integers: &[i8], scales: &[f32]) {
    let (panel, _) = panel.as_chunks_mut::<BLOCK>();
    let (integers, _) = integers.as_chunks::<BLOCK>();
    for ((panel, integers), scale) in panel.iter_mut().zip(integers).zip(scales) {
        for (value, integer) in panel.iter_mut().zip(integers) {
            *value = *integer as f32 * scale;
        }
    }
}
