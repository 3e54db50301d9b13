//! The small files of a model's folder that define how text becomes tokens, under Hugging Face's names.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};

use llama_burn::limited::{self, LARGEST_SETTINGS, LARGEST_TABLE};
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::error::DataError;

pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const ADDED_TOKENS: &str = "added_tokens.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const CONFIG: &str = "config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The key of `tokenizer_config.json` that lists added tokens by id.
const ADDED_TOKENS_DECODER: &str = "added_tokens_decoder";

/// transformers' names of special tokens.
pub(super) const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A token with its flags, as `added_tokens_decoder` writes it.
pub(super) fn flagged_token(token: &Value, special: bool) -> Option<AddedToken> {
    let is = |key: &str| token.get(key).and_then(Value::as_bool);
    let special = is("special").unwrap_or(special);
    Some(AddedToken {
        content: token.get("content")?.as_str()?.to_owned(),
        single_word: is("single_word").unwrap_or(false),
        lstrip: is("lstrip").unwrap_or(false),
        rstrip: is("rstrip").unwrap_or(false),
        normalized: is("normalized").unwrap_or(!special),
        special,
    })
}

/// A JSON file of a model. It is parsed when it is first needed, and once.
#[derive(Debug, Clone)]
pub struct JsonFile {
    text: String,
    object: OnceLock<Result<Map<String, Value>, String>>,
}

impl JsonFile {
    /// The text of the file.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The object that the file holds, or why it holds none.
    fn object(&self) -> Result<&Map<String, Value>, &String> {
        let parse = || match serde_json::from_str(&self.text) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err("expected a JSON object".into()),
            Err(error) => Err(format!("not valid JSON: {error}")),
        };
        self.object.get_or_init(parse).as_ref()
    }
}

/// A file with this text.
impl<T: Into<String>> From<T> for JsonFile {
    fn from(text: T) -> Self {
        let (text, object) = (text.into(), OnceLock::new());
        Self { text, object }
    }
}

/// What a file that is missing holds.
static EMPTY: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);

/// The files of a model that define how text becomes tokens.
#[derive(Debug, Clone, Default)]
pub struct ModelFiles {
    /// The folder, for messages.
    pub folder: PathBuf,
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<JsonFile>,
    /// `special_tokens_map.json`: special tokens, as older versions of transformers wrote them.
    pub special_tokens_map: Option<JsonFile>,
    /// `added_tokens.json`: added tokens with their ids, as older versions of transformers wrote them.
    pub added_tokens: Option<JsonFile>,
    /// `generation_config.json`.
    pub generation_config: Option<JsonFile>,
    /// `config.json`.
    pub config: Option<JsonFile>,
    /// `chat_template.jinja`.
    pub chat_template: Option<String>,
    /// The date for a chat template that writes the date, in seconds since 1970; `None` is the current time.
    pub time: Option<u64>,
}

impl ModelFiles {
    /// Reads the files of a folder; all but `tokenizer.json` may be missing. A GGUF file holds them all.
    ///
    /// # Errors
    ///
    /// [`DataError::ModelFile`] names the file that is missing or cannot be read.
    pub fn read(folder: &Path) -> Result<Self, DataError> {
        if llama_burn::gguf::is_gguf(folder) {
            return Ok(crate::gguf::model_files(folder)?);
        }
        let path = folder.join("tokenizer.json");
        let tokenizer =
            limited::read(&path, LARGEST_TABLE).map_err(|error| DataError::ModelFile {
                path,
                message: match error.kind() {
                    ErrorKind::NotFound => {
                        "there is no such file; base_model must be a folder with \
                                        tokenizer.json (tokenizer.model alone is not enough)"
                            .into()
                    }
                    _ => error.to_string(),
                },
            })?;
        let optional =
            |name: &str| match limited::read_to_string(&folder.join(name), LARGEST_SETTINGS) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(DataError::ModelFile {
                    path: folder.join(name),
                    message: error.to_string(),
                }),
            };
        let json = |name: &str| Ok::<_, DataError>(optional(name)?.map(JsonFile::from));
        Ok(Self {
            folder: folder.into(),
            tokenizer,
            tokenizer_config: json(TOKENIZER_CONFIG)?,
            special_tokens_map: json(SPECIAL_TOKENS_MAP)?,
            added_tokens: json(ADDED_TOKENS)?,
            generation_config: json(GENERATION_CONFIG)?,
            config: json(CONFIG)?,
            chat_template: optional(CHAT_TEMPLATE)?,
            time: None,
        })
    }

    /// An error about one of the files.
    pub(super) fn error(&self, name: &str, message: impl Into<String>) -> DataError {
        DataError::ModelFile {
            path: self.folder.join(name),
            message: message.into(),
        }
    }

    /// A special token (`bos_token`, …) of `tokenizer_config.json`: a string, or an object with `content`. If that file
    /// lists no added tokens (older versions of transformers), `special_tokens_map.json` takes precedence, as in
    /// transformers.
    pub fn special_token(&self, key: &str) -> Result<Option<String>, DataError> {
        let config = self.tokenizer_settings()?;
        if !config.contains_key(ADDED_TOKENS_DECODER) {
            let map = self.special_tokens_map()?;
            let token = map.get(key);
            if let Some(token) = self.token_content(SPECIAL_TOKENS_MAP, key, token)? {
                return Ok(Some(token));
            }
        }
        self.token_content(TOKENIZER_CONFIG, key, config.get(key))
    }

    /// What `tokenizer_config.json` holds.
    pub(super) fn tokenizer_settings(&self) -> Result<&Map<String, Value>, DataError> {
        self.json(TOKENIZER_CONFIG, &self.tokenizer_config)
    }

    /// What `config.json` holds.
    pub(super) fn model_settings(&self) -> Result<&Map<String, Value>, DataError> {
        self.json(CONFIG, &self.config)
    }

    /// What `special_tokens_map.json` holds.
    pub(super) fn special_tokens_map(&self) -> Result<&Map<String, Value>, DataError> {
        self.json(SPECIAL_TOKENS_MAP, &self.special_tokens_map)
    }

    /// Whether `tokenizer_config.json` lists added tokens. Then `special_tokens_map.json` and `added_tokens.json` are ignored.
    pub(super) fn lists_added_tokens(&self) -> Result<bool, DataError> {
        let settings = self.tokenizer_settings()?;
        Ok(settings.contains_key(ADDED_TOKENS_DECODER))
    }

    /// The text of a token: a string, or an object with `content`.
    fn token_content(
        &self,
        file: &str,
        key: &str,
        value: Option<&Value>,
    ) -> Result<Option<String>, DataError> {
        let content = match value {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(token)) => token.get("content").unwrap_or(&Value::Null),
            Some(value) => value,
        };
        match content {
            Value::String(text) => Ok(Some(text.clone())),
            _ => Err(self.error(
                file,
                format!("\"{key}\" must be a string, or an object with the string \"content\""),
            )),
        }
    }

    /// The tokens that are added to those of `tokenizer.json`, sorted by id: those of `tokenizer_config.json`'s
    /// `added_tokens_decoder`, else those of `added_tokens.json`, as in transformers.
    pub(super) fn added_tokens(&self) -> Result<Vec<(u32, AddedToken)>, DataError> {
        let config = self.tokenizer_settings()?;
        let mut tokens = match config.get(ADDED_TOKENS_DECODER) {
            Some(Value::Object(decoder)) => {
                let tokens = decoder.iter().map(|(id, token)| {
                    let known = id.parse::<u32>().ok().zip(flagged_token(token, false));
                    known.ok_or_else(|| {
                        let message = format!(
                            "\"{ADDED_TOKENS_DECODER}\" must be a table from token ids to objects with \"content\"; \
                             {id:?} is not one"
                        );
                        self.error(TOKENIZER_CONFIG, message)
                    })
                });
                tokens.collect::<Result<Vec<_>, _>>()?
            }
            Some(Value::Null) | None => self.legacy_added_tokens()?,
            Some(_) => {
                let message = format!("\"{ADDED_TOKENS_DECODER}\" must be a table from token ids");
                return Err(self.error(TOKENIZER_CONFIG, message));
            }
        };
        tokens.sort_by_key(|(id, _)| *id);
        Ok(tokens)
    }

    fn legacy_added_tokens(&self) -> Result<Vec<(u32, AddedToken)>, DataError> {
        let added = self.json(ADDED_TOKENS, &self.added_tokens)?;
        if added.is_empty() {
            return Ok(Vec::new());
        }
        let mut special = Vec::new();
        for key in SPECIAL_TOKENS {
            special.extend(self.special_token(key)?);
        }
        let tokens = added.iter().map(|(content, id)| {
            let is_special = special.contains(content);
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| {
                self.error(
                    ADDED_TOKENS,
                    format!("the id of {content:?} must be a whole number"),
                )
            });
            Ok((id?, AddedToken::from(content.clone(), is_special)))
        });
        tokens.collect()
    }

    /// The id of the token that ends a text: `tokenizer_config.json`'s `eos_token`, looked up by `id_of`; else
    /// the first `eos_token_id` of `generation_config.json`, else of `config.json`.
    pub fn end_token(&self, id_of: impl Fn(&str) -> Option<u32>) -> Result<u32, DataError> {
        if let Some(token) = self.special_token("eos_token")? {
            return id_of(&token).ok_or_else(|| {
                let message =
                    format!("\"eos_token\" is {token:?}, which tokenizer.json does not have");
                self.error(TOKENIZER_CONFIG, message)
            });
        }
        for (name, text) in [
            (GENERATION_CONFIG, &self.generation_config),
            (CONFIG, &self.config),
        ] {
            let object = self.json(name, text)?;
            let value = match object.get("eos_token_id") {
                None | Some(Value::Null) => continue,
                Some(Value::Array(ids)) => ids.first().unwrap_or(&Value::Null),
                Some(value) => value,
            };
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            return id.ok_or_else(|| {
                self.error(
                    name,
                    "\"eos_token_id\" must be a token id, or a list that begins with one",
                )
            });
        }
        Err(DataError::NoEndToken {
            folder: self.folder.clone(),
        })
    }

    /// Every `eos_token_id` of `generation_config.json`, which may list several; empty without the file.
    ///
    /// # Errors
    ///
    /// A file that is not valid, or values that are not token ids.
    pub fn generation_end_tokens(&self) -> Result<Vec<u32>, DataError> {
        let object = self.json(GENERATION_CONFIG, &self.generation_config)?;
        let values = match object.get("eos_token_id") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.clone(),
            Some(value) => vec![value.clone()],
        };
        let id = |value: Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = values.into_iter().map(id).collect();
        ids.ok_or_else(|| {
            self.error(
                GENERATION_CONFIG,
                "\"eos_token_id\" must be a token id or a list of them",
            )
        })
    }

    /// The tokens at which generation stops: those of `generation_config.json`, else those of `config.json`, and `end`,
    /// that of the tokenizer.
    pub(super) fn stops(&self, end: u32) -> Vec<u32> {
        let mut stops = self.generation_end_tokens().unwrap_or_default();
        if stops.is_empty() {
            let config = self.json(CONFIG, &self.config).unwrap_or(&EMPTY);
            let ids = match config.get("eos_token_id") {
                Some(Value::Array(ids)) => ids.clone(),
                Some(id) => vec![id.clone()],
                None => Vec::new(),
            };
            let ids = ids.iter().filter_map(Value::as_u64);
            stops.extend(ids.filter_map(|id| u32::try_from(id).ok()));
        }
        if !stops.contains(&end) {
            stops.push(end);
        }
        stops
    }

    /// Whether the chat template writes the date.
    pub fn writes_date(&self) -> bool {
        self.chat_template()
            .is_ok_and(|(text, _)| text.contains("strftime_now"))
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.chat_template().is_ok()
    }

    /// The model's chat template and its file: `chat_template.jinja`, else `tokenizer_config.json`'s `chat_template`, a text
    /// or a list of named ones of which `default` is used, as in transformers.
    pub fn chat_template(&self) -> Result<(String, PathBuf), DataError> {
        if let Some(text) = &self.chat_template {
            return Ok((text.clone(), self.folder.join(CHAT_TEMPLATE)));
        }
        let path = self.folder.join(TOKENIZER_CONFIG);
        let templates = match self.tokenizer_settings()?.get("chat_template") {
            None | Some(Value::Null) => {
                return Err(DataError::NoChatTemplate {
                    folder: self.folder.clone(),
                });
            }
            Some(Value::String(text)) => return Ok((text.clone(), path)),
            Some(Value::Array(templates)) => templates.as_slice(),
            Some(_) => &[],
        };
        let text = |template: &Value, key: &str| Some(template.get(key)?.as_str()?.to_owned());
        let default = templates
            .iter()
            .find(|template| text(template, "name").as_deref() == Some("default"));
        match default.and_then(|template| text(template, "template")) {
            Some(text) => Ok((text, path)),
            None => {
                let names: Vec<_> = templates.iter().filter_map(|t| text(t, "name")).collect();
                let message = format!(
                    "\"chat_template\" must be a text, or a list of {{\"name\", \"template\"}} with one \
                     named \"default\"; got the names {names:?}"
                );
                Err(self.error(TOKENIZER_CONFIG, message))
            }
        }
    }

    /// The object that a file holds; empty if the file is missing.
    fn json<'a>(
        &self,
        name: &str,
        file: &'a Option<JsonFile>,
    ) -> Result<&'a Map<String, Value>, DataError> {
        let Some(file) = file else {
            return Ok(&EMPTY);
        };
        file.object().map_err(|message| self.error(name, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(tokenizer_config: &str) -> ModelFiles {
        ModelFiles {
            folder: "model".into(),
            tokenizer_config: Some(tokenizer_config.into()),
            ..ModelFiles::default()
        }
    }

    fn id_of(token: &str) -> Option<u32> {
        (token == "</s>").then_some(2)
    }

    #[test]
    fn the_end_token_is_the_tokenizers_own_in_either_form() {
        for config in [
            r#"{"eos_token": "</s>"}"#,
            r#"{"eos_token": {"content": "</s>", "lstrip": false}}"#,
        ] {
            assert_eq!(files(config).end_token(id_of).unwrap(), 2);
        }
        let error = files(r#"{"eos_token": "<end>"}"#)
            .end_token(id_of)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("tokenizer_config.json") && error.contains("<end>"),
            "{error}"
        );
        let error = files(r#"{"eos_token": 2}"#)
            .end_token(id_of)
            .unwrap_err()
            .to_string();
        assert!(error.contains("must be a string"), "{error}");
        let error = files(r#"{"eos"#).end_token(id_of).unwrap_err().to_string();
        assert!(error.contains("not valid JSON"), "{error}");
    }

    #[test]
    fn several_tokens_can_end_a_text() {
        let mut files = files("{}");
        assert_eq!(files.generation_end_tokens().unwrap(), [0u32; 0]);
        files.generation_config = Some(r#"{"eos_token_id": [9, 8]}"#.into());
        assert_eq!(files.generation_end_tokens().unwrap(), [9, 8]);
        files.generation_config = Some(r#"{"eos_token_id": 9}"#.into());
        assert_eq!(files.generation_end_tokens().unwrap(), [9]);
        files.generation_config = Some(r#"{"eos_token_id": [9, "x"]}"#.into());
        assert!(files.generation_end_tokens().is_err());
    }

    #[test]
    fn the_end_token_is_else_the_first_of_the_generation_config_else_of_the_config() {
        let mut files = files(r#"{"eos_token": null}"#);
        let error = files.end_token(id_of).unwrap_err().to_string();
        assert!(error.contains("model names no end token"), "{error}");
        files.config = Some(r#"{"eos_token_id": 7}"#.into());
        assert_eq!(files.end_token(id_of).unwrap(), 7);
        files.generation_config = Some(r#"{"eos_token_id": [9, 8]}"#.into());
        assert_eq!(files.end_token(id_of).unwrap(), 9);
        files.generation_config = Some(r#"{"eos_token_id": []}"#.into());
        let error = files.end_token(id_of).unwrap_err().to_string();
        assert!(error.contains("generation_config.json"), "{error}");
    }

    #[test]
    fn the_chat_template_is_the_file_else_the_text_else_the_default_of_the_list() {
        let mut both = files(r#"{"chat_template": "old"}"#);
        assert_eq!(both.chat_template().unwrap().0, "old");
        both.chat_template = Some("new".into());
        assert_eq!(
            both.chat_template().unwrap(),
            ("new".into(), Path::new("model").join(CHAT_TEMPLATE))
        );
        let list = r#"{"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}"#;
        assert_eq!(files(list).chat_template().unwrap().0, "b");
        let error = files(r#"{"chat_template": [{"name": "rag", "template": "a"}]}"#);
        assert!(
            error
                .chat_template()
                .unwrap_err()
                .to_string()
                .contains("rag")
        );
        let error = files("{}").chat_template().unwrap_err().to_string();
        assert!(
            error.contains("no chat template") && error.contains("custom:…{context}…"),
            "{error}"
        );
    }

    #[test]
    fn a_folder_without_a_tokenizer_says_which_file_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let error = ModelFiles::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let files = ModelFiles::read(folder.path()).unwrap();
        assert_eq!(
            (
                files.config.as_ref().map(JsonFile::text),
                files.tokenizer_config.as_ref().map(JsonFile::text)
            ),
            (Some("{}"), None)
        );
    }
}
