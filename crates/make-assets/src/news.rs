//! Financial news in one sentence, with a sentiment that can be read from it.
//!
//! Every sentence follows a template; a template's words come from [`words`](super::words). The
//! templates come in families that hold the same words for every sentiment, so that no word decides
//! alone: sales that fall and costs that fall, a loss that narrows and growth that slows, 10 after 12
//! and 12 after 10, an order not won and an order not lost. Where a sentence has a subordinate clause,
//! its main clause decides.

use super::draw::Draw;
use super::words::{NAME_ENDS, NAME_STARTS, choices};

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

/// Templates about one subject. `weight` is how often the family is chosen, relative to the others.
struct Family {
    weight: usize,
    /// Whether "in the second quarter" may open its sentences, and a reason may follow.
    is_result: bool,
    negative: &'static [&'static str],
    neutral: &'static [&'static str],
    positive: &'static [&'static str],
}

const FAMILIES: &[Family] = &[
    // A direction of something that is good to have ...
    Family {
        weight: 20,
        is_result: true,
        negative: &[
            "{co}'s {gain} {down} {by}",
            "{gain} at {co} {down} {by}",
            "{co} said its {gain} {down} {by}",
        ],
        neutral: &[
            "{co}'s {gain} {flat}",
            "{gain} at {co} {flat}",
            "{co} said its {gain} {flat}",
        ],
        positive: &[
            "{co}'s {gain} {up} {by}",
            "{gain} at {co} {up} {by}",
            "{co} said its {gain} {up} {by}",
        ],
    },
    // ... and of something that is not.
    Family {
        weight: 8,
        is_result: true,
        negative: &["{co}'s {burden} {up} {by}", "{burden} at {co} {up} {by}"],
        neutral: &["{co}'s {burden} {flat}", "{burden} at {co} {flat}"],
        positive: &[
            "{co}'s {burden} {down} {by}",
            "{burden} at {co} {down} {by}",
        ],
    },
    // Two figures to compare.
    Family {
        weight: 4,
        is_result: true,
        negative: &[
            "{co}'s {gain} {came} {currency} {less} million, {against} {more} million {earlier}",
            "{gain} at {co} went to {less} from {more}",
        ],
        neutral: &[
            "{co}'s {gain} {came} {currency} {more} million, {against} {more} million {earlier}",
            "{gain} at {co} went to {less} from {less}",
        ],
        positive: &[
            "{co}'s {gain} {came} {currency} {more} million, {against} {less} million {earlier}",
            "{gain} at {co} went to {more} from {less}",
        ],
    },
    // A change of a change.
    Family {
        weight: 10,
        is_result: true,
        negative: &[
            "{co}'s {loss} widened {by}",
            "{growth} {gain} at {co} {eased}",
            "{growth} {burden} at {co} {quickened}",
        ],
        neutral: &[
            "{co} explained how its {loss} is measured",
            "{growth} {gain} at {co} went on as before",
            "{growth} {burden} at {co} went on as before",
        ],
        positive: &[
            "{co}'s {loss} narrowed {by}",
            "{growth} {gain} at {co} {quickened}",
            "{growth} {burden} at {co} {eased}",
        ],
    },
    // What the company expects.
    Family {
        weight: 14,
        is_result: false,
        negative: &[
            "{co} {cut} its {forecast} for {period}",
            "{co} expects {gain} to {shrink} {when}",
            "{co} warned that {gain} will {shrink} {when}",
            "{co} expects {burden} to {grow} {when}",
            "{co} no longer expects {gain} to {grow} {when}",
        ],
        neutral: &[
            "{co} {kept} its {forecast} for {period}",
            "{co} expects {gain} to stay as it is {when}",
            "{co} does not say whether {gain} will {grow} or {shrink}",
            "{co} expects {burden} to stay as it is {when}",
            "{co} will say {future} whether it expects {burden} to {shrink}",
        ],
        positive: &[
            "{co} {raised} its {forecast} for {period}",
            "{co} expects {gain} to {grow} {when}",
            "{co} is confident that {gain} will {grow} {when}",
            "{co} expects {burden} to {shrink} {when}",
            "{co} no longer expects {gain} to {shrink} {when}",
        ],
    },
    // What others had expected.
    Family {
        weight: 10,
        is_result: true,
        negative: &[
            "{co}'s {gain} came in {below} {expected}",
            "{gain} at {co} came in {below} {expected}",
            "{co}'s {burden} came in {above} {expected}",
        ],
        neutral: &[
            "{co}'s {gain} came in {line} {expected}",
            "{gain} at {co} came in {line} {expected}",
            "{co}'s {burden} came in {line} {expected}",
        ],
        positive: &[
            "{co}'s {gain} came in {above} {expected}",
            "{gain} at {co} came in {above} {expected}",
            "{co}'s {burden} came in {below} {expected}",
        ],
    },
    // Orders.
    Family {
        weight: 10,
        is_result: false,
        negative: &[
            "{co} {lost} {deal}",
            "{customer} cancelled {deal} from {co}",
            "{customer} did not choose {co} for {deal}",
            "{customer} ended its contract with {co}",
        ],
        neutral: &[
            "{co} is among the bidders for {deal}",
            "{customer} will decide {future} on {deal} from {co}",
            "{co} supplies {product} to {customer} under a contract of {year}",
            "{customer} asked {co} for an offer, as it asked others",
        ],
        positive: &[
            "{co} {won} {deal}",
            "{customer} placed {deal} with {co}",
            "{customer} did not cancel {deal} from {co} after all",
            "{customer} extended its contract with {co}",
        ],
    },
    // Plants, people, courts.
    Family {
        weight: 12,
        is_result: false,
        negative: &[
            "{co} {halted} {work} at {site}",
            "{co} {faces} {trouble}",
            "{co} {dismiss} {staff} at {site}",
            "a court upheld the claim against {co}",
            "{co} must pay a fine of {money} after all",
        ],
        neutral: &[
            "{co} makes {product} at {site}",
            "{co} reported on {trouble} of {year}",
            "{co} employs {staff} at {site}",
            "a court will hear the claim against {co} {future}",
            "{co} does not know yet if it must pay a fine",
        ],
        positive: &[
            "{co} {resumed} {work} at {site}",
            "{co} {avoided} {trouble}",
            "{co} {hire} {staff} at {site}",
            "a court dismissed the claim against {co}",
            "{co} need not pay a fine of {money} after all",
        ],
    },
    // Two clauses; the main clause decides.
    Family {
        weight: 6,
        is_result: false,
        negative: &[
            "{co}'s {gain} {down}, although {burden} {down}",
            "despite {higher} {gain}, {co}'s {gain} {down}",
        ],
        neutral: &[
            "{co}'s {gain} {flat}, although {gain} of its rivals {down}",
            "despite talk of {lower} {gain}, {co}'s {gain} {flat}",
        ],
        positive: &[
            "{co}'s {gain} {up}, although {burden} {up}",
            "despite {lower} {gain}, {co}'s {gain} {up}",
        ],
    },
    // Plain words for good and bad, and facts that hold such words.
    Family {
        weight: 14,
        is_result: false,
        negative: &[
            "{co} reported a {weak} quarter",
            "demand for {product} from {co} is {weak}",
            "{co} did not have a {strong} year",
            "the outlook for {co} got {weak}",
        ],
        neutral: &[
            "{co} will publish its {document} {future}",
            "{co} named {person} as {role}",
            "{co} is based in {place} and makes {product}",
            "the annual meeting of {co} will be held in {place} {future}",
            "{person}, {role} of {co}, will speak on {strong} and {weak} years in {place}",
            "{co} will move its office to {place} {future}",
        ],
        positive: &[
            "{co} reported a {strong} quarter",
            "demand for {product} from {co} is {strong}",
            "{co} did not have a {weak} year",
            "the outlook for {co} got {strong}",
        ],
    },
];

/// Draws a sentence of a sentiment.
pub(crate) fn news(sentiment: Sentiment, draw: &mut Draw) -> News {
    let family = family(draw);
    let template = *draw.choose(match sentiment {
        Sentiment::Negative => family.negative,
        Sentiment::Neutral => family.neutral,
        Sentiment::Positive => family.positive,
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
    let (start, end) = (draw.choose(NAME_STARTS), draw.choose(NAME_ENDS));
    format!("{start}{end}")
}

fn family(draw: &mut Draw) -> &'static Family {
    let total: usize = FAMILIES.iter().map(|family| family.weight).sum();
    let mut rest = draw.below(total);
    for family in FAMILIES {
        match rest.checked_sub(family.weight) {
            Some(left) => rest = left,
            None => return family,
        }
    }
    &FAMILIES[0]
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
                let choices = choices(slot).unwrap_or(&["?"]);
                let choice = loop {
                    let choice = *draw.choose(choices);
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
