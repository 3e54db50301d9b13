//! Rows in Apache Parquet. Only the columns that are needed are decoded.

use std::fs::File;
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::error::{DataError, LineError};
use super::rows::Collected;
use crate::contained::contain;

/// Reads a file, a row at a time.
pub(super) fn rows(file: File, rows: &mut Collected) -> Result<(), DataError> {
    let path = rows.path.to_path_buf();
    let broken = |message: String| DataError::Container {
        path: path.clone(),
        container: "Parquet",
        message,
    };
    // The decoder panics on some inconsistent files.
    let read = contain(|| read(file, rows));
    match read {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Problem::File(error))) => Err(broken(error.to_string())),
        Ok(Err(Problem::Row(error))) => Err(error),
        Err(_) => Err(broken(
            "its contents are inconsistent; it may be truncated, download it again".into(),
        )),
    }
}

enum Problem {
    File(ParquetError),
    Row(DataError),
}

impl From<ParquetError> for Problem {
    fn from(error: ParquetError) -> Self {
        Self::File(error)
    }
}

fn read(file: File, rows: &mut Collected) -> Result<(), Problem> {
    let reader = SerializedFileReader::new(file)?;
    let schema = reader.metadata().file_metadata().schema();
    let fields = schema.get_fields();
    let path = rows.path.to_path_buf();
    let at = |row: usize, problem| {
        Problem::Row(DataError::Record {
            path: path.clone(),
            row,
            problem,
        })
    };
    let format = rows.columns(fields.iter().map(|field| field.name()));
    let format = format.map_err(|problem| at(1, problem))?;
    let read = (fields.iter()).filter(|field| rows.looks_at(format, field.name()));
    let read: Vec<Arc<Type>> = read.cloned().collect();
    let projection = Type::group_type_builder(schema.name()).with_fields(read);
    let records = RowIter::from_file(Some(projection.build()?), &reader)?;
    for (index, record) in records.enumerate() {
        let row = object(record?).and_then(|row| rows.add(index + 1, row));
        row.map_err(|problem| at(index + 1, problem))?;
    }
    Ok(())
}

fn object(record: Record) -> Result<Map<String, Value>, LineError> {
    let columns = record.into_columns().into_iter();
    columns
        .map(|(name, field)| {
            let value = value(&field)
                .map_err(|problem| LineError::Table(format!("column {name:?} {problem}")))?;
            Ok((name, value))
        })
        .collect()
}

/// A field as JSON. Types without a counterpart, such as dates, become texts.
fn value(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(*value),
        Field::Str(text) => Value::from(text.as_str()),
        // Text columns that were written without the logical type.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::from(text),
            Err(_) => return Err("is not UTF-8 text".into()),
        },
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float(value) => number(f64::from(*value)),
        Field::Double(value) => number(*value),
        Field::Group(record) => group(record)?,
        Field::ListInternal(list) => {
            let items = list.elements().iter().map(value);
            Value::Array(items.collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, field)| {
                let key = match value(key)? {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
                Ok::<_, String>((key, value(field)?))
            });
            Value::Object(entries.collect::<Result<_, _>>()?)
        }
        other => Value::from(other.to_string()),
    })
}

fn group(record: &Record) -> Result<Value, String> {
    // In Arrow all structures of a column have the same keys, with null for missing ones. Such keys are absent, as in TRL.
    let fields = record.get_column_iter();
    let fields = fields.filter(|(_, field)| !matches!(field, Field::Null));
    let fields = fields.map(|(name, field)| Ok::<_, String>((name.clone(), value(field)?)));
    Ok(Value::Object(fields.collect::<Result<_, _>>()?))
}

fn number(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::super::read::read_rows;
    use super::super::rows::{Row, Rows};
    use super::super::{Example, Format};

    /// What Apache Arrow wrote; `make_formats.py` beside it says what is in it.
    fn fixture(name: &str) -> PathBuf {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests");
        tests.join("fixtures/formats").join(name)
    }

    fn read(path: &Path) -> Result<Rows, String> {
        read_rows(path, None).map_err(|error| error.to_string())
    }

    #[test]
    fn rows_of_all_groups_come_in_order_and_other_columns_may_hold_anything() {
        let found = read(&fixture("pairs.parquet")).unwrap();
        assert_eq!(
            found.source.to_string(),
            "Parquet of {\"context\", \"target\"}"
        );
        let row = |index: usize| {
            let target = if index % 2 == 1 { "yes" } else { "no" };
            let context = format!("Input: ünïcode {index}\nAnswer: ");
            Row::answer(index + 1, context, target)
        };
        assert_eq!(found.rows, (0..25).map(row).collect::<Vec<_>>());
    }

    #[test]
    fn lists_of_messages_are_conversations() {
        let found = read(&fixture("messages.parquet")).unwrap();
        assert_eq!(found.source.format, Format::Messages);
        let turns = found.rows.iter().map(|row| match &row.example {
            Example::Conversation(conversation) => conversation.assistant_turns().count(),
            other => panic!("{other:?}"),
        });
        assert_eq!(turns.collect::<Vec<_>>(), [1, 2, 1]);
        assert_eq!(found.rows[0].example.target(), Some("there"));
        assert_eq!(found.rows[1].example.target(), Some("no"));
    }

    #[test]
    fn a_row_that_is_wrong_is_named() {
        for (name, part) in [
            (
                "missing.parquet",
                "missing.parquet, example 2: \"context\" must be a string, got null",
            ),
            (
                "numbers.parquet",
                "example 1: \"target\" must be a string, got a number",
            ),
            (
                "unknown.parquet",
                "example 1: unknown format (it has \"question\", \"reply\"",
            ),
        ] {
            let error = read(&fixture(name)).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_cut_or_damaged_is_an_error_or_still_rows() {
        let whole = std::fs::read(fixture("pairs.parquet")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("damaged.parquet");
        for length in (0..whole.len()).step_by(301) {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = read(&path).unwrap_err();
            assert!(
                error.contains("damaged.parquet is not a valid Parquet file"),
                "{error}"
            );
        }
        for position in (0..whole.len()).step_by(97) {
            let mut damaged = whole.clone();
            damaged[position] ^= 0xff;
            std::fs::write(&path, &damaged).unwrap();
            if let Err(error) = read(&path) {
                assert!(error.contains("damaged.parquet"), "{error}");
            }
        }
    }
}
