//! From answers to metrics: accuracy, F1, confusion matrix.

use serde::Serialize;

use super::statistics::wilson;

/// Confusion matrices of more labels than this are not kept: they would not be readable.
pub const LARGEST_MATRIX: usize = 50;

/// The metrics of one scorer for one model's answers to a file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scores {
    /// Examples.
    pub rows: usize,
    /// Correct answers.
    pub correct: usize,
    /// Their share.
    pub accuracy: f64,
    /// The accuracy's 95 % interval.
    pub interval: [f64; 2],
    /// Answers that are not one of the labels.
    pub no_label: usize,
    /// The metrics per label; `None` if the targets are free text.
    pub labels: Option<LabelScores>,
}

/// Metrics per label.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LabelScores {
    /// The labels' F1, averaged over labels (macro F1).
    pub macro_f1: f64,
    /// The labels' F1, averaged over examples by their target (weighted F1).
    pub weighted_f1: f64,
    /// Each label, in the order of the labels.
    pub each: Vec<LabelScore>,
    /// Examples by target (outer) and answer (inner; the last is an answer without a label). Empty
    /// for more than 50 labels.
    pub confusion: Vec<Vec<usize>>,
}

/// One label. A ratio without examples is 0, as with scikit-learn's `zero_division=0`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LabelScore {
    /// The label.
    pub label: String,
    /// Of the examples that were answered with it, the share that is correct.
    pub precision: f64,
    /// Of the examples whose target it is, the share that was answered with it.
    pub recall: f64,
    /// The harmonic mean of precision and recall.
    pub f1: f64,
    /// Examples whose target it is (support).
    pub support: usize,
}

/// Counts answers against targets, both as indices into `labels`.
///
/// # Panics
///
/// If there are not as many answers as targets, or an index is not one of a label.
pub fn score_labels(targets: &[usize], answers: &[Option<usize>], labels: &[String]) -> Scores {
    assert_eq!(targets.len(), answers.len(), "one answer per target");
    let none = labels.len();
    let mut right = vec![0; labels.len()];
    let mut support = vec![0; labels.len()];
    let mut answered = vec![0; labels.len() + 1];
    for (target, answer) in targets.iter().zip(answers) {
        support[*target] += 1;
        answered[answer.unwrap_or(none)] += 1;
        right[*target] += usize::from(*answer == Some(*target));
    }
    let each: Vec<LabelScore> = labels
        .iter()
        .enumerate()
        .map(|(label, name)| LabelScore {
            label: name.clone(),
            precision: share(right[label], answered[label]),
            recall: share(right[label], support[label]),
            f1: share(2 * right[label], support[label] + answered[label]),
            support: support[label],
        })
        .collect();
    let rows = targets.len();
    let weighted = each.iter().map(|label| label.f1 * label.support as f64);
    let scores = LabelScores {
        macro_f1: each.iter().map(|label| label.f1).sum::<f64>() / labels.len().max(1) as f64,
        weighted_f1: weighted.sum::<f64>() / rows.max(1) as f64,
        each,
        confusion: confusion(targets, answers, labels.len()),
    };
    Scores {
        no_label: answered[none],
        labels: Some(scores),
        ..score_rows(&correct(targets, answers))
    }
}

/// Counts the correct answers, without labels.
pub fn score_rows(correct: &[bool]) -> Scores {
    let rows = correct.len();
    let right = correct.iter().filter(|correct| **correct).count();
    Scores {
        rows,
        correct: right,
        accuracy: share(right, rows),
        interval: wilson(right, rows),
        no_label: 0,
        labels: None,
    }
}

/// Which answers are correct.
pub fn correct(targets: &[usize], answers: &[Option<usize>]) -> Vec<bool> {
    let rows = targets.iter().zip(answers);
    rows.map(|(target, answer)| *answer == Some(*target))
        .collect()
}

/// The accuracy of always answering with the most frequent target, and that target.
pub fn majority(targets: &[usize], labels: &[String]) -> Option<(String, f64)> {
    let mut counts = vec![0usize; labels.len()];
    targets.iter().for_each(|target| counts[*target] += 1);
    let most = counts.iter().max().filter(|count| **count > 0)?;
    let label = counts.iter().position(|count| count == most)?;
    Some((labels[label].clone(), share(*most, targets.len())))
}

fn confusion(targets: &[usize], answers: &[Option<usize>], labels: usize) -> Vec<Vec<usize>> {
    if labels > LARGEST_MATRIX {
        return Vec::new();
    }
    let mut matrix = vec![vec![0; labels + 1]; labels];
    for (target, answer) in targets.iter().zip(answers) {
        matrix[*target][answer.unwrap_or(labels)] += 1;
    }
    matrix
}

pub(super) fn share(part: usize, whole: usize) -> f64 {
    match whole {
        0 => 0.0,
        whole => part as f64 / whole as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> Vec<String> {
        ["bad", "fair", "good"].map(String::from).to_vec()
    }

    #[test]
    fn every_row_is_in_the_matrix_once_and_no_label_has_its_own_column() {
        let targets = [0, 0, 2, 2, 2];
        let answers = [Some(0), Some(2), Some(2), None, None];
        let scores = score_labels(&targets, &answers, &labels());
        assert_eq!((scores.rows, scores.correct, scores.no_label), (5, 2, 2));
        assert_eq!(scores.accuracy, 0.4);
        let by_label = scores.labels.unwrap();
        assert_eq!(
            by_label.confusion,
            [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 2]]
        );
        let good = &by_label.each[2];
        assert_eq!((good.precision, good.support), (0.5, 3));
        assert!((good.f1 - 0.4).abs() < 1e-12);
        // A label that is neither a target nor an answer counts as 0, as in scikit-learn.
        assert_eq!(by_label.each[1].f1, 0.0);
        assert!((by_label.macro_f1 - (2.0 / 3.0 + 0.4) / 3.0).abs() < 1e-12);
        assert!((by_label.weighted_f1 - (2.0 * 2.0 / 3.0 + 3.0 * 0.4) / 5.0).abs() < 1e-12);
    }

    #[test]
    fn the_baseline_is_the_most_frequent_target() {
        let (label, accuracy) = majority(&[2, 0, 2, 1], &labels()).unwrap();
        assert_eq!((label.as_str(), accuracy), ("good", 0.5));
        assert_eq!(majority(&[], &labels()), None);
    }

    #[test]
    fn a_matrix_of_many_labels_is_left_out_and_the_scores_are_not() {
        let labels: Vec<String> = (0..60).map(|label| label.to_string()).collect();
        let targets: Vec<usize> = (0..60).collect();
        let answers: Vec<Option<usize>> = targets.iter().copied().map(Some).collect();
        let scores = score_labels(&targets, &answers, &labels);
        let by_label = scores.labels.unwrap();
        assert!(by_label.confusion.is_empty());
        assert_eq!((scores.accuracy, by_label.macro_f1), (1.0, 1.0));
    }
}
