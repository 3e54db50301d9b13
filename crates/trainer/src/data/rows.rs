//! JSON lines of `{"context", "target"}`, FinLoRA's format, one row a line.

use std::path::Path;

use serde_json::Value;

use super::error::{DataError, LineError};

/// One example as it is in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The line in the file, from 1.
    pub line: usize,
    /// What the model is given.
    pub context: String,
    /// What it shall answer. Never empty.
    pub target: String,
}

/// Reads a data file whole. Blank lines are skipped, keys other than the two are ignored.
///
/// # Errors
///
/// The first bad line, with file, line number and the line's beginning; or a file without rows.
pub fn read_rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Read {
        path: path.into(),
        source,
    })?;
    parse_rows(&bytes, path)
}

/// [`read_rows`] for bytes at hand; `path` is what messages call them.
///
/// # Errors
///
/// See [`read_rows`].
pub fn parse_rows(bytes: &[u8], path: &Path) -> Result<Vec<Row>, DataError> {
    // Windows editors begin a UTF-8 file with a byte order mark, which is no part of its first line.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut rows = Vec::new();
    for (index, bytes) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line = index + 1;
        match parse_line(bytes) {
            Ok(None) => {}
            Ok(Some((context, target))) => rows.push(Row {
                line,
                context,
                target,
            }),
            Err(problem) => {
                return Err(DataError::Line {
                    path: path.into(),
                    line,
                    problem,
                    beginning: beginning(bytes),
                });
            }
        }
    }
    if rows.is_empty() {
        return Err(DataError::NoRows { path: path.into() });
    }
    Ok(rows)
}

/// The context and the target of a line; `None` if it is blank.
fn parse_line(bytes: &[u8]) -> Result<Option<(String, String)>, LineError> {
    let text = std::str::from_utf8(bytes).map_err(|error| LineError::NotUtf8 {
        column: error.valid_up_to() + 1,
    })?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    let value: Value = serde_json::from_str(text).map_err(json_error)?;
    let Value::Object(mut object) = value else {
        return Err(LineError::NotAnObject {
            got: json_type(&value),
        });
    };
    let present: Vec<String> = object.keys().cloned().collect();
    let mut take = |key| match object.remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(value) => Err(LineError::WrongType {
            key,
            got: json_type(&value),
        }),
        None => Err(LineError::MissingKey {
            key,
            present: present.clone(),
        }),
    };
    let (context, target) = (take("context")?, take("target")?);
    if target.trim().is_empty() {
        return Err(LineError::EmptyTarget);
    }
    Ok(Some((context, target)))
}

/// The parser's words without its own line number, which is always 1 here.
fn json_error(error: serde_json::Error) -> LineError {
    let text = error.to_string();
    let message = text.split(" at line ").next().unwrap_or(&text);
    LineError::Json {
        message: message.into(),
        column: error.column(),
    }
}

fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The first characters of a line for a message.
fn beginning(bytes: &[u8]) -> String {
    const CHARACTERS: usize = 72;
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_end();
    let mut short: String = text.chars().take(CHARACTERS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8]) -> Result<Vec<Row>, DataError> {
        parse_rows(text, Path::new("data.jsonl"))
    }

    /// The message for `bad` as the third line of a file.
    fn message(bad: &[u8]) -> String {
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
        let row = |line, context: &str, target: &str| Row {
            line,
            context: context.into(),
            target: target.into(),
        };
        assert_eq!(parse(text).unwrap(), [row(1, "a", "b"), row(3, "", "d")]);
    }

    #[test]
    fn a_bad_line_says_what_is_wrong_and_how_it_begins() {
        let cut = message(b"{\"context\": \"Vodafone\", \"tar");
        assert!(
            cut.contains("not valid JSON") && cut.contains("column 28"),
            "{cut}"
        );
        assert!(
            cut.contains("begins: {\"context\": \"Vodafone\", \"tar"),
            "{cut}"
        );
        assert!(!cut.contains("at line"), "{cut}");
        let long = message(format!("[{}", "x".repeat(500)).as_bytes());
        assert!(long.ends_with("x…") && long.len() < 300, "{long}");
    }

    #[test]
    fn a_line_that_is_no_row_names_key_and_type() {
        assert!(message(b"[1, 2]").contains("got an array"));
        assert!(message(b"17").contains("got a number"));
        let missing = message(b"{\"context\": \"a\", \"output\": \"b\"}");
        assert!(missing.contains("key \"target\" is missing"), "{missing}");
        assert!(missing.contains("\"context\", \"output\""), "{missing}");
        assert!(message(b"{}").contains("\"context\" is missing; the line has no keys"));
        let wrong = message(b"{\"context\": \"a\", \"target\": 3}");
        assert!(
            wrong.contains("\"target\" must be a string, got a number"),
            "{wrong}"
        );
        assert!(message(b"{\"context\": null, \"target\": \"\"}").contains("got null"));
    }

    #[test]
    fn an_empty_target_is_an_error() {
        for target in ["", "  \\n"] {
            let line = format!("{{\"context\": \"a\", \"target\": \"{target}\"}}");
            assert!(message(line.as_bytes()).contains("\"target\" is empty"));
        }
    }

    #[test]
    fn bytes_that_are_not_text_are_an_error_with_their_place() {
        let text = message(b"{\"context\": \"caf\xe9\", \"target\": \"b\"}");
        assert!(
            text.contains("not UTF-8 text (byte 17 of the line)"),
            "{text}"
        );
    }

    #[test]
    fn a_file_without_rows_or_that_is_missing_is_an_error() {
        assert!(matches!(parse(b""), Err(DataError::NoRows { .. })));
        assert!(matches!(parse(b" \n\n"), Err(DataError::NoRows { .. })));
        let error = read_rows(Path::new("no/such.jsonl"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("no/such.jsonl"), "{error}");
    }
}
