//! The output layer for a few rows on the CPU, as when a text is written token by token: the table is read
//! once, whatever the number of rows. A general product first rearranges its operands, which costs as much as it
//! is worth only for many rows.

use rayon::prelude::*;

use crate::cpu::{self, LANES};

/// Rows up to which this pays.
pub(super) const AT_MOST: usize = 8;

/// Tokens that a thread takes at a time.
const TOKENS: usize = 1024;

/// What a table may hold.
pub(super) trait Number: Copy + Send + Sync {
    /// The row as f32, in `scratch` unless it is f32 already.
    fn widened<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
}

impl Number for f32 {
    #[inline(always)]
    fn widened<'a>(row: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        row
    }
}

/// `x · tableᵀ`, `[n, tokens]`, for `x` `[n, width]` and `table` `[tokens, width]`.
pub(super) fn scores<T: Number>(x: &[f32], n: usize, table: &[T], width: usize) -> Vec<f32> {
    let tokens = table.len() / width.max(1);
    let parts = table.par_chunks(TOKENS * width.max(1)).map(|part| {
        let mut scores = vec![0f32; part.len() / width.max(1) * n];
        let mut row = vec![0f32; width];
        cpu::vectorized(|| match n {
            1 => of_part::<_, 1>(x, part, &mut row, &mut scores),
            2 => of_part::<_, 2>(x, part, &mut row, &mut scores),
            3 => of_part::<_, 3>(x, part, &mut row, &mut scores),
            4 => of_part::<_, 4>(x, part, &mut row, &mut scores),
            _ => {
                // Fours, the last of them again where n is no multiple.
                for first in (0..n).step_by(4) {
                    let first = first.min(n - 4);
                    let mut four = vec![0f32; scores.len() / n * 4];
                    of_part::<_, 4>(&x[first * width..], part, &mut row, &mut four);
                    let rows = scores.chunks_exact_mut(n).zip(four.chunks_exact(4));
                    rows.for_each(|(scores, four)| scores[first..first + 4].copy_from_slice(four));
                }
            }
        });
        scores
    });
    let parts: Vec<Vec<f32>> = parts.collect();
    // From a token's rows side by side to a row's tokens side by side.
    let mut output = vec![0f32; n * tokens];
    output
        .par_chunks_mut(tokens.max(1))
        .enumerate()
        .for_each(|(row, output)| {
            let scores = parts.iter().flat_map(|part| part[row..].iter().step_by(n));
            output.iter_mut().zip(scores).for_each(|(y, x)| *y = *x);
        });
    output
}

/// Scores of a part's tokens, `[tokens, N]`; `row` has room for one of them.
#[inline(always)]
fn of_part<T: Number, const N: usize>(x: &[f32], table: &[T], row: &mut [f32], scores: &mut [f32]) {
    let width = row.len();
    let x: [&[f32]; N] = std::array::from_fn(|row| &x[row * width..][..width]);
    let x_lanes = x.map(|x| x.as_chunks::<LANES>());
    for (token, scores) in table.chunks_exact(width).zip(scores.chunks_exact_mut(N)) {
        let (lanes, rest) = T::widened(token, row).as_chunks::<LANES>();
        let mut sums = [[0f32; LANES]; N];
        for (i, token) in lanes.iter().enumerate() {
            for (sums, (x, _)) in sums.iter_mut().zip(&x_lanes) {
                let x = &x[i];
                for lane in 0..LANES {
                    sums[lane] += x[lane] * token[lane];
                }
            }
        }
        for ((score, sums), (_, x)) in scores.iter_mut().zip(sums).zip(&x_lanes) {
            let rest: f32 = x.iter().zip(rest).map(|(x, token)| x * token).sum();
            *score = cpu::add_lanes(sums) + rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_the_plain_sums_for_every_number_of_rows() {
        // A width with a rest, more tokens than a part, and a part that is not full.
        let (width, tokens) = (70, TOKENS + 300);
        let number = |i: usize, m: usize| ((i * 37 % m) as f32 - m as f32 / 2.0) / m as f32;
        let table: Vec<f32> = (0..tokens * width).map(|i| number(i, 101)).collect();
        for n in 1..=AT_MOST {
            let x: Vec<f32> = (0..n * width).map(|i| number(i, 89)).collect();
            let got = scores(&x, n, &table, width);
            assert_eq!(got.len(), n * tokens);
            for (i, got) in got.iter().enumerate() {
                let (row, token) = (i / tokens, i % tokens);
                let product = |k: usize| f64::from(x[row * width + k] * table[token * width + k]);
                let expected: f64 = (0..width).map(product).sum();
                // 70 products of up to a quarter.
                assert!(
                    (f64::from(*got) - expected).abs() < 1e-5,
                    "{got} {expected}"
                );
            }
        }
    }
}
