//! Rows packed into one sequence without padding, their common beginnings once.

use burn::tensor::{DType, Device};
use kernels::{
    AttentionLayout, Heads, PlannedAttention, PlannedRotary, RotaryTables, SCORES_AT_ONCE, Segment,
    Uploaded, Uploads,
};

use crate::LlamaConfig;
use crate::rope::{self, Place};

/// Token rows in one sequence. A row attends only to itself, and its positions start from 0.
///
/// Rows that begin alike can share that beginning: the sequence is then a forest of segments, and a
/// row is a path from a root to where its last token lies. Since a token's hidden state depends on
/// the tokens before it only, the shared part is computed once without changing anything; its
/// gradient is the sum of its rows' gradients.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackedTokens {
    /// The token ids of all segments, `n` in all.
    pub ids: Vec<u32>,
    /// The segments, in the order of their ids; a parent comes before its children.
    pub segments: Vec<Segment>,
}

/// Why tokens cannot be packed for a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackedError {
    /// No token at all.
    #[error("a batch holds no tokens")]
    Empty,
    /// The lengths do not add up, one is zero, or a parent does not come before its child.
    #[error("{tokens} tokens, but segments {segments:?}")]
    Segments {
        /// Tokens given.
        tokens: usize,
        /// Segments given.
        segments: Vec<Segment>,
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
    /// Not one token a row.
    #[error("{got} tokens for {expected} rows that are being continued")]
    Rows {
        /// Rows there are.
        expected: usize,
        /// Tokens given.
        got: usize,
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
    /// Rows of other lengths share tokens with a row that is too long for it.
    #[error(
        "a row of {length} tokens shares its beginning with others; under the model's rope type \"dynamic\" rows of \
         more than {max_position_embeddings} tokens have to stand alone"
    )]
    Shared {
        /// The row's length.
        length: usize,
        /// Up to where rows may share.
        max_position_embeddings: usize,
    },
}

impl PackedTokens {
    /// Packs rows, each for itself.
    pub fn from_rows<'a>(rows: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut packed = Self::default();
        for row in rows {
            packed.push(row, None);
        }
        packed
    }

    /// Packs rows that share what they begin with alike, if it has at least `least` tokens; and where
    /// the tokens of each row lie in the packed sequence.
    pub fn sharing_prefixes(rows: &[&[u32]], least: usize) -> (Self, Vec<Vec<u32>>) {
        let mut sharing = Sharing {
            rows,
            least: least.max(1),
            packed: Self::default(),
            places: vec![Vec::new(); rows.len()],
        };
        let all: Vec<usize> = (0..rows.len())
            .filter(|row| !rows[*row].is_empty())
            .collect();
        for group in sharing.groups(&all, 0) {
            sharing.add(&group, 0, None);
        }
        (sharing.packed, sharing.places)
    }

    /// As [`sharing_prefixes`](Self::sharing_prefixes), but rows whose frequencies depend on their length stand alone.
    pub fn sharing_for(
        rows: &[&[u32]],
        least: usize,
        config: &LlamaConfig,
    ) -> (Self, Vec<Vec<u32>>) {
        let alone = |row: &&[u32]| config.rotates_by_length(row.len());
        if !rows.iter().any(alone) {
            return Self::sharing_prefixes(rows, least);
        }
        let short = rows
            .iter()
            .map(|row| if alone(row) { &[][..] } else { *row });
        let (mut packed, mut places) = Self::sharing_prefixes(&short.collect::<Vec<_>>(), least);
        for (row, places) in rows.iter().zip(&mut places).filter(|(row, _)| alone(row)) {
            let first = packed.ids.len() as u32;
            places.extend(first..first + row.len() as u32);
            packed.push(row, None);
        }
        (packed, places)
    }

    /// Adds a segment and gives its index.
    fn push(&mut self, ids: &[u32], parent: Option<usize>) -> usize {
        self.ids.extend_from_slice(ids);
        self.segments.push(Segment {
            length: ids.len(),
            parent,
        });
        self.segments.len() - 1
    }

    /// Where each segment starts in the sequence.
    pub fn starts(&self) -> Vec<usize> {
        kernels::starts(&self.segments)
    }

    /// The position of each segment's first token in its rows.
    pub fn offsets(&self) -> Vec<usize> {
        kernels::offsets(&self.segments)
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

    /// Each token's position within its row.
    pub fn positions(&self) -> Vec<u32> {
        let segments = self.segments.iter().zip(self.offsets());
        segments
            .flat_map(|(segment, offset)| offset as u32..(offset + segment.length) as u32)
            .collect()
    }

    /// Each token's place. A segment's end stands for its rows': where the length matters, [`check`](Self::check)
    /// lets a row be one segment only.
    fn places(&self) -> Vec<Place> {
        let segments = self.segments.iter().zip(self.offsets());
        let places = segments.flat_map(|(segment, offset)| {
            let length = offset + segment.length;
            (offset as u32..length as u32).map(move |position| Place { position, length })
        });
        places.collect()
    }
}

/// Builds a forest of common beginnings.
struct Sharing<'a> {
    rows: &'a [&'a [u32]],
    least: usize,
    packed: PackedTokens,
    places: Vec<Vec<u32>>,
}

impl Sharing<'_> {
    /// Adds what these rows have from `start` on. They agree in the token there.
    fn add(&mut self, rows: &[usize], start: usize, parent: Option<usize>) {
        let end = self.agree_until(rows, start);
        if rows.len() == 1 || end - start >= self.least {
            let segment = self.segment(rows, start, end, parent);
            let longer: Vec<usize> = rows
                .iter()
                .copied()
                .filter(|row| self.rows[*row].len() > end)
                .collect();
            for group in self.groups(&longer, end) {
                self.add(&group, end, Some(segment));
            }
            return;
        }
        // Too little to share among all: perhaps some of them agree for longer.
        let (longer, ended): (Vec<usize>, Vec<usize>) =
            rows.iter().partition(|row| self.rows[**row].len() > end);
        for row in ended {
            self.segment(&[row], start, end, parent);
        }
        for group in self.groups(&longer, end) {
            match group[..] {
                [row] => {
                    self.segment(&[row], start, self.rows[row].len(), parent);
                }
                _ => self.add(&group, start, parent),
            }
        }
    }

    /// Adds one segment of rows that agree from `start` to `end`.
    fn segment(
        &mut self,
        rows: &[usize],
        start: usize,
        end: usize,
        parent: Option<usize>,
    ) -> usize {
        let first = self.packed.ids.len() as u32;
        for row in rows {
            self.places[*row].extend(first..first + (end - start) as u32);
        }
        self.packed.push(&self.rows[rows[0]][start..end], parent)
    }

    /// Rows by their token at `at`, in the order of their first rows.
    fn groups(&self, rows: &[usize], at: usize) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut by_token = std::collections::HashMap::new();
        for row in rows {
            let group = *by_token.entry(self.rows[*row][at]).or_insert(groups.len());
            match groups.get_mut(group) {
                Some(group) => group.push(*row),
                None => groups.push(vec![*row]),
            }
        }
        groups
    }

    /// Where the rows stop having the same tokens, or one of them ends.
    fn agree_until(&self, rows: &[usize], start: usize) -> usize {
        let first = self.rows[rows[0]];
        let agree = |row: &usize| {
            let pairs = first[start..].iter().zip(&self.rows[*row][start..]);
            start + pairs.take_while(|(a, b)| a == b).count()
        };
        rows.iter().map(agree).min().unwrap_or(start)
    }
}

/// What every layer needs to know of a packed sequence, put on the device once per batch.
#[derive(Debug, Clone)]
pub struct PackedContext {
    /// The type that products are computed in.
    pub(crate) dtype: DType,
    /// Which tokens attend to which.
    pub(crate) attention: AttentionLayout,
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

    /// For tokens at these positions whose attention a cache computes.
    pub(crate) fn of_positions(
        positions: &[u32],
        config: &LlamaConfig,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let mut uploads = Uploads::default();
        // Read one by one, each when its row had as many tokens.
        let places = positions.iter().map(|position| Place {
            position: *position,
            length: *position as usize + 1,
        });
        let places: Vec<Place> = places.collect();
        let rotary = rope::planned(&places, config, &mut uploads);
        Self {
            dtype,
            attention: AttentionLayout::default(),
            rotary: rotary.on_device(&uploads.send(device)),
        }
    }
}

/// A context whose indices and tables are about to be copied to the device.
pub(crate) struct Planned {
    dtype: DType,
    attention: PlannedAttention,
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
        let segments = &packed.segments;
        Self {
            dtype,
            attention: PlannedAttention::new(
                segments,
                heads,
                dtype,
                device,
                scores_at_once,
                uploads,
            ),
            rotary: rope::planned(&packed.places(), config, uploads),
        }
    }

    pub(crate) fn on_device(self, uploaded: &Uploaded) -> PackedContext {
        PackedContext {
            dtype: self.dtype,
            attention: self.attention.on_device(uploaded),
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

    /// Every row read back from where its tokens lie, with its positions.
    fn assert_rows(packed: &PackedTokens, places: &[Vec<u32>], rows: &[&[u32]]) {
        let positions = packed.positions();
        for (places, row) in places.iter().zip(rows) {
            let ids: Vec<u32> = places.iter().map(|i| packed.ids[*i as usize]).collect();
            assert_eq!(ids, *row);
            let read: Vec<u32> = places.iter().map(|i| positions[*i as usize]).collect();
            assert_eq!(read, (0..row.len() as u32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn positions_restart_in_each_row() {
        let packed = PackedTokens::from_rows([&[5, 6, 7][..], &[8, 9]]);
        assert_eq!(lengths(&packed), [(3, None), (2, None)]);
        assert_eq!(packed.positions(), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn common_beginnings_are_packed_once_at_every_level() {
        let rows: [&[u32]; 6] = [
            &[1, 2, 3, 4, 5],
            &[9, 9],
            &[1, 2, 3, 4, 6, 7],
            &[1, 2, 8],
            &[1, 2, 3, 4, 6, 8],
            &[1, 2],
        ];
        let (packed, places) = PackedTokens::sharing_prefixes(&rows, 2);
        assert_rows(&packed, &places, &rows);
        // [1 2] by five rows, [3 4] by three of them; 6 alone is too short to be shared.
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
        let (one, places) = PackedTokens::sharing_prefixes(&rows, 1);
        assert_rows(&one, &places, &rows);
        assert_eq!(one.ids.len(), 11);
        let (none, places) = PackedTokens::sharing_prefixes(&rows, 100);
        assert_rows(&none, &places, &rows);
        let all: usize = rows.iter().map(|row| row.len()).sum();
        assert_eq!(none.ids.len(), all);
    }

    #[test]
    fn equal_rows_and_rows_within_rows_lie_in_one_place() {
        let rows: [&[u32]; 3] = [&[1, 2, 3], &[1, 2, 3], &[1, 2, 3, 4]];
        let (packed, places) = PackedTokens::sharing_prefixes(&rows, 3);
        assert_rows(&packed, &places, &rows);
        assert_eq!(lengths(&packed), [(3, None), (1, Some(0))]);
    }

    #[test]
    fn what_cannot_be_a_forest_is_refused() {
        let mut packed = PackedTokens::from_rows([&[1, 2][..], &[3]]);
        packed.segments[0].parent = Some(1);
        let config = crate::model::tests::config();
        assert!(matches!(
            packed.check(&config),
            Err(PackedError::Segments { .. })
        ));
    }

    #[test]
    fn rows_whose_length_changes_their_angles_stand_alone_and_are_as_alone() {
        let config = LlamaConfig {
            max_position_embeddings: 8,
            rope_scaling: crate::RopeScaling::Dynamic { factor: 3.0 },
            ..crate::model::tests::config()
        };
        assert_eq!(config.positions(), 24);
        let whole: Vec<u32> = (1..=20).collect();
        let rows: [&[u32]; 5] = [&whole[..7], &whole[..12], &whole[..8], &whole, &whole[..12]];
        let (shared, _) = PackedTokens::sharing_prefixes(&rows, 2);
        assert!(matches!(
            shared.check(&config),
            Err(PackedError::Shared { .. })
        ));
        let (packed, places) = PackedTokens::sharing_for(&rows, 2, &config);
        packed.check(&config).unwrap();
        // Only the two short rows share.
        assert_eq!(packed.ids.len(), 8 + 12 + 20 + 12);
        for (row, places) in rows.iter().zip(&places) {
            let ids = places.iter().map(|place| packed.ids[*place as usize]);
            assert_eq!(ids.collect::<Vec<_>>(), *row);
        }
        let model = crate::Llama::random(&config, 1, &Device::flex());
        let logits = |packed: &PackedTokens| {
            let logits = model.logits(model.hidden_states(packed));
            logits.into_data().try_to_vec::<f32>().unwrap()
        };
        let (vocab, together) = (config.vocab_size, logits(&packed));
        for (row, places) in rows.iter().zip(&places) {
            let alone = logits(&PackedTokens::from_rows([*row]));
            for (alone, place) in alone.chunks_exact(vocab).zip(places) {
                let together = &together[*place as usize * vocab..][..vocab];
                for (one, other) in alone.iter().zip(together) {
                    // f32 sums in another order, on scores of about 10.
                    assert!((one - other).abs() < 2e-5, "{one} {other}");
                }
            }
        }
        // The same beginning in a longer row is another sequence: its second token is not what it was.
        let at = |row: usize| &together[places[row][7] as usize * vocab..][..vocab];
        let difference = at(1).iter().zip(at(3)).map(|(a, b)| (a - b).abs());
        assert!(difference.fold(0.0, f32::max) > 1e-3);
    }
}
