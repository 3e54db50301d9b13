//! The kinds of PEFT's keys.

use lora_core::{ExcludeModules, Init, LoraConfig, LoraError, Method, TargetModules};
use toml::Value as Toml;

use super::{Kind, LARGEST_COUNT, Parsed, Value, must_be, nearest};
use super::{none_if_empty, positive, whole, whole_number};
use crate::error::shown;

/// `init_lora_weights`. PEFT writes `true` for its default, Kaiming-uniform.
pub(in super::super) fn initialization() -> Kind<Init> {
    let allowed = "\"kaiming\" (or true), \"gaussian\", \"pissa\", \"pissa_niter_N\" with a number of iterations, as in \
        \"pissa_niter_16\", or \"olora\"";
    let parse = |value: &Value| match value {
        Value::Bool(true) => Some(Init::Kaiming),
        Value::String(name) => Init::from_name(name),
        _ => None,
    };
    let names = ["kaiming", "gaussian", "pissa", "pissa_niter_16", "olora"].map(Toml::from);
    let samples = names.into_iter().chain([Toml::from(true)]);
    Kind::simple(allowed, parse, |init: &Init| init.to_string().into()).with_samples(samples)
}

/// `peft_type`, in letters of any case.
pub(in super::super) fn peft_type() -> Kind<Method> {
    let allowed = "\"lora\" or \"vera\"";
    let parse = |value: &Value| match value {
        Value::String(name) => Method::of_peft_type(name),
        _ => None,
    };
    let name = |method: &Method| method.facts().peft_type.to_lowercase();
    let samples = ["lora", "vera", "VERA"].map(Toml::from);
    Kind::simple(allowed, parse, move |method: &Method| name(method).into()).with_samples(samples)
}

/// `target_modules`, as in PEFT: a list of names, `all-linear`, or one expression for the whole module name.
pub(in super::super) fn target_modules() -> Kind<TargetModules> {
    let write = |targets: &TargetModules| match targets {
        TargetModules::Names(names) => names.clone().into(),
        TargetModules::Regex(pattern) => pattern.clone().into(),
        TargetModules::AllLinear => "all-linear".into(),
    };
    Kind::new(TARGETS, targets, write).with_samples([
        Toml::from("all-linear"),
        Toml::from(vec!["q_proj"]),
        Toml::from(vec!["self_attn.k_proj", "down_proj"]),
        Toml::from(r".*\.layers\.[0-3]\..*_proj"),
    ])
}

const TARGETS: &str = "a list of module names such as [\"q_proj\", \"v_proj\"], \"all-linear\", or one \
    regular expression that matches whole module names";

fn targets(value: &Value) -> Parsed<TargetModules> {
    let right = || must_be(TARGETS);
    match value {
        Value::String(word) if word == "all-linear" => Ok(TargetModules::AllLinear),
        // A module's full name has dots (model.layers.0.self_attn.q_proj) and no commas; a plain word or
        // several with commas would be an expression that matches nothing.
        Value::String(text)
            if text
                .chars()
                .all(|c| c.is_alphanumeric() || "_-, ".contains(c)) =>
        {
            let names: Vec<String> = text
                .split([',', ' '])
                .filter(|name| !name.is_empty())
                .map(|name| format!("{name:?}"))
                .collect();
            if names.is_empty() {
                Err(right())
            } else {
                Err(format!(
                    "is read as a regular expression for the whole module name and matches none; for names \
                 write [{}]",
                    shown(&names.join(", "))
                ))
            }
        }
        Value::String(pattern) => {
            let targets = TargetModules::Regex(pattern.clone());
            let config = LoraConfig {
                target_modules: targets.clone(),
                ..LoraConfig::default()
            };
            match config.selector() {
                Ok(_) => Ok(targets),
                Err(LoraError::InvalidPattern { reason, .. }) => {
                    // The engine marks the place over several lines; its last line is the message.
                    let reason = reason.lines().last().unwrap_or_default();
                    let reason = reason.trim_start_matches("error: ");
                    Err(format!("is not a valid regular expression: {reason}"))
                }
                Err(other) => Err(other.to_string()),
            }
        }
        Value::List(items) if !items.is_empty() => items
            .iter()
            .map(module_name)
            .collect::<Parsed<_>>()
            .map(TargetModules::Names),
        _ => Err(right()),
    }
}

/// `exclude_modules`: as `target_modules`, without `all-linear`.
pub(in super::super) fn exclude_modules() -> Kind<Option<ExcludeModules>> {
    const ALLOWED: &str = "a list of module names or a regular expression";
    let parse = |value: &Value| match targets(value)? {
        TargetModules::Names(names) => Ok(ExcludeModules::Names(names)),
        TargetModules::Regex(pattern) => Ok(ExcludeModules::Regex(pattern)),
        TargetModules::AllLinear => Err(must_be(ALLOWED)),
    };
    let write = |modules: &ExcludeModules| match modules {
        ExcludeModules::Names(names) => names.clone().into(),
        ExcludeModules::Regex(pattern) => pattern.clone().into(),
    };
    let samples = [Toml::from(vec!["k_proj"]), Toml::from(".*k_proj")];
    super::optional(Kind::new(ALLOWED, parse, write).with_samples(samples))
}

/// `layers_to_transform`: a list of layer numbers, or one number.
pub(in super::super) fn layers() -> Kind<Option<Vec<usize>>> {
    let allowed = "a list of layer numbers, counted from 0, as in [0, 1, 2]";
    let parse = |value: &Value| match value {
        Value::Integer(_) => count(value).map(|layer| vec![layer]),
        Value::List(items) if !items.is_empty() => items.iter().map(count).collect(),
        _ => None,
    };
    let layers = Kind::simple(allowed, parse, |layers: &Vec<usize>| list(layers));
    super::optional(layers.with_samples([list(&[0, 5])]))
}

/// A whole number, as an item of a list.
fn count(value: &Value) -> Option<usize> {
    whole_number(value, 0, LARGEST_COUNT).ok()
}

fn list(numbers: &[usize]) -> Toml {
    let numbers = numbers.iter().map(|number| Toml::from(*number as i64));
    Toml::Array(numbers.collect())
}

/// `trainable_token_indices`: a list of tokens of the embedding, or lists by the names of the matrices.
pub(in super::super) fn trained_tokens() -> Kind<Vec<(String, Vec<usize>)>> {
    let allowed = "a list of token ids, as in [128011, 128012], or lists by the names embed_tokens and lm_head";
    let tokens = |value: &Value| match value {
        Value::List(items) if !items.is_empty() => items.iter().map(count).collect(),
        _ => None,
    };
    let parse = move |value: &Value| match value {
        Value::Table(entries) => entries
            .iter()
            .map(|entry| match entry.key.as_str() {
                name @ ("embed_tokens" | "lm_head") => Some((name.into(), tokens(&entry.value)?)),
                _ => None,
            })
            .collect(),
        list => Some(vec![("embed_tokens".to_string(), tokens(list)?)]),
    };
    let write = |tokens: &Vec<(String, Vec<usize>)>| table(tokens, |tokens| list(tokens));
    let samples = [
        list(&[7, 3]),
        table(&[("lm_head".into(), list(&[5]))], Toml::clone),
    ];
    none_if_empty(Kind::simple(allowed, parse, write).with_samples(samples))
}

/// `modules_to_save`: ends of modules' names. Which there are depends on the model.
pub(in super::super) fn saved_modules() -> Kind<Vec<String>> {
    let allowed = "a list of module names, as in [\"embed_tokens\", \"lm_head\"]";
    let name = |value: &Value| match value {
        Value::String(name) if !name.is_empty() => Some(name.clone()),
        _ => None,
    };
    let parse = move |value: &Value| match value {
        Value::List(items) if !items.is_empty() => items.iter().map(name).collect(),
        _ => None,
    };
    let samples = [vec!["embed_tokens", "lm_head"], vec!["norm"]].map(Toml::from);
    none_if_empty(
        Kind::simple(allowed, parse, |names: &Vec<String>| names.clone().into())
            .with_samples(samples),
    )
}

/// `rank_pattern`.
pub(in super::super) fn rank_pattern() -> Kind<Vec<(String, usize)>> {
    pattern(whole(1), |rank_pattern| LoraConfig {
        rank_pattern,
        ..LoraConfig::default()
    })
}

/// `alpha_pattern`.
pub(in super::super) fn alpha_pattern() -> Kind<Vec<(String, f64)>> {
    pattern(positive(), |alpha_pattern| LoraConfig {
        alpha_pattern,
        ..LoraConfig::default()
    })
}

/// A table from expressions for the end of a module's name to values, in the order of the file. `config` puts the
/// table into an adapter's configuration, which checks the expressions.
fn pattern<T: Clone + 'static>(
    of: Kind<T>,
    config: impl Fn(Vec<(String, T)>) -> LoraConfig + 'static,
) -> Kind<Vec<(String, T)>> {
    const ALLOWED: &str = "a table from module names to numbers, as in { q_proj = 16, v_proj = 4 }";
    let of = std::rc::Rc::new(of);
    let samples = of.samples.iter().take(1);
    let samples: Vec<Toml> = samples
        .map(|value| table(&[("v_proj".into(), value.clone())], Toml::clone))
        .collect();
    let written = of.clone();
    let parse = move |value: &Value| {
        let Value::Table(entries) = value else {
            return Err(must_be(ALLOWED));
        };
        let parsed = entries.iter().map(|entry| match of.parse(&entry.value) {
            Ok(value) => Ok((entry.key.clone(), value)),
            Err(right) => Err(format!(
                "{:?} {right}; it is {}",
                shown(&entry.key),
                shown(&entry.value.to_string())
            )),
        });
        let pattern = parsed.collect::<Parsed<Vec<(String, T)>>>()?;
        let config = config(pattern.clone());
        config.selector().map_err(|error| error.to_string())?;
        Ok(pattern)
    };
    let write = move |pattern: &Vec<(String, T)>| table(pattern, |value| written.write(value));
    none_if_empty(Kind::new(ALLOWED, parse, write).with_samples(samples))
}

fn table<T>(entries: &[(String, T)], write: impl Fn(&T) -> Toml) -> Toml {
    let entries = entries.iter();
    Toml::Table(
        entries
            .map(|(name, value)| (name.clone(), write(value)))
            .collect(),
    )
}

/// One of the model's linear modules, perhaps with a part of the path before it.
fn module_name(value: &Value) -> Parsed<String> {
    let Value::String(name) = value else {
        return Err(format!(
            "must be a list of module names; {} is not one",
            shown(&value.to_string())
        ));
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    let modules = llama_burn::linear_names();
    if modules.contains(&last) || name == "lm_head" {
        return Ok(name.clone());
    }
    let nearest = nearest(last, modules.into_iter());
    let name = shown(name);
    Err(match nearest {
        Some(known) => {
            format!("{name:?} is not a linear module of a decoder layer; did you mean {known:?}?")
        }
        None => format!(
            "{name:?} is not a linear module of a decoder layer; these are {}",
            modules.join(", ")
        ),
    })
}
