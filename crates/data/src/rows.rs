//! The rows of a data file, whatever it is written in.

use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value};

use super::columns::Columns;
use super::error::{DataError, LineError};
use super::format::{Example, Format};
use super::{json, parquet, table};

/// One example as it is in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line in the file that it begins on, from 1; in a Parquet file the row.
    pub line: usize,
    /// What it teaches.
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

/// What a file is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// A JSON object a line.
    JsonLines,
    /// One JSON array of objects.
    JsonArray,
    /// Comma-separated values under a line of names.
    Csv,
    /// The same, separated by tabs.
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
    /// What it is written in.
    pub container: Container,
    /// What its rows hold.
    pub format: Format,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.container, self.format)
    }
}

/// A data file's rows. There is at least one.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// In the order of the file.
    pub rows: Vec<Row>,
    /// What the file turned out to be.
    pub source: Source,
    /// Columns that are not read, in the order in which they were met.
    pub ignored: Vec<String>,
}

/// The columns of a file that calls them as the format does.
static SAME_NAMES: Columns = Columns(Vec::new());

/// More ignored columns than this are not remembered.
pub(super) const MOST_IGNORED: usize = 64;

/// Reads a data file whole. Blank lines are skipped, columns that the format does not have are not read. What
/// the file is written in is told by its extension and its first bytes; `format`, where it is not given, by
/// the first row's columns, and every row must then have it.
///
/// # Errors
///
/// The first bad row, with file, line and the line's beginning; or a file without rows.
pub fn read_rows(path: &Path, format: Option<Format>) -> Result<Rows, DataError> {
    read_columns(path, format, &SAME_NAMES)
}

/// [`read_rows`] for a file that calls its columns otherwise.
///
/// # Errors
///
/// See [`read_rows`].
pub fn read_columns(
    path: &Path,
    format: Option<Format>,
    columns: &Columns,
) -> Result<Rows, DataError> {
    let failed = |source| DataError::Read {
        path: path.into(),
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    let mut beginning = Vec::new();
    // Not of a file that cannot be read twice, as a pipe.
    if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        Read::by_ref(&mut file)
            .take(64)
            .read_to_end(&mut beginning)
            .map_err(failed)?;
        file = File::open(path).map_err(failed)?;
    }
    let container = container(path, &beginning);
    let mut rows = Collected {
        path,
        format,
        columns,
        rows: Vec::new(),
        ignored: Vec::new(),
    };
    match container {
        Container::JsonLines => json::lines(BufReader::new(file), &mut rows)?,
        Container::JsonArray => json::array(file, &mut rows)?,
        Container::Csv => table::rows(file, b',', &mut rows)?,
        Container::Tsv => table::rows(file, b'\t', &mut rows)?,
        Container::Parquet => parquet::rows(file, &mut rows)?,
    }
    rows.finish(container)
}

/// [`read_rows`] for JSON lines at hand; `path` is what messages call them.
///
/// # Errors
///
/// See [`read_rows`].
pub fn parse_rows(bytes: &[u8], path: &Path) -> Result<Rows, DataError> {
    let mut rows = Collected {
        path,
        format: None,
        columns: &SAME_NAMES,
        rows: Vec::new(),
        ignored: Vec::new(),
    };
    json::lines(bytes, &mut rows)?;
    rows.finish(Container::JsonLines)
}

/// Told by the extension; a file called `.json`, or anything else, also by how it begins.
fn container(path: &Path, beginning: &[u8]) -> Container {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.map(str::to_lowercase).as_deref() {
        Some("jsonl" | "ndjson") => return Container::JsonLines,
        Some("csv") => return Container::Csv,
        Some("tsv") => return Container::Tsv,
        Some("parquet") => return Container::Parquet,
        _ => {}
    }
    let beginning = beginning
        .strip_prefix(json::BYTE_ORDER_MARK)
        .unwrap_or(beginning);
    match beginning {
        [b'P', b'A', b'R', b'1', ..] => Container::Parquet,
        text if text.trim_ascii_start().starts_with(b"[") => Container::JsonArray,
        _ => Container::JsonLines,
    }
}

/// Rows that are being read.
pub(super) struct Collected<'a> {
    pub path: &'a Path,
    /// The configuration's, else that of the first row, once there is one.
    format: Option<Format>,
    columns: &'a Columns,
    rows: Vec<Row>,
    ignored: Vec<String>,
}

impl Collected<'_> {
    /// The format of a file that names its columns before the first row. [`looks_at`](Self::looks_at) decides which of
    /// them are read.
    pub fn columns<'a>(
        &mut self,
        all: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Format, LineError> {
        let columns = self.columns;
        let format = self.format_of(all.clone().filter_map(|name| columns.ours(name)))?;
        self.note_ignored(format, all);
        Ok(format)
    }

    /// Whether a row of this format has something in the file's column of this name.
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

    fn finish(self, container: Container) -> Result<Rows, DataError> {
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
    // A line can be as long as a file; four bytes are the longest character.
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * CHARACTERS + 4)]);
    let text = text.lines().next().unwrap_or_default().trim_end();
    let mut short: String = text.chars().take(CHARACTERS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_told_by_its_name_or_its_beginning() {
        for (name, beginning, expected) in [
            ("a.jsonl", "[", Container::JsonLines),
            ("a.json", "\n [{", Container::JsonArray),
            ("a.json", "{\"a\"", Container::JsonLines),
            ("a.CSV", "[", Container::Csv),
            ("a.tsv", "", Container::Tsv),
            ("a.parquet", "", Container::Parquet),
            ("a", "PAR1xxxx", Container::Parquet),
            ("a", "\u{feff}[", Container::JsonArray),
            ("a.txt", "", Container::JsonLines),
        ] {
            assert_eq!(
                container(Path::new(name), beginning.as_bytes()),
                expected,
                "{name} {beginning}"
            );
        }
    }

    #[test]
    fn what_was_found_is_said() {
        let rows = parse_rows(b"{\"text\": \"a\"}", Path::new("a.jsonl")).unwrap();
        assert_eq!(rows.source.to_string(), "JSON lines of {\"text\"}");
        let text = b"{\"id\": 1, \"text\": \"a\"}\n{\"text\": \"b\", \"from\": \"x\", \"id\": 2}";
        let rows = parse_rows(text, Path::new("a.jsonl")).unwrap();
        assert_eq!(rows.ignored, ["id", "from"]);
    }

    #[test]
    fn the_first_row_decides_and_the_others_must_be_like_it() {
        let text = b"{\"text\": \"a\"}\n{\"context\": \"a\", \"target\": \"b\"}\n";
        let error = parse_rows(text, Path::new("a.jsonl"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("a.jsonl:2: the key \"text\" is missing"),
            "{error}"
        );
        let error = parse_rows(b"{\"a\": 1, \"b\": 2}", Path::new("a.jsonl")).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("a.jsonl:1: the row has \"a\", \"b\""),
            "{error}"
        );
        assert!(error.contains("\"messages\""), "{error}");
    }

    #[test]
    fn a_format_that_is_named_is_not_guessed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(
            &path,
            "{\"context\": \"c\", \"target\": \"t\", \"text\": \"c t\"}",
        )
        .unwrap();
        let rows = read_rows(&path, Some(Format::Text)).unwrap();
        assert_eq!(rows.rows[0].example, Example::Text("c t".into()));
        assert!(read_rows(&path, Some(Format::Alpaca)).is_err());
    }

    #[test]
    fn a_file_that_is_missing_or_a_folder_is_named() {
        for path in [Path::new("no/such.jsonl"), Path::new(".")] {
            let error = read_rows(path, None).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }
}

#[cfg(test)]
pub(super) mod tests_support {
    use super::*;

    /// Nothing read yet.
    pub(in super::super) fn collected(path: &Path) -> Collected<'_> {
        Collected {
            path,
            columns: &SAME_NAMES,
            format: None,
            rows: Vec::new(),
            ignored: Vec::new(),
        }
    }
}
