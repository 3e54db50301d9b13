//! `tokenizer.json` in a sandbox: on some files the `tokenizers` crate panics, on others it writes more for a short text
//! than fits into memory. Here both become errors.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::{Encoding, Tokenizer};

use crate::contained::contain;

/// The maximum number of bytes that a normalizer may write per byte. Those of models in use reach some dozens.
const MOST_GROWTH: f64 = 4096.0;
/// The maximum length of a normalized text, in bytes.
const LONGEST_NORMALIZED: f64 = (1u64 << 30) as f64;

/// The maximum length of all regular expressions of a file, in bytes. Those of models in use have some hundred; a compiled
/// pattern of character classes takes four thousand times its length.
const LONGEST_PATTERNS: usize = 4096;

/// A tokenizer whose file was checked.
#[derive(Debug)]
pub struct Guarded {
    /// The crate's own tokenizer.
    pub tokenizer: Tokenizer,
    /// The maximum number of bytes that its normalizer writes per byte.
    growth: f64,
}

impl Guarded {
    /// Reads a `tokenizer.json`.
    pub fn read(json: &[u8]) -> Result<Self, String> {
        check_patterns(json)?;
        let read = contain(|| Tokenizer::from_bytes(json));
        let tokenizer = match read {
            Ok(Ok(tokenizer)) => tokenizer,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(panic) => return Err(panic),
        };
        // The crate's own description is checked: the crate may read the file differently from us.
        let normalizer = described(tokenizer.get_normalizer())?;
        let decoder = described(tokenizer.get_decoder())?;
        for (name, value) in [("normalizer", &normalizer), ("decoder", &decoder)] {
            if growth(value) > MOST_GROWTH {
                return Err(format!(
                    "its {name} writes more than {MOST_GROWTH} characters per character, which no tokenizer needs"
                ));
            }
        }
        Ok(Self {
            growth: growth(&normalizer),
            tokenizer,
        })
    }

    /// The tokens of a text, without their offsets.
    pub fn encode_fast(&self, text: &str, special: bool) -> Result<Encoding, String> {
        self.encoded(text, || self.tokenizer.encode_fast(text, special))
    }

    /// The tokens of a text with their offsets.
    pub fn encode(&self, text: &str) -> Result<Encoding, String> {
        self.encoded(text, || self.tokenizer.encode(text, false))
    }

    fn encoded(
        &self,
        text: &str,
        encode: impl FnOnce() -> tokenizers::Result<Encoding>,
    ) -> Result<Encoding, String> {
        if self.growth * text.len() as f64 > LONGEST_NORMALIZED {
            return Err(format!(
                "a text of {} bytes is too long for this tokenizer, whose normalizer can write {} bytes per byte",
                text.len(),
                self.growth
            ));
        }
        match contain(encode) {
            Ok(Ok(encoding)) => Ok(encoding),
            Ok(Err(error)) => Err(error.to_string()),
            Err(panic) => Err(format!(
                "the tokenizer library failed on tokenizer.json: {panic}; save the tokenizer again with transformers"
            )),
        }
    }
}

/// The parts of a file that may hold regular expressions.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
}

/// Checks the length of the regular expressions before the crate compiles them.
fn check_patterns(json: &[u8]) -> Result<(), String> {
    // The crate reports what is wrong with a file that is not JSON.
    let Ok(parts) = serde_json::from_slice::<Parts>(json) else {
        return Ok(());
    };
    let parts = [&parts.normalizer, &parts.pre_tokenizer, &parts.decoder];
    match parts.into_iter().map(patterns).sum::<usize>() {
        length if length > LONGEST_PATTERNS => Err(format!(
            "its regular expressions have {length} bytes; more than {LONGEST_PATTERNS} are not compiled"
        )),
        _ => Ok(()),
    }
}

/// Bytes of regular expressions anywhere in a part.
fn patterns(part: &Value) -> usize {
    match part {
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| match (key.as_str(), value) {
                ("Regex", Value::String(pattern)) => pattern.len(),
                _ => patterns(value),
            })
            .sum(),
        Value::Array(items) => items.iter().map(patterns).sum(),
        _ => 0,
    }
}

fn described(part: Option<&impl Serialize>) -> Result<Value, String> {
    match contain(|| serde_json::to_value(part)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(panic),
    }
}

/// The maximum number of bytes that a normalizer or decoder writes per byte.
fn growth(part: &Value) -> f64 {
    let parts = |key: &str| -> f64 {
        let parts = part[key].as_array().into_iter().flatten();
        parts.map(growth).product()
    };
    let length = |value: &Value| value.as_str().map_or(0.0, |text| text.len() as f64);
    match part["type"].as_str().unwrap_or_default() {
        "Sequence" => parts("normalizers") * parts("decoders"),
        "Replace" => {
            let content = length(&part["content"]);
            match length(&part["pattern"]["String"]) {
                // A regular expression may match between any two bytes.
                0.0 => 1.0 + content,
                pattern => (content / pattern).max(1.0),
            }
        }
        "Prepend" => 1.0 + length(&part["prepend"]),
        "Precompiled" => {
            1.0 + longest_replacement(part["precompiled_charsmap"].as_str().unwrap_or_default())
        }
        // Unicode's limits: a decomposition has at most 18 times the length of its character, a lower case 3 times.
        "NFKD" | "NFKC" | "NFD" | "NFC" => 18.0,
        "BertNormalizer" => 3.0 * 18.0,
        "Lowercase" | "Nmt" => 3.0,
        "ByteLevel" => 2.0,
        _ => 1.0,
    }
}

/// The longest text in a SentencePiece map of characters: the size of a table, the table, texts that end in zero.
fn longest_replacement(base64: &str) -> f64 {
    let Ok(bytes) = STANDARD.decode(base64) else {
        return base64.len() as f64;
    };
    let Some(size) = bytes.first_chunk::<4>() else {
        return bytes.len() as f64;
    };
    let texts = bytes
        .get(4..)
        .and_then(|rest| rest.get(u32::from_le_bytes(*size) as usize..));
    let longest = texts
        .unwrap_or(&bytes)
        .split(|byte| *byte == 0)
        .map(<[u8]>::len)
        .max();
    longest.unwrap_or(0) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file(normalizer: Value) -> Vec<u8> {
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": normalizer,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}})
        .to_string()
        .into_bytes()
    }

    #[test]
    fn a_normalizer_that_doubles_and_doubles_is_refused() {
        let doubling = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let times = |count: usize| {
            file(json!({"type": "Sequence", "normalizers": vec![doubling.clone(); count]}))
        };
        assert!(Guarded::read(&times(10)).is_ok());
        let error = Guarded::read(&times(40)).unwrap_err();
        assert!(error.contains("normalizer"), "{error}");
        let nested = json!({"type": "Sequence", "normalizers": [
            {"type": "Sequence", "normalizers": vec![doubling; 20]}]});
        assert!(Guarded::read(&file(nested)).is_err());
    }

    #[test]
    fn a_text_that_would_grow_beyond_all_memory_is_refused_and_a_short_one_is_not() {
        let long =
            json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b".repeat(4000)});
        let guarded = Guarded::read(&file(long)).unwrap();
        assert!(guarded.encode_fast("a a", false).is_ok());
        let error = guarded
            .encode_fast(&"a".repeat(1 << 20), false)
            .unwrap_err();
        assert!(error.contains("too long"), "{error}");
    }

    #[test]
    fn the_normalizers_of_models_in_use_are_let_pass() {
        let llama = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        let albert = json!({"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "``"}, "content": "\""}, {"type": "NFKD"},
            {"type": "StripAccents"}, {"type": "Lowercase"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]});
        for normalizer in [llama, albert, Value::Null, json!({"type": "NFKC"})] {
            let guarded = Guarded::read(&file(normalizer)).unwrap();
            assert!(guarded.encode_fast(&"a ".repeat(100_000), false).is_ok());
        }
    }

    #[test]
    fn regular_expressions_that_would_fill_the_memory_are_not_compiled() {
        let pattern = |repeats: usize| {
            let split = json!({"type": "Split", "pattern": {"Regex": r"\p{L}+|".repeat(repeats) + "x"},
                "behavior": "Isolated", "invert": false});
            json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}}).to_string()
        };
        assert_eq!(check_patterns(pattern(20).as_bytes()), Ok(()));
        let error = check_patterns(pattern(1000).as_bytes()).unwrap_err();
        assert!(error.contains("regular expressions"), "{error}");
    }

    #[test]
    fn a_decoder_that_is_nested_without_end_is_a_message() {
        let deep = format!("{}1{}", "[".repeat(2000), "]".repeat(2000));
        let whole = String::from_utf8(file(Value::Null)).unwrap();
        let decoder = format!(r#"{{"decoder": {{"type": "Fuse", "x": {deep}}},"#);
        let broken = whole.replacen('{', &decoder, 1);
        assert!(Guarded::read(broken.as_bytes()).is_err());
        assert!(Guarded::read(whole.as_bytes()).is_ok());
    }

    #[test]
    fn the_longest_text_of_a_characters_map_is_found() {
        // Table of 4 bytes, then "ab\0abcde\0c\0", in base 64.
        assert_eq!(longest_replacement("BAAAAAAAAABhYgBhYmNkZQBjAA=="), 5.0);
        assert_eq!(longest_replacement(""), 0.0);
        assert!(longest_replacement("////AAAA") > 0.0);
        assert_eq!(longest_replacement("no base 64"), 10.0);
    }
}
