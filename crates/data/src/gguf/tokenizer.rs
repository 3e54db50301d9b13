//! The tokenizer and chat template inside a GGUF file, as the files of a Hugging Face folder.

use std::collections::HashMap;
use std::path::Path;

use llama_burn::gguf::{self, GgufError, GgufFile, Header, Value};
use serde_json::{Map, Value as Json, json};

use super::pre_tokenizer::{self, PreTokenizer};
use crate::ModelFiles;

/// Token types of `tokenizer.ggml.token_type`.
pub(super) mod token_type {
    pub const NORMAL: u64 = 1;
    pub const UNKNOWN: u64 = 2;
    pub const CONTROL: u64 = 3;
    pub const USER_DEFINED: u64 = 4;
    pub const UNUSED: u64 = 5;
    pub const BYTE: u64 = 6;
}

pub(super) const MODEL: &str = "tokenizer.ggml.model";
pub(super) const PRE: &str = "tokenizer.ggml.pre";
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
pub(super) const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
pub(super) const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
pub(super) const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
pub(super) const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// The longest piece of a SentencePiece vocabulary: each piece is split at every position to find its merges.
const LONGEST_PIECE: usize = 256;

/// The files that a Hugging Face folder of this model would have.
///
/// # Errors
///
/// A key that is missing or has a value that cannot be used; a kind of tokenizer that is not supported.
pub fn model_files(path: &Path) -> Result<ModelFiles, GgufError> {
    let file = GgufFile::open(path)?;
    let config = gguf::config_json(&file)?;
    let header = &file.header;
    let vocabulary = Vocabulary::read(header)?;
    let special = Special::read(header, &vocabulary)?;
    let kind = header.text(MODEL)?;
    let tokenizer = match kind {
        Some("gpt2") => byte_level(header, &vocabulary, &special)?,
        Some("llama") => sentence_piece(header, &vocabulary, &special)?,
        Some(other) => {
            let reason =
                format!("is {other:?}; tokenizers of the kinds \"gpt2\" and \"llama\" are read");
            return Err(header.wrong(MODEL, reason));
        }
        None => {
            let reason = "is missing: the file has no tokenizer";
            return Err(header.wrong(MODEL, reason));
        }
    };
    let mut tokenizer_config = special.names(&vocabulary);
    tokenizer_config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    tokenizer_config.insert("clean_up_tokenization_spaces".into(), json!(false));
    if let Some(length) = config.get("max_position_embeddings") {
        tokenizer_config.insert("model_max_length".into(), length.clone());
    }
    if let Some(template) = header.text(CHAT_TEMPLATE)? {
        tokenizer_config.insert("chat_template".into(), json!(template));
    }
    let mut generation = Map::new();
    for key in ["bos_token_id", "eos_token_id"] {
        if let Some(ids) = config.get(key) {
            generation.insert(key.into(), ids.clone());
        }
    }
    Ok(ModelFiles {
        folder: path.into(),
        tokenizer: tokenizer.to_string().into_bytes(),
        tokenizer_config: Some(Json::Object(tokenizer_config).to_string().into()),
        generation_config: Some(Json::Object(generation).to_string().into()),
        config: Some(Json::Object(config).to_string().into()),
        ..ModelFiles::default()
    })
}

/// Every token with its type.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(header: &'a Header) -> Result<Self, GgufError> {
        let tokens = header.get(TOKENS, "a list of texts", Value::as_texts)?;
        let tokens = tokens.ok_or_else(|| header.wrong(TOKENS, "is missing"))?;
        let types = header.get(TOKEN_TYPE, "a list of whole numbers", Value::as_counts)?;
        let types = types.unwrap_or_else(|| vec![token_type::NORMAL; tokens.len()]);
        if types.len() != tokens.len() {
            let reason = format!("has {} entries for {} tokens", types.len(), tokens.len());
            return Err(header.wrong(TOKEN_TYPE, reason));
        }
        Ok(Self { tokens, types })
    }

    /// Ids by token.
    fn ids(&self, header: &Header) -> Result<HashMap<&'a str, usize>, GgufError> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.as_str(), id) {
                let reason = format!("has {token:?} twice, as {first} and {id}");
                return Err(header.wrong(TOKENS, reason));
            }
        }
        Ok(ids)
    }

    /// Tokens that are found in a text before all others, as `tokenizer.json` lists them.
    fn added(&self, special: &[u64]) -> Vec<Json> {
        let added = self.tokens.iter().zip(&self.types).enumerate();
        let added = added.filter_map(|(id, (token, kind))| {
            let is_special = special.contains(kind);
            // An empty one would be found everywhere.
            let is_added = (is_special || *kind == token_type::USER_DEFINED) && !token.is_empty();
            is_added.then(|| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": is_special})
            })
        });
        added.collect()
    }

    fn map(&self) -> Map<String, Json> {
        let ids = self.tokens.iter().enumerate();
        ids.map(|(id, token)| (token.clone(), json!(id))).collect()
    }
}

/// The ids of the special tokens.
struct Special {
    ids: Vec<(&'static str, usize)>,
    add_bos: Option<bool>,
    add_eos: bool,
}

impl Special {
    fn read(header: &Header, vocabulary: &Vocabulary) -> Result<Self, GgufError> {
        let is_sentence_piece = header.text(MODEL)? == Some("llama");
        let mut ids = Vec::new();
        for (name, key, llama_default) in [
            ("bos_token", "tokenizer.ggml.bos_token_id", Some(1)),
            ("eos_token", "tokenizer.ggml.eos_token_id", Some(2)),
            ("unk_token", "tokenizer.ggml.unknown_token_id", Some(0)),
            ("pad_token", "tokenizer.ggml.padding_token_id", None),
        ] {
            let default = llama_default
                .filter(|id| is_sentence_piece && (*id as usize) < vocabulary.tokens.len());
            let Some(id) = header.count(key)?.or(default) else {
                continue;
            };
            match usize::try_from(id) {
                Ok(id) if id < vocabulary.tokens.len() => ids.push((name, id)),
                _ => {
                    let count = vocabulary.tokens.len();
                    return Err(header.wrong(key, format!("is {id}, and there are {count} tokens")));
                }
            }
        }
        Ok(Self {
            ids,
            add_bos: header.flag(ADD_BOS)?,
            add_eos: header.flag(ADD_EOS)?.unwrap_or(false),
        })
    }

    fn id(&self, name: &str) -> Option<usize> {
        self.ids
            .iter()
            .find(|(other, _)| *other == name)
            .map(|(_, id)| *id)
    }

    fn names(&self, vocabulary: &Vocabulary) -> Map<String, Json> {
        let names = self.ids.iter();
        names
            .map(|(name, id)| ((*name).to_string(), json!(vocabulary.tokens[*id])))
            .collect()
    }

    /// The post-processor that adds the tokens before and behind a text.
    fn post_processor(&self, vocabulary: &Vocabulary, add_bos_by_default: bool) -> Json {
        let add = |name: &str, on: bool| self.id(name).filter(|_| on);
        let bos = add("bos_token", self.add_bos.unwrap_or(add_bos_by_default));
        let eos = add("eos_token", self.add_eos);
        if bos.is_none() && eos.is_none() {
            return Json::Null;
        }
        let text = |id: usize| vocabulary.tokens[id].as_str();
        let around = |sequence: &str, type_id: u32| {
            let special = |id| json!({"SpecialToken": {"id": text(id), "type_id": type_id}});
            let middle = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            let parts = [bos.map(special), Some(middle), eos.map(special)];
            parts.into_iter().flatten().collect::<Vec<Json>>()
        };
        let pair = [around("A", 0), around("B", 1)].concat();
        let tokens: Map<String, Json> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|id| {
                let token = json!({"id": text(id), "ids": [id], "tokens": [text(id)]});
                (text(id).to_string(), token)
            })
            .collect();
        json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair,
            "special_tokens": tokens})
    }
}

/// Byte-level BPE, as in GPT-2 and Llama 3.
fn byte_level(
    header: &Header,
    vocabulary: &Vocabulary,
    special: &Special,
) -> Result<Json, GgufError> {
    vocabulary.ids(header)?;
    let merges = header.get(MERGES, "a list of texts", Value::as_texts)?;
    let merges = merges.ok_or_else(|| header.wrong(MERGES, "is missing"))?;
    let pairs: Option<Vec<[&str; 2]>> = merges.iter().map(|merge| pair(merge)).collect();
    let pairs = pairs.ok_or_else(|| header.wrong(MERGES, "has an entry that is not two tokens"))?;
    let name = header.text(PRE)?.unwrap_or("default");
    let pre = PreTokenizer::of_llama_cpp(name).ok_or_else(|| {
        let known = pre_tokenizer::known().join(", ");
        let reason = format!("is {name:?}, which is not supported; {known} are");
        header.wrong(PRE, reason)
    })?;
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": vocabulary.added(&[token_type::CONTROL]),
        "normalizer": null,
        "pre_tokenizer": pre.json(),
        "post_processor": special.post_processor(vocabulary, pre.begins_with_bos()),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": pre.whole_words_first(),
            "vocab": vocabulary.map(), "merges": pairs},
    }))
}

/// The two tokens of a merge, which are separated by a space that does not begin the first one.
fn pair(merge: &str) -> Option<[&str; 2]> {
    let first = merge.chars().next()?.len_utf8();
    let space = first + merge[first..].find(' ')?;
    let (left, right) = (&merge[..space], &merge[space + 1..]);
    (!right.is_empty()).then_some([left, right])
}

/// SentencePiece's BPE, as in Llama 2: pieces with higher scores are merged first.
fn sentence_piece(
    header: &Header,
    vocabulary: &Vocabulary,
    special: &Special,
) -> Result<Json, GgufError> {
    let scores = header.get(SCORES, "a list of floats", Value::as_floats)?;
    let scores = scores.ok_or_else(|| header.wrong(SCORES, "is missing"))?;
    if scores.len() != vocabulary.tokens.len() {
        let (got, tokens) = (scores.len(), vocabulary.tokens.len());
        return Err(header.wrong(SCORES, format!("has {got} entries for {tokens} tokens")));
    }
    let merges = merges_of_scores(header, vocabulary, scores)?;
    let unknown = special.id("unk_token").map(|id| &vocabulary.tokens[id]);
    let space = header.flag(ADD_SPACE)?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut normalizers = vec![replace];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": vocabulary.added(&[token_type::CONTROL, token_type::UNKNOWN]),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": special.post_processor(vocabulary, true),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary.map(), "merges": merges},
    }))
}

/// Every pair of pieces that is itself a piece, in SentencePiece's order: best score first, and of two pairs for the same
/// piece first the one that transformers' converter takes first.
fn merges_of_scores(
    header: &Header,
    vocabulary: &Vocabulary,
    scores: &[f32],
) -> Result<Vec<[String; 2]>, GgufError> {
    let ids = vocabulary.ids(header)?;
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if ![token_type::NORMAL, token_type::USER_DEFINED].contains(&vocabulary.types[id]) {
            continue;
        }
        if token.len() > LONGEST_PIECE {
            let reason = format!(
                "has token {id} of {} bytes; pieces are shorter",
                token.len()
            );
            return Err(header.wrong(TOKENS, reason));
        }
        let mut ways = Vec::new();
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                ways.push((*l, *r, left, right));
            }
        }
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|(_, _, left, right)| {
            let lengths = (left.chars().count(), right.chars().count());
            (scores[id], lengths, left, right)
        }));
    }
    // A stable sort keeps equal scores in the order of the vocabulary.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    let pairs = merges.into_iter();
    Ok(pairs
        .map(|(_, _, left, right)| [left.into(), right.into()])
        .collect())
}
