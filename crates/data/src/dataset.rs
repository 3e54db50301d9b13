//! The tokenized rows of a run, and their statistics.

use std::fmt;
use std::path::{Path, PathBuf};

use super::error::DataError;
use super::rows::Row;
use super::tokenize::{RowTokenizer, TokenizedRow};

/// The rows of one file, or of one side of its split, that are not too long.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dataset {
    /// The file, for messages.
    pub path: PathBuf,
    /// The rows, in the order of the file.
    pub rows: Vec<TokenizedRow>,
    /// The number of rows with more than `max_seq_len` tokens, which are skipped.
    pub too_long: usize,
    /// The tokens of the longest skipped row; 0 if none was skipped.
    pub longest_left_out: usize,
}

impl Dataset {
    /// Tokenizes `rows` of the file `path`.
    ///
    /// # Errors
    ///
    /// See [`RowTokenizer::tokenize`]; and [`DataError::AllTooLong`] if no row is left. Without
    /// rows, the data set is empty (a run without validation).
    pub fn new(
        path: &Path,
        rows: &[Row],
        tokenizer: &RowTokenizer,
        max_seq_len: usize,
        vocab_size: usize,
    ) -> Result<Self, DataError> {
        let mut dataset = Self {
            path: path.into(),
            ..Self::default()
        };
        let mut shortest = usize::MAX;
        for row in rows {
            let row = tokenizer.tokenize(row, path, vocab_size)?;
            shortest = shortest.min(row.ids.len());
            if row.ids.len() > max_seq_len {
                dataset.too_long += 1;
                dataset.longest_left_out = dataset.longest_left_out.max(row.ids.len());
            } else {
                dataset.rows.push(row);
            }
        }
        if dataset.rows.is_empty() && !rows.is_empty() {
            return Err(DataError::AllTooLong {
                path: path.into(),
                rows: rows.len(),
                shortest,
                max_seq_len,
            });
        }
        Ok(dataset)
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The number of tokens of each row.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.rows.iter().map(|row| row.ids.len())
    }

    /// The supervised tokens of all rows.
    pub fn supervised(&self) -> usize {
        self.rows.iter().map(TokenizedRow::supervised_tokens).sum()
    }

    /// The maximum number of supervised tokens per row; 0 without rows.
    pub fn longest_target(&self) -> usize {
        let targets = self.rows.iter().map(TokenizedRow::supervised_tokens);
        targets.max().unwrap_or(0)
    }

    /// The counts.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            rows: self.rows.len(),
            tokens: self.lengths().sum(),
            supervised_tokens: self.supervised(),
            longest_row: self.lengths().max().unwrap_or(0),
            too_long: self.too_long,
        }
    }
}

/// The counts of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// Rows that are used.
    pub rows: usize,
    /// Their tokens.
    pub tokens: usize,
    /// The tokens in the loss.
    pub supervised_tokens: usize,
    /// The tokens of the longest row.
    pub longest_row: usize,
    /// Rows left out because they are too long.
    pub too_long: usize,
}

/// One line for the screen.
impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rows,
            tokens,
            supervised_tokens,
            longest_row,
            too_long,
        } = self;
        write!(
            f,
            "{rows} examples, {tokens} tokens ({supervised_tokens} in the loss), the longest example has {longest_row}"
        )?;
        match too_long {
            0 => Ok(()),
            1 => f.write_str("; 1 example is longer than max_seq_len and skipped"),
            n => write!(f, "; {n} examples are longer than max_seq_len and skipped"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::read::parse_rows;
    use super::super::tokenize::tests::word_files;
    use super::*;
    use crate::PromptTemplate;

    const TEXT: &str = "{\"context\": \"a\", \"target\": \"b\"}\n\n{\"context\": \"a a a\", \"target\": \"b b\"}\n";

    fn dataset(max_seq_len: usize) -> Result<Dataset, DataError> {
        let path = Path::new("data.jsonl");
        let rows = parse_rows(TEXT.as_bytes(), path).unwrap().rows;
        let tokenizer =
            RowTokenizer::new(&word_files(&["a", "b"], false), &PromptTemplate::Raw).unwrap();
        Dataset::new(path, &rows, &tokenizer, max_seq_len, 5)
    }

    #[test]
    fn the_statistics_count_rows_and_tokens() {
        let statistics = dataset(6).unwrap().statistics();
        let expected = Statistics {
            rows: 2,
            tokens: 9,
            supervised_tokens: 5,
            longest_row: 6,
            too_long: 0,
        };
        assert_eq!(statistics, expected);
        let dataset = dataset(6).unwrap();
        assert_eq!(dataset.lengths().collect::<Vec<_>>(), [3, 6]);
        assert_eq!(
            (
                dataset.len(),
                dataset.supervised(),
                dataset.longest_target()
            ),
            (2, 5, 3)
        );
    }

    #[test]
    fn a_row_that_is_too_long_is_left_out_whole_and_counted() {
        let dataset = dataset(5).unwrap();
        assert_eq!(dataset.rows.len(), 1);
        assert_eq!(dataset.rows[0].ids, [3, 4, 2]);
        assert_eq!((dataset.too_long, dataset.longest_left_out), (1, 6));
        assert!(
            dataset
                .statistics()
                .to_string()
                .ends_with("1 example is longer than max_seq_len and skipped")
        );
    }

    #[test]
    fn only_rows_that_are_too_long_are_an_error_that_says_what_would_do() {
        let error = dataset(2).unwrap_err().to_string();
        assert!(error.contains("all 2 examples of data.jsonl"), "{error}");
        assert!(
            error.contains("max_seq_len = 2") && error.contains("shortest has 3"),
            "{error}"
        );
    }
}
