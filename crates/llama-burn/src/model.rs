//! The model: its parameters, adapters and modules by name.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use kernels::{CounterRng, Uploads};
use lora_core::{LoraConfig, LoraError, LoraLinear, ParameterCounts};

use crate::spec::LinearSpec;
use crate::{DecoderLayer, HeadAdapter, LlamaConfig, RmsNorm, TokenRows, VocabTable};

/// A model of any family (`LlamaForCausalLM` and its kin). Made by [`load`](crate::load) or [`Llama::random`].
#[derive(Module, Debug)]
#[allow(missing_docs)] // Hugging Face's names.
pub struct Llama {
    pub embed_tokens: VocabTable,
    pub layers: Vec<DecoderLayer>,
    pub norm: RmsNorm,
    /// `None` if the head is tied to the embedding or quantized.
    pub lm_head: Option<VocabTable>,
    /// The quantized head in shards, `[hidden, rows]` each; empty if it is not quantized.
    pub quantized_lm_head: Vec<LoraLinear>,
    /// The head's LoRA adapter.
    pub lm_head_adapter: Option<HeadAdapter>,
    /// Trained rows that replace rows of the embedding, and of a tied head without `head_rows`.
    pub embed_rows: Option<TokenRows>,
    /// Trained rows that replace rows of the head.
    pub head_rows: Option<TokenRows>,
    /// The model's configuration.
    #[module(skip)]
    pub config: LlamaConfig,
}

impl Llama {
    /// A model with random weights: normal with Hugging Face's `initializer_range`, norms 1, biases 0.
    ///
    /// The weights depend on `seed` only, so that every device starts from the same model. All are frozen; `unfreeze()`
    /// makes them trainable.
    pub fn random(config: &LlamaConfig, seed: u64, device: &Device) -> Self {
        let root = CounterRng::new(seed);
        let mut tensor = 0;
        let mut normal = |rows, cols| {
            tensor += 1;
            let std = config.initializer_range;
            kernels::normal([rows, cols], std, &mut root.fork(tensor), device)
        };
        let frozen = |tensor| Param::from_tensor(tensor).set_require_grad(false);
        let zeros = |count| {
            let data = TensorData::zeros::<f32, _>([count]);
            Param::from_tensor(Tensor::<1>::from_data(data, (device, DType::F32)))
                .set_require_grad(false)
        };
        let norm = |width: usize| RmsNorm {
            weight: Param::from_tensor(Tensor::ones([width], (device, DType::F32)))
                .set_require_grad(false),
            eps: config.rms_norm_eps,
        };
        let rows_per_piece = VocabTable::rows_per_piece(config.hidden_size, 4, device);
        let table = |normal: &mut dyn FnMut(usize, usize) -> Tensor<2>| VocabTable {
            pieces: (0..config.vocab_size)
                .step_by(rows_per_piece)
                .map(|start| {
                    let rows = rows_per_piece.min(config.vocab_size - start);
                    frozen(normal(rows, config.hidden_size))
                })
                .collect(),
            rows_per_piece,
            compute: None,
        };
        let embed_tokens = table(&mut normal);
        let layers = (0..config.num_hidden_layers).map(|index| {
            let linear = |linear: &LinearSpec| {
                LoraLinear::frozen(Linear {
                    weight: frozen(normal(linear.d_in, linear.d_out)),
                    bias: linear.bias.then(|| zeros(linear.d_out)),
                })
            };
            let linears = config.layer_linears().iter().map(linear).collect();
            let norms = config
                .layer_norms()
                .into_iter()
                .map(|spec| norm(spec.width));
            DecoderLayer::from_parts(config, index, norms.collect(), linears)
        });
        let layers = layers.collect();
        Self {
            embed_tokens,
            layers,
            norm: norm(config.hidden_size),
            lm_head: (!config.tie_word_embeddings).then(|| table(&mut normal)),
            quantized_lm_head: Vec::new(),
            lm_head_adapter: None,
            embed_rows: None,
            head_rows: None,
            config: config.clone(),
        }
    }

    /// Adds a new adapter to every linear module that `lora` selects, and makes the biases and modules trainable that it
    /// trains themselves.
    ///
    /// An adapter's initialization depends on `seed` and the module's name, not on which other modules are adapted.
    ///
    /// # Errors
    ///
    /// If `lora` is invalid, selects nothing, or a selected module has an adapter.
    pub fn with_lora(mut self, lora: &LoraConfig, seed: u64) -> Result<Self, LoraError> {
        // Counting reports a configuration that is invalid or selects no module.
        self.count(lora)?;
        let selector = lora.selector()?;
        let selected = self.linears().filter(|(name, _)| selector.matches(name));
        let dims: Vec<_> = selected.map(|(_, linear)| linear.dims()).collect();
        let shared = lora.shared_matrices(dims, &self.device());
        let root = CounterRng::new(seed);
        for (index, layer) in self.layers.iter_mut().enumerate() {
            for (module, (name, linear)) in layer.linears_mut().enumerate() {
                let name = format!("model.layers.{index}.{name}");
                if selector.matches(&name) {
                    let seed = root.fork(index as u64).fork(module as u64).next_u64();
                    let lora = lora.of_module(&selector, &name);
                    *linear =
                        linear
                            .clone()
                            .with_new_adapter_sharing(&lora, seed, shared.as_ref())?;
                }
            }
        }
        if selector.matches("lm_head") {
            let seed = root.fork(u64::MAX).next_u64();
            let lora = lora.of_module(&selector, "lm_head");
            self = self.with_new_head_adapter(&lora, seed)?;
        }
        self.with_trained_whole(lora)
    }

    /// Computes once what adapters would compute in every pass, for inference with a model that is not trained any more ([`LoraLinear::for_inference`]).
    pub fn for_inference(mut self) -> Self {
        for (_, linear) in self.linears_mut() {
            if linear.adapter().is_some() {
                *linear = linear.clone().for_inference();
            }
        }
        self
    }

    /// Counts the parameters that `lora` would train, from shapes.
    ///
    /// # Errors
    ///
    /// As [`ParameterCounts::new`].
    pub fn count(&self, lora: &LoraConfig) -> Result<ParameterCounts, LoraError> {
        self.config.count(lora, lora_core::Quantization::None, 4)
    }

    /// The trainable tensors by the module's full name: of an adapter A `[d_in, r]` and B `[r, d_out]`, if they are
    /// trained, and its method's vectors `[1, width]`; of trained token rows `[tokens, hidden]`. See also
    /// [`trained_whole`](Self::trained_whole).
    pub fn trainable(&self) -> impl Iterator<Item = (String, Vec<&Param<Tensor<2>>>)> {
        let linears = self.linears();
        let linears = linears.map(|(module, linear)| (module, linear.trainable()));
        let head = self.lm_head_adapter.as_ref();
        let head = head.map(|head| ("lm_head".to_string(), vec![&head.a, &head.b]));
        let rows = [
            ("model.embed_tokens", &self.embed_rows),
            ("lm_head", &self.head_rows),
        ];
        let rows = rows.into_iter().filter_map(|(module, rows)| {
            let rows = rows.as_ref()?;
            Some((module.to_string(), vec![&rows.rows]))
        });
        linears.chain(head).chain(rows)
    }

    /// Every linear module of the decoder with its full name, such as `model.layers.0.self_attn.q_proj`.
    pub fn linears(&self) -> impl Iterator<Item = (String, &LoraLinear)> {
        self.layers.iter().enumerate().flat_map(|(index, layer)| {
            let named = layer.linears().into_iter();
            named.map(move |(name, linear)| (format!("model.layers.{index}.{name}"), linear))
        })
    }

    /// As [`linears`](Self::linears), mutable.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut LoraLinear)> {
        self.layers
            .iter_mut()
            .enumerate()
            .flat_map(|(index, layer)| {
                let named = layer.linears_mut();
                named.map(move |(name, linear)| (format!("model.layers.{index}.{name}"), linear))
            })
    }

    /// The device of the model's tensors, with autodiff if they are in an autodiff graph.
    pub fn device(&self) -> Device {
        self.embed_tokens.pieces[0].lazy_device()
    }

    /// The type that products are computed in.
    pub fn dtype(&self) -> DType {
        self.embed_tokens.compute_dtype()
    }

    /// The embeddings of these tokens, `[ids.len(), hidden]`; with trained rows in the model's autodiff graph.
    pub(crate) fn embedded(&self, ids: &[u32]) -> Tensor<2> {
        let mut embeddings = self.embed_tokens.rows(ids);
        let Some(rows) = &self.embed_rows else {
            return embeddings;
        };
        if self.device().is_autodiff() {
            embeddings = embeddings.autodiff();
        }
        let mut uploads = Uploads::default();
        let planned = rows.planned(ids, &mut uploads);
        let uploaded = uploads.send(&self.device());
        rows.put(embeddings, &planned, &uploaded)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::family::Biases;
    use crate::{PackedTokens, RopeScaling};
    use burn::tensor::Tolerance;
    use lora_core::{Init, TargetModules};

    pub(crate) fn config() -> LlamaConfig {
        LlamaConfig {
            vocab_size: 48,
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: false,
            biases: Biases::of_blocks(true, false),
            initializer_range: 0.2,
            bos_token_id: None,
            eos_token_ids: vec![],
            weight_bytes: 4,
            ..LlamaConfig::default()
        }
    }

    #[test]
    fn packed_sequences_have_the_logits_of_each_sequence_alone() {
        let model = Llama::random(&config(), 1, &Device::flex());
        let sequences: [&[u32]; 3] = [&[1, 2, 3, 4, 5], &[7, 8], &[9, 10, 11]];
        let packed = model.logits(model.hidden_states(&PackedTokens::from_sequences(sequences)));
        let alone = sequences
            .map(|ids| model.logits(model.hidden_states(&PackedTokens::from_sequences([ids]))));
        packed.into_data().assert_approx_eq::<f32>(
            &Tensor::cat(alone.to_vec(), 0).into_data(),
            Tolerance::absolute(1e-5),
        );
    }

    #[test]
    fn a_position_does_not_attend_to_later_positions() {
        let model = Llama::random(&config(), 1, &Device::flex());
        let run = |ids: &[u32]| {
            model
                .hidden_states(&PackedTokens::from_sequences([ids]))
                .narrow(0, 0, 3)
        };
        let (a, b) = (run(&[1, 2, 3, 4]), run(&[1, 2, 3, 40]));
        a.into_data().assert_eq(&b.into_data(), true);
    }

    #[test]
    fn targets_decide_which_modules_are_adapted() {
        let lora = LoraConfig {
            target_modules: TargetModules::Names(vec!["q_proj".into(), "down_proj".into()]),
            layers_to_transform: Some(vec![1]),
            init: Init::Gaussian,
            ..LoraConfig::default()
        };
        let model = Llama::random(&config(), 1, &Device::flex())
            .with_lora(&lora, 3)
            .unwrap();
        let adapted: Vec<String> = model
            .linears()
            .filter(|(_, linear)| linear.adapter().is_some())
            .map(|(name, _)| name)
            .collect();
        assert_eq!(
            adapted,
            [
                "model.layers.1.self_attn.q_proj",
                "model.layers.1.mlp.down_proj"
            ]
        );
        let wrong = LoraConfig {
            target_modules: TargetModules::Names(vec!["c_attn".into()]),
            ..LoraConfig::default()
        };
        let error = Llama::random(&config(), 1, &Device::flex())
            .with_lora(&wrong, 3)
            .unwrap_err();
        assert!(error.to_string().contains("q_proj"), "{error}");
    }

    #[test]
    fn unfreezing_trains_every_weight() {
        let device = Device::flex().autodiff();
        let model = Llama::random(&config(), 1, &device).unfreeze();
        let packed = PackedTokens::from_sequences([&[1u32, 2, 3][..]]);
        let gradients = model.logits(model.hidden_states(&packed)).sum().backward();
        let weight = model.layers[0].mlp.gate_proj.weight.val();
        assert!(weight.grad(&gradients).is_some());
        assert!(
            model.embed_tokens.pieces[0]
                .val()
                .grad(&gradients)
                .is_some()
        );
        assert!(model.norm.weight.val().grad(&gradients).is_some());
    }
}
