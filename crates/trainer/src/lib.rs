//! Fine-tunes Llama-family models with LoRA over 8-bit weights.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`] | the command line |
//! | [`parity`] | our numbers against others' |
//! | [`mod@bench`] | speed and memory, ours beside Burn's and PEFT's |
//! | [`gpu_report`] | what a GPU computes, how right and how fast: for users to run and send |
//! | [`make_assets`] | how the model and data inside the program are made |

pub mod bench;
pub mod cli;
pub mod gpu_report;
pub mod make_assets;
pub mod parity;
