//! The interface through which a program observes a run.

use std::path::Path;

use crate::metrics::{History, TrainLine, ValidationLine};
use crate::output::OutputFolder;
use crate::screen::{RunResult, RunSummary};

/// Observes a run, as `transformers`' `TrainerCallback` does. [`train()`](crate::train()) calls the methods in the order
/// of this list, on its own thread; a method that is left out does nothing. Nothing that an observer does changes the
/// run, but the run waits for it. A panic of an observer ends the run like a failure of the device.
///
/// [`RunScreen`](crate::screen::RunScreen) is the observer that prints; [`Silent`] prints nothing.
pub trait TrainingCallback {
    /// A GPU's kernels are being compiled and tuned for `what`. This lasts until [`on_prepared`](Self::on_prepared) or
    /// the first step, and may take minutes.
    fn on_preparing(&mut self, what: &'static str) {
        let _ = what;
    }

    /// The work that [`on_preparing`](Self::on_preparing) reported is done, or has failed.
    fn on_prepared(&mut self) {}

    /// Nothing is left to train: the resumed run is complete, and its adapter is written. No weights are loaded, and no
    /// other method is called after this one.
    fn on_already_done(&mut self, output: &OutputFolder, total_steps: usize) {
        let _ = (output, total_steps);
    }

    /// `done` of the model's `total` tensors have been read and quantized; 0 before the first.
    fn on_loading(&mut self, done: usize, total: usize) {
        let _ = (done, total);
    }

    /// Model, adapters and optimizer are on the device.
    fn on_loaded(&mut self) {}

    /// The run is about to train.
    fn on_start(&mut self, summary: &RunSummary) {
        let _ = summary;
    }

    /// The run resumes after `step` steps of earlier sessions, which had this history.
    fn on_resume(&mut self, step: usize, history: &History) {
        let _ = (step, history);
    }

    /// An optimizer step is done.
    fn on_step(&mut self, line: &TrainLine) {
        let _ = line;
    }

    /// A validation has evaluated `done` of `total` examples.
    fn on_validating(&mut self, done: usize, total: usize) {
        let _ = (done, total);
    }

    /// A validation is done. The validation of step 0 is of the base model.
    fn on_validation(&mut self, line: &ValidationLine) {
        let _ = line;
    }

    /// The checkpoint of `step` is complete and synced in this folder.
    fn on_checkpoint(&mut self, step: usize, folder: &Path) {
        let _ = (step, folder);
    }

    /// A sentence that the user should read: a skipped step, smaller micro-batches, a full disk.
    fn on_message(&mut self, text: &str) {
        let _ = text;
    }

    /// The run ended, complete or interrupted. After an error it is not called.
    fn on_finish(&mut self, result: &RunResult) {
        let _ = result;
    }
}

/// Observes nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl TrainingCallback for Silent {}
