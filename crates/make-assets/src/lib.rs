//! Makes the files in `assets/` from a seed: a data set, a tokenizer and a small pretrained Llama.
//!
//! | file | contents |
//! | --- | --- |
//! | `words`, `news` | sentences with a sentiment that no single word reveals |
//! | `data_set` | examples in FinLoRA's format |
//! | `corpus` | text without sentiments, for tokenizer and model |
//! | `tokenizer` | byte-level BPE |
//! | `model`, `pretrain` | the model's shape, its weights |

use std::path::Path;

use llama_burn::LlamaConfig;
use serde_json::Value;
use tokenizers::Tokenizer;

use durable::write_atomically;

mod corpus;
mod data_set;
mod draw;
mod error;
mod model;
mod news;
mod pretrain;
mod tokenizer;
mod words;

use data_set::DataSet;
use draw::Draw;
pub use error::MakeAssetsError;
use pretrain::Recipe;

/// The seed of the committed files.
pub const SEED: u64 = 20_261_123;

/// The files that are made in seconds from a seed.
struct Text {
    data: DataSet,
    tokenizer: Tokenizer,
    /// Paths below the output folder, with contents.
    files: Vec<(String, String)>,
}

/// Writes every file of `assets/` except its README into `output`: seconds for the text, then some
/// minutes of pretraining on the CPU. `progress` receives messages.
///
/// The same seed gives the same data set, tokenizer and configuration on every machine, byte for
/// byte. Weights are reproduced exactly only on the same kind of processor, because others add the
/// same products in another order.
///
/// # Errors
///
/// If a file cannot be written, or pretraining diverges.
pub fn run(
    output: &Path,
    seed: u64,
    progress: &mut dyn FnMut(&str),
) -> Result<(), MakeAssetsError> {
    let text = text(seed)?;
    for (name, contents) in &text.files {
        write_atomically(&output.join(name), contents.as_bytes())?;
        progress(&format!("{name}: {} bytes", contents.len()));
    }
    let config = object(model::config());
    let model = pretrain::pretrain(
        &LlamaConfig::from_json(&config)?,
        &text.tokenizer,
        &Draw::new(seed).stream(PRETRAINING),
        &text.data.sentences,
        Recipe::default(),
        progress,
    )?;
    let name = "model/model.safetensors";
    let bytes = model::safetensors(&model)?;
    write_atomically(&output.join(name), &bytes)?;
    progress(&format!("{name}: {} bytes", bytes.len()));
    Ok(())
}

// The independent random streams of the seed.
const DATA: u64 = 0;
const TOKENIZER: u64 = 1;
const PRETRAINING: u64 = 2;

fn text(seed: u64) -> Result<Text, MakeAssetsError> {
    let root = Draw::new(seed);
    let data = data_set::data_set(&mut root.stream(DATA));
    let tokenizer = tokenizer::train(&mut root.stream(TOKENIZER), &data.sentences)?;
    let mut files = vec![
        ("data/sentiment_train.jsonl".into(), data.train.clone()),
        (
            "data/sentiment_validation.jsonl".into(),
            data.validation.clone(),
        ),
        (
            "model/config.json".into(),
            tokenizer::pretty(&model::config()),
        ),
        (
            "model/generation_config.json".into(),
            tokenizer::pretty(&model::generation_config()),
        ),
    ];
    for (name, contents) in tokenizer::files(&tokenizer, model::MAX_POSITIONS)? {
        files.push((format!("model/{name}"), contents));
    }
    Ok(Text {
        data,
        tokenizer,
        files,
    })
}

fn object(value: Value) -> serde_json::Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => serde_json::Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_text_is_what_the_seed_makes() {
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets");
        for (name, contents) in text(SEED).unwrap().files {
            let committed = std::fs::read_to_string(assets.join(&name)).unwrap();
            assert!(
                committed == contents,
                "assets/{name} differs from the output of seed {SEED}: run `cargo xtask make-assets`"
            );
        }
    }
}
