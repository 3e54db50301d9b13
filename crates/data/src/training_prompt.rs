//! The prompt template of an adapter's training, saved in a file beside its weights.
//!
//! An adapter that is used with another prompt template than in training performs worse, and an evaluation then measures
//! the template, not the task. PEFT ignores the file.

use std::path::{Path, PathBuf};

use llama_burn::limited::{self, LARGEST_SETTINGS};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::format::Format;
use super::model_files::ModelFiles;
use super::tokenize::effective_template;
use crate::PromptTemplate;

/// The file's name in an adapter's folder.
pub const PROMPT_FILE: &str = "training_prompt.json";

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PromptFileError {
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] durable::WriteError),
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// Its content is not valid.
    #[error(
        "{} is not valid: {message}; delete it and set --template",
        path.display()
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

/// How the prompts of a training were made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingPrompt {
    /// The config key `prompt_template`.
    pub prompt_template: String,
    /// The config key `dataset_format`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_format: Option<String>,
    /// The SHA-256 of the model's chat template, if it rendered the prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_sha256: Option<String>,
    /// The date that the chat template wrote, in seconds since 1970; `None` if it writes no date.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_time: Option<u64>,
}

impl TrainingPrompt {
    /// How rows of this format are rendered with this template and these files of a model.
    pub fn new(files: &ModelFiles, template: &PromptTemplate, format: Format) -> Self {
        let template = effective_template(template, format).unwrap_or_else(|| template.clone());
        Self {
            dataset_format: Some(format.name().into()),
            ..Self::of_template(files, &template)
        }
    }

    /// How a template renders prompts with these files of a model.
    pub fn of_template(files: &ModelFiles, template: &PromptTemplate) -> Self {
        let is_chat = *template == PromptTemplate::Chat;
        let chat = is_chat.then(|| files.chat_template().ok());
        Self {
            chat_template_time: files.time.filter(|_| is_chat && files.writes_date()),
            prompt_template: template.to_string(),
            dataset_format: None,
            chat_template_sha256: chat.flatten().map(|(text, _)| sha256(&text)),
        }
    }

    /// Writes the file into an adapter's folder.
    ///
    /// # Errors
    ///
    /// [`PromptFileError::Write`].
    pub fn write(&self, folder: &Path) -> Result<(), PromptFileError> {
        let path = folder.join(PROMPT_FILE);
        let text = serde_json::to_string_pretty(self);
        let text = text.map_err(|error| PromptFileError::Invalid {
            path: path.clone(),
            message: error.to_string(),
        })?;
        Ok(durable::write_atomically(
            &path,
            format!("{text}\n").as_bytes(),
        )?)
    }

    /// Reads the file of an adapter's folder; `None` if it is missing, as in adapters of PEFT.
    ///
    /// # Errors
    ///
    /// [`PromptFileError::Read`] and [`PromptFileError::Invalid`].
    pub fn read(folder: &Path) -> Result<Option<Self>, PromptFileError> {
        let path = folder.join(PROMPT_FILE);
        let text = match limited::read_to_string(&path, LARGEST_SETTINGS) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(PromptFileError::Read { path, source }),
        };
        let invalid = |message: String| PromptFileError::Invalid {
            path: path.clone(),
            message,
        };
        let prompt: Self =
            serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        prompt
            .template()
            .map_err(|problem| invalid(format!("\"prompt_template\" {problem}")))?;
        Ok(Some(prompt))
    }

    /// The template.
    ///
    /// # Errors
    ///
    /// A template that is not valid.
    pub fn template(&self) -> Result<PromptTemplate, String> {
        self.prompt_template.parse()
    }

    /// How these prompts differ from those of `other`; `None` if they are the same.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.prompt_template != other.prompt_template {
            return Some(format!(
                "trained with the prompt template {:?}, evaluated with {:?}",
                self.prompt_template, other.prompt_template
            ));
        }
        match (&self.chat_template_sha256, &other.chat_template_sha256) {
            (Some(a), Some(b)) if a != b => {
                Some("trained with another chat template than this model has".into())
            }
            _ => None,
        }
    }
}

fn sha256(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(chat_template: &str) -> ModelFiles {
        ModelFiles {
            chat_template: Some(chat_template.into()),
            ..ModelFiles::default()
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_a_folder_without_it_has_none() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(TrainingPrompt::read(folder.path()).unwrap(), None);
        let chat = TrainingPrompt::new(&files("abc"), &PromptTemplate::Raw, Format::Messages);
        assert_eq!(chat.prompt_template, "chat");
        // sha256("abc"), FIPS 180-2.
        let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(chat.chat_template_sha256.as_deref(), Some(digest));
        let custom = PromptTemplate::Custom("Q: {context}\nA: ".into());
        let custom = TrainingPrompt::new(&files("abc"), &custom, Format::Alpaca);
        for prompt in [chat, custom] {
            prompt.write(folder.path()).unwrap();
            assert_eq!(TrainingPrompt::read(folder.path()).unwrap(), Some(prompt));
        }
    }

    #[test]
    fn another_template_or_another_chat_template_is_a_difference() {
        let prompt = |files: &ModelFiles, template| TrainingPrompt::of_template(files, &template);
        let a = prompt(&files("a"), PromptTemplate::Chat);
        assert_eq!(
            a.difference(&prompt(&files("a"), PromptTemplate::Chat)),
            None
        );
        let other = a
            .difference(&prompt(&files("b"), PromptTemplate::Chat))
            .unwrap();
        assert!(other.contains("another chat template"), "{other}");
        let raw = a
            .difference(&prompt(&files("a"), PromptTemplate::Raw))
            .unwrap();
        assert!(raw.contains("\"chat\"") && raw.contains("\"raw\""), "{raw}");
        // What rows were written in does not matter, only what prompts they gave.
        let rows = TrainingPrompt::new(&files("a"), &PromptTemplate::Chat, Format::Messages);
        assert_eq!(rows.difference(&a), None);
    }

    #[test]
    fn the_date_of_a_template_that_writes_it_is_remembered() {
        let time = |template: &str, prompt: PromptTemplate| {
            let files = ModelFiles {
                time: Some(1_000_000_000),
                ..files(template)
            };
            TrainingPrompt::of_template(&files, &prompt).chat_template_time
        };
        let dated = "{{ strftime_now('%d %b %Y') }}";
        assert_eq!(time(dated, PromptTemplate::Chat), Some(1_000_000_000));
        assert_eq!(time(dated, PromptTemplate::Raw), None);
        assert_eq!(time("{{ messages }}", PromptTemplate::Chat), None);
    }

    #[test]
    fn a_file_that_says_something_else_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        for text in [
            "",
            "[]",
            "{\"prompt_template\": 3}",
            "{\"prompt_template\": \"x\"}",
        ] {
            std::fs::write(folder.path().join(PROMPT_FILE), text).unwrap();
            let error = TrainingPrompt::read(folder.path()).unwrap_err().to_string();
            assert!(
                error.contains(PROMPT_FILE) && error.contains("--template"),
                "{error}"
            );
        }
    }
}
