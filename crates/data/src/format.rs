//! The formats of data files: detected from the names of the columns, or set by the configuration.

use std::fmt;

use serde_json::{Map, Value};

use super::conversation::Conversation;
use super::empty::{is_blank, is_empty};
use super::error::{LineError, json_type};

const OF_MESSAGES: &str = "write \"prompt\" and \"completion\" as lists of messages";
const AS_MESSAGES: &str = "write the example as \"messages\"";
const SYSTEM: &str = "write the example as \"messages\" with a message of the role \"system\"";
const WEIGHT: &str = "remove or repeat examples instead";
const PREFERENCE: &str =
    "this trainer trains on answers, not on preferences; write the chosen one as the completion";

/// Columns that change the training in other trainers, if the format does not read them itself.
const NOT_HONOURED: [(&str, &str); 21] = [
    ("system", SYSTEM),
    ("system_prompt", SYSTEM),
    ("system_message", SYSTEM),
    ("history", AS_MESSAGES),
    ("tools", AS_MESSAGES),
    ("chat_template_kwargs", AS_MESSAGES),
    (
        "chat_template",
        "a run has one chat template, that of the model's folder",
    ),
    ("weight", WEIGHT),
    ("weights", WEIGHT),
    ("loss", WEIGHT),
    ("loss_weight", WEIGHT),
    ("sample_weight", WEIGHT),
    ("train", "remove the examples that are not to be trained on"),
    (
        "loss_mask",
        "write the example as \"messages\" and mark messages with \"weight\"",
    ),
    ("completion_mask", "write \"prompt\" and \"completion\""),
    ("assistant_masks", AS_MESSAGES),
    ("documents", "write them into a message"),
    ("functions", "write them as \"tools\""),
    ("chosen", PREFERENCE),
    ("rejected", PREFERENCE),
    ("rejected_response", PREFERENCE),
];

/// Columns of other content than text. In a table such a column may hold bytes; it is then listed as not read.
const NO_TEXT: [&str; 5] = ["image", "images", "videos", "audio", "audios"];

/// The column that rates a completion with true or false (TRL's unpaired preferences).
const LABEL: &str = "label";

/// The format of an example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `context` and `target`: FinLoRA's.
    ContextTarget,
    /// `prompt` and `completion`, two texts or two lists of messages.
    PromptCompletion,
    /// `instruction`, optionally `input`, and `output`: Alpaca's.
    Alpaca,
    /// `instruction`, optionally `context`, and `response`: databricks-dolly's.
    Dolly,
    /// `messages` of roles and contents (OpenAI's), or `conversations` (ShareGPT's).
    Messages,
    /// `text`, with the loss on all tokens.
    Text,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 6] = [
        Self::ContextTarget,
        Self::PromptCompletion,
        Self::Alpaca,
        Self::Dolly,
        Self::Messages,
        Self::Text,
    ];

    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::ContextTarget => "context_target",
            Self::PromptCompletion => "prompt_completion",
            Self::Alpaca => "alpaca",
            Self::Dolly => "dolly",
            Self::Messages => "messages",
            Self::Text => "text",
        }
    }

    /// The columns that the format reads.
    pub fn keys(self) -> &'static [&'static str] {
        match self {
            Self::ContextTarget => &["context", "target"],
            Self::PromptCompletion => &[
                "prompt",
                "completion",
                "tools",
                "system",
                "chat_template_kwargs",
            ],
            Self::Alpaca => &["instruction", "input", "output", "system", "history"],
            Self::Dolly => &["instruction", "context", "response"],
            Self::Messages => &[
                "messages",
                "conversations",
                "tools",
                "system",
                "chat_template_kwargs",
            ],
            Self::Text => &["text"],
        }
    }

    /// Whether a column of this name is read, or is an error unless it is empty.
    pub(super) fn reads(self, column: &str) -> bool {
        self.keys().contains(&column) || NOT_HONOURED.iter().any(|(key, _)| *key == column)
    }

    /// Whether the values of a column of this name are needed: it is read, or some of its values are errors.
    pub(super) fn looks_at(self, column: &str) -> bool {
        self.reads(column) || self == Self::PromptCompletion && column == LABEL
    }

    /// The format of a row with these columns. databricks-dolly's shares columns with two other formats, so it needs two
    /// of its own columns; of the other formats, the first one with one of its columns is chosen.
    pub(super) fn detect<'a>(keys: impl Iterator<Item = &'a str> + Clone) -> Option<Self> {
        let has = |wanted: &[&str]| keys.clone().any(|key| wanted.contains(&key));
        let is_dolly = has(&["instruction"]) && has(&["response"]);
        if is_dolly && !has(&["messages", "conversations", "target", "output"]) {
            return Some(Self::Dolly);
        }
        let signs: [(Self, &[&str]); 5] = [
            (Self::Messages, &["messages", "conversations"]),
            (Self::ContextTarget, &["context", "target"]),
            (Self::Alpaca, &["instruction"]),
            (Self::PromptCompletion, &["prompt", "completion"]),
            (Self::Text, &["text"]),
        ];
        let found = signs.into_iter().find(|(_, signs)| has(signs));
        found.map(|(format, _)| format)
    }

    /// The example that a row's columns hold.
    pub(super) fn example(self, mut row: Map<String, Value>) -> Result<Example, LineError> {
        let row = &mut row;
        for (key, remedy) in NOT_HONOURED {
            if !self.keys().contains(&key) && !is_blank(row.get(key)) {
                return Err(LineError::NotHonoured { key, remedy });
            }
        }
        let no_text = NO_TEXT.iter().find(|key| !is_blank(row.get(**key)));
        if let Some(key) = no_text.filter(|_| self == Self::Messages) {
            let remedy = "only text is trained on";
            return Err(LineError::NotHonoured { key, remedy });
        }
        if self == Self::PromptCompletion && row.get(LABEL).is_some_and(is_verdict) {
            let remedy = "it rates completions; keep the examples whose label is true, and remove the column";
            return Err(LineError::NotHonoured { key: LABEL, remedy });
        }
        Ok(match self {
            Self::ContextTarget => Example::Answer {
                context: text(row, "context")?,
                target: learned(row, "target")?,
            },
            Self::PromptCompletion if row.get("prompt").is_some_and(Value::is_array) => {
                Example::Conversation(Conversation::from_prompt_and_completion(row)?)
            }
            Self::PromptCompletion if !is_empty(row.get("system")) => {
                let key = "system";
                let remedy =
                    "write it at the beginning of \"prompt\", or the example as \"messages\"";
                return Err(LineError::NotHonoured { key, remedy });
            }
            Self::PromptCompletion if !is_blank(row.get("tools")) => {
                return Err(LineError::NotHonoured {
                    key: "tools",
                    remedy: OF_MESSAGES,
                });
            }
            Self::PromptCompletion if !is_blank(row.get("chat_template_kwargs")) => {
                let key = "chat_template_kwargs";
                return Err(LineError::NotHonoured {
                    key,
                    remedy: OF_MESSAGES,
                });
            }
            Self::PromptCompletion => Example::Answer {
                context: text(row, "prompt")?,
                target: learned(row, "completion")?,
            },
            Self::Alpaca => {
                let key = "history";
                if !is_empty(row.get(key)) {
                    return Err(LineError::NotSupported { key });
                }
                Example::Instruction {
                    system: match row.get("system") {
                        None => None,
                        value if is_empty(value) => Some(String::new()),
                        Some(_) => Some(text(row, "system")?),
                    },
                    instruction: text(row, "instruction")?,
                    input: if is_empty(row.get("input")) {
                        None
                    } else {
                        Some(text(row, "input")?)
                    },
                    output: learned(row, "output")?,
                }
            }
            Self::Dolly => Example::Instruction {
                system: None,
                instruction: text(row, "instruction")?,
                input: if is_empty(row.get("context")) {
                    None
                } else {
                    Some(text(row, "context")?)
                },
                output: learned(row, "response")?,
            },
            Self::Messages => Example::Conversation(Conversation::from_row(row)?),
            Self::Text => Example::Text(learned(row, "text")?),
        })
    }
}

/// As it is printed: `{"context", "target"}`.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ContextTarget => "{\"context\", \"target\"}",
            Self::PromptCompletion => "{\"prompt\", \"completion\"}",
            Self::Alpaca => "{\"instruction\", \"input\", \"output\"}",
            Self::Dolly => "{\"instruction\", \"context\", \"response\"}",
            Self::Messages => "{\"messages\"}",
            Self::Text => "{\"text\"}",
        })
    }
}

/// The content of an example.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// An answer to a context. The prompt template turns the context into the prompt.
    Answer {
        /// The context.
        context: String,
        /// The answer. Never empty.
        target: String,
    },
    /// An answer to an instruction about an input.
    Instruction {
        /// The system prompt; `None` for a row without such a column. Only `instruct` templates support it.
        system: Option<String>,
        /// The instruction.
        instruction: String,
        /// The input, if there is one.
        input: Option<String>,
        /// The answer. Never empty.
        output: String,
    },
    /// A conversation, with the loss on the assistant turns.
    Conversation(Conversation),
    /// A text, with the loss on all tokens.
    Text(String),
}

impl Example {
    /// The answer; of a conversation, the last assistant turn. `None` for a plain text.
    pub fn target(&self) -> Option<&str> {
        match self {
            Self::Answer { target, .. } => Some(target),
            Self::Instruction { output, .. } => Some(output),
            Self::Conversation(conversation) => {
                let last = conversation.assistant_turns().next_back()?;
                Some(
                    conversation.messages[last]["content"]
                        .as_str()
                        .unwrap_or_default(),
                )
            }
            Self::Text(_) => None,
        }
    }
}

/// Whether a value is a boolean, or a text of one as in a table.
fn is_verdict(value: &Value) -> bool {
    match value {
        Value::Bool(_) => true,
        Value::String(text) => ["true", "false"].contains(&text.to_lowercase().as_str()),
        _ => false,
    }
}

fn text(row: &mut Map<String, Value>, key: &'static str) -> Result<String, LineError> {
    match row.get_mut(key) {
        Some(Value::String(text)) => Ok(std::mem::take(text)),
        Some(value) => Err(LineError::WrongType {
            key: key.into(),
            wanted: "a string",
            got: json_type(value),
        }),
        None => Err(LineError::MissingKey {
            key,
            present: row.keys().cloned().collect(),
        }),
    }
}

/// A text in the loss, which must not be empty.
fn learned(row: &mut Map<String, Value>, key: &'static str) -> Result<String, LineError> {
    let text = text(row, key)?;
    if text.trim().is_empty() {
        Err(LineError::Empty { key })
    } else {
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn example(row: Value) -> Result<(Format, Example), String> {
        let Value::Object(row) = row else { panic!() };
        let format = Format::detect(row.keys().map(String::as_str)).ok_or("unknown")?;
        let example = format.example(row).map_err(|error| error.to_string())?;
        Ok((format, example))
    }

    #[test]
    fn the_columns_tell_the_format() {
        for (row, format) in [
            (
                json!({"id": 1, "context": "", "target": "b"}),
                Format::ContextTarget,
            ),
            (
                json!({"prompt": "a", "completion": "b"}),
                Format::PromptCompletion,
            ),
            (
                json!({"instruction": "a", "output": "b", "text": "ab"}),
                Format::Alpaca,
            ),
            (
                json!({"messages": [{"role": "assistant", "content": "a"}], "prompt": "x"}),
                Format::Messages,
            ),
            (json!({"text": "a"}), Format::Text),
            (
                json!({"instruction": "a", "context": "", "response": "b", "category": "c"}),
                Format::Dolly,
            ),
        ] {
            let (found, _) = example(row).unwrap();
            assert_eq!(found, format);
            assert!(Format::ALL.contains(&found));
        }
        assert_eq!(example(json!({"a": "b"})), Err("unknown".into()));
    }

    #[test]
    fn columns_that_other_trainers_honour_are_refused_where_they_hold_something() {
        let messages =
            json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        for (row, key, value) in [
            (
                json!({"prompt": "a", "completion": "b"}),
                "tools",
                json!([{"name": "f"}]),
            ),
            (
                json!({"prompt": "a", "completion": "b"}),
                "label",
                json!(false),
            ),
            (
                json!({"prompt": "a", "completion": "b"}),
                "label",
                json!("True"),
            ),
            (
                json!({"prompt": "a", "completion": "b"}),
                "chat_template_kwargs",
                json!({"x": 1}),
            ),
            (
                json!({"context": "a", "target": "b"}),
                "tools",
                json!("[{}]"),
            ),
            (
                json!({"instruction": "a", "output": "b"}),
                "sample_weight",
                json!(0.5),
            ),
            (json!({"text": "a"}), "loss", json!(0)),
            (
                json!({"messages": messages}),
                "system_prompt",
                json!("be brief"),
            ),
            (json!({"messages": messages}), "images", json!(["a.png"])),
            (json!({"messages": messages}), "chat_template", json!("x")),
        ] {
            let with = |value: Value| {
                let mut row = row.clone();
                row[key] = value;
                example(row)
            };
            let error = with(value).unwrap_err();
            assert!(error.contains(&format!("\"{key}\"")), "{error}");
            for nothing in [json!(null), json!([]), json!("[]"), json!("")] {
                with(nothing).unwrap();
            }
        }
        // A class beside the completion is no verdict on it.
        example(json!({"prompt": "a", "completion": "b", "label": 1})).unwrap();
    }

    #[test]
    fn alpaca_may_lack_an_input_and_must_not_have_what_is_not_read() {
        for input in [json!(null), json!("")] {
            let row = json!({"instruction": "i", "input": input, "output": "o", "history": []});
            let (_, found) = example(row).unwrap();
            let expected = Example::Instruction {
                system: None,
                instruction: "i".into(),
                input: None,
                output: "o".into(),
            };
            assert_eq!(found, expected);
        }
        let row = json!({"instruction": "i", "output": "o", "history": [["a", "b"]]});
        let error = example(row).unwrap_err();
        assert!(
            error.contains("\"history\"") && error.contains("messages"),
            "{error}"
        );
    }

    #[test]
    fn dollys_columns_are_alpacas_under_other_names() {
        for context in ["", "c"] {
            let (_, dolly) =
                example(json!({"instruction": "i", "context": context, "response": "o"})).unwrap();
            let (_, alpaca) =
                example(json!({"instruction": "i", "input": context, "output": "o"})).unwrap();
            assert_eq!(dolly, alpaca);
        }
    }

    #[test]
    fn what_is_missing_wrong_or_empty_is_named() {
        for (row, part) in [
            (json!({"prompt": "a"}), "the key \"completion\" is missing"),
            (
                json!({"text": 3}),
                "\"text\" must be a string, got a number",
            ),
            (
                json!({"instruction": "a", "output": " "}),
                "\"output\" is empty",
            ),
            (json!({"text": ""}), "\"text\" is empty"),
        ] {
            let error = example(row).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
