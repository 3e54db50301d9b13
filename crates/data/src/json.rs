//! Rows in JSON: one object per line, or one array of objects.

use std::borrow::Cow;
use std::io::{BufRead, Read};

use serde_json::{Map, Value};

use super::error::{DataError, LineError, json_type};
use super::integers;
use super::rows::Collected;

/// The bytes with which editors on Windows begin a UTF-8 file; not part of its first line.
pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Bytes of the longest line that is read, which is more than a row of a million tokens has.
const LONGEST_LINE: usize = 64 << 20;

/// Bytes of the largest array that is read; it is kept in memory in addition to its rows.
const LARGEST_ARRAY: u64 = 2 << 30;

/// Reads lines, one at a time.
pub(super) fn lines(mut file: impl BufRead, rows: &mut Collected) -> Result<(), DataError> {
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let limited = Read::by_ref(&mut file).take(LONGEST_LINE as u64 + 1);
        let read = { limited }.read_until(b'\n', &mut bytes);
        let read = read.map_err(|source| DataError::Read {
            path: rows.path.into(),
            source,
        })?;
        if read == 0 {
            break;
        }
        let text = match line {
            1 => bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes),
            _ => &bytes,
        };
        let object = if text.len() > LONGEST_LINE {
            Err(LineError::TooLong {
                limit: LONGEST_LINE,
            })
        } else {
            parse_line(text.strip_suffix(b"\n").unwrap_or(text))
        };
        let added = object.and_then(|object| match object {
            Some(object) => rows.add(line, object),
            None => Ok(()),
        });
        added.map_err(|problem| rows.line_error(line, problem, text))?;
    }
    Ok(())
}

/// The object of a line; `None` for a blank line.
fn parse_line(bytes: &[u8]) -> Result<Option<Map<String, Value>>, LineError> {
    let text = std::str::from_utf8(bytes).map_err(|error| LineError::NotUtf8 {
        column: error.valid_up_to() + 1,
    })?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    let value = integers::parse(text).map_err(|error| json_error(&error))?;
    object(value).map(Some)
}

fn object(value: Value) -> Result<Map<String, Value>, LineError> {
    match value {
        Value::Object(object) => Ok(object),
        other => Err(LineError::NotAnObject {
            got: json_type(&other),
        }),
    }
}

/// The parser's message without its line number.
fn json_error(error: &serde_json::Error) -> LineError {
    LineError::Json {
        message: message(error),
        column: error.column(),
    }
}

fn message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).into()
}

/// Reads one array, an element at a time.
pub(super) fn array(mut file: impl Read, rows: &mut Collected) -> Result<(), DataError> {
    let mut bytes = Vec::new();
    let limited = Read::by_ref(&mut file).take(LARGEST_ARRAY + 1);
    let read = { limited }.read_to_end(&mut bytes);
    read.map_err(|source| DataError::Read {
        path: rows.path.into(),
        source,
    })?;
    let broken = |message: String| DataError::Container {
        path: rows.path.into(),
        container: "JSON",
        message,
    };
    if bytes.len() as u64 > LARGEST_ARRAY {
        return Err(broken(
            "an array of more than 2 GiB; write it as JSON lines, one object per line".into(),
        ));
    }
    let replaced = match std::str::from_utf8(&bytes).map(integers::long_integers) {
        Ok(Cow::Owned(replaced)) => Some(replaced.into_bytes()),
        _ => None,
    };
    let bytes = replaced.unwrap_or(bytes);
    let mut text = Text {
        bytes: bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes),
        line: 1,
    };
    text.skip_space();
    if !text.take(b'[') {
        return Err(broken(format!(
            "line {}: expected an array of examples",
            text.line
        )));
    }
    text.skip_space();
    let mut goes_on = !text.take(b']');
    while goes_on {
        text.skip_space();
        let (line, element) = (text.line, text.bytes);
        let mut values = serde_json::Deserializer::from_slice(element).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                let line = line + error.line().saturating_sub(1);
                let message = format!(
                    "line {line}, column {}: {}",
                    error.column(),
                    message(&error)
                );
                return Err(broken(message));
            }
            None => return Err(broken(format!("line {line}: the array is cut off"))),
        };
        text.skip(values.byte_offset());
        let added = object(value).and_then(|object| rows.add(line, object));
        added.map_err(|problem| rows.line_error(line, problem, element))?;
        text.skip_space();
        goes_on = text.take(b',');
        if !goes_on && !text.take(b']') {
            let line = text.line;
            return Err(broken(if text.bytes.is_empty() {
                format!("line {line}: the array is cut off")
            } else {
                format!("line {line}: expected a comma or the end of the array")
            }));
        }
    }
    text.skip_space();
    if text.bytes.is_empty() {
        Ok(())
    } else {
        Err(broken(format!(
            "line {}: something follows the array",
            text.line
        )))
    }
}

/// The text that is left to read, and the line on which it begins.
struct Text<'a> {
    bytes: &'a [u8],
    line: usize,
}

impl Text<'_> {
    fn skip(&mut self, count: usize) {
        let (skipped, left) = self.bytes.split_at(count);
        self.line += skipped.iter().filter(|byte| **byte == b'\n').count();
        self.bytes = left;
    }

    fn skip_space(&mut self) {
        self.skip(self.bytes.len() - self.bytes.trim_ascii_start().len());
    }

    fn take(&mut self, byte: u8) -> bool {
        let there = self.bytes.first() == Some(&byte);
        self.skip(usize::from(there));
        there
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::read::{parse_rows, read_rows};
    use super::super::rows::Row;
    use super::*;

    fn parse(text: &[u8]) -> Result<Vec<Row>, DataError> {
        parse_rows(text, Path::new("data.jsonl")).map(|rows| rows.rows)
    }

    /// The message for `bad` as the third line of a file.
    fn line_message(bad: &[u8]) -> String {
        let mut text = b"{\"context\": \"a\", \"target\": \"b\"}\n\n".to_vec();
        text.extend_from_slice(bad);
        text.extend_from_slice(b"\n{\"context\": \"a\", \"target\": \"b\"}\n");
        let message = parse(&text).unwrap_err().to_string();
        assert!(message.starts_with("data.jsonl:3: "), "{message}");
        message
    }

    #[test]
    fn rows_keep_their_line_numbers_over_blank_lines_and_extra_keys() {
        let text = b"\xef\xbb\xbf{\"context\": \"a\", \"target\": \"b\"}\r\n  \n{\"id\": 7, \"target\": \"d\", \"context\": \"\"}";
        let rows = [Row::answer(1, "a", "b"), Row::answer(3, "", "d")];
        assert_eq!(parse(text).unwrap(), rows);
    }

    #[test]
    fn a_bad_line_says_what_is_wrong_and_how_it_begins() {
        let cut = line_message(b"{\"context\": \"Vodafone\", \"tar");
        assert!(
            cut.contains("not valid JSON") && cut.contains("column 28"),
            "{cut}"
        );
        assert!(
            cut.contains("begins: {\"context\": \"Vodafone\", \"tar"),
            "{cut}"
        );
        assert!(!cut.contains("at line"), "{cut}");
        let long = line_message(format!("[{}", "x".repeat(500)).as_bytes());
        assert!(long.ends_with("x…") && long.len() < 300, "{long}");
    }

    #[test]
    fn a_line_that_is_no_row_names_key_and_type() {
        assert!(line_message(b"[1, 2]").contains("got an array"));
        assert!(line_message(b"17").contains("got a number"));
        let missing = line_message(b"{\"context\": \"a\", \"output\": \"b\"}");
        assert!(missing.contains("key \"target\" is missing"), "{missing}");
        assert!(missing.contains("\"context\", \"output\""), "{missing}");
        assert!(line_message(b"{}").contains("\"context\" is missing; the line has no keys"));
        let wrong = line_message(b"{\"context\": \"a\", \"target\": 3}");
        assert!(
            wrong.contains("\"target\" must be a string, got a number"),
            "{wrong}"
        );
        assert!(line_message(b"{\"context\": null, \"target\": \"\"}").contains("got null"));
    }

    #[test]
    fn an_empty_target_is_an_error() {
        for target in ["", "  \\n"] {
            let line = format!("{{\"context\": \"a\", \"target\": \"{target}\"}}");
            assert!(line_message(line.as_bytes()).contains("\"target\" is empty"));
        }
    }

    #[test]
    fn bytes_that_are_not_text_are_an_error_with_their_place() {
        let text = line_message(b"{\"context\": \"caf\xe9\", \"target\": \"b\"}");
        assert!(
            text.contains("not UTF-8 text (byte 17 of the line)"),
            "{text}"
        );
    }

    #[test]
    fn a_file_without_rows_is_an_error() {
        assert!(matches!(parse(b""), Err(DataError::NoRows { .. })));
        assert!(matches!(parse(b" \n\n"), Err(DataError::NoRows { .. })));
    }

    #[test]
    fn a_line_without_an_end_is_not_read_into_memory() {
        let endless = std::io::BufReader::new(std::io::repeat(b'x'));
        let path = Path::new("data.jsonl");
        let mut rows = Collected::new(path, None, &super::super::rows::SAME_NAMES);
        let error = lines(endless, &mut rows).unwrap_err().to_string();
        assert!(
            error.contains("data.jsonl:1: longer than 64 MiB"),
            "{error}"
        );
    }

    fn from_array(text: &str) -> Result<Vec<Row>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.json");
        std::fs::write(&path, text).unwrap();
        let rows = read_rows(&path, None).map_err(|error| error.to_string())?;
        Ok(rows.rows)
    }

    #[test]
    fn an_arrays_rows_know_their_lines() {
        let text = "[\n {\"context\": \"a\",\n  \"target\": \"b\"} ,\n\n {\"context\": \"]\\n,\", \"target\": \"d\"}\n]\n";
        let rows = [Row::answer(2, "a", "b"), Row::answer(5, "]\n,", "d")];
        assert_eq!(from_array(text).unwrap(), rows);
    }

    #[test]
    fn a_broken_array_says_where() {
        let row = "{\"text\": \"a\"}";
        for (text, part) in [
            (format!("[{row},\n{row}"), "line 2: the array is cut off"),
            (format!("[{row},\n"), "line 2: the array is cut off"),
            (format!("[{row}\n{row}]"), "line 2: expected a comma"),
            (format!("[\n{row},\n{{\"text\": }}]"), "line 3, column 10"),
            (format!("[{row}]\n\n{row}"), "line 3: something follows"),
            (format!("[{row},\n7]"), "rows.json:2: expected an object"),
            (
                format!("[{row},\n{{\"text\": 7}}]"),
                "rows.json:2: \"text\" must be a string",
            ),
            ("[]".into(), "has no examples"),
            ("[".into(), "cut off"),
            ("[".repeat(100_000), "recursion limit"),
        ] {
            let error = from_array(&text).unwrap_err();
            assert!(error.contains(part) && error.len() < 600, "{part}: {error}");
        }
    }
}
