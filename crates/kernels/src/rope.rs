//! Rotary position embeddings (Su et al., 2021, <https://arxiv.org/abs/2104.09864>) as Hugging Face's Llama applies
//! them: halves of a head are rotated, not interleaved pairs as in `burn::nn::RotaryEncoding`.

use burn::tensor::{Int, Tensor};

use crate::dispatch::of;
use crate::spoil::spoilt;
use crate::uploads::{Floats, Ints, Uploaded, Uploads};

/// The cosines and sines of a batch's tokens, on the device.
#[derive(Debug, Clone)]
pub struct RotaryTables {
    /// `[n, head_dim / 2]`, f32.
    pub(crate) cos: Tensor<2>,
    pub(crate) sin: Tensor<2>,
    /// For the composition, which rotates whole heads in one operation.
    pub(crate) whole: Option<WholeHeads>,
}

#[derive(Debug, Clone)]
pub(crate) struct WholeHeads {
    /// `[n, 1, head_dim]`: the cosines twice.
    pub(crate) cos: Tensor<3>,
    /// The sines, negative in the first half.
    pub(crate) sin: Tensor<3>,
    /// The indices of a head's dimensions in order, and with the halves exchanged, `[head_dim]` each.
    pub(crate) straight: Tensor<1, Int>,
    pub(crate) exchanged: Tensor<1, Int>,
}

/// Rotary tables that are about to be copied to the device.
#[derive(Debug)]
pub struct PlannedRotary {
    cos: Floats,
    sin: Floats,
    straight: Ints,
    exchanged: Ints,
    shape: [usize; 2],
}

impl PlannedRotary {
    /// Adds tables of `[n, head_dim / 2]` values each, row-major, to what is copied.
    pub fn new(cos: Vec<f32>, sin: Vec<f32>, half: usize, uploads: &mut Uploads) -> Self {
        let tokens = cos.len() / half.max(1);
        Self {
            cos: uploads.floats(cos),
            sin: uploads.floats(sin),
            straight: uploads.ints((0..2 * half).map(|place| place as i32)),
            exchanged: uploads.ints((half..2 * half).chain(0..half).map(|place| place as i32)),
            shape: [tokens, half],
        }
    }

    /// The tables where everything was copied to.
    pub fn on_device(self, uploaded: &Uploaded) -> RotaryTables {
        let table = |at: &Floats| uploaded.floats(at, self.shape);
        let (cos, sin) = (table(&self.cos), table(&self.sin));
        let whole = (!of(&cos).rotates_halves()).then(|| {
            let indices = [&self.straight, &self.exchanged].map(|at| uploaded.ints(at));
            WholeHeads::new(&cos, &sin, indices)
        });
        RotaryTables { cos, sin, whole }
    }
}

impl WholeHeads {
    fn new(cos: &Tensor<2>, sin: &Tensor<2>, indices: [Tensor<1, Int>; 2]) -> Self {
        let [straight, exchanged] = indices;
        Self {
            cos: Tensor::cat(vec![cos.clone(), cos.clone()], 1).unsqueeze_dim(1),
            sin: Tensor::cat(vec![sin.clone().neg(), sin.clone()], 1).unsqueeze_dim(1),
            straight,
            exchanged,
        }
    }
}

/// The direction of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// As in the forward pass.
    Forward,
    /// The transposed rotation, which a gradient needs. An attention factor scales in both directions.
    Inverse,
}

/// Rotates every head of `x` by its row's angles: `(x₁, x₂) → (x₁·cos − x₂·sin, x₂·cos + x₁·sin)`, where x₁ and x₂ are
/// the halves of a head, then multiplies by `scale` ([`query_scale`](crate::query_scale) for queries). Computed in f32
/// and returned in the type of `x`, in its memory if it is not shared.
///
/// # Shapes
///
/// - `x`, output: `[n, heads · head_dim]`
pub fn rotate(x: Tensor<2>, tables: &RotaryTables, rotation: Rotation, scale: f64) -> Tensor<2> {
    let operation = match rotation {
        Rotation::Forward => "rope",
        Rotation::Inverse => "rope_backward",
    };
    spoilt(operation, of(&x).rotate(x, tables, rotation, scale))
}

/// As [`rotate`] forward, in the autodiff graph of `x`.
///
/// # Shapes
///
/// - `x`, output: `[n, heads, head_dim]`
pub fn rotate_in_graph(x: Tensor<3>, tables: &RotaryTables) -> Tensor<3> {
    let half = tables.cos.dims()[1];
    let table = |table: &Tensor<2>| {
        let table = table.clone().cast(x.dtype()).unsqueeze_dim::<3>(1);
        if x.is_autodiff() {
            table.autodiff()
        } else {
            table
        }
    };
    let (cos, sin) = (table(&tables.cos), table(&tables.sin));
    let first = x.clone().narrow(2, 0, half);
    let second = x.narrow(2, half, half);
    Tensor::cat(
        vec![
            first.clone() * cos.clone() - second.clone() * sin.clone(),
            second * cos + first * sin,
        ],
        2,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData, Tolerance};

    /// Tables of these positions for heads of four dimensions, as the CPU's kernel or as the composition needs them.
    fn tables(positions: &[u32], whole: bool) -> RotaryTables {
        let device = Device::flex();
        let angles = positions
            .iter()
            .flat_map(|position| [1.0f32, 0.1].map(|f| f64::from(*position as f32 * f)));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .unzip();
        let table = |v| Tensor::<2>::from_data(TensorData::new(v, [positions.len(), 2]), &device);
        let (cos, sin) = (table(cos), table(sin));
        let indices = [[0, 1, 2, 3], [2, 3, 0, 1]].map(|i| Tensor::from_data(i, &device));
        let whole = whole.then(|| WholeHeads::new(&cos, &sin, indices));
        RotaryTables { cos, sin, whole }
    }

    #[test]
    fn rotation_keeps_lengths_and_depends_on_relative_position_only() {
        let at = |values: [f32; 4], position: u32| {
            let data = TensorData::new(values.to_vec(), [1, 1, 4]);
            let x = Tensor::<3>::from_data(data, &Device::flex());
            let rotated = rotate_in_graph(x, &tables(&[position], false)).into_data();
            rotated.try_to_vec::<f32>().unwrap()
        };
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let (q, k) = ([0.3, -1.2, 0.7, 2.0], [1.0, 0.5, -0.4, 0.9]);
        assert!((dot(&at(q, 9), &at(q, 9)) - dot(&q, &q)).abs() < 1e-5);
        assert!((dot(&at(q, 9), &at(k, 4)) - dot(&at(q, 25), &at(k, 20))).abs() < 1e-5);
        assert!((dot(&at(q, 9), &at(k, 4)) - dot(&q, &k)).abs() > 1e-2);
    }

    #[test]
    fn every_implementation_rotates_alike_and_the_inverse_undoes_it() {
        let device = Device::flex();
        let values: Vec<f32> = (0..24).map(|i| (i as f32).sin()).collect();
        let x = Tensor::<2>::from_data(TensorData::new(values, [3, 8]), &device);
        for whole in [false, true] {
            let tables = tables(&[0, 3, 70], whole);
            let expected = rotate_in_graph(x.clone().reshape([3, 2, 4]), &tables).reshape([3, 8]);
            let rotated = rotate(x.clone(), &tables, Rotation::Forward, 1.0);
            let tolerance = Tolerance::absolute(1e-6);
            rotated
                .to_data()
                .assert_approx_eq::<f32>(&expected.into_data(), tolerance);
            rotate(rotated, &tables, Rotation::Inverse, 1.0)
                .into_data()
                .assert_approx_eq::<f32>(&x.to_data(), tolerance);
        }
    }
}
