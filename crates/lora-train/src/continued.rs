//! Training that starts from an adapter (`init_adapter`) instead of a fresh one.

use std::path::Path;

use llama_burn::{EMBEDDING_WEIGHT, HEAD_WEIGHT, InitialAdapters, Llama, LlamaConfig, saved_whole};
use lora_core::{ExcludeModules, LoraConfig, LoraError, Method, ModuleSelector, TargetModules};

use hub::{self, HubError};
use peft::{AdapterConfig, AdapterError, AdapterTensors, read_adapter, read_adapter_config};
use peft::{check_tokens, name_tables, with_fresh_rows};
use run_config::{Config, Problem, Problems};

/// Why training cannot start from an adapter, or with fresh adapters.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum StartError {
    #[error("init_adapter: {0}")]
    Adapter(#[source] AdapterError),
    #[error("init_adapter: {0}")]
    Hub(#[from] HubError),
    #[error(transparent)]
    Conflicts(#[from] Problems),
    #[error(transparent)]
    Lora(#[from] lora_core::LoraError),
    #[error(transparent)]
    Tokens(AdapterError),
    #[error("the initial adapters: {0}")]
    Initial(#[source] AdapterError),
    /// A selector matches modules that cannot be trained.
    #[error(
        "target_modules selects {0}; adapters of the embedding can be loaded and merged but not trained: narrow target_modules, or list the embedding in exclude_modules"
    )]
    Embedding(&'static str),
}

/// The configuration with the adapter settings of its `init_adapter`; unchanged without
/// `init_adapter`.
///
/// # Errors
///
/// An adapter whose settings cannot be read or trained, by field; every key that was set beside
/// `init_adapter` and contradicts it.
pub fn continued(config: &Config, model: &LlamaConfig) -> Result<Config, StartError> {
    let Some(folder) = &config.init_adapter else {
        let lora = config.lora_config();
        check_targets(&lora, model)?;
        InitialAdapters::new(&lora, model, config.seed)?;
        return Ok(config.clone());
    };
    let folder = &hub::adapter_folder(folder)?;
    let adapter = read_adapter_config(folder).map_err(StartError::Adapter)?;
    let lora = trainable(adapter, folder, model)?;
    let dropout_written = config
        .source
        .lora_keys
        .iter()
        .any(|key| key == "lora_dropout");
    let continued = Config {
        lora_r: lora.r,
        lora_alpha: lora.lora_alpha,
        lora_dropout: if dropout_written {
            config.lora_dropout
        } else {
            lora.lora_dropout
        },
        peft_use_rslora: lora.use_rslora,
        peft_type: Method::of_peft_type(lora.method.facts().peft_type).unwrap_or_default(),
        peft_use_dora: lora.method.facts().flag == Some("use_dora"),
        projection_prng_key: lora.projection_prng_key,
        save_projection: lora.save_projection,
        d_initial: lora.d_initial,
        target_modules: lora.target_modules,
        layers_to_transform: lora.layers_to_transform,
        exclude_modules: lora.exclude_modules,
        rank_pattern: lora.rank_pattern,
        alpha_pattern: lora.alpha_pattern,
        trainable_token_indices: lora.trainable_token_indices,
        bias: lora.bias,
        lora_bias: lora.lora_bias,
        modules_to_save: lora.modules_to_save,
        ..config.clone()
    };
    let conflicts = conflicts(config, &continued, folder);
    if conflicts.is_empty() {
        Ok(continued)
    } else {
        Err(Problems(conflicts).into())
    }
}

/// The model with the adapters that training starts from: fresh ones, those that were taken out of its weights, or those
/// of `init_adapter`. `config` is the result of [`continued`].
///
/// # Errors
///
/// As [`read_adapter`] and [`AdapterTensors::put_on`]; as [`Llama::with_lora`].
pub fn start(
    model: Llama,
    config: &Config,
    initial: Option<&AdapterTensors>,
) -> Result<Llama, StartError> {
    let lora = config.lora_config();
    let Some(folder) = &config.init_adapter else {
        let model = match initial {
            Some(initial) => {
                // The rows are added afterwards.
                let mut without_rows = lora.clone();
                without_rows.trainable_token_indices.clear();
                let model = initial.put_on(model, &without_rows);
                model.map_err(StartError::Initial)?
            }
            None => model.with_lora(&lora, config.seed)?,
        };
        return with_fresh_rows(model, &lora).map_err(StartError::Tokens);
    };
    let folder = &hub::adapter_folder(folder)?;
    let (_, tensors) = read_adapter(folder).map_err(StartError::Adapter)?;
    trainable_tensors(folder, &tensors, &model.config, &lora)?;
    let model = tensors.put_on(model, &lora);
    model.map_err(|error| StartError::Adapter(error.in_file(folder)))
}

/// The adapter's settings, converted to the configuration's.
fn trainable(
    adapter: AdapterConfig,
    folder: &Path,
    model: &LlamaConfig,
) -> Result<LoraConfig, StartError> {
    let refused = |field: &str, got: String, why: &str| {
        let error = AdapterError::Config {
            field: field.into(),
            got,
            expected: format!("a setting that training supports: {why}"),
        };
        StartError::Adapter(error.in_file(&folder.join(peft::CONFIG_FILE)))
    };
    let lora = adapter.lora;
    let tables = [EMBEDDING_WEIGHT, HEAD_WEIGHT];
    let saves_table = tables.iter().any(|name| saved_whole(&lora, name));
    if lora.ensure_weight_tying && model.tie_word_embeddings && saves_table {
        let why = "embedding and output layer would be two weights here; merge this adapter first";
        return Err(refused("ensure_weight_tying", "true".into(), why));
    }
    check_targets(&lora, model)?;
    let mut plain = lora.clone();
    name_tables(&mut plain);
    plain.layers_pattern = Vec::new();
    if let TargetModules::Names(names) = &mut plain.target_modules {
        // PEFT keeps names that match nothing; a configuration accepts only a decoder's modules.
        let modules = linear_modules(model);
        names.retain(|name| {
            let ends = |module: &String| module == name || module.ends_with(&format!(".{name}"));
            modules.iter().any(ends)
        });
    }
    let (selector, plain_selector) = (lora.selector()?, plain.selector()?);
    let same = |module: &String| selector.matches(module) == plain_selector.matches(module);
    if linear_modules(model).iter().all(same) {
        Ok(plain)
    } else {
        let got = format!("{:?}", lora.layers_pattern);
        let why = "only the pattern \"layers\" fits this model";
        Err(refused("layers_pattern", got, why))
    }
}

/// Adapters of the embedding can be used but not trained; those of the output layer must be plain
/// LoRA; trained tokens must be in the vocabulary.
fn check_targets(lora: &LoraConfig, model: &LlamaConfig) -> Result<(), StartError> {
    check_tokens(lora, model).map_err(StartError::Tokens)?;
    model.check_saved(lora)?;
    let selector: ModuleSelector = lora.selector()?;
    if selector.matches("lm_head") && (lora.method != Method::default() || lora.lora_dropout > 0.0)
    {
        return Err(LoraError::PlainHead.into());
    }
    let linear_only = lora.target_modules == TargetModules::AllLinear;
    if !linear_only && selector.matches("model.embed_tokens") {
        return Err(StartError::Embedding("model.embed_tokens"));
    }
    // If nothing is selected, the message lists the available modules.
    model.count(lora, lora_core::Quantization::None, 4)?;
    Ok(())
}

fn trainable_tensors(
    folder: &Path,
    tensors: &AdapterTensors,
    model: &LlamaConfig,
    lora: &LoraConfig,
) -> Result<(), StartError> {
    let trained = model.whole_tensors(lora)?;
    // PEFT also saves an adapted output layer's own weight; it is the base model's.
    let changed = |name: &&String| {
        let trains = trained.iter().any(|(other, _)| other == *name);
        let head = *name == HEAD_WEIGHT && tensors.modules.contains_key("lm_head");
        !trains && !head
    };
    match tensors.whole.keys().find(changed) {
        None => Ok(()),
        Some(name) => {
            let name = format!("base_model.model.{name}");
            let error = AdapterError::Unexpected { name };
            Err(StartError::Adapter(
                error.in_file(&folder.join(peft::WEIGHTS_FILE)),
            ))
        }
    }
}

fn linear_modules(model: &LlamaConfig) -> Vec<String> {
    let layers = 0..model.num_hidden_layers;
    let names = layers.flat_map(|layer| {
        let linears = model.layer_linears().into_iter();
        linears.map(move |linear| format!("model.layers.{layer}.{}", linear.name))
    });
    names.chain(["lm_head".to_string()]).collect()
}

/// The keys that were set and contradict the adapter.
fn conflicts(written: &Config, adapter: &Config, folder: &Path) -> Vec<Problem> {
    let texts = |config: &Config| -> toml::Table {
        let mut config = config.clone();
        // PEFT's lists are sets.
        if let TargetModules::Names(names) = &mut config.target_modules {
            names.sort();
        }
        if let Some(ExcludeModules::Names(names)) = &mut config.exclude_modules {
            names.sort();
        }
        // The written forms are compared, because the same value has only one form.
        config.to_toml().parse().unwrap_or_default()
    };
    let (ours, theirs) = (texts(written), texts(adapter));
    let keys = written.source.lora_keys.iter();
    let different = keys.filter(|key| ours.get(*key) != theirs.get(*key));
    let problem = |key: &String| Problem {
        location: written.source.location(key),
        key: key.clone(),
        value: ours.get(key).map(ToString::to_string),
        message: format!(
            "contradicts init_adapter ({}), whose {key} is {}; remove the key, or remove init_adapter",
            folder.display(),
            theirs
                .get(key)
                .map_or_else(|| "none".into(), ToString::to_string)
        ),
    };
    different.map(problem).collect()
}
