//! `x · W` for a few rows of `x`, as when a text is written token by token: the weight is read once and
//! multiplied as it is unpacked, in registers. Its bytes over the memory's bandwidth are the floor.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

/// Rows up to which this pays: beyond, unpacking once into a panel for the blocked product is faster.
pub(super) const AT_MOST: usize = 16;

/// Rows that are multiplied in registers at a time. The next ones find the weight in the cache.
const ROWS: usize = 4;

/// The block that weights have by default; others take the general way.
pub(super) const BLOCK: usize = 32;

/// Rows of W that an output block is held in registers for.
const DEEP: usize = 4;

/// Columns that a thread takes at least.
const COLUMNS: usize = 64;

thread_local! {
    static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A weight `[d_in, d_out]` in blocks of [`BLOCK`] along its rows.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    pub(super) integers: &'a [i8],
    pub(super) scales: &'a [f32],
    pub(super) d_in: usize,
    pub(super) d_out: usize,
}

/// Adds `x · W` to `output`, `[n, d_out]`, for `x` `[n, d_in]`.
pub(super) fn add_product(x: &[f32], n: usize, weight: Weight, output: &mut [f32]) {
    let d_out = weight.d_out;
    let threads = rayon::current_num_threads();
    let columns = d_out.div_ceil(threads).max(COLUMNS);
    let columns = columns.next_multiple_of(BLOCK);
    let parts: Vec<Range<usize>> = (0..d_out)
        .step_by(columns)
        .map(|first| first..(first + columns).min(d_out))
        .collect();
    // Each thread adds up its columns of all rows in memory of its own: rows of the output lie apart.
    let sums = parts.into_par_iter().map(|part| {
        SUMS.with_borrow_mut(|sums| {
            sums.clear();
            sums.resize(n * part.len(), 0.0);
            let rows = x.chunks(ROWS * weight.d_in);
            let sums_of_rows = sums.chunks_mut(ROWS * part.len());
            crate::cpu::vectorized(|| {
                for (x, sums) in rows.zip(sums_of_rows) {
                    match sums.len() / part.len() {
                        1 => add_columns::<1>(x, weight, part.clone(), sums),
                        2 => add_columns::<2>(x, weight, part.clone(), sums),
                        3 => add_columns::<3>(x, weight, part.clone(), sums),
                        _ => add_columns::<ROWS>(x, weight, part.clone(), sums),
                    }
                }
            });
            (part, sums.clone())
        })
    });
    for (part, sums) in sums.collect::<Vec<_>>() {
        for (row, sums) in sums.chunks_exact(part.len()).enumerate() {
            let output = &mut output[row * d_out..][part.clone()];
            output.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
        }
    }
}

/// Adds the products of these columns to `sums`, `[N, columns]`.
#[inline(always)]
fn add_columns<const N: usize>(x: &[f32], weight: Weight, part: Range<usize>, sums: &mut [f32]) {
    let (d_in, d_out) = (weight.d_in, weight.d_out);
    let columns = part.len();
    let (blocks, first_block) = (columns / BLOCK, part.start / BLOCK);
    let blocks_a_row = d_out / BLOCK;
    for first in (0..d_in).step_by(DEEP) {
        let deep = DEEP.min(d_in - first);
        let rows: [(&[[i8; BLOCK]], &[f32]); DEEP] = std::array::from_fn(|i| {
            let row = first + i.min(deep - 1);
            let integers = &weight.integers[row * d_out..][part.clone()];
            let scales = &weight.scales[row * blocks_a_row + first_block..][..blocks];
            (integers.as_chunks::<BLOCK>().0, scales)
        });
        for block in 0..blocks {
            let mut held: [[f32; BLOCK]; N] = std::array::from_fn(|n| {
                let sums = &sums[n * columns + block * BLOCK..][..BLOCK];
                std::array::from_fn(|i| sums[i])
            });
            for (i, (integers, scales)) in rows.iter().enumerate().take(deep) {
                let integers = &integers[block];
                let weights: [f32; BLOCK] = std::array::from_fn(|j| integers[j] as f32);
                for (n, held) in held.iter_mut().enumerate() {
                    let x = x[n * d_in + first + i] * scales[block];
                    for j in 0..BLOCK {
                        held[j] += x * weights[j];
                    }
                }
            }
            for (n, held) in held.iter().enumerate() {
                sums[n * columns + block * BLOCK..][..BLOCK].copy_from_slice(held);
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
