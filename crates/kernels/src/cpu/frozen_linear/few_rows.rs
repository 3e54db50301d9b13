//! `x · W` for a few rows of `x`, as when a text is written token by token: the weight is read once and
//! multiplied as it is unpacked, in registers. Its bytes over the memory's bandwidth are the floor.

use std::ops::Range;

use burn::tensor::Tensor;

use super::decode::{add_by_columns, with_rows};
use crate::cpu;

/// Rows up to which this pays: beyond, unpacking once into a panel for the blocked product is faster.
pub const AT_MOST: usize = 16;

/// Rows that are multiplied in registers at a time. The next ones find the weight in the cache.
const ROWS: usize = 8;

/// The block that weights have by default; others take the general way.
pub const BLOCK: usize = 32;

/// Rows of W that an output block is held in registers for.
const DEEP: usize = 8;

/// A weight `[d_in, d_out]` that is read in blocks of [`BLOCK`] along its rows.
pub trait Blocks: Copy + Sync {
    /// Width of the input.
    fn d_in(&self) -> usize;
    /// Width of the output, a multiple of [`BLOCK`].
    fn d_out(&self) -> usize;
    /// A block's scale and what is to be multiplied with it. `at` is its first element.
    fn block(&self, at: usize) -> (f32, [f32; BLOCK]);
    /// Begins to load the block whose first element is `at`, which may lie beyond the weight.
    fn prefetch(&self, at: usize);
}

/// Integers with a scale a block.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    pub(super) integers: &'a [i8],
    pub(super) scales: &'a [f32],
    pub(super) d_in: usize,
    pub(super) d_out: usize,
}

impl Blocks for Weight<'_> {
    fn d_in(&self) -> usize {
        self.d_in
    }

    fn d_out(&self) -> usize {
        self.d_out
    }

    #[inline(always)]
    fn block(&self, at: usize) -> (f32, [f32; BLOCK]) {
        let integers = &self.integers[at..][..BLOCK];
        let mut values = [0f32; BLOCK];
        for i in 0..BLOCK {
            values[i] = f32::from(integers[i]);
        }
        (self.scales[at / BLOCK], values)
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        // A cache line holds two blocks.
        if at.is_multiple_of(2 * BLOCK) {
            cpu::prefetch(self.integers, at);
        }
    }
}

/// A weight of plain floats.
#[derive(Clone, Copy)]
pub struct Dense<'a> {
    pub(super) values: &'a [f32],
    pub(super) d_in: usize,
    pub(super) d_out: usize,
}

impl Blocks for Dense<'_> {
    fn d_in(&self) -> usize {
        self.d_in
    }

    fn d_out(&self) -> usize {
        self.d_out
    }

    #[inline(always)]
    fn block(&self, at: usize) -> (f32, [f32; BLOCK]) {
        let mut values = [0f32; BLOCK];
        values.copy_from_slice(&self.values[at..][..BLOCK]);
        (1.0, values)
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        cpu::prefetch(self.values, at);
        cpu::prefetch(self.values, at + BLOCK / 2);
    }
}

/// Adds `x · W` to `output`, `[n, d_out]`, for `x` `[n, d_in]`.
pub fn add_product(x: &[f32], n: usize, weight: impl Blocks, output: &mut [f32]) {
    add_by_columns(output, n, |part, sums| {
        cpu::vectorized(Columns {
            x,
            weight,
            part,
            sums,
        });
    });
}

/// Whether [`of_dense`] can be used.
pub fn applies(sum: &Option<Tensor<2>>, x: &Tensor<2>, weight: &Tensor<2>) -> bool {
    let ([n, _], [d_in, d_out]) = (x.dims(), weight.dims());
    let fits = (1..=AT_MOST).contains(&n) && d_in > 0 && d_out.is_multiple_of(BLOCK);
    let native = cpu::is_native(x) && cpu::is_native(weight);
    fits && native && sum.as_ref().is_none_or(cpu::is_native)
}

/// `sum + x · W` of a dense weight.
pub fn of_dense(sum: Option<Tensor<2>>, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let ([n, _], [d_in, d_out]) = (x.dims(), weight.dims());
    let (x, weight) = (cpu::values(x), cpu::values(weight));
    let dense = Dense {
        values: weight.as_slice(),
        d_in,
        d_out,
    };
    match sum {
        Some(sum) => {
            let mut sum = cpu::values(sum);
            add_product(x.as_slice(), n, dense, sum.as_mut_slice());
            sum.into_tensor()
        }
        None => {
            let mut new = vec![0f32; n * d_out];
            add_product(x.as_slice(), n, dense, &mut new);
            cpu::tensor(new, [n, d_out])
        }
    }
}

/// Adds the products of these columns to `sums`, `[n, columns]`.
struct Columns<'a, W> {
    x: &'a [f32],
    weight: W,
    part: Range<usize>,
    sums: &'a mut [f32],
}

impl<W: Blocks> cpu::Work for Columns<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        let Self {
            x,
            weight,
            part,
            sums,
        } = self;
        let rows = x.chunks(ROWS * weight.d_in());
        for (x, sums) in rows.zip(sums.chunks_mut(ROWS * part.len())) {
            let part = part.clone();
            with_rows!(sums.len() / part.len(), [1 2 3 4 5 6 7 | ROWS], N => {
                add_columns::<N, FUSED, _>(x, weight, part, sums)
            });
        }
    }
}

/// As [`Columns`], for `N` rows.
#[inline(always)]
fn add_columns<const N: usize, const FUSED: bool, W: Blocks>(
    x: &[f32],
    weight: W,
    part: Range<usize>,
    sums: &mut [f32],
) {
    let (d_in, d_out) = (weight.d_in(), weight.d_out());
    let columns = part.len();
    assert!(x.len() == N * d_in && sums.len() == N * columns);
    for first in (0..d_in).step_by(DEEP) {
        let rows = first..(first + DEEP).min(d_in);
        for column in (0..columns).step_by(BLOCK) {
            let mut held = [[0f32; BLOCK]; N];
            for (n, held) in held.iter_mut().enumerate() {
                held.copy_from_slice(&sums[n * columns + column..][..BLOCK]);
            }
            for row in rows.clone() {
                let at = row * d_out + part.start + column;
                // The same columns come next of the rows behind these: a thread's part of a row is too
                // short for the processor to see what it will need.
                weight.prefetch(at + DEEP * d_out);
                let (scale, mut weights) = weight.block(at);
                for weight in &mut weights {
                    *weight *= scale;
                }
                for (n, held) in held.iter_mut().enumerate() {
                    let x = x[n * d_in + row];
                    for i in 0..BLOCK {
                        held[i] = cpu::multiply_add::<FUSED>(x, weights[i], held[i]);
                    }
                }
            }
            for (n, held) in held.iter().enumerate() {
                sums[n * columns + column..][..BLOCK].copy_from_slice(held);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_rows_are_the_plain_sums() {
        // 100 rows of W: not a multiple of what is held at a time; 224 columns: parts of several sizes.
        let (d_in, d_out) = (101, 224);
        let integers: Vec<i8> = (0..d_in * d_out)
            .map(|i| ((i * 37 + i / 11) % 255) as i8)
            .collect();
        let scales: Vec<f32> = (0..d_in * d_out / BLOCK)
            .map(|i| 0.001 + (i % 13) as f32 * 0.0003)
            .collect();
        for n in 1..=AT_MOST {
            let x: Vec<f32> = (0..n * d_in)
                .map(|i| ((i * 29 % 41) as f32 - 20.0) / 20.0)
                .collect();
            let mut output = vec![0.5f32; n * d_out];
            let weight = Weight {
                integers: &integers,
                scales: &scales,
                d_in,
                d_out,
            };
            add_product(&x, n, weight, &mut output);
            let dense = integers.iter().enumerate();
            let dense: Vec<f32> = dense
                .map(|(i, q)| f32::from(*q) * scales[i / BLOCK])
                .collect();
            let values = &dense[..];
            let mut of_dense = vec![0.5f32; n * d_out];
            add_product(
                &x,
                n,
                Dense {
                    values,
                    d_in,
                    d_out,
                },
                &mut of_dense,
            );
            for (a, b) in of_dense.iter().zip(&output) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
            for row in 0..n {
                for column in 0..d_out {
                    let product = |i: usize| {
                        let scale = scales[(i * d_out + column) / BLOCK] as f64;
                        x[row * d_in + i] as f64 * integers[i * d_out + column] as f64 * scale
                    };
                    let expected = 0.5 + (0..d_in).map(product).sum::<f64>();
                    let got = output[row * d_out + column] as f64;
                    // 101 products of up to 0.6 in f32.
                    assert!((got - expected).abs() < 1e-5, "{got} {expected}");
                }
            }
        }
    }
}
