//! An adapter that is merged into a model's tensors, or taken out of them.

use std::path::{Path, PathBuf};

use llama_burn::LlamaConfig;
use lora_core::LoraConfig;

use super::MergeError;
use peft::{self, AdapterError, AdapterTensors};

/// An adapter that fits a model.
pub(super) struct Adapter<'a> {
    folder: PathBuf,
    lora: LoraConfig,
    tensors: AdapterTensors,
    model: &'a LlamaConfig,
}

impl<'a> Adapter<'a> {
    /// Reads the adapter of a folder and checks it against the model.
    ///
    /// # Errors
    ///
    /// An adapter that cannot be read or that does not fit the model, by PEFT's names.
    pub(super) fn read(folder: &Path, model: &'a LlamaConfig) -> Result<Self, MergeError> {
        let failed = |source| MergeError::Adapter {
            folder: folder.into(),
            source,
        };
        let (config, mut tensors) = peft::read_adapter(folder).map_err(failed)?;
        tensors.check(model, &config.lora).map_err(failed)?;
        tensors.complete(model, &config.lora);
        let adapter = Self {
            folder: folder.into(),
            lora: config.lora,
            tensors,
            model,
        };
        match adapter.bias_without_tensor() {
            Some(module) => Err(MergeError::NoBias { module }),
            None => Ok(adapter),
        }
    }

    /// A module whose adapter adds a bias although the model's module has none.
    fn bias_without_tensor(&self) -> Option<String> {
        let shapes = self.model.tensor_shapes();
        let biased = self
            .tensors
            .modules
            .iter()
            .filter(|(_, p)| p.bias.is_some());
        let mut modules = biased.map(|(module, _)| module);
        let has_bias = |module: &&String| {
            let name = format!("{module}.bias");
            shapes.iter().any(|(tensor, _)| *tensor == name)
        };
        modules.find(|module| !has_bias(module)).cloned()
    }

    /// Counts the adapted modules, and the tensors that the adapter replaces.
    pub(super) fn counts(&self) -> [usize; 2] {
        let tables = self.tensors.token_rows.len();
        [
            self.tensors.modules.len(),
            self.tensors.whole.len() + tables,
        ]
    }

    /// The most terms of a sum that changes an element: the rank, and one for the element itself.
    pub(super) fn terms(&self) -> usize {
        let ranks = self.tensors.modules.values().map(|pair| pair.r);
        ranks.max().unwrap_or(0) + 1
    }

    /// Names of the adapted modules.
    pub(super) fn modules(&self) -> impl Iterator<Item = &String> {
        self.tensors.modules.keys()
    }

    /// Whether the merged model needs an output layer apart from its embedding.
    pub(super) fn unties(&self) -> bool {
        self.tensors.unties(self.model, &self.lora)
    }

    /// Whether this tensor of the merged model differs from the base's.
    pub(super) fn changes(&self, tensor: &str) -> bool {
        self.tensors.changes(self.model, &self.lora, tensor)
    }

    /// The tensor with the adapter merged in.
    pub(super) fn merged(&self, tensor: &str, values: Vec<f32>) -> Result<Vec<f32>, MergeError> {
        let merged = self.tensors.merged(self.model, &self.lora, tensor, values);
        merged.map_err(|source| self.failed(source))
    }

    /// The reason why the base cannot be computed from the merged model, if there is one.
    pub(super) fn not_invertible(&self) -> Option<&'static str> {
        if !self.tensors.token_rows.is_empty() {
            Some(
                "it replaced rows of the embedding, and the merged model does not contain the original rows",
            )
        } else if !self.tensors.whole.is_empty() {
            Some(
                "it replaced whole tensors, and the merged model does not contain the original ones",
            )
        } else if let Some(reason) = self.lora.method.facts().beyond_low_rank {
            Some(reason)
        } else if self.unties() {
            Some(
                "it gave the model an output layer apart from the embedding, which the base does not have",
            )
        } else {
            None
        }
    }

    /// The tensor without the adapter. The adapter must be [invertible](Self::not_invertible).
    pub(super) fn unmerged(&self, tensor: &str, values: Vec<f32>) -> Result<Vec<f32>, MergeError> {
        let (model, lora) = (self.model, &self.lora);
        let unmerged = self.tensors.unmerged(model, lora, tensor, values, &[]);
        unmerged.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: AdapterError) -> MergeError {
        MergeError::Adapter {
            folder: self.folder.clone(),
            source,
        }
    }
}
