//! Products with a packed weight `[d_in, d_out]` that is not an f32 matrix: every thread unpacks panels of it into its
//! own buffer and multiplies with them. On processors with AVX-512 `f32_tiles.rs` is used instead.
//!
//! A panel is a range of columns of W forward and of rows of W backward. Both are columns of the output, so that no
//! thread waits for another and no output is written twice.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::tiles::{LANES, Lanes, Output, SEGMENT, Sums};
use super::{Direction, f32_tiles};
use crate::cpu::{self, FlexTensor, Matrix, MatrixMut, Threads, Values};

/// The usual number of floats in a panel: 64 KiB, which stay in the first caches until they are multiplied.
const PANEL: usize = 16 * 1024;

/// Panels are multiples of this: the width of the product's micro-tile.
const UNIT: usize = 32;

/// The smallest number of columns in a forward panel. With fewer, memory would be read in parts of less than two cache
/// lines.
const COLUMNS: usize = 128;

thread_local! {
    /// A thread's panel, kept between products, so that its pages are not cleared for every product.
    static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A row-major weight `[d_in, d_out]` in a packed form.
pub(super) trait Stored: Sync {
    /// `[d_in, d_out]`.
    fn shape(&self) -> [usize; 2];

    /// The number of columns that must be unpacked together.
    fn block(&self) -> usize;

    /// Writes the elements from `first` on into `panel` as f32. Inlined into a function that is compiled
    /// for the processor's widest vectors.
    fn unpack(&self, first: usize, panel: &mut [f32]);

    /// Writes these columns of at most [`LANES`] rows into `tile`, as the bits of f32 numbers: the rows of a column are
    /// contiguous, followed by zeros. `columns` start with a block. Inlined, as [`unpack`](Self::unpack) is.
    #[inline(always)]
    fn unpack_rows<S: Sums>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        tile: &mut [Lanes<u32>],
    ) {
        let [_, d_out] = self.shape();
        let mut values = [[0f32; SEGMENT]; LANES];
        let segments = tile.chunks_mut(SEGMENT);
        for (tile, column) in segments.zip(columns.step_by(SEGMENT)) {
            for (row, values) in rows.clone().zip(&mut values) {
                self.unpack(row * d_out + column, &mut values[..tile.len()]);
            }
            for (part, tile) in tile.chunks_mut(16).enumerate() {
                for half in 0..2 {
                    let mut square = [[0; 16]; 16];
                    for (square, values) in square.iter_mut().zip(&values[half * 16..]) {
                        for lane in 0..16 {
                            square[lane] = values[part * 16 + lane].to_bits();
                        }
                    }
                    for (lanes, column) in tile.iter_mut().zip(S::transposed(square)) {
                        lanes[half] = column;
                    }
                }
            }
        }
    }
}

/// `sum + x · W` or `sum + x · Wᵀ`; without a sum, the product alone. `x` has `n` rows.
pub(super) fn product<S: Stored>(
    sum: Option<Values>,
    x: &[f32],
    n: usize,
    weight: &S,
    direction: Direction,
) -> FlexTensor {
    let (_, width) = direction.inner_and_outer(weight.shape());
    let multiply = if f32_tiles::is_supported() {
        f32_tiles::product
    } else {
        in_panels
    };
    Output::of(sum, [n, width], |output| {
        multiply(x, n, weight, direction, output);
    })
}

/// As [`product`], with panels and the general product.
pub(super) fn in_panels<S: Stored>(
    x: &[f32],
    n: usize,
    weight: &S,
    direction: Direction,
    output: Output,
) {
    let [d_in, d_out] = weight.shape();
    let (_, width) = direction.inner_and_outer([d_in, d_out]);
    let (output, accumulate) = match output {
        Output::New(output) => (output.as_mut_ptr().cast(), false),
        Output::Sum(output) => (output.as_mut_ptr(), true),
    };
    let output = Columns(output);
    for_each_panel(weight, direction, |first, count, panel| {
        // SAFETY: `output` has n · width elements, and no other call writes these columns.
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
}

/// Calls `work(first, count, panel)` on all threads, for panels of `count` columns forward or rows
/// backward, unpacked row by row.
fn for_each_panel<S: Stored>(
    weight: &S,
    direction: Direction,
    work: impl Fn(usize, usize, &[f32]) + Sync,
) {
    let (across, along) = direction.inner_and_outer(weight.shape());
    let size = match direction {
        Direction::Forward => COLUMNS.max(PANEL / across.max(1)),
        Direction::Backward => PANEL / across.max(1),
    };
    let unit = UNIT.next_multiple_of(weight.block());
    let panels = panels(along, unit, size, rayon::current_num_threads());
    panels.into_par_iter().for_each(|Range { start, end }| {
        let (first, count) = (start, end - start);
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < across * count {
                buffer.resize(across * count, 0.0);
            }
            let panel = &mut buffer[..across * count];
            cpu::vectorized(Unpack {
                weight,
                direction,
                first,
                count,
                panel,
            });
            work(first, count, panel);
        });
    });
}

/// Divides `0..along` equally among threads, and each share into panels of about `size`. All except the last are
/// multiples of `unit`.
fn panels(along: usize, unit: usize, size: usize, threads: usize) -> Vec<Range<usize>> {
    let units = along.div_ceil(unit);
    let mut panels = Vec::new();
    for thread in 0..threads {
        let share = units * thread / threads..units * (thread + 1) / threads;
        let pieces = share.len().div_ceil((size / unit).max(1)).max(1);
        for piece in 0..pieces {
            let start = share.start + share.len() * piece / pieces;
            let end = share.start + share.len() * (piece + 1) / pieces;
            panels.push(start * unit..(end * unit).min(along));
        }
    }
    panels.retain(|panel| !panel.is_empty());
    panels
}

/// Unpacks `count` columns forward, or rows backward, from `first` on.
struct Unpack<'a, S> {
    weight: &'a S,
    direction: Direction,
    first: usize,
    count: usize,
    panel: &'a mut [f32],
}

impl<S: Stored> cpu::Work for Unpack<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        let [_, d_out] = self.weight.shape();
        match self.direction {
            Direction::Forward => {
                for (row, panel) in self.panel.chunks_exact_mut(self.count).enumerate() {
                    self.weight.unpack(row * d_out + self.first, panel);
                }
            }
            Direction::Backward => self.weight.unpack(self.first * d_out, self.panel),
        }
    }
}

/// The output that threads write columns of.
#[derive(Clone, Copy)]
struct Columns(*mut f32);

// SAFETY: every panel has different columns.
unsafe impl Send for Columns {}
unsafe impl Sync for Columns {}

impl Columns {
    /// # Safety
    ///
    /// The output has `rows · stride` elements, and no other thread uses these columns meanwhile.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_cover_everything_once_and_threads_get_equal_shares() {
        for (along, unit, size, threads) in [
            (576, 32, 128, 2),
            (172, 32, 28, 2),
            (20, 32, 128, 3),
            (1536, 64, 10, 5),
            (0, 32, 128, 2),
        ] {
            let panels = panels(along, unit, size, threads);
            let mut end = 0;
            for panel in &panels {
                assert_eq!(panel.start, end);
                assert!(panel.len() <= size.max(unit));
                end = panel.end;
            }
            assert_eq!(end, along);
        }
        // Nine units of 32 each, in three panels.
        let of_q_proj = panels(576, 32, 128, 2);
        assert_eq!(of_q_proj.len(), 6);
        assert!(of_q_proj.iter().all(|panel| panel.len() == 96));
    }
}
