//! JSON as Python reads it: whole numbers of any size.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use minijinja::Value as TemplateValue;
use minijinja::value::{Object, ObjectRepr};
use serde_json::{Value, json};

/// The only key of an object that stands for a whole number of more than 64 bits. (serde_json's own feature for such
/// numbers would change how every crate of the workspace reads numbers.)
const KEY: &str = "\u{0}integer";

/// Numbers with fewer digits always fit into 64 bits; numbers with more are an error in Python.
const DIGITS: std::ops::RangeInclusive<usize> = 19..=4300;

/// A JSON text's value.
pub(super) fn parse(text: &str) -> serde_json::Result<Value> {
    match long_integers(text) {
        Cow::Borrowed(text) => serde_json::from_str(text),
        // The column of an error must be that of the original text.
        Cow::Owned(replaced) => {
            serde_json::from_str(&replaced).or_else(|_| serde_json::from_str(text))
        }
    }
}

/// A JSON text whose whole numbers of more than 64 bits are objects with [`KEY`].
pub(super) fn long_integers(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let is_long = |run: &[u8]| run.len() >= *DIGITS.start();
    if !bytes.split(|byte| !byte.is_ascii_digit()).any(is_long) {
        return text.into();
    }
    let mut result = String::new();
    let (mut copied, mut at) = (0, 0);
    while let Some(byte) = bytes.get(at) {
        let start = at;
        at += 1;
        match byte {
            b'"' => at = end_of_text(bytes, at),
            b'-' | b'0'..=b'9' => {
                let rest = bytes[at..].iter();
                at += { rest }
                    .take_while(|byte| byte.is_ascii_digit() || b".eE+-".contains(byte))
                    .count();
                if is_long_integer(&text[start..at]) {
                    result.push_str(&text[copied..start]);
                    result.push_str(&json!({KEY: text[start..at]}).to_string());
                    copied = at;
                }
            }
            _ => {}
        }
    }
    result.push_str(&text[copied..]);
    result.into()
}

/// Behind the closing quote of a text whose opening one is before `at`.
fn end_of_text(bytes: &[u8], mut at: usize) -> usize {
    while let Some(byte) = bytes.get(at) {
        at += match byte {
            b'"' => return at + 1,
            b'\\' => 2,
            _ => 1,
        };
    }
    bytes.len()
}

fn is_long_integer(number: &str) -> bool {
    let digits = number.strip_prefix('-').unwrap_or(number);
    DIGITS.contains(&digits.len())
        && digits.bytes().all(|byte| byte.is_ascii_digit())
        && !digits.starts_with('0')
        && number.parse::<i64>().is_err()
        && number.parse::<u64>().is_err()
}

/// The digits of a value that stands for a whole number of more than 64 bits.
pub(super) fn digits(value: &Value) -> Option<&str> {
    let object = value.as_object().filter(|object| object.len() == 1)?;
    object.get(KEY)?.as_str()
}

/// The value of a template for these digits.
pub(super) fn for_template(digits: &str) -> TemplateValue {
    match digits.parse::<i128>() {
        Ok(whole) => whole.into(),
        Err(_) => TemplateValue::from_object(Long(digits.into())),
    }
}

/// Whether a template's value is a whole number of more than 128 bits, which can be written but not computed with.
pub(super) fn is_long(value: &TemplateValue) -> bool {
    value.downcast_object_ref::<Long>().is_some()
}

/// The digits of a whole number of more than 128 bits.
#[derive(Debug)]
struct Long(String);

impl Object for Long {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_of_any_size_keep_their_digits() {
        let long = "9".repeat(60);
        let text = format!(
            r#"{{"a": [18446744073709551616, -9223372036854775809], "b": {long}, "c": 18446744073709551615, "d": -9223372036854775808}}"#
        );
        let value = parse(&text).unwrap();
        assert_eq!(digits(&value["a"][0]), Some("18446744073709551616"));
        assert_eq!(digits(&value["a"][1]), Some("-9223372036854775809"));
        assert_eq!(digits(&value["b"]), Some(long.as_str()));
        assert_eq!(value["c"], json!(u64::MAX));
        assert_eq!(value["d"], json!(i64::MIN));
    }

    #[test]
    fn what_is_no_whole_number_stays() {
        let long = "1".repeat(30);
        for text in [
            format!(r#"["a {long} \" {long}", "\\"]"#),
            format!("[{long}.5, {long}e2, 0.{long}]"),
        ] {
            assert_eq!(
                parse(&text).unwrap(),
                serde_json::from_str::<Value>(&text).unwrap()
            );
        }
        let zero = format!("[0{long}]");
        let column = parse(&zero).unwrap_err().column();
        let plain = serde_json::from_str::<Value>(&zero).unwrap_err();
        assert_eq!(column, plain.column());
        assert!(parse(&"1".repeat(5000)).is_err());
    }
}
