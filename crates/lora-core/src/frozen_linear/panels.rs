//! Products with a stored weight `[d_in, d_out]` that is no f32 matrix: every thread unpacks panels of it
//! into a buffer of its own and multiplies with them.
//!
//! A panel is some columns of W forward and some rows of it backward: columns of the output either way,
//! so that no thread waits for another and no output is written twice.

use std::cell::RefCell;

use rayon::prelude::*;

use super::Direction;
use crate::cpu::{self, FlexTensor, Matrix, MatrixMut, Threads, Values};

/// Floats in a panel at most: 512 KiB, which stays in a core's second-level cache. From 256 KiB to 2 MiB
/// no difference in speed could be told from noise.
const PANEL: usize = 128 * 1024;

/// Panels are multiples of this: of what the product's innermost loop computes at once.
const COUNT_MULTIPLE: usize = 32;

thread_local! {
    /// The panel that a thread works with; kept, so that its pages are not cleared for every product.
    static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A weight `[d_in, d_out]`, row by row, in a form of its own.
pub(super) trait Stored: Sync {
    /// `[d_in, d_out]`.
    fn shape(&self) -> [usize; 2];

    /// Columns that must be unpacked together.
    fn block(&self) -> usize;

    /// Writes the elements from `first` on, whole blocks, into `panel` as f32. Inlined into a function
    /// that is compiled for the processor's widest vectors.
    fn unpack(&self, first: usize, panel: &mut [f32]);
}

/// `sum + x · W` or `sum + x · Wᵀ`; without a sum, the product alone. `x` has `n` rows.
pub(super) fn product<S: Stored>(
    sum: Option<Values>,
    x: &[f32],
    n: usize,
    weight: &S,
    direction: Direction,
) -> FlexTensor {
    let [d_in, d_out] = weight.shape();
    let width = match direction {
        Direction::Forward => d_out,
        Direction::Backward => d_in,
    };
    let accumulate = sum.is_some();
    let mut sum = sum;
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
    for_each_panel(weight, direction, |first, count, panel| {
        // SAFETY: `output` has n · width elements, and these columns are this call's.
        let output = unsafe { output.columns(first, [n, count], width) };
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
        cpu::multiply(output, accumulate, 1.0, x, panel, Threads::One);
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

/// Calls `work(first, count, panel)` on all threads, for panels of `count` columns forward or rows
/// backward, unpacked row by row.
fn for_each_panel<S: Stored>(
    weight: &S,
    direction: Direction,
    work: impl Fn(usize, usize, &[f32]) + Sync,
) {
    let [d_in, d_out] = weight.shape();
    let (along, across) = match direction {
        Direction::Forward => (d_out, d_in),
        Direction::Backward => (d_in, d_out),
    };
    // As many panels as threads, or a multiple of that.
    let threads = rayon::current_num_threads();
    let rounds = along
        .div_ceil((PANEL / across.max(1)).max(1) * threads)
        .max(1);
    let count = along.div_ceil(rounds * threads);
    let count = count.next_multiple_of(weight.block().max(COUNT_MULTIPLE));
    let starts = (0..along).into_par_iter().step_by(count.max(1));
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
                        weight.unpack(row * d_out + first, panel);
                    }
                }
                Direction::Backward => weight.unpack(first * d_out, panel),
            });
            work(first, count, panel);
        });
    });
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
