//! Tensors of a loaded model, replaced or read back by Hugging Face's name.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use kernels::cpu;
use lora_core::LoraLinear;

use crate::{EMBEDDING_WEIGHT, HEAD_WEIGHT, Llama, VocabTable};

impl Llama {
    /// Separates the weight of a tied output layer from the embedding. No copy is made until one of the two is
    /// replaced.
    pub fn untie(&mut self) {
        if self.lm_head.is_none() && self.quantized_lm_head.is_empty() {
            self.lm_head = Some(self.embed_tokens.clone());
        }
        self.config.tie_word_embeddings = false;
    }

    /// Replaces a tensor by `values`, row-major as Hugging Face stores them, frozen and in the compute type, or in f32 on
    /// a device with an autodiff graph, where it may be trained. A
    /// quantized weight becomes a dense one. A bias may be new. The output layer of a tied model is replaced together
    /// with the embedding, under the embedding's name.
    ///
    /// Returns whether the model has a tensor of this name and size; if not, nothing changes.
    pub fn set_tensor(&mut self, name: &str, values: Vec<f32>) -> bool {
        let (device, compute) = (self.device(), self.dtype());
        let dtype = if device.is_autodiff() {
            DType::F32
        } else {
            compute
        };
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        if name == EMBEDDING_WEIGHT || name == HEAD_WEIGHT {
            if values.len() != vocab * hidden {
                return false;
            }
            let mut table = table(&values, hidden, dtype, &device);
            table.compute = Some(compute);
            if name == HEAD_WEIGHT {
                self.quantized_lm_head = Vec::new();
                self.lm_head = Some(table);
            } else {
                self.embed_tokens = table
            }
            return true;
        }
        let layers = self.layers.iter_mut().enumerate().flat_map(|(i, layer)| {
            let norms = layer.norms_mut();
            norms.map(move |(norm, parameters)| {
                (format!("model.layers.{i}.{norm}.weight"), parameters)
            })
        });
        let norms = layers.chain([("model.norm.weight".to_string(), &mut self.norm)]);
        for (norm_name, norm) in norms {
            if norm_name == name {
                let [width] = norm.weight.dims();
                if values.len() != width {
                    return false;
                }
                // f32 for every compute type: the norm computes in f32.
                norm.weight = frozen(TensorData::new(values, [width]), DType::F32, &device);
                return true;
            }
        }
        let Some((module, end)) = name.rsplit_once('.') else {
            return false;
        };
        let Some((_, linear)) = self.linears_mut().find(|(linear, _)| linear == module) else {
            return false;
        };
        set_linear(linear, end, values, dtype, &device)
    }

    /// The output layer's weight on the host in f32, `[vocab, hidden]` row-major: dequantized if it is quantized, the
    /// embedding's if the two are tied.
    ///
    /// # Errors
    ///
    /// The device's message if a tensor cannot be read back.
    pub fn head_values(&self) -> Result<Vec<f32>, String> {
        if self.quantized_lm_head.is_empty() {
            return self.lm_head.as_ref().unwrap_or(&self.embed_tokens).values();
        }
        let mut values = Vec::new();
        for piece in &self.quantized_lm_head {
            values.extend(on_host(piece.dense_base().transpose())?);
        }
        Ok(values)
    }
}

impl VocabTable {
    /// The weight on the host in f32, row-major.
    ///
    /// # Errors
    ///
    /// The device's message if a tensor cannot be read back.
    pub fn values(&self) -> Result<Vec<f32>, String> {
        let mut values = Vec::new();
        for piece in &self.pieces {
            values.extend(on_host(piece.val())?);
        }
        Ok(values)
    }
}

fn on_host(tensor: Tensor<2>) -> Result<Vec<f32>, String> {
    let data = tensor.into_data().convert::<f32>();
    data.try_to_vec().map_err(|error| format!("{error:?}"))
}

fn set_linear(
    linear: &mut LoraLinear,
    end: &str,
    values: Vec<f32>,
    dtype: DType,
    device: &Device,
) -> bool {
    let [d_in, d_out] = linear.dims();
    match end {
        "weight" if values.len() == d_in * d_out => {
            let data = TensorData::new(cpu::transposed(&values, [d_out, d_in]), [d_in, d_out]);
            let mut replaced = linear.clone().without_adapter();
            replaced.weight = frozen(data, dtype, device);
            *linear = replaced;
            true
        }
        "bias" if values.len() == d_out => {
            linear.bias = Some(frozen(TensorData::new(values, [d_out]), dtype, device));
            true
        }
        _ => false,
    }
}

fn table(values: &[f32], hidden: usize, dtype: DType, device: &Device) -> VocabTable {
    let rows_per_piece = VocabTable::rows_per_piece(hidden, dtype.size(), device);
    let pieces = values.chunks(rows_per_piece * hidden).map(|piece| {
        let data = TensorData::new(piece.to_vec(), [piece.len() / hidden, hidden]);
        frozen(data, dtype, device)
    });
    VocabTable {
        pieces: pieces.collect(),
        rows_per_piece,
        compute: None,
    }
}

fn frozen<const D: usize>(data: TensorData, dtype: DType, device: &Device) -> Param<Tensor<D>> {
    let tensor = Tensor::from_data(data, (device, dtype));
    Param::initialized(Default::default(), tensor).set_require_grad(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PackedTokens;
    use crate::model::tests::config;

    /// A model into which every tensor of another model is copied has the other model's logits.
    #[test]
    fn a_model_whose_every_tensor_is_replaced_is_the_other_model() {
        let device = Device::flex();
        for tied in [false, true] {
            let config = crate::LlamaConfig {
                tie_word_embeddings: tied,
                ..config()
            };
            let source = Llama::random(&config, 1, &device);
            let mut copy = Llama::random(&config, 2, &device);
            let packed = PackedTokens::from_sequences([&[1u32, 2, 3][..]]);
            let run = |model: &Llama| model.logits(model.hidden_states(&packed)).into_data();
            for (name, shape) in config.tensor_shapes() {
                let values = match name.as_str() {
                    "model.embed_tokens.weight" => source.embed_tokens.values().unwrap(),
                    "lm_head.weight" => source.head_values().unwrap(),
                    name if name.ends_with("norm.weight") => vec![1.0; shape[0]],
                    name if name.ends_with(".bias") => vec![0.0; shape[0]],
                    name => {
                        let module = name.strip_suffix(".weight").unwrap();
                        let found = source.linears().find(|(linear, _)| linear == module);
                        on_host(found.unwrap().1.dense_base().transpose()).unwrap()
                    }
                };
                assert!(
                    !copy.set_tensor(&name, vec![0.0; values.len() + 1]),
                    "{name}"
                );
                assert!(copy.set_tensor(&name, values), "{name}");
            }
            run(&copy).assert_eq(&run(&source), true);
            assert!(!copy.set_tensor("model.layers.9.mlp.up_proj.weight", vec![]));
            copy.untie();
            assert!(copy.set_tensor("model.embed_tokens.weight", vec![0.5; 48 * 32]));
            assert_eq!(copy.head_values(), source.head_values());
        }
    }
}
