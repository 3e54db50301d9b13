//! Exports adapters and models.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`merge`] | merging adapters into models, and taking them out again |
//! | [`combine`] | one adapter from several |
//! | [`gguf`] | models and adapters for llama.cpp |

pub mod combine;
pub mod gguf;
pub mod merge;
