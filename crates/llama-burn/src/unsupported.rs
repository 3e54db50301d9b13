//! Settings of a `config.json` that would change the results and are not supported: rejected by name.

use serde_json::{Map, Value};

use crate::ConfigError;
use crate::keys::invalid;

/// Rejects weights that are stored quantized, and settings of transformers' configuration classes that change the results and
/// are not supported.
///
/// # Errors
///
/// Names the key, its value, and what to do.
pub(crate) fn refuse(config: &Map<String, Value>) -> Result<(), ConfigError> {
    let of_rope = ["rope_parameters", "rope_scaling"];
    let of_rope = of_rope.map(|key| config.get(key).and_then(Value::as_object));
    let objects = [Some(config)].into_iter().chain(of_rope).flatten();
    for object in objects {
        number(
            object,
            "partial_rotary_factor",
            1.0,
            "heads are rotated whole; only 1.0 is supported",
        )?;
    }
    number(
        config,
        "attention_dropout",
        0.0,
        "dropout of attention is not supported; write 0.0 (lora_dropout is the adapter's)",
    )?;
    match set(config, "hidden_act") {
        None => {}
        Some(Value::String(act)) if act == "silu" => {}
        Some(other) => return Err(invalid("hidden_act", other, "only \"silu\" is supported")),
    }
    let Some(quantization) = set(config, "quantization_config") else {
        return Ok(());
    };
    let method = quantization.get("quant_method").unwrap_or(quantization);
    let expected = "weights that are stored in this form cannot be read; name the model that they were quantized from \
                    (quant_bits quantizes it while it is loaded), or a GGUF file";
    Err(invalid(
        "quantization_config.quant_method",
        method,
        expected,
    ))
}

/// The key's value; `null` counts as absent.
fn set<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

fn number(
    object: &Map<String, Value>,
    key: &str,
    only: f64,
    expected: &str,
) -> Result<(), ConfigError> {
    match set(object, key) {
        None => Ok(()),
        Some(value) if value.as_f64() == Some(only) => Ok(()),
        Some(value) => Err(invalid(key, value, expected)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(config: Value) -> Option<String> {
        let Value::Object(config) = config else {
            unreachable!()
        };
        refuse(&config).err().map(|error| error.to_string())
    }

    #[test]
    fn settings_that_change_the_results_are_rejected_by_name() {
        for (config, parts) in [
            (
                json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
                ["gptq", "quantized from"],
            ),
            (
                json!({"quantization_config": {"load_in_8bit": true}}),
                ["load_in_8bit", "quantized from"],
            ),
            (
                json!({"attention_dropout": 0.1}),
                ["attention_dropout is 0.1", "write 0.0"],
            ),
            (
                json!({"partial_rotary_factor": 0.5}),
                ["partial_rotary_factor is 0.5", "1.0"],
            ),
            (
                json!({"rope_parameters": {"partial_rotary_factor": 0.25}}),
                ["partial_rotary_factor is 0.25", "1.0"],
            ),
            (json!({"hidden_act": 7}), ["hidden_act is 7", "silu"]),
            (json!({"hidden_act": "gelu"}), ["gelu", "silu"]),
        ] {
            let message = refused(config).unwrap();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn values_without_effect_are_accepted() {
        let config = json!({"attention_dropout": 0, "partial_rotary_factor": 1.0, "hidden_act": "silu",
            "quantization_config": null, "rope_scaling": null, "rope_parameters": {"partial_rotary_factor": null}});
        assert_eq!(refused(config), None);
    }
}
