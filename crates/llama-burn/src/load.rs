//! From a Hugging Face folder or a GGUF file to a [`Llama`], one tensor at a time.

use std::path::Path;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use kernels::{IntegerWeight, Quantization, QuantizationError, compact, cpu, quantize_data};
use lora_core::{LoraConfig, LoraError, LoraLinear};

use crate::gguf::IntegerTensor;
use crate::spec::LinearSpec;
use crate::weights::{EMBEDDING_WEIGHT, HEAD_WEIGHT, Stored};
use crate::whole::WholeTensors;
use crate::{
    DecoderLayer, InitialAdapters, Llama, LlamaConfig, RmsNorm, VocabTable, Weights, WeightsError,
};

/// How weights are stored.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Quantization of the decoder's linear modules. Norms, embedding and head stay floats.
    pub quantization: Quantization,
    /// Whether the output layer is quantized too; a tied output layer cannot be.
    pub quantize_lm_head: bool,
    /// The type that the model computes in; embedding, head and unquantized weights are stored in it.
    pub dtype: DType,
}

impl Default for LoadOptions {
    /// 8 bits, f32.
    fn default() -> Self {
        Self {
            quantization: Quantization::Bits8,
            quantize_lm_head: false,
            dtype: DType::F32,
        }
    }
}

/// How one tensor was loaded.
#[derive(Debug, Clone)]
pub struct TensorReport {
    /// Hugging Face's name.
    pub name: String,
    /// Its shape in the file.
    pub shape: Vec<usize>,
    /// The error of the quantized weight; `None` if it stayed a float.
    pub quantization: Option<QuantizationError>,
    /// Tensors read so far, this one included.
    pub done: usize,
    /// The total number of tensors.
    pub total: usize,
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The weight files are invalid.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The output layer is to be quantized, but it is tied to the embedding.
    #[error(
        "quantize_lm_head is set, but this model's lm_head is tied to its embedding, which stays unquantized; leave quantize_lm_head out"
    )]
    TiedHead,
    /// No adapter can be taken out of a weight, or the adapters' settings are invalid.
    #[error("{module}: {source}")]
    Adapter {
        /// The module's full name.
        module: String,
        /// The error of its decomposition.
        source: LoraError,
    },
}

/// Reads the weights of `folder`, or of a GGUF file, for `config` onto `device`, frozen, without adapters.
///
/// Integers of at most 8 bits and their scales in a GGUF file are stored as 8-bit tensors without another quantization.
///
/// Tensors are read, transposed and quantized one at a time on the host, so that only the largest tensor is in memory
/// in addition to the quantized model. `report` is called for each tensor.
///
/// # Errors
///
/// Names a tensor that is missing, unexpected, damaged or has the wrong shape.
pub fn load(
    folder: &Path,
    config: &LlamaConfig,
    options: LoadOptions,
    device: &Device,
    report: impl FnMut(&TensorReport),
) -> Result<Llama, LoadError> {
    load_with(folder, config, options, device, None, None, report)
}

/// As [`load`]. Adapters are taken out of the weights that `initial` selects, before these are quantized; the model
/// does not have them yet. Weights that `lora` trains themselves are not quantized.
///
/// # Errors
///
/// As [`load`]; a weight that cannot be decomposed.
pub fn load_with(
    folder: &Path,
    config: &LlamaConfig,
    options: LoadOptions,
    device: &Device,
    lora: Option<&LoraConfig>,
    initial: Option<&mut InitialAdapters>,
    mut report: impl FnMut(&TensorReport),
) -> Result<Llama, LoadError> {
    if options.quantize_lm_head && config.tie_word_embeddings {
        return Err(LoadError::TiedHead);
    }
    let mut weights = Weights::open(folder)?;
    let shapes = config.tensor_shapes();
    weights.check(&shapes)?;
    let invalid = |source| LoadError::Adapter {
        module: "modules_to_save".into(),
        source,
    };
    let whole = lora.map(WholeTensors::new).transpose().map_err(invalid)?;
    let mut loader = Loader {
        whole,
        weights: &mut weights,
        options,
        device,
        initial,
        report: &mut report,
        done: 0,
        total: shapes.len(),
    };
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let embed_tokens = loader.table(EMBEDDING_WEIGHT, vocab, hidden)?;
    let mut layers = Vec::with_capacity(config.num_hidden_layers);
    for index in 0..config.num_hidden_layers {
        let prefix = format!("model.layers.{index}");
        let mut linears = Vec::new();
        for linear in config.layer_linears() {
            linears.push(loader.linear(&prefix, linear)?);
        }
        let mut norms = Vec::new();
        for norm in config.layer_norms() {
            norms.push(loader.norm(&format!("{prefix}.{}.weight", norm.name), config)?);
        }
        layers.push(DecoderLayer::from_parts(config, index, norms, linears));
    }
    let norm = loader.norm("model.norm.weight", config)?;
    let quantize_head = options.quantize_lm_head
        && options.quantization != Quantization::None
        && !loader.stays_dense(HEAD_WEIGHT);
    let (lm_head, quantized_lm_head) = match (config.tie_word_embeddings, quantize_head) {
        (true, _) => (None, Vec::new()),
        (false, false) => (Some(loader.table(HEAD_WEIGHT, vocab, hidden)?), Vec::new()),
        (false, true) => (None, loader.quantized_head(vocab, hidden)?),
    };
    Ok(Llama {
        embed_tokens,
        layers,
        norm,
        lm_head,
        quantized_lm_head,
        lm_head_adapter: None,
        embed_rows: None,
        head_rows: None,
        config: config.clone(),
    })
}

/// The error of a GGUF file's integers, which are not quantized again.
const EXACT: QuantizationError = QuantizationError {
    max_abs: 0.0,
    relative: 0.0,
};

struct Loader<'a> {
    /// The tensors that are not quantized.
    whole: Option<WholeTensors<'a>>,
    weights: &'a mut Weights,
    options: LoadOptions,
    device: &'a Device,
    initial: Option<&'a mut InitialAdapters>,
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

    fn linear(&mut self, layer: &str, linear: LinearSpec) -> Result<LoraLinear, LoadError> {
        let LinearSpec {
            name,
            d_in,
            d_out,
            bias,
        } = linear;
        let module = format!("{layer}.{name}");
        let name = format!("{module}.weight");
        let initial = self.initial.as_ref();
        let changes = initial.is_some_and(|initial| initial.selects(&module));
        let integers = if changes || self.stays_dense(&name) {
            None
        } else {
            self.integers(&name)?
        };
        let (weight, error) = match integers {
            Some(tensor) => self.exact(tensor, [d_in, d_out]),
            None => {
                let mut values = cpu::transposed(&self.weights.read(&name)?, [d_out, d_in]);
                if let Some(initial) = self.initial.as_mut().filter(|_| changes) {
                    let taken = initial.take_out_of(&module, &mut values, [d_in, d_out]);
                    taken.map_err(|source| LoadError::Adapter {
                        module: module.as_str().into(),
                        source,
                    })?;
                }
                let dense = self.stays_dense(&name);
                self.packed_or_dense(values, [d_in, d_out], dense)
            }
        };
        self.note(&name, &[d_out, d_in], error);
        let bias = if bias {
            let name = format!("{module}.bias");
            let data = TensorData::new(self.weights.read(&name)?, [d_out]);
            self.note(&name, &[d_out], None);
            Some(self.place::<1>(data, Some(self.options.dtype)))
        } else {
            None
        };
        Ok(LoraLinear::frozen(Linear { weight, bias }))
    }

    fn norm(&mut self, name: &str, config: &LlamaConfig) -> Result<RmsNorm, LoadError> {
        let values = self.weights.read(name)?;
        let hidden = values.len();
        self.note(name, &[hidden], None);
        Ok(RmsNorm {
            // f32 for every compute type: the norm computes in f32.
            weight: self.place(TensorData::new(values, [hidden]), Some(DType::F32)),
            eps: config.rms_norm_eps,
        })
    }

    /// The weight of the embedding or output layer. On the CPU, which computes in f32, it keeps its file's 16 bits:
    /// half the memory, the same results. Elsewhere it has the compute type.
    fn table(&mut self, name: &str, vocab: usize, hidden: usize) -> Result<VocabTable, LoadError> {
        let stored = self.weights.read_as_stored(name)?;
        let keeps = kernels::widens_tables(self.device) && self.options.dtype == DType::F32;
        let element_bytes = match (&stored, keeps) {
            (Stored::F16(_) | Stored::Bf16(_), true) => 2,
            _ => self.options.dtype.size(),
        };
        let rows_per_piece = VocabTable::rows_per_piece(hidden, element_bytes, self.device);
        let pieces = stored.into_pieces(hidden, rows_per_piece).into_iter();
        let pieces = pieces.map(|piece| {
            let dtype = if keeps {
                piece.dtype()
            } else {
                self.options.dtype
            };
            self.place(piece, Some(dtype))
        });
        let pieces = pieces.collect();
        self.note(name, &[vocab, hidden], None);
        Ok(VocabTable {
            pieces,
            rows_per_piece,
            compute: None,
        })
    }

    /// The output layer in quantized shards, each a linear module for a part of the vocabulary.
    fn quantized_head(
        &mut self,
        vocab: usize,
        hidden: usize,
    ) -> Result<Vec<LoraLinear>, LoadError> {
        let name = HEAD_WEIGHT;
        // Whole blocks in every shard except perhaps the last.
        let rows =
            VocabTable::rows_per_piece(hidden, 4, self.device).next_multiple_of(lora_core::BLOCK);
        if let Some(tensor) = self.integers(name)? {
            let block = tensor.block;
            let pieces = tensor
                .integers
                .chunks(rows * hidden)
                .zip(tensor.scales.chunks(rows * hidden / block))
                .map(|(integers, scales)| {
                    let piece = IntegerTensor {
                        integers: integers.to_vec(),
                        scales: scales.to_vec(),
                        block,
                    };
                    let (weight, _) = self.exact(piece, [hidden, integers.len() / hidden]);
                    LoraLinear::frozen(Linear { weight, bias: None })
                })
                .collect();
            self.note(name, &[vocab, hidden], Some(EXACT));
            return Ok(pieces);
        }
        let values = self.weights.read(name)?;
        let mut worst: Option<QuantizationError> = None;
        let pieces = values.chunks(rows * hidden).map(|piece| {
            let rows = piece.len() / hidden;
            let transposed = cpu::transposed(piece, [rows, hidden]);
            let (weight, error) = self.packed_or_dense(transposed, [hidden, rows], false);
            if error.map(|e| e.relative) > worst.map(|e| e.relative) {
                worst = error;
            }
            LoraLinear::frozen(Linear { weight, bias: None })
        });
        let pieces = pieces.collect();
        self.note(name, &[vocab, hidden], worst);
        Ok(pieces)
    }

    /// The integers of a GGUF file, if weights are to be 8-bit.
    fn integers(&self, name: &str) -> Result<Option<IntegerTensor>, LoadError> {
        match self.options.quantization {
            Quantization::Bits8 => Ok(self.weights.integers(name)?),
            _ => Ok(None),
        }
    }

    /// A `[d_in, d_out]` weight from a GGUF file's integers.
    fn exact(
        &self,
        tensor: IntegerTensor,
        [d_in, d_out]: [usize; 2],
    ) -> (Param<Tensor<2>>, Option<QuantizationError>) {
        let weight =
            IntegerWeight::new(tensor.integers, tensor.scales, tensor.block, [d_in, d_out]);
        let device = self.device;
        let tensor = device.memory_persistent_allocations(weight, |weight| weight.on(device));
        (frozen(tensor), Some(EXACT))
    }

    /// Whether the tensor of this name is trained itself.
    fn stays_dense(&self, name: &str) -> bool {
        let whole = self.whole.as_ref();
        whole.is_some_and(|whole| whole.contain(name))
    }

    /// Quantizes a `[d_in, d_out]` weight and copies it to the device. It is dense, in f32, if it is trained, and dense if
    /// it cannot be packed.
    fn packed_or_dense(
        &self,
        values: Vec<f32>,
        shape: [usize; 2],
        trained: bool,
    ) -> (Param<Tensor<2>>, Option<QuantizationError>) {
        if trained {
            return (
                self.place(TensorData::new(values, shape), Some(DType::F32)),
                None,
            );
        }
        match quantize_data(&values, shape, self.options.quantization) {
            Some((data, error)) => {
                drop(values);
                (frozen(compact(self.tensor(data, None))), Some(error))
            }
            None => {
                let data = TensorData::new(values, shape);
                (self.place(data, Some(self.options.dtype)), None)
            }
        }
    }

    /// Copies data to the device as a frozen parameter, in `dtype` or in the data's type.
    fn place<const D: usize>(&self, data: TensorData, dtype: Option<DType>) -> Param<Tensor<D>> {
        frozen(self.tensor(data, dtype))
    }

    fn tensor<const D: usize>(&self, data: TensorData, dtype: Option<DType>) -> Tensor<D> {
        let device = self.device;
        device.memory_persistent_allocations(data, |data| match dtype {
            Some(dtype) => Tensor::from_data(data, (device, dtype)),
            None => Tensor::from_data(data, device),
        })
    }
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(Default::default(), tensor).set_require_grad(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantized_head_has_the_dense_ones_logits_within_its_rounding() {
        let config: LlamaConfig = {
            let text = r#"{"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.2}"#;
            match serde_json::from_str(text).unwrap() {
                serde_json::Value::Object(object) => LlamaConfig::from_json(&object).unwrap(),
                _ => unreachable!(),
            }
        };
        let folder = tempfile::tempdir().unwrap();
        let mut rng = lora_core::CounterRng::new(3);
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = config
            .tensor_shapes()
            .into_iter()
            .map(|(name, shape)| {
                let count = shape.iter().product::<usize>();
                let values = (0..count).flat_map(|_| (0.2 * rng.normal() as f32).to_le_bytes());
                (name, shape, values.collect())
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
            (name.clone(), view.unwrap())
        });
        let file = folder.path().join("model.safetensors");
        safetensors::serialize_to_file(views, None, &file).unwrap();

        let device = Device::flex();
        let run = |quantize_lm_head| {
            let options = LoadOptions {
                quantize_lm_head,
                ..LoadOptions::default()
            };
            let model = load(folder.path(), &config, options, &device, |_| {}).unwrap();
            assert_eq!(model.quantized_lm_head.is_empty(), !quantize_lm_head);
            let packed = crate::PackedTokens::from_sequences([&[1u32, 2, 3][..]]);
            model.logits(model.hidden_states(&packed))
        };
        let (dense, quantized) = (run(false), run(true));
        let difference = (dense.clone() - quantized).abs().max().into_scalar::<f32>();
        let size = dense.abs().max().into_scalar::<f32>();
        // Half a step of 1/127 of a block's peak on each weight, averaged over 32 of them.
        assert!(
            difference > 0.0 && difference < 0.02 * size,
            "{difference} of {size}"
        );

        let mut tied = config.clone();
        tied.tie_word_embeddings = true;
        let options = LoadOptions {
            quantize_lm_head: true,
            ..LoadOptions::default()
        };
        let error = load(folder.path(), &tied, options, &device, |_| {}).unwrap_err();
        assert!(error.to_string().contains("tied"), "{error}");
    }
}
