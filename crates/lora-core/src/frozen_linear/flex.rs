//! The CPU: every thread unpacks panels of the weight into a buffer of its own and multiplies with them.
//!
//! A panel is some columns of W forward and some rows of it backward: columns of the output either way,
//! so that no thread waits for another and no output is written twice. Flex's own `dequantize` is a
//! scalar loop that divides to find each element's block, and takes longer than the product it feeds.
//! Here a block's scale is applied to a run of integers at once, in the widest vectors that the
//! processor has.

use std::cell::RefCell;

use burn::backend::ops::{FloatTensorOps, QTensorOps};
use burn::backend::tensor::QuantizedTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::DType;
use rayon::prelude::*;

use super::{Direction, bf16, few_rows, precision};
use crate::cpu::{self, FlexTensor, Matrix, MatrixMut, Threads, Values};

/// Floats in a panel at most: 2 MiB, which a processor's share of the last cache holds. Smaller panels
/// would have the activations packed more often.
const PANEL: usize = 512 * 1024;

thread_local! {
    /// The panel that a thread works with; kept, so that its pages are not cleared for every product.
    static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

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
    // Pairs of weights must not have two scales.
    if precision::is_bf16() && packed.block.is_multiple_of(2) && n > 0 && d_in > 0 {
        return in_bf16(sum, x.as_slice(), n, &packed, direction, width);
    }
    let block = packed.block;
    let is_few = (1..=few_rows::AT_MOST).contains(&n) && block == few_rows::BLOCK && d_in > 0;
    if direction == Direction::Forward && is_few {
        return of_few_rows(sum, x.as_slice(), n, &packed);
    }
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
    let output = Output(output);
    let x = x.as_slice();
    packed.for_each_panel(direction, |first, count, panel| match direction {
        Direction::Forward => {
            let x = Matrix::new(x, n, d_in, d_in);
            let panel = Matrix::new(panel, d_in, count, count);
            // SAFETY: `output` has n · d_out elements, and these columns are this call's.
            let output = unsafe { output.columns(first, [n, count], d_out) };
            cpu::multiply(output, accumulate, 1.0, x, panel, Threads::One);
        }
        Direction::Backward => {
            let x = Matrix::new(x, n, d_out, d_out);
            let panel = Matrix::new(panel, count, d_out, d_out).transposed();
            // SAFETY: `output` has n · d_in elements, and these columns are this call's.
            let output = unsafe { output.columns(first, [n, count], d_in) };
            cpu::multiply(output, accumulate, 1.0, x, panel, Threads::One);
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

/// As [`product`] forward, for a few rows.
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

/// As [`product`], of operands rounded to bf16.
fn in_bf16(
    sum: Option<Values>,
    x: &[f32],
    n: usize,
    packed: &Packed,
    direction: Direction,
    width: usize,
) -> FlexTensor {
    let weight = bf16::Weight {
        integers: packed.integers,
        scales: packed.scales,
        d_in: packed.d_in,
        d_out: packed.d_out,
        block: packed.block,
    };
    let multiply = |output| match direction {
        Direction::Forward => bf16::forward(x, n, weight, output),
        Direction::Backward => bf16::backward(x, n, weight, output),
    };
    match sum {
        Some(mut sum) => {
            multiply(bf16::Output::Sum(sum.as_mut_slice()));
            sum.into_primitive()
        }
        None => {
            let mut new = Vec::with_capacity(n * width);
            multiply(bf16::Output::New(
                &mut new.spare_capacity_mut()[..n * width],
            ));
            // SAFETY: a product writes every element of a new output.
            unsafe { new.set_len(n * width) };
            cpu::primitive(new, [n, width])
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

    /// Calls `work(first, count, panel)` on all threads, for panels of `count` columns forward or rows
    /// backward, unpacked row by row.
    fn for_each_panel(&self, direction: Direction, work: impl Fn(usize, usize, &[f32]) + Sync) {
        let (along, across) = match direction {
            Direction::Forward => (self.d_out, self.d_in),
            Direction::Backward => (self.d_in, self.d_out),
        };
        // As many panels as threads, or a multiple of that.
        let threads = rayon::current_num_threads();
        let rounds = along
            .div_ceil((PANEL / across.max(1)).max(1) * threads)
            .max(1);
        let count = along.div_ceil(rounds * threads);
        let count = count.next_multiple_of(self.block.max(COUNT_MULTIPLE));
        let starts = (0..along).into_par_iter().step_by(count.max(1));
        starts.for_each(|first| {
            let count = count.min(along - first);
            BUFFER.with_borrow_mut(|buffer| {
                if buffer.len() < across * count {
                    buffer.resize(across * count, 0.0);
                }
                let panel = &mut buffer[..across * count];
                cpu::vectorized(|| match direction {
                    Direction::Forward => self.unpack_columns(first, count, panel),
                    Direction::Backward => self.unpack(first * self.d_out, panel),
                });
                work(first, count, panel);
            });
        });
    }

    /// Dequantizes `count` columns from `first` on, whole blocks.
    #[inline(always)]
    fn unpack_columns(&self, first: usize, count: usize, panel: &mut [f32]) {
        for (row, panel) in panel.chunks_exact_mut(count).enumerate() {
            self.unpack(row * self.d_out + first, panel);
        }
    }

    /// Dequantizes the elements from `first` on, whole blocks, into `panel`.
    #[inline(always)]
    fn unpack(&self, first: usize, panel: &mut [f32]) {
        let integers = &self.integers[first..][..panel.len()];
        let scales = &self.scales[first / self.block..][..panel.len() / self.block];
        unpack_blocks(panel, integers, scales, self.block);
    }
}

/// Panels are multiples of this: of what the product's innermost loop computes at once.
const COUNT_MULTIPLE: usize = 32;

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
