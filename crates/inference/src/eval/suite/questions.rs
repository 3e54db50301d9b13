//! A task's rows, ready to be asked.

use std::path::{Path, PathBuf};

use super::super::answering::{AnsweringError, Task, TaskOptions, items};
use super::super::labels::DELIMITER;
use super::results::TaskResults;
use super::targets::Column;
use super::tasks::{Judged, SuiteTask};
use data::{self, DataError, Example, Format, Row, RowTokenizer, Rows};

/// A file's rows, or those that were drawn.
#[derive(Debug)]
pub struct Sample {
    /// The task.
    pub suite: &'static SuiteTask,
    /// Its file.
    pub path: PathBuf,
    /// The rows.
    pub rows: Rows,
    /// What pandas makes of the whole file's targets.
    pub column: Column,
}

impl Sample {
    /// Reads a file whole, and draws from it.
    ///
    /// # Errors
    ///
    /// A row that is not FinLoRA's `{"context", "target"}`, with file and line; a file without rows.
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

/// A task as it is asked and judged.
#[derive(Debug)]
pub struct Asked {
    /// The task of FinLoRA's.
    pub suite: &'static SuiteTask,
    /// The questions.
    pub task: Task,
    /// Their tokenizer.
    pub tokenizer: RowTokenizer,
    /// What is judged: a target of a row, or of an item of its list.
    pub targets: Vec<Target>,
    /// Rows without `Answer:`.
    without_mark: usize,
}

/// What an answer is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The line of its row in the file, from 1.
    pub line: usize,
    /// Its place in the row's list, from 0.
    pub item: usize,
    /// As it is in the file.
    pub text: String,
    /// As FinLoRA reads it.
    pub finlora: String,
}

impl Asked {
    /// Makes questions of a sample's rows.
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
            // FinLoRA takes white space away around items, and around whole targets not.
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

    /// What was asked.
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
