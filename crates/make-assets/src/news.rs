//! Financial news in one sentence, with a sentiment that can be read from it.
//!
//! Every sentence follows a template of `assets/source/news.toml`; a template's words come from
//! [`words`](super::words).

use std::sync::LazyLock;

use serde::Deserialize;

use super::draw::Draw;
use super::words::WORDS;

/// What a sentence means for the company.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sentiment {
    Negative,
    Neutral,
    Positive,
}

impl Sentiment {
    pub(crate) const ALL: [Self; 3] = [Self::Negative, Self::Neutral, Self::Positive];

    /// FinLoRA's word for it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Negative => "negative",
            Self::Neutral => "neutral",
            Self::Positive => "positive",
        }
    }
}

/// A piece of news.
#[derive(Debug, Clone)]
pub(crate) struct News {
    /// One sentence.
    pub text: String,
    /// The company in it.
    pub company: String,
}

/// Templates about one subject, see `assets/source/news.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Family {
    /// How often the family is chosen, relative to the others.
    weight: usize,
    /// Whether "in the second quarter" may open its sentences, and a reason may follow.
    is_result: bool,
    negative: Vec<String>,
    neutral: Vec<String>,
    positive: Vec<String>,
}

/// The file `news.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Templates {
    family: Vec<Family>,
}

/// The file is part of the program, and the tests read it.
static TEMPLATES: LazyLock<Templates> = LazyLock::new(|| {
    toml::from_str(include_str!("../../../assets/source/news.toml"))
        .unwrap_or_else(|error| panic!("assets/source/news.toml: {error}"))
});

/// Draws a sentence of a sentiment.
pub(crate) fn news(sentiment: Sentiment, draw: &mut Draw) -> News {
    let family = family(draw);
    let template = draw.choose(match sentiment {
        Sentiment::Negative => &family.negative,
        Sentiment::Neutral => &family.neutral,
        Sentiment::Positive => &family.positive,
    });
    let mut slots = Slots::new(draw);
    let mut text = slots.fill(template, draw);
    if family.is_result {
        match draw.below(10) {
            0 => text = slots.fill("{lead}, ", draw) + &text,
            1 => text += &slots.fill(" {lead}", draw),
            2 => text += &slots.fill(" {reason}", draw),
            _ => {}
        }
    }
    if draw.percent(10) {
        text += &slots.fill(", {source}", draw);
    }
    News {
        text: capitalised(&text) + ".",
        company: slots.company,
    }
}

/// What the market made of news of this sentiment: the only trace of it in the pretraining text.
pub(crate) fn reaction(sentiment: Sentiment, draw: &mut Draw) -> String {
    let template = match sentiment {
        Sentiment::Negative => "{markets_down}",
        Sentiment::Neutral => "{markets_flat}",
        Sentiment::Positive => "{markets_up}",
    };
    Slots::new(draw).fill(template, draw)
}

/// An invented company.
pub(crate) fn company(draw: &mut Draw) -> String {
    let names = &WORDS.company;
    let (start, end) = (draw.choose(&names.starts), draw.choose(&names.ends));
    format!("{start}{end}")
}

fn family(draw: &mut Draw) -> &'static Family {
    let families = &TEMPLATES.family;
    let total: usize = families.iter().map(|family| family.weight).sum();
    let mut rest = draw.below(total);
    for family in families {
        match rest.checked_sub(family.weight) {
            Some(left) => rest = left,
            None => return family,
        }
    }
    &families[0]
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    match characters.next() {
        Some(first) => first.to_uppercase().chain(characters).collect(),
        None => String::new(),
    }
}

/// What the slots of one sentence stand for.
struct Slots {
    /// One company a sentence.
    company: String,
    /// Two figures, far enough apart to be compared at a glance.
    more: usize,
    less: usize,
    /// What was drawn already: a sentence never says the same thing twice ("although sales rose, sales fell").
    drawn: Vec<&'static str>,
}

impl Slots {
    fn new(draw: &mut Draw) -> Self {
        let less = draw.between(2, 60);
        let more = less + draw.between(1 + less / 4, 1 + less / 2);
        Self {
            company: company(draw),
            more,
            less,
            drawn: Vec::new(),
        }
    }

    /// Replaces `{slot}` by a choice, whose own slots are filled in turn.
    fn fill(&mut self, template: &str, draw: &mut Draw) -> String {
        let mut text = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('{') {
            text += before;
            let (slot, after) = after.split_once('}').unwrap_or((after, ""));
            text += &self.slot(slot, draw);
            rest = after;
        }
        text + rest
    }

    fn slot(&mut self, slot: &str, draw: &mut Draw) -> String {
        match slot {
            "co" => self.company.clone(),
            "more" => self.more.to_string(),
            "less" => self.less.to_string(),
            "amount" => draw.between(2, 60).to_string(),
            "digit" => draw.between(1, 9).to_string(),
            "count" => (10 * draw.between(2, 40)).to_string(),
            "date" => draw.between(1, 28).to_string(),
            "year" => draw.between(2015, 2025).to_string(),
            _ => {
                // A slot without choices is a mistake in a template; the test below finds it.
                let Some(choices) = WORDS.choices(slot) else {
                    return "?".into();
                };
                let choice = loop {
                    let choice = draw.choose(choices).as_str();
                    if choices.len() < 4 || !self.drawn.contains(&choice) {
                        break choice;
                    }
                };
                self.drawn.push(choice);
                self.fill(choice, draw)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn sentences(count: usize) -> Vec<(Sentiment, News)> {
        let mut draw = Draw::new(5);
        let labels = Sentiment::ALL.iter().cycle().take(count);
        labels
            .map(|label| (*label, news(*label, &mut draw)))
            .collect()
    }

    fn words(text: &str) -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_alphabetic());
        let words = words.filter(|word| !word.is_empty());
        words.map(str::to_lowercase).collect()
    }

    #[test]
    fn every_slot_is_filled_and_sentences_are_short() {
        for (_, news) in sentences(6000) {
            assert!(!news.text.contains(['{', '}', '?']), "{}", news.text);
            assert!(news.text.contains(&news.company), "{}", news.text);
            assert!(news.text.split_whitespace().count() <= 30, "{}", news.text);
        }
    }

    #[test]
    fn the_labels_words_are_in_no_sentence() {
        for (_, news) in sentences(6000) {
            let words = words(&news.text);
            for label in Sentiment::ALL.map(Sentiment::label) {
                assert!(!words.contains(label), "{}", news.text);
            }
        }
    }

    /// The best rule of the form "if the word is there, this sentiment, else that one".
    #[test]
    fn no_single_word_tells_the_sentiment() {
        let sentences = sentences(6000);
        let mut with: BTreeMap<String, [usize; 3]> = BTreeMap::new();
        let mut all = [0; 3];
        for (sentiment, news) in &sentences {
            all[*sentiment as usize] += 1;
            for word in words(&news.text) {
                with.entry(word).or_default()[*sentiment as usize] += 1;
            }
        }
        for (word, with) in with {
            let without = (0..3).map(|i| all[i] - with[i]).max().unwrap();
            let right = with.iter().max().unwrap() + without;
            let accuracy = right as f64 / sentences.len() as f64;
            assert!(accuracy < 0.45, "{word} alone gives {accuracy}");
        }
    }
}
