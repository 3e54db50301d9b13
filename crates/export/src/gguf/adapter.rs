//! An adapter as llama.cpp sees it, and as a part of the weights.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use kernels::cpu;
use llama_burn::gguf::{llama_cpp_name, rows_of};
use llama_burn::{LlamaConfig, Weights};

use peft::{AdapterConfig, AdapterTensors, read_adapter};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// An adapter that fits a model.
pub(super) struct Adapter {
    folder: PathBuf,
    config: AdapterConfig,
    tensors: AdapterTensors,
    head_dim: usize,
    tied: bool,
}

/// A matrix of llama.cpp's LoRA file, row-major.
pub(super) struct LoraTensor {
    pub name: String,
    pub shape: [usize; 2],
    pub values: Vec<f32>,
}

impl Adapter {
    /// Reads an adapter and holds its tensors against the model's.
    pub fn read(folder: &Path, model: &LlamaConfig) -> anyhow::Result<Self> {
        let about = || format!("the adapter in {}", folder.display());
        let (config, tensors) = read_adapter(folder).with_context(about)?;
        tensors.check(model, &config.lora).with_context(about)?;
        Ok(Self {
            folder: folder.into(),
            config,
            tensors,
            head_dim: model.head_dim,
            tied: model.tie_word_embeddings,
        })
    }

    /// A head that is no longer the embedding once the adapter is in is a tensor of its own.
    pub fn add_untied_head(&self, model: &LlamaConfig, shapes: &mut Vec<(String, Vec<usize>)>) {
        if self.tensors.unties(model, &self.config.lora) {
            shapes.push((HEAD.into(), vec![model.vocab_size, model.hidden_size]));
        }
    }

    /// A tensor of the model with the adapter in it.
    pub fn merged(
        &self,
        weights: &mut Weights,
        model: &LlamaConfig,
        name: &str,
    ) -> anyhow::Result<Vec<f32>> {
        let source = if name == HEAD && model.tie_word_embeddings {
            EMBEDDING
        } else {
            name
        };
        let values = weights.read(source)?;
        let merged = self.tensors.merged(model, &self.config.lora, name, values);
        merged.with_context(|| format!("the adapter in {}", self.folder.display()))
    }

    /// llama.cpp's α and matrices. It scales by α over each matrix's rank; where the adapter's own scale of
    /// a module is another (patterns, α/√r), the difference goes into B.
    pub fn lora_tensors(&self) -> anyhow::Result<(f32, Vec<LoraTensor>)> {
        let alpha = self.config.lora.lora_alpha;
        let selector = self.config.lora.selector()?;
        if let Some(what) = self.beyond_lora() {
            bail!(
                "the adapter in {} has {what}, which llama.cpp's LoRA file has no place for; leave --lora out to \
                 write the model with the adapter in its weights",
                self.folder.display()
            );
        }
        let mut tensors = Vec::new();
        for (module, pair) in &self.tensors.modules {
            let (d_in, d_out, r) = (pair.d_in, pair.d_out, pair.r);
            let name = format!("{module}.weight");
            let Some(theirs) = llama_cpp_name(&name) else {
                bail!(
                    "the adapter in {}: llama.cpp has no name for {module}",
                    self.folder.display()
                );
            };
            let factor = (selector.scale(module) * r as f64 / alpha) as f32;
            let mut b = cpu::transposed(&pair.b, [r, d_out]);
            b.iter_mut().for_each(|value| *value *= factor);
            if let Some(rows) = rows_of(&name, self.head_dim) {
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

    /// What of the adapter is no pair of matrices beside a linear module.
    fn beyond_lora(&self) -> Option<String> {
        if let Some(name) = self.tensors.whole.keys().next() {
            return Some(format!("a copy of {name} of its own"));
        }
        if let Some(module) = self.tensors.token_rows.keys().next() {
            return Some(format!("rows of {module} of its own"));
        }
        self.tensors.modules.iter().find_map(|(module, pair)| {
            let name = format!("{module}.weight");
            if pair.magnitude.is_some() {
                Some("DoRA's magnitudes".to_string())
            } else if pair.bias.is_some() {
                Some(format!("a bias of {module}'s B"))
            } else if name == EMBEDDING || (name == HEAD && self.tied) {
                Some(format!("matrices for {module}, which is the embedding"))
            } else {
                None
            }
        })
    }
}
