//! A value of a config file, before it is checked.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use toml::de::{DeTable, DeValue};

/// One key of a table.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub key: String,
    pub value: Value,
    /// The line of the key, from 1, if the parser reports it (TOML's does, JSON's does not).
    pub line: Option<usize>,
}

/// A value of either format. Displayed as a person would have written it in TOML.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// JSON's null: the key is absent.
    Null,
    Bool(bool),
    Integer(i64),
    Float(f64),
    String(String),
    List(Vec<Value>),
    Table(Vec<Entry>),
    /// A value that is right for no key, as written: a date, or an integer of more than 64 bits.
    Other(String),
}

impl Value {
    /// The entries of a parsed TOML table; `text` is the whole document, for line numbers.
    pub fn from_toml(table: &DeTable, text: &str) -> Vec<Entry> {
        let breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let breaks: Vec<usize> = breaks.map(|(at, _)| at).collect();
        Self::entries(table, &breaks)
    }

    /// `breaks` are the positions of the line breaks.
    fn entries(table: &DeTable, breaks: &[usize]) -> Vec<Entry> {
        table
            .iter()
            .map(|(key, value)| Entry {
                key: key.get_ref().to_string(),
                value: Self::from_toml_value(value.get_ref(), breaks),
                line: Some(1 + breaks.partition_point(|at| *at < key.span().start)),
            })
            .collect()
    }

    fn from_toml_value(value: &DeValue, breaks: &[usize]) -> Self {
        match value {
            DeValue::String(string) => Self::String(string.to_string()),
            DeValue::Integer(integer) => {
                match i64::from_str_radix(integer.as_str(), integer.radix()) {
                    Ok(number) => Self::Integer(number),
                    Err(_) => Self::Other(integer.to_string()),
                }
            }
            DeValue::Float(float) => match float.as_str().parse() {
                Ok(number) => Self::Float(number),
                Err(_) => Self::Other(float.as_str().to_string()),
            },
            DeValue::Boolean(boolean) => Self::Bool(*boolean),
            DeValue::Datetime(datetime) => Self::Other(datetime.to_string()),
            DeValue::Array(list) => Self::List(
                list.iter()
                    .map(|item| Self::from_toml_value(item.get_ref(), breaks))
                    .collect(),
            ),
            DeValue::Table(table) => Self::Table(Self::entries(table, breaks)),
        }
    }
}

/// Line and column, counted from 1, of a byte of `text`.
pub(super) fn line_and_column(text: &str, byte: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..byte.min(text.len())];
    let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
    let start = before
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    (
        line,
        1 + String::from_utf8_lossy(&before[start..]).chars().count(),
    )
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Integer(value) => write!(f, "{value}"),
            Self::Float(value) if value.is_nan() => f.write_str("nan"),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::String(value) => write!(f, "{value:?}"),
            Self::List(items) => {
                f.write_str("[")?;
                for (index, item) in items.iter().enumerate() {
                    let comma = if index == 0 { "" } else { ", " };
                    write!(f, "{comma}{item}")?;
                }
                f.write_str("]")
            }
            Self::Table(_) => f.write_str("{ … }"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

/// From JSON. Unlike `serde_json::Value`, a repeated key is an error: of two runs with one name, or two learning rates in
/// one run, the last would otherwise be used silently.
impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or_else(|_| Value::Other(value.to_string()), Value::Integer))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut keys = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if !keys.insert(key.clone()) {
                return Err(A::Error::custom(format!(
                    "the key {key:?} is repeated here"
                )));
            }
            let value = map.next_value()?;
            let line = None;
            entries.push(Entry { key, value, line });
        }
        Ok(Value::Table(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toml_and_json_give_the_same_values() {
        let text = "a = 0x10\nb = [1.5, true]\nc = \"x\"\n[d]\ne = -1\n";
        let table = DeTable::parse(text).unwrap();
        let from_toml = Value::from_toml(table.get_ref(), text);
        let json = r#"{"a": 16, "b": [1.5, true], "c": "x", "d": {"e": -1}}"#;
        let Value::Table(from_json) = serde_json::from_str(json).unwrap() else {
            panic!()
        };
        let shown = |entries: &[Entry]| -> Vec<String> {
            entries
                .iter()
                .map(|entry| format!("{} {}", entry.key, entry.value))
                .collect()
        };
        assert_eq!(shown(&from_toml), shown(&from_json));
        assert_eq!(
            shown(&from_json),
            ["a 16", "b [1.5, true]", "c \"x\"", "d { … }"]
        );
        assert_eq!(from_toml[3].line, Some(4));
        assert_eq!(from_json[0].line, None);
    }

    #[test]
    fn a_repeated_json_key_is_an_error_with_its_line() {
        let error = serde_json::from_str::<Value>("{\"a\": 1,\n\"a\": 2}").unwrap_err();
        assert_eq!(error.line(), 2);
        assert!(
            error.to_string().contains("\"a\" is repeated here"),
            "{error}"
        );
    }

    #[test]
    fn numbers_past_64_bits_are_kept_as_written() {
        let json: Value = serde_json::from_str("18446744073709551615").unwrap();
        assert_eq!(json, Value::Other("18446744073709551615".into()));
    }

    #[test]
    fn positions_count_from_one_in_characters() {
        assert_eq!(line_and_column("a\näb", 0), (1, 1));
        assert_eq!(line_and_column("a\näb", 4), (2, 2));
        assert_eq!(line_and_column("a", 9), (1, 2));
    }
}
