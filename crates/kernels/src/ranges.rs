//! Which tokens of a packed sequence attend to which: ranges on the host.

use std::ops::Range;

/// Consecutive tokens of one sequence, or of several that share this prefix. Segments form a prefix tree (trie).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The number of its tokens.
    pub length: usize,
    /// The segment that comes before this one in its sequences; a parent has the smaller index.
    pub parent: Option<usize>,
}

/// Where each segment starts in the packed sequence.
pub fn starts(segments: &[Segment]) -> Vec<usize> {
    let mut start = 0;
    let lengths = segments.iter().map(|segment| segment.length);
    lengths
        .map(|length| {
            start += length;
            start - length
        })
        .collect()
}

/// The position of each segment's first token in its sequences.
pub fn offsets(segments: &[Segment]) -> Vec<usize> {
    let mut offsets: Vec<usize> = Vec::with_capacity(segments.len());
    for segment in segments {
        let offset = segment
            .parent
            .map_or(0, |parent| offsets[parent] + segments[parent].length);
        offsets.push(offset);
    }
    offsets
}

/// One segment's tokens and the tokens before them in their sequence, as ranges of the packed sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentRanges {
    /// The segment's own tokens.
    pub own: Range<usize>,
    /// The tokens before them, adjacent ranges joined.
    pub prefix: Vec<Range<usize>>,
    /// The number of tokens in `prefix`, which is the position of the first own token.
    pub offset: usize,
    /// The segments whose tokens attend to this segment's tokens, the segment itself first.
    pub descendants: Vec<usize>,
}

impl SegmentRanges {
    /// The ranges of the packed sequence that hold the tokens at these positions.
    pub fn places(&self, positions: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let ranges = self.prefix.iter().chain(std::iter::once(&self.own));
        let ranges = ranges.scan(0, |position, range| {
            *position += range.len();
            Some((*position - range.len(), range.clone()))
        });
        ranges.filter_map(move |(first, range)| {
            let from = positions.start.max(first);
            let to = positions.end.min(first + range.len());
            (from < to).then(|| range.start + from - first..range.start + to - first)
        })
    }

    /// The indices of the tokens in `prefix`, then of the segment's own.
    pub fn tokens(&self) -> impl Iterator<Item = usize> {
        let prefix = self.prefix.iter().cloned().flatten();
        prefix.chain(self.own.clone())
    }
}

/// The ranges of every segment of a packed sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttentionRanges {
    /// One per segment.
    pub segments: Vec<SegmentRanges>,
    /// A token attends to itself and to the tokens before it, this many in all: a sliding window (Beltagy et al., 2020,
    /// <https://arxiv.org/abs/2004.05150>). `None` if no sequence is longer.
    pub window: Option<usize>,
}

impl AttentionRanges {
    /// The ranges of these segments, with a sliding window of `window` tokens.
    ///
    /// # Panics
    ///
    /// If a parent does not come before its child, or the window is empty.
    pub fn new(segments: &[Segment], window: Option<usize>) -> Self {
        assert_ne!(window, Some(0), "a token attends to itself at least");
        let mut ranges: Vec<SegmentRanges> = Vec::with_capacity(segments.len());
        let places = starts(segments).into_iter().zip(offsets(segments));
        for (index, (segment, (start, offset))) in segments.iter().zip(places).enumerate() {
            let mut prefix = Vec::new();
            if let Some(parent) = segment.parent {
                prefix.clone_from(&ranges[parent].prefix);
                let own = ranges[parent].own.clone();
                match prefix.last_mut() {
                    Some(last) if last.end == own.start => last.end = own.end,
                    _ => prefix.push(own),
                }
            }
            ranges.push(SegmentRanges {
                own: start..start + segment.length,
                prefix,
                offset,
                descendants: vec![index],
            });
            let mut ancestor = segment.parent;
            while let Some(parent) = ancestor {
                ranges[parent].descendants.push(index);
                ancestor = segments[parent].parent;
            }
        }
        let longest = ranges.iter().map(|span| span.offset + span.own.len()).max();
        Self {
            window: window.filter(|window| Some(*window) < longest),
            segments: ranges,
        }
    }

    /// The position of the first token in the window of the token at `position`.
    pub fn oldest(&self, position: usize) -> usize {
        match self.window {
            Some(window) => (position + 1).saturating_sub(window),
            None => 0,
        }
    }

    /// The number of pairs of a token and a token that it attends to.
    #[cfg(feature = "cube")]
    pub(crate) fn pairs(&self) -> usize {
        let of_segment = |segment: &SegmentRanges| -> usize {
            let positions = segment.offset..segment.offset + segment.own.len();
            positions.map(|at| at + 1 - self.oldest(at)).sum()
        };
        self.segments.iter().map(of_segment).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_the_tokens_that_a_sequence_attends_to() {
        let segment = |length, parent| Segment { length, parent };
        // [1 2] [3 4] [5] [6]: the sequences 1 2 3 4, 1 2 5 and 1 2 5 6.
        let segments = [
            segment(2, None),
            segment(2, Some(0)),
            segment(1, Some(0)),
            segment(1, Some(2)),
        ];
        let ranges = AttentionRanges::new(&segments, None).segments;
        assert_eq!(ranges[1].prefix, std::slice::from_ref(&(0..2)));
        assert_eq!(ranges[3].prefix, [0..2, 4..5]);
        assert_eq!(ranges[3].offset, 3);
        assert_eq!(ranges[0].descendants, [0, 1, 2, 3]);
        assert_eq!(ranges[2].descendants, [2, 3]);
        let places = |positions| ranges[3].places(positions).collect::<Vec<_>>();
        assert_eq!(places(0..4), [0..2, 4..5, 5..6]);
        assert_eq!(places(1..3), [1..2, 4..5]);
    }

    #[test]
    fn a_window_counts_positions_of_the_sequence() {
        let segment = |length, parent| Segment { length, parent };
        let segments = [segment(3, None), segment(4, Some(0)), segment(2, None)];
        let ranges = AttentionRanges::new(&segments, Some(3));
        assert_eq!([0, 2, 3, 6].map(|at| ranges.oldest(at)), [0, 0, 1, 4]);
        // No sequence is longer than 7 tokens.
        assert_eq!(AttentionRanges::new(&segments, Some(7)).window, None);
        assert_eq!(AttentionRanges::new(&segments, Some(6)).window, Some(6));
    }
}
