//! `trainer tokenize`: the tokens of given texts, for programs that compare them with another tokenizer's.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use data::PromptTemplate;

use data::{ModelFiles, RowTokenizer};
use hub::{self, Need};
use run_config::EMBEDDED;
use run_config::embedded;

/// The command's arguments.
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// A Hugging Face model folder, a GGUF file, or `embedded`
    #[arg(long, value_name = "PATH", default_value = EMBEDDED)]
    model: String,
    /// JSON: a list of texts
    #[arg(long, value_name = "FILE")]
    texts: PathBuf,
    /// JSON: a list of token ids for each, special tokens of the tokenizer's own included
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Runs the command.
///
/// # Errors
///
/// What is wrong with the model's tokenizer or the texts.
pub fn run(args: &TokenizeArgs) -> anyhow::Result<()> {
    let model = if args.model == EMBEDDED {
        embedded::materialise()?.model_dir
    } else {
        hub::model_folder(&args.model, Need::Model)?
    };
    let tokenizer = RowTokenizer::new(&ModelFiles::read(&model)?, &PromptTemplate::Raw)?;
    let about = || format!("cannot read {}", args.texts.display());
    let bytes = fs::read(&args.texts).with_context(about)?;
    let texts: Vec<String> = serde_json::from_slice(&bytes).with_context(about)?;
    let mut ids = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        ids.push(tokenizer.prompt(text, Path::new(&args.texts), index + 1)?);
    }
    durable::write_atomically(&args.output, serde_json::to_string(&ids)?.as_bytes())?;
    Ok(())
}
