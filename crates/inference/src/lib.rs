//! Inference: a model with or without an adapter.
//!
//! | module | contents |
//! | --- | --- |
//! | [`model`] | a model with its adapter, merged or separate |
//! | [`generate`] | text generation from prompts, in batches |
//! | [`eval`] | base model and adapters on a task: answers, scores, significance |
//! | [`logits`] | the logits of texts, for comparisons |
//! | [`tokenize`] | the tokens of texts, for comparisons |

pub mod eval;
pub mod generate;
pub mod logits;
pub mod model;
pub mod tokenize;
