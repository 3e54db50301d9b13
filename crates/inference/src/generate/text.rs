//! A sequence's text as it grows: pieces of whole characters, and the stop strings.

use tokenizers::Tokenizer;

use data::contained::decoded;

/// The tokenizer's text for bytes that are not (yet) a character.
const INCOMPLETE: char = '\u{fffd}';

/// The most tokens without text that are kept as context.
const LONGEST_CONTEXT: usize = 32;

/// A sequence's tokens so far, as text.
#[derive(Debug, Clone, Default)]
pub(super) struct GrowingText {
    ids: Vec<u32>,
    /// The text of the tokens `ids[..known]`, which can no longer change.
    text: String,
    /// Tokens before this one have been returned, or are context for later ones.
    start: usize,
    known: usize,
    /// How much of `text` has been returned.
    given: usize,
}

impl GrowingText {
    /// Adds a token. An id that is not in the tokenizer, as in a padded vocabulary, adds no text.
    pub(super) fn push(&mut self, id: u32, tokenizer: &Tokenizer) {
        self.ids.push(id);
        // Tokens are decoded together with some earlier ones, because a token's text may depend on
        // its neighbours: a space before a word is dropped at the beginning of a text.
        let before = decode(tokenizer, &self.ids[self.start..self.known]);
        let now = decode(tokenizer, &self.ids[self.start..]);
        if now.ends_with(INCOMPLETE) && self.ids.len() - self.known < 8 {
            return;
        }
        match now.strip_prefix(before.as_str()) {
            // Tokens without text of their own, such as special tokens, are not a context: a space
            // after them would be taken for the first of a text. The number is limited, because
            // each is decoded again every time.
            Some("") if self.ids.len() - self.start < LONGEST_CONTEXT => {}
            Some(new) => {
                self.text.push_str(new);
                self.start = self.known;
            }
            // A decoder that rewrites earlier text: start again with this token.
            None => {
                self.text += &decode(tokenizer, &self.ids[self.known..]);
                self.start = self.known;
            }
        }
        self.known = self.ids.len();
    }

    /// The text that can be shown and has not been returned; without an ending that may become a
    /// stop string.
    pub(super) fn take(&mut self, stop: &[String]) -> &str {
        let held = stop.iter().map(|stop| overlap(&self.text, stop)).max();
        let end = self.text.len() - held.unwrap_or(0);
        let start = self.given.min(end);
        self.given = end.max(self.given);
        &self.text[start..end]
    }

    /// If a stop string occurs, ends the text before the first of them.
    pub(super) fn stops(&mut self, stop: &[String]) -> bool {
        let found = stop.iter().filter_map(|stop| self.text.find(stop.as_str()));
        match found.min() {
            Some(at) => {
                self.text.truncate(at);
                true
            }
            None => false,
        }
    }

    /// The end of the text: an incomplete character stays incomplete.
    pub(super) fn finish(&mut self, tokenizer: &Tokenizer) {
        let before = decode(tokenizer, &self.ids[self.start..self.known]);
        let now = decode(tokenizer, &self.ids[self.start..]);
        if let Some(new) = now.strip_prefix(before.as_str()) {
            self.text.push_str(new);
        }
        self.known = self.ids.len();
        self.start = self.known;
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

/// Special tokens have no text.
fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    decoded(tokenizer, ids, true)
}

/// Bytes at the end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let lengths = stop
        .char_indices()
        .map(|(at, _)| at)
        .filter(|at| *at > 0 && *at <= text.len());
    let fits = |length: &usize| text.as_bytes().ends_with(&stop.as_bytes()[..*length]);
    lengths.filter(fits).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as tokens: the fallback of a byte-level tokenizer.
    fn bytes() -> Tokenizer {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut alphabet: Vec<char> = alphabet.into_iter().collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<String, serde_json::Value> = (0u32..)
            .zip(alphabet)
            .map(|(id, token)| (token.to_string(), id.into()))
            .collect();
        let model = serde_json::json!({"type": "BPE", "vocab": vocab, "merges": []});
        let model: tokenizers::models::bpe::BPE = serde_json::from_str(&model.to_string()).unwrap();
        let mut tokenizer = Tokenizer::new(model);
        let level = tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, true, false);
        tokenizer.with_pre_tokenizer(Some(level));
        tokenizer.with_decoder(Some(level));
        tokenizer
    }

    fn shown(text: &str, stop: &[&str]) -> (Vec<String>, String, bool) {
        let tokenizer = bytes();
        let stop: Vec<String> = stop.iter().map(|stop| stop.to_string()).collect();
        let mut growing = GrowingText::default();
        let mut pieces = Vec::new();
        let mut stopped = false;
        for id in tokenizer.encode(text, false).unwrap().get_ids() {
            growing.push(*id, &tokenizer);
            stopped = growing.stops(&stop);
            pieces.push(growing.take(if stopped { &[] } else { &stop }).to_string());
            if stopped {
                break;
            }
        }
        if !stopped {
            growing.finish(&tokenizer);
            pieces.push(growing.take(&[]).to_string());
        }
        (pieces, growing.text().to_string(), stopped)
    }

    #[test]
    fn pieces_are_whole_characters_and_add_up_to_the_text() {
        for text in ["plain", "fünf €, 日本語", "👩‍🚀 done"] {
            let (pieces, whole, _) = shown(text, &[]);
            assert_eq!(pieces.concat(), text);
            assert_eq!(whole, text);
            assert!(pieces.iter().all(|piece| !piece.contains(INCOMPLETE)));
        }
    }

    /// A tokenizer like Llama 2's: a space is ▁, the first space of a text is dropped, unknown
    /// characters are bytes.
    fn sentence_pieces() -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        for token in ["</s>", "▁", "▁a", "b", "▁▁"] {
            vocab.insert(token.into(), vocab.len().into());
        }
        for byte in 0..256 {
            vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
        }
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null,
            "added_tokens": [{"id": 0, "content": "</s>", "single_word": false, "lstrip": false,
                              "rstrip": false, "normalized": false, "special": true}],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true, "unk_token": "</s>"},
        });
        json.to_string().parse().unwrap()
    }

    #[test]
    fn pieces_add_up_to_what_the_tokenizer_makes_of_all_tokens() {
        let tokenizer = sentence_pieces();
        let bytes = |text: &str| text.bytes().map(|byte| 5 + byte as u32).collect::<Vec<_>>();
        for ids in [
            vec![2, 3, 2, 2],
            // A special token in the middle: the space after it is not the first of a text.
            vec![2, 0, 2, 3],
            vec![0, 0, 2, 0, 2],
            vec![1, 2, 4, 4, 1, 3],
            [vec![2], bytes("€"), vec![2], bytes("日"), bytes("本")].concat(),
            // Bytes that are not a character, in the middle and at the end.
            [
                vec![2],
                bytes("€")[..2].to_vec(),
                vec![2],
                bytes("€")[..1].to_vec(),
            ]
            .concat(),
            [vec![2, 5 + 0xFF, 5 + 0xFE], vec![5 + 0xFF; 20], vec![2]].concat(),
        ] {
            let mut growing = GrowingText::default();
            let mut pieces = String::new();
            for id in &ids {
                growing.push(*id, &tokenizer);
                pieces += growing.take(&[]);
            }
            growing.finish(&tokenizer);
            pieces += growing.take(&[]);
            let whole = tokenizer.decode(&ids, true).unwrap();
            assert_eq!(pieces, whole, "{ids:?}");
            assert_eq!(growing.text(), whole);
        }
    }

    #[test]
    fn a_stop_string_ends_the_text_and_none_of_it_is_shown() {
        let (pieces, whole, stopped) = shown("one\n\nUser: two", &["\n\nUser:", "zzz"]);
        assert!(stopped);
        assert_eq!(whole, "one");
        assert_eq!(pieces.concat(), "one");
    }

    #[test]
    fn what_only_began_like_a_stop_string_is_shown_later() {
        let (pieces, whole, stopped) = shown("a ##b #", &["###"]);
        assert!(!stopped);
        assert_eq!(
            (pieces.concat(), whole),
            ("a ##b #".into(), "a ##b #".into())
        );
        assert_eq!(pieces[2], "", "the first # may be a stop string");
    }
}
