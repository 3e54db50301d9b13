//! Fine-tunes Llama-family models with LoRA over 8-bit weights.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`] | the command line |
//! | [`config`] | a run's settings: read raw, checked as a whole |
//! | [`data`] | rows, prompts, tokens, packed batches |
//! | [`device`] | the only place that names a backend |
//! | [`train`] | the loop |
//! | [`gradients`], [`loss`], [`optimizer`], [`schedule`] | its parts |
//! | [`inference`], [`generate`], [`logits`] | a model that is used: text from prompts, scores of tokens |
//! | [`merge`] | adapters into whole models, and out of them |
//! | [`screen`], [`metrics`], [`output`], [`memory`], [`human`] | what a run shows and writes |
//! | [`peft`] | adapters in Hugging Face PEFT's format |
//! | [`combine`] | one adapter from several |
//! | [`plan`] | parameters and memory from shapes alone |
//! | [`parity`] | our numbers against others' |
//! | [`mod@bench`] | speed and memory, ours beside Burn's and PEFT's |
//! | [`embedded`], [`make_assets`] | the model and data inside the program, and how they are made |

pub mod bench;
pub mod cli;
pub mod combine;
pub mod config;
pub mod data;
pub mod device;
pub mod embedded;
pub mod fit;
pub mod generate;
pub mod gradients;
pub mod human;
pub mod inference;
pub mod logits;
pub mod loss;
pub mod make_assets;
pub mod memory;
pub mod merge;
pub mod metrics;
pub mod optimizer;
pub mod output;
pub mod parity;
pub mod peft;
pub mod plan;
pub mod schedule;
pub mod screen;
pub mod train;
