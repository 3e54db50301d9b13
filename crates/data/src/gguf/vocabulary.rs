//! A Hugging Face folder's tokenizer and chat template as GGUF's metadata.

use std::collections::HashMap;

use llama_burn::LlamaConfig;
use llama_burn::gguf::{Array, Value};
use serde_json::Value as Json;
use tokenizers::Tokenizer;

use super::pre_tokenizer::PreTokenizer;
use super::tokenizer::{
    ADD_BOS, ADD_EOS, ADD_SPACE, CHAT_TEMPLATE, MERGES, MODEL, PRE, SCORES, TOKEN_TYPE, TOKENS,
    token_type,
};
use crate::{DataError, Guarded, ModelFiles};

/// The keys `tokenizer.*` of a model with these files.
///
/// # Errors
///
/// A tokenizer that llama.cpp does not support, and why.
pub fn tokenizer_metadata(
    files: &ModelFiles,
    model: &LlamaConfig,
) -> Result<Vec<(String, Value)>, DataError> {
    let wrong = |message: String| DataError::ModelFile {
        path: files.folder.join("tokenizer.json"),
        message,
    };
    let tokenizer = Guarded::read(&files.tokenizer)
        .map_err(|error| wrong(format!("not a valid tokenizer: {error}")))?;
    let json: Json = serde_json::from_slice(&files.tokenizer)
        .map_err(|error| wrong(format!("not valid JSON: {error}")))?;
    let kind = Kind::of(&json).map_err(&wrong)?;
    let vocabulary = Vocabulary::read(&json, &kind, model.vocab_size).map_err(&wrong)?;

    let mut metadata = Vec::new();
    let mut set = |key: &str, value: Value| metadata.push((key.to_string(), value));
    match &kind {
        Kind::ByteLevel(pre) => {
            set(MODEL, Value::Text("gpt2".into()));
            set(PRE, Value::Text(pre.llama_cpp_name().into()));
            let merges = vocabulary.merges.iter();
            let merges: Option<Vec<String>> = merges.map(joined).collect();
            let merges = merges.ok_or_else(|| {
                wrong("a merge has a token with a space in it, which GGUF cannot write".into())
            })?;
            set(MERGES, Value::Array(Array::Text(merges)));
        }
        Kind::SentencePiece { space_first } => {
            set(MODEL, Value::Text("llama".into()));
            set(PRE, Value::Text("default".into()));
            set(SCORES, Value::Array(Array::F32(vocabulary.scores())));
            set(ADD_SPACE, Value::Bool(*space_first));
        }
    }
    let special = SpecialIds::read(files, model, &tokenizer.tokenizer)?;
    let around = around(&tokenizer).map_err(&wrong)?;
    set(TOKENS, Value::Array(Array::Text(vocabulary.tokens)));
    set(TOKEN_TYPE, Value::Array(Array::I32(vocabulary.types)));
    for (key, id) in special.ids {
        set(key, Value::U32(id));
    }
    set(ADD_BOS, Value::Bool(around.0));
    set(ADD_EOS, Value::Bool(around.1));
    if files.has_chat_template() {
        set(CHAT_TEMPLATE, Value::Text(files.chat_template()?.0));
    }
    Ok(metadata)
}

/// The two families of tokenizers that Llamas have.
enum Kind {
    ByteLevel(PreTokenizer),
    SentencePiece { space_first: bool },
}

impl Kind {
    fn of(json: &Json) -> Result<Self, String> {
        let model = &json["model"];
        let is_bpe = match model.get("type").and_then(Json::as_str) {
            Some(kind) => kind == "BPE",
            None => model.get("merges").is_some(),
        };
        if !is_bpe {
            return Err(format!(
                "the tokenizer's model is {}; llama.cpp's Llamas have BPE",
                model["type"]
            ));
        }
        let byte_fallback = model["byte_fallback"].as_bool().unwrap_or(false);
        if byte_fallback && let Some(space_first) = space_first(json) {
            return Ok(Self::SentencePiece { space_first });
        }
        let pre = PreTokenizer::of_json(&json["pre_tokenizer"]).ok_or(
            "llama.cpp has no name for the way in which pre_tokenizer cuts a text, so it would cut \
             differently; use the model's own GGUF file as --model, or llama.cpp's converter",
        )?;
        match json["normalizer"]["type"].as_str() {
            None => {}
            // Nearly all texts are normalized already.
            Some("NFC") => log::warn!("llama.cpp does not apply the tokenizer's normalizer, NFC"),
            Some(other) => {
                return Err(format!(
                    "the normalizer {other} is not one that llama.cpp applies"
                ));
            }
        }
        let whole_words = model["ignore_merges"].as_bool().unwrap_or(false);
        if whole_words != pre.whole_words_first() {
            log::warn!(
                "tokenizer.json has ignore_merges = {whole_words}, and llama.cpp does the opposite for \
                 {}: rare words may get other tokens",
                pre.llama_cpp_name()
            );
        }
        Ok(Self::ByteLevel(pre))
    }
}

/// Whether a SentencePiece tokenizer puts a space before a text; `None` if it does not write spaces as `▁`.
fn space_first(json: &Json) -> Option<bool> {
    let steps = |part: &Json, list: &str| match part["type"].as_str() {
        Some("Sequence") => part[list].as_array().cloned().unwrap_or_default(),
        Some(_) => vec![part.clone()],
        None => Vec::new(),
    };
    let normalizers = steps(&json["normalizer"], "normalizers");
    let is = |step: &Json, kind: &str| step["type"].as_str() == Some(kind);
    let replaces = normalizers.iter().any(|step| {
        is(step, "Replace") && step["pattern"]["String"] == " " && step["content"] == "▁"
    });
    if replaces {
        let prepends = |step: &Json| is(step, "Prepend") && step["prepend"] == "▁";
        return Some(normalizers.iter().any(prepends));
    }
    let cuts = steps(&json["pre_tokenizer"], "pretokenizers");
    let metaspace = cuts
        .iter()
        .find(|step| is(step, "Metaspace") && step["replacement"] == "▁")?;
    Some(match metaspace["prepend_scheme"].as_str() {
        Some(scheme) => scheme != "never",
        None => metaspace["add_prefix_space"].as_bool().unwrap_or(true),
    })
}

struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<[String; 2]>,
}

impl Vocabulary {
    fn read(json: &Json, kind: &Kind, vocab_size: usize) -> Result<Self, String> {
        let entries = json["model"]["vocab"].as_object();
        let entries = entries.ok_or("the tokenizer's model has no vocab")?;
        let is_sentence_piece = matches!(kind, Kind::SentencePiece { .. });
        let unknown = json["model"]["unk_token"].as_str();
        let mut found: Vec<Option<(String, u64)>> = vec![None; vocab_size];
        let mut put = |id: &Json, token: &str, kind: u64| -> Result<(), String> {
            let place = id
                .as_u64()
                .and_then(|id| found.get_mut(usize::try_from(id).ok()?));
            let place = place.ok_or_else(|| {
                format!("the token {token:?} has the id {id}, and config.json a vocab_size of {vocab_size}")
            })?;
            match place {
                Some((other, _)) if other != token => {
                    Err(format!("{other:?} and {token:?} have the same id, {id}"))
                }
                _ => {
                    *place = Some((token.into(), kind));
                    Ok(())
                }
            }
        };
        for (token, id) in entries {
            let kind = match is_sentence_piece {
                true if Some(token.as_str()) == unknown => token_type::UNKNOWN,
                true if is_byte(token) => token_type::BYTE,
                _ => token_type::NORMAL,
            };
            put(id, token, kind)?;
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let token = added["content"]
                .as_str()
                .ok_or("an added token has no content")?;
            let kind = match added["special"].as_bool() {
                _ if is_sentence_piece && Some(token) == unknown => token_type::UNKNOWN,
                Some(true) => token_type::CONTROL,
                _ => token_type::USER_DEFINED,
            };
            put(&added["id"], token, kind)?;
        }
        let (mut tokens, mut types) = (Vec::new(), Vec::new());
        for (id, entry) in found.into_iter().enumerate() {
            // Rows of the embedding without a token; llama.cpp needs a name for each.
            let (token, kind) = entry.unwrap_or((format!("[PAD{id}]"), token_type::UNUSED));
            tokens.push(token);
            types.push(kind as i32);
        }
        let merges = json["model"]["merges"].as_array();
        let merges = merges.ok_or("the tokenizer's model has no merges")?;
        let merges: Option<Vec<[String; 2]>> = merges.iter().map(merge).collect();
        Ok(Self {
            tokens,
            types,
            merges: merges.ok_or("a merge is not two tokens")?,
        })
    }

    /// The scores of SentencePiece's BPE: the earlier the merge of a piece, the higher its score.
    fn scores(&self) -> Vec<f32> {
        let mut ranks: HashMap<String, usize> = HashMap::with_capacity(self.merges.len());
        for (rank, [left, right]) in self.merges.iter().enumerate() {
            ranks.entry(format!("{left}{right}")).or_insert(rank);
        }
        let last = self.merges.len();
        let tokens = self.tokens.iter().zip(&self.types);
        let scores = tokens.map(|(token, kind)| match *kind as u64 {
            token_type::NORMAL => -(*ranks.get(token).unwrap_or(&last) as f32),
            _ => 0.0,
        });
        scores.collect()
    }
}

/// `<0x0A>`: the token of a byte.
fn is_byte(token: &str) -> bool {
    let digits = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// A merge as a text with a space or as a pair.
fn merge(json: &Json) -> Option<[String; 2]> {
    match json {
        Json::String(text) => {
            let (left, right) = text.split_once(' ')?;
            Some([left.into(), right.into()])
        }
        Json::Array(pair) => match &pair[..] {
            [Json::String(left), Json::String(right)] => Some([left.clone(), right.clone()]),
            _ => None,
        },
        _ => None,
    }
}

fn joined([left, right]: &[String; 2]) -> Option<String> {
    (!left.contains(' ') && !right.contains(' ')).then(|| format!("{left} {right}"))
}

/// Whether the tokenizer puts special tokens before and behind a text.
fn around(tokenizer: &Guarded) -> Result<(bool, bool), String> {
    let (with, without) = (
        tokenizer.encode_fast("a", true)?,
        tokenizer.encode_fast("a", false)?,
    );
    let (with, without) = (with.get_ids(), without.get_ids());
    if with.len() <= without.len() {
        return Ok((false, false));
    }
    let before = with
        .windows(without.len().max(1))
        .position(|ids| ids == without);
    let before = before.unwrap_or(0);
    Ok((before > 0, before + without.len() < with.len()))
}

struct SpecialIds {
    ids: Vec<(&'static str, u32)>,
}

impl SpecialIds {
    fn read(
        files: &ModelFiles,
        model: &LlamaConfig,
        tokenizer: &Tokenizer,
    ) -> Result<Self, DataError> {
        let named = |key: &str| -> Result<Option<u32>, DataError> {
            let token = files.special_token(key)?;
            Ok(token.and_then(|token| tokenizer.token_to_id(&token)))
        };
        let mut ids = Vec::new();
        let bos = named("bos_token")?.or(model.bos_token_id);
        ids.extend(bos.map(|id| ("tokenizer.ggml.bos_token_id", id)));
        let end = files.end_token(|token| tokenizer.token_to_id(token))?;
        ids.push(("tokenizer.ggml.eos_token_id", end));
        let mut others = files.generation_end_tokens()?;
        others.extend(&model.eos_token_ids);
        let mut seen = vec![end];
        others.retain(|id| {
            let new = !seen.contains(id);
            seen.push(*id);
            new
        });
        // llama.cpp has three keys for end tokens.
        let places = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
        ids.extend(places.into_iter().zip(others));
        let unknown = named("unk_token")?;
        ids.extend(unknown.map(|id| ("tokenizer.ggml.unknown_token_id", id)));
        let padding = named("pad_token")?;
        ids.extend(padding.map(|id| ("tokenizer.ggml.padding_token_id", id)));
        Ok(Self { ids })
    }
}
