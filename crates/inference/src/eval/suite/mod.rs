//! FinLoRA's benchmark: its tasks, identified by the names of their files, asked and scored as in
//! its own `test/test_dataset.py`, with base model and adapters in one table.
//!
//! ```text
//! command.rs     arguments, files, models
//! tasks.rs       the tasks, their files and answer lengths
//! folder.rs      the tasks whose files a folder holds
//! base_model.rs  the base model that the adapters name
//! run.rs         every model answers every task
//! questions.rs   a task's examples as questions
//! targets.rs     targets as FinLoRA reads them: through pandas
//! score.rs       FinLoRA's first-label rule and the strict rule; scikit-learn's weighted F1
//! bert_score.rs  files for the program bert-score, its command, its run
//! results.rs     all results, as in results.json
//! report.rs      the table
//! ```

mod base_model;
mod bert_score;
mod command;
mod folder;
mod questions;
mod report;
mod results;
mod run;
mod score;
mod targets;
mod tasks;

pub use bert_score::BertScoreError;
pub use command::run;
pub use folder::FolderError;
pub use score::{SuiteScores, finlora_scores, strict_scores};

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// FinLoRA's benchmark
    Finlora,
}
