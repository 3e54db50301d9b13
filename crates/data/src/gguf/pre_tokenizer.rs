//! How a text is split before BPE: llama.cpp names the rules, `tokenizer.json` holds them.

use serde_json::{Value as Json, json};

/// The rules of a byte-level tokenizer of a Llama-family model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    /// GPT-2's words.
    Gpt2,
    /// Digits one by one, then GPT-2's words (SmolLM, StarCoder).
    Digits,
    /// Llama 3's words, digits in groups of three.
    Llama3,
    /// Llama 3's words, digits one by one (Qwen 2, StableLM 2).
    Qwen2,
    /// Mistral's Tekken: words break where capitals begin.
    Tekken,
    /// llama.cpp's default for files without a name.
    Default,
}

/// llama.cpp's names, the main one of each family first.
const NAMES: [(&str, PreTokenizer); 15] = [
    ("gpt-2", PreTokenizer::Gpt2),
    ("phi-2", PreTokenizer::Gpt2),
    ("mpt", PreTokenizer::Gpt2),
    ("olmo", PreTokenizer::Gpt2),
    ("smollm", PreTokenizer::Digits),
    ("starcoder", PreTokenizer::Digits),
    ("refact", PreTokenizer::Digits),
    ("llama-bpe", PreTokenizer::Llama3),
    ("llama3", PreTokenizer::Llama3),
    ("llama-v3", PreTokenizer::Llama3),
    ("falcon3", PreTokenizer::Llama3),
    ("qwen2", PreTokenizer::Qwen2),
    ("stablelm2", PreTokenizer::Qwen2),
    ("tekken", PreTokenizer::Tekken),
    ("default", PreTokenizer::Default),
];

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The names of `tokenizer.ggml.pre` that are understood.
pub(super) fn known() -> Vec<&'static str> {
    NAMES.iter().map(|(name, _)| *name).collect()
}

impl PreTokenizer {
    pub fn of_llama_cpp(name: &str) -> Option<Self> {
        NAMES
            .iter()
            .find(|(other, _)| *other == name)
            .map(|(_, it)| *it)
    }

    pub fn llama_cpp_name(self) -> &'static str {
        let found = NAMES.iter().find(|(_, it)| *it == self);
        found.map_or("default", |(name, _)| name)
    }

    /// The family with these rules; differences without effect are ignored.
    pub fn of_json(json: &Json) -> Option<Self> {
        let rules = rules(json)?;
        let all = [
            Self::Gpt2,
            Self::Digits,
            Self::Llama3,
            Self::Qwen2,
            Self::Tekken,
            Self::Default,
        ];
        all.into_iter().find(|it| it.rules() == rules)
    }

    /// Whether tokenizers of this family add the BOS token unless the file turns this off.
    pub fn begins_with_bos(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    /// Whether a word that is a token is used as one token, whatever the merges are (`ignore_merges`).
    pub fn whole_words_first(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    fn rules(self) -> Vec<Rule> {
        let cut = |pattern: &str| Rule::Cut(pattern.into());
        match self {
            Self::Gpt2 => vec![cut(GPT2)],
            Self::Digits => vec![Rule::Digits, cut(GPT2)],
            Self::Llama3 => vec![cut(LLAMA3)],
            Self::Qwen2 => vec![cut(QWEN2)],
            Self::Tekken => vec![cut(TEKKEN)],
            Self::Default => vec![
                cut(r"[\p{P}\$\+<=>\^~\|]+"),
                cut(GPT2),
                cut(r"\p{N}+"),
                cut("[0-9][0-9][0-9]"),
            ],
        }
    }

    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub fn json(self) -> Json {
        let rules = self.rules();
        let byte_level = |regex: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": regex})
        };
        let (last, others) = rules.split_last().expect("every way has a rule");
        let mut steps: Vec<Json> = others.iter().map(Rule::json).collect();
        if last == &Rule::Cut(GPT2.into()) {
            steps.push(byte_level(true))
        } else {
            steps.extend([last.json(), byte_level(false)])
        }
        match &mut steps[..] {
            [one] => one.take(),
            _ => json!({"type": "Sequence", "pretokenizers": steps}),
        }
    }
}

/// A step before the bytes.
#[derive(Debug, PartialEq, Eq)]
enum Rule {
    /// Each match, and each text between matches, is a piece.
    Cut(String),
    /// Every digit is a piece.
    Digits,
}

impl Rule {
    fn json(&self) -> Json {
        match self {
            Self::Digits => json!({"type": "Digits", "individual_digits": true}),
            Self::Cut(pattern) => json!({"type": "Split", "pattern": {"Regex": pattern},
                "behavior": "Isolated", "invert": false}),
        }
    }
}

/// The rules of a `pre_tokenizer` that ends with `ByteLevel`; `None` if part of it is unknown.
fn rules(json: &Json) -> Option<Vec<Rule>> {
    let kind = json.get("type")?.as_str()?;
    let steps = match kind {
        "Sequence" => json.get("pretokenizers")?.as_array()?.iter().collect(),
        _ => vec![json],
    };
    let (last, others) = steps.split_last()?;
    let mut rules = Vec::new();
    for step in others {
        rules.push(match step.get("type")?.as_str()? {
            "Digits" if step.get("individual_digits")?.as_bool()? => Rule::Digits,
            "Split"
                if step.get("behavior")?.as_str()? == "Isolated"
                    && !step.get("invert")?.as_bool()? =>
            {
                Rule::Cut(step.get("pattern")?.get("Regex")?.as_str()?.into())
            }
            _ => return None,
        });
    }
    let flag = |key: &str, default: bool| last.get(key).map_or(Some(default), Json::as_bool);
    if last.get("type")?.as_str()? != "ByteLevel" || flag("add_prefix_space", true)? {
        return None;
    }
    if flag("use_regex", true)? {
        rules.push(Rule::Cut(GPT2.into()));
    }
    Some(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_recognised_in_what_it_is_written_as() {
        for (name, it) in NAMES {
            assert_eq!(PreTokenizer::of_json(&it.json()), Some(it), "{name}");
            assert_eq!(PreTokenizer::of_llama_cpp(name), Some(it));
            assert_eq!(PreTokenizer::of_llama_cpp(it.llama_cpp_name()), Some(it));
        }
        assert_eq!(PreTokenizer::of_llama_cpp("deepseek-llm"), None);
    }

    #[test]
    fn rules_that_llama_cpp_has_no_name_for_are_none() {
        for json in [
            json!(null),
            json!({"type": "Whitespace"}),
            json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}),
            json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}),
            json!({"type": "Sequence", "pretokenizers": []}),
        ] {
            assert_eq!(PreTokenizer::of_json(&json), None, "{json}");
        }
    }
}
