//! From JSON lines to packed batches.
//!
//! ```text
//! rows.rs         JSON lines of {"context", "target"}, every bad line named
//! split.rs        rows taken aside for validation
//! model_files.rs  tokenizer.json and its neighbours
//! template.rs     a context becomes a prompt
//! tokenize.rs     prompt, target and end token become ids; which are supervised
//! dataset.rs      the tokenized rows, and how many were too long
//! order.rs        which rows each optimizer step takes
//! pack.rs         rows back to back, and the positions that predict
//! inspect.rs      rows for a person to look at
//! random.rs       seeded permutations, the same on every machine
//! ```
//!
//! Only the target and the end token are learned. A row is never cut: it is used whole, or left out and counted.

mod dataset;
mod error;
mod inspect;
mod model_files;
mod order;
mod pack;
mod random;
mod rows;
mod split;
mod template;
mod tokenize;

use std::path::Path;

pub use dataset::{Dataset, Statistics};
pub use error::{DataError, LineError};
pub use inspect::{inspect, inspect_rows};
pub use model_files::ModelFiles;
pub use order::Order;
pub use pack::{Batch, BatchRow, Prefixes};
pub use rows::{Row, parse_rows, read_rows};
pub use split::split;
pub use tokenize::{RowTokenizer, TokenizedRow};

use crate::config::Config;

/// The data of a run.
#[derive(Debug)]
pub struct Data {
    /// What is trained on.
    pub train: Dataset,
    /// What is only looked at; empty if the configuration takes nothing aside.
    pub validation: Dataset,
    /// The model's tokenizer.
    pub tokenizer: RowTokenizer,
}

impl Data {
    /// Rows of both sides that were left out because they are too long.
    pub fn too_long(&self) -> usize {
        self.train.too_long + self.validation.too_long
    }
}

/// Reads and tokenizes one file whole.
///
/// # Errors
///
/// Whatever is wrong with the file, a row, or the tokenizer; see [`DataError`].
pub fn load(
    path: &Path,
    tokenizer: &RowTokenizer,
    max_seq_len: usize,
    vocab_size: usize,
) -> Result<Dataset, DataError> {
    Dataset::new(path, &read_rows(path)?, tokenizer, max_seq_len, vocab_size)
}

/// The data of a run: the rows of `train`, and those of `validation`, or without it `val_set_size` of the
/// former.
///
/// The paths are where the configuration's lead to: `model_dir` has `tokenizer.json`. The model's vocabulary
/// has `vocab_size` tokens; rows of more than `max_seq_len` are left out.
///
/// # Errors
///
/// See [`load`] and [`split`].
pub fn prepare(
    config: &Config,
    model_dir: &Path,
    train: &Path,
    validation: Option<&Path>,
    vocab_size: usize,
    max_seq_len: usize,
) -> Result<Data, DataError> {
    let tokenizer = RowTokenizer::new(&ModelFiles::read(model_dir)?, &config.prompt_template)?;
    let rows = read_rows(train)?;
    let (train_rows, validation_rows) = match validation {
        Some(path) => (rows, read_rows(path)?),
        None => split(rows, config.val_set_size, config.seed)?,
    };
    let tokenized =
        |path, rows: &[Row]| Dataset::new(path, rows, &tokenizer, max_seq_len, vocab_size);
    Ok(Data {
        train: tokenized(train, &train_rows)?,
        validation: tokenized(validation.unwrap_or(train), &validation_rows)?,
        tokenizer,
    })
}

#[cfg(test)]
mod tests {
    use super::tokenize::tests::word_files;
    use super::*;

    fn text(rows: usize) -> String {
        "{\"context\": \"a\", \"target\": \"b\"}\n".repeat(rows)
    }

    fn config(sets: &[&str]) -> Config {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Config::load(None, None, &sets).unwrap()
    }

    fn write_model(folder: &Path) {
        let files = word_files(&["a", "b"], true);
        std::fs::write(folder.join("tokenizer.json"), files.tokenizer).unwrap();
        std::fs::write(
            folder.join("tokenizer_config.json"),
            files.tokenizer_config.unwrap(),
        )
        .unwrap();
    }

    #[test]
    fn a_run_trains_on_what_validation_leaves() {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path());
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, text(10)).unwrap();
        let config = config(&["val_set_size=3", "prompt_template=raw"]);
        let data = prepare(&config, folder.path(), &path, None, 5, 16).unwrap();
        assert_eq!((data.train.rows.len(), data.validation.rows.len()), (7, 3));
        assert_eq!(data.train.rows[0].ids, [1, 3, 4, 2]);
        assert_eq!(data.too_long(), 0);
        let mut shown = Vec::new();
        inspect(&data, 99, &mut shown, false).unwrap();
        let shown = String::from_utf8(shown).unwrap();
        assert!(
            shown.contains("training    7 rows, 28 tokens (14 supervised)"),
            "{shown}"
        );
        assert!(shown.contains("validation  3 rows"), "{shown}");
        assert_eq!(shown.matches(": 4 tokens, 2 of the prompt").count(), 7);
        let all = load(&path, &data.tokenizer, 16, 5).unwrap();
        assert_eq!(all.rows.len(), 10);
    }

    #[test]
    fn a_validation_file_replaces_the_split() {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path());
        let (path, validation) = (
            folder.path().join("data.jsonl"),
            folder.path().join("val.jsonl"),
        );
        std::fs::write(&path, text(10)).unwrap();
        std::fs::write(&validation, text(4)).unwrap();
        let config = config(&["prompt_template=raw"]);
        let data = prepare(&config, folder.path(), &path, Some(&validation), 5, 16).unwrap();
        assert_eq!((data.train.rows.len(), data.validation.rows.len()), (10, 4));
        assert_eq!(data.validation.path, validation);
    }
}
