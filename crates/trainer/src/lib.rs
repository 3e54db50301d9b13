//! Fine-tunes Llama-family models with LoRA over 8-bit weights.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`] | the command line |

pub mod cli;
