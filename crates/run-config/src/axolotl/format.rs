//! The prompt formats of axolotl's instruct data: its own by name, and those that a file writes out.

use super::super::value::{Entry, Value};
use super::keys::is_off;
use data::{InstructTemplate, PromptTemplate};

/// The format of the examples and their prompt template.
#[derive(Debug, PartialEq)]
pub(super) struct Rows {
    pub format: &'static str,
    /// The columns of the format that have another name in the file.
    pub columns: Vec<(&'static str, String)>,
    pub template: PromptTemplate,
}

const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides \
    further context. Write a response that appropriately completes the request.";
const ALPACA: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the \
    request.";

/// The named types that are supported, for messages.
pub(super) const NAMED: &str = "alpaca, alpaca:instruct, alpaca:chat, alpaca:chatml, alpaca_chat.load, \
    alpaca_chat.load_no_prompt, alpaca_instruct.load, alpaca_instruct.load_no_prompt, gpteacher, completion, chat_template";

/// The prompt template of a named type like alpaca; `None` for another type.
pub(super) fn named(name: &str) -> Option<Rows> {
    let (base, style) = name.split_once(':').unwrap_or((name, ""));
    let (style, has_system) = match (base, style) {
        ("alpaca" | "gpteacher", "" | "instruct") => ("instruct", true),
        ("alpaca" | "gpteacher", "chat" | "chatml") => (style, true),
        ("alpaca_chat.load" | "alpaca_chat", "") => ("chat", true),
        ("alpaca_chat.load_no_prompt", "") => ("chat", false),
        ("alpaca_instruct.load" | "alpaca_instruct", "") => ("instruct", true),
        ("alpaca_instruct.load_no_prompt", "") => ("instruct", false),
        _ => return None,
    };
    let (format, no_input_format, system) = match style {
        "chat" => (
            "USER: {instruction}\n{input}\nASSISTANT:",
            "USER: {instruction}\nASSISTANT:",
            ["SYSTEM: ", "\n"],
        ),
        "chatml" => (
            "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
            ["<|im_start|>system\n", "<|im_end|>\n"],
        ),
        _ => (
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
            "### Instruction:\n{instruction}\n\n### Response:\n",
            ["", "\n\n"],
        ),
    };
    let [before, behind] = system;
    let whole = |prompt: &str, text: &str| {
        if has_system {
            format!("{before}{prompt}{behind}{text}")
        } else {
            text.into()
        }
    };
    let output = match base {
        "gpteacher" => vec![("output", "response".into())],
        _ => Vec::new(),
    };
    Some(Rows {
        format: "alpaca",
        columns: output,
        template: PromptTemplate::Instruct(InstructTemplate {
            format: whole(ALPACA_WITH_INPUT, format),
            no_input_format: whole(ALPACA, no_input_format),
            ..InstructTemplate::default()
        }),
    })
}

/// The keys of a type that is written out, each with axolotl's default.
const CUSTOM: [(&str, &str); 8] = [
    ("system_prompt", ""),
    ("system_format", "{system}"),
    ("field_system", "system"),
    ("field_instruction", "instruction"),
    ("field_input", "input"),
    ("field_output", "output"),
    ("format", "{instruction} {input} "),
    ("no_input_format", "{instruction} "),
];

/// A type that is written out (`type: {field_instruction: …, format: …}`).
///
/// # Errors
///
/// The key that is wrong, and why.
pub(super) fn custom(entries: &[Entry]) -> Result<Rows, (String, String)> {
    for entry in entries {
        let known = CUSTOM.iter().map(|(key, _)| *key);
        if !known.clone().any(|key| key == entry.key) && !is_off(&entry.value) {
            let known: Vec<&str> = known.collect();
            let message = format!("unknown key; a type has {}", known.join(", "));
            return Err((entry.key.clone(), message));
        }
    }
    let text = |key: &str| {
        let default = CUSTOM.iter().find(|(name, _)| *name == key);
        let default = default.map_or("", |(_, default)| default);
        match entries.iter().find(|entry| entry.key == key) {
            None => Ok(default.to_string()),
            Some(entry) => match &entry.value {
                Value::Null => Ok(default.to_string()),
                Value::String(text) => Ok(text.clone()),
                _ => Err((key.to_string(), "must be a text; write it in quotes".into())),
            },
        }
    };
    let filled = |key: &str, names: &[&str]| {
        let problem = |message| (key.to_string(), message);
        text(key).and_then(|text| unescaped(&text, names).map_err(problem))
    };
    let format = filled("format", &["instruction", "input"])?;
    let no_input_format = filled("no_input_format", &["instruction"])?;
    let system_format = filled("system_format", &["system"])?;
    let system_prompt = text("system_prompt")?;
    let fields = [
        "field_instruction",
        "field_input",
        "field_output",
        "field_system",
    ]
    .map(text);
    let [instruction, input, output, system] = fields;
    let [instruction, input, output, system] = [instruction?, input?, output?, system?];

    let is_finlora = [&*instruction, &output, &system] == ["context", "target", "system"];
    let has_one_text = format == no_input_format && system_prompt.is_empty();
    if is_finlora && has_one_text && format.contains("{instruction}") {
        let text = format.replace("{instruction}", "{context}");
        return Ok(Rows {
            format: "context_target",
            columns: Vec::new(),
            template: match text.as_str() {
                "[INST] {context} [/INST]" => PromptTemplate::Inst,
                "{context}" => PromptTemplate::Raw,
                _ => PromptTemplate::Custom(text),
            },
        });
    }
    let template = InstructTemplate {
        format,
        no_input_format,
        system_format,
        system_prompt,
    };
    let template = PromptTemplate::parse(&PromptTemplate::Instruct(template).to_string())
        .map_err(|problem| ("format".to_string(), problem))?;
    let columns = [
        ("instruction", instruction),
        ("input", input),
        ("output", output),
        ("system", system),
    ];
    let columns = columns.into_iter().filter(|(ours, theirs)| ours != theirs);
    Ok(Rows {
        format: "alpaca",
        columns: columns.collect(),
        template,
    })
}

/// Converts a text for Python's `str.format` to one whose only braces are those of these placeholders.
fn unescaped(text: &str, names: &[&str]) -> Result<String, String> {
    let allowed: Vec<String> = names.iter().map(|name| format!("{{{name}}}")).collect();
    let wrong = |what: &str| {
        format!(
            "{what}; it may hold {} and, for a brace, {{{{ or }}}}",
            allowed.join(", ")
        )
    };
    let mut result = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        result += &rest[..at];
        rest = &rest[at..];
        let doubled = ["{{", "}}"].iter().find(|two| rest.starts_with(**two));
        if let Some(two) = doubled {
            result += &two[1..];
            rest = &rest[2..];
        } else if let Some(name) = allowed.iter().find(|name| rest.starts_with(name.as_str())) {
            result += name;
            rest = &rest[name.len()..];
        } else {
            let end = rest.find('}').map_or(rest.len(), |end| end + 1);
            return Err(wrong(&format!("{:?} is not a placeholder", &rest[..end])));
        }
    }
    result += rest;
    // A brace that was written twice must not become a placeholder.
    let written = |text: &str| -> usize {
        let places = ["{instruction}", "{input}", "{system}", "{context}"];
        places.iter().map(|place| text.matches(place).count()).sum()
    };
    let doubled = text.replace("{{", "").replace("}}", "");
    if written(&result) == written(&doubled) {
        Ok(result)
    } else {
        Err(wrong("braces around the name of a placeholder"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(pairs: &[(&str, &str)]) -> Vec<Entry> {
        let entry = |(key, value): &(&str, &str)| Entry {
            key: key.to_string(),
            value: Value::String(value.to_string()),
            line: None,
        };
        pairs.iter().map(entry).collect()
    }

    #[test]
    fn finloras_format_is_the_template_inst() {
        let both = "[INST] {instruction} [/INST]";
        let rows = custom(&entries(&[
            ("system_prompt", ""),
            ("field_system", "system"),
            ("field_instruction", "context"),
            ("field_output", "target"),
            ("format", both),
            ("no_input_format", both),
        ]));
        let expected = Rows {
            format: "context_target",
            columns: Vec::new(),
            template: PromptTemplate::Inst,
        };
        assert_eq!(rows, Ok(expected));
    }

    #[test]
    fn a_format_of_ones_own_has_axolotls_defaults_and_pythons_braces() {
        let rows = custom(&entries(&[
            ("field_instruction", "question"),
            ("field_system", "role"),
            ("format", "{{{instruction}}} {input}"),
        ]))
        .unwrap();
        assert_eq!(rows.format, "alpaca");
        assert_eq!(
            rows.columns,
            [
                ("instruction", "question".into()),
                ("system", "role".into())
            ]
        );
        let PromptTemplate::Instruct(template) = rows.template else {
            panic!()
        };
        assert_eq!(template.format, "{{instruction}} {input}");
        assert_eq!(template.no_input_format, "{instruction} ");
        assert_eq!(template.render(Some("s"), "a", Some("b")), "s{a} b");
    }

    #[test]
    fn what_python_would_not_format_is_refused() {
        for (key, text, part) in [
            ("format", "{context}", "\"{context}\" is not a placeholder"),
            ("format", "{instruction!r}", "is not a placeholder"),
            ("format", "{instruction} {", "is not a placeholder"),
            (
                "no_input_format",
                "{instruction} {input}",
                "\"{input}\" is not",
            ),
            ("format", "{{input}} {instruction}", "braces around"),
            ("system_format", "x", "\"system_format\" must contain"),
            ("prefix", "x", "unknown key"),
        ] {
            let (_, message) = custom(&entries(&[(key, text)])).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn named_types_begin_with_their_system_prompt_or_without() {
        let text = |name: &str| match named(name).unwrap().template {
            PromptTemplate::Instruct(template) => template.render(None, "I", Some("X")),
            other => panic!("{other}"),
        };
        assert!(text("alpaca").starts_with("Below is an instruction"));
        assert!(
            text("alpaca")
                .ends_with("request.\n\n### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n")
        );
        assert_eq!(text("alpaca_chat.load_no_prompt"), "USER: I\nX\nASSISTANT:");
        assert_eq!(
            named("gpteacher").unwrap().columns,
            [("output", "response".to_string())]
        );
        for other in [
            "alpaca:phi",
            "sharegpt",
            "alpaca_w_system.load",
            "completion",
        ] {
            assert_eq!(named(other), None);
        }
    }
}
