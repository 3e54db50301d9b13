//! From a Hugging Face folder to a [`Llama`], one tensor at a time.

use std::path::Path;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_core::{LoraLinear, Quantization, QuantizationError, quantize_data};

use crate::model::decoder_layer;
use crate::{Llama, LlamaConfig, RmsNorm, VocabTable, Weights, WeightsError};

/// How weights are stored.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// For the linear modules of the decoder. Norms, embedding and head stay floats.
    pub quantization: Quantization,
    /// The type that the model computes in; embedding, head and unquantized weights are stored in it.
    pub dtype: DType,
}

impl Default for LoadOptions {
    /// 8 bits, f32.
    fn default() -> Self {
        Self {
            quantization: Quantization::Bits8,
            dtype: DType::F32,
        }
    }
}

/// What became of one tensor.
#[derive(Debug, Clone)]
pub struct TensorReport {
    /// Hugging Face's name.
    pub name: String,
    /// Its shape in the file.
    pub shape: Vec<usize>,
    /// How far the quantized weight is from the original; none where it stayed a float.
    pub quantization: Option<QuantizationError>,
    /// Tensors read so far, this one included.
    pub done: usize,
    /// Tensors in all.
    pub total: usize,
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The weight files.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// Reads the weights of `folder` for `config` onto `device`, frozen, without adapters.
///
/// Tensors are read, turned and quantized one at a time on the host, so that beside the packed model
/// only the largest tensor is ever in memory. `report` hears of each.
///
/// # Errors
///
/// A missing, unexpected, ill-shaped or damaged tensor, by name.
pub fn load(
    folder: &Path,
    config: &LlamaConfig,
    options: LoadOptions,
    device: &Device,
    mut report: impl FnMut(&TensorReport),
) -> Result<Llama, LoadError> {
    let mut weights = Weights::open(folder)?;
    let shapes = config.tensor_shapes();
    weights.check(&shapes)?;
    let mut loader = Loader {
        weights: &mut weights,
        options,
        device,
        report: &mut report,
        done: 0,
        total: shapes.len(),
    };
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let embed_tokens = loader.table("model.embed_tokens.weight", vocab, hidden)?;
    let mut layers = Vec::with_capacity(config.num_hidden_layers);
    for index in 0..config.num_hidden_layers {
        let prefix = format!("model.layers.{index}");
        let mut linears = Vec::with_capacity(7);
        for (name, d_in, d_out, bias) in config.layer_linears() {
            linears.push(loader.linear(&format!("{prefix}.{name}"), d_in, d_out, bias)?);
        }
        let norms = [
            loader.norm(&format!("{prefix}.input_layernorm.weight"), config)?,
            loader.norm(&format!("{prefix}.post_attention_layernorm.weight"), config)?,
        ];
        let linears = linears
            .try_into()
            .expect("a layer has seven linear modules");
        layers.push(decoder_layer(config, norms, linears));
    }
    let norm = loader.norm("model.norm.weight", config)?;
    let lm_head = match config.tie_word_embeddings {
        true => None,
        false => Some(loader.table("lm_head.weight", vocab, hidden)?),
    };
    Ok(Llama {
        embed_tokens,
        layers,
        norm,
        lm_head,
        config: config.clone(),
    })
}

struct Loader<'a> {
    weights: &'a mut Weights,
    options: LoadOptions,
    device: &'a Device,
    report: &'a mut dyn FnMut(&TensorReport),
    done: usize,
    total: usize,
}

impl Loader<'_> {
    fn note(&mut self, name: &str, shape: &[usize], quantization: Option<QuantizationError>) {
        self.done += 1;
        (self.report)(&TensorReport {
            name: name.into(),
            shape: shape.to_vec(),
            quantization,
            done: self.done,
            total: self.total,
        });
    }

    fn linear(
        &mut self,
        module: &str,
        d_in: usize,
        d_out: usize,
        bias: bool,
    ) -> Result<LoraLinear, LoadError> {
        let name = format!("{module}.weight");
        let values = transpose(&self.weights.read(&name)?, d_out, d_in);
        let quantized = quantize_data(&values, [d_in, d_out], self.options.quantization);
        let (weight, error) = match quantized {
            Some((data, error)) => {
                drop(values);
                (self.place(data, None), Some(error))
            }
            None => {
                let data = TensorData::new(values, [d_in, d_out]);
                (self.place(data, Some(self.options.dtype)), None)
            }
        };
        self.note(&name, &[d_out, d_in], error);
        let bias = match bias {
            false => None,
            true => {
                let name = format!("{module}.bias");
                let data = TensorData::new(self.weights.read(&name)?, [d_out]);
                self.note(&name, &[d_out], None);
                Some(self.place::<1>(data, Some(self.options.dtype)))
            }
        };
        Ok(LoraLinear::frozen(Linear { weight, bias }))
    }

    fn norm(&mut self, name: &str, config: &LlamaConfig) -> Result<RmsNorm, LoadError> {
        let values = self.weights.read(name)?;
        let hidden = values.len();
        self.note(name, &[hidden], None);
        Ok(RmsNorm {
            // f32 whatever the compute type: the norm computes in it.
            weight: self.place(TensorData::new(values, [hidden]), Some(DType::F32)),
            eps: config.rms_norm_eps,
        })
    }

    fn table(&mut self, name: &str, vocab: usize, hidden: usize) -> Result<VocabTable, LoadError> {
        let values = self.weights.read(name)?;
        let rows_per_piece = VocabTable::rows_per_piece(hidden, self.options.dtype.size());
        let pieces = match vocab <= rows_per_piece {
            true => {
                let data = TensorData::new(values, [vocab, hidden]);
                vec![self.place(data, Some(self.options.dtype))]
            }
            false => values
                .chunks(rows_per_piece * hidden)
                .map(|piece| {
                    let data = TensorData::new(piece.to_vec(), [piece.len() / hidden, hidden]);
                    self.place(data, Some(self.options.dtype))
                })
                .collect(),
        };
        self.note(name, &[vocab, hidden], None);
        Ok(VocabTable {
            pieces,
            rows_per_piece,
        })
    }

    /// Puts data on the device as a frozen parameter; floats in `dtype`, quantized data as it is.
    fn place<const D: usize>(&self, data: TensorData, dtype: Option<DType>) -> Param<Tensor<D>> {
        let device = self.device;
        let tensor = device.memory_persistent_allocations(data, |data| match dtype {
            Some(dtype) => Tensor::from_data(data, (device, dtype)),
            None => Tensor::from_data(data, device),
        });
        Param::initialized(Default::default(), tensor).set_require_grad(false)
    }
}

/// `[rows, cols]` → `[cols, rows]`, in tiles that fit the cache.
fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut turned = vec![0f32; values.len()];
    for row in (0..rows).step_by(TILE) {
        for col in (0..cols).step_by(TILE) {
            for r in row..rows.min(row + TILE) {
                for c in col..cols.min(col + TILE) {
                    turned[c * rows + r] = values[r * cols + c];
                }
            }
        }
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_twice_gives_the_matrix_back() {
        let values: Vec<f32> = (0..70 * 33).map(|i| i as f32).collect();
        let turned = transpose(&values, 70, 33);
        assert_eq!(turned[5 * 70 + 7], values[7 * 33 + 5]);
        assert_eq!(transpose(&turned, 33, 70), values);
    }
}
