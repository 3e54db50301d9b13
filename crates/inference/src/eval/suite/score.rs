//! Scores of answers: texts compared with texts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::labels::Answers;
use super::super::metrics::share;
use super::super::statistics::wilson;

/// The scores of one rule for a task's answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SuiteScores {
    /// Answers; each item of a list counts.
    pub answers: usize,
    /// Correct answers.
    pub correct: usize,
    /// Their share.
    pub accuracy: f64,
    /// The accuracy's 95 % interval (Wilson).
    pub interval: [f64; 2],
    /// scikit-learn's `f1_score(targets, answers, average="weighted")`.
    pub weighted_f1: f64,
}

/// FinLoRA's rule (`evaluate_accuracy` in its `test/test_dataset.py`): the answer is the first of
/// all examples' targets that occurs in the text, ignoring case. For F1, a correct answer counts as
/// its target, any other as the whole text.
///
/// If two targets start at the same place, FinLoRA takes the first in its hash set; here it is the
/// longer one.
///
/// # Panics
///
/// If there are not as many answers as targets.
pub fn finlora_scores(targets: &[&str], answers: &[&str]) -> SuiteScores {
    let all = Answers::verbatim(targets.iter().copied());
    let is_right = |target: &str, answer: &str| {
        let found = all.first_found(answer);
        found.is_some_and(|found| all.all[found].to_lowercase() == target.to_lowercase())
    };
    scores(targets, answers, &is_right)
}

/// The strict rule: an answer is correct if it equals the target, ignoring surrounding white space.
///
/// # Panics
///
/// If there are not as many answers as targets.
pub fn strict_scores(targets: &[&str], answers: &[&str]) -> SuiteScores {
    let targets: Vec<&str> = targets.iter().map(|text| text.trim()).collect();
    let answers: Vec<&str> = answers.iter().map(|text| text.trim()).collect();
    scores(&targets, &answers, &|target, answer| target == answer)
}

fn scores(
    targets: &[&str],
    answers: &[&str],
    is_right: &dyn Fn(&str, &str) -> bool,
) -> SuiteScores {
    assert_eq!(targets.len(), answers.len(), "one answer per target");
    let mut correct = 0;
    let pairs = targets.iter().zip(answers);
    let responses = pairs.map(|(target, answer)| {
        if is_right(target, answer) {
            correct += 1;
            *target
        } else {
            *answer
        }
    });
    let responses: Vec<&str> = responses.collect();
    SuiteScores {
        answers: targets.len(),
        correct,
        accuracy: share(correct, targets.len()),
        interval: wilson(correct, targets.len()),
        weighted_f1: weighted_f1(targets, &responses),
    }
}

/// The labels' F1, weighted by the number of targets of each label; labels that are not a target
/// have no weight.
fn weighted_f1(targets: &[&str], responses: &[&str]) -> f64 {
    #[derive(Default)]
    struct Counts {
        support: usize,
        predicted: usize,
        right: usize,
    }
    let mut counts: BTreeMap<&str, Counts> = BTreeMap::new();
    for (target, response) in targets.iter().zip(responses) {
        let of_target = counts.entry(target).or_default();
        of_target.support += 1;
        of_target.right += usize::from(target == response);
        counts.entry(response).or_default().predicted += 1;
    }
    let weighted = counts.values().map(|label| {
        label.support as f64 * share(2 * label.right, label.support + label.predicted)
    });
    weighted.sum::<f64>() / targets.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_target_in_an_answer_counts_in_any_case() {
        let targets = ["positive", "negative", "Neutral", "positive"];
        let answers = [
            "Positive, not negative",
            "not positive but negative",
            "it is NEUTRAL.",
            "",
        ];
        let scores = finlora_scores(&targets, &answers);
        assert_eq!((scores.correct, scores.accuracy), (2, 0.5));
        // positive: 1 of 2 found, never wrongly answered: F1 2/3, twice; Neutral: 1; negative: 0.
        assert!((scores.weighted_f1 - (2.0 * 2.0 / 3.0 + 1.0) / 4.0).abs() < 1e-12);
        let strict = strict_scores(&targets, &["positive ", "negative.", "neutral", "positive"]);
        assert_eq!((strict.correct, strict.accuracy), (2, 0.5));
    }

    #[test]
    fn white_space_of_a_target_is_part_of_it_as_in_finlora() {
        let scores = finlora_scores(&["yes ", "no"], &["yes", "no"]);
        assert_eq!(scores.correct, 1);
        assert_eq!(strict_scores(&["yes ", "no"], &["yes", "no"]).correct, 2);
    }

    #[test]
    fn an_empty_target_is_found_at_the_beginning_of_everything() {
        let scores = finlora_scores(&["", "b", "a"], &["x", "a b", "ab"]);
        assert_eq!(scores.correct, 2);
    }

    #[test]
    fn nothing_asked_is_nothing_right() {
        let scores = finlora_scores(&[], &[]);
        assert_eq!((scores.accuracy, scores.weighted_f1), (0.0, 0.0));
    }
}
