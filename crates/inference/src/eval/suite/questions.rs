//! A task's examples as questions.

use std::path::{Path, PathBuf};

use super::super::answering::{AnsweringError, Task, TaskOptions, items};
use super::super::labels::DELIMITER;
use super::results::TaskResults;
use super::targets::Column;
use super::tasks::{Judged, SuiteTask};
use data::{self, DataError, Example, Format, Row, RowTokenizer, Rows};

/// A file's examples, or a sample of them.
#[derive(Debug)]
pub struct Sample {
    /// The task.
    pub suite: &'static SuiteTask,
    /// Its file.
    pub path: PathBuf,
    /// The examples.
    pub rows: Rows,
    /// The type that pandas gives to the whole file's targets.
    pub column: Column,
}

impl Sample {
    /// Reads a whole file, and draws a sample from it.
    ///
    /// # Errors
    ///
    /// An example that is not FinLoRA's `{"context", "target"}`, with file and line; a file without
    /// examples.
    pub fn read(
        suite: &'static SuiteTask,
        path: &Path,
        (count, seed): (Option<usize>, u64),
    ) -> Result<Self, DataError> {
        let mut rows = data::read_rows(path, Some(Format::ContextTarget))?;
        let targets = rows.rows.iter().filter_map(|row| row.example.target());
        let targets: Vec<String> = targets.map(String::from).collect();
        if let Some(count) = count {
            rows.rows = data::sample(rows.rows, count, seed);
        }
        Ok(Self {
            suite,
            path: path.into(),
            rows,
            column: Column::of(&targets),
        })
    }
}

/// A task's questions and targets.
#[derive(Debug)]
pub struct Asked {
    /// The task of FinLoRA.
    pub suite: &'static SuiteTask,
    /// The questions.
    pub task: Task,
    /// Their tokenizer.
    pub tokenizer: RowTokenizer,
    /// The targets: of an example, or of an item of its list.
    pub targets: Vec<Target>,
    /// Examples without `Answer:`.
    without_mark: usize,
}

/// The target of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The line of its example in the file, from 1.
    pub line: usize,
    /// Its index in the example's list, from 0.
    pub item: usize,
    /// As in the file.
    pub text: String,
    /// As FinLoRA reads it.
    pub finlora: String,
}

impl Asked {
    /// Makes questions of a sample's examples.
    ///
    /// # Errors
    ///
    /// As [`Task::new`].
    pub fn new(
        sample: &Sample,
        tokenizer: RowTokenizer,
        (vocab_size, positions): (usize, usize),
    ) -> Result<Self, AnsweringError> {
        let Sample {
            suite,
            path,
            rows,
            column,
        } = sample;
        let lists = suite.judged == Judged::Labels;
        let options = TaskOptions {
            labels: &[],
            lists,
            max_new_tokens: Some(suite.max_new_tokens),
            vocab_size,
            positions,
        };
        let all = rows.rows.iter().filter_map(|row| row.example.target());
        let all: Vec<String> = all.map(String::from).collect();
        let task = Task::new(path, rows.source, &rows.rows, &all, &tokenizer, options)?;
        let mut targets = Vec::new();
        for question in &task.questions {
            let read = column.read(&question.target);
            // FinLoRA strips white space from items, but not from whole targets.
            let itemized = |text: &str| {
                if lists {
                    items(text, true)
                } else {
                    vec![text.to_string()]
                }
            };
            let both = itemized(&question.target).into_iter().zip(itemized(&read));
            targets.extend(both.enumerate().map(|(item, (text, finlora))| Target {
                line: question.line,
                item,
                text,
                finlora,
            }));
        }
        let is_unmarked = |row: &&Row| match &row.example {
            Example::Answer { context, .. } => !context.contains(DELIMITER),
            _ => false,
        };
        Ok(Self {
            suite,
            without_mark: rows.rows.iter().filter(is_unmarked).count(),
            task,
            tokenizer,
            targets,
        })
    }

    /// The description of the task for the results.
    pub fn results(&self) -> TaskResults {
        TaskResults {
            task: self.suite.name,
            file: self.suite.file,
            rows: self.task.questions.len(),
            answers: self.targets.len(),
            too_long: self.task.too_long,
            max_new_tokens: self.suite.max_new_tokens,
            without_mark: self.without_mark,
            targets_reread: self.targets.iter().any(|it| it.text != it.finlora),
        }
    }
}
