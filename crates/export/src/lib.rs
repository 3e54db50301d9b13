//! Other files from adapters and models.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`merge`] | adapters merged into whole models, and taken out of them again |
//! | [`combine`] | one adapter from several |
//! | [`gguf`] | models and adapters for llama.cpp |

pub mod combine;
pub mod gguf;
pub mod merge;
