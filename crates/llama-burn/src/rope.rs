//! The angles of rotary position embeddings (Su et al., 2021, <https://arxiv.org/abs/2104.09864>) as Hugging Face's
//! Llama computes them.

use kernels::{PlannedRotary, Uploads};

use crate::LlamaConfig;

/// The angle per position of each pair of dimensions: `head_dim / 2` values, of sequences up to
/// `max_position_embeddings` tokens.
///
/// Computed in f32, as in transformers' `modeling_rope_utils`.
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
    /// The length of the sequence when this token was read.
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

/// Plans the rotary tables of tokens at these places.
pub(crate) fn planned(
    places: &[Place],
    config: &LlamaConfig,
    uploads: &mut Uploads,
) -> PlannedRotary {
    let (cos, sin) = tables_of(config, places);
    PlannedRotary::new(cos, sin, config.head_dim / 2, uploads)
}
