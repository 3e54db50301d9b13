//! PEFT's trainable tokens: an adapter that replaces rows of a vocabulary table.

use burn::tensor::Device;
use llama_burn::{EMBEDDING_WEIGHT, HEAD_WEIGHT, Llama, LlamaConfig, TokenRows, saved_whole};
use lora_core::{LoraConfig, TargetModules};

use super::check::HEAD;
use super::tensors::{EMBEDDING, token_rows_name};
use super::{AdapterError, AdapterTensors, WholeTensor};

const FIELD: &str = "trainable_token_indices";

/// The tokens whose rows an adapter replaces, for each table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tokens<'a> {
    pub(super) embedding: Option<&'a [usize]>,
    pub(super) head: Option<&'a [usize]>,
    /// The output layer shares the embedding's rows.
    tied: bool,
}

impl<'a> Tokens<'a> {
    /// Finds the tables that the settings name. As in PEFT, a name is the end of a module's name. In a tied model
    /// the output layer shares the embedding's rows, unless the settings list other tokens for it.
    ///
    /// # Errors
    ///
    /// A name of no table; two names of one table; other tokens for a tied output layer with
    /// `ensure_weight_tying`.
    pub(super) fn of(lora: &'a LoraConfig, model: &LlamaConfig) -> Result<Self, AdapterError> {
        let (mut embedding, mut head) = (None, None);
        for (name, tokens) in &lora.trainable_token_indices {
            let place = match name.as_str() {
                "" => None,
                name if EMBEDDING.ends_with(name) => Some(&mut embedding),
                name if HEAD.ends_with(name) => Some(&mut head),
                _ => None,
            };
            let Some(place) = place else {
                let expected = "lists by the names \"embed_tokens\" and \"lm_head\"; rows of other modules are not supported";
                return Err(wrong(format!("a list for {name:?}"), expected));
            };
            if place.replace(&tokens[..]).is_some() {
                let got = format!("two lists for one table, the second under {name:?}");
                return Err(wrong(got, "one list for each table"));
            }
        }
        let tied = model.tie_word_embeddings
            && embedding.is_some()
            && (head.is_none() || head == embedding);
        if model.tie_word_embeddings && lora.ensure_weight_tying && head.is_some() && !tied {
            let got = "other tokens for lm_head than for embed_tokens".into();
            return Err(wrong(got, "the same under ensure_weight_tying"));
        }
        Ok(Self {
            embedding,
            head: head.filter(|_| !tied),
            tied,
        })
    }

    /// The tables with replaced rows.
    fn tables(self) -> impl Iterator<Item = (&'static str, &'a [usize])> {
        let both = [(EMBEDDING, self.embedding), (HEAD, self.head)].into_iter();
        both.filter_map(|(module, tokens)| Some((module, tokens?)))
    }
}

fn wrong(got: String, expected: impl Into<String>) -> AdapterError {
    AdapterError::Config {
        field: FIELD.into(),
        got,
        expected: expected.into(),
    }
}

impl AdapterTensors {
    /// Checks the rows against the settings and the model. Returns the number of tables with replaced rows.
    ///
    /// # Errors
    ///
    /// A token outside the vocabulary or listed twice; a table that the adapter also changes in another way; rows
    /// that are missing, unexpected or of another shape.
    pub(super) fn check_token_rows(
        &self,
        model: &LlamaConfig,
        lora: &LoraConfig,
    ) -> Result<usize, AdapterError> {
        check_tokens(lora, model)?;
        let tokens = Tokens::of(lora, model)?;
        for (module, list) in tokens.tables() {
            let name = token_rows_name(module);
            let Some(rows) = self.token_rows.get(module) else {
                return Err(AdapterError::Missing { name });
            };
            let shape = [list.len(), model.hidden_size];
            if rows.shape != shape {
                return Err(AdapterError::shape(name, &shape, &rows.shape));
            }
        }
        for (module, rows) in &self.token_rows {
            let asked = tokens.tables().any(|(table, _)| table == module);
            // If PEFT saves embeddings, the file also holds the rows of a tied output layer.
            let copy =
                tokens.tied && module == HEAD && self.token_rows.get(EMBEDDING) == Some(rows);
            if !asked && !copy {
                let name = token_rows_name(module);
                return Err(AdapterError::Unexpected { name });
            }
        }
        Ok(tokens.tables().count())
    }

    /// The replaced tokens and their rows, for a table by its Hugging Face name.
    pub(super) fn rows_for<'a>(
        &'a self,
        model: &LlamaConfig,
        lora: &'a LoraConfig,
        tensor: &str,
    ) -> Option<(&'a [usize], &'a WholeTensor)> {
        let tokens = Tokens::of(lora, model).ok()?;
        let (module, list) = match tensor {
            EMBEDDING_WEIGHT => (EMBEDDING, tokens.embedding),
            HEAD_WEIGHT if tokens.tied => (EMBEDDING, tokens.embedding),
            HEAD_WEIGHT => (HEAD, tokens.head),
            _ => return None,
        };
        Some((list?, self.token_rows.get(module)?))
    }

    /// The trainable rows of the embedding and of the output layer, on a device.
    ///
    /// # Errors
    ///
    /// As the checks of the settings: a name of no table, or two names of one table.
    pub(super) fn rows_on(
        &self,
        model: &LlamaConfig,
        lora: &LoraConfig,
        device: &Device,
    ) -> Result<(Option<TokenRows>, Option<TokenRows>), AdapterError> {
        let tokens = Tokens::of(lora, model)?;
        let on = |module: &str, tokens: Option<&[usize]>| {
            let rows = self.token_rows.get(module)?;
            Some(TokenRows::new(
                tokens?.to_vec(),
                rows.values.clone(),
                device,
            ))
        };
        Ok((on(EMBEDDING, tokens.embedding), on(HEAD, tokens.head)))
    }

    /// Whether the output layer of a tied model gets rows that the embedding does not get.
    pub(super) fn rows_untie(model: &LlamaConfig, lora: &LoraConfig) -> bool {
        Tokens::of(lora, model).is_ok_and(|tokens| tokens.head.is_some())
    }
}

/// Whether rows of the embedding are trained.
pub fn trains_embedding(lora: &LoraConfig, model: &LlamaConfig) -> bool {
    Tokens::of(lora, model).is_ok_and(|tokens| tokens.embedding.is_some())
}

/// Replaces the names of the tables by those of a configuration: `embed_tokens` and `lm_head`. The settings must
/// have been checked.
pub fn name_tables(lora: &mut LoraConfig) {
    for (name, _) in &mut lora.trainable_token_indices {
        *name = if EMBEDDING.ends_with(name.as_str()) {
            "embed_tokens".into()
        } else {
            HEAD.into()
        };
    }
}

/// Checks the lists of tokens against a model.
///
/// # Errors
///
/// An empty list; a token outside the vocabulary or listed twice; a table that the adapter also changes in another
/// way; a name of no table.
pub fn check_tokens(lora: &LoraConfig, model: &LlamaConfig) -> Result<(), AdapterError> {
    let tokens = Tokens::of(lora, model)?;
    let selector = lora.selector()?;
    for (module, list) in tokens.tables() {
        if list.is_empty() {
            let expected = "at least one token; omit a table without tokens";
            return Err(wrong(format!("an empty list for {module}"), expected));
        }
        let mut sorted = list.to_vec();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            let got = format!("a list with the token {} twice", twice[0]);
            return Err(wrong(got, "each token once"));
        }
        if let Some(token) = sorted.last().filter(|token| **token >= model.vocab_size) {
            let expected = format!("tokens below {}, the model's vocabulary", model.vocab_size);
            return Err(wrong(format!("a list with the token {token}"), expected));
        }
        // PEFT rejects saved modules, and fails in the first forward pass with a LoRA.
        let tables = [module, if tokens.tied { HEAD } else { module }];
        let all_linear = lora.target_modules == TargetModules::AllLinear;
        let changed = |module: &&str| {
            let is_target = selector.matches(module) && !(all_linear && *module == EMBEDDING);
            is_target || saved_whole(lora, &format!("{module}.weight"))
        };
        if let Some(module) = tables.iter().find(|module| changed(module)) {
            let got = format!("a list for {module}, which the adapter also changes in another way");
            let expected = "tables that are neither among target_modules nor among modules_to_save";
            return Err(wrong(got, expected));
        }
    }
    Ok(())
}

/// Returns the model with trainable rows, initialized from its tables.
///
/// # Errors
///
/// Settings that do not fit the model; a table that cannot be read from the device.
pub fn with_fresh_rows(mut model: Llama, lora: &LoraConfig) -> Result<Llama, AdapterError> {
    let config = model.config.clone();
    let mut fresh = AdapterTensors::default();
    for (module, tokens) in Tokens::of(lora, &config)?.tables() {
        let hidden = config.hidden_size;
        let values = match module {
            HEAD => model.head_values(),
            _ => model.embed_tokens.values(),
        };
        let values = values.map_err(|reason| AdapterError::Unreadable {
            name: token_rows_name(module),
            reason,
        })?;
        let row = |token: &usize| values.get(token * hidden..(token + 1) * hidden);
        let rows = WholeTensor {
            shape: vec![tokens.len(), hidden],
            values: tokens.iter().filter_map(row).flatten().copied().collect(),
        };
        fresh.token_rows.insert(module.into(), rows);
    }
    fresh.check_token_rows(&config, lora)?;
    let device = model.device();
    (model.embed_rows, model.head_rows) = fresh.rows_on(&config, lora, &device)?;
    Ok(model)
}

/// Writes the rows of `tokens` into a table `[vocab, hidden]`.
pub(super) fn put_rows(table: &mut [f32], tokens: &[usize], rows: &WholeTensor) {
    let hidden = rows.shape.last().copied().unwrap_or(0);
    for (token, row) in tokens.iter().zip(rows.values.chunks_exact(hidden.max(1))) {
        if let Some(place) = table.get_mut(token * hidden..(token + 1) * hidden) {
            place.copy_from_slice(row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn model(tied: bool) -> LlamaConfig {
        let config = json!({"model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": tied});
        match config {
            Value::Object(object) => LlamaConfig::from_json(&object).unwrap(),
            _ => unreachable!(),
        }
    }

    /// An adapter of rows alone, each the token's number.
    fn adapter(tables: &[(&str, &[usize])]) -> (AdapterTensors, LoraConfig) {
        let mut tensors = AdapterTensors::default();
        let mut lora = LoraConfig {
            target_modules: lora_core::TargetModules::Names(vec!["lm_head".into()]),
            exclude_modules: Some(lora_core::ExcludeModules::Names(vec!["lm_head".into()])),
            ..LoraConfig::default()
        };
        for (name, tokens) in tables {
            let rows = WholeTensor {
                shape: vec![tokens.len(), 8],
                values: tokens.iter().flat_map(|token| [*token as f32; 8]).collect(),
            };
            let module = if *name == HEAD { HEAD } else { EMBEDDING };
            tensors.token_rows.insert(module.into(), rows);
            lora.trainable_token_indices
                .push(((*name).into(), tokens.to_vec()));
        }
        (tensors, lora)
    }

    fn error(tables: &[(&str, &[usize])], tied: bool) -> String {
        let (tensors, lora) = adapter(tables);
        let checked = tensors.check_token_rows(&model(tied), &lora);
        checked.unwrap_err().to_string()
    }

    #[test]
    fn rows_take_the_place_of_a_tables_and_a_tied_head_follows() {
        for (tables, tied, embedding, head) in [
            (
                &[("embed_tokens", &[3, 1][..])][..],
                true,
                &[1, 3][..],
                &[1, 3][..],
            ),
            (&[("embed_tokens", &[3, 1])], false, &[1, 3], &[]),
            (
                &[("model.embed_tokens", &[3]), ("lm_head", &[5])],
                false,
                &[3],
                &[5],
            ),
            (
                &[("embed_tokens", &[3]), ("lm_head", &[5])],
                true,
                &[3],
                &[5],
            ),
            (&[("lm_head", &[5])], true, &[], &[5]),
        ] {
            let (tensors, lora) = adapter(tables);
            let model = model(tied);
            tensors.check_token_rows(&model, &lora).unwrap();
            assert_eq!(
                tensors.unties(&model, &lora),
                tied && head != embedding,
                "{tables:?}"
            );
            for (tensor, expected) in [(EMBEDDING_WEIGHT, embedding), (HEAD_WEIGHT, head)] {
                assert_eq!(tensors.changes(&model, &lora, tensor), !expected.is_empty());
                let base = vec![-1.0; 12 * 8];
                let merged = tensors.merged(&model, &lora, tensor, base.clone()).unwrap();
                for (token, row) in merged.chunks_exact(8).enumerate() {
                    let value = if expected.contains(&token) {
                        token as f32
                    } else {
                        -1.0
                    };
                    assert_eq!(row, [value; 8], "{tables:?} {tensor}");
                }
                let back = tensors.unmerged(&model, &lora, tensor, merged, &base);
                assert_eq!(back.unwrap(), base);
            }
        }
    }

    #[test]
    fn what_no_table_has_is_named() {
        assert!(error(&[("embed_tokens", &[3, 12])], true).contains("token 12"));
        assert!(error(&[("embed_tokens", &[3, 4, 3])], true).contains("token 3 twice"));
        assert!(error(&[("embed_tokens", &[])], true).contains("empty list"));
        assert!(error(&[("q_proj", &[3])], true).contains("\"q_proj\""));
        assert!(
            error(
                &[("embed_tokens", &[3]), ("model.embed_tokens", &[4])],
                true
            )
            .contains("two lists")
        );
        let (mut tensors, mut lora) = adapter(&[("embed_tokens", &[3])]);
        let check = |tensors: &AdapterTensors, lora: &LoraConfig| {
            let checked = tensors.check_token_rows(&model(true), lora);
            checked.unwrap_err().to_string()
        };
        lora.modules_to_save = vec!["lm_head".into()];
        assert!(check(&tensors, &lora).contains("modules_to_save"));
        lora.modules_to_save = Vec::new();
        lora.trainable_token_indices[0].1.push(4);
        assert!(check(&tensors, &lora).contains("[2, 8]"));
        lora.trainable_token_indices.clear();
        assert!(check(&tensors, &lora).contains("unexpected"));
        tensors.token_rows.clear();
        lora.trainable_token_indices = vec![("embed_tokens".into(), vec![3])];
        assert!(check(&tensors, &lora).contains("missing"));
    }
}
