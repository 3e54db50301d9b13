//! Rows back to back in one batch, without padding.

use llama_burn::PackedTokens;

use super::dataset::Dataset;

/// A packed micro-batch with what it must predict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The rows' tokens and lengths.
    pub tokens: PackedTokens,
    /// The positions in the packed ids that PREDICT a supervised token: each one before its token, so that
    /// the first of a row is its prompt's last token.
    pub target_positions: Vec<u32>,
    /// The token that each of those positions predicts.
    pub target_ids: Vec<u32>,
    /// The rows' lines in the data file, from 1.
    pub rows: Vec<usize>,
}

impl Dataset {
    /// Packs the rows with these indices into `rows`, in this order.
    ///
    /// # Panics
    ///
    /// If an index is not below the number of rows.
    pub fn batch(&self, indices: &[usize]) -> Batch {
        let mut batch = Batch {
            tokens: PackedTokens {
                ids: Vec::new(),
                segment_lengths: Vec::new(),
            },
            target_positions: Vec::new(),
            target_ids: Vec::new(),
            rows: Vec::new(),
        };
        for index in indices {
            let row = &self.rows[*index];
            let start = batch.tokens.ids.len();
            let predicting = start + row.prompt_tokens - 1..start + row.ids.len() - 1;
            batch
                .target_positions
                .extend(predicting.map(|position| position as u32));
            batch.target_ids.extend_from_slice(row.supervised());
            batch.tokens.ids.extend_from_slice(&row.ids);
            batch.tokens.segment_lengths.push(row.ids.len());
            batch.rows.push(row.line);
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenize::TokenizedRow;
    use super::*;

    #[test]
    fn the_first_target_is_predicted_by_the_last_prompt_token() {
        let row = |line, ids: &[u32], prompt_tokens| TokenizedRow {
            line,
            ids: ids.to_vec(),
            prompt_tokens,
        };
        let dataset = Dataset {
            rows: vec![
                row(1, &[10, 11, 12, 2], 2),
                row(2, &[99, 2], 1),
                row(5, &[20, 21, 2], 1),
            ],
            ..Dataset::default()
        };
        let batch = dataset.batch(&[2, 0]);
        assert_eq!(batch.tokens.ids, [20, 21, 2, 10, 11, 12, 2]);
        assert_eq!(batch.tokens.segment_lengths, [3, 4]);
        assert_eq!(batch.target_positions, [0, 1, 4, 5]);
        assert_eq!(batch.target_ids, [21, 2, 12, 2]);
        assert_eq!(batch.rows, [5, 1]);
        // Next-token prediction: a target is the token after its position, in the same row.
        for (position, target) in batch.target_positions.iter().zip(&batch.target_ids) {
            assert_eq!(batch.tokens.ids[*position as usize + 1], *target);
        }
    }
}
