//! Fine-tunes Llama-family models with LoRA over 8-bit weights.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`] | the command line |
//! | [`train`] | the loop |
//! | [`session`], [`step`] | its parts |
//! | [`checkpoint`], [`interrupt`], [`guard`] | what keeps a run's work, whatever happens |
//! | [`inference`], [`generate`], [`logits`] | a model that is used: text from prompts, scores of tokens |
//! | [`gguf`] | llama.cpp's files in and out |
//! | [`tokenize`] | the tokens of texts, for comparisons |
//! | [`eval`] | base and adapters on a task: answers, scores, significance |
//! | [`merge`] | adapters into whole models, and out of them |
//! | [`screen`], [`metrics`], [`output`] | what a run shows and writes |
//! | [`continued`] | a run that starts from an adapter |
//! | [`combine`] | one adapter from several |
//! | [`model_card`] | the README.md of an adapter |
//! | [`plan`] | parameters and memory from shapes alone |
//! | [`parity`] | our numbers against others' |
//! | [`mod@bench`] | speed and memory, ours beside Burn's and PEFT's |
//! | [`gpu_report`] | what a GPU computes, how right and how fast: for users to run and send |
//! | [`embedded`], [`make_assets`] | the model and data inside the program, and how they are made |

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod combine;
pub mod continued;
pub mod embedded;
pub mod eval;
pub mod fit;
pub mod generate;
pub mod gguf;
pub mod gpu_report;
pub mod guard;
pub mod inference;
pub mod interrupt;
pub mod logits;
pub mod make_assets;
pub mod merge;
pub mod metrics;
pub mod model_card;
pub mod output;
pub mod parity;
pub mod plan;
pub mod screen;
pub mod session;
pub mod step;
pub mod tokenize;
pub mod train;
