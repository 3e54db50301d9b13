//! Conversations: messages of roles and contents, and which of them are learned.

use serde_json::{Map, Value, json};

use super::error::LineError;
use super::format::json_type;

/// A conversation whose assistant's turns are learned.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// The messages, each an object with at least `role` and `content`, as the chat template gets them.
    pub messages: Vec<Value>,
    /// What the chat template knows as `tools`.
    pub tools: Option<Value>,
    /// The first message that may be learned; those before are given.
    pub learn_from: usize,
}

impl Conversation {
    /// From a row with `messages`, or with ShareGPT's `conversations`.
    pub(super) fn from_row(row: &mut Map<String, Value>) -> Result<Self, LineError> {
        let key = match row.contains_key("messages") {
            true => "messages",
            false => "conversations",
        };
        Self {
            messages: messages(row, key)?,
            tools: row.remove("tools").filter(|tools| !tools.is_null()),
            learn_from: 0,
        }
        .checked()
    }

    /// From a row with `prompt` and `completion`, both messages; only the completion's are learned.
    pub(super) fn from_prompt_and_completion(
        row: &mut Map<String, Value>,
    ) -> Result<Self, LineError> {
        let mut all = messages(row, "prompt")?;
        let learn_from = all.len();
        all.extend(messages(row, "completion")?);
        Self {
            messages: all,
            tools: row.remove("tools").filter(|tools| !tools.is_null()),
            learn_from,
        }
        .checked()
    }

    /// The messages that are learned, by index.
    pub fn assistant_turns(&self) -> impl DoubleEndedIterator<Item = usize> {
        let messages = self.messages.iter().enumerate().skip(self.learn_from);
        messages
            .filter(|(_, message)| message["role"] == "assistant")
            .map(|(index, _)| index)
    }

    fn checked(self) -> Result<Self, LineError> {
        if self.assistant_turns().next().is_none() {
            let mut roles: Vec<String> = Vec::new();
            for message in &self.messages[self.learn_from..] {
                let role = message["role"].as_str().unwrap_or_default();
                if !roles.iter().any(|known| known == role) {
                    roles.push(role.into());
                }
            }
            return Err(LineError::NoAssistant { roles });
        }
        let empty = |turn: usize| {
            let content = self.messages[turn]["content"].as_str();
            content.is_none_or(|content| content.trim().is_empty())
                && self.messages[turn]
                    .get("tool_calls")
                    .is_none_or(Value::is_null)
        };
        if let Some(turn) = self.assistant_turns().find(|turn| empty(*turn)) {
            return Err(LineError::EmptyTurn { turn });
        }
        Ok(self)
    }
}

/// The messages of a column: a list, or the JSON text of one (CSV has nothing else).
fn messages(row: &mut Map<String, Value>, key: &'static str) -> Result<Vec<Value>, LineError> {
    let present = || row.keys().cloned().collect();
    let value = match row.get(key) {
        None => {
            return Err(LineError::MissingKey {
                key,
                present: present(),
            });
        }
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|error| LineError::WrongMessage {
                place: key.into(),
                problem: format!("is a text that is no JSON: {error}"),
            })?
        }
        Some(value) => value.clone(),
    };
    let Value::Array(items) = value else {
        return Err(LineError::WrongMessage {
            place: key.into(),
            problem: format!("must be a list of messages, got {}", json_type(&value)),
        });
    };
    let items = items.into_iter().enumerate();
    items
        .map(|(index, item)| {
            message(item).map_err(|problem| LineError::WrongMessage {
                place: format!("{key}[{index}]"),
                problem,
            })
        })
        .collect()
}

/// A message under OpenAI's names.
fn message(item: Value) -> Result<Value, String> {
    let Value::Object(mut item) = item else {
        let got = json_type(&item);
        return Err(format!(
            "must be an object {{\"role\", \"content\"}}, got {got}"
        ));
    };
    if !item.contains_key("role") && item.contains_key("from") && item.contains_key("value") {
        let role = match item["from"].as_str() {
            Some("human" | "user") => "user",
            Some("gpt" | "assistant") => "assistant",
            Some("system") => "system",
            _ => {
                let got = &item["from"];
                return Err(format!(
                    "\"from\" is {got}; expected \"human\", \"gpt\" or \"system\""
                ));
            }
        };
        let content = item.remove("value").unwrap_or_default();
        item = Map::from_iter([("role".into(), json!(role)), ("content".into(), content)]);
    }
    match item.get("role") {
        Some(Value::String(_)) => {}
        Some(other) => {
            return Err(format!(
                "\"role\" must be a string, got {}",
                json_type(other)
            ));
        }
        None => return Err("the key \"role\" is missing".into()),
    }
    let calls = item.get("tool_calls").is_some_and(|calls| !calls.is_null());
    match item.get("content") {
        Some(Value::String(_)) => {}
        None | Some(Value::Null) if calls => {}
        None => return Err("the key \"content\" is missing".into()),
        Some(Value::Array(_)) => {
            return Err(
                "\"content\" must be a string; lists of parts (images) are not supported".into(),
            );
        }
        Some(other) => {
            return Err(format!(
                "\"content\" must be a string, got {}",
                json_type(other)
            ));
        }
    }
    Ok(Value::Object(item))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(row: Value) -> Result<Conversation, String> {
        let Value::Object(mut row) = row else {
            panic!()
        };
        let conversation = match row.contains_key("prompt") {
            true => Conversation::from_prompt_and_completion(&mut row),
            false => Conversation::from_row(&mut row),
        };
        conversation.map_err(|error| error.to_string())
    }

    fn said(role: &str, content: &str) -> Value {
        json!({"role": role, "content": content})
    }

    #[test]
    fn the_assistants_turns_are_learned_and_of_a_prompt_none() {
        let messages = [
            said("user", "a"),
            said("assistant", "b"),
            said("user", "c"),
            said("assistant", "d"),
        ];
        let all = from(json!({"messages": messages})).unwrap();
        assert_eq!(all.assistant_turns().collect::<Vec<_>>(), [1, 3]);
        let split = from(json!({"prompt": messages[..3], "completion": messages[3..]})).unwrap();
        assert_eq!(split.messages, all.messages);
        assert_eq!(split.assistant_turns().collect::<Vec<_>>(), [3]);
        let in_text = serde_json::to_string(&messages).unwrap();
        assert_eq!(from(json!({"messages": in_text})).unwrap(), all);
    }

    #[test]
    fn sharegpts_names_are_openais() {
        let row = json!({"conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]});
        let messages = [
            said("system", "s"),
            said("user", "q"),
            said("assistant", "a"),
        ];
        assert_eq!(from(row).unwrap().messages, messages);
    }

    #[test]
    fn a_message_that_is_none_says_which_and_why() {
        for (messages, parts) in [
            (json!("[1"), ["messages is a text", "no JSON"]),
            (json!(7), ["messages must be a list", "a number"]),
            (json!([said("user", "a"), 3]), ["messages[1]", "a number"]),
            (
                json!([{"content": "a"}]),
                ["messages[0]", "\"role\" is missing"],
            ),
            (
                json!([{"role": "user"}]),
                ["messages[0]", "\"content\" is missing"],
            ),
            (
                json!([{"role": "user", "content": [{"type": "image"}]}]),
                ["messages[0]", "not supported"],
            ),
            (
                json!([{"role": 1, "content": ""}]),
                ["messages[0]", "\"role\" must be a string"],
            ),
            (
                json!([{"from": "bot", "value": ""}]),
                ["messages[0]", "\"bot\""],
            ),
            (
                json!([said("user", "a"), said("model", "b")]),
                ["no assistant", "user, model"],
            ),
            (json!([]), ["no assistant", "no messages"]),
            (
                json!([said("user", "a"), said("assistant", " ")]),
                ["messages[1]", "empty"],
            ),
        ] {
            let error = from(json!({"messages": messages})).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn a_turn_that_calls_a_tool_needs_no_content() {
        let call = json!({"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]});
        let conversation =
            from(json!({"messages": [said("user", "a"), call], "tools": [{"name": "f"}]}));
        assert_eq!(conversation.unwrap().tools, Some(json!([{"name": "f"}])));
    }
}
