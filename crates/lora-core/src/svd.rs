//! Decompositions of matrices on the host: the largest singular values, and the best approximation by a lower rank.

use burn::tensor::{DType, Device, Tensor, TensorData};
use kernels::CounterRng;
use kernels::cpu::{self, MatrixMut, Threads};

/// The largest singular values of a matrix with their vectors: `matrix ≈ U·diag(s)·Vᵀ`.
pub(crate) struct Singular {
    /// U `[rows, rank]`, row-major: orthonormal columns.
    pub(crate) u: Vec<f32>,
    /// The singular values, from the largest on.
    pub(crate) values: Vec<f32>,
    /// V `[columns, rank]`, row-major: orthonormal columns.
    pub(crate) v: Vec<f32>,
}

/// The smaller side up to which a matrix is decomposed as a whole. That takes a second.
const SMALL: usize = 256;

/// Iterations after which [`Singular::converged`] stops in any case.
const MOST_ITERATIONS: usize = 500;

impl Singular {
    /// The largest `rank` singular values of a finite row-major matrix, as exactly as f32 products allow.
    ///
    /// A large matrix is not decomposed as a whole: the subspace of its largest singular values is iterated, with more
    /// dimensions than are needed, until no more iterations improve it.
    ///
    /// # Panics
    ///
    /// If the length does not fit the shape, or `rank` is larger than a side.
    pub(crate) fn converged(
        matrix: &[f32],
        [rows, columns]: [usize; 2],
        rank: usize,
        rng: &mut CounterRng,
    ) -> Self {
        let wide = 2 * rank + 32;
        if rows.min(columns) <= SMALL.max(wide) {
            let matrix = Matrix {
                rows,
                columns,
                values: matrix.iter().map(|value| f64::from(*value)).collect(),
            };
            // The decomposition wants at least as many rows as columns.
            let (u, values, v) = if rows < columns {
                let (v, values, u) = small(&matrix.transposed(), rank);
                (u, values, v)
            } else {
                small(&matrix, rank)
            };
            return Self {
                u: narrow(&u.values),
                values: narrow(&values),
                v: narrow(&v.values),
            };
        }
        let mut space = Subspace::random(matrix, [rows, columns], wide, rng);
        let (mut best, mut since) = (f64::INFINITY, 0);
        for _ in 0..MOST_ITERATIONS {
            space.iterate();
            let (found, rest) = space.singular(rank);
            // Once rounding is all that is left, the rest stops shrinking.
            since = if rest < 0.9 * best { 0 } else { since + 1 };
            best = best.min(rest);
            if since == 4 {
                return found;
            }
        }
        space.singular(rank).0
    }

    /// As [`converged`](Self::converged) with this number of iterations and no further dimensions (Halko, Martinsson
    /// and Tropp, 2011, <https://arxiv.org/abs/0909.4061>, algorithm 5.1): what PyTorch's `svd_lowrank` does, which
    /// PEFT uses. The start is another: PyTorch's random numbers are not these.
    pub(crate) fn by_iteration(
        matrix: &[f32],
        shape: [usize; 2],
        rank: usize,
        iterations: usize,
        rng: &mut CounterRng,
    ) -> Self {
        let mut space = Subspace::random(matrix, shape, rank, rng);
        for _ in 0..iterations {
            space.iterate();
        }
        space.singular(rank).0
    }
}

/// A subspace of the columns of a matrix.
struct Subspace<'a> {
    matrix: cpu::Matrix<'a>,
    /// `[rows, columns]`, of which `rows` is not the smaller.
    shape: [usize; 2],
    /// Whether `matrix` is the transposed one.
    is_transposed: bool,
    /// An orthonormal basis, `[rows, width]`.
    basis: Matrix,
}

impl<'a> Subspace<'a> {
    /// The image of a random subspace.
    fn random(
        matrix: &'a [f32],
        [rows, columns]: [usize; 2],
        width: usize,
        rng: &mut CounterRng,
    ) -> Self {
        let is_transposed = rows < columns;
        let whole = cpu::Matrix::new(matrix, rows, columns, columns);
        let (matrix, shape) = if is_transposed {
            (whole.transposed(), [columns, rows])
        } else {
            (whole, [rows, columns])
        };
        let start = (0..shape[1] * width).map(|_| rng.normal());
        let start = Matrix {
            rows: shape[1],
            columns: width,
            values: start.collect(),
        };
        let mut space = Self {
            matrix,
            shape,
            is_transposed,
            basis: start,
        };
        space.basis = space.image(false).orthonormal();
        space
    }

    /// The matrix, or its transpose, times the basis.
    fn image(&self, transposed: bool) -> Matrix {
        let [rows, columns] = self.shape;
        let (rows, matrix) = if transposed {
            (columns, self.matrix.transposed())
        } else {
            (rows, self.matrix)
        };
        let (width, basis) = (self.basis.columns, narrow(&self.basis.values));
        let mut image = vec![0.0; rows * width];
        let output = MatrixMut::new(&mut image, rows, width, width);
        let basis = cpu::Matrix::new(&basis, self.basis.rows, width, width);
        cpu::multiply(output, false, 1.0, matrix, basis, Threads::All);
        Matrix {
            rows,
            columns: width,
            values: image.iter().map(|value| f64::from(*value)).collect(),
        }
    }

    /// Turns the subspace towards the largest singular values.
    fn iterate(&mut self) {
        self.basis = self.image(true).orthonormal();
        self.basis = self.image(false).orthonormal();
    }

    /// The largest singular values within the subspace. Also returns how far the vectors are from those of the matrix:
    /// the norm of `matrix·V − U·diag(s)` relative to the largest singular value.
    fn singular(&self, rank: usize) -> (Singular, f64) {
        // Qᵀ·M = Rᵀ·Pᵀ with orthonormal P.
        let (p, r) = self.image(true).qr();
        let (u, values, v) = small(&r.transposed(), rank);
        let (u, v) = (self.basis.times(&u), p.times(&v));
        let behind = Self {
            basis: v.clone(),
            ..*self
        };
        let image = behind.image(false);
        let mut rest = 0.0;
        for (row, image) in image.values.chunks_exact(rank).enumerate() {
            for (k, image) in image.iter().enumerate() {
                rest += (image - u.at(row, k) * values[k]).powi(2);
            }
        }
        let rest = rest.sqrt()
            / values
                .first()
                .copied()
                .unwrap_or(0.0)
                .max(f64::MIN_POSITIVE);
        let [u, v] = [u, v].map(|vectors| narrow(&vectors.values));
        let (u, v) = if self.is_transposed { (v, u) } else { (u, v) };
        let values = narrow(&values);
        (Singular { u, values, v }, rest)
    }
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

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

    /// The orthonormal columns of [`qr`](Self::qr).
    fn orthonormal(&self) -> Self {
        self.qr().0
    }

    /// Q with orthonormal columns and upper-triangular R. A column that depends on earlier ones is zero
    /// in Q. Modified Gram-Schmidt, twice for orthogonality.
    ///
    /// `burn_linalg::qr` starts from an identity of `[rows, rows]`, which is gigabytes for a large layer.
    fn qr(&self) -> (Self, Self) {
        let mut q: Vec<Vec<f64>> = Vec::with_capacity(self.columns);
        let mut r = Self::zeros(self.columns, self.columns);
        for j in 0..self.columns {
            let mut column: Vec<f64> = self.column(j).collect();
            let before = dot(&column, &column).sqrt();
            for _ in 0..2 {
                for (i, earlier) in q.iter().enumerate() {
                    let along = dot(earlier, &column);
                    r.values[i * self.columns + j] += along;
                    for (value, earlier) in column.iter_mut().zip(earlier) {
                        *value -= along * earlier;
                    }
                }
            }
            let norm = dot(&column, &column).sqrt();
            let independent = norm > 1e-12 * before;
            r.values[j * self.columns + j] = if independent { norm } else { 0.0 };
            let by = if independent { 1.0 / norm } else { 0.0 };
            column.iter_mut().for_each(|value| *value *= by);
            q.push(column);
        }
        let mut by_row = Self::zeros(self.rows, self.columns);
        for (row, values) in by_row.values.chunks_exact_mut(self.columns).enumerate() {
            for (value, column) in values.iter_mut().zip(&q) {
                *value = column[row];
            }
        }
        (by_row, r)
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Factors `a` `[d_in, rank]` and `b` `[rank, d_out]` of the best approximation of `left · right` with that
/// rank (Eckart and Young), by a singular value decomposition. `b` carries the singular values, as in PEFT.
///
/// `left` is `[d_in, r]`, `right` is `[r, d_out]`, row-major. Both are reduced to triangular matrices first,
/// so that only an `[r, r]` matrix is decomposed. Factors that are not finite give factors of NaN.
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
    let (u, values, v) = small(matrix, rank);
    let mut vt = v.transposed();
    for (row, value) in vt.values.chunks_exact_mut(matrix.columns).zip(values) {
        row.iter_mut().for_each(|element| *element *= value);
    }
    [u, vt]
}

/// U `[rows, rank]`, the largest singular values, and V `[columns, rank]`. The time grows with the third power of the
/// matrix's sides.
fn small(matrix: &Matrix, rank: usize) -> (Matrix, Vec<f64>, Matrix) {
    /// Sweeps per singular value, of which LAPACK's algorithm needs two or three. It panics beyond.
    const SWEEPS: usize = 100;
    let shape = [matrix.rows, matrix.columns];
    let data = TensorData::new(matrix.values.clone(), shape);
    let tensor = Tensor::<2>::from_data(data, (&Device::flex(), DType::F64));
    let (u, values, vt) = burn_linalg::svd::<2, 1>(tensor, SWEEPS);
    let read = |tensor: Tensor<2>| {
        let [rows, columns] = tensor.dims();
        let values = tensor.into_data().try_to_vec();
        Matrix {
            rows,
            columns,
            values: values.expect("the CPU returns its f64 values"),
        }
    };
    let values = values.narrow(0, 0, rank).into_data().try_to_vec();
    (
        read(u.narrow(1, 0, rank)),
        values.expect("the CPU returns its f64 values"),
        read(vt.narrow(0, 0, rank).transpose()),
    )
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
    }

    #[test]
    fn the_iteration_finds_the_largest_singular_values_of_wide_and_tall_matrices() {
        for [rows, columns] in [[40, 24], [24, 40], [300, 280]] {
            // Singular values that quarter from one to the next.
            let left = random(rows * 6, 1);
            let right = random(6 * columns, 2);
            let left = left.iter().enumerate();
            let scaled = left.map(|(index, value)| value * 0.25f64.powi((index % 6) as i32));
            let matrix = product(&scaled.collect::<Vec<_>>(), &right, [rows, 6, columns]);
            let matrix = narrow(&matrix);
            let mut rng = CounterRng::new(3);
            let exact = Singular::converged(&matrix, [rows, columns], 2, &mut rng);
            let near = Singular::by_iteration(&matrix, [rows, columns], 2, 8, &mut rng);
            for (exact, near) in exact.values.iter().zip(&near.values) {
                // The third value is about a quarter of the second: 8 iterations leave 4^-32 of it.
                assert!((exact - near).abs() < 1e-5 * exact, "{exact} {near}");
            }
            let [exact, near] = [&exact, &near].map(|found| part(found, [rows, columns]));
            let size = distance(&exact, &vec![0.0; exact.len()]);
            assert!(distance(&exact, &near) < 1e-5 * size);
        }
    }

    #[test]
    fn a_large_matrix_without_gaps_is_decomposed_as_exactly_as_a_small_one() {
        // Wider than what is decomposed as a whole, with singular values close to each other.
        let [rows, columns, rank] = [400, 300, 4];
        let matrix = narrow(&random(rows * columns, 7));
        let mut rng = CounterRng::new(8);
        let found = Singular::converged(&matrix, [rows, columns], rank, &mut rng);
        let whole = Matrix {
            rows,
            columns,
            values: matrix.iter().map(|value| f64::from(*value)).collect(),
        };
        let (u, values, v) = small(&whole, rank);
        let expected = Singular {
            u: narrow(&u.values),
            values: narrow(&values),
            v: narrow(&v.values),
        };
        for (found, expected) in found.values.iter().zip(&expected.values) {
            assert!(
                (found - expected).abs() < 1e-5 * expected,
                "{found} {expected}"
            );
        }
        let [found, expected] = [&found, &expected].map(|found| part(found, [rows, columns]));
        let size = distance(&expected, &vec![0.0; expected.len()]);
        // f32 products, 1e-6, over a distance of singular values of a percent.
        let difference = distance(&found, &expected) / size;
        assert!(difference < 1e-3, "{difference}");
    }

    /// U·diag(s)·Vᵀ of two or more singular values.
    fn part(found: &Singular, [rows, columns]: [usize; 2]) -> Vec<f64> {
        let rank = found.values.len();
        let mut part = vec![0.0; rows * columns];
        for row in 0..rows {
            for column in 0..columns {
                let terms = (0..rank).map(|k| {
                    let vectors = found.u[row * rank + k] * found.v[column * rank + k];
                    f64::from(vectors * found.values[k])
                });
                part[row * columns + column] = terms.sum();
            }
        }
        part
    }
}
