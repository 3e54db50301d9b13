//! The output layer for a few rows on the CPU, as when a text is written token by token: the table is read
//! once, whatever the number of rows. A general product first rearranges its operands, which costs as much as it
//! is worth only for many rows.

use rayon::prelude::*;

use super::decode::with_rows;
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
        cpu::vectorized(Part {
            x,
            n,
            table: part,
            row: &mut row,
            scores: &mut scores,
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

/// Scores of a part's tokens, `[tokens, n]`; `row` has room for one of them.
struct Part<'a, T> {
    x: &'a [f32],
    n: usize,
    table: &'a [T],
    row: &'a mut [f32],
    scores: &'a mut [f32],
}

impl<T: Number> cpu::Work for Part<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        with_rows!(self.n, [1 2 3 4 5 6 7 | AT_MOST], N => self.scores::<N, FUSED>())
    }
}

impl<T: Number> Part<'_, T> {
    #[inline(always)]
    fn scores<const N: usize, const FUSED: bool>(self) {
        let width = self.row.len();
        assert!(self.x.len() == N * width);
        let whole = width / LANES * LANES;
        let tokens = self.table.chunks_exact(width);
        for (token, scores) in tokens.zip(self.scores.chunks_exact_mut(N)) {
            let token = T::widened(token, self.row);
            let mut sums = [[0f32; LANES]; N];
            for start in (0..whole).step_by(LANES) {
                let mut lanes = [0f32; LANES];
                lanes.copy_from_slice(&token[start..][..LANES]);
                for (n, sums) in sums.iter_mut().enumerate() {
                    let x = &self.x[n * width + start..][..LANES];
                    for lane in 0..LANES {
                        sums[lane] = cpu::multiply_add::<FUSED>(x[lane], lanes[lane], sums[lane]);
                    }
                }
            }
            for (n, (score, sums)) in scores.iter_mut().zip(sums).enumerate() {
                let mut rest = 0.0;
                let x = &self.x[n * width..][..width];
                for (x, token) in x[whole..].iter().zip(&token[whole..]) {
                    rest += x * token;
                }
                *score = cpu::add_lanes(sums) + rest;
            }
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
