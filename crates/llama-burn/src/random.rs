//! A model with random weights made on the device: for measurements, which do not depend on the values.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor};
use kernels::quantize_on_device;
use lora_core::LoraLinear;

use crate::spec::LinearSpec;
use crate::{DecoderLayer, Llama, LlamaConfig, LoadOptions, RmsNorm, VocabTable};

impl Llama {
    /// A model with random weights that the device draws and quantizes, one tensor at a time: normal with Hugging
    /// Face's `initializer_range`, norms 1, biases 0. This takes no host memory, and a GPU makes a model of 8 billion
    /// parameters in seconds. The weights differ between devices.
    ///
    /// All weights are frozen. The output layer is not quantized.
    pub fn random_on_device(config: &LlamaConfig, options: LoadOptions, device: &Device) -> Self {
        let draw = Draw {
            config,
            options,
            device,
        };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let layers = (0..config.num_hidden_layers).map(|index| {
            let linears = config.layer_linears();
            let linears = linears.iter().map(|linear| draw.linear(linear));
            let norms = config.layer_norms();
            let norms = norms.iter().map(|norm| draw.norm(norm.width));
            DecoderLayer::from_parts(config, index, norms.collect(), linears.collect())
        });
        Self {
            embed_tokens: draw.table(vocab, hidden),
            layers: layers.collect(),
            norm: draw.norm(hidden),
            lm_head: (!config.tie_word_embeddings).then(|| draw.table(vocab, hidden)),
            quantized_lm_head: Vec::new(),
            lm_head_adapter: None,
            embed_rows: None,
            head_rows: None,
            config: config.clone(),
        }
    }
}

struct Draw<'a> {
    config: &'a LlamaConfig,
    options: LoadOptions,
    device: &'a Device,
}

impl Draw<'_> {
    fn linear(&self, linear: &LinearSpec) -> LoraLinear {
        let LinearSpec {
            d_in, d_out, bias, ..
        } = *linear;
        let quantization = self.options.quantization;
        let weight = self.parameter(|draw| match quantization.block(d_out) {
            Some(_) => quantize_on_device(draw.normal([d_in, d_out], DType::F32), quantization),
            None => draw.normal([d_in, d_out], draw.options.dtype),
        });
        let zeros = |draw: &Self| Tensor::zeros([d_out], (draw.device, draw.options.dtype));
        LoraLinear::frozen(Linear {
            weight,
            bias: bias.then(|| self.parameter(zeros)),
        })
    }

    fn norm(&self, width: usize) -> RmsNorm {
        RmsNorm {
            weight: self.parameter(|draw| Tensor::ones([width], (draw.device, DType::F32))),
            eps: self.config.rms_norm_eps,
        }
    }

    fn table(&self, vocab: usize, hidden: usize) -> VocabTable {
        let dtype = self.options.dtype;
        let rows_per_piece = VocabTable::rows_per_piece(hidden, dtype.size(), self.device);
        let pieces = (0..vocab).step_by(rows_per_piece).map(|start| {
            let rows = rows_per_piece.min(vocab - start);
            self.parameter(move |draw| draw.normal([rows, hidden], dtype))
        });
        VocabTable {
            pieces: pieces.collect(),
            rows_per_piece,
            compute: None,
        }
    }

    fn normal(&self, shape: [usize; 2], dtype: DType) -> Tensor<2> {
        let normal = Distribution::Normal(0.0, self.config.initializer_range);
        Tensor::random(shape, normal, (self.device, dtype))
    }

    /// A frozen parameter in the device's memory for persistent allocations.
    fn parameter<const D: usize>(
        &self,
        make: impl Fn(&Self) -> Tensor<D> + Send,
    ) -> Param<Tensor<D>> {
        let tensor = self.device.memory_persistent_allocations(self, make);
        Param::initialized(Default::default(), tensor).set_require_grad(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::Quantization;

    #[test]
    fn a_random_model_has_the_shapes_and_types_of_a_loaded_one() {
        let config = crate::model::tests::config();
        let device = Device::flex();
        let model = Llama::random_on_device(&config, LoadOptions::default(), &device);
        let weight = model.layers[0].mlp.down_proj.weight.base();
        assert!(
            matches!(weight.dtype(), DType::QFloat(_)),
            "{:?}",
            weight.dtype()
        );
        assert_eq!(
            weight.dims(),
            [config.intermediate_size, config.hidden_size]
        );
        let packed = crate::PackedTokens::from_sequences([&[1u32, 2, 3][..]]);
        let logits = model.logits(model.hidden_states(&packed));
        assert_eq!(logits.dims(), [3, config.vocab_size]);
        let largest = logits.abs().max().into_scalar::<f32>();
        assert!(largest > 0.0 && largest.is_finite(), "{largest}");
        let options = LoadOptions {
            quantization: Quantization::None,
            ..LoadOptions::default()
        };
        let dense = Llama::random_on_device(&config, options, &device);
        assert_eq!(
            dense.layers[0].mlp.down_proj.weight.base().dtype(),
            DType::F32
        );
    }
}
