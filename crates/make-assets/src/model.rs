//! The embedded model's shape and its weights' file.

use burn::tensor::{DType, Tensor};
use half::f16;
use llama_burn::Llama;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;

use super::error::MakeAssetsError;
use super::tokenizer::VOCABULARY;

/// Positions of the model; the data set's longest example has about 70 tokens.
pub(crate) const MAX_POSITIONS: usize = 256;

/// `config.json`: 950,000 parameters, 1.9 MB in f16. Every dimension is a multiple of 32, so that
/// blocks of 8-bit weights fit.
pub(crate) fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "initializer_range": 0.05,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "use_cache": true,
        "torch_dtype": "float16",
    })
}

/// `generation_config.json`.
pub(crate) fn generation_config() -> Value {
    json!({ "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": false })
}

/// The model as the bytes of a `model.safetensors`, f16, with Hugging Face's names and orientation.
///
/// # Errors
///
/// If f16 cannot represent a weight, which does not happen in a sound model.
pub(crate) fn safetensors(model: &Llama) -> Result<Vec<u8>, MakeAssetsError> {
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut add = |name: &str, tensor: (Vec<usize>, Vec<f32>)| {
        let (shape, values) = tensor;
        let bytes = values.iter().map(|value| f16::from_f32(*value));
        if let Some(index) = bytes.clone().position(|value| !value.is_finite()) {
            let (name, value) = (name.to_string(), values[index]);
            return Err(MakeAssetsError::OutOfRange { name, value });
        }
        let bytes = bytes.flat_map(f16::to_le_bytes).collect();
        tensors.insert(name.to_string(), (shape, bytes));
        Ok(())
    };
    let pieces = model.embed_tokens.pieces.iter().map(|piece| piece.val());
    add(
        "model.embed_tokens.weight",
        values(Tensor::cat(pieces.collect(), 0)),
    )?;
    for (name, linear) in model.linears() {
        // Hugging Face stores [out, in].
        add(
            &format!("{name}.weight"),
            values(linear.weight.val().transpose()),
        )?;
    }
    for (index, layer) in model.layers.iter().enumerate() {
        let name = |norm| format!("model.layers.{index}.{norm}.weight");
        add(
            &name("input_layernorm"),
            values(layer.input_layernorm.weight.val()),
        )?;
        let norm = layer.post_attention_layernorm.weight.val();
        add(&name("post_attention_layernorm"), values(norm))?;
    }
    add("model.norm.weight", values(model.norm.weight.val()))?;
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        TensorView::new(safetensors::Dtype::F16, shape.clone(), bytes).map(|view| (name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    let metadata = [("format".to_string(), "pt".to_string())];
    Ok(safetensors::serialize(views, Some(metadata.into()))?)
}

fn values<const D: usize>(tensor: Tensor<D>) -> (Vec<usize>, Vec<f32>) {
    let data = tensor.cast(DType::F32).into_data();
    let shape = data.shape().to_vec();
    // The tensor was cast to f32 just above.
    (shape, data.try_into_vec::<f32>().expect("f32 data"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use llama_burn::{LlamaConfig, LoadOptions, PackedTokens, load};
    use lora_core::Quantization;

    #[test]
    fn the_written_weights_load_and_give_the_models_scores() {
        let object = config().as_object().unwrap().clone();
        let config = LlamaConfig::from_json(&object).unwrap();
        let device = Device::flex();
        let model = Llama::random(&config, 3, &device);
        let bytes = safetensors(&model).unwrap();
        assert!(bytes.len() <= 4_000_000, "{}", bytes.len());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        let options = LoadOptions {
            quantize_lm_head: false,
            quantization: Quantization::None,
            dtype: DType::F32,
        };
        let loaded = load(folder.path(), &config, options, &device, |_| {}).unwrap();
        let rows = PackedTokens::from_sequences([&[0u32, 5, 9, 1000][..]]);
        let scores = |model: &Llama| values(model.logits(model.hidden_states(&rows))).1;
        for (expected, got) in scores(&model).iter().zip(scores(&loaded)) {
            assert!((expected - got).abs() < 2e-2, "{expected} {got}");
        }
    }
}
