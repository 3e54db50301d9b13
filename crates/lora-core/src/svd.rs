//! Decompositions of matrices on the host, by `faer`: singular values, and the best approximation by a lower rank.

use faer::{Mat, MatRef};

use kernels::CounterRng;

/// The largest singular values of a matrix with their vectors: `matrix ≈ U·diag(s)·Vᵀ`.
pub(crate) struct Singular {
    /// U `[rows, rank]`: orthonormal columns.
    pub(crate) u: Mat<f32>,
    /// The singular values, from the largest on.
    pub(crate) values: Vec<f32>,
    /// V `[columns, rank]`: orthonormal columns.
    pub(crate) v: Mat<f32>,
}

impl Singular {
    /// The largest `rank` singular values. `None` if the iteration does not converge, as with values that are not
    /// finite.
    pub(crate) fn exact(matrix: MatRef<'_, f32>, rank: usize) -> Option<Self> {
        let all = matrix.thin_svd().ok()?;
        let values = all.S().column_vector().iter().take(rank);
        Some(Self {
            u: all.U().get(.., ..rank).to_owned(),
            values: values.copied().collect(),
            v: all.V().get(.., ..rank).to_owned(),
        })
    }

    /// As [`exact`](Self::exact), approximately and much faster: the subspace of a random start after some iterations
    /// (Halko, Martinsson and Tropp, 2011, <https://arxiv.org/abs/0909.4061>, algorithm 5.1), as PyTorch's
    /// `svd_lowrank`, which PEFT uses. The start is another: PyTorch's random numbers are not these.
    pub(crate) fn by_iteration(
        matrix: MatRef<'_, f32>,
        rank: usize,
        iterations: usize,
        rng: &mut CounterRng,
    ) -> Option<Self> {
        if matrix.nrows() < matrix.ncols() {
            let Self { u, values, v } =
                Self::by_iteration(matrix.transpose(), rank, iterations, rng)?;
            return Some(Self { u: v, values, v: u });
        }
        let start = Mat::from_fn(matrix.ncols(), rank, |_, _| rng.normal() as f32);
        let basis = |matrix: Mat<f32>| matrix.qr().compute_thin_Q();
        let mut q = basis(matrix * start);
        for _ in 0..iterations {
            q = basis(matrix.transpose() * q);
            q = basis(matrix * q);
        }
        let small = Self::exact((q.transpose() * matrix).as_ref(), rank)?;
        Some(Self {
            u: q * small.u,
            ..small
        })
    }
}

/// Factors `a` `[d_in, rank]` and `b` `[rank, d_out]` of the best approximation of `left · right` with that rank
/// (Eckart and Young), by a singular value decomposition. `b` carries the singular values, as in PEFT.
///
/// `left` is `[d_in, r]`, `right` is `[r, d_out]`, row-major. Both are reduced to triangular matrices first, so that
/// only an `[r, r]` matrix is decomposed. Factors that are not finite give factors of NaN.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn best_factors(
    left: &[f64],
    right: &[f64],
    [d_in, r, d_out]: [usize; 3],
    rank: usize,
) -> (Vec<f32>, Vec<f32>) {
    let nothing = || (vec![f32::NAN; d_in * rank], vec![f32::NAN; rank * d_out]);
    if !left.iter().chain(right).all(|value| value.is_finite()) {
        return nothing();
    }
    let left = MatRef::from_row_major_slice(left, d_in, r).qr();
    let right = MatRef::from_row_major_slice(right, r, d_out);
    let right = right.transpose().qr();
    // left·right = Q_left · (R_left · R_rightᵀ) · Q_rightᵀ
    let small = left.thin_R() * right.thin_R().transpose();
    let Ok(small) = small.thin_svd() else {
        return nothing();
    };
    let singular = small.S().column_vector();
    // A side of the matrix can be smaller than the rank.
    let column = |vectors: MatRef<'_, f64>, i, j| {
        if j < vectors.ncols() {
            vectors[(i, j)]
        } else {
            0.0
        }
    };
    let u = Mat::from_fn(small.U().nrows(), rank, |i, j| column(small.U(), i, j));
    let v = Mat::from_fn(small.V().nrows(), rank, |i, j| {
        if j < singular.nrows() {
            column(small.V(), i, j) * singular[j]
        } else {
            0.0
        }
    });
    let a = left.compute_thin_Q() * u;
    let b = right.compute_thin_Q() * v;
    (row_major(a.as_ref()), row_major(b.transpose()))
}

/// The elements row by row, in f32.
pub(crate) fn row_major<T: Copy + Into<f64>>(matrix: MatRef<'_, T>) -> Vec<f32> {
    let mut values = Vec::with_capacity(matrix.nrows() * matrix.ncols());
    for row in 0..matrix.nrows() {
        for column in 0..matrix.ncols() {
            let value: f64 = matrix[(row, column)].into();
            values.push(value as f32);
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(count: usize, seed: u64) -> Vec<f64> {
        let mut rng = CounterRng::new(seed);
        (0..count).map(|_| rng.normal()).collect()
    }

    fn product(a: &[f64], b: &[f64], [rows, inner, columns]: [usize; 3]) -> Vec<f64> {
        let mut product = vec![0.0; rows * columns];
        for row in 0..rows {
            for k in 0..inner {
                for column in 0..columns {
                    product[row * columns + column] += a[row * inner + k] * b[k * columns + column];
                }
            }
        }
        product
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        let squares = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
        squares.sum::<f64>().sqrt()
    }

    fn widen(values: Vec<f32>) -> Vec<f64> {
        values.into_iter().map(f64::from).collect()
    }

    #[test]
    fn with_all_ranks_the_product_comes_back_and_with_fewer_the_rest_is_the_small_singular_values()
    {
        let shape @ [d_in, r, d_out] = [9, 5, 7];
        let (left, right) = (random(d_in * r, 1), random(r * d_out, 2));
        let whole = product(&left, &right, shape);
        let mut before = 0.0;
        for rank in (1..=r).rev() {
            let (a, b) = best_factors(&left, &right, shape, rank);
            let (a, b) = (widen(a), widen(b));
            let rest = distance(&product(&a, &b, [d_in, rank, d_out]), &whole);
            if rank == r {
                // The factors are rounded to f32.
                assert!(rest < 1e-5, "{rest}")
            } else {
                // One singular value more is left out: that of the last row of b.
                let (_, more) = best_factors(&left, &right, shape, rank + 1);
                let last = widen(more[rank * d_out..].to_vec());
                let singular = distance(&last, &vec![0.0; d_out]);
                let expected = (before * before + singular * singular).sqrt();
                assert!((rest - expected).abs() < 1e-4, "{rest} {expected}");
            }
            before = rest;
        }
    }

    #[test]
    fn products_of_lower_rank_and_zeros_are_no_trouble() {
        let shape @ [d_in, r, d_out] = [4, 3, 5];
        let mut left = random(d_in * r, 3);
        // The third column is the first.
        for row in 0..d_in {
            left[row * r + 2] = left[row * r];
        }
        let right = random(r * d_out, 4);
        let (a, b) = best_factors(&left, &right, shape, 2);
        let got = product(&widen(a), &widen(b), [d_in, 2, d_out]);
        assert!(distance(&got, &product(&left, &right, shape)) < 1e-5);
        let (a, b) = best_factors(&[0.0; 12], &right, shape, 3);
        assert!(a.iter().chain(&b).all(|value| value.is_finite()));
        // More ranks than an input has.
        let (a, b) = best_factors(&random(8, 5), &random(20, 6), [2, 4, 5], 4);
        let got = product(&widen(a), &widen(b), [2, 4, 5]);
        let whole = product(&random(8, 5), &random(20, 6), [2, 4, 5]);
        assert!(distance(&got, &whole) < 1e-5);
    }

    #[test]
    fn the_iteration_finds_the_largest_singular_values_of_wide_and_tall_matrices() {
        for [rows, columns] in [[40, 24], [24, 40]] {
            // Singular values that halve from one to the next.
            let left = random(rows * 6, 1);
            let right = random(6 * columns, 2);
            let scaled: Vec<f64> = left
                .iter()
                .enumerate()
                .map(|(index, value)| value * 0.25f64.powi((index % 6) as i32))
                .collect();
            let matrix = product(&scaled, &right, [rows, 6, columns]);
            let matrix: Vec<f32> = matrix.iter().map(|value| *value as f32).collect();
            let matrix = MatRef::from_row_major_slice(&matrix, rows, columns);
            let exact = Singular::exact(matrix, 2).unwrap();
            let mut rng = CounterRng::new(3);
            let near = Singular::by_iteration(matrix, 2, 8, &mut rng).unwrap();
            for (exact, near) in exact.values.iter().zip(&near.values) {
                // The third value is a quarter of the second: 8 iterations leave 4^-32 of it.
                assert!((exact - near).abs() < 1e-5 * exact, "{exact} {near}");
            }
            let [exact, near] = [&exact, &near].map(|found| {
                let scaled = Mat::from_fn(rows, 2, |i, j| found.u[(i, j)] * found.values[j]);
                scaled * found.v.transpose()
            });
            assert!((&exact - near).norm_max() < 1e-5 * exact.norm_max());
        }
    }
}
