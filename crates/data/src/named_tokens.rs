//! Tokens that a model's files name without an id. Like transformers, we add those that the tokenizer lacks.

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::error::DataError;
use super::model_files::{
    ModelFiles, SPECIAL_TOKENS, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, flagged_token,
};

const EXTRA: &str = "extra_special_tokens";
/// Their name in version 4 of transformers.
const ADDITIONAL: &str = "additional_special_tokens";
const MODEL_SPECIFIC: &str = "model_specific_special_tokens";

impl ModelFiles {
    /// The special tokens that `tokenizer_config.json` and `special_tokens_map.json` name, in the order in which transformers
    /// adds them: `bos_token` and the other standard names, names of the model, then unnamed tokens.
    ///
    /// # Errors
    ///
    /// A value that is not a token, with its file and key.
    pub(super) fn named_tokens(&self) -> Result<Vec<AddedToken>, DataError> {
        let mut settings = self.tokenizer_settings()?.clone();
        let is_set = |value: Option<&Value>| match value {
            None | Some(Value::Null) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(object)) => !object.is_empty(),
            Some(_) => true,
        };
        if !is_set(settings.get(EXTRA))
            && let Some(tokens) = settings.shift_remove(ADDITIONAL)
        {
            settings.insert(EXTRA.into(), tokens);
        }
        if !self.lists_added_tokens()? {
            let map = self.special_tokens_map()?;
            overlay(&mut settings, map);
            if !settings.contains_key(EXTRA)
                && let Some(tokens) = settings.shift_remove(ADDITIONAL)
            {
                settings.insert(EXTRA.into(), tokens);
            }
        }
        let mut tokens = Vec::new();
        for key in SPECIAL_TOKENS {
            tokens.extend(self.named(key, settings.get(key))?);
        }
        let is_own = |key: &str| key.ends_with("_token") && !SPECIAL_TOKENS.contains(&key);
        let own: Vec<(&String, &Value)> = settings
            .iter()
            .filter(|(key, value)| is_own(key) && (value.is_string() || value.is_object()))
            .collect();
        let extra = settings.get(EXTRA);
        let named = extra.and_then(Value::as_object).into_iter().flatten();
        let mut own: Vec<(&String, &Value)> = own.into_iter().chain(named).collect();
        if own.is_empty()
            && let Some(Value::Object(named)) = settings.get(MODEL_SPECIFIC)
        {
            own.extend(named);
        }
        for (key, value) in own {
            tokens.extend(self.named(key, Some(value))?);
        }
        match extra {
            Some(Value::Array(list)) => {
                for token in list {
                    tokens.extend(self.named(EXTRA, Some(token))?);
                }
            }
            None | Some(Value::Null | Value::Object(_)) => {}
            Some(_) => {
                let message = format!("\"{EXTRA}\" must be a list of tokens");
                return Err(self.error(TOKENIZER_CONFIG, message));
            }
        }
        Ok(tokens)
    }

    fn named(&self, key: &str, value: Option<&Value>) -> Result<Option<AddedToken>, DataError> {
        let wrong = || {
            let message = format!(
                "\"{key}\" must be a token's text, or an object with the text as \"content\""
            );
            let in_map = self
                .special_tokens_map()
                .is_ok_and(|map| map.contains_key(key));
            self.error(
                if in_map {
                    SPECIAL_TOKENS_MAP
                } else {
                    TOKENIZER_CONFIG
                },
                message,
            )
        };
        match value {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(AddedToken::from(text.clone(), true))),
            Some(value) => {
                let token = flagged_token(value, true).ok_or_else(wrong)?;
                Ok(Some(token))
            }
        }
    }

    /// Whether special tokens in a text are split like other text (`split_special_tokens`).
    pub(super) fn splits_special_tokens(&self) -> Result<bool, DataError> {
        let settings = self.tokenizer_settings()?;
        match settings.get("split_special_tokens") {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(splits)) => Ok(*splits),
            Some(_) => Err(self.error(
                TOKENIZER_CONFIG,
                "\"split_special_tokens\" must be true or false",
            )),
        }
    }
}

/// Adds the keys of `special_tokens_map.json`, which take precedence; its unnamed tokens are appended.
fn overlay(settings: &mut Map<String, Value>, map: &Map<String, Value>) {
    for (key, value) in map {
        let mut value = value.clone();
        if key == EXTRA
            && let (Some(Value::Array(have)), Value::Array(more)) = (settings.get(EXTRA), &value)
        {
            let new = more.iter().filter(|token| !have.contains(token));
            value = have.iter().chain(new).cloned().collect();
        }
        settings.insert(key.clone(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(config: Value, map: Option<Value>) -> Result<Vec<String>, String> {
        let files = ModelFiles {
            folder: "model".into(),
            tokenizer_config: Some(config.to_string().into()),
            special_tokens_map: map.map(|map| map.to_string().into()),
            ..ModelFiles::default()
        };
        let tokens = files.named_tokens().map_err(|error| error.to_string())?;
        Ok(tokens.into_iter().map(|token| token.content).collect())
    }

    #[test]
    fn standard_names_come_first_then_own_names_then_the_rest() {
        let config = serde_json::json!({"additional_special_tokens": ["<x>", {"content": "<y>"}], "call_token": "<call>",
            "eos_token": "</s>", "bos_token": {"content": "<s>"}, "pad_token": null, "add_bos_token": true});
        assert_eq!(
            named(config, None).unwrap(),
            ["<s>", "</s>", "<call>", "<x>", "<y>"]
        );
    }

    #[test]
    fn the_map_counts_where_the_configuration_lists_no_added_tokens() {
        let map = serde_json::json!({"eos_token": "<end>", "additional_special_tokens": ["<x>"]});
        let old = serde_json::json!({"eos_token": "</s>"});
        assert_eq!(named(old, Some(map.clone())).unwrap(), ["<end>", "<x>"]);
        let new = serde_json::json!({"eos_token": "</s>", "added_tokens_decoder": {}});
        assert_eq!(named(new, Some(map)).unwrap(), ["</s>"]);
    }

    #[test]
    fn what_is_no_token_is_named_with_its_file() {
        for (config, map, file) in [
            (
                serde_json::json!({"pad_token": 3}),
                None,
                "tokenizer_config.json",
            ),
            (
                serde_json::json!({"extra_special_tokens": 3}),
                None,
                "tokenizer_config.json",
            ),
            (
                serde_json::json!({}),
                Some(serde_json::json!({"pad_token": ["<pad>"]})),
                "special_tokens_map.json",
            ),
        ] {
            let error = named(config, map).unwrap_err();
            assert!(error.contains(file) && error.contains("token"), "{error}");
        }
    }
}
