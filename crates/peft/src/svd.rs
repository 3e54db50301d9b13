//! The best approximation of a sum of low-rank products by a lower rank, without building the sum.

use burn::tensor::{DType, Device, Tensor, TensorData};

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

    /// Q with orthonormal columns and upper-triangular R. A column that depends on earlier ones is zero
    /// in Q. Modified Gram-Schmidt, twice for orthogonality.
    ///
    /// `burn_linalg::qr` starts from an identity of `[rows, rows]`, which is gigabytes for a large layer.
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
/// rank (Eckart and Young), by a singular value decomposition. `b` carries the singular values, as in PEFT.
///
/// `left` is `[d_in, r]`, `right` is `[r, d_out]`, row-major. Both are reduced to triangular matrices first,
/// so that only an `[r, r]` matrix is decomposed. Factors that are not finite give factors of NaN, which are
/// never written ([`AdapterError::NotFinite`](crate::AdapterError)).
pub(super) fn best_factors(
    left: &[f64],
    right: &[f64],
    [d_in, r, d_out]: [usize; 3],
    rank: usize,
) -> (Vec<f32>, Vec<f32>) {
    if !left.iter().chain(right).all(|value| value.is_finite()) {
        return (vec![f32::NAN; d_in * rank], vec![f32::NAN; rank * d_out]);
    }
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
    let [u, b] = decomposed(&r_left.times(&r_right.transposed()), rank);
    let a = q_left.times(&u);
    let b = b.times(&q_right.transposed());
    let narrow = |matrix: Matrix| matrix.values.iter().map(|value| *value as f32).collect();
    (narrow(a), narrow(b))
}

/// U `[r, rank]` and diag(s)·Vᵀ `[rank, r]` of a square matrix, for its largest singular values.
fn decomposed(matrix: &Matrix, rank: usize) -> [Matrix; 2] {
    /// Sweeps per singular value, of which LAPACK's algorithm needs two or three. It panics beyond.
    const SWEEPS: usize = 100;
    let shape = [matrix.rows, matrix.columns];
    let data = TensorData::new(matrix.values.clone(), shape);
    let tensor = Tensor::<2>::from_data(data, (&Device::flex(), DType::F64));
    let (u, singular, vt) = burn_linalg::svd::<2, 1>(tensor, SWEEPS);
    let vt = vt * singular.unsqueeze_dim(1);
    [u.narrow(1, 0, rank), vt.narrow(0, 0, rank)].map(|tensor| {
        let [rows, columns] = tensor.dims();
        let values = tensor.into_data().try_to_vec();
        Matrix {
            rows,
            columns,
            values: values.expect("the CPU returns its f64 values"),
        }
    })
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
