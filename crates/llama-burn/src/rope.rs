//! Rotary position embeddings (Su et al., 2021, <https://arxiv.org/abs/2104.09864>) as Hugging Face's
//! Llama applies them: halves of a head are rotated, not interleaved pairs as in `burn::nn::RotaryEncoding`.

use burn::tensor::{DType, Int, Tensor};
use lora_core::{cpu, in_vectors};

use crate::LlamaConfig;
use crate::uploads::{Floats, Ints, Uploaded, Uploads};

/// The angle a position of each pair of dimensions: `head_dim / 2` values, of sequences up to
/// `max_position_embeddings` tokens.
///
/// As transformers' `modeling_rope_utils` computes them, in f32.
pub fn inverse_frequencies(config: &LlamaConfig) -> Vec<f32> {
    frequencies_at(config, 0)
}

/// As [`inverse_frequencies`], of a sequence of `length` tokens.
fn frequencies_at(config: &LlamaConfig, length: usize) -> Vec<f32> {
    let limit = config.max_position_embeddings;
    let scaling = config.rope_scaling;
    let frequencies = scaling.frequencies(config.rope_theta, config.head_dim, length, limit);
    frequencies.into_iter().map(|f| f as f32).collect()
}

/// A token's place in its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) position: u32,
    /// The tokens of the sequence when this one was read.
    pub(crate) length: usize,
}

/// Cosines and sines for the given places, `[n, head_dim / 2]` each, row-major, times the scaling's attention factor.
fn tables_of(config: &LlamaConfig, places: &[Place]) -> (Vec<f32>, Vec<f32>) {
    let mut all = (Vec::new(), Vec::new());
    let length = |place: &Place| {
        if config.rotates_by_length(place.length) {
            place.length
        } else {
            0
        }
    };
    for places in places.chunk_by(|a, b| length(a) == length(b)) {
        let positions: Vec<u32> = places.iter().map(|place| place.position).collect();
        let (cos, sin) = tables(&frequencies_at(config, length(&places[0])), &positions);
        all.0.extend(cos);
        all.1.extend(sin);
    }
    let scale = config.rope_scaling.attention_factor() as f32;
    if scale != 1.0 {
        let values = all.0.iter_mut().chain(&mut all.1);
        values.for_each(|value| *value *= scale);
    }
    all
}

/// Cosines and sines for the given positions, `[n, head_dim / 2]` each, row-major.
fn tables(frequencies: &[f32], positions: &[u32]) -> (Vec<f32>, Vec<f32>) {
    let angles = positions
        .iter()
        .flat_map(|position| frequencies.iter().map(|f| (*position as f32 * f) as f64));
    angles
        .map(|angle| (angle.cos() as f32, angle.sin() as f32))
        .unzip()
}

/// The angles of a batch's tokens, on the device.
#[derive(Debug, Clone)]
pub(crate) struct Angles {
    /// `[n, head_dim / 2]`, f32.
    cos: Tensor<2>,
    sin: Tensor<2>,
    /// What rotates whole heads in one operation where no kernel of ours runs.
    whole: Option<WholeHeads>,
}

#[derive(Debug, Clone)]
struct WholeHeads {
    /// `[n, 1, head_dim]`: the cosines twice.
    cos: Tensor<3>,
    /// The sines, those of the first half negative.
    sin: Tensor<3>,
    /// The dimensions of a head as they are, and with its halves exchanged, `[head_dim]` each.
    straight: Tensor<1, Int>,
    exchanged: Tensor<1, Int>,
}

/// Angles that are about to be copied to the device.
pub(crate) struct PlannedAngles {
    cos: Floats,
    sin: Floats,
    straight: Ints,
    exchanged: Ints,
    shape: [usize; 2],
}

impl PlannedAngles {
    pub(crate) fn new(places: &[Place], config: &LlamaConfig, uploads: &mut Uploads) -> Self {
        let (cos, sin) = tables_of(config, places);
        let half = config.head_dim / 2;
        Self {
            cos: uploads.floats(cos),
            sin: uploads.floats(sin),
            straight: uploads.ints((0..2 * half).map(|place| place as i32)),
            exchanged: uploads.ints((half..2 * half).chain(0..half).map(|place| place as i32)),
            shape: [places.len(), half],
        }
    }

    pub(crate) fn on_device(self, uploaded: &Uploaded) -> Angles {
        let table = |at: &Floats| uploaded.floats(at, self.shape);
        let (cos, sin) = (table(&self.cos), table(&self.sin));
        let whole = (!cpu::is_native(&cos)).then(|| WholeHeads {
            cos: Tensor::cat(vec![cos.clone(), cos.clone()], 1).unsqueeze_dim(1),
            sin: Tensor::cat(vec![sin.clone().neg(), sin.clone()], 1).unsqueeze_dim(1),
            straight: uploaded.ints(&self.straight),
            exchanged: uploaded.ints(&self.exchanged),
        });
        Angles { cos, sin, whole }
    }
}

impl Angles {
    /// Rotates every head of `x` by its row's angles: `(x₁, x₂) → (x₁·cos − x₂·sin, x₂·cos + x₁·sin)`,
    /// where x₁ and x₂ are the halves of a head. On the tape that `x` is on.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[n, heads, head_dim]`
    pub(crate) fn rotate(&self, x: Tensor<3>) -> Tensor<3> {
        let half = self.cos.dims()[1];
        let table = |table: &Tensor<2>| {
            let table = table.clone().cast(x.dtype()).unsqueeze_dim::<3>(1);
            if x.is_autodiff() {
                table.autodiff()
            } else {
                table
            }
        };
        let (cos, sin) = (table(&self.cos), table(&self.sin));
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
}

/// Which way heads are turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// As [`Angles::rotate`].
    Forward,
    /// Back, which is what a gradient needs: a rotation's inverse is its transposed. An attention factor scales both ways.
    Back,
}

/// As [`Angles::rotate`] or its inverse, outside any tape, in the memory of `x` where nobody else has it; times
/// `scale`, which is 1 for kernels on the CPU. It is computed in f32 and returned in the type of `x`.
///
/// # Shapes
///
/// - `x`, output: `[n, heads · head_dim]`
pub(crate) fn rotate_plain(x: Tensor<2>, angles: &Angles, turn: Turn, scale: f64) -> Tensor<2> {
    let ([n, width], half) = (x.dims(), angles.cos.dims()[1]);
    if let Some(whole) = &angles.whole {
        let dtype = x.dtype();
        let heads = x.reshape([n, width / (2 * half), 2 * half]);
        // Both parts by selection, so that Burn fuses all of it into one kernel that reads `x` by index.
        let exchanged = heads.clone().select(2, whole.exchanged.clone());
        let exchanged = exchanged.cast(DType::F32) * whole.sin.clone();
        let kept = heads.select(2, whole.straight.clone());
        let kept = kept.cast(DType::F32) * whole.cos.clone();
        let turned = match turn {
            Turn::Forward => kept + exchanged,
            Turn::Back => kept - exchanged,
        };
        let turned = if scale == 1.0 {
            turned
        } else {
            turned.mul_scalar(scale)
        };
        return turned.cast(dtype).reshape([n, width]);
    }
    assert_eq!(scale, 1.0, "kernels on the CPU scale scores themselves");
    let mut x = cpu::values(x);
    let (cos, sin) = (
        cpu::values(angles.cos.clone()),
        cpu::values(angles.sin.clone()),
    );
    let (cos, sin) = (cos.as_slice(), sin.as_slice());
    let sign = match turn {
        Turn::Forward => 1.0,
        Turn::Back => -1.0,
    };
    cpu::for_each_piece(x.as_mut_slice(), width, |first, piece| {
        let here = first * half..first * half + piece.len() / width * half;
        turn_rows(piece, &cos[here.clone()], &sin[here], [width, half], sign);
    });
    x.into_tensor()
}

in_vectors! {
    /// Turns the heads of rows of `width`, by the angles of `[rows, half]`.
    fn turn_rows(x: &mut [f32], cos: &[f32], sin: &[f32], widths: [usize; 2], sign: f32) {
        let [width, half] = widths;
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (x, (cos, sin)) in x.chunks_exact_mut(width).zip(angles) {
            for head in x.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                let halves = first.iter_mut().zip(second);
                for (((first, second), cos), sin) in halves.zip(cos).zip(sin) {
                    let sin = sign * sin;
                    let turned = *first * cos - *second * sin;
                    *second = *second * cos + *first * sin;
                    *first = turned;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    /// Angles of these positions for heads of four dimensions, as the CPU's kernels or as other devices have them.
    fn angles(positions: &[u32], whole: bool) -> Angles {
        let device = Device::flex();
        let (cos, sin) = tables(&[1.0, 0.1], positions);
        let table = |v| Tensor::<2>::from_data(TensorData::new(v, [positions.len(), 2]), &device);
        let (cos, sin) = (table(cos), table(sin));
        let straight = Tensor::<1, Int>::from_data([0, 1, 2, 3], &device);
        let exchanged = Tensor::<1, Int>::from_data([2, 3, 0, 1], &device);
        let whole = whole.then(|| WholeHeads {
            cos: Tensor::cat(vec![cos.clone(), cos.clone()], 1).unsqueeze_dim(1),
            sin: Tensor::cat(vec![sin.clone().neg(), sin.clone()], 1).unsqueeze_dim(1),
            straight,
            exchanged,
        });
        Angles { cos, sin, whole }
    }

    #[test]
    fn rotation_keeps_lengths_and_depends_on_relative_position_only() {
        let at = |values: [f32; 4], position: u32| {
            let data = TensorData::new(values.to_vec(), [1, 1, 4]);
            let x = Tensor::<3>::from_data(data, &Device::flex());
            let turned = angles(&[position], false).rotate(x).into_data();
            turned.try_to_vec::<f32>().unwrap()
        };
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let (q, k) = ([0.3, -1.2, 0.7, 2.0], [1.0, 0.5, -0.4, 0.9]);
        assert!((dot(&at(q, 9), &at(q, 9)) - dot(&q, &q)).abs() < 1e-5);
        assert!((dot(&at(q, 9), &at(k, 4)) - dot(&at(q, 25), &at(k, 20))).abs() < 1e-5);
        assert!((dot(&at(q, 9), &at(k, 4)) - dot(&q, &k)).abs() > 1e-2);
    }

    #[test]
    fn every_way_of_turning_is_the_same_and_turning_back_undoes_it() {
        let device = Device::flex();
        let values: Vec<f32> = (0..24).map(|i| (i as f32).sin()).collect();
        let x = Tensor::<2>::from_data(TensorData::new(values, [3, 8]), &device);
        for whole in [false, true] {
            let angles = angles(&[0, 3, 70], whole);
            let expected = angles.rotate(x.clone().reshape([3, 2, 4])).reshape([3, 8]);
            let turned = rotate_plain(x.clone(), &angles, Turn::Forward, 1.0);
            let tolerance = burn::tensor::Tolerance::absolute(1e-6);
            turned
                .to_data()
                .assert_approx_eq::<f32>(&expected.into_data(), tolerance);
            rotate_plain(turned, &angles, Turn::Back, 1.0)
                .into_data()
                .assert_approx_eq::<f32>(&x.to_data(), tolerance);
        }
    }
}
