//! A training run, as a program calls it: [`train()`] takes a configuration and leaves an adapter on disk.
//!
//! A run has three acts, and [`train()`] reads from top to bottom:
//!
//! 1. **Prepare**: files, data, device, memory, output folder, and last the model. A mistake is an error before the
//!    first weight is read.
//! 2. **Run**: the optimizer steps, with validations and checkpoints. A [`TrainingCallback`] observes them.
//! 3. **Report**: the model card, the scores, the next commands.
//!
//! [`evaluate()`] measures an adapter, or the base model, on the run's validation examples.
//!
//! `crates/lora-train/examples/train_and_evaluate.rs` does both:
//!
//! ```no_run
#![doc = include_str!("../examples/train_and_evaluate.rs")]
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | `train`, `prepare`, `run`, `report` | a run and its three acts |
//! | `session`, `step` | what happens when a step fails; a step over its micro-batches |
//! | [`evaluate()`] | validation of an adapter |
//! | [`plan`], [`fit`] | parameters and memory from shapes alone; what fits the device |
//! | [`checkpoint`], [`interrupt`], [`guard`] | what keeps a run's work when it is stopped or fails |
//! | [`callback`], [`screen`] | what a program observes; the observer that prints |
//! | [`metrics`], [`output`], [`model_card`] | what a run writes |
//! | [`continued`] | a run that starts from an adapter |

pub mod callback;
pub mod checkpoint;
pub mod continued;
mod error;
mod evaluate;
mod files;
pub mod fit;
pub mod guard;
pub mod interrupt;
pub mod metrics;
pub mod model_card;
pub mod output;
pub mod plan;
mod prepare;
mod report;
mod run;
pub mod screen;
mod session;
mod step;
mod train;

pub use callback::{Silent, TrainingCallback};
pub use device::Backend;
pub use error::{TrainError, WrongNumbers};
pub use evaluate::evaluate;
pub use files::RunFiles;
pub use interrupt::Interrupt;
pub use metrics::Scores;
pub use output::Existing;
pub use prepare::quantization;
pub use run_config::Config;
pub use screen::{RunResult, RunScreen, RunSummary};
pub use step::NotFinite;
pub use train::{Ended, Request, train};
