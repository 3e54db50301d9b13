//! Typed access to the keys of `config.json`.

use serde_json::{Map, Value};

use crate::ConfigError;
use crate::limited;

pub(crate) fn invalid(key: &str, value: impl std::fmt::Display, expected: &str) -> ConfigError {
    ConfigError::Invalid {
        key: key.into(),
        value: limited::clipped(&value.to_string(), 200).into_owned(),
        expected: expected.into(),
    }
}

/// The largest accepted value of a key: several times that of any real model. Small enough that lists of all tensors
/// stay short and no product of these values, in bytes, overflows 64 bits.
fn largest(key: &str) -> u64 {
    match key {
        "num_hidden_layers" => 1 << 11,
        "num_attention_heads" | "num_key_value_heads" => 1 << 10,
        "head_dim" => 1 << 11,
        "hidden_size" => 1 << 17,
        "intermediate_size" => 1 << 20,
        "vocab_size" => 1 << 22,
        _ => 1 << 28,
    }
}

/// Typed access to an object's keys; `null` counts as absent.
pub(crate) struct Keys<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Keys<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn optional_count(&self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        match (self.optional_whole(key)?, self.get(key)) {
            (Some(0), Some(value)) => {
                Err(invalid(key, value, "expected a whole number of at least 1"))
            }
            (count, _) => Ok(count),
        }
    }

    /// As [`optional_count`](Self::optional_count), 0 included.
    pub(crate) fn optional_whole(&self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        let largest = largest(key);
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(count) if count <= largest => Ok(Some(count as usize)),
            Some(_) => {
                let expected = format!("at most {largest} is supported");
                Err(invalid(key, value, &expected))
            }
            None => Err(invalid(key, value, "expected a whole number of at least 1")),
        }
    }

    pub(crate) fn count(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.optional_count(key)?.ok_or(ConfigError::Missing(key))
    }

    pub(crate) fn positive(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
                _ => Err(invalid(key, value, "expected a number above 0")),
            },
        }
    }

    pub(crate) fn flag(&self, key: &'static str) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(invalid(key, value, "expected true or false")),
        }
    }

    pub(crate) fn tokens(&self, key: &'static str) -> Result<Vec<u32>, ConfigError> {
        let one = |value: &Value| {
            let token = value.as_u64().and_then(|token| u32::try_from(token).ok());
            token.ok_or_else(|| invalid(key, value, "expected a token id or a list of them"))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    pub(crate) fn object(
        &self,
        key: &'static str,
    ) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(value) => Err(invalid(key, value, "expected an object")),
        }
    }
}
