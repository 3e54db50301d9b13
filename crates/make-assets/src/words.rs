//! The words that sentences are made of: `assets/source/words.toml`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;

/// The words of `words.toml`, in the file's order.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Words {
    pub company: CompanyNames,
    slots: BTreeMap<String, Vec<String>>,
}

/// First and second halves of company names.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CompanyNames {
    pub starts: Vec<String>,
    pub ends: Vec<String>,
}

impl Words {
    /// The choices for a slot of a template; `None` if there is no such slot. A choice may hold slots
    /// itself.
    pub fn choices(&self, slot: &str) -> Option<&[String]> {
        self.slots.get(slot).map(Vec::as_slice)
    }
}

/// The file is part of the program, and a test reads it.
pub(crate) static WORDS: LazyLock<Words> = LazyLock::new(|| {
    toml::from_str(include_str!("../../../assets/source/words.toml"))
        .unwrap_or_else(|error| panic!("assets/source/words.toml: {error}"))
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_list_has_words() {
        assert!(!WORDS.company.starts.is_empty() && !WORDS.company.ends.is_empty());
        for (slot, choices) in &WORDS.slots {
            assert!(!choices.is_empty(), "{slot}");
        }
        assert_eq!(WORDS.choices("no-such-slot"), None);
    }
}
