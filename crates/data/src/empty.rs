//! Values of a file that count as absent.

use serde_json::Value;

/// Whether a value is absent, null, an empty text or an empty list.
pub(super) fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(_) => false,
    }
}

/// Whether a value is [empty](is_empty), false, or an empty object.
pub(super) fn is_off(value: Option<&Value>) -> bool {
    match value {
        Some(Value::Bool(on)) => !on,
        Some(Value::Object(object)) => object.is_empty(),
        value => is_empty(value),
    }
}

/// Whether a value is [empty](is_empty) or an empty object, also if it is JSON text, as in a table.
pub(super) fn is_blank(value: Option<&Value>) -> bool {
    match value {
        Some(Value::String(text)) => matches!(text.trim(), "" | "[]" | "{}" | "null"),
        Some(Value::Object(object)) => object.is_empty(),
        value => is_empty(value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_kind_of_absence_has_its_values() {
        // is_empty, is_off, is_blank
        for (value, expected) in [
            (json!(null), [true, true, true]),
            (json!(""), [true, true, true]),
            (json!([]), [true, true, true]),
            (json!({}), [false, true, true]),
            (json!(false), [false, true, false]),
            (json!(" [] "), [false, false, true]),
            (json!(0), [false, false, false]),
            (json!("a"), [false, false, false]),
            (json!([null]), [false, false, false]),
        ] {
            let found = [is_empty, is_off, is_blank].map(|is| is(Some(&value)));
            assert_eq!(found, expected, "{value}");
        }
        assert!(is_empty(None) && is_off(None) && is_blank(None));
    }
}
