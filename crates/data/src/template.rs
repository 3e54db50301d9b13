//! Prompt templates: from the context of a row to the prompt, and the model's chat template for whole conversations.

use std::borrow::Cow;
use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;

use llama_burn::limited::clipped;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::merge_maps;
use minijinja::{Environment, Error, ErrorKind, Value, context};

use super::conversation::Conversation;
use super::error::DataError;
use super::model_files::ModelFiles;
use super::{dates, integers, percent, python, string_methods};
use crate::contained::contain;
use crate::{InstructTemplate, PromptTemplate};

/// The placeholder of a custom template.
const PLACEHOLDER: &str = "{context}";
const NAME: &str = "chat";
/// The maximum number of instructions that a template executes per prompt; templates of models in use execute some
/// thousands per message.
const MOST_STEPS: u64 = 1_000_000;
/// Bytes of the longest prompt that a template may write.
const LONGEST_PROMPT: usize = 64 << 20;

/// A compiled prompt template.
#[derive(Debug)]
pub(super) enum Prompt {
    Raw,
    Inst,
    Custom(String),
    Instruct(InstructTemplate),
    Chat(Box<ChatTemplate>),
}

impl Prompt {
    pub(super) fn new(template: &PromptTemplate, files: &ModelFiles) -> Result<Self, DataError> {
        Ok(match template {
            PromptTemplate::Raw => Self::Raw,
            PromptTemplate::Inst => Self::Inst,
            PromptTemplate::Custom(text) => Self::Custom(text.clone()),
            PromptTemplate::Instruct(template) => Self::Instruct(template.clone()),
            PromptTemplate::Chat => Self::Chat(Box::new(ChatTemplate::new(files)?)),
        })
    }

    pub(super) fn render<'a>(&self, context: &'a str) -> Result<Cow<'a, str>, DataError> {
        Ok(match self {
            Self::Raw => context.into(),
            Self::Inst => format!("[INST] {context} [/INST]").into(),
            Self::Custom(text) => text.replace(PLACEHOLDER, context).into(),
            Self::Instruct(template) => template.render(None, context, None).into(),
            Self::Chat(template) => {
                let message = serde_json::json!({"role": "user", "content": context});
                let rendered = template.render(&[message], &Conversation::default(), true)?;
                rendered.text.into()
            }
        })
    }

    /// Whether the template writes the special tokens itself; the tokenizer must then add none.
    pub(super) fn has_its_own_special_tokens(&self) -> bool {
        matches!(self, Self::Chat(_))
    }
}

/// The chat template of a model, rendered as by transformers' `apply_chat_template`.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(&'static str, String)>,
    marks: bool,
    path: PathBuf,
}

/// The output of a template.
#[derive(Debug, Default)]
pub(super) struct Rendered {
    /// The text.
    pub text: String,
    /// The byte ranges of the text between the marks of the template.
    pub marked: Vec<Range<usize>>,
}

impl ChatTemplate {
    pub(super) fn new(files: &ModelFiles) -> Result<Self, DataError> {
        let (text, path) = files.chat_template()?;
        // Jinja converts every line end to a line feed.
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let (text, marks) = with_marks(&percent::as_filters(&text));
        let mut special_tokens = Vec::new();
        for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            if let Some(token) = files.special_token(key)? {
                special_tokens.push((key, token));
            }
        }
        let failure = |error: Error| DataError::ChatTemplate {
            path: path.clone(),
            message: chain(&error),
        };
        // The engine treats these as undefined variables.
        let of_macros = ["varargs", "kwargs"];
        if let Some(name) = of_macros.iter().find(|name| has_word(&text, name)) {
            let message = format!("{name} in macros is not supported; write the arguments out");
            return Err(DataError::ChatTemplate { path, message });
        }
        let mut environment = Environment::new();
        // transformers' settings.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(failure)?);
        // A template is a program of unknown origin, so its steps and its output are limited.
        environment.set_fuel(Some(MOST_STEPS));
        python::set_up(&mut environment);
        string_methods::set_up(&mut environment);
        environment.add_function("raise_exception", |message: String| {
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        // One date for the whole run: rows of one run must not differ after midnight.
        let now = files.time.unwrap_or_else(dates::clock);
        environment.add_function("strftime_now", move |format: String| {
            dates::strftime(&format, now)
        });
        environment
            .add_template_owned(NAME, text)
            .map_err(failure)?;
        Ok(Self {
            environment,
            special_tokens,
            marks,
            path,
        })
    }

    /// Whether the template marks the assistant's text (`{% generation %}`).
    pub(super) fn marks(&self) -> bool {
        self.marks
    }

    /// Whether the template contains a name as a whole word.
    pub(super) fn mentions(&self, name: &str) -> bool {
        let template = self.environment.get_template(NAME);
        template.is_ok_and(|template| has_word(template.source(), name))
    }

    /// Renders these messages of a conversation; with `add_generation_prompt` the text ends where the assistant's answer
    /// begins.
    pub(super) fn render(
        &self,
        messages: &[serde_json::Value],
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<Rendered, DataError> {
        let variables = conversation.variables.iter();
        let variables =
            Value::from_pairs(variables.map(|(name, value)| (name.as_str(), in_order(value))));
        let special_tokens = self.special_tokens.iter();
        let special_tokens =
            Value::from_pairs(special_tokens.map(|(key, token)| (*key, token.as_str())));
        // transformers always defines `tools` and `documents`; templates test `is none`.
        let variables = context! {
            messages => messages.iter().map(aliased).collect::<Vec<_>>(), add_generation_prompt,
            tools => conversation.tools.as_ref().map(in_order), documents => (), ..merge_maps([variables, special_tokens])
        };
        let mut text = Bounded(Vec::new());
        let rendered = contain(|| {
            let template = self.environment.get_template(NAME)?;
            template.render_captured_to(variables, &mut text).map(drop)
        });
        let problem = match rendered {
            Ok(Ok(())) => match String::from_utf8(text.0) {
                Ok(text) => return Ok(Rendered::new(text)),
                Err(error) => error.to_string(),
            },
            Ok(Err(error)) => chain(&error),
            Err(panic) => panic,
        };
        Err(DataError::ChatTemplate {
            path: self.path.clone(),
            message: clipped(&problem, 1000).into_owned(),
        })
    }
}

/// The output of a template, up to [`LONGEST_PROMPT`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > LONGEST_PROMPT {
            let message = format!("the template writes more than {LONGEST_PROMPT} bytes");
            return Err(io::Error::other(message));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// JSON as a value of the engine. Objects keep the order of their keys, which shows where a template writes them.
pub(super) fn in_order(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Array(items) => items.iter().map(in_order).collect::<Vec<_>>().into(),
        value if integers::digits(value).is_some() => {
            integers::for_template(integers::digits(value).unwrap_or_default())
        }
        serde_json::Value::Object(object) => {
            let entries = object.iter();
            Value::from_pairs(entries.map(|(name, value)| (name.as_str(), in_order(value))))
        }
        serde_json::Value::Null => ().into(),
        serde_json::Value::Bool(value) => (*value).into(),
        serde_json::Value::String(text) => text.as_str().into(),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => whole.into(),
            (None, Some(whole)) => whole.into(),
            (None, None) => number.as_f64().unwrap_or(f64::NAN).into(),
        },
    }
}

/// The beginning and the end of a mark in the output of a template: characters for private use, which are removed
/// afterwards.
const MARKS: [char; 2] = ['\u{10fae0}', '\u{10fae1}'];

impl Rendered {
    /// Removes the marks from a text.
    fn new(marked_text: String) -> Self {
        if !marked_text.contains(MARKS) {
            return Self {
                text: marked_text,
                marked: Vec::new(),
            };
        }
        let mut rendered = Self::default();
        let mut start = None;
        for character in marked_text.chars() {
            let here = rendered.text.len();
            match character {
                _ if character == MARKS[0] => start = Some(here),
                _ if character == MARKS[1] => {
                    rendered
                        .marked
                        .extend(start.take().map(|start| start..here));
                }
                character => rendered.text.push(character),
            }
        }
        rendered.marked.retain(|mark| !mark.is_empty());
        rendered
    }
}

/// A message as transformers passes it to a template: with the reasoning under each name that templates use.
fn aliased(message: &serde_json::Value) -> Value {
    const NAMES: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let Some(object) = message.as_object() else {
        return in_order(message);
    };
    let Some(reasoning) = NAMES.iter().find_map(|name| object.get(*name)) else {
        return in_order(message);
    };
    let mut object = object.clone();
    let thinking = object.shift_remove("thinking");
    let thinking = thinking.unwrap_or_else(|| reasoning.clone());
    object.shift_insert(0, "thinking".into(), thinking);
    object.insert("reasoning_content".into(), reasoning.clone());
    in_order(&serde_json::Value::Object(object))
}

/// Replaces `{% generation %}`, transformers' mark around the assistant's text, by true conditions, which treat the white
/// space around them in the same way, with marks between them. Also returns whether there are any.
fn with_marks(text: &str) -> (String, bool) {
    let mut result = String::with_capacity(text.len());
    let mut marks = false;
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        // Search behind the opening: `{%}` is not a tag.
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let (inside, behind) = (&tag[2..end], &tag[end + 2..]);
        let is_control = |c: char| c.is_whitespace() || "+-".contains(c);
        let left = &inside[..inside.len() - inside.trim_start_matches(is_control).len()];
        let right = &inside[inside.trim_end_matches(is_control).len()..];
        match inside.trim_matches(is_control) {
            "generation" => {
                marks = true;
                let mark = MARKS[0];
                result += &format!("{{%{left}if true %}}{mark}{{% if true{right}%}}");
            }
            "endgeneration" => {
                let mark = MARKS[1];
                result += &format!("{{%{left}endif %}}{mark}{{% endif{right}%}}");
            }
            _ => result.push_str(&tag[..end + 2]),
        }
        rest = behind;
    }
    (result + rest, marks)
}

/// Whether a text contains a whole word.
fn has_word(text: &str, word: &str) -> bool {
    let is_of_word = |c: char| c.is_alphanumeric() || c == '_';
    text.split(|c: char| !is_of_word(c))
        .any(|found| found == word)
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(template: &str) -> Result<Prompt, DataError> {
        let files = ModelFiles {
            folder: "model".into(),
            tokenizer_config: Some(r#"{"bos_token": "<s>", "eos_token": "</s>"}"#.into()),
            chat_template: Some(template.into()),
            ..ModelFiles::default()
        };
        Prompt::new(&PromptTemplate::Chat, &files)
    }

    fn render(template: &str, context: &str) -> String {
        chat(template)
            .unwrap()
            .render(context)
            .unwrap()
            .into_owned()
    }

    #[test]
    fn the_plain_templates_put_the_context_in_its_place() {
        let files = ModelFiles::default();
        let render = |template| {
            let prompt = Prompt::new(&template, &files).unwrap();
            assert!(!prompt.has_its_own_special_tokens());
            prompt.render("How {context}?").unwrap().into_owned()
        };
        assert_eq!(render(PromptTemplate::Raw), "How {context}?");
        assert_eq!(
            render(PromptTemplate::Inst),
            "[INST] How {context}? [/INST]"
        );
        assert_eq!(
            render(PromptTemplate::Custom("Q: {context}\nA:".into())),
            "Q: How {context}?\nA:"
        );
    }

    #[test]
    fn a_chat_template_gets_the_message_the_special_tokens_and_python() {
        let template = "{{ bos_token }}{% for m in messages %}\n    {% if m['role'] == 'user' %}\n\
            <{{ m['role'].upper() }}>{{ m.content.strip() }}{{ eos_token }}\n    {% endif %}\n{% endfor %}\n\
            {% if tools is none and add_generation_prompt %}<A>{% endif %}";
        assert_eq!(render(template, " <b>&'\" "), "<s><USER><b>&'\"</s>\n<A>");
        assert!(chat(template).unwrap().has_its_own_special_tokens());
    }

    #[test]
    fn a_chat_template_may_break_loops_and_split_texts() {
        let template = "{% set ns = namespace(n=0) %}{% for word in messages[0]['content'].split(',') %}\
            {% if loop.index > 2 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{{ word }}{% endfor %}{{ ns.n }}";
        assert_eq!(render(template, "a,b,c"), "ab2");
    }

    #[test]
    fn a_template_that_refuses_or_is_broken_says_so() {
        let refuses = chat("{{ raise_exception('only system messages') }}").unwrap();
        let error = refuses.render("x").unwrap_err().to_string();
        assert!(
            error.contains("chat_template.jinja") && error.contains("only system messages"),
            "{error}"
        );
        let error = chat("{% if %}").unwrap_err().to_string();
        assert!(error.contains("chat_template.jinja"), "{error}");
    }

    #[test]
    fn generation_tags_mark_and_change_nothing() {
        let with = "{%- for m in messages -%}\n<{{ m.role }}>\n{% generation %}\n{{ m.content }}|\n{%- endgeneration -%}\n\n{% endfor %}";
        let without = with
            .replace("{% generation %}", "{% if true %}")
            .replace("{%- endgeneration", "{%- endif");
        assert_eq!(render(with, "a"), render(&without, "a"));
        assert_eq!(render(with, "a"), "<user>\na|");
        assert_eq!(with_marks("a {% b"), ("a {% b".into(), false));
        let template = chat(with).unwrap();
        let Prompt::Chat(template) = template else {
            panic!()
        };
        let message = serde_json::json!({"role": "user", "content": "a"});
        let rendered = template.render(&[message], &Conversation::default(), true);
        let rendered = rendered.unwrap();
        assert!(template.marks());
        assert_eq!(&rendered.text[rendered.marked[0].clone()], "a|");
        assert_eq!(rendered.marked.len(), 1);
    }

    #[test]
    fn json_in_a_template_is_pythons() {
        // Python: json.dumps({"role": "user", "content": "<é'"}, ensure_ascii=False)
        let line = r#"{"role": "user", "content": "<é'"}"#;
        assert_eq!(render("{{ messages[0] | tojson }}", "<é'"), line);
        let several = "{\n  \"role\": \"user\",\n  \"content\": \"a\"\n}";
        assert_eq!(render("{{ messages[0] | tojson(indent=2) }}", "a"), several);
        assert_eq!(
            render("{{ [1, [2, none]] | tojson }}", ""),
            "[1, [2, null]]"
        );
    }

    #[test]
    fn line_ends_of_windows_are_line_feeds() {
        let template = "{% for m in messages %}\n{{ m.role }}\n{% endfor %}\nend";
        assert_eq!(
            render(&template.replace('\n', "\r\n"), "a"),
            render(template, "a")
        );
    }

    #[test]
    fn reasoning_has_each_of_its_names_and_further_variables_are_the_templates() {
        let template = "{{ messages[0] | tojson }}{{ enable_thinking }}{{ bos_token }}";
        let Prompt::Chat(template) = chat(template).unwrap() else {
            panic!()
        };
        let conversation = Conversation {
            variables: serde_json::json!({"enable_thinking": false})
                .as_object()
                .unwrap()
                .clone(),
            ..Conversation::default()
        };
        let message = serde_json::json!({"role": "assistant", "content": "a", "reasoning": "r"});
        let rendered = template.render(&[message], &conversation, false).unwrap();
        // transformers 5.24: {"thinking": r, **message, "reasoning_content": r}
        let expected = "{\"thinking\": \"r\", \"role\": \"assistant\", \"content\": \"a\", \"reasoning\": \"r\", \
            \"reasoning_content\": \"r\"}False<s>";
        assert_eq!(rendered.text, expected);
    }

    #[test]
    fn a_template_may_write_the_date() {
        assert_eq!(render("{{ strftime_now('%Y') | length }}", ""), "4");
    }
}
