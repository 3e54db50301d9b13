//! The best approximation of a sum of low-rank products by fewer ranks, without building the sum.

/// A row-major matrix in double precision.
#[derive(Debug, Clone)]
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self {
            rows,
            columns,
            values: vec![0.0; rows * columns],
        }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    fn column(&self, column: usize) -> impl Iterator<Item = f64> {
        (0..self.rows).map(move |row| self.at(row, column))
    }

    fn dot(&self, i: usize, j: usize) -> f64 {
        self.column(i).zip(self.column(j)).map(|(x, y)| x * y).sum()
    }

    fn times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.rows, other.columns);
        for row in 0..self.rows {
            for inner in 0..self.columns {
                let factor = self.at(row, inner);
                for column in 0..other.columns {
                    product.values[row * other.columns + column] +=
                        factor * other.at(inner, column);
                }
            }
        }
        product
    }

    fn transposed(&self) -> Self {
        let mut transposed = Self::zeros(self.columns, self.rows);
        for row in 0..self.rows {
            for column in 0..self.columns {
                transposed.values[column * self.rows + row] = self.at(row, column);
            }
        }
        transposed
    }

    /// Q with orthonormal columns (zeros where the rank is short) and upper-triangular R, by modified
    /// Gram-Schmidt, twice for orthogonality.
    fn qr(&self) -> (Self, Self) {
        let mut q = self.clone();
        let mut r = Self::zeros(self.columns, self.columns);
        for j in 0..self.columns {
            let before = q.dot(j, j).sqrt();
            for _ in 0..2 {
                for i in 0..j {
                    let along = q.dot(i, j);
                    r.values[i * self.columns + j] += along;
                    for row in 0..self.rows {
                        let part = along * q.at(row, i);
                        q.values[row * self.columns + j] -= part;
                    }
                }
            }
            let norm = q.dot(j, j).sqrt();
            let independent = norm > 1e-12 * before;
            r.values[j * self.columns + j] = if independent { norm } else { 0.0 };
            for row in 0..self.rows {
                let value = &mut q.values[row * self.columns + j];
                *value = if independent { *value / norm } else { 0.0 };
            }
        }
        (q, r)
    }
}

/// Factors `a` `[d_in, rank]` and `b` `[rank, d_out]` of the best approximation of `left · right` with that
/// rank (Eckart and Young), by a singular value decomposition: `b` carries the singular values, as in PEFT.
///
/// `left` is `[d_in, r]`, `right` is `[r, d_out]`, row-major. Both are brought to triangles first, so only an
/// `[r, r]` matrix is decomposed (one-sided Jacobi).
pub(super) fn best_factors(
    left: &[f64],
    right: &[f64],
    [d_in, r, d_out]: [usize; 3],
    rank: usize,
) -> (Vec<f32>, Vec<f32>) {
    let left = Matrix {
        rows: d_in,
        columns: r,
        values: left.to_vec(),
    };
    let right = Matrix {
        rows: r,
        columns: d_out,
        values: right.to_vec(),
    };
    let (q_left, r_left) = left.qr();
    let (q_right, r_right) = right.transposed().qr();
    // left·right = Q_left · (R_left · R_rightᵀ) · Q_rightᵀ
    let (u, singular, v) = jacobi(r_left.times(&r_right.transposed()));
    let mut order: Vec<usize> = (0..r).collect();
    order.sort_by(|i, j| singular[*j].total_cmp(&singular[*i]));
    let (u, v) = (q_left.times(&u), q_right.times(&v));
    let mut a = vec![0.0; d_in * rank];
    let mut b = vec![0.0; rank * d_out];
    for (place, index) in order.into_iter().take(rank).enumerate() {
        for (row, value) in u.column(index).enumerate() {
            a[row * rank + place] = value as f32;
        }
        for (column, value) in v.column(index).enumerate() {
            b[place * d_out + column] = (singular[index] * value) as f32;
        }
    }
    (a, b)
}

/// U, singular values (in no order) and V of a square matrix `M = U·diag(s)·Vᵀ`: columns are rotated in pairs
/// until all are orthogonal (Hestenes, 1958).
fn jacobi(mut m: Matrix) -> (Matrix, Vec<f64>, Matrix) {
    let n = m.columns;
    let mut v = Matrix::zeros(n, n);
    for i in 0..n {
        v.values[i * n + i] = 1.0;
    }
    // It converges quadratically: a dozen rounds are enough for any size.
    for _ in 0..40 {
        let mut turned = false;
        for i in 0..n {
            for j in i + 1..n {
                let (alpha, beta, gamma) = (m.dot(i, i), m.dot(j, j), m.dot(i, j));
                if gamma.abs() <= 1e-14 * (alpha * beta).sqrt() || gamma == 0.0 {
                    continue;
                }
                turned = true;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                let s = c * t;
                for matrix in [&mut m, &mut v] {
                    for row in 0..n {
                        let (x, y) = (matrix.at(row, i), matrix.at(row, j));
                        matrix.values[row * n + i] = c * x - s * y;
                        matrix.values[row * n + j] = s * x + c * y;
                    }
                }
            }
        }
        if !turned {
            break;
        }
    }
    let singular: Vec<f64> = (0..n).map(|column| m.dot(column, column).sqrt()).collect();
    for (column, singular) in singular.iter().enumerate() {
        for row in 0..n {
            let value = &mut m.values[row * n + column];
            *value = if *singular > 0.0 {
                *value / singular
            } else {
                0.0
            };
        }
    }
    (m, singular, v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::CounterRng;

    fn random(count: usize, seed: u64) -> Vec<f64> {
        let mut rng = CounterRng::new(seed);
        (0..count).map(|_| rng.normal()).collect()
    }

    fn product(a: &[f64], b: &[f64], [rows, inner, columns]: [usize; 3]) -> Vec<f64> {
        let left = Matrix {
            rows,
            columns: inner,
            values: a.to_vec(),
        };
        let right = Matrix {
            rows: inner,
            columns,
            values: b.to_vec(),
        };
        left.times(&right).values
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).powi(2))
            .sum::<f64>()
            .sqrt()
    }

    #[test]
    fn with_all_ranks_the_product_comes_back_and_with_fewer_the_rest_is_the_small_singular_values()
    {
        let shape @ [d_in, r, d_out] = [9, 5, 7];
        let (left, right) = (random(d_in * r, 1), random(r * d_out, 2));
        let whole = product(&left, &right, shape);
        let widen = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
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
        let widen = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        let got = product(&widen(a), &widen(b), [d_in, 2, d_out]);
        assert!(distance(&got, &product(&left, &right, shape)) < 1e-5);
        let (a, b) = best_factors(&[0.0; 12], &right, shape, 3);
        assert!(a.iter().chain(&b).all(|value| value.is_finite()));
    }
}
