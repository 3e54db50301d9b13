//! Reads a data file, whatever it is written in.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::columns::Columns;
use super::error::DataError;
use super::format::Format;
use super::rows::{Collected, Container, Rows, SAME_NAMES};
use super::{json, parquet, table};

/// Reads a data file. Blank lines are skipped; columns that the format does not have are not read. The container is
/// detected from the extension and the first bytes. If `format` is `None`, the format is detected from the columns of the
/// first row, and every row must have it.
///
/// # Errors
///
/// The first wrong row, with file, line and the beginning of the line; or a file without rows.
pub fn read_rows(path: &Path, format: Option<Format>) -> Result<Rows, DataError> {
    read_columns(path, format, &SAME_NAMES)
}

/// [`read_rows`] for a file with other column names.
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
    // A pipe cannot be read twice.
    if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        Read::by_ref(&mut file)
            .take(64)
            .read_to_end(&mut beginning)
            .map_err(failed)?;
        file = File::open(path).map_err(failed)?;
    }
    let container = container(path, &beginning);
    let mut rows = Collected::new(path, format, columns);
    match container {
        Container::JsonLines => json::lines(BufReader::new(file), &mut rows)?,
        Container::JsonArray => json::array(file, &mut rows)?,
        Container::Csv => table::rows(file, b',', &mut rows)?,
        Container::Tsv => table::rows(file, b'\t', &mut rows)?,
        Container::Parquet => parquet::rows(file, &mut rows)?,
    }
    rows.finish(container)
}

/// [`read_rows`] for JSON lines in memory; `path` is their name in messages.
///
/// # Errors
///
/// See [`read_rows`].
pub fn parse_rows(bytes: &[u8], path: &Path) -> Result<Rows, DataError> {
    let mut rows = Collected::new(path, None, &SAME_NAMES);
    json::lines(bytes, &mut rows)?;
    rows.finish(Container::JsonLines)
}

/// Detects the container from the extension; for `.json` and unknown extensions, from the first bytes.
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

#[cfg(test)]
mod tests {
    use super::super::format::Example;
    use super::*;

    #[test]
    fn a_container_is_detected_from_its_name_or_its_first_bytes() {
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
    fn what_was_found_is_reported() {
        let rows = parse_rows(b"{\"text\": \"a\"}", Path::new("a.jsonl")).unwrap();
        assert_eq!(rows.source.to_string(), "JSON lines of {\"text\"}");
        let text = b"{\"id\": 1, \"text\": \"a\"}\n{\"text\": \"b\", \"from\": \"x\", \"id\": 2}";
        let rows = parse_rows(text, Path::new("a.jsonl")).unwrap();
        assert_eq!(rows.ignored, ["id", "from"]);
    }

    #[test]
    fn the_first_row_decides_the_format_and_the_others_must_have_it() {
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
            error.contains("a.jsonl:1: unknown format (it has \"a\", \"b\""),
            "{error}"
        );
        assert!(error.contains("\"messages\""), "{error}");
    }

    #[test]
    fn a_format_that_is_set_is_not_detected() {
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
