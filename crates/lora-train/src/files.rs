//! The files that a run reads.

use std::path::PathBuf;

use llama_burn::LlamaConfig;

use crate::error::TrainError;
use data::{Data, DataError};
use hub::Need;
use run_config::Config;
use run_config::embedded;

/// The files of a run: those that the configuration names, or the embedded ones.
#[derive(Debug, Clone)]
pub struct RunFiles {
    /// The model's folder.
    pub model: PathBuf,
    /// Training examples.
    pub train: PathBuf,
    /// Validation examples, if they have a file of their own.
    pub validation: Option<PathBuf>,
}

impl RunFiles {
    /// Finds the files; downloads the model if it is a name on the Hub, and unpacks the embedded files if the
    /// configuration uses them.
    ///
    /// # Errors
    ///
    /// Every file that is missing; then the error of the download.
    pub fn find(config: &Config) -> Result<Self, TrainError> {
        Self::find_for(config, Need::Model)
    }

    /// As [`find`](Self::find), with the files of a model on the Hub that `need` selects.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub fn find_for(config: &Config, need: Need) -> Result<Self, TrainError> {
        config.check_files()?;
        let embedded = if config.embedded_model() || config.embedded_data() {
            Some(embedded::materialise()?)
        } else {
            None
        };
        let embedded = embedded.as_ref();
        let train = match embedded.filter(|_| config.embedded_data()) {
            Some(paths) => paths.train.clone(),
            None => config.dataset_path.clone(),
        };
        let own_validation = embedded.filter(|_| config.embedded_data());
        let model = match (config.hub_model(), config.model_folder(), embedded) {
            (Some(_), _, _) => hub::model_folder(&config.base_model, need)?,
            (None, Some(folder), _) => folder,
            (None, None, Some(paths)) => paths.model_dir.clone(),
            (None, None, None) => PathBuf::from(&config.base_model),
        };
        Ok(Self {
            model,
            validation: match (&config.val_dataset_path, own_validation) {
                (Some(path), _) => Some(path.clone()),
                (None, paths) => paths.map(|paths| paths.validation.clone()),
            },
            train,
        })
    }

    /// Reads and tokenizes the examples. `max_seq_len` is at most the number of the model's positions. `time` is the
    /// current time for chat templates, the clock's if `None`.
    ///
    /// # Errors
    ///
    /// The first bad line, by file and number.
    pub fn data(
        &self,
        config: &Config,
        model: &LlamaConfig,
        time: Option<u64>,
    ) -> Result<Data, DataError> {
        data::prepare(
            &config.data_options(),
            &self.model,
            &self.train,
            self.validation.as_deref(),
            model.vocab_size,
            config.max_seq_len.min(model.positions()),
            time,
        )
    }
}
