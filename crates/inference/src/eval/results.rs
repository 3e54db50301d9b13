//! The results of an evaluation.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::answering::{Answer, Task};
use super::labels::Answers;
use super::metrics::{Scores, majority, score_labels, score_rows};
use super::statistics::{McNemar, mcnemar};

/// How an answer is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Scorer {
    /// FinLoRA's rule: the first label found anywhere in the generated text
    Finlora,
    /// The generated text equals the target, ignoring surrounding white space
    Strict,
    /// The label that is the most likely completion; no text is generated
    Likelihood,
}

impl Scorer {
    /// Every scorer.
    pub const ALL: [Self; 3] = [Self::Finlora, Self::Strict, Self::Likelihood];

    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Finlora => "finlora",
            Self::Strict => "strict",
            Self::Likelihood => "likelihood",
        }
    }
}

/// All results.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
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
    /// Each file.
    pub files: Vec<FileResults>,
}

/// The results on a file.
#[derive(Debug, Clone, Serialize)]
pub struct FileResults {
    /// The file.
    pub path: PathBuf,
    /// Its format: `JSON lines of {"context", "target"}`.
    pub format: String,
    /// Examples that were answered.
    pub rows: usize,
    /// Answers that were judged; more than the examples if an answer is a list.
    pub answers: usize,
    /// Examples that are too long for the model.
    pub too_long: usize,
    /// The labels; empty if the targets are free text.
    pub labels: Vec<String>,
    /// The maximum number of tokens per answer.
    pub max_new_tokens: usize,
    /// Always answering with the most frequent target.
    pub majority: Option<Majority>,
    /// The base model and the adapters.
    pub contenders: Vec<Contender>,
    /// Every pair of them, by scorer.
    pub differences: Vec<Difference>,
}

/// The best accuracy that is possible without reading the examples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Majority {
    /// The most frequent target.
    pub label: String,
    /// The share of the examples with this target.
    pub accuracy: f64,
}

/// A model that was evaluated.
#[derive(Debug, Clone, Serialize)]
pub struct Contender {
    /// `base`, or the adapter's name.
    pub name: String,
    /// The adapter's folder.
    pub adapter: Option<PathBuf>,
    /// The seconds it took.
    pub seconds: f64,
    /// The scorers' verdicts.
    pub scores: BTreeMap<Scorer, Verdict>,
}

/// A scorer's verdict on a model.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// The metrics.
    #[serde(flatten)]
    pub scores: Scores,
    /// With FinLoRA's scorer: its own weighted F1. It compares targets with the generated texts; a
    /// right answer counts as its target, a wrong answer counts for a label only if it equals that
    /// label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finlora_weighted_f1: Option<f64>,
    /// Which answers are correct.
    #[serde(skip)]
    pub correct: Vec<bool>,
}

/// Two contenders by one scorer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// The scorer.
    pub scorer: Scorer,
    /// The first.
    pub first: String,
    /// The second.
    pub second: String,
    /// The second's accuracy minus the first's.
    pub accuracy: f64,
    /// The test whether the difference is due to chance.
    #[serde(flatten)]
    pub test: McNemar,
}

impl FileResults {
    /// The results of a task without contenders.
    pub fn new(task: &Task) -> Self {
        let are_labels = task.answers.are_labels;
        let targets: Vec<usize> = task.targets().collect();
        let most = majority(&targets, &task.answers.all);
        Self {
            path: task.path.clone(),
            format: task.source.to_string(),
            rows: task.questions.len(),
            answers: targets.len(),
            too_long: task.too_long,
            labels: if are_labels {
                task.answers.all.clone()
            } else {
                Vec::new()
            },
            max_new_tokens: task.max_new_tokens,
            majority: most.map(|(label, accuracy)| Majority { label, accuracy }),
            contenders: Vec::new(),
            differences: Vec::new(),
        }
    }

    /// Adds a contender, compared with those before it.
    pub fn add(&mut self, contender: Contender) {
        for other in &self.contenders {
            for (scorer, second) in &contender.scores {
                let Some(first) = other.scores.get(scorer) else {
                    continue;
                };
                self.differences.push(Difference {
                    scorer: *scorer,
                    first: other.name.clone(),
                    second: contender.name.clone(),
                    accuracy: second.scores.accuracy - first.scores.accuracy,
                    test: mcnemar(&first.correct, &second.correct),
                });
            }
        }
        self.contenders.push(contender);
    }
}

impl Verdict {
    /// A scorer's verdict on `answers`, where `targets` (indices into `all`) are the correct ones.
    pub fn new(scorer: Scorer, all: &Answers, targets: &[usize], answers: &[Answer]) -> Self {
        let given: Vec<Option<usize>> = answers
            .iter()
            .zip(targets)
            .map(|(answer, target)| judged(scorer, all, answer, *target))
            .collect();
        let correct = super::metrics::correct(targets, &given);
        let scores = if all.are_labels {
            score_labels(targets, &given, &all.all)
        } else {
            Scores {
                no_label: given.iter().filter(|answer| answer.is_none()).count(),
                ..score_rows(&correct)
            }
        };
        let theirs =
            (scorer == Scorer::Finlora).then(|| finlora_f1(all, answers, targets, &correct));
        Self {
            scores,
            finlora_weighted_f1: theirs,
            correct,
        }
    }
}

/// The index of the given answer.
fn judged(scorer: Scorer, all: &Answers, answer: &Answer, target: usize) -> Option<usize> {
    match scorer {
        Scorer::Strict => all.exact(&answer.written),
        Scorer::Likelihood => answer.likeliest,
        Scorer::Finlora => {
            let found = all.first_found(&answer.finlora)?;
            // FinLoRA compares in lower case.
            if all.same_in_lower_case(found, target) {
                Some(target)
            } else {
                Some(found)
            }
        }
    }
}

/// scikit-learn's `f1_score(targets, response, average="weighted")` as FinLoRA calls it.
fn finlora_f1(all: &Answers, answers: &[Answer], targets: &[usize], correct: &[bool]) -> f64 {
    let responses: Vec<Option<usize>> = answers
        .iter()
        .zip(targets.iter().zip(correct))
        .map(|(answer, (target, correct))| match correct {
            true => Some(*target),
            false => all.exact(&answer.finlora),
        })
        .collect();
    let scores = score_labels(targets, &responses, &all.all);
    scores.labels.map_or(0.0, |labels| labels.weighted_f1)
}
