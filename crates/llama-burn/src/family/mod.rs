//! Model families: what distinguishes a Mistral or a Qwen from a Llama, one file per family.
//!
//! A family's file names its `model_type`, its class in transformers and its architecture in llama.cpp, and fills in
//! [`Traits`] from `config.json`. Everything else (loading, LoRA targets, GGUF, the memory plan, merging, checks) reads
//! [`LlamaConfig`](crate::LlamaConfig), which holds the traits. `docs/how-to-add-a-family.md` adds one step by step.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod windows;

use std::fmt;

use crate::ConfigError;
use crate::keys::Keys;

pub use llama::LLAMA;

/// Every family, in the order of error messages. Where several share llama.cpp's architecture, files of that
/// architecture are read as the first.
static FAMILIES: [&Family; 4] = [&LLAMA, &mistral::MISTRAL, &qwen2::QWEN2, &qwen3::QWEN3];

/// A model family.
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class in transformers, as in `architectures` in `config.json`.
    pub class: &'static str,
    /// `general.architecture` of a GGUF file, which is also the prefix of its keys.
    pub gguf_architecture: &'static str,
    /// Whether llama.cpp rotates neighbouring pairs of a head's elements, so that rows of queries and keys have another
    /// order in a GGUF file.
    pub gguf_rotates_pairs: bool,
    /// Values that transformers' configuration class takes for keys that `config.json` lacks; only those that differ
    /// from a Llama's.
    pub(crate) defaults: &'static [(&'static str, u64)],
    /// Reads what distinguishes the model from the keys of `config.json`.
    pub(crate) traits: fn(&Keys) -> Result<Traits, ConfigError>,
}

/// What a decoder layer has besides the weights that every family has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Traits {
    /// Which linear modules have a bias.
    pub biases: Biases,
    /// Whether each head's queries and keys are normalized before they are rotated (`q_norm`, `k_norm`).
    pub query_key_norm: bool,
    /// The sliding window of each layer in tokens: a token attends to so many tokens, itself included. `None` means all
    /// earlier tokens; so does an empty list.
    pub windows: Vec<Option<usize>>,
}

/// Which linear modules of a decoder layer have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)] // Hugging Face's names, without `_proj`.
pub struct Biases {
    pub q: bool,
    pub k: bool,
    pub v: bool,
    pub o: bool,
    pub gate: bool,
    pub up: bool,
    pub down: bool,
}

impl Traits {
    /// The windows of a model for sequences of at most `positions` tokens: without those that are not shorter.
    pub(crate) fn effective_windows(self, positions: usize) -> Vec<Option<usize>> {
        let shorter = |window: Option<usize>| window.filter(|window| *window < positions);
        let windows: Vec<_> = self.windows.into_iter().map(shorter).collect();
        if windows.iter().any(Option::is_some) {
            windows
        } else {
            Vec::new()
        }
    }
}

impl Biases {
    /// Biases of all modules of a block or of none.
    pub fn of_blocks(attention: bool, mlp: bool) -> Self {
        Self {
            q: attention,
            k: attention,
            v: attention,
            o: attention,
            gate: mlp,
            up: mlp,
            down: mlp,
        }
    }
}

impl Family {
    /// The family of this `model_type`.
    pub fn of_model_type(model_type: &str) -> Option<&'static Self> {
        FAMILIES
            .into_iter()
            .find(|family| family.model_type == model_type)
    }

    /// The family that a GGUF file of this architecture is read as.
    pub fn of_gguf(architecture: &str) -> Option<&'static Self> {
        let mut families = FAMILIES.into_iter();
        families.find(|family| family.gguf_architecture == architecture)
    }

    /// The `model_type`s of all families: `"llama", "mistral"`.
    pub fn model_types() -> String {
        quoted(FAMILIES.map(|family| family.model_type))
    }

    /// llama.cpp's architectures that can be read, as [`model_types`](Self::model_types).
    pub fn gguf_architectures() -> String {
        quoted(FAMILIES.map(|family| family.gguf_architecture))
    }
}

/// The page that explains how a family is added.
pub(crate) const HOW_TO_ADD: &str = "docs/how-to-add-a-family.md";

fn quoted<const N: usize>(words: [&str; N]) -> String {
    let mut quoted: Vec<String> = Vec::new();
    for word in words.map(|word| format!("{word:?}")) {
        if !quoted.contains(&word) {
            quoted.push(word);
        }
    }
    quoted.join(", ")
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.model_type)
    }
}
