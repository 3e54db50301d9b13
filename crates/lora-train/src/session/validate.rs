//! Validation, and the choice of the adapter to keep.

use std::time::Instant;

use llama_burn::Llama;

use super::{Learner, Session};
use crate::error::TrainError;
use crate::metrics::{Scores, ValidationLine};
use train_step::gradients;
use train_step::loss::LossSums;

impl Session<'_> {
    /// Loss and accuracy on the validation examples: `Some(None)` without validation examples, `None` if the
    /// run was asked to stop before the last example.
    ///
    /// # Errors
    ///
    /// A failure of the device.
    pub fn validate(&mut self, learner: &Learner) -> Result<Option<Option<Scores>>, TrainError> {
        if self.setup.data.validation.is_empty() {
            return Ok(Some(None));
        }
        let started = Instant::now();
        let sums = self.compute(learner, |session| session.validation_sums(&learner.model))?;
        let Some(sums) = sums else {
            return Ok(None);
        };
        let line = ValidationLine {
            step: self.progress.step,
            epoch: self.order().epoch_at(self.progress.step),
            val_loss: sums.mean(),
            val_accuracy: sums.accuracy(),
            val_row_accuracy: sums.row_accuracy(),
            val_tokens: sums.tokens,
            val_s: started.elapsed().as_secs_f64(),
        };
        let written = self.metrics.validation(&line);
        self.report_write(written);
        self.callback.on_validation(&line);
        Ok(Some(Some(Scores::of(&sums))))
    }

    fn validation_sums(&mut self, model: &Llama) -> Option<LossSums> {
        let rows = &self.setup.data.validation;
        let max_tokens = self.setup.config.max_batch_tokens;
        let mut sums = LossSums::default();
        for indices in rows.in_order(self.fit.batch_size, max_tokens) {
            if self.interrupt.asked() {
                return None;
            }
            let batch = rows.batch(&indices, self.fit.prefixes);
            sums.add(gradients::evaluate(model, &batch));
            self.callback.on_validating(sums.examples, rows.len());
        }
        Some(sums)
    }

    /// Keeps the adapter of the last step if its validation `scores` are the best so far. Returns whether it did.
    ///
    /// # Errors
    ///
    /// A failure of the device.
    pub fn keep_if_better(
        &mut self,
        scores: Option<Scores>,
        learner: &Learner,
    ) -> Result<bool, TrainError> {
        let progress = &self.progress;
        let better = match (scores, progress.kept_scores) {
            (Some(now), Some(before)) => now.loss < before.loss,
            _ => true,
        };
        // Without `save_best`, or without validation examples, the newest adapter is the one to keep.
        if !better && self.setup.config.save_best {
            return Ok(false);
        }
        self.progress.kept = Some(self.progress.step);
        self.progress.kept_scores = scores;
        let adapter = self.compute(learner, |session| session.adapter(learner))??;
        self.keeper.keep(adapter);
        Ok(true)
    }
}
