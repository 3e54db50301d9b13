//! Conversations: messages with role and content, and which of them are in the loss.

use serde_json::{Map, Value, json};

use super::empty::is_off;
use super::error::{LineError, json_type};
use super::integers;

/// A conversation whose assistant turns are in the loss.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// The messages, each an object with at least `role`, as the chat template gets them.
    pub messages: Vec<Value>,
    /// The chat template's variable `tools`.
    pub tools: Option<Value>,
    /// Further variables of the chat template: TRL's column `chat_template_kwargs`.
    pub variables: Map<String, Value>,
    /// The first message that may be in the loss; messages before it are part of the prompt.
    pub learn_from: usize,
    /// Assistant turns that the row marks as not in the loss.
    pub given: Vec<usize>,
}

/// Keys of a message that decide in other trainers whether it is in the loss: OpenAI's and Mistral's `weight`, axolotl's `train`
/// and `training`, and others.
const LEARNED_MARKS: [&str; 6] = [
    "weight",
    "train",
    "training",
    "trainable",
    "loss",
    "loss_mask",
];

const MARK: &str = "mark whole messages with \"train\": true or false";

/// Keys of a message that change its meaning and are not supported.
const NOT_HONOURED: [(&str, &str); 14] = [
    ("function_call", "write it as \"tool_calls\""),
    ("audio", "only text is trained on"),
    ("image", "only text is trained on"),
    ("images", "only text is trained on"),
    ("audios", "only text is trained on"),
    ("video", "only text is trained on"),
    ("videos", "only text is trained on"),
    (
        "prefix",
        "write the answer's beginning as a part of the prompt",
    ),
    ("training_detail", MARK),
    ("train_detail", MARK),
    ("loss_scale", MARK),
    ("mask", MARK),
    ("masked", MARK),
    ("is_masked", MARK),
];

impl Conversation {
    /// From a row with `messages`, or with ShareGPT's `conversations`.
    pub(super) fn from_row(row: &mut Map<String, Value>) -> Result<Self, LineError> {
        let key = if row.contains_key("messages") {
            "messages"
        } else {
            "conversations"
        };
        let messages = messages(row, key)?;
        Self::beside(row, messages, 0)
    }

    /// From a row with `prompt` and `completion`, both lists of messages; only those of the completion are in the loss.
    pub(super) fn from_prompt_and_completion(
        row: &mut Map<String, Value>,
    ) -> Result<Self, LineError> {
        let mut all = messages(row, "prompt")?;
        let learn_from = all.len();
        all.extend(messages(row, "completion")?);
        Self::beside(row, all, learn_from)
    }

    /// Adds the other columns of the row to its messages.
    fn beside(
        row: &mut Map<String, Value>,
        mut messages: Vec<Message>,
        mut learn_from: usize,
    ) -> Result<Self, LineError> {
        let tools = tools(row)?;
        let variables = match row.remove("chat_template_kwargs") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(variables)) => variables,
            Some(other) => {
                return Err(LineError::WrongType {
                    key: "chat_template_kwargs".into(),
                    wanted: "an object",
                    got: json_type(&other),
                });
            }
        };
        if let Some(system) = system(row)? {
            if messages.first().is_some_and(|first| first.is("system")) {
                return Err(LineError::TwoSystemPrompts);
            }
            learn_from += usize::from(learn_from > 0);
            let value = json!({"role": "system", "content": system});
            messages.insert(
                0,
                Message {
                    value,
                    learned: true,
                },
            );
        }
        let given = messages.iter().enumerate();
        let given = given.filter(|(_, message)| !message.learned);
        Self {
            given: given.map(|(index, _)| index).collect(),
            messages: messages.into_iter().map(|message| message.value).collect(),
            tools,
            variables,
            learn_from,
        }
        .checked()
    }

    /// The indices of the assistant turns that are in the loss.
    pub fn assistant_turns(&self) -> impl DoubleEndedIterator<Item = usize> {
        let turns = self.turns().filter(|turn| *turn >= self.learn_from);
        turns.filter(|turn| !self.given.contains(turn))
    }

    /// The indices of all assistant turns.
    pub(super) fn turns(&self) -> impl DoubleEndedIterator<Item = usize> {
        let messages = self.messages.iter().enumerate();
        messages
            .filter(|(_, message)| message["role"] == "assistant")
            .map(|(index, _)| index)
    }

    fn checked(self) -> Result<Self, LineError> {
        if self.assistant_turns().next().is_none() {
            if !self.given.is_empty() {
                return Err(LineError::NothingLearned);
            }
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
            let content = self.messages[turn].get("content").and_then(Value::as_str);
            content.is_none_or(|content| content.trim().is_empty())
                && self.messages[turn].get("tool_calls").is_none()
        };
        if let Some(turn) = self.assistant_turns().find(|turn| empty(*turn)) {
            return Err(LineError::EmptyTurn { turn });
        }
        Ok(self)
    }
}

/// A message with OpenAI's keys, and whether it is in the loss if it is the assistant's.
struct Message {
    value: Value,
    learned: bool,
}

impl Message {
    fn is(&self, role: &str) -> bool {
        self.value["role"] == role
    }
}

/// The list of tools: a list, or its JSON text, which Arrow stores better.
fn tools(row: &mut Map<String, Value>) -> Result<Option<Value>, LineError> {
    let wrong = |problem: String| LineError::WrongMessage {
        place: "tools".into(),
        problem,
    };
    let parsed = |text: &str| {
        integers::parse(text).map_err(|error| wrong(format!("is a text that is not JSON: {error}")))
    };
    let value = match row.remove("tools") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => parsed(&text)?,
        Some(value) => value,
    };
    let Value::Array(items) = value else {
        let got = json_type(&value);
        return Err(wrong(format!("must be a list of tools, got {got}")));
    };
    let items = items.into_iter().map(|item| {
        let item = match item {
            Value::String(text) => parsed(&text)?,
            item => item,
        };
        if item.is_object() {
            Ok(item)
        } else {
            Err(wrong(format!(
                "must hold objects, got {}",
                json_type(&item)
            )))
        }
    });
    let items: Vec<Value> = items.collect::<Result<_, LineError>>()?;
    // As in transformers, an empty list counts as absent: templates test whether `tools` is set.
    Ok((!items.is_empty()).then_some(Value::Array(items)))
}

/// The system prompt of a column of its own.
fn system(row: &mut Map<String, Value>) -> Result<Option<String>, LineError> {
    match row.remove("system") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(LineError::WrongType {
            key: "system".into(),
            wanted: "a string",
            got: json_type(&other),
        }),
    }
}

/// The messages of a column: a list, or its JSON text, as in CSV.
fn messages(row: &mut Map<String, Value>, key: &'static str) -> Result<Vec<Message>, LineError> {
    let present = || row.keys().cloned().collect();
    let value = match row.get(key) {
        None => {
            return Err(LineError::MissingKey {
                key,
                present: present(),
            });
        }
        Some(Value::String(text)) => {
            integers::parse(text).map_err(|error| LineError::WrongMessage {
                place: key.into(),
                problem: format!("is a text that is not JSON: {error}"),
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

/// A message with OpenAI's keys. A key with the value null is absent, as in transformers: Arrow and OpenAI's SDK write
/// every key into every message.
fn message(item: Value) -> Result<Message, String> {
    let Value::Object(mut item) = item else {
        let got = json_type(&item);
        return Err(format!(
            "must be an object {{\"role\", \"content\"}}, got {got}"
        ));
    };
    item.retain(|_, value| !value.is_null());
    if !item.contains_key("role") && item.contains_key("from") {
        item = from_sharegpt(item)?;
    }
    let role = match item.get("role") {
        Some(Value::String(role)) => role.clone(),
        Some(other) => {
            return Err(format!(
                "\"role\" must be a string, got {}",
                json_type(other)
            ));
        }
        None => return Err("the key \"role\" is missing".into()),
    };
    for (key, remedy) in NOT_HONOURED {
        if !is_off(item.get(key)) {
            return Err(format!("has {key:?}, which is not supported; {remedy}"));
        }
        item.shift_remove(key);
    }
    let learned = is_learned(&mut item, &role)?;
    match item.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let text = texts(parts)?;
            item.insert("content".into(), text.into());
        }
        None if item.contains_key("tool_calls") => {}
        None => return Err("the key \"content\" is missing".into()),
        Some(other) => {
            return Err(format!(
                "\"content\" must be a string, got {}",
                json_type(other)
            ));
        }
    }
    Ok(Message {
        value: Value::Object(item),
        learned,
    })
}

/// Renames ShareGPT's keys and roles to OpenAI's; other keys are kept.
fn from_sharegpt(item: Map<String, Value>) -> Result<Map<String, Value>, String> {
    let role = match item["from"].as_str() {
        Some("human" | "user") => "user",
        Some("gpt" | "assistant") => "assistant",
        Some("system") => "system",
        Some("tool" | "observation") => "tool",
        _ => {
            let got = &item["from"];
            return Err(format!(
                "\"from\" is {got}; expected \"human\", \"gpt\", \"system\" or \"tool\""
            ));
        }
    };
    if item.contains_key("content") {
        return Err("has \"from\" and \"content\"; write \"role\" and \"content\", or \"from\" and \"value\"".into());
    }
    let entries = item.into_iter().map(|(key, value)| match key.as_str() {
        "from" => ("role".to_string(), json!(role)),
        "value" => ("content".to_string(), value),
        _ => (key, value),
    });
    Ok(entries.collect())
}

/// Whether a message is in the loss, according to the keys of other trainers. The keys are removed: a template must not
/// see them.
fn is_learned(item: &mut Map<String, Value>, role: &str) -> Result<bool, String> {
    let mut learned = true;
    for key in LEARNED_MARKS {
        let Some(value) = item.shift_remove(key) else {
            continue;
        };
        let says = match &value {
            Value::Bool(says) => *says,
            Value::Number(number) if number.as_f64() == Some(0.0) => false,
            Value::Number(number) if number.as_f64() == Some(1.0) => true,
            other => {
                return Err(format!(
                    "{key:?} is {other}; it must be 1 or true for a turn in the loss, 0 or false for another; weights in between are not \
                     supported"
                ));
            }
        };
        if role != "assistant" && says && key != "loss_mask" && key != "weight" {
            return Err(format!(
                "{key:?} puts a message of the role {role:?} into the loss; the loss is on the assistant's messages only"
            ));
        }
        learned &= says;
    }
    Ok(learned)
}

/// The text of a content that is a list of text parts.
fn texts(parts: &[Value]) -> Result<String, String> {
    let mut all = String::new();
    for (index, part) in parts.iter().enumerate() {
        let is_text = part.get("type").is_none_or(|kind| kind == "text");
        match (part, part.get("text").and_then(Value::as_str)) {
            (Value::String(text), _) => all += text,
            (_, Some(text)) if is_text => all += text,
            _ => {
                let kind = part.get("type").and_then(Value::as_str);
                let kind = kind.map_or_else(|| json_type(part).into(), |kind| format!("{kind:?}"));
                return Err(format!(
                    "\"content\"[{index}] is {kind}; only parts of type \"text\" are supported"
                ));
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(row: Value) -> Result<Conversation, String> {
        let Value::Object(mut row) = row else {
            panic!()
        };
        let conversation = if row.contains_key("prompt") {
            Conversation::from_prompt_and_completion(&mut row)
        } else {
            Conversation::from_row(&mut row)
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
            (json!("[1"), ["messages is a text", "not JSON"]),
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
                ["messages[0]", "\"image\""],
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

    #[test]
    fn tools_in_a_text_are_the_list() {
        let turns = [said("user", "a"), said("assistant", "b")];
        let list = json!([{"name": "f", "parameters": {"x": 1}}]);
        let of = |tools: Value| from(json!({"messages": turns, "tools": tools})).map(|it| it.tools);
        assert_eq!(of(list.clone()).unwrap(), Some(list.clone()));
        assert_eq!(of(list.to_string().into()).unwrap(), Some(list.clone()));
        let texts = json!([list[0].to_string()]);
        assert_eq!(of(texts).unwrap(), Some(list));
        for nothing in [json!(null), json!(""), json!([]), json!("[]")] {
            assert_eq!(of(nothing).unwrap(), None);
        }
        for (wrong, part) in [
            (json!("[1"), "not JSON"),
            (json!({}), "a list"),
            (json!([3]), "a number"),
        ] {
            let error = of(wrong).unwrap_err();
            assert!(error.contains("tools") && error.contains(part), "{error}");
        }
        let split =
            json!({"prompt": turns[..1], "completion": turns[1..], "tools": "[{\"name\": \"f\"}]"});
        assert_eq!(from(split).unwrap().tools, Some(json!([{"name": "f"}])));
    }

    #[test]
    fn null_keys_are_absent() {
        let row = json!({"messages": [
            {"role": "user", "content": "q", "tool_calls": null, "name": null},
            {"role": "assistant", "content": null, "tool_calls": [{"name": "f", "x": null}], "name": null},
        ]});
        let call = json!({"role": "assistant", "tool_calls": [{"name": "f", "x": null}]});
        assert_eq!(from(row).unwrap().messages, [said("user", "q"), call]);
    }

    #[test]
    fn a_system_column_is_the_first_message() {
        let turns = [said("user", "a"), said("assistant", "b")];
        let conversation = from(json!({"system": "s", "messages": turns})).unwrap();
        assert_eq!(conversation.messages[0], said("system", "s"));
        assert_eq!(conversation.assistant_turns().collect::<Vec<_>>(), [2]);
        let split = json!({"system": "s", "prompt": turns[..1], "completion": turns[1..]});
        let split = from(split).unwrap();
        assert_eq!((split.messages.len(), split.learn_from), (3, 2));
        let twice = json!({"system": "s", "messages": [said("system", "t"), turns[0], turns[1]]});
        assert!(from(twice).unwrap_err().contains("system"));
        for nothing in [json!(null), json!("")] {
            let row = json!({"system": nothing, "messages": turns});
            assert_eq!(from(row).unwrap().messages.len(), 2);
        }
    }

    #[test]
    fn a_turn_that_is_marked_as_given_is_not_learned_and_its_mark_is_no_key_of_it() {
        for (key, given, learned) in [
            ("weight", json!(0), json!(1)),
            ("train", json!(false), json!(true)),
            ("training", json!(false), json!(true)),
            ("loss_mask", json!(0), json!(1)),
        ] {
            let row = json!({"conversations": [
                {"from": "human", "value": "a"}, {"from": "gpt", "value": "wrong", key: given},
                {"from": "human", "value": "b"}, {"from": "gpt", "value": "right", key: learned}]});
            let conversation = from(row).unwrap();
            assert_eq!(
                conversation.assistant_turns().collect::<Vec<_>>(),
                [3],
                "{key}"
            );
            assert_eq!(conversation.messages[1], said("assistant", "wrong"));
        }
        let marked = |role: &str, key: &str, value: Value| {
            let mut turns = vec![said("user", "a"), said("assistant", "b")];
            turns[usize::from(role == "assistant")][key] = value;
            from(json!({"messages": turns})).unwrap_err()
        };
        assert!(marked("assistant", "weight", json!(0)).contains("no turn"));
        assert!(marked("assistant", "weight", json!(0.5)).contains("0.5"));
        assert!(marked("user", "train", json!(true)).contains("the assistant's messages only"));
        assert!(marked("assistant", "function_call", json!({"name": "f"})).contains("tool_calls"));
    }

    #[test]
    fn text_parts_are_a_text() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]);
        let row = json!({"messages": [{"role": "user", "content": parts}, said("assistant", "c")]});
        assert_eq!(from(row).unwrap().messages[0], said("user", "a b"));
    }

    #[test]
    fn other_keys_of_sharegpt_messages_stay() {
        let row = json!({"conversations": [
            {"from": "human", "value": "q", "name": "ann"}, {"from": "gpt", "value": "a"}]});
        assert_eq!(from(row).unwrap().messages[0]["name"], "ann");
    }
}
