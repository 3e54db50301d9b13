//! `adapter_config.json`, as PEFT 0.21 writes and reads it.

use lora_core::{Init, LoraConfig, TargetModules};
use serde_json::{Map, Value, json};

use super::AdapterError;

/// What `adapter_config.json` holds: the LoRA's settings and where its base model was.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank, scale, targets, ….
    pub lora: LoraConfig,
    /// Folder or Hugging Face name of the base model, where the file says it.
    pub base_model_name_or_path: Option<String>,
}

/// Fields that do not change what the adapter computes, whatever they hold.
const HARMLESS: [&str; 7] = [
    "auto_mapping",
    "revision",
    "peft_version",
    "inference_mode",
    // Read only where `megatron_config` or `use_qalora` is set, which is refused below.
    "megatron_core",
    "qalora_group_size",
    "base_model_class",
];

/// Fields that are read, or that are refused with a reason of their own.
const HANDLED: [&str; 14] = [
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "bias",
    "fan_in_fan_out",
    "peft_version",
];

impl AdapterConfig {
    /// The file's content: every field that PEFT needs to load the adapter unchanged.
    pub fn to_json(&self) -> Value {
        let lora = &self.lora;
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": null,
            "inference_mode": true,
            "r": lora.r,
            "lora_alpha": number(lora.lora_alpha),
            "lora_dropout": lora.lora_dropout,
            "use_rslora": lora.use_rslora,
            "use_dora": false,
            "target_modules": match &lora.target_modules {
                TargetModules::Names(names) => json!(names),
                TargetModules::Regex(pattern) => json!(pattern),
                TargetModules::AllLinear => json!("all-linear"),
            },
            "layers_to_transform": lora.layers_to_transform,
            "layers_pattern": null,
            "modules_to_save": null,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": match lora.init {
                Init::Kaiming => json!(true),
                Init::Gaussian => json!("gaussian"),
            },
            "bias": "none",
            "fan_in_fan_out": false,
        })
    }

    /// Reads the file's content.
    ///
    /// # Errors
    ///
    /// [`AdapterError::Config`] names the first field that is missing, has the wrong type, or asks
    /// for something that would change what the adapter computes and that is not supported here
    /// (DoRA, trained biases, whole modules beside the adapter, ranks that differ by module, …).
    /// An unknown field is accepted only while it is off: null, false, or empty.
    pub fn from_json(text: &str) -> Result<Self, AdapterError> {
        let value: Value = serde_json::from_str(text).map_err(|error| AdapterError::Json {
            reason: error.to_string(),
        })?;
        let Value::Object(fields) = value else {
            return Err(AdapterError::Json {
                reason: "the file holds no JSON object".into(),
            });
        };
        let fields = Fields(fields);
        fields.must_be("peft_type", &[json!("LORA")], true)?;
        fields.must_be("task_type", &[json!("CAUSAL_LM"), Value::Null], false)?;
        fields.must_be("bias", &[json!("none"), Value::Null], false)?;
        fields.must_be("fan_in_fan_out", &[json!(false), Value::Null], false)?;
        fields.must_be(
            "layers_pattern",
            &[Value::Null, json!("layers"), json!(["layers"]), json!([])],
            false,
        )?;
        for (field, value) in &fields.0 {
            let known = HANDLED.contains(&field.as_str()) || HARMLESS.contains(&field.as_str());
            if !known && !is_off(value) {
                return Err(invalid(
                    field,
                    value,
                    "null, false or empty: it is not supported",
                ));
            }
        }
        let lora = LoraConfig {
            r: fields.required("r", "a whole number of at least 1", as_index)?,
            lora_alpha: fields.required("lora_alpha", "a positive number", Value::as_f64)?,
            lora_dropout: fields
                .optional("lora_dropout", "a number", Value::as_f64)?
                .unwrap_or(0.0),
            use_rslora: fields
                .optional("use_rslora", "true or false", Value::as_bool)?
                .unwrap_or(false),
            target_modules: fields.required(
                "target_modules",
                "a list of module names, a regular expression, or \"all-linear\"",
                as_targets,
            )?,
            init: fields
                .optional(
                    "init_lora_weights",
                    // PiSSA, OLoRA, CorDA and LoftQ change the base weights as well.
                    "true, false or \"gaussian\": other kinds change the base weights",
                    as_init,
                )?
                .unwrap_or_default(),
            layers_to_transform: fields.optional(
                "layers_to_transform",
                "a layer number or a list of them",
                as_layers,
            )?,
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

/// PEFT declares `lora_alpha` as an integer; a fraction is written as it is.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
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
        Value::String(word) if word == "all-linear" => Some(TargetModules::AllLinear),
        Value::String(pattern) => Some(TargetModules::Regex(pattern.clone())),
        Value::Array(names) => names
            .iter()
            .map(|name| name.as_str().map(String::from))
            .collect::<Option<_>>()
            .map(TargetModules::Names),
        _ => None,
    }
}

fn as_init(value: &Value) -> Option<Init> {
    match value {
        // `false` means random values that training has replaced by the time a file exists.
        Value::Bool(_) => Some(Init::Kaiming),
        Value::String(kind) if kind == "gaussian" => Some(Init::Gaussian),
        _ => None,
    }
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
        got: got.to_string(),
        expected: expected.into(),
    }
}

struct Fields(Map<String, Value>);

impl Fields {
    fn optional<T>(
        &self,
        field: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, AdapterError> {
        match self.0.get(field) {
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
                field: field.into(),
                got: "nothing".into(),
                expected: expected.into(),
            })
    }

    fn must_be(&self, field: &str, allowed: &[Value], required: bool) -> Result<(), AdapterError> {
        let missing = Value::Null;
        let value = match self.0.get(field) {
            None if !required => return Ok(()),
            None => &missing,
            Some(value) => value,
        };
        match allowed.contains(value) {
            true => Ok(()),
            false => Err(invalid(field, value, &allowed[0].to_string())),
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
            ("use_dora", json!(true)),
            ("bias", json!("lora_only")),
            ("modules_to_save", json!(["lm_head"])),
            ("rank_pattern", json!({"q_proj": 2})),
            ("alpha_pattern", json!({"q_proj": 2})),
            ("fan_in_fan_out", json!(true)),
            ("exclude_modules", json!(["k_proj"])),
            ("lora_bias", json!(true)),
            ("layer_replication", json!([[0, 1]])),
            ("layers_pattern", json!("blocks")),
            ("init_lora_weights", json!("pissa")),
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
