//! An adapter as llama.cpp sees it, and as a part of the weights.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use llama_burn::gguf::{llama_cpp_name, rows_of};
use llama_burn::{LlamaConfig, Weights};

use crate::peft::{AdapterConfig, AdapterTensors, read_adapter};

/// An adapter that fits a model.
pub(super) struct Adapter {
    folder: PathBuf,
    config: AdapterConfig,
    tensors: AdapterTensors,
    head_dim: usize,
}

/// A matrix of llama.cpp's LoRA file, row-major.
pub(super) struct LoraTensor {
    pub name: String,
    pub shape: [usize; 2],
    pub values: Vec<f32>,
}

impl Adapter {
    /// Reads an adapter and holds its matrices against the model's.
    pub fn read(folder: &Path, model: &LlamaConfig) -> anyhow::Result<Self> {
        let about = || format!("the adapter in {}", folder.display());
        let (config, tensors) = read_adapter(folder).with_context(about)?;
        let shapes = model.tensor_shapes();
        for (module, pair) in &tensors.modules {
            let name = format!("{module}.weight");
            let expected = [pair.d_out, pair.d_in];
            match shapes.iter().find(|(other, _)| *other == name) {
                Some((_, shape)) if *shape == expected => {}
                Some((_, shape)) => bail!(
                    "{}: {module} is for a weight of shape {expected:?}, the model's is {shape:?}; was it \
                     trained on another model?",
                    about()
                ),
                None => bail!("{}: the model has no {module}", about()),
            }
        }
        Ok(Self {
            folder: folder.into(),
            config,
            tensors,
            head_dim: model.head_dim,
        })
    }

    /// A head that the adapter changes, and the embedding not, is a tensor of its own.
    pub fn add_untied_head(&self, _model: &LlamaConfig, _shapes: &mut Vec<(String, Vec<usize>)>) {}

    /// A tensor of the model with the adapter in it.
    pub fn merged(
        &self,
        weights: &mut Weights,
        _model: &LlamaConfig,
        name: &str,
    ) -> anyhow::Result<Vec<f32>> {
        let mut values = weights.read(name)?;
        let module = name.strip_suffix(".weight").unwrap_or_default();
        if let Some(pair) = self.tensors.modules.get(module) {
            let scale = self.config.lora.scale() as f32;
            let (d_in, d_out, r) = (pair.d_in, pair.d_out, pair.r);
            for (output, row) in values.chunks_exact_mut(d_in).enumerate() {
                for (input, value) in row.iter_mut().enumerate() {
                    let a = &pair.a[input * r..][..r];
                    let b = (0..r).map(|rank| pair.b[rank * d_out + output]);
                    *value += scale * a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                }
            }
        }
        Ok(values)
    }

    /// llama.cpp's α and matrices. It scales by α over each matrix's rank; where the adapter's own scale of
    /// a module is another, the difference goes into B.
    pub fn lora_tensors(&self) -> anyhow::Result<(f32, Vec<LoraTensor>)> {
        let alpha = self.config.lora.lora_alpha;
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
            let factor = (self.config.lora.scale() * r as f64 / alpha) as f32;
            let turned = |values: &[f32], [rows, columns]: [usize; 2], factor: f32| {
                let places = (0..columns).flat_map(|c| (0..rows).map(move |r| r * columns + c));
                places
                    .map(|place| values[place] * factor)
                    .collect::<Vec<f32>>()
            };
            let mut b = turned(&pair.b, [r, d_out], factor);
            if let Some(rows) = rows_of(&name, self.head_dim) {
                b = rows.to_llama_cpp(&b, r);
            }
            tensors.push(LoraTensor {
                name: format!("{theirs}.lora_a"),
                shape: [r, d_in],
                values: turned(&pair.a, [d_in, r], 1.0),
            });
            tensors.push(LoraTensor {
                name: format!("{theirs}.lora_b"),
                shape: [d_out, r],
                values: b,
            });
        }
        Ok((alpha as f32, tensors))
    }
}
