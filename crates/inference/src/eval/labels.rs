//! The possible answers of a task, and how a text becomes one of them.

use std::collections::BTreeSet;

/// More distinct targets than this are free text, not labels.
const MOST_LABELS: usize = 32;

/// FinLoRA's mark between a prompt and its answer.
pub(super) const DELIMITER: &str = "Answer:";

/// The possible answers, from a file's targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answers {
    /// Sorted, without duplicates and surrounding white space.
    pub all: Vec<String>,
    /// Whether they are labels: few, known in advance, each the target of several examples.
    /// Otherwise free text.
    pub are_labels: bool,
    /// `all` in lower case, for [`first_found`](Self::first_found).
    lower: Vec<String>,
}

impl Answers {
    /// From the targets of a file: labels if at most 32 are distinct and there are twice as many
    /// examples.
    pub fn of_targets<'a>(targets: impl Iterator<Item = &'a str>) -> Self {
        let mut rows = 0;
        let all: BTreeSet<&str> = targets.inspect(|_| rows += 1).map(str::trim).collect();
        let are_labels = all.len() <= MOST_LABELS && 2 * all.len() <= rows;
        Self::new(all.into_iter().map(String::from).collect(), are_labels)
    }

    /// The given labels.
    pub fn of_labels(labels: &[String]) -> Self {
        let all: BTreeSet<&str> = labels.iter().map(|label| label.trim()).collect();
        Self::new(all.into_iter().map(String::from).collect(), true)
    }

    /// Free texts.
    pub fn of_texts<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let all: BTreeSet<&str> = texts.map(str::trim).collect();
        Self::new(all.into_iter().map(String::from).collect(), false)
    }

    /// Free texts with their white space.
    pub(super) fn verbatim<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let all: BTreeSet<&str> = texts.collect();
        Self::new(all.into_iter().map(String::from).collect(), false)
    }

    fn new(all: Vec<String>, are_labels: bool) -> Self {
        Self {
            lower: all.iter().map(|answer| answer.to_lowercase()).collect(),
            all,
            are_labels,
        }
    }

    /// The answer that equals a text, ignoring surrounding white space.
    pub fn exact(&self, text: &str) -> Option<usize> {
        let text = text.trim();
        self.all
            .binary_search_by(|answer| answer.as_str().cmp(text))
            .ok()
    }

    /// FinLoRA's rule (`evaluate_accuracy` in its `test/test_dataset.py`): in lower case, the answer whose
    /// first occurrence in the text is the earliest.
    ///
    /// If two answers start at the same place, FinLoRA takes the first in its hash set, which
    /// varies from run to run; here it is the longer one.
    pub fn first_found(&self, text: &str) -> Option<usize> {
        let text = text.to_lowercase();
        let found = self.lower.iter().enumerate().filter_map(|(index, answer)| {
            let at = text.find(answer.as_str())?;
            Some((at, std::cmp::Reverse(answer.len()), index))
        });
        found.min().map(|(_, _, index)| index)
    }

    /// Whether two answers are the same to [`first_found`](Self::first_found), which ignores case.
    pub fn same_in_lower_case(&self, a: usize, b: usize) -> bool {
        self.lower[a] == self.lower[b]
    }
}

/// The part of a decoded sequence that FinLoRA takes for the answer (`inference` in its
/// `test/inference.py`): the text after the last `Answer:` of prompt and continuation, without
/// surrounding white space.
///
/// If a prompt lacks that mark, FinLoRA would look for labels in the prompt itself; here the answer
/// is then the continuation. The same holds with a prompt template (`prompt` is `None`), which
/// FinLoRA does not use: the template's text after the context is not part of an answer.
pub fn finlora_answer<'a>(whole: &'a str, prompt: Option<&str>, continuation: &'a str) -> &'a str {
    let text = if prompt.is_some_and(|prompt| prompt.contains(DELIMITER)) {
        whole
    } else {
        continuation
    };
    let answer = text.rsplit(DELIMITER).next().unwrap_or(text);
    answer.trim_matches(is_python_space)
}

/// White space of Python's `str.strip`: Unicode's, and four control characters that Unicode does
/// not include.
pub(super) fn is_python_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentiment() -> Answers {
        Answers::of_labels(&["positive", "negative", "neutral"].map(String::from))
    }

    fn found<'a>(answers: &'a Answers, text: &str) -> Option<&'a str> {
        answers
            .first_found(text)
            .map(|index| answers.all[index].as_str())
    }

    #[test]
    fn the_first_label_found_wins_whatever_its_case_and_wherever_it_stands() {
        let answers = sentiment();
        for (text, label) in [
            ("Positive, not negative", Some("positive")),
            ("not NEGATIVE but positive", Some("negative")),
            ("nonneutral", Some("neutral")),
            ("it is\nneutral.", Some("neutral")),
            ("good", None),
            ("", None),
        ] {
            assert_eq!(found(&answers, text), label, "{text:?}");
        }
    }

    #[test]
    fn of_labels_that_begin_at_the_same_place_the_longer_is_meant() {
        let answers = Answers::of_labels(&["no", "not sure", "yes"].map(String::from));
        assert_eq!(found(&answers, "Not sure, yes"), Some("not sure"));
        assert_eq!(found(&answers, "No, yes"), Some("no"));
    }

    #[test]
    fn the_strict_rule_forgives_white_space_and_nothing_else() {
        let answers = sentiment();
        assert_eq!(answers.exact(" neutral\n"), Some(1));
        for text in ["Neutral", "neutral.", "neutral positive", ""] {
            assert_eq!(answers.exact(text), None, "{text:?}");
        }
    }

    #[test]
    fn few_targets_that_repeat_are_labels_and_others_free_text() {
        let targets = ["b", " a", "b ", "a"];
        let answers = Answers::of_targets(targets.into_iter());
        assert_eq!(answers.all, ["a", "b"]);
        assert!(answers.are_labels);
        assert!(!Answers::of_targets(["a", "b", "b"].into_iter()).are_labels);
        let many: Vec<String> = (0..100).map(|n| (n % 33).to_string()).collect();
        assert!(!Answers::of_targets(many.iter().map(String::as_str)).are_labels);
    }

    #[test]
    fn the_answer_follows_the_last_mark() {
        let prompt = "Input: x {a/b}\nAnswer: ";
        let whole = "Input: x {a/b}\nAnswer: a\n\nAnswer: b ";
        assert_eq!(finlora_answer(whole, Some(prompt), "a\n\nAnswer: b "), "b");
        let unmarked = "Is it a or b?";
        assert_eq!(finlora_answer("Is it a or b? b", Some(unmarked), " b"), "b");
        // After a template's own words.
        let whole = "[INST] Answer: [/INST] a \u{1c}";
        assert_eq!(finlora_answer(whole, None, " a \u{1c}"), "a");
    }

    #[test]
    fn labels_that_differ_in_case_only_are_the_same_to_finlora() {
        let answers = Answers::of_labels(&["Yes", "yes", "no"].map(String::from));
        let (upper, lower) = (answers.exact("Yes").unwrap(), answers.exact("yes").unwrap());
        assert!(answers.same_in_lower_case(upper, lower));
        assert!(!answers.same_in_lower_case(upper, answers.exact("no").unwrap()));
    }
}
