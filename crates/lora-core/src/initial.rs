//! Adapters that are made from the weight that they adapt: PiSSA and OLoRA.
//!
//! `γ·A·B` is a part of the weight, and the frozen weight keeps the rest. The layer's output does not change, up to one
//! rounding. If the rest is then quantized, its rounding errors are those of the rest: that of PiSSA has no large
//! singular values, and is quantized with smaller errors than the weight.
//!
//! The trained adapter belongs to the changed weight. [`Factors::for_original_weight`] makes it an adapter of the
//! original one, of twice the rank.

use burn::tensor::{DType, Device, Tensor, TensorData};
use kernels::CounterRng;
use kernels::cpu::{self, Matrix, MatrixMut, Threads};

use crate::svd::Singular;
use crate::{Init, LoraConfig, LoraError};

/// An adapter's factors on the host, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// `[d_in, r]`.
    pub a: Vec<f32>,
    /// `[r, d_out]`.
    pub b: Vec<f32>,
    /// `[d_in, r, d_out]`.
    pub shape: [usize; 3],
}

impl LoraConfig {
    /// Makes the factors from `weight`, `[d_in, d_out]` row-major, and subtracts γ·A·B from it. The numbers are PEFT's
    /// for the same weight (singular vectors up to their sign); `seed` is that of the random start of PiSSA's
    /// iterations.
    ///
    /// `None`, with the weight as it was, for an initialization that does not depend on the weight. The patterns of
    /// `self` do not apply: it is the configuration of one module ([`of_module`](Self::of_module)).
    ///
    /// # Errors
    ///
    /// [`LoraError::RankOfWeight`] if `r` is larger than the weight's sides; [`LoraError::NotDecomposed`] for a weight
    /// with values that are not finite.
    ///
    /// # Panics
    ///
    /// If the length does not fit the shape.
    pub fn take_out_of(
        &self,
        weight: &mut [f32],
        [d_in, d_out]: [usize; 2],
        seed: u64,
    ) -> Result<Option<Factors>, LoraError> {
        if !self.init.changes_weights() {
            return Ok(None);
        }
        if !weight.iter().all(|value| value.is_finite()) {
            return Err(LoraError::NotDecomposed);
        }
        let r = self.r;
        if r > d_in.min(d_out) {
            let largest = d_in.min(d_out);
            return Err(LoraError::RankOfWeight { r, largest });
        }
        let (shape, mut rng) = ([d_in, r, d_out], CounterRng::new(seed));
        let factors = match self.init {
            Init::PissaNiter(iterations) => {
                let (sides, iterations) = ([d_in, d_out], usize::from(iterations));
                let singular = Singular::by_iteration(weight, sides, r, iterations, &mut rng);
                principal(&singular, self.scale(), shape)
            }
            Init::Pissa => {
                let singular = Singular::converged(weight, [d_in, d_out], r, &mut rng);
                principal(&singular, self.scale(), shape)
            }
            _ => orthonormal(weight, shape),
        };
        factors.subtract_from(weight, self.scale());
        Ok(Some(factors))
    }
}

impl Factors {
    /// A and B on a device, in f32 and outside an autodiff graph.
    pub fn on(&self, device: &Device) -> [Tensor<2>; 2] {
        let [d_in, r, d_out] = self.shape;
        let place = |values: &[f32], shape: [usize; 2]| {
            let data = TensorData::new(values.to_vec(), shape);
            Tensor::from_data(data, (device, DType::F32)).without_autodiff()
        };
        [place(&self.a, [d_in, r]), place(&self.b, [r, d_out])]
    }

    /// Subtracts `scale · A·B` from a weight, `[d_in, d_out]` row-major.
    fn subtract_from(&self, weight: &mut [f32], scale: f64) {
        let [d_in, r, d_out] = self.shape;
        let output = MatrixMut::new(weight, d_in, d_out, d_out);
        let a = Matrix::new(&self.a, d_in, r, r);
        let b = Matrix::new(&self.b, r, d_out, d_out);
        cpu::multiply(output, true, -scale as f32, a, b, Threads::All);
    }

    /// The adapter of rank 2r that does to the original weight what these factors do to the weight from which those
    /// of `initial` were subtracted: A and A₀ side by side, B above −B₀. Its γ is the same. PEFT does this in
    /// `subtract_mutated_init`.
    ///
    /// # Panics
    ///
    /// If the shapes differ.
    pub fn for_original_weight(&self, initial: &Self) -> Self {
        assert_eq!(self.shape, initial.shape, "both are of the same module");
        let [d_in, r, d_out] = self.shape;
        let rows = self.a.chunks_exact(r).zip(initial.a.chunks_exact(r));
        let b = self
            .b
            .iter()
            .copied()
            .chain(initial.b.iter().map(|value| -value));
        Self {
            a: rows
                .flat_map(|(a, a0)| a.iter().chain(a0))
                .copied()
                .collect(),
            b: b.collect(),
            shape: [d_in, 2 * r, d_out],
        }
    }
}

/// PiSSA (Meng et al., 2024, <https://arxiv.org/abs/2404.02948>): `A = U·√(s/γ)` and `B = √(s/γ)·Vᵀ` of the largest
/// singular values s.
fn principal(singular: &Singular, scale: f64, shape: [usize; 3]) -> Factors {
    let Singular { u, values, v } = singular;
    let roots: Vec<f32> = values
        .iter()
        .map(|value| (value / scale as f32).sqrt())
        .collect();
    // Row-major with a column per singular value.
    let scaled = |vectors: &[f32]| -> Vec<f32> {
        let values = vectors.iter().enumerate();
        values
            .map(|(index, value)| value * roots[index % roots.len()])
            .collect()
    };
    let [_, r, d_out] = shape;
    Factors {
        a: scaled(u),
        b: cpu::transposed(&scaled(v), [d_out, r]),
        shape,
    }
}

/// OLoRA (Büyükakyüz, 2024, <https://arxiv.org/abs/2406.01775>): with the QR decomposition of the transposed weight,
/// B is the transpose of the first r columns of Q and A that of the first r rows of R.
///
/// Only r columns are decomposed: the rest of R's rows is a product. Their signs are LAPACK's, which PyTorch uses: a
/// reflection makes a column's first element the negative of its sign.
fn orthonormal(weight: &[f32], shape: [usize; 3]) -> Factors {
    let [d_in, r, d_out] = shape;
    // The first r columns of the transposed weight, and the reflections I − τ·v·vᵀ that make them triangular.
    let columns = weight.chunks_exact(d_out).take(r);
    let mut columns: Vec<Vec<f64>> = columns
        .map(|column| column.iter().map(|value| f64::from(*value)).collect())
        .collect();
    let mut reflections: Vec<(Vec<f64>, f64)> = Vec::new();
    for (j, column) in columns.iter_mut().enumerate() {
        for (v, tau) in &reflections {
            reflect(column, v, *tau);
        }
        let below: f64 = column[j + 1..].iter().map(|value| value * value).sum();
        let first = column[j];
        let (mut v, mut tau) = (vec![0.0; d_out], 0.0);
        if below > 0.0 {
            let beta = -(first * first + below).sqrt().copysign(first);
            tau = (beta - first) / beta;
            for (v, value) in v[j + 1..].iter_mut().zip(&column[j + 1..]) {
                *v = value / (first - beta);
            }
        }
        v[j] = 1.0;
        reflections.push((v, tau));
    }
    let mut b = Vec::with_capacity(r * d_out);
    for j in 0..r {
        let mut q = vec![0.0; d_out];
        q[j] = 1.0;
        for (v, tau) in reflections.iter().rev() {
            reflect(&mut q, v, *tau);
        }
        b.extend(q.iter().map(|value| *value as f32));
    }
    let mut a = vec![0.0; d_in * r];
    let output = MatrixMut::new(&mut a, d_in, r, r);
    let left = Matrix::new(weight, d_in, d_out, d_out);
    let right = Matrix::new(&b, r, d_out, d_out).transposed();
    cpu::multiply(output, false, 1.0, left, right, Threads::All);
    // R is triangular.
    for (i, row) in a.chunks_exact_mut(r).enumerate().take(r) {
        row[i + 1..].fill(0.0);
    }
    Factors { a, b, shape }
}

fn reflect(column: &mut [f64], v: &[f64], tau: f64) {
    let along: f64 = column.iter().zip(v).map(|(x, v)| x * v).sum();
    for (x, v) in column.iter_mut().zip(v) {
        *x -= tau * along * v;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: [usize; 2] = [12, 20];

    fn weight() -> Vec<f32> {
        let mut rng = CounterRng::new(5);
        (0..12 * 20).map(|_| rng.normal() as f32).collect()
    }

    fn config(init: Init) -> LoraConfig {
        LoraConfig {
            r: 3,
            lora_alpha: 4.5,
            init,
            ..LoraConfig::default()
        }
    }

    fn product(a: &[f32], b: &[f32], [d_in, r, d_out]: [usize; 3]) -> Vec<f32> {
        let mut product = vec![0.0; d_in * d_out];
        for i in 0..d_in {
            for k in 0..r {
                for j in 0..d_out {
                    product[i * d_out + j] += a[i * r + k] * b[k * d_out + j];
                }
            }
        }
        product
    }

    fn largest(values: impl Iterator<Item = f32>) -> f32 {
        values.fold(0.0, |largest, value| largest.max(value.abs()))
    }

    #[test]
    fn the_rest_and_the_adapter_are_the_weight_and_the_two_parts_are_orthogonal() {
        for init in [Init::Pissa, Init::PissaNiter(60), Init::Olora] {
            let (before, mut rest) = (weight(), weight());
            let factors = config(init)
                .take_out_of(&mut rest, SHAPE, 1)
                .unwrap()
                .unwrap();
            assert_eq!(factors.shape, [12, 3, 20]);
            let part = product(&factors.a, &factors.b, factors.shape);
            let sums = rest.iter().zip(&part).map(|(rest, part)| rest + 1.5 * part);
            assert!(largest(sums.zip(&before).map(|(sum, before)| sum - before)) < 2e-6);
            // Rows of B are orthogonal to the rest of PiSSA: these are other singular vectors.
            let b = Matrix::new(&factors.b, 3, 20, 20);
            let mut along = vec![0.0; 12 * 3];
            let output = MatrixMut::new(&mut along, 12, 3, 3);
            let rest = Matrix::new(&rest, 12, 20, 20);
            cpu::multiply(output, false, 1.0, rest, b.transposed(), Threads::One);
            if init != Init::Olora {
                assert!(largest(along.iter().copied()) < 1e-4, "{init:?} {along:?}");
            }
        }
    }

    #[test]
    fn oloras_b_is_orthonormal_and_its_a_is_triangular() {
        let factors = config(Init::Olora)
            .take_out_of(&mut weight(), SHAPE, 1)
            .unwrap()
            .unwrap();
        let rows: Vec<&[f32]> = factors.b.chunks_exact(20).collect();
        for i in 0..3 {
            for j in 0..3 {
                let dot: f32 = rows[i].iter().zip(rows[j]).map(|(x, y)| x * y).sum();
                assert!((dot - f32::from(u8::from(i == j))).abs() < 1e-6);
            }
            assert!(
                factors.a[i * 3 + i + 1..(i + 1) * 3]
                    .iter()
                    .all(|value| *value == 0.0)
            );
        }
        // Columns that are multiples of unit vectors need no reflection.
        let mut unit = vec![0.0; 12 * 20];
        (0..12).for_each(|i| unit[i * 20 + i] = 2.0);
        let factors = config(Init::Olora)
            .take_out_of(&mut unit, SHAPE, 1)
            .unwrap()
            .unwrap();
        assert_eq!((factors.a[0], factors.b[0]), (2.0, 1.0));
    }

    #[test]
    fn an_adapter_of_the_rest_becomes_one_of_the_original_weight() {
        let (original, mut rest) = (weight(), weight());
        let initial = config(Init::Pissa)
            .take_out_of(&mut rest, SHAPE, 1)
            .unwrap()
            .unwrap();
        let mut trained = initial.clone();
        trained.a.iter_mut().for_each(|value| *value += 0.5);
        trained.b.iter_mut().for_each(|value| *value *= 0.5);
        let converted = trained.for_original_weight(&initial);
        assert_eq!(converted.shape, [12, 6, 20]);
        let merged = |weight: &[f32], factors: &Factors| -> Vec<f32> {
            let part = product(&factors.a, &factors.b, factors.shape);
            weight
                .iter()
                .zip(part)
                .map(|(weight, part)| weight + 1.5 * part)
                .collect()
        };
        let (got, expected) = (merged(&original, &converted), merged(&rest, &trained));
        assert!(largest(got.iter().zip(&expected).map(|(a, b)| a - b)) < 5e-6);
    }

    #[test]
    fn what_cannot_be_decomposed_is_an_error_and_other_initializations_take_nothing() {
        let mut values = weight();
        let mut large = config(Init::Pissa);
        large.r = 13;
        let error = large.take_out_of(&mut values, SHAPE, 1).unwrap_err();
        assert_eq!(error, LoraError::RankOfWeight { r: 13, largest: 12 });
        assert_eq!(
            config(Init::Gaussian).take_out_of(&mut values, SHAPE, 1),
            Ok(None)
        );
        assert_eq!(values, weight());
        values[7] = f32::NAN;
        for init in [Init::Pissa, Init::PissaNiter(2), Init::Olora] {
            let error = config(init).take_out_of(&mut values.clone(), SHAPE, 1);
            assert_eq!(error, Err(LoraError::NotDecomposed));
        }
    }
}
