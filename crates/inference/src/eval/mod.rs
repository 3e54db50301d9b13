//! Evaluation: the base model and adapters answer the same examples, and three scorers judge the
//! answers.
//!
//! ```text
//! command.rs     the command: arguments, templates, files, models
//! error.rs       why it fails
//! answering.rs   examples to answers: generated text, and the most likely label
//! likelihood.rs  labels' log-probabilities, the prompt computed once
//! labels.rs      possible answers; FinLoRA's rule and the strict rule
//! metrics.rs     accuracy, F1, confusion matrix
//! statistics.rs  confidence intervals and McNemar's test
//! results.rs     all results, as in results.json
//! report.rs      the tables
//! named.rs       adapters by name: NAME=DIR
//! suite/         FinLoRA's benchmark: its tasks and scores in one table
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
