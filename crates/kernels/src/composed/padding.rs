//! Pads the segments of a packed batch, for attention as a batch of matrix products.

use std::ops::Range;

use burn::tensor::{DType, Int, Tensor};

use crate::attention::Heads;
use crate::ranges::{AttentionRanges, SegmentRanges};
use crate::uploads::{Floats, Ints, Uploaded, Uploads};

/// A packed batch with its segments padded to the longest: queries `[segments, queries]`, keys `[segments, keys]`. Only
/// the tensors of attention are padded. This costs little compared with the linear layers, and avoids scores between
/// different sequences.
#[derive(Debug, Clone)]
pub struct Padded {
    pub segments: usize,
    /// The length of the longest segment.
    pub queries: usize,
    /// The length of the longest sequence.
    pub keys: usize,
    /// `None` if all segments have the same length.
    padding: Option<Padding>,
    /// `None` without shared prefixes: keys then have the layout of queries.
    shared: Option<Shared>,
    /// The tiles of the queries; the scores of one tile exist at a time.
    pub tiles: Vec<Tile>,
}

/// A tile of queries, whose scores exist together.
#[derive(Debug, Clone)]
pub struct Tile {
    /// Their range in every segment.
    pub queries: Range<usize>,
    /// The number of keys, from the first on, that are visible to any of them.
    pub visible: usize,
    /// The last key that is visible to each query, `[segments or 1, 1, group · queries, 1]`: query heads that share a
    /// key head are adjacent.
    last_seen: Tensor<4>,
    /// The keys' indices, `[1, 1, 1, visible]`.
    numbers: Tensor<4>,
    /// The length of the sliding window, if there is one.
    window: Option<usize>,
}

#[derive(Debug, Clone)]
struct Padding {
    /// The packed index of each padded index, `[segments · queries]`; the padding repeats a token.
    places: Tensor<1, Int>,
    /// The padded index of each packed index, `[n]`.
    back: Tensor<1, Int>,
    /// 1 for a token, 0 for padding, `[segments · queries, 1]`.
    tokens: Tensor<2>,
}

/// The layout of keys if several segments share a prefix.
#[derive(Debug, Clone)]
struct Shared {
    /// The packed index of each padded key, `[segments · keys]`.
    places: Tensor<1, Int>,
    /// Each token's index among the keys of its own segment, `[n]`.
    own: Tensor<1, Int>,
    /// For each token that is visible to several segments, its indices among the keys of the others: `[times ·
    /// several]`. A token that is visible to fewer segments repeats an index.
    copies: Tensor<1, Int>,
    /// 1 for such an index, 0 for a repeated one: `[times, several, 1]`.
    counts: Tensor<3>,
    /// Each token's index among those that are visible to several segments, `[n]`; arbitrary for other tokens.
    number: Tensor<1, Int>,
    /// 1 for a token that is visible to several segments, else 0: `[n, 1]`.
    several: Tensor<2>,
}

/// A [`Padded`] whose indices and tables are about to be copied to the device.
#[derive(Debug)]
pub struct PlannedPadded {
    segments: usize,
    queries: usize,
    keys: usize,
    tokens: usize,
    group: usize,
    window: Option<usize>,
    padding: Option<(Ints, Ints, Floats)>,
    shared: Option<PlannedShared>,
    /// The number of segments in `last_seen`: all, or 1 if they are alike.
    apart: usize,
    last_seen: Floats,
    numbers: Floats,
    tiles: Vec<(Range<usize>, usize)>,
}

#[derive(Debug)]
struct PlannedShared {
    places: Ints,
    own: Ints,
    copies: Ints,
    counts: Floats,
    number: Ints,
    several: Floats,
    /// The largest number of other segments to which a token is visible, and the number of tokens with any.
    shape: [usize; 2],
}

/// The alignment of a tile's first query with which a GPU can bind a part of a buffer without a copy.
const ALIGNMENT: usize = 64;

impl PlannedPadded {
    /// Plans tiles of at most `scores_at_once` scores.
    pub fn new(
        ranges: &AttentionRanges,
        heads: Heads,
        scores_at_once: usize,
        uploads: &mut Uploads,
    ) -> Self {
        let group = heads.query / heads.key;
        let window = ranges.window;
        let ranges = &ranges.segments;
        let segments = ranges.len();
        let queries = ranges.iter().map(|span| span.own.len()).max().unwrap_or(0);
        let ends = ranges.iter().map(|span| span.offset + span.own.len());
        let keys = ends.max().unwrap_or(0);
        let tokens = ranges.iter().map(|span| span.own.len()).sum();
        let even = tokens == segments * queries;
        let furthest = ranges.iter().map(|span| span.offset).max().unwrap_or(0);

        let padding = (!even).then(|| {
            let mut places = Vec::with_capacity(segments * queries);
            let mut back = Vec::with_capacity(tokens);
            let mut is_token = Vec::with_capacity(segments * queries);
            for (index, span) in ranges.iter().enumerate() {
                // The padding repeats the first token; any token would do.
                let own = span.own.clone();
                let padded = queries - own.len();
                back.extend((0..own.len()).map(|i| (index * queries + i) as i32));
                is_token.extend((0..queries).map(|i| if i < own.len() { 1.0 } else { 0.0 }));
                places.extend(own.clone().map(|token| token as i32));
                places.extend(std::iter::repeat_n(own.start as i32, padded));
            }
            (
                uploads.ints(places),
                uploads.ints(back),
                uploads.floats(is_token),
            )
        });
        let shared = (furthest > 0).then(|| PlannedShared::new(ranges, keys, tokens, uploads));

        let apart = if furthest > 0 { segments } else { 1 };
        let last_seen = ranges[..apart].iter().flat_map(|span| {
            (0..queries)
                .flat_map(move |query| std::iter::repeat_n((span.offset + query) as f32, group))
        });
        let last_seen = uploads.floats(last_seen);
        let numbers = uploads.floats((0..keys).map(|key| key as f32));

        let of_query = segments * heads.query * keys;
        let fitting = (scores_at_once / of_query.max(1)).clamp(1, queries.max(1));
        let tiles = queries.div_ceil(fitting).max(1);
        let mut size = queries.div_ceil(tiles);
        if size.next_multiple_of(ALIGNMENT) <= fitting {
            size = size.next_multiple_of(ALIGNMENT);
        }
        let tiles = (0..queries).step_by(size.max(1)).map(|first| {
            let end = queries.min(first + size);
            (first..end, keys.min(furthest + end))
        });
        Self {
            segments,
            queries,
            keys,
            tokens,
            group,
            window,
            padding,
            shared,
            apart,
            last_seen,
            numbers,
            tiles: tiles.collect(),
        }
    }

    pub fn on_device(self, uploaded: &Uploaded) -> Padded {
        let rows = self.queries * self.group;
        let last_seen = uploaded.floats(&self.last_seen, [self.apart, 1, rows, 1]);
        let numbers = uploaded.floats(&self.numbers, [1, 1, 1, self.keys]);
        let tiles = self.tiles.into_iter().map(|(queries, visible)| Tile {
            last_seen: last_seen.clone().narrow(
                2,
                queries.start * self.group,
                queries.len() * self.group,
            ),
            numbers: numbers.clone().narrow(3, 0, visible),
            queries,
            visible,
            window: self.window,
        });
        Padded {
            segments: self.segments,
            queries: self.queries,
            keys: self.keys,
            padding: self.padding.map(|(places, back, tokens)| Padding {
                places: uploaded.ints(&places),
                back: uploaded.ints(&back),
                tokens: uploaded.floats(&tokens, [self.segments * self.queries, 1]),
            }),
            shared: self
                .shared
                .map(|shared| shared.on_device(self.tokens, uploaded)),
            tiles: tiles.collect(),
        }
    }
}

impl PlannedShared {
    fn new(ranges: &[SegmentRanges], keys: usize, tokens: usize, uploads: &mut Uploads) -> Self {
        let mut key_places = Vec::with_capacity(ranges.len() * keys);
        // Every index of every token among the keys of all segments.
        let mut places: Vec<Vec<i32>> = vec![Vec::new(); tokens];
        let mut own = vec![0; tokens];
        for (index, span) in ranges.iter().enumerate() {
            for (key, token) in span.tokens().enumerate() {
                key_places.push(token as i32);
                let place = (index * keys + key) as i32;
                if span.own.contains(&token) {
                    own[token] = place
                } else {
                    places[token].push(place)
                }
            }
            let padded = keys - span.offset - span.own.len();
            key_places.extend(std::iter::repeat_n(span.own.start as i32, padded));
        }
        let times = places.iter().map(Vec::len).max().unwrap_or(0);
        let several: Vec<usize> = (0..tokens)
            .filter(|token| !places[*token].is_empty())
            .collect();
        let mut number = vec![0; tokens];
        for (index, token) in several.iter().enumerate() {
            number[*token] = index as i32;
        }
        let copy = |time: usize, token: &usize| places[*token].get(time).copied();
        let all = || (0..times).flat_map(|time| several.iter().map(move |token| (time, token)));
        let copies = all().map(|(time, token)| copy(time, token).unwrap_or(own[*token]));
        let counts = all().map(|(time, token)| copy(time, token).map_or(0.0, |_| 1.0));
        let is_several = places
            .iter()
            .map(|places| if places.is_empty() { 0.0 } else { 1.0 });
        Self {
            copies: uploads.ints(copies),
            counts: uploads.floats(counts),
            several: uploads.floats(is_several),
            places: uploads.ints(key_places),
            own: uploads.ints(own),
            number: uploads.ints(number),
            shape: [times, several.len()],
        }
    }

    fn on_device(self, tokens: usize, uploaded: &Uploaded) -> Shared {
        let [times, several] = self.shape;
        Shared {
            places: uploaded.ints(&self.places),
            own: uploaded.ints(&self.own),
            copies: uploaded.ints(&self.copies),
            counts: uploaded.floats(&self.counts, [times, several, 1]),
            number: uploaded.ints(&self.number),
            several: uploaded.floats(&self.several, [tokens, 1]),
        }
    }
}

impl Padded {
    /// Whether nothing is padded or shared: every token has one index among the queries and one among the keys.
    pub fn is_plain(&self) -> bool {
        self.padding.is_none() && self.shared.is_none()
    }

    /// Pads queries: `[n, width]` → `[segments · queries, width]`.
    pub fn spread_queries(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.padding {
            Some(padding) => x.select(0, padding.places.clone()),
            None => x,
        }
    }

    /// As [`spread_queries`](Self::spread_queries), with zeros as padding, so that no gradient counts twice.
    pub fn spread_gradient(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.padding {
            Some(padding) => {
                let tokens = padding.tokens.clone().cast(x.dtype());
                x.select(0, padding.places.clone()) * tokens
            }
            None => x,
        }
    }

    /// The opposite of [`spread_queries`](Self::spread_queries).
    pub fn gather_queries(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.padding {
            Some(padding) => x.select(0, padding.back.clone()),
            None => x,
        }
    }

    /// Pads keys or values: `[n, width]` → `[segments · keys, width]`.
    pub fn spread_keys(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.shared {
            Some(shared) => x.select(0, shared.places.clone()),
            None => self.spread_queries(x),
        }
    }

    /// Sums the gradients of each key: `[segments · keys, width]` → `[n, width]` for `n` tokens.
    pub fn sum_keys(&self, x: Tensor<2>) -> Tensor<2> {
        let Some(shared) = &self.shared else {
            return self.gather_queries(x);
        };
        let width = x.dims()[1];
        let [times, several, _] = shared.counts.dims();
        // The gradient in each token's own segment, plus the sum over the other segments to which the token is visible.
        let copies = x.clone().select(0, shared.copies.clone());
        let copies = copies.reshape([times, several, width]).cast(DType::F32);
        let sums = (copies * shared.counts.clone())
            .sum_dim(0)
            .reshape([several, width]);
        let own = x.clone().select(0, shared.own.clone()).cast(DType::F32);
        let sums = sums.select(0, shared.number.clone()) * shared.several.clone();
        (own + sums).cast(x.dtype())
    }
}

impl Tile {
    /// The attention mask of a tile, added to its scores: 0 for a visible key, very negative elsewhere, within the
    /// range of `dtype`. `[segments or 1, 1, group · queries, visible]`, f32.
    ///
    /// It is arithmetic on two small tensors, so that Burn fuses it into the kernels that need it. Keys after a
    /// sequence's end follow every query of that sequence, so the causal mask hides them. The results of padded queries
    /// are never read.
    pub fn mask(&self, dtype: DType) -> Tensor<4> {
        let masked = match dtype {
            DType::F16 => MASKED_F16,
            _ => MASKED,
        };
        let behind = self.last_seen.clone() - self.numbers.clone();
        let hidden = behind.clone().clamp(-1.0, 0.0);
        let hidden = match self.window {
            Some(window) => {
                let outside = behind.neg().add_scalar(window as f64 - 1.0);
                hidden + outside.clamp(-1.0, 0.0)
            }
            None => hidden,
        };
        hidden.mul_scalar(-masked)
    }
}

/// Finite, because shading languages do not promise infinities; e to this power is 0 in f32.
pub const MASKED: f32 = -1e30;

/// As [`MASKED`] in f16: half of the lowest number, so that a score added to it stays one.
const MASKED_F16: f32 = -32752.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::Segment;
    use burn::tensor::Device;

    const HEADS: Heads = Heads {
        query: 4,
        key: 2,
        d: 8,
    };

    fn padded(
        segments: &[(usize, Option<usize>)],
        scores_at_once: usize,
    ) -> (AttentionRanges, Padded) {
        let segments = segments.iter();
        let segments = segments.map(|(length, parent)| Segment {
            length: *length,
            parent: *parent,
        });
        let ranges = AttentionRanges::new(&segments.collect::<Vec<_>>(), None);
        let mut uploads = Uploads::default();
        let planned = PlannedPadded::new(&ranges, HEADS, scores_at_once, &mut uploads);
        (ranges, planned.on_device(&uploads.send(&Device::flex())))
    }

    #[test]
    fn gradients_of_a_shared_prefix_are_summed_over_its_sequences() {
        // The sequences 1 2 3 4 5, 1 2 3 4 6 7 8, 1 2 9 and 11.
        let segments = [
            (2, None),
            (2, Some(0)),
            (1, Some(1)),
            (3, Some(1)),
            (1, Some(0)),
            (1, None),
        ];
        let (ranges, padded) = padded(&segments, 1 << 20);
        let tokens = 10;
        let places = padded.segments * padded.keys;
        let values: Vec<f32> = (0..places * 2).map(|i| (i as f32 * 0.37).sin()).collect();
        let data = burn::tensor::TensorData::new(values.clone(), [places, 2]);
        let x = Tensor::<2>::from_data(data, &Device::flex());
        let mut expected = vec![0f32; tokens * 2];
        for (segment, span) in ranges.segments.iter().enumerate() {
            for (key, token) in span.tokens().enumerate() {
                for i in 0..2 {
                    expected[token * 2 + i] += values[(segment * padded.keys + key) * 2 + i];
                }
            }
        }
        let expected = burn::tensor::TensorData::new(expected, [tokens, 2]);
        let tolerance = burn::tensor::Tolerance::absolute(1e-6);
        let got = padded.sum_keys(x).into_data();
        got.assert_approx_eq::<f32>(&expected, tolerance);
    }

    #[test]
    fn only_keys_up_to_its_last_query_are_visible_to_a_tile() {
        let (_, padded) = padded(&[(300, None)], 64 * HEADS.query * 300);
        let tiles: Vec<_> = padded
            .tiles
            .iter()
            .map(|tile| (tile.queries.clone(), tile.visible))
            .collect();
        assert_eq!(
            tiles,
            [
                (0..64, 64),
                (64..128, 128),
                (128..192, 192),
                (192..256, 256),
                (256..300, 300)
            ]
        );
        let mask = padded.tiles[1].mask(DType::F32);
        let group = mask.dims()[2] / 64;
        let mask = mask.into_data().try_to_vec::<f32>().unwrap();
        for query in 0..64 {
            for key in 0..128 {
                let value = mask[query * group * 128 + key];
                assert_eq!(value < -1e29, key > 64 + query, "query {query}, key {key}");
                assert!(value == 0.0 || value < -1e29);
            }
        }
    }
}
