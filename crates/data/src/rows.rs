//! The rows of a data file.

use std::fmt;
use std::path::Path;

use serde_json::{Map, Value};

use super::columns::Columns;
use super::error::{DataError, LineError};
use super::format::{Example, Format};

/// One example of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line of the file on which it begins, from 1; for Parquet the row.
    pub line: usize,
    /// The content.
    pub example: Example,
}

impl Row {
    /// An answer to a context.
    pub fn answer(line: usize, context: impl Into<String>, target: impl Into<String>) -> Self {
        Self {
            line,
            example: Example::Answer {
                context: context.into(),
                target: target.into(),
            },
        }
    }
}

/// The container of a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// One JSON object per line.
    JsonLines,
    /// One JSON array of objects.
    JsonArray,
    /// Comma-separated values; the first line has the column names.
    Csv,
    /// Tab-separated values; the first line has the column names.
    Tsv,
    /// Apache Parquet.
    Parquet,
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::JsonLines => "JSON lines",
            Self::JsonArray => "JSON",
            Self::Csv => "CSV",
            Self::Tsv => "TSV",
            Self::Parquet => "Parquet",
        })
    }
}

/// What was found in a file: `JSON lines of {"context", "target"}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The container.
    pub container: Container,
    /// The format of its rows.
    pub format: Format,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.container, self.format)
    }
}

/// The rows of a data file; at least one.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// In the order of the file.
    pub rows: Vec<Row>,
    /// What was found in the file.
    pub source: Source,
    /// Columns that are not read, in the order in which they were found.
    pub ignored: Vec<String>,
}

/// The columns of a file that has the names of the format.
pub(super) static SAME_NAMES: Columns = Columns(Vec::new());

/// The maximum number of ignored columns that are reported.
pub(super) const MOST_IGNORED: usize = 64;

/// The rows of a file while it is being read.
pub(super) struct Collected<'a> {
    pub path: &'a Path,
    /// The format of the configuration, else that of the first row once it is read.
    format: Option<Format>,
    columns: &'a Columns,
    rows: Vec<Row>,
    ignored: Vec<String>,
}

impl<'a> Collected<'a> {
    /// No rows yet.
    pub fn new(path: &'a Path, format: Option<Format>, columns: &'a Columns) -> Self {
        Self {
            path,
            format,
            columns,
            rows: Vec::new(),
            ignored: Vec::new(),
        }
    }
}

impl Collected<'_> {
    /// The format of a file that names its columns before the first row. [`looks_at`](Self::looks_at) decides which
    /// columns are decoded.
    pub fn columns<'a>(
        &mut self,
        all: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Format, LineError> {
        let columns = self.columns;
        let format = self.format_of(all.clone().filter_map(|name| columns.ours(name)))?;
        self.note_ignored(format, all);
        Ok(format)
    }

    /// Whether rows of this format need the column of this name in the file.
    pub fn looks_at(&self, format: Format, column: &str) -> bool {
        let ours = self.columns.ours(column);
        ours.is_some_and(|ours| format.looks_at(ours))
    }

    /// Adds a row.
    pub fn add(&mut self, line: usize, row: Map<String, Value>) -> Result<(), LineError> {
        let columns = self.columns;
        let ours = row.keys().filter_map(|name| columns.ours(name));
        let format = self.format_of(ours)?;
        self.note_ignored(format, row.keys().map(String::as_str));
        let example = format.example(columns.renamed(row))?;
        self.rows.push(Row { line, example });
        Ok(())
    }

    fn format_of<'a>(
        &mut self,
        keys: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Format, LineError> {
        let format = match self.format {
            Some(format) => format,
            None => Format::detect(keys.clone()).ok_or_else(|| LineError::UnknownFormat {
                present: keys.map(String::from).collect(),
            })?,
        };
        self.format = Some(format);
        Ok(format)
    }

    fn note_ignored<'a>(&mut self, format: Format, columns: impl Iterator<Item = &'a str>) {
        let names = self.columns;
        let is_read = |column: &str| names.ours(column).is_some_and(|ours| format.reads(ours));
        for column in columns.filter(|column| !is_read(column)) {
            let known = self.ignored.iter().any(|known| known == column);
            if !known && self.ignored.len() < MOST_IGNORED {
                self.ignored.push(column.into());
            }
        }
    }

    /// An error about a line of text.
    pub fn line_error(&self, line: usize, problem: LineError, text: &[u8]) -> DataError {
        DataError::Line {
            path: self.path.into(),
            line,
            problem,
            beginning: beginning(text),
        }
    }

    pub fn finish(self, container: Container) -> Result<Rows, DataError> {
        let (Some(format), false) = (self.format, self.rows.is_empty()) else {
            let path = self.path.into();
            return Err(DataError::NoRows { path });
        };
        Ok(Rows {
            rows: self.rows,
            source: Source { container, format },
            ignored: self.ignored,
        })
    }
}

/// The first characters of a line for a message.
fn beginning(bytes: &[u8]) -> String {
    const CHARACTERS: usize = 72;
    // A line can be as long as the file. A character has at most four bytes.
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * CHARACTERS + 4)]);
    let text = text.lines().next().unwrap_or_default().trim_end();
    let mut short: String = text.chars().take(CHARACTERS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
