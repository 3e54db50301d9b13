//! Trains an adapter on the embedded model and data, and evaluates it before and after.
//!
//! ```text
//! cargo run --release -p lora-train --example train_and_evaluate
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};

use lora_train::metrics::ValidationLine;
use lora_train::{Config, Interrupt, Request, Scores, TrainingCallback, evaluate, train};

/// Prints each validation of the run.
struct Progress;

impl TrainingCallback for Progress {
    fn on_validation(&mut self, line: &ValidationLine) {
        println!("step {}: validation loss {:.4}", line.step, line.val_loss);
    }
}

/// Returns the scores of the base model, those of the adapter, and the adapter's folder, which PEFT loads.
pub fn train_and_evaluate(output: &Path) -> Result<(Scores, Scores, PathBuf), Box<dyn Error>> {
    // The keys of a configuration file. Without a file, the model and data are the embedded ones.
    let settings = ["max_steps=100", "eval_steps=50"].map(String::from);
    let mut config = Config::load(None, None, &settings)?;
    config.output_dir = output.into();
    let request = Request::new(config);

    let before = evaluate(&request.config, request.backend, None)?;
    let ended = train(&request, &Interrupt::default(), &mut Progress)?;
    let adapter = ended.folder().adapter();
    let after = evaluate(&request.config, request.backend, Some(&adapter))?;
    match (before, after) {
        (Some(before), Some(after)) => Ok((before, after, adapter)),
        _ => Err("the data has no validation examples".into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let (before, after, adapter) = train_and_evaluate(Path::new("runs/example"))?;
    for (name, scores) in [("base model", before), ("with the adapter", after)] {
        let exact_match = 100.0 * scores.row_accuracy;
        println!(
            "{name}: loss {:.4}, exact match {exact_match:.1} %",
            scores.loss
        );
    }
    println!("the adapter is in {}", adapter.display());
    Ok(())
}
