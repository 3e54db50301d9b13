//! Which tiles of keys a tile of queries visits, made on the host for the attention kernel.

use crate::ranges::{AttentionRanges, Segment};

/// The index tables of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// `[2, n]`: per token the number of its segment in a depth-first walk, then the end of the segment's subtree. With
    /// a sliding window `[3, n]`: then the first token of its window.
    pub spans: Vec<i32>,
    /// The tiles of keys of each tile of queries: where each list begins, the end of the last, the lists.
    pub keys_of: Vec<i32>,
    /// The tiles of queries of each tile of keys, in the same form.
    pub queries_of: Vec<i32>,
}

impl Tables {
    /// For tiles of `queries` tokens and of `keys` tokens.
    pub fn new(
        segments: &[Segment],
        ranges: &AttentionRanges,
        queries: usize,
        keys: usize,
    ) -> Self {
        let n = segments.iter().map(|segment| segment.length).sum();
        let seen = visible_tiles(ranges, n, queries, keys);
        let seen_by = (0..n.div_ceil(keys)).map(|key| {
            let lists = seen.iter().enumerate();
            let seeing = lists.filter(move |(_, list)| list.binary_search(&key).is_ok());
            seeing.map(|(query, _)| query).collect()
        });
        let queries_of = lists(&seen_by.collect::<Vec<_>>(), queries);
        let mut spans = spans(segments);
        if ranges.window.is_some() {
            spans.extend(oldest(ranges));
        }
        Self {
            spans,
            keys_of: lists(&seen, keys),
            queries_of,
        }
    }
}

/// The tiles of keys of each tile of queries, in order.
fn visible_tiles(
    ranges: &AttentionRanges,
    n: usize,
    queries: usize,
    keys: usize,
) -> Vec<Vec<usize>> {
    let mut seen = vec![vec![false; n.div_ceil(keys)]; n.div_ceil(queries)];
    for segment in &ranges.segments {
        let own = segment.own.clone();
        let position = |token: usize| segment.offset + token - own.start;
        let (first, end) = (own.start / queries, own.end.div_ceil(queries));
        for (tile, seen) in seen.iter_mut().enumerate().take(end).skip(first) {
            let (from, to) = (
                own.start.max(tile * queries),
                own.end.min((tile + 1) * queries),
            );
            let visible = ranges.oldest(position(from))..position(to);
            for range in segment.places(visible) {
                seen[range.start / keys..range.end.div_ceil(keys)].fill(true);
            }
        }
    }
    seen.iter()
        .map(|tiles| (0..tiles.len()).filter(|tile| tiles[*tile]).collect())
        .collect()
}

/// Lists of tiles of `size` tokens, as [`Tables::keys_of`] holds them.
fn lists(lists: &[Vec<usize>], size: usize) -> Vec<i32> {
    let mut begin = lists.len() + 1;
    let mut table: Vec<i32> = Vec::with_capacity(begin);
    for list in lists {
        table.push(begin as i32);
        begin += list.len();
    }
    table.push(begin as i32);
    table.extend(lists.iter().flatten().map(|tile| (tile * size) as i32));
    table
}

/// The first token of each token's window. Of the tokens of a sequence, those before it in the batch are outside.
fn oldest(ranges: &AttentionRanges) -> impl Iterator<Item = i32> {
    ranges.segments.iter().flat_map(|segment| {
        let positions = segment.offset..segment.offset + segment.own.len();
        positions.filter_map(|at| {
            let first = segment.places(ranges.oldest(at)..at + 1).next()?;
            Some(first.start as i32)
        })
    })
}

/// A walk through the forest of segments: where it enters and leaves the segment of each token.
fn spans(segments: &[Segment]) -> Vec<i32> {
    let mut size = vec![1; segments.len()];
    for (index, segment) in segments.iter().enumerate().rev() {
        if let Some(parent) = segment.parent {
            size[parent] += size[index];
        }
    }
    // The next free number within each segment's subtree, and among the roots.
    let mut next = vec![0; segments.len()];
    let mut next_root = 0;
    let mut enter = Vec::with_capacity(segments.len());
    for (index, segment) in segments.iter().enumerate() {
        let free = match segment.parent {
            Some(parent) => &mut next[parent],
            None => &mut next_root,
        };
        let begin = *free;
        *free += size[index];
        next[index] = begin + 1;
        enter.push(begin);
    }
    let of_tokens = |numbers: &dyn Fn(usize) -> i32| -> Vec<i32> {
        let segments = segments.iter().enumerate();
        segments
            .flat_map(|(index, segment)| std::iter::repeat_n(numbers(index), segment.length))
            .collect()
    };
    let mut spans = of_tokens(&|index| enter[index]);
    spans.extend(of_tokens(&|index| enter[index] + size[index]));
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(length: usize, parent: Option<usize>) -> Segment {
        Segment { length, parent }
    }

    /// Whether token `i` attends to token `j`, by the numbers of their segments.
    fn sees(spans: &[i32], n: usize, i: usize, j: usize) -> bool {
        let oldest = spans.get(2 * n + i).map_or(0, |oldest| *oldest as usize);
        (oldest..=i).contains(&j) && spans[j] <= spans[i] && spans[i] < spans[n + j]
    }

    #[test]
    fn the_numbers_of_segments_say_what_the_ranges_say() {
        // Children that come in no particular order.
        let segments = [
            segment(2, None),
            segment(3, Some(0)),
            segment(1, None),
            segment(2, Some(0)),
            segment(2, Some(1)),
            segment(1, Some(2)),
            segment(3, Some(1)),
        ];
        for window in [None, Some(1), Some(3), Some(5), Some(100)] {
            let ranges = AttentionRanges::new(&segments, window);
            let tables = Tables::new(&segments, &ranges, 4, 4);
            for segment in &ranges.segments {
                for (i, position) in segment.own.clone().zip(segment.offset..) {
                    let all = segment.tokens().filter(|j| *j <= i);
                    let outside = (position + 1).saturating_sub(window.unwrap_or(usize::MAX));
                    let expected: Vec<usize> = all.skip(outside).collect();
                    let got = (0..14).filter(|j| sees(&tables.spans, 14, i, *j));
                    assert_eq!(got.collect::<Vec<_>>(), expected, "token {i}, {window:?}");
                }
            }
        }
    }

    #[test]
    fn tiles_are_listed_if_and_only_if_they_have_a_visible_key() {
        let segments = [
            segment(5, None),
            segment(9, Some(0)),
            segment(7, None),
            segment(6, Some(0)),
            segment(1, Some(2)),
        ];
        let n = 28;
        let sizes = [(4, 4), (3, 8), (32, 32), (1, 5)];
        let windows = [None, Some(2), Some(9)];
        let cases = sizes
            .into_iter()
            .flat_map(|size| windows.map(|window| (size, window)));
        for ((queries, keys), window) in cases {
            let ranges = AttentionRanges::new(&segments, window);
            let tables = Tables::new(&segments, &ranges, queries, keys);
            let list = |table: &[i32], tile: usize| -> Vec<usize> {
                let range = table[tile] as usize..table[tile + 1] as usize;
                table[range].iter().map(|first| *first as usize).collect()
            };
            for query in 0..n_tiles(n, queries) {
                for key in 0..n_tiles(n, keys) {
                    let tokens = |tile: usize, size: usize| tile * size..n.min((tile + 1) * size);
                    let visible = tokens(query, queries)
                        .any(|i| tokens(key, keys).any(|j| sees(&tables.spans, n, i, j)));
                    assert_eq!(
                        list(&tables.keys_of, query).contains(&(key * keys)),
                        visible
                    );
                    let listed = list(&tables.queries_of, key).contains(&(query * queries));
                    assert_eq!(listed, visible);
                }
            }
        }
    }

    fn n_tiles(n: usize, size: usize) -> usize {
        n.div_ceil(size)
    }
}
