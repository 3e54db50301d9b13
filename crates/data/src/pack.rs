//! Rows packed into one sequence without padding, with their labels.

use llama_burn::PackedTokens;

use super::dataset::Dataset;

/// Shared prefixes with fewer tokens than this are not shared: a segment costs more.
const LEAST_SHARED: usize = 8;

/// A packed micro-batch with its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The rows' tokens.
    pub tokens: PackedTokens,
    /// The positions in the packed ids that PREDICT a supervised token: each is one before its token, so the
    /// first position of a row is the last token of its prompt. Row by row.
    pub target_positions: Vec<u32>,
    /// The token that each of those positions predicts.
    pub target_ids: Vec<u32>,
    /// The number of these positions per row.
    pub targets_per_example: Vec<usize>,
    /// The rows' lines in the data file, from 1.
    pub rows: Vec<usize>,
    /// Tokens of the rows; the packed sequence has fewer if rows share prefixes.
    pub row_tokens: usize,
}

/// A row to be packed.
#[derive(Debug, Clone)]
pub struct BatchRow<'a> {
    /// Its tokens.
    pub ids: &'a [u32],
    /// Positions in the row, each with the token that it predicts.
    pub targets: Vec<(usize, u32)>,
    /// Its line in the data file, from 1.
    pub line: usize,
}

/// Whether a prefix that several rows share is computed once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefixes {
    /// Once for all rows: the same losses and gradients, fewer tokens to compute.
    Shared,
    /// Once per row.
    Apart,
}

impl Batch {
    /// Packs rows.
    pub fn new(rows: &[BatchRow], prefixes: Prefixes) -> Self {
        let ids: Vec<&[u32]> = rows.iter().map(|row| row.ids).collect();
        let (tokens, places) = match prefixes {
            Prefixes::Shared => PackedTokens::sharing_prefixes(&ids, LEAST_SHARED),
            Prefixes::Apart => one_after_the_other(&ids),
        };
        let targets = || {
            rows.iter()
                .zip(&places)
                .flat_map(|(row, places)| row.targets.iter().map(|(at, id)| (places[*at], *id)))
        };
        Self {
            tokens,
            target_positions: targets().map(|(place, _)| place).collect(),
            target_ids: targets().map(|(_, id)| id).collect(),
            targets_per_example: rows.iter().map(|row| row.targets.len()).collect(),
            rows: rows.iter().map(|row| row.line).collect(),
            row_tokens: rows.iter().map(|row| row.ids.len()).sum(),
        }
    }
}

fn one_after_the_other(rows: &[&[u32]]) -> (PackedTokens, Vec<Vec<u32>>) {
    let mut start = 0;
    let places = rows.iter().map(|row| {
        start += row.len() as u32;
        (start - row.len() as u32..start).collect()
    });
    let places = places.collect();
    (PackedTokens::from_sequences(rows.iter().copied()), places)
}

impl Dataset {
    /// Packs the rows with these indices into `rows`, in this order if they share nothing.
    ///
    /// # Panics
    ///
    /// If an index is not below the number of rows.
    pub fn batch(&self, indices: &[usize], prefixes: Prefixes) -> Batch {
        let rows: Vec<BatchRow> = indices
            .iter()
            .map(|index| {
                let row = &self.rows[*index];
                let supervised = row.supervised();
                BatchRow {
                    ids: &row.ids,
                    targets: supervised.map(|(at, id)| (at - 1, id)).collect(),
                    line: row.line,
                }
            })
            .collect();
        Batch::new(&rows, prefixes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenize::TokenizedRow;
    use super::*;

    #[test]
    fn the_first_target_is_predicted_by_the_last_prompt_token() {
        let row = |line, ids: &[u32], prompt| TokenizedRow::answer(line, ids.to_vec(), prompt);
        let dataset = Dataset {
            rows: vec![
                row(1, &[10, 11, 12, 2], 2),
                row(2, &[99, 2], 1),
                row(5, &[20, 21, 2], 1),
            ],
            ..Dataset::default()
        };
        let batch = dataset.batch(&[2, 0], Prefixes::Apart);
        assert_eq!(batch.tokens.ids, [20, 21, 2, 10, 11, 12, 2]);
        let lengths = batch.tokens.segments.iter().map(|segment| segment.length);
        assert_eq!(lengths.collect::<Vec<_>>(), [3, 4]);
        assert_eq!(batch.targets_per_example, [2, 2]);
        assert_eq!(batch.target_positions, [0, 1, 4, 5]);
        assert_eq!(batch.target_ids, [21, 2, 12, 2]);
        assert_eq!(batch.rows, [5, 1]);
        // Next-token prediction: a target is the token after its position, in the same row.
        for (position, target) in batch.target_positions.iter().zip(&batch.target_ids) {
            assert_eq!(batch.tokens.ids[*position as usize + 1], *target);
        }
    }

    #[test]
    fn every_learned_part_of_a_row_is_predicted_from_the_token_before_it() {
        let turns = TokenizedRow {
            line: 3,
            ids: vec![1, 10, 11, 2, 12, 13, 14, 2, 15],
            learned: vec![2..4, 6..8],
        };
        let other = TokenizedRow::answer(4, vec![1, 10, 2], 2);
        let dataset = Dataset {
            rows: vec![turns, other],
            ..Dataset::default()
        };
        for prefixes in [Prefixes::Apart, Prefixes::Shared] {
            let batch = dataset.batch(&[0, 1], prefixes);
            assert_eq!(batch.target_ids, [11, 2, 14, 2, 2]);
            assert_eq!(batch.targets_per_example, [4, 1]);
        }
        let apart = dataset.batch(&[0, 1], Prefixes::Apart);
        assert_eq!(apart.target_positions, [1, 2, 5, 6, 10]);
    }
}
