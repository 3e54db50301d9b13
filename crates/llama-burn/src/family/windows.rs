//! Sliding windows in `config.json`: which layers have one, and how long it is.

use serde_json::Value;

use crate::ConfigError;
use crate::keys::{Keys, invalid};

/// A window of `sliding_window` in every layer, none if the key is null.
pub(super) fn of_all_layers(keys: &Keys) -> Result<Vec<Option<usize>>, ConfigError> {
    let layers = keys.count("num_hidden_layers")?;
    let window = keys.optional_count("sliding_window")?;
    Ok(vec![window; layers])
}

/// If `use_sliding_window` is set, a window of `sliding_window` in the layers that `layer_types` names
/// `"sliding_attention"`; without that key, in the layers from `max_window_layers` on.
pub(super) fn of_upper_layers(keys: &Keys) -> Result<Vec<Option<usize>>, ConfigError> {
    if !keys.flag("use_sliding_window")? {
        return Ok(Vec::new());
    }
    let layers = keys.count("num_hidden_layers")?;
    let window = keys.optional_count("sliding_window")?;
    let full = keys.optional_whole("max_window_layers")?.unwrap_or(0);
    let slides = match keys.get("layer_types") {
        None => (0..layers).map(|layer| layer >= full).collect(),
        Some(types) => layer_types(types, layers)?,
    };
    let windows = slides.into_iter().map(|slides| window.filter(|_| slides));
    Ok(windows.collect())
}

/// Whether each layer slides.
fn layer_types(types: &Value, layers: usize) -> Result<Vec<bool>, ConfigError> {
    const EXPECTED: &str =
        "expected \"full_attention\" or \"sliding_attention\" for each of num_hidden_layers";
    let wrong = || invalid("layer_types", types, EXPECTED);
    let list = types.as_array().ok_or_else(wrong)?;
    let slides: Option<Vec<bool>> = list
        .iter()
        .map(|kind| match kind.as_str() {
            Some("sliding_attention") => Some(true),
            Some("full_attention") => Some(false),
            _ => None,
        })
        .collect();
    match slides {
        Some(slides) if slides.len() == layers => Ok(slides),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    fn object(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(object) => object,
            _ => unreachable!(),
        }
    }

    #[test]
    fn windows_are_those_of_the_layers_that_slide() {
        let base = json!({"num_hidden_layers": 3, "sliding_window": 8});
        let with = |more: Value| {
            let mut keys = object(base.clone());
            keys.extend(object(more));
            keys
        };
        let all = of_all_layers(&Keys(&with(json!({})))).unwrap();
        assert_eq!(all, [Some(8); 3]);
        let none = of_all_layers(&Keys(&with(json!({"sliding_window": null})))).unwrap();
        assert_eq!(none, [None; 3]);
        let off = with(json!({"use_sliding_window": false, "max_window_layers": 0}));
        assert_eq!(of_upper_layers(&Keys(&off)).unwrap(), []);
        let upper = with(json!({"use_sliding_window": true, "max_window_layers": 2}));
        let upper = of_upper_layers(&Keys(&upper)).unwrap();
        assert_eq!(upper, [None, None, Some(8)]);
        // As in transformers, a list of types decides alone.
        let listed = with(json!({"use_sliding_window": true, "max_window_layers": 2,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"]}));
        let listed = of_upper_layers(&Keys(&listed)).unwrap();
        assert_eq!(listed, [Some(8), None, None]);
        for types in [
            json!(["sliding_attention"]),
            json!(["full_attention", "full_attention", "chunked_attention"]),
            json!("full_attention"),
        ] {
            let keys = with(json!({"layer_types": types, "use_sliding_window": true}));
            let error = of_upper_layers(&Keys(&keys)).unwrap_err().to_string();
            assert!(error.contains("layer_types"), "{error}");
        }
    }
}
