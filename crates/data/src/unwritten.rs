//! Parts of conversations that a chat template does not write: a warning if they are known to change the meaning, else they
//! are listed. transformers ignores them silently.

use std::path::Path;

use serde_json::Value;

use super::conversation::Conversation;
use super::empty::is_empty;
use super::format::Example;
use super::rows::{MOST_IGNORED, Row};
use super::template::ChatTemplate;

/// A part of a conversation that has a meaning and that some templates do not write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The list of tools.
    Tools,
    /// A key of messages.
    Key(&'static str),
}

/// The parts. (The `name` of a tool's message is excepted: few templates write it.)
const PARTS: [Part; 6] = [
    Part::Tools,
    Part::Key("tool_calls"),
    Part::Key("name"),
    Part::Key("reasoning_content"),
    Part::Key("reasoning"),
    Part::Key("thinking"),
];

/// Keys of messages that every template may leave out.
const WITHOUT_MEANING: [&str; 3] = ["role", "content", "tool_call_id"];

impl Part {
    /// The first message that has the part; 0 for the list of tools.
    fn place(self, conversation: &Conversation) -> Option<usize> {
        match self {
            Self::Tools => conversation.tools.as_ref().map(|_| 0),
            Self::Key(key) => conversation.messages.iter().position(|it| has(it, key)),
        }
    }

    fn is_thought(self) -> bool {
        !matches!(self, Self::Tools | Self::Key("tool_calls" | "name"))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tools => "tools",
            Self::Key(key) => key,
        }
    }

    /// The conversation without it.
    fn removed(self, conversation: &Conversation) -> Conversation {
        let mut conversation = conversation.clone();
        match self {
            Self::Tools => conversation.tools = None,
            Self::Key(key) => {
                for message in &mut conversation.messages {
                    if has(message, key)
                        && let Some(message) = message.as_object_mut()
                    {
                        message.shift_remove(key);
                    }
                }
            }
        }
        conversation
    }
}

/// Whether a message has a key with a meaning.
fn has(message: &Value, key: &str) -> bool {
    let is_a_tools_name = key == "name" && message["role"] == "tool";
    !is_empty(message.get(key)) && !is_a_tools_name
}

/// A warning for each kind of part that the template does not write: the first row that has it, and what to do.
pub(super) fn warnings(template: &ChatTemplate, rows: &[Row], path: &Path) -> Vec<String> {
    let mut open = PARTS.to_vec();
    let mut variables: Vec<&str> = Vec::new();
    let mut warnings = Vec::new();
    for (line, conversation) in conversations(rows) {
        let mut warn = |what: String| {
            warnings.push(format!(
                "the chat template does not write {what} ({}:{line}): it is not trained on, as in transformers. Write it into a \
                 content, or give the model's folder a template that writes it (chat_template.jinja)",
                path.display()
            ));
        };
        for (name, value) in &conversation.variables {
            let is_off = matches!(value, Value::Null | Value::Bool(false));
            if !is_off && !template.mentions(name) && !variables.contains(&name.as_str()) {
                variables.push(name);
                warn(format!("{name:?} of chat_template_kwargs"));
            }
        }
        open.retain(|part| {
            let Some(place) = part.place(conversation) else {
                return true;
            };
            // A template may drop the reasoning of earlier turns on purpose.
            let is_known = part.is_thought() && template.mentions(part.name());
            if !is_known && !writes(template, conversation, *part) {
                let name = part.name();
                warn(match part {
                    Part::Tools => "the list of tools (\"tools\")".into(),
                    Part::Key(_) => format!("{name:?} of messages[{place}]"),
                });
            }
            false
        });
    }
    warnings
}

/// Whether the text with the part differs from the text without it; `true` if one of them cannot be rendered, which is
/// reported elsewhere.
fn writes(template: &ChatTemplate, conversation: &Conversation, part: Part) -> bool {
    let text = |conversation: &Conversation| {
        let rendered = template.render(&conversation.messages, conversation, false);
        rendered.ok().map(|rendered| rendered.text)
    };
    let (with, without) = (text(conversation), text(&part.removed(conversation)));
    with.is_none() || without.is_none() || with != without
}

/// The keys of messages that the template does not mention, in the order in which they are found: `messages[].id`.
pub(super) fn ignored(template: &ChatTemplate, rows: &[Row]) -> Vec<String> {
    let mut found: Vec<&str> = Vec::new();
    let messages = conversations(rows).flat_map(|(_, conversation)| &conversation.messages);
    let keys = messages
        .filter_map(Value::as_object)
        .flat_map(|it| it.keys());
    for key in keys {
        let is_part = PARTS.iter().any(|part| part.name() == key);
        let is_known = is_part || WITHOUT_MEANING.contains(&key.as_str());
        if is_known || found.contains(&key.as_str()) || found.len() == MOST_IGNORED {
            continue;
        }
        if !template.mentions(key) {
            found.push(key);
        }
    }
    found
        .iter()
        .map(|key| format!("messages[].{key}"))
        .collect()
}

fn conversations(rows: &[Row]) -> impl Iterator<Item = (usize, &Conversation)> {
    rows.iter().filter_map(|row| match &row.example {
        Example::Conversation(conversation) => Some((row.line, conversation)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::model_files::ModelFiles;
    use super::*;

    fn template(text: &str) -> ChatTemplate {
        let files = ModelFiles {
            chat_template: Some(text.into()),
            ..ModelFiles::default()
        };
        ChatTemplate::new(&files).unwrap()
    }

    fn rows(row: Value) -> Vec<Row> {
        let Value::Object(mut row) = row else {
            unreachable!()
        };
        let example = Example::Conversation(Conversation::from_row(&mut row).unwrap());
        vec![Row { line: 3, example }]
    }

    const PLAIN: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";

    fn answer(key: &str, value: Value) -> Value {
        let mut answer = json!({"role": "assistant", "content": "no"});
        answer[key] = value;
        json!({"messages": [{"role": "user", "content": "a"}, answer]})
    }

    fn warnings_of(template: &ChatTemplate, row: Value) -> Vec<String> {
        warnings(template, &rows(row), Path::new("x.jsonl"))
    }

    #[test]
    fn what_the_template_does_not_write_is_named() {
        let calls = json!([{"type": "function", "function": {"name": "f", "arguments": {}}}]);
        let mut with_tools = answer("id", json!(1));
        with_tools["tools"] = calls.clone();
        let mut with_variable = answer("id", json!(1));
        with_variable["chat_template_kwargs"] = json!({"deep": true});
        for (row, name) in [
            (answer("tool_calls", calls), "\"tool_calls\" of messages[1]"),
            (answer("name", json!("Ann")), "\"name\" of messages[1]"),
            (
                answer("thinking", json!("hm")),
                "\"thinking\" of messages[1]",
            ),
            (with_tools, "\"tools\""),
            (with_variable, "\"deep\""),
        ] {
            let found = warnings_of(&template(PLAIN), row);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(
                found[0].contains("x.jsonl:3") && found[0].contains(name),
                "{found:?}"
            );
        }
    }

    #[test]
    fn what_the_template_writes_or_what_is_empty_needs_no_word() {
        let name = template("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}");
        let none: [&str; 0] = [];
        assert_eq!(warnings_of(&name, answer("name", json!("Ann"))), none);
        let plain = template(PLAIN);
        assert_eq!(warnings_of(&plain, answer("tool_calls", json!([]))), none);
        assert_eq!(warnings_of(&plain, answer("thinking", json!(""))), none);
        let tool = json!({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "f", "content": "1"},
            {"role": "assistant", "content": "no"}]});
        assert_eq!(warnings_of(&plain, tool), none);
        // Thoughts of all turns but the last are dropped.
        let last = template(
            "{% for m in messages %}{% if loop.last %}{{ m.thinking }}{% endif %}{{ m.content }}{% endfor %}",
        );
        let earlier = json!({"messages": [{"role": "assistant", "content": "no", "thinking": "hm"},
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
        assert_eq!(warnings_of(&last, earlier), none);
    }

    #[test]
    fn other_keys_are_listed_once_where_the_template_does_not_mention_them() {
        let rows = rows(
            json!({"messages": [{"role": "user", "content": "a", "id": 1, "tool_call_id": "x"},
            {"role": "assistant", "content": "no", "id": 2, "model": "m"}]}),
        );
        assert_eq!(
            ignored(&template(PLAIN), &rows),
            ["messages[].id", "messages[].model"]
        );
        let reads = template("{% for m in messages %}{{ m['model'] }}{{ m.content }}{% endfor %}");
        assert_eq!(ignored(&reads, &rows), ["messages[].id"]);
    }
}
