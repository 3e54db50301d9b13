//! Evaluation of a model, with or without an adapter, on a run's validation examples.

use std::path::Path;

use llama_burn::{Llama, LlamaConfig};

use crate::error::TrainError;
use crate::files::RunFiles;
use crate::fit;
use crate::guard::Guard;
use crate::metrics::Scores;
use crate::prepare::model_options;
use data::{Data, Prefixes};
use device::{Backend, ModelLoader};
use peft::read_adapter;
use run_config::Config;
use train_step::gradients;
use train_step::loss::LossSums;

/// Validation loss, token accuracy and exact match of the base model of `config`, with the PEFT adapter of a folder (or
/// of a name on the Hub) beside its frozen weights. `None` if the configuration has no validation examples.
///
/// The examples, the prompts and the micro-batches are those of a training run, so the scores are those that
/// [`train()`](crate::train()) reports. Memory is not planned: a micro-batch that does not fit is an error.
///
/// # Errors
///
/// Invalid files, an invalid adapter or an unusable device; [`TrainError::Evaluation`] if the device fails.
pub fn evaluate(
    config: &Config,
    backend: Backend,
    adapter: Option<&Path>,
) -> Result<Option<Scores>, TrainError> {
    let files = RunFiles::find(config)?;
    let model = LlamaConfig::from_file(&files.model)?;
    let data = files.data(config, &model, None)?;
    if data.validation.is_empty() {
        return Ok(None);
    }
    let prefixes = fit::prefixes(config, &model, &data);
    let loader = ModelLoader::new(&files.model, model, backend, model_options(config))?;
    let longest = data.validation.lengths().max().unwrap_or(1);
    loader.check(&config.lora_config(), longest)?;
    let model = loader.load(|_| {})?;
    let model = match adapter {
        Some(folder) => with_adapter(model, folder)?,
        None => model,
    };
    let sums = Guard::install().run(|| validation_sums(config, &data, prefixes, &model));
    Ok(Some(Scores::of(&sums.map_err(TrainError::Evaluation)?)))
}

fn with_adapter(model: Llama, folder: &Path) -> Result<Llama, TrainError> {
    let folder = &hub::adapter_folder(folder)?;
    let (config, tensors) = read_adapter(folder)?;
    let model = tensors.put_on(model, &config.lora);
    Ok(model.map_err(|error| error.in_file(folder))?)
}

fn validation_sums(config: &Config, data: &Data, prefixes: Prefixes, model: &Llama) -> LossSums {
    let examples = &data.validation;
    let mut sums = LossSums::default();
    for indices in examples.in_order(config.batch_size.rows(), config.max_batch_tokens) {
        let batch = examples.batch(&indices, prefixes);
        sums.add(gradients::evaluate(model, &batch));
    }
    sums
}
