//! Weights whose blocks run along the input ([`IntegerWeight`](crate::IntegerWeight)), on the CPU.
//!
//! A scale belongs to one column, so a run of a row is integers times a run of scales, element by element.

use std::cell::RefCell;

use burn::backend::tensor::QuantizedTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::DType;
use rayon::prelude::*;

use super::Direction;
use crate::cpu::{self, FlexTensor, Matrix, MatrixMut, Threads, Values};

/// Floats in a panel at most, as for the other orientation.
const PANEL: usize = 512 * 1024;

/// Panels are multiples of this: of what the product's innermost loop computes at once.
const COUNT_MULTIPLE: usize = 32;

/// Rows of `x` up to which the weight is multiplied as it is unpacked.
const FEW: usize = 4;

/// Columns whose sums are held in registers at once.
const HELD: usize = 32;

thread_local! {
    static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A weight `[d_in, d_out]` in blocks of `block` rows of one column.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    integers: &'a [i8],
    /// `[d_in / block, d_out]`.
    scales: &'a [f32],
    d_in: usize,
    d_out: usize,
    block: usize,
}

impl<'a> Weight<'a> {
    /// `None` for another layout, or activations that are not f32.
    pub fn read(x: &FlexTensor, weight: &'a QuantizedTensor<Flex>) -> Option<Self> {
        let tensor = weight.tensor();
        let DType::QFloat(scheme) = weight.dtype() else {
            return None;
        };
        let [d_in, d_out] = weight.shape().dims::<2>();
        let block = match scheme.block_size()?.to_dim_vec(2)[..] {
            [block, 1] if block > 1 => block as usize,
            _ => return None,
        };
        let plain = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
        let fits = d_in.is_multiple_of(block) && weight.scales().len() * block == d_in * d_out;
        let usable = plain
            && fits
            && scheme.num_levels() == 1
            && x.dtype() == DType::F32
            && x.shape().num_dims() == 2;
        usable.then(|| Self {
            integers: &tensor.storage::<i8>()[..d_in * d_out],
            scales: weight.scales(),
            d_in,
            d_out,
            block,
        })
    }

    /// `sum + x · W` or `sum + x · Wᵀ`; without a sum, the product alone.
    pub fn product(
        self,
        sum: Option<FlexTensor>,
        x: FlexTensor,
        direction: Direction,
    ) -> FlexTensor {
        let n = x.shape()[0];
        let width = match direction {
            Direction::Forward => self.d_out,
            Direction::Backward => self.d_in,
        };
        let x = Values::new(x);
        let accumulate = sum.is_some();
        let mut sum = match sum {
            Some(sum) => Values::new(sum),
            None => Values::new(cpu::primitive(vec![0.0; n * width], [n, width])),
        };
        let output = sum.as_mut_slice();
        assert_eq!(
            output.len(),
            n * width,
            "the sum has another shape than the product"
        );
        if n > 0 && self.d_in > 0 {
            match direction {
                Direction::Forward if n <= FEW => self.add_few_rows(x.as_slice(), n, output),
                _ => self.multiply(output, accumulate, x.as_slice(), n, direction),
            }
        }
        sum.into_primitive()
    }

    /// Unpacks panels on every thread and multiplies with them.
    fn multiply(
        self,
        output: &mut [f32],
        accumulate: bool,
        x: &[f32],
        n: usize,
        direction: Direction,
    ) {
        let (d_in, d_out) = (self.d_in, self.d_out);
        let (along, across) = match direction {
            Direction::Forward => (d_out, d_in),
            Direction::Backward => (d_in, d_out),
        };
        let threads = rayon::current_num_threads();
        let rounds = along
            .div_ceil((PANEL / across.max(1)).max(1) * threads)
            .max(1);
        let count = along.div_ceil(rounds * threads);
        let count = count.next_multiple_of(COUNT_MULTIPLE);
        let output = Output(output.as_mut_ptr());
        let starts = (0..along).into_par_iter().step_by(count);
        starts.for_each(|first| {
            let count = count.min(along - first);
            BUFFER.with_borrow_mut(|buffer| {
                if buffer.len() < across * count {
                    buffer.resize(across * count, 0.0);
                }
                let panel = &mut buffer[..across * count];
                cpu::vectorized(|| match direction {
                    Direction::Forward => {
                        for (row, panel) in panel.chunks_exact_mut(count).enumerate() {
                            self.unpack(row, first, panel);
                        }
                    }
                    Direction::Backward => {
                        for (row, panel) in panel.chunks_exact_mut(d_out).enumerate() {
                            self.unpack(first + row, 0, panel);
                        }
                    }
                });
                let (x, panel) = match direction {
                    Direction::Forward => (
                        Matrix::new(x, n, d_in, d_in),
                        Matrix::new(panel, d_in, count, count),
                    ),
                    Direction::Backward => (
                        Matrix::new(x, n, d_out, d_out),
                        Matrix::new(panel, count, d_out, d_out).transposed(),
                    ),
                };
                // SAFETY: the output has n · along elements, and these columns are this call's alone.
                let output = unsafe { output.columns(first, [n, count], along) };
                cpu::multiply(output, accumulate, 1.0, x, panel, Threads::One);
            });
        });
    }

    /// Dequantizes a run of a row.
    #[inline(always)]
    fn unpack(self, row: usize, first: usize, panel: &mut [f32]) {
        let integers = &self.integers[row * self.d_out + first..][..panel.len()];
        let scales = &self.scales[row / self.block * self.d_out + first..][..panel.len()];
        for ((value, integer), scale) in panel.iter_mut().zip(integers).zip(scales) {
            *value = *integer as f32 * scale;
        }
    }

    /// Adds `x · W` for at most [`FEW`] rows of `x`: integers are summed up under a block's common scale.
    fn add_few_rows(self, x: &[f32], n: usize, output: &mut [f32]) {
        let threads = rayon::current_num_threads();
        let columns = self.d_out.div_ceil(threads).next_multiple_of(HELD);
        let starts: Vec<usize> = (0..self.d_out).step_by(columns).collect();
        let sums = starts.into_par_iter().map(|first| {
            let count = columns.min(self.d_out - first);
            let mut sums = vec![0.0; n * count];
            cpu::vectorized(|| match n {
                1 => self.few_columns::<1>(x, first, count, &mut sums),
                2 => self.few_columns::<2>(x, first, count, &mut sums),
                3 => self.few_columns::<3>(x, first, count, &mut sums),
                _ => self.few_columns::<FEW>(x, first, count, &mut sums),
            });
            (first, count, sums)
        });
        for (first, count, sums) in sums.collect::<Vec<_>>() {
            for (row, sums) in sums.chunks_exact(count).enumerate() {
                let output = &mut output[row * self.d_out + first..][..count];
                output.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
            }
        }
    }

    #[inline(always)]
    fn few_columns<const N: usize>(self, x: &[f32], first: usize, count: usize, sums: &mut [f32]) {
        for block in 0..self.d_in / self.block {
            let rows = block * self.block..(block + 1) * self.block;
            let scales = &self.scales[block * self.d_out + first..][..count];
            for (start, scales) in scales.chunks(HELD).enumerate() {
                let start = start * HELD;
                let mut held = [[0f32; HELD]; N];
                for row in rows.clone() {
                    let integers = &self.integers[row * self.d_out + first + start..];
                    match integers.first_chunk::<HELD>() {
                        Some(integers) if scales.len() == HELD => {
                            for (n, held) in held.iter_mut().enumerate() {
                                let x = x[n * self.d_in + row];
                                for (sum, integer) in held.iter_mut().zip(integers) {
                                    *sum += x * *integer as f32;
                                }
                            }
                        }
                        // The last columns of a width that HELD does not divide.
                        _ => {
                            for (n, held) in held.iter_mut().enumerate() {
                                let x = x[n * self.d_in + row];
                                for (sum, integer) in held[..scales.len()].iter_mut().zip(integers)
                                {
                                    *sum += x * *integer as f32;
                                }
                            }
                        }
                    }
                }
                for (n, held) in held.iter().enumerate() {
                    let sums = &mut sums[n * count + start..][..scales.len()];
                    for ((sum, held), scale) in sums.iter_mut().zip(held).zip(scales) {
                        *sum += held * scale;
                    }
                }
            }
        }
    }
}

/// The output that threads write columns of.
#[derive(Clone, Copy)]
struct Output(*mut f32);

// SAFETY: every panel gives columns of its own.
unsafe impl Send for Output {}
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    ///
    /// The output has `rows · stride` elements, and nobody else uses these columns meanwhile.
    unsafe fn columns(
        &self,
        first: usize,
        [rows, count]: [usize; 2],
        stride: usize,
    ) -> MatrixMut<'_> {
        // SAFETY: the caller's promise.
        unsafe { MatrixMut::from_raw(self.0.add(first), rows, count, stride) }
    }
}
