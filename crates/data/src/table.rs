//! Rows of a text table, CSV or TSV: a line of column names, then one record per row.

use std::cell::Cell;
use std::io::Read;
use std::rc::Rc;

use csv::{ByteRecord, Error, ErrorKind, ReaderBuilder, Terminator};
use serde_json::{Map, Value};

use super::error::{DataError, LineError};
use super::format::Format;
use super::rows::Collected;

/// The maximum number of columns.
const MOST_COLUMNS: usize = 4096;

/// Reads a table row by row.
pub(super) fn rows(file: impl Read, delimiter: u8, rows: &mut Collected) -> Result<(), DataError> {
    let ended = Rc::new(Cell::new(false));
    let watched = Watched {
        // Every row then has an end, which is needed to count lines.
        file: file.chain(&b"\n"[..]),
        ended: ended.clone(),
    };
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        // In TSV a quotation mark is a plain character.
        .quoting(delimiter != b'\t')
        .terminator(Terminator::Any(b'\n'))
        .has_headers(false)
        // Checked here because the message needs the record.
        .flexible(true)
        .from_reader(watched);
    let mut record = ByteRecord::new();
    let mut columns: Option<(Vec<String>, Format)> = None;
    while reader
        .read_byte_record(&mut record)
        .map_err(|error| failed(error, rows))?
    {
        // The position is behind the row; before it there may be blank lines.
        let inside = record.as_slice().iter().filter(|byte| **byte == b'\n');
        let line = (reader.position().line() as usize).saturating_sub(inside.count());
        let (line, open) = if ended.get() {
            (line, true)
        } else {
            (line.saturating_sub(1), false)
        };
        trim_carriage_return(&mut record);
        if record.len() == 1 && record[0].is_empty() {
            continue;
        }
        let added = match (&columns, open) {
            (_, true) => Err(LineError::Table("a value in quotes is never closed".into())),
            (None, _) => names(&record).and_then(|names| {
                let format = rows.columns(names.iter().map(String::as_str))?;
                columns = Some((names, format));
                Ok(())
            }),
            (Some((names, format)), _) => {
                let is_read = |name: &str| rows.looks_at(*format, name);
                row(names, is_read, delimiter, &record).and_then(|row| rows.add(line, row))
            }
        };
        added.map_err(|problem| {
            let fields: Vec<&[u8]> = record.iter().collect();
            rows.line_error(line, problem, &fields.join(&delimiter))
        })?;
    }
    Ok(())
}

/// A file that records whether its end was reached. The reader reads past the last line only if a quote is never closed.
struct Watched<R> {
    file: R,
    ended: Rc<Cell<bool>>,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.ended.set(read == 0 && !buffer.is_empty());
        Ok(read)
    }
}

/// Removes the carriage return of Windows from the last field of a row.
fn trim_carriage_return(record: &mut ByteRecord) {
    if record.as_slice().last() == Some(&b'\r') {
        let fields: Vec<Vec<u8>> = record.iter().map(<[u8]>::to_vec).collect();
        record.clear();
        for (index, field) in fields.iter().enumerate() {
            let last = index + 1 == fields.len();
            record.push_field(match field.strip_suffix(b"\r") {
                Some(field) if last => field,
                _ => field,
            });
        }
    }
}

/// The columns' names, each once.
fn names(headers: &ByteRecord) -> Result<Vec<String>, LineError> {
    let mut names: Vec<String> = Vec::new();
    if headers.len() > MOST_COLUMNS {
        let problem = format!("the first line names {} columns", headers.len());
        return Err(LineError::Table(problem));
    }
    for (index, header) in headers.iter().enumerate() {
        let Ok(header) = std::str::from_utf8(header) else {
            let problem = format!("the name of column {} is not UTF-8 text", index + 1);
            return Err(LineError::Table(problem));
        };
        let header = header.trim_start_matches('\u{feff}').trim();
        if names.iter().any(|known| known == header) {
            let problem = format!("two columns are called {header:?}");
            return Err(LineError::Table(problem));
        }
        names.push(header.to_string());
    }
    Ok(names)
}

/// The columns of a record that are needed.
fn row(
    names: &[String],
    is_read: impl Fn(&str) -> bool,
    delimiter: u8,
    record: &ByteRecord,
) -> Result<Map<String, Value>, LineError> {
    if record.len() != names.len() {
        let rule = match delimiter {
            b'\t' => {
                "a value cannot hold a tab or a line break; write such examples as CSV or JSON lines"
            }
            _ => "a value with a delimiter, a quote or a line break must be in quotes",
        };
        return Err(LineError::Table(format!(
            "{} values, but the first line names {} columns; {rule}",
            record.len(),
            names.len()
        )));
    }
    let mut row = Map::new();
    for (name, value) in names.iter().zip(record.iter()) {
        if !is_read(name) {
            continue;
        }
        let Ok(value) = std::str::from_utf8(value) else {
            let problem = format!("column {name:?} is not UTF-8 text; save the file as UTF-8");
            return Err(LineError::Table(problem));
        };
        row.insert(name.clone(), Value::from(value));
    }
    Ok(row)
}

/// The parser's message. The parser accepts all bytes, so there is no other error.
fn failed(error: Error, rows: &Collected) -> DataError {
    let source = match error.into_kind() {
        ErrorKind::Io(source) => source,
        other => std::io::Error::other(format!("{other:?}")),
    };
    DataError::Read {
        path: rows.path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::super::read::read_rows;
    use super::super::rows::{Row, Rows};
    use super::super::{Example, Format};

    fn read(name: &str, text: &[u8]) -> Result<Rows, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_rows(&path, None).map_err(|error| error.to_string())
    }

    #[test]
    fn quotes_hold_delimiters_line_breaks_and_quotes_and_lines_are_counted() {
        let text = "\u{feff}id,context,target\r\n1,\"a, b\r\nc \"\"d\"\"\",x\r\n\r\n2,e,y\r\n";
        let found = read("a.csv", text.as_bytes()).unwrap();
        let rows = [
            Row::answer(2, "a, b\r\nc \"d\"", "x"),
            Row::answer(5, "e", "y"),
        ];
        assert_eq!(found.rows, rows);
        assert_eq!(found.source.to_string(), "CSV of {\"context\", \"target\"}");
    }

    #[test]
    fn tabs_separate_and_columns_tell_the_format() {
        let found = read("a.tsv", b"instruction\tinput\toutput\nadd, up\t\t3\n").unwrap();
        assert_eq!(found.source.format, Format::Alpaca);
        let Example::Instruction { input, output, .. } = &found.rows[0].example else {
            panic!()
        };
        assert_eq!((input, output.as_str()), (&None, "3"));
        let quotes = "context\ttarget\n\"He said hi\tpositive\nAn \"other\"\t\"negative\"\n";
        let found = read("a.tsv", quotes.as_bytes()).unwrap();
        let rows = [
            Row::answer(2, "\"He said hi", "positive"),
            Row::answer(3, "An \"other\"", "\"negative\""),
        ];
        assert_eq!(found.rows, rows);
        let messages = b"messages\n\"[{\"\"role\"\":\"\"user\"\",\"\"content\"\":\"\"q\"\"},{\"\"role\"\":\"\"assistant\"\",\"\"content\"\":\"\"a\"\"}]\"\n";
        assert_eq!(
            read("a.csv", messages).unwrap().source.format,
            Format::Messages
        );
    }

    #[test]
    fn a_table_that_is_wrong_says_where() {
        for (text, part) in [
            (
                &b"context,target\na,b\nc\n"[..],
                "a.csv:3: 1 values, but the first line names 2",
            ),
            (b"context,target\na,b,c\n", "a.csv:2: 3 values"),
            (
                b"context,context\na,b\n",
                "a.csv:1: two columns are called \"context\"",
            ),
            (b"context,target\na,\n", "a.csv:2: \"target\" is empty"),
            (
                b"context,target\na,caf\xe9\n",
                "a.csv:2: column \"target\" is not UTF-8",
            ),
            (b"con\xe9,target\na,b\n", "a.csv:1: the name of column 1"),
            (
                b"question,target2\na,b\n",
                "a.csv:1: unknown format (it has \"question\", \"target2\"",
            ),
            (b"target\nb\n", "a.csv:2: the key \"context\" is missing"),
            (b"context,target\n", "has no examples"),
            (b"", "has no examples"),
            (
                b"context,target\r\n\r\n\"a,b\r\n",
                "a.csv:3: a value in quotes is never closed",
            ),
        ] {
            let error = read("a.csv", text).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_column_that_is_not_read_may_hold_anything() {
        let found = read("a.csv", b"image,context,target\n\xff\xfe,a,b\n").unwrap();
        assert_eq!(found.rows, [Row::answer(2, "a", "b")]);
    }
}
