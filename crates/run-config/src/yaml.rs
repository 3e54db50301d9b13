//! YAML with PyYAML's meaning of plain scalars (YAML 1.1), as axolotl reads its configurations.
//!
//! `yes` is true, `010` is eight, `1e-4` is a text (which axolotl converts where it expects a number). Stricter than
//! PyYAML: a repeated key, a tag and a merge key are errors.

use std::collections::HashMap;

use granit_parser::{Event, Marker, Parser, ScalarStyle, Span};

use super::error::{SyntaxError, shown};
use super::value::{Entry, Value};

/// The maximum number of values of a document with every alias expanded.
const MOST_VALUES: usize = 100_000;
const STRING_TAG: &str = "tag:yaml.org,2002:str";

/// The keys of a document, each with its line.
///
/// # Errors
///
/// The first place that is not YAML, or that is not supported.
pub(super) fn table(text: &str) -> Result<Vec<Entry>, SyntaxError> {
    let mut reader = Reader::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| at(error.marker(), &error.info()))?;
        reader
            .take(event, span)
            .map_err(|message| at(&span.start, &message))?;
    }
    match reader.document {
        Some((Value::Table(entries), _)) => Ok(entries),
        Some((other, start)) => Err(at(
            &start,
            &format!(
                "expected a mapping of keys, got {}",
                shown(&other.to_string())
            ),
        )),
        None => Err(SyntaxError {
            line: 1,
            column: 1,
            message: "the file holds no keys".into(),
        }),
    }
}

fn at(marker: &Marker, message: &str) -> SyntaxError {
    SyntaxError {
        line: marker.line().max(1),
        column: marker.col() + 1,
        message: message.into(),
    }
}

/// A list or mapping that is being read.
enum Open {
    List(Vec<Value>),
    Table(Vec<Entry>, Option<(String, usize)>),
}

#[derive(Default)]
struct Reader {
    /// Each with its anchor (0 for none), where it began, and how many values had been read.
    open: Vec<(Open, usize, Marker, usize)>,
    /// The values of anchors, each with the number of values in it.
    anchors: HashMap<usize, (Value, usize)>,
    values: usize,
    document: Option<(Value, Marker)>,
}

impl Reader {
    fn take(&mut self, event: Event, span: Span) -> Result<(), String> {
        let start = span.start;
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag.map(|tag| format!("{}{}", tag.handle(), tag.suffix()));
                let is_key = matches!(self.open.last(), Some((Open::Table(_, None), ..)));
                let value = match (style, tag.as_deref()) {
                    (ScalarStyle::Plain, None) if is_key && text == "<<" => {
                        return Err("merge keys (<<) are not supported; write the keys out".into());
                    }
                    // A key is always a name.
                    (ScalarStyle::Plain, None) if !is_key => plain(&text),
                    (_, None | Some("!" | STRING_TAG)) => Value::String(text.into_owned()),
                    (_, Some(tag)) => return Err(tag_message(tag)),
                };
                self.value(value, anchor, start, 1)
            }
            Event::SequenceStart(_, anchor, tag) => {
                refuse_tag(tag.as_deref())?;
                let open = Open::List(Vec::new());
                self.open.push((open, anchor, start, self.values));
                Ok(())
            }
            Event::MappingStart(_, anchor, tag) => {
                refuse_tag(tag.as_deref())?;
                let open = Open::Table(Vec::new(), None);
                self.open.push((open, anchor, start, self.values));
                Ok(())
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some((open, anchor, start, before)) = self.open.pop() else {
                    return Err("a list or mapping ends that did not begin".into());
                };
                let value = match open {
                    Open::List(items) => Value::List(items),
                    Open::Table(entries, _) => Value::Table(entries),
                };
                let within = self.values - before;
                if anchor != 0 {
                    self.anchors.insert(anchor, (value.clone(), within + 1));
                }
                self.value(value, 0, start, 1)
            }
            Event::Alias(anchor) => {
                let Some((value, within)) = self.anchors.get(&anchor).cloned() else {
                    return Err("an alias inside its own value".into());
                };
                self.value(value, 0, start, within)
            }
            _ => Ok(()),
        }
    }

    /// Adds a finished value, of `size` values in all, to the collection that is being read.
    fn value(
        &mut self,
        value: Value,
        anchor: usize,
        start: Marker,
        size: usize,
    ) -> Result<(), String> {
        self.values += size;
        if self.values > MOST_VALUES {
            return Err(format!(
                "more than {MOST_VALUES} values, those behind aliases included"
            ));
        }
        if anchor != 0 {
            self.anchors.insert(anchor, (value.clone(), size));
        }
        match self.open.last_mut() {
            None if self.document.is_some() => {
                return Err("a second document; a configuration is one document".into());
            }
            None => self.document = Some((value, start)),
            Some((Open::List(items), ..)) => items.push(value),
            Some((Open::Table(entries, key @ None), ..)) => {
                let Value::String(name) = value else {
                    return Err("a key that is a list or a mapping".into());
                };
                if entries.iter().any(|entry| entry.key == name) {
                    return Err(format!("the key {:?} is repeated here", shown(&name)));
                }
                *key = Some((name, start.line()));
            }
            Some((Open::Table(entries, key), ..)) => {
                let (key, line) = key.take().unwrap_or_default();
                let line = Some(line);
                entries.push(Entry { key, value, line });
            }
        }
        Ok(())
    }
}

fn refuse_tag(tag: Option<&granit_parser::Tag>) -> Result<(), String> {
    match tag {
        None => Ok(()),
        Some(tag) => Err(tag_message(&format!("{}{}", tag.handle(), tag.suffix()))),
    }
}

fn tag_message(tag: &str) -> String {
    format!(
        "the tag {} is not supported; write the value without a tag",
        shown(tag)
    )
}

/// A scalar without quotes, as PyYAML's `SafeLoader` reads it.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return Value::Bool(true);
        }
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    if let Some(value) = integer(text).or_else(|| float(text)) {
        return value;
    }
    if is_date(text) {
        Value::Other(text.into())
    } else {
        Value::String(text.into())
    }
}

/// The sign, as a factor, and what follows it.
fn signed(text: &str) -> (i64, &str) {
    match text.as_bytes().first() {
        Some(b'-') => (-1, &text[1..]),
        Some(b'+') => (1, &text[1..]),
        _ => (1, text),
    }
}

fn integer(text: &str) -> Option<Value> {
    let (sign, digits) = signed(text);
    let all = |digits: &str, valid: fn(char) -> bool| {
        !digits.is_empty() && digits.chars().all(|c| c == '_' || valid(c))
    };
    let (radix, digits) = if let Some(digits) = digits.strip_prefix("0b") {
        (2, digits)
    } else if let Some(digits) = digits.strip_prefix("0x") {
        (16, digits)
    } else if digits.len() > 1 && digits.starts_with('0') {
        (8, &digits[1..])
    } else {
        (10, digits)
    };
    let valid: fn(char) -> bool = match radix {
        2 => |c| matches!(c, '0' | '1'),
        8 => |c| c.is_digit(8),
        16 => |c| c.is_ascii_hexdigit(),
        _ => |c| c.is_ascii_digit(),
    };
    if radix == 10 && digits.contains(':') {
        // Sexagesimal: 1:30 is 90.
        let mut parts = digits.split(':');
        let first = parts.next()?;
        let starts = all(first, |c| c.is_ascii_digit()) && !first.starts_with(['0', '_']);
        let mut number = first.replace('_', "").parse::<i64>().ok()?;
        for part in parts {
            let is_part = matches!(part.len(), 1 | 2) && part.chars().all(|c| c.is_ascii_digit());
            let part = part.parse::<i64>().ok().filter(|part| *part < 60)?;
            number = is_part.then_some(number)?.checked_mul(60)? + part;
        }
        return starts.then_some(Value::Integer(sign * number));
    }
    if !all(digits, valid) || (radix == 10 && digits.starts_with('_')) {
        return None;
    }
    let digits = digits.replace('_', "");
    match i64::from_str_radix(&digits, radix) {
        Ok(number) => Some(Value::Integer(sign * number)),
        Err(_) if digits.is_empty() => None,
        Err(_) => Some(Value::Other(text.into())),
    }
}

/// A float needs a dot, and an exponent a sign; PyYAML reads others as texts.
fn float(text: &str) -> Option<Value> {
    let (sign, rest) = signed(text);
    match rest {
        ".inf" | ".Inf" | ".INF" => return Some(Value::Float(sign as f64 * f64::INFINITY)),
        ".nan" | ".NaN" | ".NAN" if rest == text => return Some(Value::Float(f64::NAN)),
        _ => {}
    }
    let (mantissa, exponent) = match rest.find(['e', 'E']) {
        Some(at) => (&rest[..at], Some(&rest[at + 1..])),
        None => (rest, None),
    };
    let (whole, fraction) = mantissa.split_once('.')?;
    let digits = |text: &str| text.chars().all(|c| c == '_' || c.is_ascii_digit());
    let starts = if whole.is_empty() {
        rest == text && fraction.starts_with(|c: char| c.is_ascii_digit())
    } else {
        whole.starts_with(|c: char| c.is_ascii_digit())
    };
    let exponent_is_right = exponent.is_none_or(|exponent| {
        exponent.starts_with(['+', '-'])
            && exponent.len() > 1
            && exponent[1..].chars().all(|c| c.is_ascii_digit())
    });
    if !(starts && digits(whole) && digits(fraction) && exponent_is_right) {
        return None;
    }
    let number = rest.replace('_', "").parse::<f64>().ok()?;
    Some(Value::Float(sign as f64 * number))
}

/// Whether a text begins like a date, which is not a value of any key.
fn is_date(text: &str) -> bool {
    let parts: Vec<&str> = text.splitn(3, '-').collect();
    let [year, month, day] = parts[..] else {
        return false;
    };
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    let day_end = day.find(|c: char| !c.is_ascii_digit()).unwrap_or(day.len());
    let (day, rest) = day.split_at(day_end);
    year.len() == 4
        && digits(year)
        && digits(month)
        && month.len() <= 2
        && digits(day)
        && day.len() <= 2
        && (rest.is_empty() || (rest.starts_with(['T', 't', ' ', '\t']) && rest.contains(':')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Vec<String> {
        let entries = table(text).unwrap_or_else(|error| panic!("{error}"));
        let shown = |entry: &Entry| {
            format!(
                "{} {} {}",
                entry.line.unwrap_or_default(),
                entry.key,
                entry.value
            )
        };
        entries.iter().map(shown).collect()
    }

    fn refused(text: &str) -> String {
        table(text).unwrap_err().to_string()
    }

    #[test]
    fn keys_have_lines_and_values_of_every_style() {
        let text = "# a file\na: 8\nb:\n  - x\n  - \"y\"\nc: {d: 'e', f: }\n\ng: |\n  one\n  two\nh: [1, 2.5]\n";
        assert_eq!(
            shown(text),
            [
                "2 a 8",
                "3 b [\"x\", \"y\"]",
                "6 c { … }",
                "8 g \"one\\ntwo\\n\"",
                "11 h [1, 2.5]"
            ]
        );
    }

    /// The values are PyYAML 6's.
    #[test]
    fn plain_scalars_are_what_pyyaml_makes_of_them() {
        for (text, value) in [
            ("yes", "true"),
            ("Off", "false"),
            ("y", "\"y\""),
            ("~", "null"),
            ("NULL", "null"),
            ("1e-4", "\"1e-4\""),
            ("1.0e-4", "0.0001"),
            ("1.e-4", "0.0001"),
            ("1.0e4", "\"1.0e4\""),
            ("2E+3", "\"2E+3\""),
            (".5", "0.5"),
            ("-.5", "\"-.5\""),
            ("+1.5", "1.5"),
            ("1_000", "1000"),
            ("010", "8"),
            ("08", "\"08\""),
            ("0o10", "\"0o10\""),
            ("0x1F", "31"),
            ("0b11", "3"),
            ("-0x1f", "-31"),
            ("0", "0"),
            ("-0", "0"),
            ("1:30", "90"),
            ("-1:30:15", "-5415"),
            (".inf", "inf"),
            ("-.INF", "-inf"),
            (".nan", "nan"),
            ("nan", "\"nan\""),
            ("1,5", "\"1,5\""),
            ("2026-01-31", "2026-01-31"),
            ("2026-01-31-x", "\"2026-01-31-x\""),
            ("99999999999999999999", "99999999999999999999"),
            ("'yes'", "\"yes\""),
            ("!!str 8", "\"8\""),
            ("1.2.3", "\"1.2.3\""),
            ("a: b", "refused"),
        ] {
            match table(&format!("k: {text}")) {
                Ok(entries) => assert_eq!(entries[0].value.to_string(), value, "{text}"),
                Err(error) => assert_eq!(value, "refused", "{text}: {error}"),
            }
        }
    }

    #[test]
    fn what_is_not_a_mapping_of_keys_is_refused_with_its_place() {
        assert!(
            refused("a: 1\nb: 2\na: 3").starts_with("line 3, column 1: the key \"a\" is repeated")
        );
        assert!(refused("a: 1\nb: !!python/object:os.system x").contains("line 2"));
        assert!(refused("a: &x {b: 1}\nc:\n  <<: *x").contains("merge"));
        assert!(refused("- a").contains("expected a mapping"));
        assert!(refused("").contains("no keys"));
        assert!(refused("a: 1\n---\nb: 2").contains("second document"));
        assert!(refused("a: [1\nb: 2").starts_with("line "));
        assert!(refused("a: &x [*x]").contains("alias"));
        assert!(refused("a: *x").contains("line 1"));
        assert!(refused("[a]: 1").contains("a key that is a list"));
    }

    #[test]
    fn aliases_are_written_out_within_bounds() {
        assert_eq!(
            shown("a: &x [1, 2]\nb: *x\nc: &y z\nd: *y"),
            ["1 a [1, 2]", "2 b [1, 2]", "3 c \"z\"", "4 d \"z\""]
        );
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_string();
        for level in 1..12 {
            let alias = format!("*a{}, ", level - 1).repeat(9);
            bomb += &format!("a{level}: &a{level} [{alias}]\n");
        }
        assert!(refused(&bomb).contains("more than 100000 values"));
    }
}
