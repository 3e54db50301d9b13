//! The base model that adapters name.

use std::path::{Path, PathBuf};

use crate::eval::EvalError;
use crate::eval::named::NamedAdapter;
use peft::read_adapter_config;
use run_config::EMBEDDED;

/// Reads `base_model_name_or_path` of each adapter's folder (`folders`, in the order of
/// `adapters`).
///
/// # Errors
///
/// An adapter whose configuration cannot be read, with its folder.
pub fn stated(
    adapters: &[NamedAdapter],
    folders: &[PathBuf],
) -> Result<Vec<Option<String>>, EvalError> {
    let stated = adapters.iter().zip(folders).map(|(adapter, folder)| {
        let config = read_adapter_config(folder).map_err(|source| EvalError::AdapterConfig {
            name: adapter.name.clone(),
            folder: folder.clone(),
            source: Box::new(source),
        })?;
        Ok(config.base_model_name_or_path)
    });
    stated.collect()
}

/// The model to load: `asked`, unless that is the embedded model (the default of `--model`) and the
/// adapters name another one.
///
/// # Errors
///
/// Adapters that name different models.
pub fn choose(
    asked: &str,
    adapters: &[NamedAdapter],
    stated: &[Option<String>],
) -> Result<String, EvalError> {
    if asked != EMBEDDED {
        return Ok(asked.into());
    }
    let mut named = adapters
        .iter()
        .zip(stated)
        .filter_map(|(adapter, base)| Some((adapter, base.as_deref()?)));
    let Some((first, base)) = named.next() else {
        return Ok(asked.into());
    };
    match named.find(|(_, other)| !is_same(base, other)) {
        Some((second, other)) => Err(EvalError::TwoBaseModels {
            first: (first.name.clone(), base.into()),
            second: (second.name.clone(), other.into()),
        }),
        None => Ok(base.into()),
    }
}

/// Notes to the user about adapters that name another base model than `model`.
pub fn notes(model: &str, adapters: &[NamedAdapter], stated: &[Option<String>]) -> Vec<String> {
    let all = adapters.iter().zip(stated);
    let other = all.filter_map(|(adapter, base)| {
        let base = base.as_deref().filter(|base| !is_same(model, base))?;
        Some(format!(
            "{} names {base:?} as its base model (adapter_config.json); it is evaluated on {model:?}",
            adapter.name
        ))
    });
    other.collect()
}

/// Whether two names mean one model: the same text, the same folder, or the same last part, because
/// a model has another path on another machine.
fn is_same(a: &str, b: &str) -> bool {
    let last = |text: &str| {
        let name = Path::new(text).file_name();
        let name = name.map(|name| name.to_string_lossy().to_lowercase());
        name.map(|name| name.split('@').next().unwrap_or_default().to_string())
    };
    let place = |text: &str| std::fs::canonicalize(text).ok();
    a == b || (place(a).is_some() && place(a) == place(b)) || last(a) == last(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapters(names: &[&str]) -> Vec<NamedAdapter> {
        let adapter = |name: &&str| NamedAdapter {
            name: name.to_string(),
            folder: name.into(),
        };
        names.iter().map(adapter).collect()
    }

    fn bases(names: &[&str]) -> Vec<Option<String>> {
        names.iter().map(|name| Some(name.to_string())).collect()
    }

    #[test]
    fn the_adapters_base_is_taken_where_no_model_was_given() {
        let two = adapters(&["a", "b"]);
        let same = bases(&["org/Model", "/models/model"]);
        assert_eq!(choose(EMBEDDED, &two, &same).unwrap(), "org/Model");
        assert_eq!(choose("here", &two, &same).unwrap(), "here");
        assert_eq!(choose(EMBEDDED, &two, &[None, None]).unwrap(), EMBEDDED);
        let unlike = bases(&["org/one", "org/two"]);
        let error = choose(EMBEDDED, &two, &unlike).unwrap_err().to_string();
        for part in [
            "a was trained on \"org/one\"",
            "b on \"org/two\"",
            "--model",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn an_adapter_of_another_base_is_told() {
        let two = adapters(&["a", "b"]);
        let notes = notes("x/one", &two, &bases(&["y/one@main", "org/two"]));
        assert_eq!(notes.len(), 1);
        assert!(notes[0].starts_with("b names") && notes[0].contains("org/two"));
    }
}
