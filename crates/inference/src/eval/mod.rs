//! Is an adapter better than its base model on a task? Both answer the same rows, three scorers judge.
//!
//! ```text
//! command.rs     the command: arguments, templates, files, models
//! error.rs       why it fails
//! answering.rs   rows to answers: what a model writes, and which label it finds most likely
//! likelihood.rs  labels' log-probabilities, the prompt computed once
//! labels.rs      what may be answered; FinLoRA's rule and the strict one
//! metrics.rs     accuracy, F1, confusion
//! statistics.rs  intervals, and whether two differ by more than chance
//! results.rs     everything that was found, as it is written to results.json
//! report.rs      the tables
//! named.rs       adapters by name: NAME=DIR
//! suite/         FinLoRA's benchmark: its tasks and its scores in one table
//! ```

mod answering;
mod command;
mod error;
mod labels;
mod likelihood;
mod metrics;
mod named;
mod report;
mod results;
mod statistics;
pub mod suite;

pub use answering::{Answer, Answering, AnsweringError, Task, TaskOptions, items, of_items};
pub use command::{EvalArgs, run};
pub use error::EvalError;
pub use labels::{Answers, finlora_answer};
pub use likelihood::{LikelihoodError, log_likelihoods, most_likely};
pub use metrics::{LabelScore, LabelScores, Scores, correct, majority, score_labels, score_rows};
pub use results::{Contender, Difference, FileResults, Majority, Results, Scorer, Verdict};
pub use statistics::{McNemar, mcnemar, wilson};
