//! The keys whose values are words.

use std::fmt;

use lora_core::Init;
use serde::{Deserialize, Serialize};

use crate::schedule::Decay;

/// The number format that the layers compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeDtype {
    /// What suits the device: bf16 on CUDA, f16 on Vulkan and Metal where there are matrix units for it, else f32.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with the range of f32 (CUDA; the CPU's products with 8-bit weights where it has AVX512-BF16).
    Bf16,
    /// 16 bits (GPUs that have it), with a loss scale.
    F16,
    /// f32 whose products keep 11 bits of each factor (CUDA, Ampere and later).
    Tf32,
}

/// Whether a layer's activations are kept for the backward pass or computed again there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checkpointing {
    /// Recompute: about a third more time, and the memory of one layer instead of all.
    On,
    /// Keep everything.
    Off,
    /// Recompute where keeping would not fit.
    #[default]
    Auto,
}

/// What happens when a loss or gradient is not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnNonFinite {
    /// The run stops, with a checkpoint of the step before.
    #[default]
    Stop,
    /// The step is left out and the learning rate halved from there on, up to `max_skipped_steps` times.
    Skip,
}

/// What happens when the device's memory is too small for a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnOutOfMemory {
    /// Micro-batches are halved and more of them accumulated: the same update, up to rounding.
    #[default]
    Halve,
    /// The run stops, with a checkpoint of the step before.
    Stop,
}

/// How many rows are computed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchSize {
    /// So many.
    Rows(usize),
    /// As many as memory allows of the rows of an update, which are 8 · `gradient_accumulation_steps`.
    /// The update is the same however they are divided.
    Auto,
}

impl BatchSize {
    /// The rows of a micro-batch; for [`Auto`](Self::Auto), what an update's rows are counted in.
    pub fn rows(self) -> usize {
        match self {
            Self::Rows(rows) => rows,
            Self::Auto => 8,
        }
    }
}

/// How a row's context becomes the prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PromptTemplate {
    /// The context as it is (FinLoRA's contexts hold the whole instruction).
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
    /// What stands before them where there is a system prompt.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub system_format: String,
    /// The system prompt of rows that have no column for one; empty for none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub system_prompt: String,
}

impl InstructTemplate {
    /// Whether there is a place for a system prompt.
    pub(crate) fn has_system(&self) -> bool {
        !self.system_format.is_empty()
    }

    /// The prompt. `system` is the row's column, `None` without one; an empty one replaces the template's own.
    pub(crate) fn render(
        &self,
        system: Option<&str>,
        instruction: &str,
        input: Option<&str>,
    ) -> String {
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
            return Some("\"no_input_format\" is for rows without an input and has no {input}");
        }
        if self.has_system() && !self.system_format.contains("{system}") {
            return Some("\"system_format\" must contain {system}");
        }
        (!self.has_system() && !self.system_prompt.is_empty())
            .then_some("\"system_prompt\" needs a \"system_format\" that contains {system}")
    }
}

/// Appends `format` with its placeholders replaced. What is put in is not looked at again.
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

/// What a custom template replaces by the row's context.
pub(crate) const PLACEHOLDER: &str = "{context}";

/// What an instruct template begins with in a config file.
const INSTRUCT: &str = "instruct:";

impl PromptTemplate {
    /// Reads `raw`, `inst`, `chat`, `custom:` with a text around `{context}`, or `instruct:` with an
    /// [`InstructTemplate`] in JSON; the error says what would be right.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
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
                             \"no_input_format\": \"{{instruction}}\\n\"}}; it is none: {error}"
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
                None => Err(format!(
                    "must be \"raw\", \"inst\", \"chat\", \"custom:\" followed by a text that \
                     contains {PLACEHOLDER}, or \"instruct:\" followed by texts for an instruction with and without \
                     an input"
                )),
            },
        }
    }
}

/// As in a config file, for the command line.
impl std::str::FromStr for PromptTemplate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text)
    }
}

/// As in a config file.
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

/// A type whose values are one word each in a config file.
pub(super) trait Word: Copy + PartialEq + 'static {
    /// Each value with its word.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> &'static str {
        let found = Self::WORDS.iter().find(|(_, value)| *value == self);
        found.map_or("", |(word, _)| word)
    }
}

impl Word for ComputeDtype {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("f32", Self::F32),
        ("bf16", Self::Bf16),
        ("f16", Self::F16),
        ("tf32", Self::Tf32),
    ];
}

impl Word for Checkpointing {
    const WORDS: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("on", Self::On), ("off", Self::Off)];
}

impl Word for OnNonFinite {
    const WORDS: &'static [(&'static str, Self)] = &[("stop", Self::Stop), ("skip", Self::Skip)];
}

impl Word for OnOutOfMemory {
    const WORDS: &'static [(&'static str, Self)] = &[("halve", Self::Halve), ("stop", Self::Stop)];
}

impl Word for Decay {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("cosine", Self::Cosine),
        ("linear", Self::Linear),
        ("constant", Self::Constant),
    ];
}

impl Word for Init {
    const WORDS: &'static [(&'static str, Self)] =
        &[("kaiming", Self::Kaiming), ("gaussian", Self::Gaussian)];
}

/// As in a config file.
impl fmt::Display for ComputeDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// As in a config file.
impl fmt::Display for Checkpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
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

    #[test]
    fn every_value_has_a_word() {
        assert_eq!(ComputeDtype::Bf16.to_string(), "bf16");
        assert_eq!(Checkpointing::Off.to_string(), "off");
        assert_eq!(
            (Decay::Linear.word(), Init::Gaussian.word()),
            ("linear", "gaussian")
        );
    }
}
