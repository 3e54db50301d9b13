//! A model that is used rather than trained.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`model`] | a model opened with its adapter, merged into it or beside it |
//! | [`generate`] | text from prompts, many at once |
//! | [`eval`] | base and adapters on a task: answers, scores, significance |
//! | [`logits`] | the logits of texts, for comparisons |
//! | [`tokenize`] | the tokens of texts, for comparisons |

pub mod eval;
pub mod generate;
pub mod logits;
pub mod model;
pub mod tokenize;
