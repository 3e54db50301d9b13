//! Checks an adapter's tensors against a model's shapes, before anything is created.

use std::collections::BTreeMap;

use llama_burn::{EMBEDDING_WEIGHT, HEAD_WEIGHT, LlamaConfig, saved_whole};
use lora_core::{Bias, LoraConfig, TargetModules};

use super::tensors::{EMBEDDING, all_vectors, bias_name};
use super::{AdapterError, AdapterTensors, tensor_names, vector_name};

/// The output layer's module.
pub(super) const HEAD: &str = "lm_head";
const PREFIX: &str = "base_model.model.";

/// Every module of `model` that can have an adapter, with `[d_in, d_out]`: the linear ones, the embedding
/// and the output layer. The output layer is a separate module even if it is tied.
pub(super) fn widths(model: &LlamaConfig) -> BTreeMap<String, [usize; 2]> {
    let (vocab, hidden) = (model.vocab_size, model.hidden_size);
    let layers = (0..model.num_hidden_layers).flat_map(|layer| {
        let linears = model.layer_linears().into_iter();
        linears.map(move |linear| {
            let name = format!("model.layers.{layer}.{}", linear.name);
            (name, [linear.d_in, linear.d_out])
        })
    });
    let tables = [
        (EMBEDDING.to_string(), [vocab, hidden]),
        (HEAD.to_string(), [hidden, vocab]),
    ];
    layers.chain(tables).collect()
}

impl AdapterTensors {
    /// Checks that the tensors are those that `lora` selects on `model`, with the right shapes.
    ///
    /// # Errors
    ///
    /// A selected module whose tensors are missing, a tensor that no selected module has, or a tensor of
    /// another shape, by PEFT's name. A `lora` that is invalid, that selects nothing, or one of whose entries matches
    /// nothing.
    pub fn check(&self, model: &LlamaConfig, lora: &LoraConfig) -> Result<(), AdapterError> {
        lora.validate()?;
        let selector = lora.selector()?;
        let widths = widths(model);
        let names: Vec<&str> = widths.keys().map(String::as_str).collect();
        selector.check(lora, &names)?;
        // "all-linear" excludes the embedding; the selector only knows names.
        let linear_only = lora.target_modules == TargetModules::AllLinear;
        let matched = |module: &str| {
            widths.contains_key(module)
                && !(linear_only && module == EMBEDDING)
                && selector.matches(module)
        };
        // PEFT also puts the transposed factors of one table on the other. The file holds both.
        let tied = lora.ensure_weight_tying
            && model.tie_word_embeddings
            && (matched(EMBEDDING) || matched(HEAD));
        let selected =
            |module: &str| matched(module) || (tied && [EMBEDDING, HEAD].contains(&module));
        if lora.lora_bias && [EMBEDDING, HEAD].into_iter().any(selected) {
            return Err(AdapterError::Config {
                field: "lora_bias".into(),
                got: "true".into(),
                expected:
                    "false if the embedding or lm_head is a target, because neither has a bias"
                        .into(),
            });
        }
        let facts = lora.method.facts();
        let table = [EMBEDDING, HEAD]
            .into_iter()
            .find(|module| selected(module));
        if let (Some(module), Some(_)) = (table, facts.shared) {
            return Err(AdapterError::Config {
                field: "target_modules".into(),
                got: module.into(),
                expected: format!("linear modules of the decoder layers with {}", facts.name),
            });
        }
        if let Some(module) = self.modules.keys().find(|module| !selected(module)) {
            let [name, _] = tensor_names(module);
            return Err(AdapterError::Unexpected { name });
        }
        for (module, [d_in, d_out]) in &widths {
            if !selected(module) {
                continue;
            }
            let [a_name, b_name] = tensor_names(module);
            let Some(pair) = self.modules.get(module) else {
                return Err(AdapterError::Missing { name: a_name });
            };
            // The names and shapes are those of the file, where the matrices are transposed.
            let r = selector.r(module);
            if facts.shared.is_none() && (pair.r, pair.d_in) != (r, *d_in) {
                let got = [pair.r, pair.d_in];
                return Err(AdapterError::shape(a_name, &[r, *d_in], &got));
            }
            if pair.d_out != *d_out {
                let got = [pair.d_out, pair.r];
                return Err(AdapterError::shape(b_name, &[*d_out, r], &got));
            }
            if let Some(shared) = &self.shared {
                shared.check([*d_in, *d_out])?;
            }
            let vectors = all_vectors().map(|vector| {
                let values = pair.vectors.get(vector);
                let length = facts.vector(vector).map(|vector| vector.length(r, *d_out));
                (length, values, vector_name(module, vector))
            });
            let bias = lora.lora_bias.then_some(*d_out);
            let bias = (bias, pair.bias.as_ref(), bias_name(module));
            for (length, values, name) in vectors.chain([bias]) {
                match (length, values) {
                    (Some(_), None) => return Err(AdapterError::Missing { name }),
                    (None, Some(_)) => return Err(AdapterError::Unexpected { name }),
                    (Some(length), Some(values)) if values.len() != length => {
                        return Err(AdapterError::shape(name, &[length], &[values.len()]));
                    }
                    _ => {}
                }
            }
        }
        let whole = self.check_whole(model, lora)?;
        let tokens = self.check_token_rows(model, lora)?;
        if self.modules.is_empty() && whole == 0 && tokens == 0 {
            // The count's error names what could be adapted.
            model.count(lora, lora_core::Quantization::None, 4)?;
        }
        Ok(())
    }

    /// Checks the tensors that replace the base model's. Returns how many the settings select.
    fn check_whole(&self, model: &LlamaConfig, lora: &LoraConfig) -> Result<usize, AdapterError> {
        let mut shapes: BTreeMap<String, Vec<usize>> = model.tensor_shapes().into_iter().collect();
        let table = vec![model.vocab_size, model.hidden_size];
        shapes.entry(HEAD_WEIGHT.into()).or_insert(table);
        let adapted = |tensor: &str| {
            let module = tensor.rsplit_once('.').map_or(tensor, |(module, _)| module);
            self.modules.contains_key(module)
        };
        for (name, tensor) in &self.whole {
            let in_file = format!("{PREFIX}{name}");
            match shapes.get(name) {
                None => return Err(AdapterError::Unexpected { name: in_file }),
                Some(shape) if *shape != tensor.shape => {
                    return Err(AdapterError::shape(in_file, shape, &tensor.shape));
                }
                Some(_) => {}
            }
            let unadapted = lora.bias == Bias::LoraOnly && !adapted(name);
            if name.ends_with(".bias") && unadapted && !saved_whole(lora, name) {
                return Err(AdapterError::Unexpected { name: in_file });
            }
        }
        let mut asked = 0;
        for name in shapes.keys() {
            let bias = name.ends_with(".bias")
                && match lora.bias {
                    Bias::None => false,
                    Bias::All => true,
                    Bias::LoraOnly => adapted(name),
                };
            if !bias && !saved_whole(lora, name) {
                continue;
            }
            asked += 1;
            if !self.whole.contains_key(name) {
                let name = format!("{PREFIX}{name}");
                return Err(AdapterError::Missing { name });
            }
        }
        Ok(asked)
    }

    /// Whether this adapter makes the output layer of a tied model differ from its embedding. A merged model then
    /// needs a `lm_head.weight`.
    pub fn unties(&self, model: &LlamaConfig, lora: &LoraConfig) -> bool {
        let embedding = self.modules.contains_key(EMBEDDING)
            || (self.whole.contains_key(EMBEDDING_WEIGHT) && saved_whole(lora, EMBEDDING_WEIGHT));
        let head = self.modules.contains_key(HEAD)
            || (self.whole.contains_key(HEAD_WEIGHT) && saved_whole(lora, HEAD_WEIGHT));
        model.tie_word_embeddings && (embedding || head || Self::rows_untie(model, lora))
    }
}
