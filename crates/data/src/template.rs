//! From a row's context to the prompt: as it is, in brackets, in a text, or through the model's chat template.
//! And the chat template itself, for whole conversations too.

use std::borrow::Cow;
use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use llama_burn::limited::clipped;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Object, merge_maps};
use minijinja::{Environment, Error, ErrorKind, Value, context};

use super::conversation::Conversation;
use super::error::DataError;
use super::model_files::ModelFiles;
use super::{integers, percent, python, string_methods};
use crate::contained::contain;
use crate::{InstructTemplate, PromptTemplate};

/// What a custom template replaces by the context.
const PLACEHOLDER: &str = "{context}";
const NAME: &str = "chat";
/// Instructions of a template that are carried out for a prompt; those of models in use take some thousands a
/// message.
const MOST_STEPS: u64 = 1_000_000;
/// Bytes of the longest prompt that a template may write.
const LONGEST_PROMPT: usize = 64 << 20;

/// A prompt template that is ready to use.
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

    /// Whether the template itself writes the special tokens, so that the tokenizer must not.
    pub(super) fn has_its_own_special_tokens(&self) -> bool {
        matches!(self, Self::Chat(_))
    }
}

/// A model's chat template, as transformers' `apply_chat_template` renders it.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(&'static str, String)>,
    marks: bool,
    path: PathBuf,
}

/// What a template wrote.
#[derive(Debug, Default)]
pub(super) struct Rendered {
    /// The text.
    pub text: String,
    /// What lies between the template's marks, in bytes of the text.
    pub marked: Vec<Range<usize>>,
}

impl ChatTemplate {
    pub(super) fn new(files: &ModelFiles) -> Result<Self, DataError> {
        let (text, path) = files.chat_template()?;
        // Jinja reads every line end as a line feed.
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
        // The engine takes these for variables that are not set.
        let of_macros = ["varargs", "kwargs"];
        if let Some(name) = of_macros.iter().find(|name| has_word(&text, name)) {
            let message = format!("{name} in macros is not supported; write the arguments out");
            return Err(DataError::ChatTemplate { path, message });
        }
        let mut environment = Environment::new();
        // The settings that transformers renders with; a template is written for them.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(failure)?);
        // A template is a program from whoever made the model: it ends, and what it writes does.
        environment.set_fuel(Some(MOST_STEPS));
        python::set_up(&mut environment);
        string_methods::set_up(&mut environment);
        environment.add_function("raise_exception", |message: String| {
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        // One date for the whole run: rows of one run must not differ because midnight passed.
        let now = files.time.unwrap_or_else(clock);
        environment.add_function("strftime_now", move |format: String| strftime(&format, now));
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

    /// Whether the template marks what the assistant says (`{% generation %}`).
    pub(super) fn marks(&self) -> bool {
        self.marks
    }

    /// Whether the template's text holds a name, as a word of its own.
    pub(super) fn mentions(&self, name: &str) -> bool {
        let template = self.environment.get_template(NAME);
        template.is_ok_and(|template| has_word(template.source(), name))
    }

    /// The template with these messages of a conversation; with `add_generation_prompt` up to where the assistant's
    /// answer begins.
    pub(super) fn render(
        &self,
        messages: &[serde_json::Value],
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<Rendered, DataError> {
        let variables: Value = conversation
            .variables
            .iter()
            .map(|(name, value)| (name.clone(), in_order(value)))
            .collect::<std::collections::BTreeMap<String, Value>>()
            .into();
        let special_tokens: Value = self
            .special_tokens
            .iter()
            .map(|(key, token)| (key.to_string(), Value::from(token)))
            .collect::<std::collections::BTreeMap<String, Value>>()
            .into();
        // transformers defines `tools` and `documents` even where there are none; templates ask `is none`.
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

/// What a template writes, up to [`LONGEST_PROMPT`].
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

/// A JSON object whose keys keep their order, which shows where a template writes it out. (minijinja's own map
/// would need a feature that other crates in the tree then pay for.)
#[derive(Debug)]
struct Ordered(Vec<(String, Value)>);

impl Object for Ordered {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        let found = self.0.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let keys = self.0.iter().map(|(name, _)| Value::from(name.as_str()));
        Enumerator::Values(keys.collect())
    }
}

pub(super) fn in_order(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Array(items) => items.iter().map(in_order).collect::<Vec<_>>().into(),
        value if integers::digits(value).is_some() => {
            integers::for_template(integers::digits(value).unwrap_or_default())
        }
        serde_json::Value::Object(object) => {
            let entries = object.iter();
            let entries = entries.map(|(name, value)| (name.clone(), in_order(value)));
            Value::from_object(Ordered(entries.collect()))
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

/// Where a template's mark begins and ends, in the text that it writes: characters for private use, which are taken out
/// again.
const MARKS: [char; 2] = ['\u{10fae0}', '\u{10fae1}'];

impl Rendered {
    /// Takes the marks out.
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

/// A message as transformers hands it to a template: reasoning under each of the names that templates know.
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

/// `{% generation %}` is transformers' mark around what the assistant says. Conditions that hold take the tags' places,
/// so that white space around them is treated alike, and write marks between them. Whether there are any.
fn with_marks(text: &str) -> (String, bool) {
    let mut result = String::with_capacity(text.len());
    let mut marks = false;
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        // Behind the opening: `{%}` is no tag.
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

/// Whether a text has a word.
fn has_word(text: &str, word: &str) -> bool {
    let is_of_word = |c: char| c.is_alphanumeric() || c == '_';
    text.split(|c: char| !is_of_word(c))
        .any(|found| found == word)
}

/// Seconds since 1970.
pub(super) fn clock() -> u64 {
    let past = SystemTime::now().duration_since(UNIX_EPOCH);
    past.map_or(0, |past| past.as_secs())
}

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// Python's `strftime` for the directives that chat templates use, in UTC (transformers takes local time).
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        match characters.next() {
            Some('Y') => text += &format!("{year:04}"),
            Some('y') => text += &format!("{:02}", year % 100),
            Some('m') => text += &format!("{month:02}"),
            Some('d') => text += &format!("{day:02}"),
            Some('B') => text += month_name,
            Some('b') => text += &month_name[..3],
            Some('A') => text += day_name,
            Some('a') => text += &day_name[..3],
            Some('H') => text += &format!("{:02}", second / 3600),
            Some('M') => text += &format!("{:02}", second / 60 % 60),
            Some('S') => text += &format!("{:02}", second % 60),
            Some('%') => text.push('%'),
            other => {
                let name = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now does not know %{name}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(text)
}

/// The date `days` after 1 January 1970, as (year, month, day).
fn date(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
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
    fn dates_are_pythons() {
        let all = |seconds| strftime("%Y %y %m %d %B %b %A %a %H:%M:%S %%", seconds).unwrap();
        assert_eq!(all(0), "1970 70 01 01 January Jan Thursday Thu 00:00:00 %");
        assert_eq!(
            all(1_709_251_199),
            "2024 24 02 29 February Feb Thursday Thu 23:59:59 %"
        );
        assert_eq!(
            all(4_107_542_400),
            "2100 00 03 01 March Mar Monday Mon 00:00:00 %"
        );
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q"));
        assert_eq!(render("{{ strftime_now('%Y') | length }}", ""), "4");
    }
}
