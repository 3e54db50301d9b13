//! The config key `prompt_template`: how a context becomes a prompt.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a row's context becomes the prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PromptTemplate {
    /// The context unchanged (FinLoRA's contexts hold the whole instruction).
    #[default]
    Raw,
    /// `[INST] context [/INST]`.
    Inst,
    /// The model's own chat template, the context as the user's message.
    Chat,
    /// A text in which `{context}` is replaced.
    Custom(String),
    /// One text for an instruction with an input and one for an instruction alone.
    Instruct(InstructTemplate),
}

/// Texts in which `{instruction}`, `{input}` and `{system}` are replaced, as in a custom format of axolotl's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstructTemplate {
    /// For an instruction with an input, which is not empty.
    pub format: String,
    /// For an instruction alone.
    pub no_input_format: String,
    /// The text before them for rows with a system prompt.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub system_format: String,
    /// The system prompt of rows without a column `system`; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub system_prompt: String,
}

impl InstructTemplate {
    /// Whether the template supports a system prompt.
    pub(crate) fn has_system(&self) -> bool {
        !self.system_format.is_empty()
    }

    /// The prompt. `system` is the row's column, `None` without one; an empty one replaces the template's own.
    pub fn render(&self, system: Option<&str>, instruction: &str, input: Option<&str>) -> String {
        let system = system.unwrap_or(&self.system_prompt);
        let mut text = String::new();
        if !system.is_empty() {
            fill(&self.system_format, &[("{system}", system)], &mut text);
        }
        let instruction = ("{instruction}", instruction);
        match input.filter(|input| !input.is_empty()) {
            Some(input) => fill(&self.format, &[instruction, ("{input}", input)], &mut text),
            None => fill(&self.no_input_format, &[instruction], &mut text),
        }
        text
    }

    /// What is wrong with the texts, if anything is.
    fn problem(&self) -> Option<&'static str> {
        if !self.format.contains("{instruction}") && !self.format.contains("{input}") {
            return Some("\"format\" must contain {instruction}, {input}, or both");
        }
        if !self.no_input_format.contains("{instruction}") {
            return Some("\"no_input_format\" must contain {instruction}");
        }
        if self.no_input_format.contains("{input}") {
            return Some("\"no_input_format\" is for examples without an input and has no {input}");
        }
        if self.has_system() && !self.system_format.contains("{system}") {
            return Some("\"system_format\" must contain {system}");
        }
        (!self.has_system() && !self.system_prompt.is_empty())
            .then_some("\"system_prompt\" needs a \"system_format\" that contains {system}")
    }
}

/// Appends `format` with its placeholders replaced. Placeholders in the values are not replaced.
fn fill(format: &str, values: &[(&str, &str)], text: &mut String) {
    let mut rest = format;
    let first = |rest: &str| {
        let found = values.iter();
        let found = found.filter_map(|(name, value)| Some((rest.find(name)?, *name, *value)));
        found
            .min_by_key(|(at, ..)| *at)
            .map(|(at, name, value)| (at, name.len(), value.to_string()))
    };
    while let Some((at, length, value)) = first(rest) {
        *text += &rest[..at];
        *text += &value;
        rest = &rest[at + length..];
    }
    *text += rest;
}

/// The placeholder of a custom template, which the context replaces.
pub const PLACEHOLDER: &str = "{context}";

/// The beginning of an instruct template in a config file.
const INSTRUCT: &str = "instruct:";

impl PromptTemplate {
    /// The templates that [`parse`](Self::parse) reads, in words.
    pub const ALLOWED: &str = "\"raw\", \"inst\", \"chat\", \"custom:\" followed by a text that contains {context}, \
        or \"instruct:\" followed by texts for an instruction with and without an input";

    /// Reads `raw`, `inst`, `chat`, `custom:` with a text around `{context}`, or `instruct:` with an
    /// [`InstructTemplate`] in JSON.
    ///
    /// # Errors
    ///
    /// A message that states what is right.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "inst" => Ok(Self::Inst),
            "chat" => Ok(Self::Chat),
            _ if text.starts_with(INSTRUCT) => {
                let template: InstructTemplate = serde_json::from_str(&text[INSTRUCT.len()..])
                    .map_err(|error| {
                        format!(
                            "must have a JSON object behind \"instruct:\", as in \
                             instruct:{{\"format\": \"{{instruction}}\\n{{input}}\\n\", \
                             \"no_input_format\": \"{{instruction}}\\n\"}}; it is not valid: {error}"
                        )
                    })?;
                match template.problem() {
                    Some(problem) => Err(problem.into()),
                    None => Ok(Self::Instruct(template)),
                }
            }
            _ => match text.strip_prefix("custom:") {
                Some(template) if template.contains(PLACEHOLDER) => {
                    Ok(Self::Custom(template.into()))
                }
                Some(_) => Err(format!("a custom template must contain {PLACEHOLDER}")),
                None => Err(format!("must be {}", Self::ALLOWED)),
            },
        }
    }
}

/// Parses the value of the command line, which is that of a config file.
impl std::str::FromStr for PromptTemplate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text)
    }
}

/// The value in a config file.
impl fmt::Display for PromptTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("raw"),
            Self::Inst => f.write_str("inst"),
            Self::Chat => f.write_str("chat"),
            Self::Custom(template) => write!(f, "custom:{template}"),
            Self::Instruct(template) => {
                let json = serde_json::to_string(template).map_err(|_| fmt::Error)?;
                write!(f, "{INSTRUCT}{json}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_is_read_as_it_is_shown() {
        for text in [
            "raw",
            "inst",
            "chat",
            "custom:Q: {context}\nA:",
            r#"instruct:{"format":"{instruction}\n{input}: ","no_input_format":"\"{instruction}\""}"#,
            r#"instruct:{"format":"{input}","no_input_format":"{instruction}","system_format":"{system} ","system_prompt":"s"}"#,
        ] {
            assert_eq!(PromptTemplate::parse(text).unwrap().to_string(), text);
        }
        assert!(
            PromptTemplate::parse("custom:no place")
                .unwrap_err()
                .contains("{context}")
        );
        assert!(
            PromptTemplate::parse("alpaca")
                .unwrap_err()
                .contains("\"inst\"")
        );
    }

    #[test]
    fn an_instruct_template_has_a_text_for_each_kind_of_row() {
        let text = r#"instruct:{"format":"{instruction}|{input}|{instruction}>","no_input_format":"<{instruction}>",
            "system_format":"[{system}]","system_prompt":"own"}"#;
        let Ok(PromptTemplate::Instruct(template)) = PromptTemplate::parse(text) else {
            panic!()
        };
        // A value that looks like a placeholder is a value.
        assert_eq!(
            template.render(Some(""), "{input}", Some("x{instruction}")),
            "{input}|x{instruction}|{input}>"
        );
        assert_eq!(template.render(None, "a", None), "[own]<a>");
        assert_eq!(template.render(Some("s"), "a", Some("")), "[s]<a>");
        for (wrong, part) in [
            (
                r#"{"format":"x","no_input_format":"{instruction}"}"#,
                "\"format\" must contain",
            ),
            (
                r#"{"format":"{input}","no_input_format":"{input}{instruction}"}"#,
                "without an input",
            ),
            (
                r#"{"format":"{input}","no_input_format":""}"#,
                "\"no_input_format\" must",
            ),
            (r#"{"format":"{input}"}"#, "no_input_format"),
            (
                r#"{"format":"{input}","no_input_format":"{instruction}","x":1}"#,
                "`x`",
            ),
            (
                r#"{"format":"{input}","no_input_format":"{instruction}","system_prompt":"s"}"#,
                "\"system_format\"",
            ),
        ] {
            let error = PromptTemplate::parse(&format!("instruct:{wrong}")).unwrap_err();
            assert!(error.contains(part), "{wrong}: {error}");
        }
    }
}
