//! Methods of Python's `str` that minijinja-contrib lacks, and Jinja's filters of texts.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::python::tuple;

/// The maximum width of padded texts, in characters.
const WIDEST: usize = 1 << 16;

/// Adds the methods and filters to the engine.
pub(super) fn set_up(environment: &mut Environment) {
    environment.set_unknown_method_callback(method);
    environment.add_filter("wordcount", |text: &str| {
        let is_of_word = |c: char| c.is_alphanumeric() || c == '_';
        let words = text.split(|c: char| !is_of_word(c));
        words.filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("truncate", truncate);
    environment.add_filter("center", |text: &str, width: Option<usize>| {
        padded(text, width.unwrap_or(80), " ", centered)
    });
}

fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if value.kind() == ValueKind::Map && name == "items" && args.is_empty() {
        let mut items = Vec::new();
        for key in value.try_iter()? {
            let item = value.get_item(&key)?;
            items.push(tuple(vec![key, item]));
        }
        return Ok(items.into());
    }
    let found = value.as_str().map(|text| of_text(text, name, args));
    match found {
        Some(Some(result)) => result,
        _ => unknown_method_callback(state, value, name, args),
    }
}

/// `text.name(args)`; `None` for a method that is not one of these.
fn of_text(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let one = |cut: fn(&str, &str) -> Value| {
        let (part,): (&str,) = from_args(args)?;
        Ok(cut(text, part))
    };
    Some(match name {
        "removeprefix" => one(|text, part| text.strip_prefix(part).unwrap_or(text).into()),
        "removesuffix" => one(|text, part| text.strip_suffix(part).unwrap_or(text).into()),
        "partition" => one(|text, part| match text.split_once(part) {
            Some((before, behind)) => triple([before, part, behind]),
            None => triple([text, "", ""]),
        }),
        "rpartition" => one(|text, part| match text.rsplit_once(part) {
            Some((before, behind)) => triple([before, part, behind]),
            None => triple(["", "", text]),
        }),
        "index" => position(text, args, |text, part| text.find(part)),
        "rindex" => position(text, args, |text, part| text.rfind(part)),
        "swapcase" => Ok(swapped(text).into()),
        "zfill" => zero_filled(text, args),
        "center" => aligned(text, args, centered),
        "ljust" => aligned(text, args, |space, _| [0, space]),
        "rjust" => aligned(text, args, |space, _| [space, 0]),
        "split" if has_keywords(args) => split(text, args, false),
        "rsplit" => split(text, args, true),
        _ => return None,
    })
}

fn triple(parts: [&str; 3]) -> Value {
    tuple(parts.map(Value::from).to_vec())
}

fn has_keywords(args: &[Value]) -> bool {
    args.last().is_some_and(Value::is_kwargs)
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_string())
}

/// Where a part begins, in characters.
fn position(
    text: &str,
    args: &[Value],
    find: impl Fn(&str, &str) -> Option<usize>,
) -> Result<Value, Error> {
    let (part,): (&str,) = from_args(args)?;
    let at = find(text, part).ok_or_else(|| invalid("substring not found"))?;
    Ok(text[..at].chars().count().into())
}

fn swapped(text: &str) -> String {
    let mut result = String::new();
    for character in text.chars() {
        if character.is_uppercase() {
            result.extend(character.to_lowercase())
        } else {
            result.extend(character.to_uppercase())
        }
    }
    result
}

fn zero_filled(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (width,): (usize,) = from_args(args)?;
    let (sign, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) => text.split_at(text.len() - digits.len()),
        None => ("", text),
    };
    let width = width.saturating_sub(sign.len());
    let filled = padded(digits, width, "0", |space, _| [space, 0])?;
    Ok(format!("{sign}{filled}").into())
}

fn aligned(
    text: &str,
    args: &[Value],
    sides: impl Fn(usize, usize) -> [usize; 2],
) -> Result<Value, Error> {
    let (width, fill): (usize, Option<&str>) = from_args(args)?;
    Ok(padded(text, width, fill.unwrap_or(" "), sides)?.into())
}

/// The spaces before and behind a centered text, as in CPython's `str.center`.
fn centered(space: usize, width: usize) -> [usize; 2] {
    let before = space / 2 + (space & width & 1);
    [before, space - before]
}

fn padded(
    text: &str,
    width: usize,
    fill: &str,
    sides: impl Fn(usize, usize) -> [usize; 2],
) -> Result<String, Error> {
    if width > WIDEST {
        return Err(invalid("a text that is wider than 65,536 characters"));
    }
    if fill.chars().count() != 1 {
        return Err(invalid(
            "the fill character must be exactly one character long",
        ));
    }
    let have = text.chars().count();
    let [before, behind] = sides(width.saturating_sub(have), width);
    Ok(format!(
        "{}{text}{}",
        fill.repeat(before),
        fill.repeat(behind)
    ))
}

/// `split` and `rsplit` with all of their arguments.
fn split(text: &str, args: &[Value], from_behind: bool) -> Result<Value, Error> {
    let (separator, most, keywords): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        None => keywords.get::<Option<Value>>("sep")?,
        given => given,
    };
    let separator = separator.filter(|value| !value.is_none());
    let most = match most {
        None => keywords.get::<Option<i64>>("maxsplit")?,
        given => given,
    };
    keywords.assert_all_used()?;
    let parts =
        usize::try_from(most.unwrap_or(-1)).map_or(usize::MAX, |most| most.saturating_add(1));
    let parts: Vec<&str> = match &separator {
        None => words(text, parts, from_behind),
        Some(separator) => {
            let separator = separator.as_str().filter(|text| !text.is_empty());
            let separator = separator.ok_or_else(|| invalid("empty separator"))?;
            if from_behind {
                let mut parts: Vec<&str> = text.rsplitn(parts, separator).collect();
                parts.reverse();
                parts
            } else {
                text.splitn(parts, separator).collect()
            }
        }
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

/// The words between white space, split from one end; the last part keeps its white space.
fn words(text: &str, parts: usize, from_behind: bool) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() && words.len() + 1 < parts {
        let cut = if from_behind {
            rest.rsplit_once(char::is_whitespace).map(|(a, b)| (b, a))
        } else {
            rest.split_once(char::is_whitespace)
        };
        let (word, others) = cut.unwrap_or((rest, ""));
        words.push(word);
        rest = others.trim();
    }
    if !rest.is_empty() {
        // The white space on the side without a split is kept.
        let at = rest.as_ptr() as usize - text.as_ptr() as usize;
        let rest = if from_behind {
            &text[..at + rest.len()]
        } else {
            &text[at..]
        };
        words.push(rest);
    }
    if from_behind {
        words.reverse();
    }
    words
}

/// Jinja's `truncate`.
fn truncate(
    text: &str,
    length: Option<usize>,
    kill_words: Option<bool>,
    end: Option<&str>,
    keywords: Kwargs,
) -> Result<String, Error> {
    let length = length.or(keywords.get("length")?).unwrap_or(255);
    let kill_words = kill_words.or(keywords.get("killwords")?).unwrap_or(false);
    let end = end.or(keywords.get("end")?).unwrap_or("...");
    let leeway = keywords.get::<Option<usize>>("leeway")?.unwrap_or(5);
    keywords.assert_all_used()?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let ends = end.chars().count();
    let kept = length.checked_sub(ends);
    let kept = kept.ok_or_else(|| invalid("truncate: the length is below that of the end"))?;
    let kept: String = text.chars().take(kept).collect();
    let kept = if kill_words {
        &kept[..]
    } else {
        kept.rsplit_once(' ').map_or(&kept[..], |(words, _)| words)
    };
    Ok(format!("{kept}{end}"))
}

#[cfg(test)]
mod tests {
    use super::super::python;
    use super::*;

    fn rendered(expression: &str) -> Result<String, String> {
        let mut environment = Environment::new();
        python::set_up(&mut environment);
        set_up(&mut environment);
        let template = format!("{{{{ {expression} }}}}");
        let rendered = environment.render_str(&template, ());
        rendered.map_err(|error| error.to_string())
    }

    #[test]
    fn methods_are_pythons() {
        // CPython 3.11 and Jinja 3.1.6.
        for (expression, expected) in [
            ("'abc'.removeprefix('ab')", "c"),
            ("'abc'.removesuffix('x')", "abc"),
            ("'a-b-c'.partition('-')", "('a', '-', 'b-c')"),
            ("'a-b-c'.rpartition('+')", "('', '', 'a-b-c')"),
            ("'日本'.index('本')", "1"),
            ("'abab'.rindex('ab')", "2"),
            ("'aBß'.swapcase()", "AbSS"),
            ("'-7'.zfill(4)", "-007"),
            ("'ab'.center(5, '*')", "**ab*"),
            ("'a'.center(4, '*')", "*a**"),
            ("'ab'.ljust(3, '.')", "ab."),
            ("'ab'.rjust(3)", " ab"),
            ("'a-b-c'.rsplit('-', 1)", "['a-b', 'c']"),
            ("' a  b c '.split(maxsplit=1)", "['a', 'b c ']"),
            ("' a b  c '.rsplit(maxsplit=1)", "[' a b', 'c']"),
            ("' a b '.rsplit()", "['a', 'b']"),
            ("'a b'.split(sep='b')", "['a ', '']"),
            ("'one two_2, three' | wordcount", "3"),
            ("'hello world foo' | truncate(9)", "hello..."),
            ("'hello world' | truncate(9)", "hello world"),
            ("'hello world foo' | truncate(9, true, '')", "hello wor"),
            ("'x' | center(4)", " x  "),
            ("{'a': 1}.items() | list", "[('a', 1)]"),
        ] {
            assert_eq!(
                rendered(expression).as_deref(),
                Ok(expected),
                "{expression}"
            );
        }
        assert!(
            rendered("'abc'.index('x')")
                .unwrap_err()
                .contains("substring not found")
        );
        assert!(
            rendered("'a'.zfill(10000000)")
                .unwrap_err()
                .contains("wider")
        );
        assert!(rendered("'a'.wibble()").unwrap_err().contains("wibble"));
    }
}
