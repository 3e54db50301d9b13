//! Moves an adapter between the host and a model.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Tensor, TensorData};
use llama_burn::{EMBEDDING_WEIGHT, HEAD_WEIGHT, HeadAdapter, Llama};
use lora_core::{
    AdapterDropout, Factors, LoraConfig, LoraError, LoraLinear, Method, Trained, Vector,
};

use super::check::HEAD;
use super::tensors::{EMBEDDING, bias_name, token_rows_name};
use super::{
    AdapterError, AdapterPair, AdapterTensors, Shared, WholeTensor, tensor_names, vector_name,
};

impl AdapterTensors {
    /// Reads every adapter of `model` to the host, in f32, and what else is trained, without the frozen parts that
    /// [`put_on`](Self::put_on) wrote into the base model.
    ///
    /// # Errors
    ///
    /// [`AdapterError::Unreadable`] for a tensor that cannot be read from the device.
    pub fn from_model(model: &Llama) -> Result<Self, AdapterError> {
        let mut adapter = Self::default();
        for (module, linear) in model.linears() {
            let Some(on_layer) = linear.adapter() else {
                continue;
            };
            let [a_name, b_name] = tensor_names(&module);
            let (r, [d_in, d_out]) = (on_layer.rank(), linear.dims());
            let facts = on_layer.method().facts();
            let mut pair = match (on_layer.shared(), facts.shared) {
                (Some(shared), Some(names)) => {
                    if adapter.shared.is_none() {
                        adapter.shared = Some(read_shared(names, shared)?);
                    }
                    AdapterPair::of_vectors(r, d_out, BTreeMap::new())
                }
                _ => {
                    let [a, b] = on_layer.matrices();
                    let (a, b) = (read(&a_name, a)?, read(&b_name, b)?);
                    AdapterPair::new(d_in, r, d_out, a, b)
                }
            };
            for (Vector { name, .. }, vector) in facts.vectors.iter().zip(on_layer.vectors()) {
                let values = read(&vector_name(&module, name), vector.val())?;
                pair.vectors.insert(name, values);
            }
            if let Some(bias) = &linear.lora_bias {
                pair.bias = Some(read(&bias_name(&module), bias.val().unsqueeze())?);
            }
            adapter.modules.insert(module, pair);
        }
        if let Some(head) = &model.lm_head_adapter {
            let [a_name, b_name] = tensor_names(HEAD);
            let ([d_in, r], [_, d_out]) = (head.a.val().dims(), head.b.val().dims());
            let a = read(&a_name, head.a.val())?;
            let b = read(&b_name, head.b.val())?;
            let pair = AdapterPair::new(d_in, r, d_out, a, b);
            adapter.modules.insert(HEAD.into(), pair);
        }
        for (module, rows) in [(EMBEDDING, &model.embed_rows), (HEAD, &model.head_rows)] {
            if let Some(rows) = rows {
                let shape = rows.rows.val().dims().to_vec();
                let values = read(&token_rows_name(module), rows.rows.val())?;
                let rows = WholeTensor { shape, values };
                adapter.token_rows.insert(module.into(), rows);
            }
        }
        for (name, parts) in model.trained_whole() {
            // The pairs have it.
            if !name.ends_with(LORA_BIAS) {
                let tensor = whole(&name, parts)?;
                adapter.whole.insert(name, tensor);
            }
        }
        Ok(adapter)
    }

    /// Puts this adapter on every module of `model` that `lora` selects, in place of the model's current
    /// adapters. The factors, the method's vectors and, on a device with an autodiff graph, the tensors that `lora` trains
    /// themselves are trainable, in f32.
    ///
    /// Parts that are not a low-rank path beside a linear layer are written into the model: replaced tensors,
    /// biases, an adapter of the embedding, and an adapter of the output layer that is not a plain LoRA. The last two are merged into
    /// their tables.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn put_on(&self, mut model: Llama, lora: &LoraConfig) -> Result<Llama, AdapterError> {
        self.check(&model.config, lora)?;
        let selector = lora.selector()?;
        for (_, linear) in model.linears_mut() {
            *linear = linear.clone().without_adapter();
        }
        self.write_whole(&mut model, lora)?;
        let device = model.device();
        (model.embed_rows, model.head_rows) = self.rows_on(&model.config, lora, &device)?;
        model.lm_head_adapter = self.head_beside().map(|pair| {
            let [a, b] = pair.place(&device);
            HeadAdapter::new(a, b, selector.scale(HEAD))
        });
        let made = match self.shared {
            Some(_) => None,
            None => self.made_for(&model.config, lora),
        };
        let shared = self.shared.as_ref().or(made.as_ref());
        let shared = shared.map(|shared| shared.factors.on(&device));
        for (module, linear) in model.linears_mut() {
            let Some(pair) = self.modules.get(&module) else {
                continue;
            };
            let scale = selector.scale(&module);
            let linear_before = linear.clone();
            let adapted = pair.put_on(linear_before, lora.method, scale, &device, shared.as_ref());
            *linear = adapted.map_err(|error| in_module(error, &module))?;
            linear.dropout = AdapterDropout::new(lora.lora_dropout);
            if let Some(bias) = &pair.bias {
                let data = TensorData::new(bias.clone(), [pair.d_out]);
                let bias = Tensor::from_data(data, (&device, DType::F32));
                *linear = linear.clone().with_lora_bias(bias);
            }
        }
        if device.is_autodiff() {
            model = model.with_trained_whole(lora)?;
        }
        Ok(model)
    }

    /// The output layer's adapter, if it stays beside the table: a plain LoRA.
    fn head_beside(&self) -> Option<&AdapterPair> {
        let pair = self.modules.get(HEAD)?;
        pair.vectors.is_empty().then_some(pair)
    }

    /// Writes into the model everything that is not a low-rank path beside a linear layer.
    fn write_whole(&self, model: &mut Llama, lora: &LoraConfig) -> Result<(), AdapterError> {
        let config = model.config.clone();
        // The tables are read before anything changes: a tied model has one for both.
        let mut tables = Vec::new();
        for (name, module) in [(EMBEDDING_WEIGHT, EMBEDDING), (HEAD_WEIGHT, HEAD)] {
            let follows =
                name == HEAD_WEIGHT && !self.unties(&config, lora) && config.tie_word_embeddings;
            // Trained rows stay beside the tables.
            if follows || !self.changes_table(&config, lora, name) {
                continue;
            }
            let values = match name {
                HEAD_WEIGHT => model.head_values(),
                _ => model.embed_tokens.values(),
            };
            let values = values.map_err(|reason| {
                let [name, _] = tensor_names(module);
                AdapterError::Unreadable { name, reason }
            })?;
            let merged = match (name, self.head_beside()) {
                // PEFT saves the table beside its adapter. Usually it is the base model's.
                (HEAD_WEIGHT, Some(_)) => match self.whole.get(HEAD_WEIGHT) {
                    Some(own) if own.values != values => own.values.clone(),
                    _ => continue,
                },
                _ => self.merged_table(&config, lora, name, values)?,
            };
            tables.push((name, merged));
        }
        if self.unties(&config, lora) {
            model.untie();
        }
        let whole = self.whole.iter();
        let others =
            whole.filter(|(name, _)| ![EMBEDDING_WEIGHT, HEAD_WEIGHT].contains(&name.as_str()));
        let others = others.map(|(name, tensor)| (name.as_str(), tensor.values.clone()));
        for (name, values) in tables.into_iter().chain(others) {
            if !model.set_tensor(name, values) {
                return Err(AdapterError::Unexpected { name: name.into() });
            }
        }
        Ok(())
    }
}

impl AdapterPair {
    pub(super) fn put_on(
        &self,
        linear: LoraLinear,
        method: Method,
        scale: f64,
        device: &Device,
        shared: Option<&[Tensor<2>; 2]>,
    ) -> Result<LoraLinear, LoraError> {
        let matrices = match shared {
            Some(shared) => shared.clone(),
            None => self.place(device),
        };
        let vectors = method.facts().vectors.iter();
        let vectors = vectors.filter_map(|vector| self.vectors.get(vector.name));
        let vectors = vectors.map(|vector| place(vector, [1, vector.len()], device));
        linear.with_adapter_of(method, matrices, scale, Some(vectors.collect()))
    }

    /// A and B on a device.
    fn place(&self, device: &Device) -> [Tensor<2>; 2] {
        [
            place(&self.a, [self.d_in, self.r], device),
            place(&self.b, [self.r, self.d_out], device),
        ]
    }
}

/// The end of a bias of B's name in [`Llama::trained_whole`].
const LORA_BIAS: &str = ".lora_B.bias";

/// A tensor as Hugging Face stores it, from its parts in the model.
fn whole(name: &str, parts: Vec<Trained<'_>>) -> Result<WholeTensor, AdapterError> {
    let is_table = [EMBEDDING_WEIGHT, HEAD_WEIGHT].contains(&name);
    let (mut shape, mut values) = (Vec::new(), Vec::new());
    for part in parts {
        let value = part.value();
        let (value, of_part) = match part {
            Trained::Vector(_) => (value.clone(), vec![value.dims()[1]]),
            Trained::Matrix(_) if is_table => (value.clone(), value.dims().to_vec()),
            Trained::Matrix(_) => {
                let value = value.transpose();
                (value.clone(), value.dims().to_vec())
            }
        };
        values.extend(read(name, value)?);
        // The shards of a table lie below each other.
        match shape.first_mut() {
            None => shape = of_part,
            Some(rows) => *rows += of_part[0],
        }
    }
    Ok(WholeTensor { shape, values })
}

fn place(values: &[f32], shape: [usize; 2], device: &Device) -> Tensor<2> {
    let data = TensorData::new(values.to_vec(), shape);
    Tensor::from_data(data, (device, DType::F32))
}

/// The matrices that all modules share, on the host.
fn read_shared(names: [&'static str; 2], shared: [Tensor<2>; 2]) -> Result<Shared, AdapterError> {
    let [a, b] = shared;
    let ([d_in, r], [_, d_out]) = (a.dims(), b.dims());
    let factors = Factors {
        a: read(names[0], a)?,
        b: read(names[1], b)?,
        shape: [d_in, r, d_out],
    };
    Ok(Shared { names, factors })
}

pub(super) fn read(name: &str, tensor: Tensor<2>) -> Result<Vec<f32>, AdapterError> {
    let data = tensor.into_data().convert::<f32>();
    data.try_to_vec().map_err(|error| AdapterError::Unreadable {
        name: name.into(),
        reason: format!("{error:?}"),
    })
}

/// Adds the module's name to an error of a layer.
pub(super) fn in_module(error: LoraError, module: &str) -> AdapterError {
    AdapterError::Module {
        module: module.into(),
        source: Box::new(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use llama_burn::{LlamaConfig, PackedTokens, RopeScaling};
    use lora_core::{CounterRng, TargetModules};

    fn config() -> LlamaConfig {
        LlamaConfig {
            vocab_size: 16,
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            max_position_embeddings: 32,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: true,
            initializer_range: 0.3,
            bos_token_id: None,
            eos_token_ids: vec![],
            weight_bytes: 4,
            ..LlamaConfig::default()
        }
    }

    fn lora() -> LoraConfig {
        LoraConfig {
            r: 2,
            ..LoraConfig::default()
        }
    }

    fn model() -> Llama {
        Llama::random(&config(), 1, &Device::flex())
    }

    /// An adapter whose B is not zero.
    fn adapter() -> AdapterTensors {
        let fresh = model().with_lora(&lora(), 2).unwrap();
        let mut adapter = AdapterTensors::from_model(&fresh).unwrap();
        let mut rng = CounterRng::new(3);
        let numbers = adapter.modules.values_mut().flat_map(|pair| &mut pair.b);
        numbers.for_each(|value| *value = rng.normal() as f32);
        adapter
    }

    #[test]
    fn what_is_put_on_a_model_reads_back_the_same_and_replaces_what_was_there() {
        let once = adapter().put_on(model(), &lora()).unwrap();
        assert_eq!(AdapterTensors::from_model(&once).unwrap(), adapter());
        let other = LoraConfig {
            target_modules: TargetModules::Names(vec!["q_proj".into()]),
            ..lora()
        };
        let mut fewer = adapter();
        fewer.modules.retain(|module, _| module.ends_with("q_proj"));
        let twice = fewer.put_on(once, &other).unwrap();
        assert_eq!(AdapterTensors::from_model(&twice).unwrap(), fewer);
    }

    #[test]
    fn the_scale_of_the_configuration_counts() {
        let packed = PackedTokens::from_sequences([&[1u32, 2, 3][..]]);
        let run = |lora_alpha| {
            let lora = LoraConfig {
                lora_alpha,
                ..lora()
            };
            let model = adapter().put_on(model(), &lora).unwrap();
            model.logits(model.hidden_states(&packed))
        };
        let difference = (run(16.0) - run(8.0)).abs().max().into_scalar::<f32>();
        assert!(difference > 1e-3, "{difference}");
    }

    #[test]
    fn missing_unexpected_and_misshapen_tensors_are_named() {
        const Q: &str = "model.layers.0.self_attn.q_proj";
        let error = |change: fn(&mut AdapterTensors)| {
            let mut adapter = adapter();
            change(&mut adapter);
            adapter.put_on(model(), &lora()).unwrap_err().to_string()
        };
        let missing = error(|adapter| drop(adapter.modules.remove(Q)));
        assert!(
            missing.contains("q_proj.lora_A") && missing.contains("missing"),
            "{missing}"
        );
        let stray = error(|adapter| {
            let pair = adapter.modules[Q].clone();
            adapter
                .modules
                .insert("model.layers.2.self_attn.q_proj".into(), pair);
        });
        assert!(
            stray.contains("layers.2") && stray.contains("unexpected"),
            "{stray}"
        );
        let wide = error(|adapter| {
            let pair = AdapterPair::new(8, 2, 6, vec![0.0; 16], vec![0.0; 12]);
            adapter.modules.insert(Q.into(), pair);
        });
        assert!(
            wide.contains("lora_B") && wide.contains("[6, 2]") && wide.contains("[8, 2]"),
            "{wide}"
        );
        let rank = error(|adapter| {
            let pair = AdapterPair::new(8, 1, 8, vec![0.0; 8], vec![0.0; 8]);
            adapter.modules.insert(Q.into(), pair);
        });
        assert!(
            rank.contains("lora_A") && rank.contains("[1, 8]") && rank.contains("[2, 8]"),
            "{rank}"
        );
    }
}
