//! The embedded tokenizer: byte-level BPE (Sennrich et al., 2016, <https://arxiv.org/abs/1508.07909>),
//! trained with Hugging Face's `tokenizers`.

use std::collections::HashSet;

use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

use super::corpus::document;
use super::draw::Draw;
use super::error::MakeAssetsError;

/// Entries of the vocabulary, including the 256 bytes and three special tokens.
pub(crate) const VOCABULARY: usize = 1_280;

/// Documents to train on: enough that every word of the grammar becomes a token of its own.
const DOCUMENTS: usize = 12_000;

/// The first token of every sequence.
pub(crate) const BEGIN: &str = "<|begin_of_text|>";
/// The last token of every sequence.
pub(crate) const END: &str = "<|end_of_text|>";
const PAD: &str = "<|pad|>";
/// The special tokens; their ids are their indices.
const SPECIAL: [&str; 3] = [BEGIN, END, PAD];

/// Trains the tokenizer on documents drawn from `draw`, without the sentences in `held_out`.
///
/// Merges of equal counts are taken in the order of their ids, and the words are counted, so
/// neither threads nor hash maps affect the result.
pub(crate) fn train(
    draw: &mut Draw,
    held_out: &HashSet<String>,
) -> Result<Tokenizer, MakeAssetsError> {
    let failed = |error: tokenizers::Error| MakeAssetsError::Tokenizer(error.to_string());
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
        .build();
    let documents = (0..DOCUMENTS).flat_map(|_| {
        let document = document(draw, held_out);
        [document.prompt, document.answer]
    });
    let bytes = || ByteLevel::new(false, true, true);
    let mut builder: tokenizers::TokenizerImpl<
        BPE,
        NormalizerWrapper,
        ByteLevel,
        TemplateProcessing,
        ByteLevelDecoder,
    > = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(bytes()))
        .with_post_processor(Some(begins_with_begin()?))
        .with_decoder(Some(bytes()))
        .build()
        .map_err(failed)?;
    builder
        .train(&mut trainer, documents.collect::<Vec<_>>().into_iter())
        .map_err(failed)?;
    let text = builder.to_string(false).map_err(failed)?;
    text.parse().map_err(failed)
}

/// As in Llama 3: a sequence starts with [`BEGIN`], and nothing is appended.
fn begins_with_begin() -> Result<TemplateProcessing, MakeAssetsError> {
    TemplateProcessing::builder()
        .try_single(format!("{BEGIN} $A"))
        .and_then(|builder| builder.try_pair(format!("{BEGIN} $A {BEGIN}:1 $B:1")))
        .map_err(|error| MakeAssetsError::Tokenizer(error.to_string()))?
        .special_tokens(vec![(BEGIN.to_string(), 0u32)])
        .build()
        .map_err(|error| MakeAssetsError::Tokenizer(error.to_string()))
}

/// The files that transformers expects beside a model: name and text.
pub(crate) fn files(
    tokenizer: &Tokenizer,
    max_position_embeddings: usize,
) -> Result<Vec<(&'static str, String)>, MakeAssetsError> {
    let json = tokenizer.to_string(true);
    let json = json.map_err(|error| MakeAssetsError::Tokenizer(error.to_string()))?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": false,
        "model_max_length": max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
    });
    let special = json!({ "bos_token": BEGIN, "eos_token": END, "pad_token": PAD });
    Ok(vec![
        ("tokenizer.json", json + "\n"),
        ("tokenizer_config.json", pretty(&config)),
        ("special_tokens_map.json", pretty(&special)),
    ])
}

/// JSON with indentation, ending with a line break.
pub(crate) fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::super::corpus::sentiment_prompt;
    use super::*;

    #[test]
    fn training_twice_gives_the_same_tokenizer_byte_for_byte() {
        let made = || {
            train(&mut Draw::new(2), &HashSet::new())
                .unwrap()
                .to_string(true)
                .unwrap()
        };
        let first = made();
        assert_eq!(first, made());
    }

    #[test]
    fn the_prompt_is_short_and_every_label_is_one_token() {
        let tokenizer = train(&mut Draw::new(2), &HashSet::new()).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), VOCABULARY);
        for label in [
            "negative",
            "neutral",
            "positive",
            " negative",
            " neutral",
            " positive",
        ] {
            assert_eq!(
                tokenizer.encode(label, false).unwrap().len(),
                1,
                "{label:?}"
            );
        }
        let prompt = sentiment_prompt("Norvane's net sales fell by 12 %, the company said.");
        let tokens = tokenizer.encode(prompt.as_str(), true).unwrap();
        assert_eq!(tokens.get_tokens()[0], BEGIN);
        assert!(tokens.len() <= 45, "{:?}", tokens.get_tokens());
        assert_eq!(tokenizer.decode(tokens.get_ids(), true).unwrap(), prompt);
    }
}
