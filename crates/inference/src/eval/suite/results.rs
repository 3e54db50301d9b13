//! The results of a suite, as in `results.json`.

use std::path::PathBuf;

use serde::Serialize;

use super::bert_score::BertScore;
use super::score::SuiteScores;

/// All results.
#[derive(Debug, Clone, Serialize)]
pub struct SuiteResults {
    /// `finlora`.
    pub suite: &'static str,
    /// The base model.
    pub model: String,
    /// Bits of its linear layers.
    pub quant_bits: u8,
    /// The device.
    pub device: String,
    /// The prompt template.
    pub prompt_template: String,
    /// The seed that samples are drawn with.
    pub seed: u64,
    /// The folder of the files.
    pub data_dir: PathBuf,
    /// FinLoRA's files that are missing in it.
    pub missing: Vec<&'static str>,
    /// Other files in it.
    pub ignored: Vec<String>,
    /// Tasks that were skipped, and why.
    pub left_out: Vec<String>,
    /// The tasks, in FinLoRA's order.
    pub tasks: Vec<TaskResults>,
    /// The base model and the adapters.
    pub contenders: Vec<SuiteContender>,
}

/// The description of a task.
#[derive(Debug, Clone, Serialize)]
pub struct TaskResults {
    /// FinLoRA's name.
    pub task: &'static str,
    /// The file.
    pub file: &'static str,
    /// Examples that were answered.
    pub rows: usize,
    /// Answers that were judged; more than the examples if an answer is a list.
    pub answers: usize,
    /// Examples that are too long for the model.
    pub too_long: usize,
    /// The maximum number of tokens per answer.
    pub max_new_tokens: usize,
    /// Examples without `Answer:`, for which FinLoRA would search the prompt for the answer.
    pub without_mark: usize,
    /// Whether pandas reads the targets as numbers whose text differs from the file.
    pub targets_reread: bool,
}

/// A model that was evaluated.
#[derive(Debug, Clone, Serialize)]
pub struct SuiteContender {
    /// `base`, or the adapter's name.
    pub name: String,
    /// The adapter's folder.
    pub adapter: Option<PathBuf>,
    /// Each task's scores, in the order of the tasks.
    pub tasks: Vec<TaskScores>,
    /// Means over the tasks.
    pub average: Averages,
}

/// A model's scores on a task.
#[derive(Debug, Clone, Serialize)]
pub struct TaskScores {
    /// FinLoRA's name.
    pub task: &'static str,
    /// The seconds that the answers took.
    pub seconds: f64,
    /// By FinLoRA's first-label rule; `None` for texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finlora: Option<SuiteScores>,
    /// By the strict rule; `None` for texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<SuiteScores>,
    /// For texts, if it was computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bert_score: Option<BertScore>,
    /// The command that computes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bert_score_command: Option<String>,
}

/// Means over tasks; each task has the same weight.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Averages {
    /// FinLoRA's overall average: accuracies by its rule; for texts BERTScore's F1 if it was
    /// computed.
    pub overall: Option<f64>,
    /// The weighted F1 by FinLoRA's rule.
    pub finlora_weighted_f1: Option<f64>,
    /// The accuracy by the strict rule.
    pub strict_accuracy: Option<f64>,
    /// The weighted F1 by the strict rule.
    pub strict_weighted_f1: Option<f64>,
}

impl Averages {
    /// The means of a model's scores.
    pub fn of(tasks: &[TaskScores]) -> Self {
        let over = |score: fn(&TaskScores) -> Option<f64>| mean(tasks.iter().filter_map(score));
        Self {
            overall: over(|task| {
                let accuracy = task.finlora.as_ref().map(|scores| scores.accuracy);
                accuracy.or(task.bert_score.map(|score| score.f1))
            }),
            finlora_weighted_f1: over(|task| Some(task.finlora.as_ref()?.weighted_f1)),
            strict_accuracy: over(|task| Some(task.strict.as_ref()?.accuracy)),
            strict_weighted_f1: over(|task| Some(task.strict.as_ref()?.weighted_f1)),
        }
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::score::{finlora_scores, strict_scores};
    use super::*;

    /// Two tasks with labels and a text: accuracies 0.5 and 1, BERTScore F1 0.6.
    pub fn scores() -> Vec<TaskScores> {
        let labels = |task, answers: [&str; 2]| TaskScores {
            task,
            seconds: 1.0,
            finlora: Some(finlora_scores(&["a", "b"], &answers)),
            strict: Some(strict_scores(&["a", "b"], &answers)),
            bert_score: None,
            bert_score_command: None,
        };
        let text = TaskScores {
            task: "xbrl_term",
            seconds: 1.0,
            finlora: None,
            strict: None,
            bert_score: Some(BertScore {
                precision: 0.5,
                recall: 0.75,
                f1: 0.6,
            }),
            bert_score_command: Some("bert-score …".into()),
        };
        vec![labels("fpb", ["A", "x"]), labels("tfns", ["a", "b"]), text]
    }

    #[test]
    fn the_average_is_finloras_accuracies_and_bert_scores() {
        let mut scores = scores();
        let average = Averages::of(&scores);
        assert!((average.overall.unwrap() - (0.5 + 1.0 + 0.6) / 3.0).abs() < 1e-12);
        assert_eq!(average.strict_accuracy, Some(0.5));
        scores[2].bert_score = None;
        assert_eq!(Averages::of(&scores).overall, Some(0.75));
        assert_eq!(Averages::of(&scores[2..]), Averages::default());
    }
}
