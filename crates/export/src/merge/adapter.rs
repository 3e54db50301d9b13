//! The adapter that goes into a model's tensors, or out of them.

use std::path::{Path, PathBuf};

use llama_burn::LlamaConfig;
use lora_core::LoraConfig;

use super::MergeError;
use peft::{self, AdapterError, AdapterTensors};

/// The embedding's tensor, and that of the output layer.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// An adapter that fits a model.
pub(super) struct Adapter<'a> {
    folder: PathBuf,
    lora: LoraConfig,
    tensors: AdapterTensors,
    model: &'a LlamaConfig,
}

impl<'a> Adapter<'a> {
    /// Reads the adapter of a folder and holds it against the model.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or does not fit the model, by PEFT's names.
    pub(super) fn read(folder: &Path, model: &'a LlamaConfig) -> Result<Self, MergeError> {
        let failed = |source| MergeError::Adapter {
            folder: folder.into(),
            source,
        };
        let (config, tensors) = peft::read_adapter(folder).map_err(failed)?;
        tensors.check(model, &config.lora).map_err(failed)?;
        let adapter = Self {
            folder: folder.into(),
            lora: config.lora,
            tensors,
            model,
        };
        match adapter.bias_without_place() {
            Some(module) => Err(MergeError::NoBias { module }),
            None => Ok(adapter),
        }
    }

    /// A module whose adapter adds a bias although the model's has none.
    fn bias_without_place(&self) -> Option<String> {
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

    /// Modules with matrices, and tensors that the adapter brings its own version of.
    pub(super) fn counts(&self) -> [usize; 2] {
        let tables = self.tensors.token_rows.len();
        [
            self.tensors.modules.len(),
            self.tensors.whole.len() + tables,
        ]
    }

    /// The most terms of a sum that changes an element: the rank and the element itself.
    pub(super) fn terms(&self) -> usize {
        let ranks = self.tensors.modules.values().map(|pair| pair.r);
        ranks.max().unwrap_or(0) + 1
    }

    /// Names of the adapted modules.
    pub(super) fn modules(&self) -> impl Iterator<Item = &String> {
        self.tensors.modules.keys()
    }

    /// Whether the model's output layer is no longer its embedding.
    pub(super) fn unties(&self) -> bool {
        self.tensors.unties(self.model, &self.lora)
    }

    /// Whether this tensor of the merged model is another than the base's.
    pub(super) fn changes(&self, tensor: &str) -> bool {
        self.tensors.changes(self.model, &self.lora, tensor)
    }

    /// The tensor with the adapter in it.
    pub(super) fn merged(&self, tensor: &str, values: Vec<f32>) -> Result<Vec<f32>, MergeError> {
        let merged = self.tensors.merged(self.model, &self.lora, tensor, values);
        merged.map_err(|source| self.failed(source))
    }

    /// Why the base cannot be computed from the merged model, if it cannot.
    pub(super) fn no_way_back(&self) -> Option<&'static str> {
        let mut pairs = self.tensors.modules.values();
        if !self.tensors.token_rows.is_empty() {
            Some(
                "it takes the place of rows of the embedding, and nothing in the merged model tells what they were",
            )
        } else if !self.tensors.whole.is_empty() {
            Some(
                "it takes the place of whole tensors, and nothing in the merged model tells what they were",
            )
        } else if pairs.any(|pair| pair.magnitude.is_some()) {
            Some(
                "a DoRA scales each output by a length of the base's weight, which the merged model does not tell",
            )
        } else if self.unties() {
            Some("it gave the model an output layer of its own, which the base does not have")
        } else {
            None
        }
    }

    /// The tensor without the adapter; there must be a [way back](Self::no_way_back).
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
