//! Reads and writes `adapter_config.json` as PEFT 0.21 does.

use llama_burn::limited::clipped;
use lora_core::{Bias, ExcludeModules, Facts, Init, LoraConfig, Method, TargetModules};
use serde_json::{Map, Value, json};

use super::AdapterError;

/// The content of `adapter_config.json`: the LoRA's settings and the name of its base model.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank, scale, target modules and so on.
    pub lora: LoraConfig,
    /// Folder or Hugging Face name of the base model, if the file contains it.
    pub base_model_name_or_path: Option<String>,
}

/// Fields that do not change what the adapter computes, whatever their value.
const HARMLESS: [&str; 12] = [
    "auto_mapping",
    "revision",
    "peft_version",
    "inference_mode",
    // Read only where `megatron_config` or `use_qalora` is set, which is refused below.
    "megatron_core",
    "qalora_group_size",
    "base_model_class",
    // Where factors are kept while they are loaded.
    "runtime_config",
    // An adapter that is saved is no longer initialized.
    "init_weights",
    // Settings of initializations that leave the base weights unchanged. Others are rejected.
    "eva_config",
    "corda_config",
    "lora_ga_config",
];

/// Fields that are read, or that are rejected with a specific reason.
const HANDLED: [&str; 24] = [
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "bias",
    "lora_bias",
    "modules_to_save",
    "fan_in_fan_out",
    "ensure_weight_tying",
    "trainable_token_indices",
    "peft_version",
    "d_initial",
    "projection_prng_key",
    "save_projection",
];

impl AdapterConfig {
    /// Returns the file's content, with every field that PEFT needs to load the adapter unchanged.
    pub fn to_json(&self) -> Value {
        let lora = &self.lora;
        let facts = lora.method.facts();
        let mut fields = json!({
            "peft_type": facts.peft_type,
            "task_type": "CAUSAL_LM",
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": null,
            "inference_mode": true,
            "r": lora.r,
            "lora_alpha": number(lora.lora_alpha),
            "lora_dropout": lora.lora_dropout,
            "use_rslora": lora.use_rslora,
            "target_modules": match &lora.target_modules {
                TargetModules::Names(names) => json!(names),
                TargetModules::Regex(pattern) => json!(pattern),
                TargetModules::AllLinear => json!("all-linear"),
            },
            "exclude_modules": match &lora.exclude_modules {
                None => Value::Null,
                Some(ExcludeModules::Names(names)) => json!(names),
                Some(ExcludeModules::Regex(pattern)) => json!(pattern),
            },
            "layers_to_transform": lora.layers_to_transform,
            "layers_pattern": or_null(&lora.layers_pattern),
            "ensure_weight_tying": lora.ensure_weight_tying,
            "modules_to_save": or_null(&lora.modules_to_save),
            "trainable_token_indices": if lora.trainable_token_indices.is_empty() { Value::Null } else { pattern_json(&lora.trainable_token_indices, |tokens| json!(tokens)) },
            "rank_pattern": pattern_json(&lora.rank_pattern, |r| json!(r)),
            "alpha_pattern": pattern_json(&lora.alpha_pattern, |alpha| number(*alpha)),
            "init_lora_weights": match lora.init {
                Init::Kaiming => json!(true),
                init => json!(init.to_string()),
            },
            "bias": match lora.bias {
                Bias::None => "none".into(),
                Bias::All => "all".into(),
                Bias::LoraOnly => adapted_only(facts),
            },
            "d_initial": lora.d_initial,
            "projection_prng_key": lora.projection_prng_key,
            "save_projection": lora.save_projection,
            "lora_bias": lora.lora_bias,
            "fan_in_fan_out": false,
        });
        for (method, flag) in flags(facts) {
            fields[flag] = json!(method == lora.method);
        }
        if let Value::Object(fields) = &mut fields {
            fields.retain(|field, _| facts.has(field));
            for (ours, theirs) in facts.renamed {
                let value = fields.remove(*ours);
                fields.extend(value.map(|value| (theirs.to_string(), value)));
            }
        }
        fields
    }

    /// Parses the file's content.
    ///
    /// # Errors
    ///
    /// [`AdapterError::Config`] names the first field that is missing, that has the wrong type, or that
    /// would change what the adapter computes in a way that is not supported (base weights changed by the
    /// initialization, activated or block-diagonal LoRA and so on). An unknown field is accepted only if it is off:
    /// null, false or empty.
    pub fn from_json(text: &str) -> Result<Self, AdapterError> {
        let value: Value = serde_json::from_str(text).map_err(|error| AdapterError::Json {
            reason: error.to_string(),
        })?;
        let Value::Object(fields) = value else {
            return Err(AdapterError::Json {
                reason: "the file is not a JSON object".into(),
            });
        };
        let facts = Method::default().facts();
        let mut fields = Fields { fields, facts };
        let mut method = fields.required("peft_type", &peft_types(), |value| {
            Method::of_peft_type(value.as_str()?)
        })?;
        let facts = method.facts();
        fields.facts = facts;
        fields.must_be("task_type", &[json!("CAUSAL_LM"), Value::Null])?;
        let fan = fields.optional("fan_in_fan_out", "true or false", Value::as_bool)?;
        if fan == Some(true) {
            log::warn!(
                "the adapter's fan_in_fan_out is true, which is for other layers; as in PEFT, it is false for linear layers"
            );
        }
        for (field, value) in &fields.fields {
            let handled = HANDLED.iter().filter(|name| facts.has(name));
            let mut handled = handled.map(|name| facts.field(name));
            let known = handled.any(|name| name == field)
                || HARMLESS.contains(&field.as_str())
                || flags(facts).any(|(_, flag)| flag == field);
            if !known && !is_off(value) {
                return Err(invalid(
                    field,
                    value,
                    "null, false or empty: it is not supported",
                ));
            }
        }
        let on = |field| fields.optional(field, "true or false", Value::as_bool);
        let names = |field| fields.optional(field, "a list of names", as_names);
        for (flagged, flag) in flags(facts) {
            if on(flag)? == Some(true) {
                method = flagged;
            }
        }
        let lora = LoraConfig {
            r: fields.required("r", "a whole number of at least 1", as_index)?,
            lora_alpha: if facts.has("lora_alpha") {
                fields.required("lora_alpha", "a positive number", Value::as_f64)?
            } else {
                LoraConfig::default().lora_alpha
            },
            lora_dropout: fields
                .optional("lora_dropout", "a number", Value::as_f64)?
                .unwrap_or(0.0),
            use_rslora: on("use_rslora")?.unwrap_or(false),
            method,
            lora_bias: on("lora_bias")?.unwrap_or(false),
            ensure_weight_tying: on("ensure_weight_tying")?.unwrap_or(false),
            target_modules: fields
                .optional(
                    "target_modules",
                    "a list of module names, a regular expression, or \"all-linear\"",
                    as_targets,
                )?
                // PEFT's default for Llama.
                .unwrap_or_else(|| {
                    TargetModules::Names(["q_proj", "v_proj"].map(String::from).to_vec())
                }),
            exclude_modules: fields.optional(
                "exclude_modules",
                "a list of module names or a regular expression",
                as_exclusion,
            )?,
            init: fields
                .optional(
                    "init_lora_weights",
                    "true, false, \"gaussian\", \"eva\", \"orthogonal\" or \"mica\": other initializations change the base weights; PEFT's save_pretrained with path_initial_model_for_weight_conversion converts such an adapter to a plain one",
                    as_init,
                )?
                .unwrap_or_default(),
            layers_to_transform: fields.optional(
                "layers_to_transform",
                "a layer number or a list of them",
                as_layers,
            )?,
            layers_pattern: names("layers_pattern")?.unwrap_or_default(),
            rank_pattern: fields
                .optional("rank_pattern", "names with ranks of at least 1", |value| {
                    as_pattern(value, as_index)
                })?
                .unwrap_or_default(),
            alpha_pattern: fields
                .optional("alpha_pattern", "names with positive numbers", |value| {
                    as_pattern(value, Value::as_f64)
                })?
                .unwrap_or_default(),
            bias: fields
                .optional("bias", "\"none\", \"all\" or \"lora_only\"", |value| {
                    as_bias(value, facts)
                })?
                .unwrap_or_default(),
            d_initial: fields
                .optional("d_initial", "a number", Value::as_f64)?
                .unwrap_or(LoraConfig::default().d_initial),
            projection_prng_key: fields
                .optional("projection_prng_key", "a whole number", Value::as_u64)?
                .unwrap_or_default(),
            save_projection: on("save_projection")?.unwrap_or(true),
            modules_to_save: names("modules_to_save")?.unwrap_or_default(),
            trainable_token_indices: fields
                .optional(
                    "trainable_token_indices",
                    "a list of token ids, or lists by the names \"embed_tokens\" and \"lm_head\"",
                    as_tokens,
                )?
                .unwrap_or_default(),
        };
        lora.validate()?;
        Ok(Self {
            lora,
            base_model_name_or_path: fields.optional(
                "base_model_name_or_path",
                "a folder or a model's name",
                |value| value.as_str().map(String::from),
            )?,
        })
    }
}

/// PEFT declares `lora_alpha` as an integer. A fraction is written as a float.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn as_index(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .and_then(|number| usize::try_from(number).ok())
}

fn as_targets(value: &Value) -> Option<TargetModules> {
    match value {
        Value::String(word) if word.to_lowercase() == "all-linear" => {
            Some(TargetModules::AllLinear)
        }
        Value::String(pattern) => Some(TargetModules::Regex(pattern.clone())),
        Value::Array(names) => names
            .iter()
            .map(|name| name.as_str().map(String::from))
            .collect::<Option<_>>()
            .map(TargetModules::Names),
        _ => None,
    }
}

fn as_names(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(name) if name.is_empty() => Some(Vec::new()),
        Value::String(name) => Some(vec![name.clone()]),
        Value::Array(names) => names
            .iter()
            .map(|name| name.as_str().map(String::from))
            .collect(),
        _ => None,
    }
}

fn as_exclusion(value: &Value) -> Option<ExcludeModules> {
    match value {
        Value::String(pattern) => Some(ExcludeModules::Regex(pattern.clone())),
        names => as_names(names).map(ExcludeModules::Names),
    }
}

/// In the order of the file: the first expression that matches is used.
fn as_pattern<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<(String, T)>> {
    let entries = value.as_object()?.iter();
    entries
        .map(|(name, value)| Some((name.clone(), read(value)?)))
        .collect()
}

/// A list without a name is for the embedding.
fn as_tokens(value: &Value) -> Option<Vec<(String, Vec<usize>)>> {
    let tokens = |value: &Value| value.as_array()?.iter().map(as_index).collect();
    match value {
        Value::Array(list) if list.is_empty() => Some(Vec::new()),
        Value::Array(_) => Some(vec![("embed_tokens".into(), tokens(value)?)]),
        value => as_pattern(value, tokens),
    }
}

/// The methods of the same `peft_type` that a field switches on, with the field.
fn flags(facts: &Facts) -> impl Iterator<Item = (Method, &'static str)> {
    let methods = Method::ALL.into_iter();
    methods.filter_map(|method| {
        let other = method.facts();
        let flag = other.flag?;
        (other.peft_type == facts.peft_type).then_some((method, flag))
    })
}

fn as_bias(value: &Value, facts: &Facts) -> Option<Bias> {
    match value.as_str()? {
        "none" => Some(Bias::None),
        "all" => Some(Bias::All),
        only if only == adapted_only(facts) => Some(Bias::LoraOnly),
        _ => None,
    }
}

/// PEFT's word for the biases of adapted modules.
fn adapted_only(facts: &Facts) -> String {
    format!("{}_only", facts.peft_type.to_lowercase())
}

/// The supported values of `peft_type`.
fn peft_types() -> String {
    let plain = Method::ALL.into_iter().map(Method::facts);
    let plain = plain.filter(|facts| facts.flag.is_none());
    let types: Vec<String> = plain
        .map(|facts| format!("{:?}", facts.peft_type))
        .collect();
    types.join(" or ")
}

fn as_init(value: &Value) -> Option<Init> {
    match value {
        // The initialization of the factors does not matter for an adapter that is saved already.
        Value::Bool(_) => Some(Init::Kaiming),
        Value::String(kind) => match kind.to_lowercase().as_str() {
            "gaussian" => Some(Init::Gaussian),
            "eva" | "orthogonal" | "mica" => Some(Init::Kaiming),
            _ => None,
        },
        _ => None,
    }
}

fn or_null(names: &[String]) -> Value {
    if names.is_empty() {
        Value::Null
    } else {
        json!(names)
    }
}

fn pattern_json<T>(pattern: &[(String, T)], write: impl Fn(&T) -> Value) -> Value {
    let entries = pattern.iter();
    Value::Object(
        entries
            .map(|(name, value)| (name.clone(), write(value)))
            .collect(),
    )
}

fn as_layers(value: &Value) -> Option<Vec<usize>> {
    match value {
        Value::Array(layers) => layers.iter().map(as_index).collect(),
        layer => as_index(layer).map(|layer| vec![layer]),
    }
}

fn invalid(field: &str, got: &Value, expected: &str) -> AdapterError {
    AdapterError::Config {
        field: field.into(),
        got: clipped(&got.to_string(), 200).into_owned(),
        expected: expected.into(),
    }
}

/// The fields of the file, under the names that the method gives to those of [`LoraConfig`].
struct Fields {
    fields: Map<String, Value>,
    facts: &'static Facts,
}

impl Fields {
    fn optional<T>(
        &self,
        field: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, AdapterError> {
        let known = self.facts.has(field);
        let field = self.facts.field(field);
        match self.fields.get(field).filter(|_| known) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(invalid(field, value, expected)),
            },
        }
    }

    fn required<T>(
        &self,
        field: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, AdapterError> {
        self.optional(field, expected, read)?
            .ok_or_else(|| AdapterError::Config {
                field: self.facts.field(field).into(),
                got: "nothing".into(),
                expected: expected.into(),
            })
    }

    fn must_be(&self, field: &str, allowed: &[Value]) -> Result<(), AdapterError> {
        match self.fields.get(field) {
            Some(value) if !allowed.contains(value) => {
                Err(invalid(field, value, &allowed[0].to_string()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(lora: LoraConfig) -> AdapterConfig {
        AdapterConfig {
            lora,
            base_model_name_or_path: Some("some/model".into()),
        }
    }

    fn with(field: &str, value: Value) -> Result<AdapterConfig, AdapterError> {
        let mut json = config(LoraConfig::default()).to_json();
        json[field] = value;
        AdapterConfig::from_json(&json.to_string())
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let regex = TargetModules::Regex(r".*\.q_proj".into());
        for lora in [
            LoraConfig::default(),
            LoraConfig {
                lora_alpha: 2.5,
                use_rslora: true,
                lora_dropout: 0.1,
                ..LoraConfig::default()
            },
            LoraConfig {
                target_modules: TargetModules::AllLinear,
                init: Init::Gaussian,
                ..LoraConfig::default()
            },
            LoraConfig {
                target_modules: regex,
                ..LoraConfig::default()
            },
            LoraConfig {
                layers_to_transform: Some(vec![0, 3]),
                layers_pattern: vec!["layers".into()],
                ..LoraConfig::default()
            },
            LoraConfig {
                method: Method::Dora,
                rank_pattern: vec![("q_proj".into(), 2)],
                alpha_pattern: vec![("q_proj".into(), 2.5)],
                exclude_modules: Some(ExcludeModules::Names(vec!["k_proj".into()])),
                bias: Bias::LoraOnly,
                modules_to_save: vec!["lm_head".into()],
                ..LoraConfig::default()
            },
            LoraConfig {
                trainable_token_indices: vec![
                    ("lm_head".into(), vec![7]),
                    ("embed_tokens".into(), vec![9, 2]),
                ],
                ..LoraConfig::default()
            },
            LoraConfig {
                exclude_modules: Some(ExcludeModules::Regex(".*k_proj".into())),
                bias: Bias::All,
                lora_bias: true,
                ensure_weight_tying: true,
                ..LoraConfig::default()
            },
        ] {
            let config = config(lora);
            let text = config.to_json().to_string();
            assert_eq!(AdapterConfig::from_json(&text).unwrap(), config);
        }
    }

    #[test]
    fn a_whole_alpha_is_written_as_an_integer() {
        assert_eq!(
            config(LoraConfig::default()).to_json()["lora_alpha"],
            json!(16)
        );
    }

    #[test]
    fn a_field_that_would_change_the_result_is_refused_by_name() {
        for (field, value) in [
            ("use_dora", json!(1)),
            ("bias", json!("some")),
            ("modules_to_save", json!([1])),
            ("rank_pattern", json!({"q_proj": "2"})),
            ("rank_pattern", json!({"(": 2})),
            ("alpha_pattern", json!(["q_proj"])),
            ("exclude_modules", json!(3)),
            ("fan_in_fan_out", json!("yes")),
            ("layer_replication", json!([[0, 1]])),
            ("layers_pattern", json!("blocks")),
            ("init_lora_weights", json!("pissa")),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("init_lora_weights", json!("olora")),
            ("init_lora_weights", json!("corda")),
            ("init_lora_weights", json!("loftq")),
            ("init_lora_weights", json!("lora_ga")),
            ("loftq_config", json!({"loftq_bits": 4})),
            ("alora_invocation_tokens", json!([1, 2])),
            ("trainable_token_indices", json!([1, -2])),
            ("trainable_token_indices", json!({"embed_tokens": 3})),
            ("target_parameters", json!(["weight"])),
            ("use_qalora", json!(true)),
            ("use_bdlora", json!({"nblocks": 2})),
            ("arrow_config", json!({"top_k": 2})),
            ("velora_config", json!({"rank": 2})),
            ("monteclora_config", json!({"num_samples": 2})),
            ("kasa_config", json!({"beta": 1e-4})),
            ("megatron_config", json!({"a": 1})),
            ("task_type", json!("SEQ_CLS")),
            ("peft_type", json!("IA3")),
            ("a_field_of_the_future", json!(1)),
            ("r", json!("8")),
            ("r", Value::Null),
            ("target_modules", json!([1])),
        ] {
            let error = with(field, value).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
        let mut both = config(LoraConfig::default()).to_json();
        both["use_dora"] = json!(true);
        both["lora_bias"] = json!(true);
        let error = AdapterConfig::from_json(&both.to_string()).unwrap_err();
        assert!(error.to_string().contains("lora_bias"), "{error}");
    }

    #[test]
    fn patterns_keep_the_order_of_the_file() {
        let pattern = json!({"v_proj": 4, "_proj": 2, "a": 1});
        let read = with("rank_pattern", pattern).unwrap();
        let names: Vec<&str> = read
            .lora
            .rank_pattern
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(names, ["v_proj", "_proj", "a"]);
        assert_eq!(
            AdapterConfig::from_json(&read.to_json().to_string()).unwrap(),
            read
        );
    }

    #[test]
    fn what_peft_leaves_to_its_defaults_is_the_same_here() {
        let read = with("target_modules", Value::Null)
            .unwrap()
            .lora
            .target_modules;
        let expected = ["q_proj", "v_proj"].map(String::from).to_vec();
        assert_eq!(read, TargetModules::Names(expected));
        assert!(with("fan_in_fan_out", json!(true)).is_ok());
        assert!(with("init_lora_weights", json!("eva")).is_ok());
        assert!(with("runtime_config", json!({"ephemeral_gpu_offload": false})).is_ok());
    }

    #[test]
    fn a_list_of_tokens_is_the_embeddings() {
        let tokens = |value| {
            with("trainable_token_indices", value)
                .unwrap()
                .lora
                .trainable_token_indices
        };
        let expected = vec![("embed_tokens".to_string(), vec![5, 3])];
        assert_eq!(tokens(json!([5, 3])), expected);
        assert_eq!(tokens(json!({"embed_tokens": [5, 3]})), expected);
        assert_eq!(tokens(json!([])), []);
    }

    #[test]
    fn a_field_that_is_off_is_accepted() {
        for value in [Value::Null, json!(false), json!([]), json!({})] {
            assert!(with("a_field_of_the_future", value).is_ok());
        }
        let one_layer = with("layers_to_transform", json!(1)).unwrap();
        assert_eq!(one_layer.lora.layers_to_transform, Some(vec![1]));
    }

    #[test]
    fn rank_zero_and_text_that_is_not_json_are_errors() {
        assert!(matches!(with("r", json!(0)), Err(AdapterError::Lora(_))));
        assert!(matches!(
            AdapterConfig::from_json("{"),
            Err(AdapterError::Json { .. })
        ));
        assert!(matches!(
            AdapterConfig::from_json("[]"),
            Err(AdapterError::Json { .. })
        ));
    }
}
