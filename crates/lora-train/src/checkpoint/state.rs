//! `state.json`: where a run is.

use serde::{Deserialize, Serialize};

use super::Fingerprint;
use crate::fit::Fit;
use crate::metrics::Scores;
use data::Prefixes;
use train_step::loss_scale::LossScale;

/// The version of the format; a program reads its own only.
pub const FORMAT: u32 = 1;

/// A run's place between two optimizer steps.
///
/// `step` and the configuration's `seed` are the position in the learning rate's schedule, in the data and
/// in the dropout's random numbers: all three are functions of the two and need nothing that came before.
/// A checkpoint lies between two steps, so no gradients are on their way either.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// [`FORMAT`].
    pub format: u32,
    /// The program and its version.
    pub program: String,
    /// The device, for the user; a run may go on on another.
    pub device: String,
    /// Steps in all.
    pub total_steps: usize,
    /// What has happened so far.
    pub progress: Progress,
    /// How rows are divided.
    pub division: Division,
    /// Bytes of `metrics.jsonl` that belong to these steps.
    pub metrics_bytes: u64,
    /// The files that the run reads.
    pub files: Fingerprint,
    /// What the chat template took for now when the run started, in seconds since 1970, where it writes the date.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_time: Option<u64>,
}

/// What has happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done, those skipped included.
    pub step: usize,
    /// The validation after this step is still to come.
    pub owes_validation: bool,
    /// The base model's validation.
    #[serde(with = "scores")]
    pub base: Option<Scores>,
    /// The step whose adapter is the one to keep, the best so far or the newest.
    pub kept: Option<usize>,
    /// Its validation, where there are rows for one.
    #[serde(with = "scores")]
    pub kept_scores: Option<Scores>,
    /// Tokens of all rows trained on.
    pub tokens: u64,
    /// Seconds of work, in all sessions.
    pub seconds: f64,
    /// Steps that were skipped because a loss or gradient was not finite.
    pub skipped: usize,
    /// What keeps gradients in the range of f16; none in other types.
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

    /// What the learning rate is multiplied by: half for each step that was skipped.
    pub fn rate_factor(&self) -> f64 {
        0.5f64.powi(self.skipped.min(1000) as i32)
    }

    /// Whether a run of so many steps has nothing left to do.
    pub fn is_over(&self, total_steps: usize) -> bool {
        self.step >= total_steps && !self.owes_validation
    }

    /// The step that comes next, counted from 1: the last one again where its validation is owed.
    pub fn next(&self) -> usize {
        if self.owes_validation {
            self.step
        } else {
            self.step + 1
        }
    }
}

/// How a step's rows are divided, which memory decides. The sums of floats depend on it in their last bits,
/// so a resumed run divides as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Division {
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: usize,
    /// Whether activations are recomputed; it changes no bit.
    pub gradient_checkpointing: bool,
    /// Whether common beginnings are computed once.
    pub share_prefixes: bool,
}

impl Division {
    /// That of a run.
    pub fn of(fit: &Fit) -> Self {
        Self {
            batch_size: fit.batch_size,
            gradient_accumulation_steps: fit.gradient_accumulation_steps,
            gradient_checkpointing: fit.gradient_checkpointing,
            share_prefixes: fit.prefixes == Prefixes::Shared,
        }
    }
}

/// Scores as text: numbers of JSON are read back with another last digit, or not at all where they are not
/// finite, and the best validation would be another one.
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
            *number = parsed.map_err(|_| D::Error::custom(format!("{text:?} is no number")))?;
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
