//! Token sequences packed into one batch without padding, with shared prefixes stored once.

use burn::tensor::{DType, Device};
use kernels::{
    AttentionLayout, Heads, PlannedAttention, PlannedRotary, RotaryTables, SCORES_AT_ONCE, Segment,
    Uploaded, Uploads,
};

use crate::LlamaConfig;
use crate::rope::{self, Place};

/// Token sequences packed into one batch. A sequence attends only to itself, and its positions start from 0.
///
/// Sequences can share a prefix. The segments then form a prefix tree (trie), and a sequence is a path from a root to
/// the segment of its last token. A token's hidden state depends on earlier tokens only, so the shared prefix is
/// computed once without changing the result; its gradient is the sum of the gradients of its sequences.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackedTokens {
    /// The token ids of all segments, `n` in total.
    pub ids: Vec<u32>,
    /// The segments, in the order of their ids; a parent comes before its children.
    pub segments: Vec<Segment>,
}

/// Why tokens cannot be packed for a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackedError {
    /// The batch has no tokens.
    #[error("a batch holds no tokens")]
    Empty,
    /// The lengths do not sum to the number of tokens, one is zero, or a parent does not come before its child.
    #[error("{tokens} tokens, but segments {segments:?}")]
    Segments {
        /// The number of tokens.
        tokens: usize,
        /// The segments.
        segments: Vec<Segment>,
    },
    /// A token id outside the vocabulary.
    #[error(
        "token {position} has the id {id}, but the model's vocabulary has {vocab_size} entries"
    )]
    OutsideVocabulary {
        /// The token's index in the packed batch.
        position: usize,
        /// The id.
        id: u32,
        /// The size of the vocabulary.
        vocab_size: usize,
    },
    /// The number of new tokens differs from the number of cached sequences.
    #[error("{got} tokens for {expected} sequences in the cache; pass one token per sequence")]
    Sequences {
        /// The number of sequences.
        expected: usize,
        /// The number of tokens.
        got: usize,
    },
    /// A sequence has more tokens than the model has positions.
    #[error(
        "a sequence has {length} tokens, but the model's positions end at {max_position_embeddings}"
    )]
    TooLong {
        /// The sequence's length.
        length: usize,
        /// The model's limit.
        max_position_embeddings: usize,
    },
    /// A sequence that is too long for prefix sharing shares a prefix.
    #[error(
        "a sequence of {length} tokens shares a prefix with others; with the rope type \"dynamic\", sequences of more \
         than {max_position_embeddings} tokens cannot share prefixes"
    )]
    Shared {
        /// The sequence's length.
        length: usize,
        /// The longest sequence that may share a prefix.
        max_position_embeddings: usize,
    },
}

impl PackedTokens {
    /// Packs sequences without prefix sharing.
    pub fn from_sequences<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut packed = Self::default();
        for sequence in sequences {
            packed.push(sequence, None);
        }
        packed
    }

    /// Packs sequences and stores shared prefixes of at least `least` tokens once. Also returns, per sequence, the
    /// indices of its tokens in the packed batch.
    pub fn sharing_prefixes(sequences: &[&[u32]], least: usize) -> (Self, Vec<Vec<u32>>) {
        let mut sharing = Sharing {
            sequences,
            least: least.max(1),
            packed: Self::default(),
            places: vec![Vec::new(); sequences.len()],
        };
        let all: Vec<usize> = (0..sequences.len())
            .filter(|sequence| !sequences[*sequence].is_empty())
            .collect();
        for group in sharing.groups(&all, 0) {
            sharing.add(&group, 0, None);
        }
        (sharing.packed, sharing.places)
    }

    /// As [`sharing_prefixes`](Self::sharing_prefixes), without prefix sharing for sequences whose rotary frequencies
    /// depend on their length.
    pub fn sharing_for(
        sequences: &[&[u32]],
        least: usize,
        config: &LlamaConfig,
    ) -> (Self, Vec<Vec<u32>>) {
        let alone = |sequence: &&[u32]| config.rotates_by_length(sequence.len());
        if !sequences.iter().any(alone) {
            return Self::sharing_prefixes(sequences, least);
        }
        let short = sequences
            .iter()
            .map(|sequence| if alone(sequence) { &[][..] } else { *sequence });
        let (mut packed, mut places) = Self::sharing_prefixes(&short.collect::<Vec<_>>(), least);
        for (sequence, places) in sequences
            .iter()
            .zip(&mut places)
            .filter(|(sequence, _)| alone(sequence))
        {
            let first = packed.ids.len() as u32;
            places.extend(first..first + sequence.len() as u32);
            packed.push(sequence, None);
        }
        (packed, places)
    }

    /// Adds a segment and returns its index.
    fn push(&mut self, ids: &[u32], parent: Option<usize>) -> usize {
        self.ids.extend_from_slice(ids);
        self.segments.push(Segment {
            length: ids.len(),
            parent,
        });
        self.segments.len() - 1
    }

    /// The index of each segment's first token in the packed batch.
    pub fn starts(&self) -> Vec<usize> {
        kernels::starts(&self.segments)
    }

    /// The position of each segment's first token in its sequences.
    pub fn offsets(&self) -> Vec<usize> {
        kernels::offsets(&self.segments)
    }

    /// Checks lengths, ids and positions against a model.
    ///
    /// # Errors
    ///
    /// The first mismatch.
    pub fn check(&self, config: &LlamaConfig) -> Result<(), PackedError> {
        if self.ids.is_empty() {
            return Err(PackedError::Empty);
        }
        let total: usize = self.segments.iter().map(|segment| segment.length).sum();
        let ordered = |(index, segment): (usize, &Segment)| {
            segment.length > 0 && segment.parent.is_none_or(|parent| parent < index)
        };
        if total != self.ids.len() || !self.segments.iter().enumerate().all(ordered) {
            return Err(PackedError::Segments {
                tokens: self.ids.len(),
                segments: self.segments.clone(),
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
        let max_position_embeddings = config.positions();
        let ends = self.segments.iter().zip(self.offsets());
        let ends = ends.map(|(segment, offset)| (offset + segment.length, offset));
        let Some((length, _)) = ends.clone().max() else {
            return Ok(());
        };
        if length > max_position_embeddings {
            return Err(PackedError::TooLong {
                length,
                max_position_embeddings,
            });
        }
        match ends
            .into_iter()
            .find(|(end, offset)| *offset > 0 && config.rotates_by_length(*end))
        {
            Some((length, _)) => Err(PackedError::Shared {
                length,
                max_position_embeddings: config.max_position_embeddings,
            }),
            None => Ok(()),
        }
    }

    /// The length of the longest sequence.
    fn longest(&self) -> usize {
        let ends = self.segments.iter().zip(self.offsets());
        let ends = ends.map(|(segment, offset)| offset + segment.length);
        ends.max().unwrap_or(0)
    }

    /// Each token's position within its sequence.
    pub fn positions(&self) -> Vec<u32> {
        let segments = self.segments.iter().zip(self.offsets());
        segments
            .flat_map(|(segment, offset)| offset as u32..(offset + segment.length) as u32)
            .collect()
    }

    /// Each token's place. The end of its segment counts as the length of its sequences. Where the length matters,
    /// [`check`](Self::check) permits one segment per sequence only.
    fn places(&self) -> Vec<Place> {
        let segments = self.segments.iter().zip(self.offsets());
        let places = segments.flat_map(|(segment, offset)| {
            let length = offset + segment.length;
            (offset as u32..length as u32).map(move |position| Place { position, length })
        });
        places.collect()
    }
}

/// Builds the prefix tree of some sequences.
struct Sharing<'a> {
    sequences: &'a [&'a [u32]],
    least: usize,
    packed: PackedTokens,
    places: Vec<Vec<u32>>,
}

impl Sharing<'_> {
    /// Adds the tokens of these sequences from `start` on. The token at `start` is the same in all of them.
    fn add(&mut self, sequences: &[usize], start: usize, parent: Option<usize>) {
        let end = self.agree_until(sequences, start);
        if sequences.len() == 1 || end - start >= self.least {
            let segment = self.segment(sequences, start, end, parent);
            let longer: Vec<usize> = sequences
                .iter()
                .copied()
                .filter(|sequence| self.sequences[*sequence].len() > end)
                .collect();
            for group in self.groups(&longer, end) {
                self.add(&group, end, Some(segment));
            }
            return;
        }
        // The prefix of all is too short to share; a subset may have a longer one.
        let (longer, ended): (Vec<usize>, Vec<usize>) = sequences
            .iter()
            .partition(|sequence| self.sequences[**sequence].len() > end);
        for sequence in ended {
            self.segment(&[sequence], start, end, parent);
        }
        for group in self.groups(&longer, end) {
            match group[..] {
                [sequence] => {
                    self.segment(&[sequence], start, self.sequences[sequence].len(), parent);
                }
                _ => self.add(&group, start, parent),
            }
        }
    }

    /// Adds one segment of sequences that are equal from `start` to `end`.
    fn segment(
        &mut self,
        sequences: &[usize],
        start: usize,
        end: usize,
        parent: Option<usize>,
    ) -> usize {
        let first = self.packed.ids.len() as u32;
        for sequence in sequences {
            self.places[*sequence].extend(first..first + (end - start) as u32);
        }
        self.packed
            .push(&self.sequences[sequences[0]][start..end], parent)
    }

    /// Groups sequences by their token at `at`, in the order of each group's first sequence.
    fn groups(&self, sequences: &[usize], at: usize) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut by_token = std::collections::HashMap::new();
        for sequence in sequences {
            let group = *by_token
                .entry(self.sequences[*sequence][at])
                .or_insert(groups.len());
            match groups.get_mut(group) {
                Some(group) => group.push(*sequence),
                None => groups.push(vec![*sequence]),
            }
        }
        groups
    }

    /// The index of the first token in which the sequences differ, or at which one of them ends.
    fn agree_until(&self, sequences: &[usize], start: usize) -> usize {
        let first = self.sequences[sequences[0]];
        let agree = |sequence: &usize| {
            let pairs = first[start..]
                .iter()
                .zip(&self.sequences[*sequence][start..]);
            start + pairs.take_while(|(a, b)| a == b).count()
        };
        sequences.iter().map(agree).min().unwrap_or(start)
    }
}

/// The data of a packed batch that every layer needs, copied to the device once per batch.
#[derive(Debug, Clone)]
pub struct PackedContext {
    /// The type that products are computed in.
    pub(crate) dtype: DType,
    /// Which tokens attend to which tokens, for each sliding window of a layer; empty for attention with a KV cache.
    attention: Vec<(Option<usize>, AttentionLayout)>,
    /// The cosines and sines of the tokens' positions.
    pub(crate) rotary: RotaryTables,
}

impl PackedContext {
    /// Prepares `packed` for a model of this configuration whose products are computed in `dtype` on `device`.
    pub fn new(packed: &PackedTokens, config: &LlamaConfig, dtype: DType, device: &Device) -> Self {
        let mut uploads = Uploads::default();
        let planned = Planned::new(packed, config, dtype, device, SCORES_AT_ONCE, &mut uploads);
        planned.on_device(&uploads.send(device))
    }

    /// Which tokens attend to which tokens in layers with this sliding window.
    ///
    /// # Panics
    ///
    /// If the context was prepared for another model or for attention with a KV cache.
    pub(crate) fn attention(&self, window: Option<usize>) -> &AttentionLayout {
        match self.attention.iter().find(|(other, _)| *other == window) {
            Some((_, layout)) => layout,
            None => panic!("the context was not prepared for a window of {window:?} tokens"),
        }
    }

    /// The context of tokens at these positions, for attention with a KV cache.
    pub(crate) fn of_positions(
        positions: &[u32],
        config: &LlamaConfig,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let mut uploads = Uploads::default();
        // Each token is the last one of its sequence so far.
        let places = positions.iter().map(|position| Place {
            position: *position,
            length: *position as usize + 1,
        });
        let places: Vec<Place> = places.collect();
        let rotary = rope::planned(&places, config, &mut uploads);
        Self {
            dtype,
            attention: Vec::new(),
            rotary: rotary.on_device(&uploads.send(device)),
        }
    }
}

/// A [`PackedContext`] whose indices and tables are not copied to the device yet.
pub(crate) struct Planned {
    dtype: DType,
    attention: Vec<(Vec<Option<usize>>, PlannedAttention)>,
    rotary: PlannedRotary,
}

impl Planned {
    /// As [`PackedContext::new`], with at most `scores_at_once` attention scores in memory.
    pub(crate) fn new(
        packed: &PackedTokens,
        config: &LlamaConfig,
        dtype: DType,
        device: &Device,
        scores_at_once: usize,
        uploads: &mut Uploads,
    ) -> Self {
        let heads = Heads {
            query: config.num_attention_heads,
            key: config.num_key_value_heads,
            d: config.head_dim,
        };
        let (segments, longest) = (&packed.segments, packed.longest());
        let mut planned = |window| {
            PlannedAttention::new(
                segments,
                window,
                heads,
                dtype,
                device,
                scores_at_once,
                uploads,
            )
        };
        // Windows that are not shorter than a sequence share the layout without a window.
        let mut attention: Vec<(Vec<Option<usize>>, PlannedAttention)> = Vec::new();
        let mut effective: Vec<Option<usize>> = Vec::new();
        for window in config.distinct_windows() {
            let shorter = window.filter(|window| *window < longest);
            match effective.iter().position(|other| *other == shorter) {
                Some(index) => attention[index].0.push(window),
                None => {
                    effective.push(shorter);
                    attention.push((vec![window], planned(shorter)));
                }
            }
        }
        Self {
            dtype,
            attention,
            rotary: rope::planned(&packed.places(), config, uploads),
        }
    }

    pub(crate) fn on_device(self, uploaded: &Uploaded) -> PackedContext {
        let mut attention = Vec::new();
        for (windows, planned) in self.attention {
            let layout = planned.on_device(uploaded);
            let windows = windows.into_iter();
            attention.extend(windows.map(|window| (window, layout.clone())));
        }
        PackedContext {
            dtype: self.dtype,
            attention,
            rotary: self.rotary.on_device(uploaded),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(packed: &PackedTokens) -> Vec<(usize, Option<usize>)> {
        let segments = packed.segments.iter();
        segments
            .map(|segment| (segment.length, segment.parent))
            .collect()
    }

    /// Checks that the indices of every sequence return its tokens and positions.
    fn assert_sequences(packed: &PackedTokens, places: &[Vec<u32>], sequences: &[&[u32]]) {
        let positions = packed.positions();
        for (places, sequence) in places.iter().zip(sequences) {
            let ids: Vec<u32> = places.iter().map(|i| packed.ids[*i as usize]).collect();
            assert_eq!(ids, *sequence);
            let read: Vec<u32> = places.iter().map(|i| positions[*i as usize]).collect();
            assert_eq!(read, (0..sequence.len() as u32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn positions_restart_in_each_sequence() {
        let packed = PackedTokens::from_sequences([&[5, 6, 7][..], &[8, 9]]);
        assert_eq!(lengths(&packed), [(3, None), (2, None)]);
        assert_eq!(packed.positions(), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn shared_prefixes_are_packed_once_at_every_level() {
        let sequences: [&[u32]; 6] = [
            &[1, 2, 3, 4, 5],
            &[9, 9],
            &[1, 2, 3, 4, 6, 7],
            &[1, 2, 8],
            &[1, 2, 3, 4, 6, 8],
            &[1, 2],
        ];
        let (packed, places) = PackedTokens::sharing_prefixes(&sequences, 2);
        assert_sequences(&packed, &places, &sequences);
        // [1 2] is shared by five sequences, [3 4] by three of them; 6 is too short to be shared.
        assert_eq!(
            lengths(&packed),
            [
                (2, None),
                (2, Some(0)),
                (1, Some(1)),
                (2, Some(1)),
                (2, Some(1)),
                (1, Some(0)),
                (2, None)
            ]
        );
        let (one, places) = PackedTokens::sharing_prefixes(&sequences, 1);
        assert_sequences(&one, &places, &sequences);
        assert_eq!(one.ids.len(), 11);
        let (none, places) = PackedTokens::sharing_prefixes(&sequences, 100);
        assert_sequences(&none, &places, &sequences);
        let all: usize = sequences.iter().map(|sequence| sequence.len()).sum();
        assert_eq!(none.ids.len(), all);
    }

    #[test]
    fn equal_sequences_and_prefixes_of_others_are_packed_once() {
        let sequences: [&[u32]; 3] = [&[1, 2, 3], &[1, 2, 3], &[1, 2, 3, 4]];
        let (packed, places) = PackedTokens::sharing_prefixes(&sequences, 3);
        assert_sequences(&packed, &places, &sequences);
        assert_eq!(lengths(&packed), [(3, None), (1, Some(0))]);
    }

    #[test]
    fn segments_that_are_no_prefix_tree_are_refused() {
        let mut packed = PackedTokens::from_sequences([&[1, 2][..], &[3]]);
        packed.segments[0].parent = Some(1);
        let config = crate::model::tests::config();
        assert!(matches!(
            packed.check(&config),
            Err(PackedError::Segments { .. })
        ));
    }

    #[test]
    fn sequences_whose_length_changes_their_frequencies_share_nothing_and_compute_as_alone() {
        let config = LlamaConfig {
            max_position_embeddings: 8,
            rope_scaling: crate::RopeScaling::Dynamic { factor: 3.0 },
            ..crate::model::tests::config()
        };
        assert_eq!(config.positions(), 24);
        let whole: Vec<u32> = (1..=20).collect();
        let sequences: [&[u32]; 5] = [&whole[..7], &whole[..12], &whole[..8], &whole, &whole[..12]];
        let (shared, _) = PackedTokens::sharing_prefixes(&sequences, 2);
        assert!(matches!(
            shared.check(&config),
            Err(PackedError::Shared { .. })
        ));
        let (packed, places) = PackedTokens::sharing_for(&sequences, 2, &config);
        packed.check(&config).unwrap();
        // Only the two short sequences share a prefix.
        assert_eq!(packed.ids.len(), 8 + 12 + 20 + 12);
        for (sequence, places) in sequences.iter().zip(&places) {
            let ids = places.iter().map(|place| packed.ids[*place as usize]);
            assert_eq!(ids.collect::<Vec<_>>(), *sequence);
        }
        let model = crate::Llama::random(&config, 1, &Device::flex());
        let logits = |packed: &PackedTokens| {
            let logits = model.logits(model.hidden_states(packed));
            logits.into_data().try_to_vec::<f32>().unwrap()
        };
        let (vocab, together) = (config.vocab_size, logits(&packed));
        for (sequence, places) in sequences.iter().zip(&places) {
            let alone = logits(&PackedTokens::from_sequences([*sequence]));
            for (alone, place) in alone.chunks_exact(vocab).zip(places) {
                let together = &together[*place as usize * vocab..][..vocab];
                for (one, other) in alone.iter().zip(together) {
                    // f32 sums in another order, of logits of about 10.
                    assert!((one - other).abs() < 2e-5, "{one} {other}");
                }
            }
        }
        // The same prefix in a longer sequence has other frequencies, and so other logits.
        let at = |sequence: usize| &together[places[sequence][7] as usize * vocab..][..vocab];
        let difference = at(1).iter().zip(at(3)).map(|(a, b)| (a - b).abs());
        assert!(difference.fold(0.0, f32::max) > 1e-3);
    }
}
