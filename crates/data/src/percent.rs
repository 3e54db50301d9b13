//! Python's `%` behind a text in a template: `"%s: %d" % (name, count)`. The engine has `%` for numbers only, and Jinja's
//! filter `format`, which does the same, so `%` is rewritten as `format` before the template is compiled.

/// The maximum depth of nested operands that are rewritten.
const DEEPEST: usize = 64;

/// The template with every text literal that is formatted by `%` passed to `format`.
pub(super) fn as_filters(template: &str) -> String {
    let mut result = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = next_tag(rest) {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        let close = match &tag[..2] {
            "{%" => "%}",
            "{{" => "}}",
            _ => "#}",
        };
        let is_comment = close == "#}";
        let inside = &tag[2..];
        let length = if is_comment {
            inside.find(close)
        } else {
            length_of_tag(inside, close)
        };
        let Some(length) = length else {
            rest = tag;
            break;
        };
        let behind = &inside[length + 2..];
        let code = &inside[..length];
        result.push_str(&tag[..2]);
        if is_comment {
            result.push_str(code)
        } else {
            result.push_str(&rewritten(code, 0))
        }
        result.push_str(close);
        rest = behind;
        let name = code.trim_matches(|c: char| c.is_whitespace() || "+-".contains(c));
        if name == "raw" && close == "%}" {
            let end = end_of_raw(rest);
            result.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    result + rest
}

/// Where the next tag or comment begins.
fn next_tag(text: &str) -> Option<usize> {
    let is_tag = |at: &usize| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
    text.match_indices('{').map(|(at, _)| at).find(is_tag)
}

/// Where `{% endraw %}` begins.
fn end_of_raw(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find("{%") {
        let at = from + at;
        let name =
            text[at + 2..].trim_start_matches(|c: char| c.is_whitespace() || "+-".contains(c));
        if name.starts_with("endraw") {
            return at;
        }
        from = at + 2;
    }
    text.len()
}

/// The length of a tag up to its end, which is not inside a text literal.
fn length_of_tag(inside: &str, close: &str) -> Option<usize> {
    let mut at = 0;
    while at < inside.len() {
        let rest = &inside[at..];
        // The end of a map may be next to that of the expression: `{{ {"a": {}}}}`.
        if rest.starts_with(close) && !(close == "}}" && rest.starts_with("}}}")) {
            return Some(at);
        }
        at += literal(rest).unwrap_or_else(|| width(rest));
    }
    None
}

/// The length of the text literal that begins here.
fn literal(text: &str) -> Option<usize> {
    let quote = text.chars().next().filter(|c| ['"', '\''].contains(c))?;
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn width(text: &str) -> usize {
    text.chars().next().map_or(1, char::len_utf8)
}

/// The rewritten code of a tag. Deeper than [`DEEPEST`] it stays as it is, and the engine reports an error.
fn rewritten(code: &str, depth: usize) -> String {
    let mut result = String::with_capacity(code.len());
    let mut at = 0;
    while at < code.len() {
        let rest = &code[at..];
        let Some(length) = literal(rest) else {
            let width = width(rest);
            result.push_str(&rest[..width]);
            at += width;
            continue;
        };
        let behind = rest[length..].trim_start();
        let operand = behind.strip_prefix('%').filter(|_| depth < DEEPEST);
        let operand = operand.map(str::trim_start);
        match operand.and_then(|operand| Some((operand, operand_length(operand)?))) {
            Some((operand, taken)) => {
                let arguments = rewritten(&arguments(&operand[..taken]), depth + 1);
                result += &format!("({}|format({arguments}))", &rest[..length]);
                at = code.len() - operand.len() + taken;
            }
            None => {
                result.push_str(&rest[..length]);
                at += length;
            }
        }
    }
    result
}

/// The arguments of the filter: the items of a tuple, else the operand.
fn arguments(operand: &str) -> String {
    let whole = operand.starts_with('(') && bracketed(operand) == Some(operand.len());
    let inside = operand
        .get(1..operand.len().saturating_sub(1))
        .filter(|_| whole);
    match inside.filter(|inside| has_comma(inside)) {
        Some(items) => items.trim_end().trim_end_matches(',').into(),
        None => operand.into(),
    }
}

/// Whether a text has a comma outside of brackets and literals.
fn has_comma(text: &str) -> bool {
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with(',') {
            return true;
        }
        at += literal(rest)
            .or_else(|| bracketed(rest))
            .unwrap_or_else(|| width(rest));
    }
    false
}

/// The length up to the partner of the bracket here, both included.
fn bracketed(text: &str) -> Option<usize> {
    if !text.starts_with(['(', '[', '{']) {
        return None;
    }
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        match rest.as_bytes()[0] {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
        at += literal(rest).unwrap_or_else(|| width(rest));
    }
    None
}

/// The length of the operand: a literal, a name or a bracket, with attributes, items, calls and filters.
fn operand_length(text: &str) -> Option<usize> {
    let name = |text: &str| {
        let is_of_name = |c: char| c.is_alphanumeric() || c == '_';
        let length = text.find(|c: char| !is_of_name(c)).unwrap_or(text.len());
        Some(length).filter(|length| *length > 0)
    };
    let sign = text.len() - text.trim_start_matches('-').len();
    let first = &text[sign..];
    let mut length = sign
        + literal(first)
            .or_else(|| bracketed(first))
            .or_else(|| name(first))?;
    loop {
        let rest = &text[length..];
        let more = match rest.chars().next() {
            Some('(' | '[') => bracketed(rest)?,
            Some('.') => 1 + name(&rest[1..])?,
            _ => {
                let spaced = rest.trim_start();
                let Some(filter) = spaced.strip_prefix('|') else {
                    return Some(length);
                };
                let filter = filter.trim_start();
                rest.len() - filter.len() + name(filter)?
            }
        };
        length += more;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_are_formatted_become_filters() {
        for (template, expected) in [
            (r#"{{ "%s" % x }}"#, r#"{{ ("%s"|format(x)) }}"#),
            (
                r#"{{ "%s-%s" % (a, b[0].c) ~ "d" }}"#,
                r#"{{ ("%s-%s"|format(a, b[0].c)) ~ "d" }}"#,
            ),
            (r#"{{ '%s' % (a,) }}"#, r#"{{ ('%s'|format(a)) }}"#),
            (r#"{{ '%d' % (a + 1) }}"#, r#"{{ ('%d'|format((a + 1))) }}"#),
            (
                r#"{%- set y = "%02d"%m.n|int -%}"#,
                r#"{%- set y = ("%02d"|format(m.n|int)) -%}"#,
            ),
            (
                r#"{{ "%s" % ("%s" % x) }}"#,
                r#"{{ ("%s"|format((("%s"|format(x))))) }}"#,
            ),
            (
                r#"{{ "%s" % f(a, ")") }}"#,
                r#"{{ ("%s"|format(f(a, ")"))) }}"#,
            ),
        ] {
            assert_eq!(as_filters(template), expected);
        }
    }

    #[test]
    fn operands_within_operands_end() {
        let deep = format!(
            "{{{{ {}x{} }}}}",
            "'%s' % (".repeat(20_000),
            ")".repeat(20_000)
        );
        let rewritten = as_filters(&deep);
        assert_eq!(rewritten.matches("|format(").count(), DEEPEST);
    }

    #[test]
    fn everything_else_stays() {
        for template in [
            "a % b {{ 7 % 2 }} {{ n % 2 }} {% if loop.index0 % 2 %}x{% endif %}",
            r#"{# "%s" % x #} {% raw %}{{ "%s" % x }}{% endraw %} "%s" % x"#,
            r#"{{ "a" }}% {{ "}}" }} {{ {"a": {"b": 1}}}} {% set x = "%}" %}"#,
            r#"{{ "open "#,
            r#"{% set x = "a" %}"#,
        ] {
            assert_eq!(as_filters(template), template);
        }
    }
}
