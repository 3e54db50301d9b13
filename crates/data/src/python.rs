//! Values of a template as Python writes and tests them: `str`, `repr`, `json.dumps`, Jinja's tests.

use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

use super::integers;

/// The maximum depth of nested lists and maps that are written.
const DEEPEST: usize = 128;

/// Makes the engine write and test values as Python does.
pub(super) fn set_up(environment: &mut Environment) {
    environment.set_formatter(format);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", string);
    environment.add_filter("items", |value: Value| {
        pairs(minijinja::filters::items(&value)?)
    });
    environment.add_filter("dictsort", |value: Value, options: Kwargs| {
        pairs(minijinja::filters::dictsort(&value, options)?)
    });
    environment.add_test("number", is_number);
    environment.add_test("integer", |value: &Value| {
        value.is_integer() || integers::is_long(value)
    });
    environment.add_test("iterable", |value: &Value| is(value, &ITERABLE));
    environment.add_test("sequence", |value: &Value| is(value, &SEQUENCE));
}

/// A tuple of values.
pub(super) fn tuple(items: Vec<Value>) -> Value {
    Tuple::new(items).into()
}

/// A list of pairs, each a tuple.
fn pairs(list: Value) -> Result<Value, Error> {
    let pair = |pair: Value| Ok::<_, Error>(tuple(pair.try_iter()?.collect()));
    let pairs: Vec<Value> = list.try_iter()?.map(pair).collect::<Result<_, _>>()?;
    Ok(pairs.into())
}

/// Python's bools are numbers.
fn is_number(value: &Value) -> bool {
    let kinds = [ValueKind::Number, ValueKind::Bool];
    is(value, &kinds) || integers::is_long(value)
}

/// What Python iterates over. None is not included; the engine treats it as an empty list.
const ITERABLE: [ValueKind; 4] = [
    ValueKind::String,
    ValueKind::Seq,
    ValueKind::Map,
    ValueKind::Iterable,
];

/// What has a length and items, texts and maps included.
const SEQUENCE: [ValueKind; 3] = [ValueKind::String, ValueKind::Seq, ValueKind::Map];

fn is(value: &Value, kinds: &[ValueKind]) -> bool {
    kinds.contains(&value.kind())
}

/// `value | string`: Python's `str(value)`.
fn string(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.into());
    }
    let mut text = String::new();
    write_repr(value, 0, &mut text)?;
    Ok(text)
}

/// What `{{ value }}` writes: Python's `str(value)`.
pub(super) fn format(out: &mut Output, _state: &mut State, value: &Value) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        return out.write_str(text).map_err(Error::from);
    }
    if value.is_undefined() {
        return Ok(());
    }
    let mut text = String::new();
    write_repr(value, 0, &mut text)?;
    out.write_str(&text).map_err(Error::from)
}

/// Python's `repr(value)`, which is equal to `str(value)` except for texts.
fn write_repr(value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
    check(depth, value)?;
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::None => text.push_str("None"),
        ValueKind::Bool => text.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => write_number(value, text),
        ValueKind::String => repr_of_text(value.as_str().unwrap_or_default(), text),
        ValueKind::Seq => {
            let length = value.len().filter(|_| value.is_tuple());
            let [open, close] = match length {
                None => ["[", "]"],
                Some(1) => ["(", ",)"],
                Some(_) => ["(", ")"],
            };
            text.push_str(open);
            for (index, item) in value.try_iter()?.enumerate() {
                text.push_str(if index == 0 { "" } else { ", " });
                write_repr(&item, depth + 1, text)?;
            }
            text.push_str(close);
        }
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                text.push_str(if index == 0 { "" } else { ", " });
                write_repr(&key, depth + 1, text)?;
                text.push_str(": ");
                write_repr(&value.get_item(&key)?, depth + 1, text)?;
            }
            text.push('}');
        }
        // Python writes a memory address, or `range(0, 3)`.
        ValueKind::Iterable => {
            let message = "an iterator cannot be written; pass it to the filter list";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        _ => text.push_str(&value.to_string()),
    }
    Ok(())
}

/// Refuses values that cannot be written as Python writes them.
fn check(depth: usize, value: &Value) -> Result<(), Error> {
    let message = if depth > DEEPEST {
        format!("a value with more than {DEEPEST} levels cannot be written")
    } else if is_namespace(value) {
        // The engine does not keep the order in which attributes were set, and json.dumps refuses namespaces.
        "a namespace object cannot be written; write its attributes".into()
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Whether a value is a namespace, whose type the engine does not export.
fn is_namespace(value: &Value) -> bool {
    let object = value.as_object();
    object.is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// Quotes a text: in single quotes, unless it contains single and no double quotes.
fn repr_of_text(value: &str, text: &mut String) {
    let quote = if value.contains('\'') && !value.contains('"') {
        '"'
    } else {
        '\''
    };
    text.push(quote);
    for character in value.chars() {
        match character {
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\\' => text.push_str("\\\\"),
            c if c == quote => text.extend(['\\', c]),
            c if is_printable(c) => text.push(c),
            c => match c as u32 {
                code @ ..=0xff => text.push_str(&format!("\\x{code:02x}")),
                code @ ..=0xffff => text.push_str(&format!("\\u{code:04x}")),
                code => text.push_str(&format!("\\U{code:08x}")),
            },
        }
    }
    text.push(quote);
}

/// Python's `str.isprintable`, whose categories of Unicode are those that Rust's `Debug` escapes.
fn is_printable(character: char) -> bool {
    // At the beginning of a text `Debug` also escapes combining marks, which are printable.
    let text = ['x', character].iter().collect::<String>();
    character.is_ascii_graphic() || text.escape_debug().count() == 2
}

fn write_number(value: &Value, text: &mut String) {
    if value.is_integer() {
        text.push_str(&value.to_string())
    } else {
        text.push_str(&float(f64::try_from(value.clone()).unwrap_or(f64::NAN)))
    }
}

/// Python's `repr` of a float: the shortest digits that parse to the same float, with an exponent below 1e-4 and from 1e16 on.
pub fn float(value: f64) -> String {
    if !value.is_finite() {
        return match value {
            f64::INFINITY => "inf".into(),
            f64::NEG_INFINITY => "-inf".into(),
            _ => "nan".into(),
        };
    }
    let size = value.abs();
    if value != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{value:?}")
}

/// `json.dumps(value, ensure_ascii=…, indent=…, separators=…, sort_keys=…)`, with which transformers replaces
/// Jinja's filter (which escapes for HTML).
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(usize::try_from(value)?.min(16)),
        }),
    };
    let [item, key] = match options.get::<Option<Vec<String>>>("separators")? {
        Some(separators) => separators.try_into().map_err(|_| {
            Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be two texts",
            )
        })?,
        None if indent.is_some() => [",".into(), ": ".into()],
        None => [", ".into(), ": ".into()],
    };
    let json = Json {
        indent,
        item,
        key,
        ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut text = String::new();
    json.write(value, 0, &mut text)?;
    Ok(text)
}

/// How JSON is written.
struct Json {
    indent: Option<String>,
    /// Between items.
    item: String,
    /// Behind a key.
    key: String,
    ascii: bool,
    sorted: bool,
}

impl Json {
    fn write(&self, value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
        check(depth, value)?;
        match value.kind() {
            ValueKind::None => text.push_str("null"),
            ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let mut number = String::new();
                write_number(value, &mut number);
                text.push_str(match number.as_str() {
                    "inf" => "Infinity",
                    "-inf" => "-Infinity",
                    "nan" => "NaN",
                    number => number,
                });
            }
            ValueKind::String => self.text(value.as_str().unwrap_or_default(), text),
            ValueKind::Seq | ValueKind::Iterable => {
                text.push('[');
                let mut empty = true;
                for item in value.try_iter()? {
                    self.between(&mut empty, depth, text);
                    self.write(&item, depth + 1, text)?;
                }
                self.close(empty, depth, ']', text);
            }
            ValueKind::Map => {
                text.push('{');
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                let mut empty = true;
                for key in keys {
                    self.between(&mut empty, depth, text);
                    match key.as_str() {
                        Some(name) => self.text(name, text),
                        None => {
                            let mut name = String::new();
                            self.write(&key, depth + 1, &mut name)?;
                            self.text(&name, text);
                        }
                    }
                    text.push_str(&self.key);
                    self.write(&value.get_item(&key)?, depth + 1, text)?;
                }
                self.close(empty, depth, '}', text);
            }
            // json.dumps refuses Jinja's Undefined as well.
            ValueKind::Undefined => {
                let message = "tojson of a value that is not defined";
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
            _ if integers::is_long(value) => text.push_str(&value.to_string()),
            other => {
                let message = format!("tojson cannot write a {other}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn between(&self, empty: &mut bool, depth: usize, text: &mut String) {
        if !std::mem::take(empty) {
            text.push_str(&self.item);
        }
        self.new_line(depth + 1, text);
    }

    fn close(&self, empty: bool, depth: usize, end: char, text: &mut String) {
        if !empty {
            self.new_line(depth, text);
        }
        text.push(end);
    }

    fn new_line(&self, depth: usize, text: &mut String) {
        if let Some(indent) = &self.indent {
            text.push('\n');
            text.push_str(&indent.repeat(depth));
        }
    }

    /// Python and serde escape alike: quotes, backslashes and control characters.
    fn text(&self, value: &str, text: &mut String) {
        let quoted = serde_json::Value::from(value).to_string();
        if !self.ascii {
            return text.push_str(&quoted);
        }
        let mut units = [0; 2];
        for character in quoted.chars() {
            if character.is_ascii() {
                text.push(character)
            } else {
                for unit in character.encode_utf16(&mut units) {
                    text.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_pythons() {
        // Python 3: repr(x)
        for (value, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1e100, "1e+100"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    fn rendered(template: &str, value: serde_json::Value) -> String {
        let mut environment = minijinja::Environment::new();
        set_up(&mut environment);
        let value = super::super::template::in_order(&value);
        environment
            .render_str(template, minijinja::context! { x => value })
            .unwrap()
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        // Jinja 3.1.6: Environment().from_string("{{ x }}").render(x=…)
        for (value, text) in [
            (serde_json::json!(null), "None"),
            (serde_json::json!(true), "True"),
            (serde_json::json!([1, "a", null]), "[1, 'a', None]"),
            (
                serde_json::json!({"a": "it's", "b": "\"'\n"}),
                r#"{'a': "it's", 'b': '"\'\n'}"#,
            ),
            (serde_json::json!("it's"), "it's"),
            (
                integers::parse(
                    "[36893488147419103232, 36893488147419103232736893488147419103232]",
                )
                .unwrap(),
                "[36893488147419103232, 36893488147419103232736893488147419103232]",
            ),
            (serde_json::json!(1e-7), "1e-07"),
        ] {
            assert_eq!(rendered("{{ x }}", value), text);
        }
    }

    #[test]
    fn none_is_no_list_and_texts_and_maps_are_sequences() {
        let tests = "{{ x is iterable }} {{ x is sequence }} {{ x is mapping }} {{ x is none }} {{ x | string }}";
        // Jinja 3.1.6.
        for (value, text) in [
            (serde_json::json!(null), "False False False True None"),
            (serde_json::json!([1]), "True True False False [1]"),
            (
                serde_json::json!({"a": 1e-7}),
                "True True True False {'a': 1e-07}",
            ),
            (serde_json::json!("a"), "True True False False a"),
            (serde_json::json!(1e-7), "False False False False 1e-07"),
        ] {
            assert_eq!(rendered(tests, value), text);
        }
    }

    #[test]
    fn what_python_writes_as_an_address_is_refused() {
        let mut environment = Environment::new();
        set_up(&mut environment);
        for template in [
            "{{ range(3) }}",
            "{{ [range(3)] }}",
            "{{ range(3) | string }}",
        ] {
            let error = environment.render_str(template, ()).unwrap_err();
            assert!(error.to_string().contains("filter list"), "{error}");
        }
        let listed =
            environment.render_str("{{ range(3) | list }}{{ {'b': 1, 'a': ['\u{200b}']} }}", ());
        assert_eq!(listed.unwrap(), "[0, 1, 2]{'b': 1, 'a': ['\\u200b']}");
    }

    #[test]
    fn tuples_are_written_in_round_brackets() {
        let mut environment = Environment::new();
        set_up(&mut environment);
        super::super::string_methods::set_up(&mut environment);
        // Jinja 3.1.6.
        for (template, text) in [
            ("{{ (1, 'a') }}{{ (1,) }}{{ () }}", "(1, 'a')(1,)()"),
            ("{{ [(1, 2)] }}{{ (1, [2]) | string }}", "[(1, 2)](1, [2])"),
            (
                "{% set x = 1, 2 %}{{ x }}{{ (1, 2) | tojson }}",
                "(1, 2)[1, 2]",
            ),
            ("{{ {'a': 1}.items() | list }}", "[('a', 1)]"),
        ] {
            assert_eq!(
                environment.render_str(template, ()).unwrap(),
                text,
                "{template}"
            );
        }
    }

    #[test]
    fn a_namespace_object_is_refused_and_its_attributes_are_not() {
        let mut environment = Environment::new();
        set_up(&mut environment);
        let set = "{% set ns = namespace(b=1, a=2) %}";
        for written in [
            "{{ ns }}",
            "{{ [ns] }}",
            "{{ ns | tojson }}",
            "{{ ns | string }}",
        ] {
            let error = environment
                .render_str(&format!("{set}{written}"), ())
                .unwrap_err();
            assert!(
                error.to_string().contains("namespace object"),
                "{written}: {error}"
            );
        }
        let attributes = environment.render_str(&format!("{set}{{{{ ns.b }}}}{{{{ ns.a }}}}"), ());
        assert_eq!(attributes.unwrap(), "12");
    }

    #[test]
    fn json_has_the_arguments_of_json_dumps() {
        let value = serde_json::json!({"b": [1, 2.0], "a": "é𝄞"});
        // Python 3: json.dumps(value, …)
        for (arguments, text) in [
            ("", r#"{"b": [1, 2.0], "a": "é𝄞"}"#),
            (
                "(ensure_ascii=true)",
                r#"{"b": [1, 2.0], "a": "\u00e9\ud834\udd1e"}"#,
            ),
            (
                "(sort_keys=true, separators=(',', ':'))",
                r#"{"a":"é𝄞","b":[1,2.0]}"#,
            ),
            (
                "(indent=1)",
                "{\n \"b\": [\n  1,\n  2.0\n ],\n \"a\": \"é𝄞\"\n}",
            ),
            (
                "(indent='-')",
                "{\n-\"b\": [\n--1,\n--2.0\n-],\n-\"a\": \"é𝄞\"\n}",
            ),
            ("(indent=none)", r#"{"b": [1, 2.0], "a": "é𝄞"}"#),
        ] {
            let template = format!("{{{{ x | tojson{arguments} }}}}");
            assert_eq!(rendered(&template, value.clone()), text, "{arguments}");
        }
    }
}
