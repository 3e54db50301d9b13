//! `state.json`: the progress of a run.

use serde::{Deserialize, Serialize};

use super::Fingerprint;
use crate::fit::Fit;
use crate::metrics::Scores;
use data::Prefixes;
use train_step::loss_scale::LossScale;

/// The version of the format; a program reads only its own version.
pub const FORMAT: u32 = 1;

/// The state of a run between two optimizer steps.
///
/// `step` and the configuration's `seed` determine the position in the learning rate's schedule, in
/// the data and in the dropout's random numbers: all three are functions of the two. A checkpoint
/// lies between two steps, so it holds no gradients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// [`FORMAT`].
    pub format: u32,
    /// The program and its version.
    pub program: String,
    /// The device, for the user; a run may resume on another one.
    pub device: String,
    /// Steps in all.
    pub total_steps: usize,
    /// The progress.
    pub progress: Progress,
    /// The division into micro-batches.
    pub division: Division,
    /// Bytes of `metrics.jsonl` that belong to these steps.
    pub metrics_bytes: u64,
    /// The command of the run's first start, for the model card.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// The files that the run reads.
    pub files: Fingerprint,
    /// The time that the chat template took as the present when the run started, in seconds since
    /// 1970, if the template writes the date.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_time: Option<u64>,
}

/// The progress of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done, including skipped ones.
    pub step: usize,
    /// The validation after this step has not been done yet.
    pub owes_validation: bool,
    /// The base model's validation.
    #[serde(with = "scores")]
    pub base: Option<Scores>,
    /// The step of the adapter to keep: the best so far, or the newest.
    pub kept: Option<usize>,
    /// Its validation, if there is validation data.
    #[serde(with = "scores")]
    pub kept_scores: Option<Scores>,
    /// Tokens of all examples trained on.
    pub tokens: u64,
    /// Seconds of work in all sessions.
    pub seconds: f64,
    /// Steps that were skipped because a loss or gradient was not finite.
    pub skipped: usize,
    /// The loss scale, which keeps gradients in the range of f16; `None` in other types.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

impl Progress {
    /// The start of a run.
    pub fn start() -> Self {
        Self {
            step: 0,
            owes_validation: false,
            base: None,
            kept: None,
            kept_scores: None,
            tokens: 0,
            seconds: 0.0,
            skipped: 0,
            loss_scale: None,
        }
    }

    /// The factor of the learning rate: halved for each skipped step.
    pub fn rate_factor(&self) -> f64 {
        0.5f64.powi(self.skipped.min(1000) as i32)
    }

    /// Whether a run of so many steps is complete.
    pub fn is_over(&self, total_steps: usize) -> bool {
        self.step >= total_steps && !self.owes_validation
    }

    /// The next step, counted from 1: the last one again if its validation has not been done.
    pub fn next(&self) -> usize {
        if self.owes_validation {
            self.step
        } else {
            self.step + 1
        }
    }
}

/// The division of a step's examples into micro-batches, which depends on memory. The last bits of
/// float sums depend on it, so a resumed run divides as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Division {
    /// Examples per micro-batch.
    pub batch_size: usize,
    /// Micro-batches per step.
    pub gradient_accumulation_steps: usize,
    /// Whether gradient checkpointing is on; it changes no bit.
    pub gradient_checkpointing: bool,
    /// Whether shared prefixes are computed once.
    pub share_prefixes: bool,
}

impl Division {
    /// The division of a run.
    pub fn of(fit: &Fit) -> Self {
        Self {
            batch_size: fit.batch_size,
            gradient_accumulation_steps: fit.gradient_accumulation_steps,
            gradient_checkpointing: fit.gradient_checkpointing,
            share_prefixes: fit.prefixes == Prefixes::Shared,
        }
    }
}

/// Scores as text: JSON numbers are read back with another last digit, or not at all if they are
/// not finite, and the best validation would then be another one.
mod scores {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::metrics::Scores;

    pub fn serialize<S: Serializer>(scores: &Option<Scores>, s: S) -> Result<S::Ok, S::Error> {
        let text = scores.map(|scores| {
            [scores.loss, scores.accuracy, scores.row_accuracy].map(|number| number.to_string())
        });
        text.serialize(s)
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(d: D) -> Result<Option<Scores>, D::Error> {
        let Some(texts) = Option::<[String; 3]>::deserialize(d)? else {
            return Ok(None);
        };
        let mut numbers = [0.0; 3];
        for (number, text) in numbers.iter_mut().zip(&texts) {
            let parsed = text.parse();
            *number = parsed.map_err(|_| D::Error::custom(format!("{text:?} is not a number")))?;
        }
        let [loss, accuracy, row_accuracy] = numbers;
        Ok(Some(Scores {
            loss,
            accuracy,
            row_accuracy,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_come_back_bit_for_bit() {
        for loss in [0.1 + 0.2, 5e-324, 1.0 / 3.0, f64::INFINITY, f64::NAN] {
            let progress = Progress {
                kept: Some(3),
                kept_scores: Some(Scores {
                    loss,
                    accuracy: 2.0 / 3.0,
                    row_accuracy: 0.0,
                }),
                ..Progress::start()
            };
            let text = serde_json::to_string(&progress).unwrap();
            let read: Progress = serde_json::from_str(&text).unwrap();
            let bits = |progress: &Progress| progress.kept_scores.unwrap().loss.to_bits();
            assert_eq!(bits(&read), bits(&progress), "{text}");
            assert_eq!(read.base, None);
        }
    }

    #[test]
    fn each_skipped_step_halves_the_rate_and_a_validation_that_is_owed_comes_first() {
        let mut progress = Progress::start();
        assert_eq!((progress.next(), progress.rate_factor()), (1, 1.0));
        progress.step = 7;
        progress.skipped = 2;
        assert_eq!((progress.next(), progress.rate_factor()), (8, 0.25));
        progress.owes_validation = true;
        assert_eq!(progress.next(), 7);
    }
}
