//! What the products of a few rows have in common, as when text is generated token by token: the weight is read once,
//! each thread takes columns of it, and the number of rows is a constant of the innermost loop.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

/// Columns that a thread takes at least.
const COLUMNS: usize = 64;

/// A thread's columns are a multiple of this, except the last ones.
const MULTIPLE: usize = 32;

thread_local! {
    static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Adds what `work` computes to `output`, `[n, d_out]`. `work` gets a range of columns and zeros of their shape,
/// `[n, columns]`.
pub fn add_by_columns(
    output: &mut [f32],
    n: usize,
    work: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    let d_out = output.len() / n.max(1);
    let columns = d_out.div_ceil(rayon::current_num_threads()).max(COLUMNS);
    let columns = columns.next_multiple_of(MULTIPLE);
    let parts: Vec<Range<usize>> = (0..d_out)
        .step_by(columns)
        .map(|first| first..(first + columns).min(d_out))
        .collect();
    // Each thread adds up its columns of all rows in memory of its own: rows of the output lie apart.
    let sums = parts.into_par_iter().map(|part| {
        SUMS.with_borrow_mut(|sums| {
            sums.clear();
            sums.resize(n * part.len(), 0.0);
            work(part.clone(), sums);
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

/// Evaluates an expression with a number of rows as the constant `$rows`: one of those listed, of which the last stands
/// for all others.
macro_rules! with_rows {
    ($n:expr, [$($few:literal)* | $most:expr], $rows:ident => $body:expr) => {
        match $n {
            $($few => {
                const $rows: usize = $few;
                $body
            })*
            _ => {
                const $rows: usize = $most;
                $body
            }
        }
    };
}
pub(super) use with_rows;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_of_every_row_is_added_once() {
        for d_out in [1, 31, 64, 300, 1000] {
            let mut output: Vec<f32> = (0..3 * d_out).map(|i| i as f32).collect();
            add_by_columns(&mut output, 3, |part, sums| {
                for (row, sums) in sums.chunks_exact_mut(part.len()).enumerate() {
                    for (sum, column) in sums.iter_mut().zip(part.clone()) {
                        *sum += (1000 * row + column) as f32;
                    }
                }
            });
            for (i, got) in output.iter().enumerate() {
                assert_eq!(*got, (i + 1000 * (i / d_out) + i % d_out) as f32);
            }
        }
    }

    #[test]
    fn the_last_number_of_rows_stands_for_the_rest() {
        let rows = |n: usize| with_rows!(n, [1 2 | 8], N => N);
        assert_eq!([1, 2, 3, 8].map(rows), [1, 2, 8, 8]);
    }
}
