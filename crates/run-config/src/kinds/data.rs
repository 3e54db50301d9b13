//! The kinds of the keys of the data.

use data::{Columns, Format, PromptTemplate};
use toml::Value as Toml;

use super::{Kind, Parsed, Value, float, must_be, nearest, optional};
use crate::error::shown;

/// `val_set_size`: a fraction of the examples, or a number of them.
pub(in super::super) fn val_set_size() -> Kind<f64> {
    let allowed = "a fraction of the examples (at least 0, below 1) or a whole number of examples";
    let valid = |x: &f64| (0.0..1.0).contains(x) || (*x >= 1.0 && x.fract() == 0.0);
    let parse = move |value: &Value| float(value).filter(valid);
    // A number of examples is written as an integer.
    let write = |size: &f64| match *size {
        count if (1.0..9.0e15).contains(&count) => Toml::from(count as i64),
        size => Toml::from(size),
    };
    let samples = [
        Toml::from(0.0_f64),
        Toml::from(0.05_f64),
        Toml::from(100_i64),
    ];
    Kind::simple(allowed, parse, write).with_samples(samples)
}

/// `dataset_format`: `auto`, or the name of a format.
pub(in super::super) fn dataset_format() -> Kind<Option<Format>> {
    let names = Format::ALL.map(|format| format!("{:?}", format.name()));
    let allowed = format!("\"auto\", {}", names.join(", "));
    let parse = |value: &Value| match value {
        Value::String(name) if name == "auto" => Some(None),
        Value::String(name) => Format::ALL
            .into_iter()
            .find(|format| format.name() == name)
            .map(Some),
        _ => None,
    };
    let write = |format: &Option<Format>| format.map_or("auto", Format::name).into();
    let samples = Format::ALL.map(Format::name).into_iter().chain(["auto"]);
    Kind::simple(allowed, parse, write).with_samples(samples)
}

/// `dataset_columns`: a table from a format's columns to the file's.
pub(in super::super) fn dataset_columns() -> Kind<Columns> {
    const ALLOWED: &str = "a table from the columns of a format to those of the file, as in { instruction = \"question\" }";
    let write = |columns: &Columns| {
        let entries = columns.0.iter();
        Toml::Table(
            entries
                .map(|(ours, theirs)| (ours.clone(), theirs.clone().into()))
                .collect(),
        )
    };
    let sample: toml::Table = [("instruction".to_string(), Toml::from("question"))]
        .into_iter()
        .collect();
    let table = Kind::new(ALLOWED, |value| columns(value, ALLOWED), write).with_samples([sample]);
    optional(table).map(Option::unwrap_or_default, |columns| {
        Some(columns.clone()).filter(|columns| !columns.0.is_empty())
    })
}

fn columns(value: &Value, allowed: &str) -> Parsed<Columns> {
    let right = must_be(allowed);
    let Value::Table(entries) = value else {
        return Err(right);
    };
    let mut columns: Vec<(String, String)> = Vec::new();
    for entry in entries {
        let known = Format::ALL.iter().flat_map(|format| format.keys());
        if !known.clone().any(|key| *key == entry.key) {
            let nearest = nearest(&entry.key, known.copied());
            let hint = nearest.map_or(String::new(), |name| format!("; did you mean {name:?}?"));
            return Err(format!(
                "{right}; no format has a column {:?}{hint}",
                shown(&entry.key)
            ));
        }
        match &entry.value {
            Value::String(name) if columns.iter().any(|(_, other)| other == name) => {
                return Err(format!(
                    "names the column {:?} of the file twice",
                    shown(name)
                ));
            }
            Value::String(name) => columns.push((entry.key.clone(), name.clone())),
            other => {
                let other = other.to_string();
                return Err(format!(
                    "{right}; {:?} is {}",
                    shown(&entry.key),
                    shown(&other)
                ));
            }
        }
    }
    Ok(Columns(columns))
}

/// `prompt_template`.
pub(in super::super) fn prompt_template() -> Kind<PromptTemplate> {
    let parse = |value: &Value| match value {
        Value::String(text) => PromptTemplate::parse(text),
        _ => PromptTemplate::parse(""),
    };
    let samples = ["raw", "inst", "chat", "custom:a \"b\"\n{context}\\"];
    Kind::new(
        PromptTemplate::ALLOWED,
        parse,
        |template: &PromptTemplate| template.to_string().into(),
    )
    .with_samples(samples)
}
