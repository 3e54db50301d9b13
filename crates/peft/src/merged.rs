//! Merges an adapter into the tensors of a base model, one at a time on the host.

use kernels::cpu::{self, Matrix, MatrixMut, Threads};
use llama_burn::{EMBEDDING_WEIGHT, HEAD_WEIGHT, LlamaConfig, saved_whole};
use lora_core::{LoraConfig, Method};

use super::tensors::EMBEDDING;
use super::token_rows::put_rows;
use super::{AdapterError, AdapterPair, AdapterTensors};

impl AdapterTensors {
    /// Whether merging changes the tensor of this Hugging Face name (`model.norm.weight`).
    ///
    /// In a tied model `lm_head.weight` is a tensor of its own only if [`unties`](Self::unties) is true.
    pub fn changes(&self, model: &LlamaConfig, lora: &LoraConfig, tensor: &str) -> bool {
        self.changes_table(model, lora, tensor) || self.rows_for(model, lora, tensor).is_some()
    }

    /// As [`changes`](Self::changes), without the trained rows of a vocabulary table.
    pub(super) fn changes_table(
        &self,
        model: &LlamaConfig,
        lora: &LoraConfig,
        tensor: &str,
    ) -> bool {
        let module = module_of(tensor);
        let pair = self.modules.get(module);
        let adapted = pair.is_some_and(|pair| tensor.ends_with(".weight") || pair.bias.is_some());
        adapted || self.whole_for(model, lora, tensor).is_some()
    }

    /// Returns the tensor of this Hugging Face name with the adapter merged in. `values` are the base
    /// model's. Both are row-major as Hugging Face stores them. A tensor without an adapter is returned
    /// unchanged. For `lm_head.weight` of a tied model, `values` are the embedding's.
    ///
    /// [`check`](Self::check) must have passed. The sum is computed in f32, whatever the file's type.
    ///
    /// # Errors
    ///
    /// [`AdapterError::Shape`] if the number of values is not that of the adapter's module;
    /// [`AdapterError::Lora`] for an invalid `lora`.
    pub fn merged(
        &self,
        model: &LlamaConfig,
        lora: &LoraConfig,
        tensor: &str,
        values: Vec<f32>,
    ) -> Result<Vec<f32>, AdapterError> {
        let mut values = self.merged_table(model, lora, tensor, values)?;
        if let Some((tokens, rows)) = self.rows_for(model, lora, tensor) {
            let vocabulary = model.vocab_size * model.hidden_size;
            check_length(tensor, vocabulary, values.len())?;
            put_rows(&mut values, tokens, rows);
        }
        Ok(values)
    }

    /// As [`merged`](Self::merged), without the trained rows of a vocabulary table.
    pub(super) fn merged_table(
        &self,
        model: &LlamaConfig,
        lora: &LoraConfig,
        tensor: &str,
        values: Vec<f32>,
    ) -> Result<Vec<f32>, AdapterError> {
        let mut values = match self.whole_for(model, lora, tensor) {
            Some(whole) => whole.to_vec(),
            None => values,
        };
        if let Some(pair) = self.low_rank(model, lora, module_of(tensor)) {
            let scale = lora.selector()?.scale(module_of(tensor));
            pair.merge_into(&mut values, tensor, scale, lora.method)?;
        }
        Ok(values)
    }

    /// Takes the adapter out of a tensor that [`merged`](Self::merged) made from `base`. A tensor that the
    /// adapter replaced is copied from `base`, because the merged one does not contain it. The factors
    /// of scaled outputs are computed from `base` as well. The result equals `base` up to rounding of the sum.
    ///
    /// # Errors
    ///
    /// As [`merged`](Self::merged).
    pub fn unmerged(
        &self,
        model: &LlamaConfig,
        lora: &LoraConfig,
        tensor: &str,
        values: Vec<f32>,
        base: &[f32],
    ) -> Result<Vec<f32>, AdapterError> {
        let replaced = self.whole_for(model, lora, tensor).is_some();
        if replaced || self.rows_for(model, lora, tensor).is_some() {
            return Ok(base.to_vec());
        }
        let mut values = values;
        if let Some(pair) = self.low_rank(model, lora, module_of(tensor)) {
            let scale = lora.selector()?.scale(module_of(tensor));
            pair.take_out_of(&mut values, tensor, scale, lora.method, base)?;
        }
        Ok(values)
    }

    /// The tensor that the adapter has in place of the base model's, if any.
    fn whole_for(&self, model: &LlamaConfig, lora: &LoraConfig, tensor: &str) -> Option<&[f32]> {
        let own = self.whole.get(tensor);
        // An embedding that PEFT saved on its own, not because of `modules_to_save`, is also the tied head.
        let tied = || {
            let shared = model.tie_word_embeddings
                && tensor == HEAD_WEIGHT
                && !saved_whole(lora, EMBEDDING_WEIGHT);
            self.whole.get(EMBEDDING_WEIGHT).filter(|_| shared)
        };
        own.or_else(tied).map(|whole| &whole.values[..])
    }
}

impl AdapterPair {
    /// A weight W becomes W + γ·A·B, and its outputs are scaled if the method scales them. A bias b
    /// becomes b + γ·(the bias of B). `scale` is γ.
    fn merge_into(
        &self,
        values: &mut [f32],
        tensor: &str,
        scale: f64,
        method: Method,
    ) -> Result<(), AdapterError> {
        if tensor.ends_with(".bias") {
            return self.add_bias(values, tensor, scale);
        }
        self.add_delta(values, tensor, scale)?;
        if let Some(factors) = self.factors(values, tensor, method) {
            self.scale_outputs(values, tensor, |output| factors[output]);
        }
        Ok(())
    }

    /// The inverse of [`merge_into`](Self::merge_into). The factors of outputs are those of `base`.
    fn take_out_of(
        &self,
        values: &mut [f32],
        tensor: &str,
        scale: f64,
        method: Method,
        base: &[f32],
    ) -> Result<(), AdapterError> {
        if tensor.ends_with(".bias") {
            return self.add_bias(values, tensor, -scale);
        }
        if method.facts().scales_outputs {
            let mut sum = base.to_vec();
            self.add_delta(&mut sum, tensor, scale)?;
            if let Some(factors) = self.factors(&sum, tensor, method) {
                self.scale_outputs(values, tensor, |output| 1.0 / factors[output]);
            }
        }
        self.add_delta(values, tensor, -scale)
    }

    /// Adds `scale` times what `lora_bias` trained, if it was trained.
    fn add_bias(&self, values: &mut [f32], tensor: &str, scale: f64) -> Result<(), AdapterError> {
        let Some(bias) = &self.bias else {
            return Ok(());
        };
        check_length(tensor, self.d_out, values.len())?;
        for (value, bias) in values.iter_mut().zip(bias) {
            *value += scale as f32 * bias;
        }
        Ok(())
    }

    /// Adds `scale · A·B` to a weight as Hugging Face stores it: `[d_out, d_in]`, an embedding
    /// `[vocab, hidden]`.
    fn add_delta(&self, weight: &mut [f32], tensor: &str, scale: f64) -> Result<(), AdapterError> {
        let (d_in, r, d_out) = (self.d_in, self.r, self.d_out);
        check_length(tensor, d_in * d_out, weight.len())?;
        let a = Matrix::new(&self.a, d_in, r, r);
        let b = Matrix::new(&self.b, r, d_out, d_out);
        let scale = scale as f32;
        if is_embedding(tensor) {
            let output = MatrixMut::new(weight, d_in, d_out, d_out);
            cpu::multiply(output, true, scale, a, b, Threads::All);
        } else {
            let output = MatrixMut::new(weight, d_out, d_in, d_in);
            let (left, right) = (b.transposed(), a.transposed());
            cpu::multiply(output, true, scale, left, right, Threads::All);
        }
        Ok(())
    }

    /// The method's factor of each output of the summed weight, `[d_out]`, if it has one.
    fn factors(&self, sum: &[f32], tensor: &str, method: Method) -> Option<Vec<f32>> {
        if !method.facts().scales_outputs {
            return None;
        }
        let (d_in, d_out) = (self.d_in, self.d_out);
        let mut squares = vec![0f64; d_out];
        if is_embedding(tensor) {
            for row in sum.chunks_exact(d_out.max(1)) {
                for (square, value) in squares.iter_mut().zip(row) {
                    *square += f64::from(*value).powi(2);
                }
            }
        } else {
            for (square, row) in squares.iter_mut().zip(sum.chunks_exact(d_in.max(1))) {
                *square = row.iter().map(|value| f64::from(*value).powi(2)).sum();
            }
        }
        let vectors = method.facts().vectors.iter();
        let vectors =
            vectors.map(|vector| self.vectors.get(vector.name).map_or(&[][..], Vec::as_slice));
        method.output_factors(&vectors.collect::<Vec<_>>(), &squares)
    }

    /// Multiplies each output's weights.
    fn scale_outputs(&self, weight: &mut [f32], tensor: &str, factor: impl Fn(usize) -> f32) {
        if is_embedding(tensor) {
            for row in weight.chunks_exact_mut(self.d_out.max(1)) {
                let outputs = row.iter_mut().enumerate();
                outputs.for_each(|(output, value)| *value *= factor(output));
            }
        } else {
            let rows = weight.chunks_exact_mut(self.d_in.max(1)).enumerate();
            for (output, row) in rows {
                let factor = factor(output);
                row.iter_mut().for_each(|value| *value *= factor);
            }
        }
    }
}

/// The module that a tensor belongs to.
fn module_of(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// Whether the rows of the tensor are inputs. Those of all other weights are outputs.
fn is_embedding(tensor: &str) -> bool {
    module_of(tensor) == EMBEDDING
}

fn check_length(tensor: &str, expected: usize, got: usize) -> Result<(), AdapterError> {
    if expected == got {
        Ok(())
    } else {
        Err(AdapterError::shape(tensor.into(), &[expected], &[got]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::{CounterRng, TargetModules};

    fn model() -> LlamaConfig {
        let text = r#"{"model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": true}"#;
        match serde_json::from_str(text).unwrap() {
            serde_json::Value::Object(object) => LlamaConfig::from_json(&object).unwrap(),
            _ => unreachable!(),
        }
    }

    fn random(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = CounterRng::new(seed);
        (0..count).map(|_| rng.normal() as f32).collect()
    }

    /// W + γ·A·B and a DoRA's scaling, element by element.
    fn expected(pair: &AdapterPair, base: &[f32], scale: f32, embedding: bool) -> Vec<f32> {
        let at = |input: usize, output: usize| {
            if embedding {
                input * pair.d_out + output
            } else {
                output * pair.d_in + input
            }
        };
        let mut sum = base.to_vec();
        for output in 0..pair.d_out {
            let mut square = 0.0;
            for input in 0..pair.d_in {
                let products = (0..pair.r)
                    .map(|k| pair.a[input * pair.r + k] * pair.b[k * pair.d_out + output]);
                sum[at(input, output)] += scale * products.sum::<f32>();
                square += sum[at(input, output)].powi(2);
            }
            if let Some(magnitude) = pair.vectors.get("lora_magnitude_vector") {
                for input in 0..pair.d_in {
                    sum[at(input, output)] *= magnitude[output] / square.sqrt();
                }
            }
        }
        sum
    }

    #[test]
    fn merging_is_the_formula_and_unmerging_takes_it_back() {
        for (module, d_in, d_out) in [
            ("model.layers.0.mlp.down_proj", 12, 8),
            ("model.embed_tokens", 12, 8),
            ("lm_head", 8, 12),
        ] {
            for dora in [false, true] {
                let lora = LoraConfig {
                    r: 2,
                    lora_alpha: 3.0,
                    method: if dora { Method::Dora } else { Method::Lora },
                    target_modules: TargetModules::Names(vec![module.into()]),
                    ..LoraConfig::default()
                };
                let mut pair =
                    AdapterPair::new(d_in, 2, d_out, random(2 * d_in, 1), random(2 * d_out, 2));
                if dora {
                    pair.vectors
                        .insert("lora_magnitude_vector", random(d_out, 3));
                }
                let mut adapter = AdapterTensors::default();
                adapter.modules.insert(module.into(), pair.clone());
                adapter.check(&model(), &lora).unwrap();
                let base = random(d_in * d_out, 4);
                let name = format!("{module}.weight");
                assert!(adapter.changes(&model(), &lora, &name));
                let merged = adapter
                    .merged(&model(), &lora, &name, base.clone())
                    .unwrap();
                let expected = expected(&pair, &base, 1.5, module == EMBEDDING);
                let distance = |a: &[f32], b: &[f32]| {
                    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
                    differences.fold(0.0, f32::max)
                };
                // Sums of a few products of order 1.
                assert!(distance(&merged, &expected) < 1e-5, "{module}");
                let back = adapter
                    .unmerged(&model(), &lora, &name, merged, &base)
                    .unwrap();
                assert!(distance(&back, &base) < 1e-4, "{module}");
                assert_eq!(
                    adapter.unties(&model(), &lora),
                    module != "model.layers.0.mlp.down_proj"
                );
            }
        }
    }

    #[test]
    fn a_tensor_of_another_size_is_named() {
        let mut adapter = AdapterTensors::default();
        let pair = AdapterPair::new(8, 1, 8, vec![0.0; 8], vec![0.0; 8]);
        adapter
            .modules
            .insert("model.layers.0.self_attn.q_proj".into(), pair);
        let name = "model.layers.0.self_attn.q_proj.weight";
        let merged = adapter.merged(&model(), &LoraConfig::default(), name, vec![0.0; 63]);
        let error = merged.unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("63"), "{error}");
    }
}
