//! Rotary position embeddings (Su et al., 2021, <https://arxiv.org/abs/2104.09864>) as Hugging Face's
//! Llama applies them: halves of a head are rotated, not interleaved pairs as in `burn::nn::RotaryEncoding`.

use burn::tensor::Tensor;

use crate::{LlamaConfig, RopeScaling};

/// The angle a position of each pair of dimensions: `head_dim / 2` values.
///
/// As transformers' `modeling_rope_utils` computes them, in f32.
pub fn inverse_frequencies(config: &LlamaConfig) -> Vec<f32> {
    let pairs = config.head_dim / 2;
    (0..pairs)
        .map(|pair| {
            let exponent = (2 * pair) as f64 / config.head_dim as f64;
            let frequency = 1.0 / config.rope_theta.powf(exponent);
            scale(frequency, config.rope_scaling) as f32
        })
        .collect()
}

fn scale(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: context,
        } => {
            let wavelength = std::f64::consts::TAU / frequency;
            if wavelength < context / high_freq_factor {
                frequency
            } else if wavelength > context / low_freq_factor {
                frequency / factor
            } else {
                let ramp = high_freq_factor - low_freq_factor;
                let kept = (context / wavelength - low_freq_factor) / ramp;
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        }
    }
}

/// Cosines and sines for the given positions, `[n, head_dim / 2]` each, row-major.
pub(crate) fn tables(frequencies: &[f32], positions: &[u32]) -> (Vec<f32>, Vec<f32>) {
    let angles = positions
        .iter()
        .flat_map(|position| frequencies.iter().map(|f| (*position as f32 * f) as f64));
    angles
        .map(|angle| (angle.cos() as f32, angle.sin() as f32))
        .unzip()
}

/// Rotates every head of `x` by its row's angles: `(x₁, x₂) → (x₁·cos − x₂·sin, x₂·cos + x₁·sin)`,
/// where x₁ and x₂ are the halves of a head.
///
/// # Shapes
///
/// - `x`: `[n, heads, head_dim]`
/// - `cos`, `sin`: `[n, 1, head_dim / 2]`
/// - output: `[n, heads, head_dim]`
pub(crate) fn rotate(x: Tensor<3>, cos: &Tensor<3>, sin: &Tensor<3>) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    let first = x.clone().narrow(2, 0, half);
    let second = x.narrow(2, half, half);
    Tensor::cat(
        vec![
            first.clone() * cos.clone() - second.clone() * sin.clone(),
            second * cos.clone() + first * sin.clone(),
        ],
        2,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn rotation_keeps_lengths_and_depends_on_relative_position_only() {
        let device = Device::flex();
        let frequencies = [1.0, 0.1];
        let at = |values: [f32; 4], position: u32| {
            let (cos, sin) = tables(&frequencies, &[position]);
            let table = |v| Tensor::<3>::from_data(TensorData::new(v, [1, 1, 2]), &device);
            let x = Tensor::<3>::from_data(TensorData::new(values.to_vec(), [1, 1, 4]), &device);
            rotate(x, &table(cos), &table(sin))
                .into_data()
                .try_to_vec::<f32>()
                .unwrap()
        };
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let (q, k) = ([0.3, -1.2, 0.7, 2.0], [1.0, 0.5, -0.4, 0.9]);
        assert!((dot(&at(q, 9), &at(q, 9)) - dot(&q, &q)).abs() < 1e-5);
        assert!((dot(&at(q, 9), &at(k, 4)) - dot(&at(q, 25), &at(k, 20))).abs() < 1e-5);
        assert!((dot(&at(q, 9), &at(k, 4)) - dot(&q, &k)).abs() > 1e-2);
    }
}
