//! The configuration of a Llama, read from Hugging Face's `config.json`.

use std::path::{Path, PathBuf};

use lora_core::{LoraConfig, LoraError, ModuleShape, ParameterCounts, Quantization};
use serde_json::{Map, Value};

use crate::gguf::{self, GgufError, GgufFile};
use crate::limited::{self, LARGEST_SETTINGS};
use crate::rope_scaling::{self, RopeScaling};
use crate::unsupported;
use crate::weights::{EMBEDDING_WEIGHT, HEAD_WEIGHT, Weights};

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read {path}: {source}; expected the config.json of a Hugging Face model folder"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The text is not JSON, or not an object.
    #[error("{path} is not a JSON object: {reason}")]
    NotJson {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },
    /// The metadata of a GGUF file do not describe a Llama.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The model is not a Llama.
    #[error(
        "the model is of type {0:?}, not \"llama\"; only Llama-family models (LlamaForCausalLM) can be trained"
    )]
    NotLlama(String),
    /// A key is missing.
    #[error("config.json lacks {0:?}")]
    Missing(&'static str),
    /// A key has an invalid or unsupported value.
    #[error("config.json: {key} is {value}; {expected}")]
    Invalid {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is expected.
        expected: String,
    },
}

/// transformers 5 writes `dtype` where version 4 wrote `torch_dtype`.
fn weight_bytes(object: &Map<String, Value>) -> usize {
    let dtype = object.get("dtype").or_else(|| object.get("torch_dtype"));
    match dtype.and_then(Value::as_str) {
        Some("float32") => 4,
        _ => 2,
    }
}

/// The configuration of a Llama, with Hugging Face's names.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The names are Hugging Face's; their documentation is there.
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub initializer_range: f64,
    pub bos_token_id: Option<u32>,
    /// Llama 3 has several.
    pub eos_token_ids: Vec<u32>,
    /// Bytes per weight in the files: 4 if `dtype` (or `torch_dtype`) is float32, else 2.
    pub weight_bytes: usize,
}

impl LlamaConfig {
    /// Reads `config.json`, the `config.json` of a model folder, or the metadata of a GGUF file. If the configuration
    /// of a folder ties the output layer to the embedding, but its files hold two different weights, the two are not
    /// tied (as in transformers 5).
    ///
    /// # Errors
    ///
    /// Names the file, the key, its value and what is expected.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        if gguf::is_gguf(path) {
            return Self::from_json(&gguf::config_json(&GgufFile::open(path)?)?);
        }
        let folder = path.is_dir().then_some(path);
        let path = match folder {
            Some(folder) => folder.join("config.json"),
            None => path.to_path_buf(),
        };
        let text = limited::read_to_string(&path, LARGEST_SETTINGS).map_err(|source| {
            ConfigError::Read {
                path: path.clone(),
                source,
            }
        })?;
        let value: Value = serde_json::from_str(&text).map_err(|error| ConfigError::NotJson {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        match value {
            Value::Object(object) => {
                let mut config = Self::from_json(&object)?;
                if config.tie_word_embeddings && folder.is_some_and(Weights::has_untied_head) {
                    config.tie_word_embeddings = false;
                }
                Ok(config)
            }
            _ => Err(ConfigError::NotJson {
                path,
                reason: "it holds a value of another type".into(),
            }),
        }
    }

    /// Reads the object of `config.json`, with `rope_theta` and `rope_scaling` as in transformers 4 or
    /// `rope_parameters` as in transformers 5.
    ///
    /// # Errors
    ///
    /// As [`from_file`](Self::from_file).
    pub fn from_json(object: &Map<String, Value>) -> Result<Self, ConfigError> {
        let keys = Keys(object);
        let model_type = match object.get("model_type") {
            Some(value) => limited::clipped(value.as_str().unwrap_or("?"), 80).into_owned(),
            None => return Err(ConfigError::Missing("model_type")),
        };
        if model_type != "llama" {
            return Err(ConfigError::NotLlama(model_type));
        }
        unsupported::refuse(object)?;
        let hidden_size = keys.count("hidden_size")?;
        let num_attention_heads = keys.count("num_attention_heads")?;
        let head_dim = match keys.optional_count("head_dim")? {
            Some(head_dim) => head_dim,
            None => hidden_size / num_attention_heads,
        };
        let max_position_embeddings = keys
            .optional_count("max_position_embeddings")?
            .unwrap_or(2048);
        let (rope_theta, rope_scaling) =
            rope_scaling::read(&keys, head_dim, max_position_embeddings)?;
        let config = Self {
            vocab_size: keys.count("vocab_size")?,
            hidden_size,
            intermediate_size: keys.count("intermediate_size")?,
            num_hidden_layers: keys.count("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: keys
                .optional_count("num_key_value_heads")?
                .unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings,
            rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            attention_bias: keys.flag("attention_bias")?,
            mlp_bias: keys.flag("mlp_bias")?,
            initializer_range: keys.positive("initializer_range")?.unwrap_or(0.02),
            bos_token_id: keys.tokens("bos_token_id")?.first().copied(),
            eos_token_ids: keys.tokens("eos_token_id")?,
            weight_bytes: weight_bytes(object),
        };
        config.check()
    }

    fn check(self) -> Result<Self, ConfigError> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("it must divide num_attention_heads, which is {heads}");
            return Err(invalid("num_key_value_heads", kv_heads, &expected));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(invalid(
                "head_dim",
                self.head_dim,
                "rotary embeddings need an even number, at least 2",
            ));
        }
        Ok(self)
    }

    /// The number of positions of the model: `max_position_embeddings`, multiplied by the factor of a scaling that does
    /// not change this key.
    pub fn positions(&self) -> usize {
        self.rope_scaling.positions(self.max_position_embeddings)
    }

    /// Whether rotary frequencies depend on the length of a sequence of `length` tokens. Such a sequence cannot share a
    /// prefix with longer ones.
    pub fn rotates_by_length(&self, length: usize) -> bool {
        matches!(self.rope_scaling, RopeScaling::Dynamic { .. })
            && length > self.max_position_embeddings
    }

    /// The linear modules of a decoder layer: name within the layer, d_in, d_out, whether it has a bias.
    pub fn layer_linears(&self) -> [(&'static str, usize, usize, bool); 7] {
        let (hidden, inter) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        [
            ("self_attn.q_proj", hidden, q, self.attention_bias),
            ("self_attn.k_proj", hidden, kv, self.attention_bias),
            ("self_attn.v_proj", hidden, kv, self.attention_bias),
            ("self_attn.o_proj", q, hidden, self.attention_bias),
            ("mlp.gate_proj", hidden, inter, self.mlp_bias),
            ("mlp.up_proj", hidden, inter, self.mlp_bias),
            ("mlp.down_proj", inter, hidden, self.mlp_bias),
        ]
    }

    /// Every tensor of the checkpoint with Hugging Face's name and shape (linear weights `[out, in]`).
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (vocab, hidden) = (self.vocab_size, self.hidden_size);
        let mut shapes = vec![(EMBEDDING_WEIGHT.to_string(), vec![vocab, hidden])];
        for layer in 0..self.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            for (name, d_in, d_out, bias) in self.layer_linears() {
                shapes.push((format!("{prefix}.{name}.weight"), vec![d_out, d_in]));
                if bias {
                    shapes.push((format!("{prefix}.{name}.bias"), vec![d_out]));
                }
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                shapes.push((format!("{prefix}.{norm}.weight"), vec![hidden]));
            }
        }
        shapes.push(("model.norm.weight".into(), vec![hidden]));
        if !self.tie_word_embeddings {
            shapes.push((HEAD_WEIGHT.into(), vec![vocab, hidden]));
        }
        shapes
    }

    /// Counts the parameters that `lora` trains and those of the model, from shapes. A tied output layer counts once,
    /// and can still be adapted.
    ///
    /// # Errors
    ///
    /// As [`ParameterCounts::new`].
    pub fn count(
        &self,
        lora: &LoraConfig,
        quantization: Quantization,
        float_bytes: usize,
    ) -> Result<ParameterCounts, LoraError> {
        let rows = (self.trained_rows(lora) * self.hidden_size) as u64;
        let with_rows = |mut counts: ParameterCounts| {
            counts.trainable += rows;
            counts.adapter_bytes += 4 * rows;
            counts
        };
        let mut modules = self.module_shapes();
        if !self.tie_word_embeddings {
            let counts = ParameterCounts::new(&modules, lora, quantization, float_bytes);
            return counts.map(with_rows);
        }
        let table = self.vocab_size * self.hidden_size;
        modules.push(ModuleShape {
            name: "lm_head".into(),
            shape: vec![self.hidden_size, self.vocab_size],
            is_linear: true,
        });
        let mut counts = ParameterCounts::new(&modules, lora, quantization, float_bytes)?;
        counts.frozen -= table as u64;
        counts.other_bytes -= (table * float_bytes) as u64;
        Ok(with_rows(counts))
    }

    /// The number of trained rows of embedding and output layer. A tied output layer with the embedding's tokens shares
    /// the embedding's rows.
    fn trained_rows(&self, lora: &LoraConfig) -> usize {
        let lists = lora.trainable_token_indices.iter();
        let mut lists: Vec<&[usize]> = lists.map(|(_, tokens)| &tokens[..]).collect();
        if self.tie_word_embeddings {
            lists.dedup();
        }
        lists.into_iter().map(<[usize]>::len).sum()
    }

    /// The modules in lora-core's form: linear weights `[d_in, d_out]`.
    pub fn module_shapes(&self) -> Vec<ModuleShape> {
        let linear = |name: &str| name == "lm_head" || name.ends_with("_proj");
        self.tensor_shapes()
            .into_iter()
            .map(|(tensor, mut shape)| {
                let is_weight = tensor.ends_with(".weight");
                let name = match tensor.strip_suffix(".weight") {
                    Some(module) => module.to_string(),
                    None => tensor,
                };
                let is_linear = is_weight && linear(&name);
                if is_linear {
                    shape.reverse();
                }
                ModuleShape {
                    name,
                    shape,
                    is_linear,
                }
            })
            .collect()
    }
}

pub(crate) fn invalid(key: &str, value: impl std::fmt::Display, expected: &str) -> ConfigError {
    ConfigError::Invalid {
        key: key.into(),
        value: limited::clipped(&value.to_string(), 200).into_owned(),
        expected: expected.into(),
    }
}

/// The largest accepted value of a key: several times that of any real model. Small enough that lists of all tensors
/// stay short and no product of these values, in bytes, overflows 64 bits.
fn largest(key: &str) -> u64 {
    match key {
        "num_hidden_layers" => 1 << 11,
        "num_attention_heads" | "num_key_value_heads" => 1 << 10,
        "head_dim" => 1 << 11,
        "hidden_size" => 1 << 17,
        "intermediate_size" => 1 << 20,
        "vocab_size" => 1 << 22,
        _ => 1 << 28,
    }
}

/// Typed access to an object's keys; `null` counts as absent.
pub(crate) struct Keys<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Keys<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn optional_count(&self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        let largest = largest(key);
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(count) if (1..=largest).contains(&count) => Ok(Some(count as usize)),
                Some(count) if count > largest => {
                    let expected = format!("at most {largest} is supported");
                    Err(invalid(key, value, &expected))
                }
                _ => Err(invalid(key, value, "expected a whole number of at least 1")),
            },
        }
    }

    fn count(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.optional_count(key)?.ok_or(ConfigError::Missing(key))
    }

    pub(crate) fn positive(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
                _ => Err(invalid(key, value, "expected a number above 0")),
            },
        }
    }

    fn flag(&self, key: &'static str) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(invalid(key, value, "expected true or false")),
        }
    }

    fn tokens(&self, key: &'static str) -> Result<Vec<u32>, ConfigError> {
        let one = |value: &Value| {
            let token = value.as_u64().and_then(|token| u32::try_from(token).ok());
            token.ok_or_else(|| invalid(key, value, "expected a token id or a list of them"))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    pub(crate) fn object(
        &self,
        key: &'static str,
    ) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(value) => Err(invalid(key, value, "expected an object")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<LlamaConfig, ConfigError> {
        match serde_json::from_str(text).unwrap() {
            Value::Object(object) => LlamaConfig::from_json(&object),
            _ => unreachable!(),
        }
    }

    /// The configuration of a published model.
    fn published(
        [vocab, hidden, inter, layers, heads, kv]: [usize; 6],
        tied: bool,
        rest: &str,
    ) -> LlamaConfig {
        parse(&format!(
            r#"{{"model_type": "llama", "vocab_size": {vocab}, "hidden_size": {hidden},
            "intermediate_size": {inter}, "num_hidden_layers": {layers}, "num_attention_heads": {heads},
            "num_key_value_heads": {kv}, "tie_word_embeddings": {tied}{rest}}}"#
        ))
        .unwrap()
    }

    const LLAMA3: &str = r#", "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "eos_token_id": [128001, 128008, 128009], "head_dim": null"#;

    #[test]
    fn published_models_have_their_published_parameter_counts() {
        let cases = [
            (
                published([128_256, 4096, 14_336, 32, 32, 8], false, LLAMA3),
                8_030_261_248,
            ),
            (
                published([128_256, 8192, 28_672, 80, 64, 8], false, LLAMA3),
                70_553_706_496,
            ),
            (
                published([128_256, 2048, 8192, 16, 32, 8], true, LLAMA3),
                1_235_814_400,
            ),
            (
                published([128_256, 3072, 8192, 28, 24, 8], true, LLAMA3),
                3_212_749_824,
            ),
            (
                published([32_000, 2048, 5632, 22, 32, 4], false, ""),
                1_100_048_384,
            ),
            (
                published([49_152, 576, 1536, 30, 9, 3], true, ""),
                134_515_008,
            ),
        ];
        for (config, parameters) in cases {
            let shapes = config.tensor_shapes();
            let total: usize = shapes
                .iter()
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum();
            assert_eq!(total, parameters, "{config:?}");
        }
    }

    #[test]
    fn both_forms_of_rope_settings_are_read() {
        let old = published([32, 8, 16, 1, 2, 1], true, LLAMA3);
        let new = published(
            [32, 8, 16, 1, 2, 1],
            true,
            r#", "rope_parameters": {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "eos_token_id": [128001, 128008, 128009]"#,
        );
        assert_eq!(old, new);
        assert_eq!(old.rope_theta, 500_000.0);
        assert!(matches!(
            old.rope_scaling,
            RopeScaling::Llama3 { factor: 8.0, .. }
        ));
        assert_eq!(old.eos_token_ids.len(), 3);
        let linear = r#", "rope_scaling": {"type": "linear", "factor": 4.0}"#;
        let linear = published([32, 8, 16, 1, 2, 1], true, linear);
        assert_eq!(linear.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    }

    #[test]
    fn biases_and_heads_appear_in_the_tensor_list() {
        let config = published(
            [32, 8, 16, 1, 2, 1],
            false,
            r#", "attention_bias": true, "mlp_bias": true"#,
        );
        let names: Vec<String> = config
            .tensor_shapes()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        for name in [
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.mlp.down_proj.bias",
            "lm_head.weight",
        ] {
            assert!(names.iter().any(|have| have == name), "{name}");
        }
    }

    #[test]
    fn wrong_values_are_named() {
        let base = r#""model_type": "llama", "vocab_size": 32, "intermediate_size": 16,
            "num_hidden_layers": 1"#;
        let cases = [
            (r#"{"model_type": "mistral"}"#.to_string(), "mistral"),
            ("{}".into(), "model_type"),
            (
                format!(r#"{{{base}, "num_attention_heads": 2}}"#),
                "hidden_size",
            ),
            (
                format!(r#"{{{base}, "hidden_size": 8, "num_attention_heads": 0}}"#),
                "num_attention_heads is 0",
            ),
            (
                format!(
                    r#"{{{base}, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 3}}"#
                ),
                "must divide",
            ),
            (
                format!(
                    r#"{{{base}, "hidden_size": 8, "num_attention_heads": 2, "rope_scaling": {{"rope_type": "longrope"}}}}"#
                ),
                "longrope",
            ),
            (
                format!(
                    r#"{{{base}, "hidden_size": 8, "num_attention_heads": 2, "hidden_act": "gelu"}}"#
                ),
                "gelu",
            ),
        ];
        for (text, expected) in cases {
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
    }
}
