//! An adapter in llama.cpp's layout, and as a part of the weights.

use std::path::{Path, PathBuf};

use kernels::cpu;
use llama_burn::gguf::{llama_cpp_name, rows_of};
use llama_burn::{EMBEDDING_WEIGHT, HEAD_WEIGHT, LlamaConfig, Weights};

use super::ExportGgufError;
use peft::{AdapterConfig, AdapterError, AdapterTensors, read_adapter};

/// An adapter that fits a model.
pub(super) struct Adapter {
    folder: PathBuf,
    config: AdapterConfig,
    tensors: AdapterTensors,
    model: LlamaConfig,
}

/// A matrix of llama.cpp's LoRA file, row-major.
pub(super) struct LoraTensor {
    pub name: String,
    pub shape: [usize; 2],
    pub values: Vec<f32>,
}

impl Adapter {
    /// Reads an adapter and checks its tensors against the model's.
    pub fn read(folder: &Path, model: &LlamaConfig) -> Result<Self, ExportGgufError> {
        let failed = |source| ExportGgufError::Adapter {
            folder: folder.into(),
            source,
        };
        let (config, mut tensors) = read_adapter(folder).map_err(failed)?;
        tensors.check(model, &config.lora).map_err(failed)?;
        tensors.complete(model, &config.lora);
        Ok(Self {
            folder: folder.into(),
            config,
            tensors,
            model: model.clone(),
        })
    }

    /// Adds `lm_head.weight` to the tensors of a tied model if the adapter makes it differ from the embedding.
    pub fn add_untied_head(&self, model: &LlamaConfig, shapes: &mut Vec<(String, Vec<usize>)>) {
        if self.tensors.unties(model, &self.config.lora) {
            shapes.push((
                HEAD_WEIGHT.into(),
                vec![model.vocab_size, model.hidden_size],
            ));
        }
    }

    /// A tensor of the model with the adapter merged in.
    pub fn merged(
        &self,
        weights: &mut Weights,
        model: &LlamaConfig,
        name: &str,
    ) -> Result<Vec<f32>, ExportGgufError> {
        let source = if name == HEAD_WEIGHT && model.tie_word_embeddings {
            EMBEDDING_WEIGHT
        } else {
            name
        };
        let values = weights.read(source)?;
        let merged = self.tensors.merged(model, &self.config.lora, name, values);
        merged.map_err(|source: AdapterError| ExportGgufError::Adapter {
            folder: self.folder.clone(),
            source,
        })
    }

    /// llama.cpp's architecture of the model.
    pub fn architecture(&self) -> &'static str {
        self.model.family.gguf_architecture
    }

    /// llama.cpp's α and matrices. llama.cpp scales by α over each matrix's rank. If the adapter's scale of
    /// a module differs (patterns, α/√r), B is multiplied by the ratio.
    pub fn lora_tensors(&self) -> Result<(f32, Vec<LoraTensor>), ExportGgufError> {
        let alpha = self.config.lora.lora_alpha;
        let selector = self.config.lora.selector()?;
        if let Some(what) = self.beyond_lora() {
            return Err(ExportGgufError::NotLora {
                folder: self.folder.clone(),
                what,
            });
        }
        let mut tensors = Vec::new();
        for module in self.tensors.modules.keys() {
            let lora = &self.config.lora;
            let Some(pair) = self.tensors.low_rank(&self.model, lora, module) else {
                continue;
            };
            let (d_in, d_out, r) = (pair.d_in, pair.d_out, pair.r);
            let name = format!("{module}.weight");
            let Some(theirs) = llama_cpp_name(&name) else {
                return Err(ExportGgufError::Module {
                    folder: self.folder.clone(),
                    module: module.clone(),
                });
            };
            let factor = (selector.scale(module) * r as f64 / alpha) as f32;
            let mut b = cpu::transposed(&pair.b, [r, d_out]);
            b.iter_mut().for_each(|value| *value *= factor);
            if let Some(rows) = rows_of(&name, &self.model) {
                b = rows.to_llama_cpp(&b, r);
            }
            tensors.push(LoraTensor {
                name: format!("{theirs}.lora_a"),
                shape: [r, d_in],
                values: cpu::transposed(&pair.a, [d_in, r]),
            });
            tensors.push(LoraTensor {
                name: format!("{theirs}.lora_b"),
                shape: [d_out, r],
                values: b,
            });
        }
        Ok((alpha as f32, tensors))
    }

    /// The part of the adapter that is not a pair of matrices of a linear module, if any.
    fn beyond_lora(&self) -> Option<String> {
        if let Some(name) = self.tensors.whole.keys().next() {
            return Some(format!("a copy of {name} of its own"));
        }
        if let Some(module) = self.tensors.token_rows.keys().next() {
            return Some(format!("rows of {module} of its own"));
        }
        self.tensors.modules.iter().find_map(|(module, pair)| {
            let name = format!("{module}.weight");
            let facts = self.config.lora.method.facts();
            let vector = pair.vectors.keys().next();
            let vector = vector.filter(|_| facts.beyond_low_rank.is_some());
            if let Some(vector) = vector {
                Some(format!("{module}'s {vector}"))
            } else if pair.bias.is_some() {
                Some(format!("a bias of {module}'s B"))
            } else if name == EMBEDDING_WEIGHT
                || (name == HEAD_WEIGHT && self.model.tie_word_embeddings)
            {
                Some(format!("matrices for {module}, which is the embedding"))
            } else {
                None
            }
        })
    }
}
