//! From data files to packed batches.
//!
//! ```text
//! rows.rs         the rows of a file; every wrong one is reported with its line
//! read.rs         opens a data file; detects what it is written in:
//!   json.rs         JSON lines, or an array
//!   table.rs        CSV and TSV
//!   parquet.rs      Parquet
//! format.rs       what the columns mean: {"context", "target"}, {"messages"}, …
//! columns.rs      columns that have another name in the file
//! empty.rs        values that count as absent
//! conversation.rs messages, and which of them are in the loss
//! split.rs        the rows held out for validation
//! model_files.rs  tokenizer.json and the other files of a model
//! template.rs     a context becomes a prompt; the model's chat template
//! dates.rs        the date in a chat template
//! python.rs       values of a template as Python writes them
//! chat.rs         which part of a rendered conversation is the assistant's
//! guarded.rs      the tokenizers crate in a sandbox
//! contained.rs    panics of third-party parsers become messages
//! prompt_template.rs  the config key prompt_template
//! gguf/           a GGUF file's tokenizer
//! tokenize.rs     a row becomes token ids and a loss mask
//! training_prompt.rs  the prompt template of an adapter's training, saved with the adapter
//! unwritten.rs    parts of conversations that a chat template does not write
//! ends.rs         whether the answers of a chat template end
//! dataset.rs      the tokenized rows, and how many were too long
//! order.rs        which rows each optimizer step takes
//! pack.rs         rows packed into one sequence, and the positions in the loss
//! inspect.rs      rows for a person to read
//! random.rs       seeded permutations, the same on every machine
//! ```
//!
//! The loss is on answers and their end tokens only; on all tokens of a plain text. A row is never truncated: it is used as
//! a whole, or skipped and counted.

mod chat;
mod columns;
pub mod contained;
mod conversation;
mod dataset;
mod dates;
mod empty;
mod ends;
mod error;
mod format;
pub mod gguf;
mod guarded;
mod inspect;
mod integers;
mod json;
mod llama_tokenizer;
mod model_files;
mod named_tokens;
mod order;
mod pack;
mod parquet;
mod percent;
mod prompt_template;
mod python;
mod random;
mod read;
mod rows;
mod split;
mod string_methods;
mod table;
mod template;
mod tokenize;
mod training_prompt;
mod unwritten;

use std::path::Path;

pub use columns::Columns;
pub use conversation::Conversation;
pub use dataset::{Dataset, Statistics};
pub use error::{DataError, LineError};
pub use format::{Example, Format};
pub use guarded::Guarded;
pub use inspect::{inspect, inspect_as_json, inspect_rows};
pub use model_files::{JsonFile, ModelFiles};
pub use order::Order;
pub use pack::{Batch, BatchRow, Prefixes};
pub use prompt_template::{InstructTemplate, PLACEHOLDER, PromptTemplate};
pub use python::float as python_float;
pub use read::{parse_rows, read_columns, read_rows};
pub use rows::{Container, Row, Rows, Source};
pub use split::{sample, split};
pub use tokenize::{Question, RowTokenizer, TokenizedRow, effective_template};
pub use training_prompt::{PROMPT_FILE, PromptFileError, TrainingPrompt};

/// How the rows of a run are read, split and turned into prompts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DataOptions {
    /// How a context becomes the prompt.
    pub prompt_template: PromptTemplate,
    /// The format of the files; detected if `None`.
    pub dataset_format: Option<Format>,
    /// Columns that have another name in the file.
    pub dataset_columns: Columns,
    /// Rows held out for validation, without a file for it.
    pub val_set_size: f64,
    /// The seed of the split.
    pub seed: u64,
}

/// The data of a run.
#[derive(Debug)]
pub struct Data {
    /// The training data.
    pub train: Dataset,
    /// The validation data; empty without validation.
    pub validation: Dataset,
    /// The model's tokenizer.
    pub tokenizer: RowTokenizer,
    /// What was found in the training file.
    pub source: Source,
    /// What was found in the validation file, if there is one.
    pub validation_source: Option<Source>,
    /// Columns of the training file that are not read.
    pub ignored: Vec<String>,
    /// Warnings about the data for the user.
    pub warnings: Vec<String>,
    /// The prompt template of the training rows.
    pub prompt: TrainingPrompt,
}

impl Data {
    /// The number of rows that were skipped because they are too long.
    pub fn too_long(&self) -> usize {
        self.train.too_long + self.validation.too_long
    }

    /// What was found in the files, for the screen.
    pub fn formats(&self) -> String {
        let mut text = self.source.to_string();
        if let Some(validation) = self.validation_source.filter(|it| *it != self.source) {
            text += &format!("; validation: {validation}");
        }
        if !self.ignored.is_empty() {
            text += &format!("; columns not read: {}", self.ignored.join(", "));
        }
        text
    }
}

/// Reads and tokenizes one file, for a tokenizer with the raw template; its format is detected.
///
/// # Errors
///
/// Any problem of the file, a row, or the tokenizer; see [`DataError`].
pub fn load(
    path: &Path,
    tokenizer: &RowTokenizer,
    max_seq_len: usize,
    vocab_size: usize,
) -> Result<Dataset, DataError> {
    let rows = read_rows(path, None)?.rows;
    Dataset::new(path, &rows, tokenizer, max_seq_len, vocab_size)
}

/// The data of a run: the rows of `train`, and those of `validation`; without `validation`, `val_set_size` of the rows of
/// `train` are held out.
///
/// `model_dir` has `tokenizer.json`. The model's vocabulary has `vocab_size` tokens; rows of more than `max_seq_len` tokens
/// are skipped. `time` is the date for a chat template that writes the date, in seconds since 1970: a resumed run passes
/// the time of its start; `None` is the current time.
///
/// # Errors
///
/// See [`load`] and [`split`].
pub fn prepare(
    options: &DataOptions,
    model_dir: &Path,
    train: &Path,
    validation: Option<&Path>,
    vocab_size: usize,
    max_seq_len: usize,
    time: Option<u64>,
) -> Result<Data, DataError> {
    let files = ModelFiles {
        time: Some(time.unwrap_or_else(dates::clock)),
        ..ModelFiles::read(model_dir)?
    };
    let template = &options.prompt_template;
    let mut tokenizer = RowTokenizer::new(&files, template)?;
    let Rows {
        rows,
        source,
        mut ignored,
    } = read_columns(train, options.dataset_format, &options.dataset_columns)?;
    tokenizer.prepare(&files, template, source.format, train)?;
    let mut validation_source = None;
    let (train_rows, validation_rows) = match validation {
        Some(path) => {
            let Rows {
                rows: others,
                source,
                ..
            } = read_columns(path, options.dataset_format, &options.dataset_columns)?;
            tokenizer.prepare(&files, template, source.format, path)?;
            validation_source = Some(source);
            (rows, others)
        }
        None => split(rows, options.val_set_size, options.seed)?,
    };
    let tokenized =
        |path, rows: &[Row]| Dataset::new(path, rows, &tokenizer, max_seq_len, vocab_size);
    let mut warnings = tokenizer.unwritten(&train_rows, train);
    ignored.extend(tokenizer.unread_keys(&train_rows));
    let validated = tokenized(validation.unwrap_or(train), &validation_rows)?;
    let train = tokenized(train, &train_rows)?;
    let is_chat = tokenizer.has_chat();
    let end = is_chat.then(|| ends::warning(&train, &files, &tokenizer));
    warnings.extend(end.flatten());
    Ok(Data {
        warnings,
        validation: validated,
        train,
        prompt: TrainingPrompt::new(&files, template, source.format),
        tokenizer,
        source,
        ignored,
        validation_source,
    })
}

#[cfg(test)]
impl Data {
    /// Rows to train on, with a tokenizer that does not belong to them.
    fn of_rows(rows: Vec<TokenizedRow>) -> Self {
        let files = tokenize::tests::word_files(&["a"], false);
        let template = Default::default();
        let tokenizer = RowTokenizer::new(&files, &template).expect("the files are valid");
        let source = Source {
            container: Container::JsonLines,
            format: Format::ContextTarget,
        };
        Self {
            train: Dataset {
                rows,
                ..Dataset::default()
            },
            validation: Dataset::default(),
            tokenizer,
            source,
            ignored: Vec::new(),
            warnings: Vec::new(),
            validation_source: None,
            prompt: TrainingPrompt::new(&files, &template, source.format),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::tokenize::tests::word_files;
    use super::*;

    fn text(rows: usize) -> String {
        "{\"context\": \"a\", \"target\": \"b\"}\n".repeat(rows)
    }

    fn write_model(folder: &Path) {
        let files = word_files(&["a", "b"], true);
        std::fs::write(folder.join("tokenizer.json"), files.tokenizer).unwrap();
        std::fs::write(
            folder.join("tokenizer_config.json"),
            files.tokenizer_config.unwrap().text(),
        )
        .unwrap();
    }

    #[test]
    fn a_run_trains_on_what_validation_leaves() {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path());
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, text(10)).unwrap();
        let options = DataOptions {
            val_set_size: 3.0,
            ..DataOptions::default()
        };
        let data = prepare(&options, folder.path(), &path, None, 5, 16, None).unwrap();
        assert_eq!((data.train.rows.len(), data.validation.rows.len()), (7, 3));
        assert_eq!(data.train.rows[0].ids, [1, 3, 4, 2]);
        assert_eq!(data.too_long(), 0);
        let mut shown = Vec::new();
        inspect(&data, 99, &mut shown, false).unwrap();
        let shown = String::from_utf8(shown).unwrap();
        assert!(
            shown.contains("training    7 examples, 28 tokens (14 in the loss)"),
            "{shown}"
        );
        assert!(shown.contains("validation  3 examples"), "{shown}");
        let format = "format      JSON lines of {\"context\", \"target\"}";
        assert!(shown.contains(format), "{shown}");
        assert_eq!(shown.matches(": 4 tokens, 2 not in the loss").count(), 7);
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
        let data = prepare(
            &DataOptions::default(),
            folder.path(),
            &path,
            Some(&validation),
            5,
            16,
            None,
        )
        .unwrap();
        assert_eq!((data.train.rows.len(), data.validation.rows.len()), (10, 4));
        assert_eq!(data.validation.path, validation);
    }
}
