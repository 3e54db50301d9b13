//! transformers 5's `LlamaTokenizer`: its own pipeline around the vocabulary of `tokenizer.json`.

use serde_json::{Value, json};

use super::error::DataError;
use super::model_files::ModelFiles;

const CLASS: &str = "LlamaTokenizer";

/// `tokenizer.json` as transformers 5 uses it if the model's files name the class `LlamaTokenizer`: vocabulary, merges and
/// post-processor are those of the file; normalizer, pre-tokenizer and decoder are those of the class. `None` if the file is
/// used as it is: for other classes, and for byte-level files (as in transformers' `AutoTokenizer`).
///
/// # Errors
///
/// A file that is not JSON.
pub(super) fn rebuilt(files: &ModelFiles) -> Result<Option<Vec<u8>>, DataError> {
    const BYTE_LEVEL: &[u8] = b"\"ByteLevel\"";
    let settings = files.tokenizer_settings()?;
    let model = files.model_settings()?;
    let class = |object: &serde_json::Map<String, Value>| {
        let class = object.get("tokenizer_class").and_then(Value::as_str);
        class.map(str::to_owned)
    };
    let class = class(settings).or(class(model)).unwrap_or_default();
    let mut windows = files.tokenizer.windows(BYTE_LEVEL.len());
    if class.strip_suffix("Fast").unwrap_or(&class) != CLASS || windows.any(|at| at == BYTE_LEVEL) {
        return Ok(None);
    }
    let mut tokenizer: Value = serde_json::from_slice(&files.tokenizer)
        .map_err(|error| files.error("tokenizer.json", format!("not valid JSON: {error}")))?;
    let is_bpe = tokenizer.pointer("/model/type") == Some(&json!("BPE"));
    let Some(object) = tokenizer.as_object_mut().filter(|_| is_bpe) else {
        return Ok(None);
    };
    let flag = |key: &str| settings.get(key).and_then(Value::as_bool);
    let space_first = flag("add_prefix_space").unwrap_or(true);
    let scheme = match (space_first, flag("legacy").unwrap_or(false)) {
        (false, _) => "never",
        (true, true) => "always",
        (true, false) => "first",
    };
    let model = &mut object["model"];
    for (key, value) in [
        ("fuse_unk", json!(true)),
        ("byte_fallback", json!(true)),
        ("ignore_merges", json!(false)),
        ("dropout", Value::Null),
        ("unk_token", Value::Null),
        ("continuing_subword_prefix", Value::Null),
        ("end_of_word_suffix", Value::Null),
    ] {
        model[key] = value;
    }
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space_first {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    object.insert("normalizer".into(), Value::Null);
    object.insert(
        "pre_tokenizer".into(),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false}),
    );
    object.insert(
        "decoder".into(),
        json!({"type": "Sequence", "decoders": decoders}),
    );
    if files.lists_added_tokens()? {
        object.insert("added_tokens".into(), json!([]));
    }
    let written = serde_json::to_vec(&tokenizer);
    let written = written.map_err(|error| files.error("tokenizer.json", error.to_string()))?;
    Ok(Some(written))
}
