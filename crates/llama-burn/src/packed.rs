//! Rows packed into one sequence without padding.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::LlamaConfig;
use crate::rope;

/// Token rows back to back. Positions restart in each row, and a row attends only to itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackedTokens {
    /// The token ids of all rows, `n` in all.
    pub ids: Vec<u32>,
    /// The length of each row; they add up to `n`.
    pub segment_lengths: Vec<usize>,
}

/// Why tokens cannot be packed for a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackedError {
    /// No token at all.
    #[error("a batch holds no tokens")]
    Empty,
    /// The lengths do not add up, or one is zero.
    #[error("{tokens} tokens, but rows of lengths {lengths:?}")]
    Lengths {
        /// Tokens given.
        tokens: usize,
        /// Row lengths given.
        lengths: Vec<usize>,
    },
    /// A token that the embedding does not have.
    #[error(
        "token {position} has the id {id}, but the model's vocabulary has {vocab_size} entries"
    )]
    OutsideVocabulary {
        /// Where it stands in the packed sequence.
        position: usize,
        /// The id.
        id: u32,
        /// The size of the vocabulary.
        vocab_size: usize,
    },
    /// A row is longer than the positions that the model knows.
    #[error(
        "a row has {length} tokens, but the model's positions end at {max_position_embeddings}"
    )]
    TooLong {
        /// The row's length.
        length: usize,
        /// The model's limit.
        max_position_embeddings: usize,
    },
}

impl PackedTokens {
    /// Packs rows.
    pub fn from_rows<'a>(rows: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut packed = Self::default();
        for row in rows {
            packed.ids.extend_from_slice(row);
            packed.segment_lengths.push(row.len());
        }
        packed
    }

    /// Checks lengths, ids and positions against a model.
    ///
    /// # Errors
    ///
    /// The first thing that does not fit.
    pub fn check(&self, config: &LlamaConfig) -> Result<(), PackedError> {
        if self.ids.is_empty() {
            return Err(PackedError::Empty);
        }
        let total: usize = self.segment_lengths.iter().sum();
        if total != self.ids.len() || self.segment_lengths.contains(&0) {
            return Err(PackedError::Lengths {
                tokens: self.ids.len(),
                lengths: self.segment_lengths.clone(),
            });
        }
        let vocab_size = config.vocab_size;
        if let Some(position) = self.ids.iter().position(|id| *id as usize >= vocab_size) {
            return Err(PackedError::OutsideVocabulary {
                position,
                id: self.ids[position],
                vocab_size,
            });
        }
        let max_position_embeddings = config.max_position_embeddings;
        match self.segment_lengths.iter().max() {
            Some(length) if *length > max_position_embeddings => Err(PackedError::TooLong {
                length: *length,
                max_position_embeddings,
            }),
            _ => Ok(()),
        }
    }

    /// Each token's position within its row.
    pub fn positions(&self) -> Vec<u32> {
        let rows = self.segment_lengths.iter();
        rows.flat_map(|length| 0..*length as u32).collect()
    }
}

/// What every layer needs to know of a packed sequence, put on the device once a batch.
///
/// Attention works on rows side by side, `[rows, longest row]`: only its own tensors are padded so,
/// which costs little next to the linear layers, and saves the scores between different rows.
#[derive(Debug, Clone)]
pub struct PackedContext {
    /// Tokens, `n`.
    pub(crate) tokens: usize,
    pub(crate) rows: usize,
    pub(crate) longest: usize,
    /// `[n, 1, head_dim / 2]`, in the compute type.
    pub(crate) cos: Tensor<3>,
    pub(crate) sin: Tensor<3>,
    /// Packed index of each padded place, `[rows · longest]`, and back, `[n]`; none where nothing is padded.
    pub(crate) padding: Option<(Tensor<1, Int>, Tensor<1, Int>)>,
    /// Added to scores: 0 where a query may look, very negative elsewhere. `[1, 1, longest, longest]`.
    pub(crate) mask: Tensor<4>,
}

impl PackedContext {
    /// Prepares `packed` for a model of this configuration that computes in `dtype` on `device`.
    pub fn new(packed: &PackedTokens, config: &LlamaConfig, dtype: DType, device: &Device) -> Self {
        let device = &device.clone().without_autodiff();
        let lengths = &packed.segment_lengths;
        let tokens = packed.ids.len();
        let (rows, longest) = (lengths.len(), lengths.iter().copied().max().unwrap_or(0));
        let frequencies = rope::inverse_frequencies(config);
        let (cos, sin) = rope::tables(&frequencies, &packed.positions());
        let table = |values: Vec<f32>| {
            let data = TensorData::new(values, [tokens, 1, frequencies.len()]);
            Tensor::<3>::from_data(data, (device, dtype))
        };
        // Keys past a row's end lie after every query of that row, so the causal mask hides them;
        // what padded queries compute is never read.
        let mask = (0..longest)
            .flat_map(|query| (0..longest).map(move |key| if key <= query { 0.0 } else { MASKED }))
            .collect::<Vec<f32>>();
        let mask = TensorData::new(mask, [1, 1, longest, longest]);
        Self {
            tokens,
            rows,
            longest,
            cos: table(cos),
            sin: table(sin),
            padding: padding(lengths, longest, device),
            mask: Tensor::from_data(mask, (device, DType::F32)),
        }
    }
}

/// Finite, because shading languages do not promise infinities; e to this power is 0 in f32.
const MASKED: f32 = -1e30;

fn padding(
    lengths: &[usize],
    longest: usize,
    device: &Device,
) -> Option<(Tensor<1, Int>, Tensor<1, Int>)> {
    if lengths.iter().all(|length| *length == longest) {
        return None;
    }
    let mut places = Vec::with_capacity(lengths.len() * longest);
    let mut back = Vec::new();
    let mut start = 0;
    for (row, length) in lengths.iter().enumerate() {
        // A padded place repeats its row's first token: any would do.
        places.extend((0..longest).map(|i| (start + if i < *length { i } else { 0 }) as i32));
        back.extend((0..*length).map(|i| (row * longest + i) as i32));
        start += length;
    }
    let on_device = |indices: Vec<i32>| {
        let count = indices.len();
        Tensor::<1, Int>::from_data(TensorData::new(indices, [count]), device)
    };
    Some((on_device(places), on_device(back)))
}

impl PackedContext {
    /// Rows side by side: `[n, heads, d]` → `[rows, longest, heads, d]`.
    pub(crate) fn spread(&self, x: Tensor<3>) -> Tensor<4> {
        let [_, heads, d] = x.dims();
        let x = match &self.padding {
            Some((places, _)) => x.select(0, places.clone()),
            None => x,
        };
        x.reshape([self.rows, self.longest, heads, d])
    }

    /// Back to back again: `[rows, longest, heads, d]` → `[n, heads · d]`.
    pub(crate) fn gather(&self, x: Tensor<4>) -> Tensor<2> {
        let [rows, longest, heads, d] = x.dims();
        let x = x.reshape([rows * longest, heads * d]);
        match &self.padding {
            Some((_, back)) => x.select(0, back.clone()),
            None => x,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_restart_in_each_row() {
        let packed = PackedTokens::from_rows([&[5, 6, 7][..], &[8, 9]]);
        assert_eq!(packed.segment_lengths, [3, 2]);
        assert_eq!(packed.positions(), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn spreading_and_gathering_restore_the_order() {
        let device = Device::flex();
        let lengths = [3, 1, 2];
        let (places, back) = padding(&lengths, 3, &device).unwrap();
        let values =
            |t: Tensor<1, Int>| t.into_data().convert::<i32>().try_to_vec::<i32>().unwrap();
        let (places, back) = (values(places), values(back));
        let restored: Vec<i32> = back.iter().map(|place| places[*place as usize]).collect();
        assert_eq!(restored, [0, 1, 2, 3, 4, 5]);
        assert_eq!(padding(&[2, 2], 2, &device).map(|_| ()), None);
    }
}
