//! What is written from the table of keys: `docs/configuration.md` and `configs/all-keys.toml`.
//!
//! A test compares the files with the table. `LORA_UPDATE_CONFIGURATION=1 cargo xtask test table_of_keys`
//! writes them again.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::keys::{EXCLUSIVE, Key, Library, keys};
use super::{Config, ConfigError, axolotl, preset};

/// The width of the files, in characters.
const WIDTH: usize = 100;

const PAGE: &str = "\
# Configuration keys

A configuration is a TOML or JSON file of these keys, or a YAML file of axolotl. `base_model` and
`dataset_path` are required. `\"none\"` turns an optional key off. `--set KEY=VALUE` overrides a key.

[configs/all-keys.toml](../configs/all-keys.toml) has every key with its default.
[Training](training.md) and [data](data.md) explain what the keys do together.

*Elsewhere* gives the name of the key in PEFT, transformers, TRL, FinLoRA and axolotl. *Presets*
gives the value of the key if a file of FinLoRA or axolotl leaves it out.

This page is written from the table in `crates/run-config/src/keys.rs`.
";

const EXAMPLE: &str = "\
# cargo xtask train --config configs/all-keys.toml
#
# Every key with its default. base_model and dataset_path, which have none, are the small model and
# data set in the program. Your own configuration needs only the keys that differ.
# docs/configuration.md has the names of the keys in PEFT, transformers, TRL, FinLoRA and axolotl.
#
# Written from the table in crates/run-config/src/keys.rs.
";

/// Sections of the documentation that explain a key further.
const FURTHER: [(&str, &str, &str); 19] = [
    ("base_model", "hub.md", "the Hub"),
    ("dataset_path", "data.md", "data"),
    ("dataset_format", "data.md#formats", "formats"),
    (
        "dataset_columns",
        "data.md#other-column-names",
        "other column names",
    ),
    (
        "prompt_template",
        "data.md#prompt-templates",
        "prompt templates",
    ),
    ("peft_type", "adapters.md#vera", "VeRA"),
    ("peft_use_dora", "adapters.md#dora", "DoRA"),
    (
        "init_lora_weights",
        "adapters.md#pissa-and-olora",
        "PiSSA and OLoRA",
    ),
    (
        "loraplus_lr_ratio",
        "adapters.md#a-learning-rate-for-b",
        "LoRA+",
    ),
    (
        "trainable_token_indices",
        "adapters.md#trainable-tokens",
        "trainable tokens",
    ),
    (
        "bias",
        "adapters.md#biases-and-whole-modules",
        "biases and whole modules",
    ),
    (
        "lora_bias",
        "adapters.md#biases-and-whole-modules",
        "biases and whole modules",
    ),
    (
        "modules_to_save",
        "adapters.md#biases-and-whole-modules",
        "biases and whole modules",
    ),
    (
        "init_adapter",
        "adapters.md#continue-training",
        "continue training",
    ),
    (
        "compute_dtype",
        "hardware.md#number-formats",
        "number formats",
    ),
    (
        "batch_size",
        "training.md#memory-and-batches",
        "memory and batches",
    ),
    (
        "share_prefixes",
        "training.md#memory-and-batches",
        "memory and batches",
    ),
    (
        "merge_micro_batches",
        "training.md#memory-and-batches",
        "memory and batches",
    ),
    (
        "check_every",
        "hardware.md#the-check-before-a-run",
        "the check before a run",
    ),
];

/// Where a key is explained further.
fn further(key: &Key) -> Option<String> {
    let found = FURTHER.iter().find(|(name, ..)| *name == key.name);
    found.map(|(_, page, title)| format!("See [{title}]({page})."))
}

/// The keys of a configuration that sets only what it must, with the names of these.
fn defaults() -> (Table, Vec<String>) {
    let ConfigError::Invalid(problems) = Config::parse("", None, None, &[]).unwrap_err() else {
        panic!("an empty configuration has missing keys")
    };
    let required: Vec<String> = problems.0.into_iter().map(|problem| problem.key).collect();
    let least: String = required
        .iter()
        .map(|key| format!("{key} = \"embedded\"\n"))
        .collect();
    let config = Config::parse(&least, Some(Path::new("all-keys.toml")), None, &[]).unwrap();
    (config.to_toml().parse().unwrap(), required)
}

/// A value as a person would write it.
fn written(value: &Value) -> String {
    match value {
        Value::Float(number) if number.fract() == 0.0 => format!("{number:.1}"),
        Value::Float(number) if *number < 0.001 => format!("{number:e}"),
        value => value.to_string(),
    }
}

/// The sentences of a key, on one line.
fn sentences(key: &Key) -> String {
    let lines = key.documentation.lines().map(str::trim);
    lines.collect::<Vec<_>>().join(" ")
}

/// Breaks a text into lines that begin with `prefix`.
fn wrapped(text: &str, prefix: &str) -> String {
    let mut lines = vec![String::from(prefix)];
    for word in text.split(' ') {
        let line = lines.last().unwrap();
        let is_new = line.len() == prefix.len();
        if !is_new && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(String::from(prefix));
        }
        let line = lines.last_mut().unwrap();
        if line.len() > prefix.len() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.join("\n") + "\n"
}

/// The name of a key in each library and program that has it.
fn elsewhere(key: &Key) -> Option<String> {
    let libraries = [
        (Library::Peft, "PEFT"),
        (Library::Transformers, "transformers"),
        (Library::Trl, "TRL"),
    ];
    let mut names = Vec::new();
    for (library, title) in libraries {
        let known = key.elsewhere.iter().filter(|(of, _)| *of == library);
        let known: Vec<String> = known.map(|(_, name)| format!("`{name}`")).collect();
        if !known.is_empty() {
            names.push(format!("{title} {}", known.join(", ")));
        }
    }
    if preset::FINLORA_KEYS.contains(&key.name) {
        names.push(format!("FinLoRA `{}`", key.name));
    }
    names.extend(axolotl::name_of(key.name).map(|name| format!("axolotl `{name}`")));
    (!names.is_empty()).then(|| format!("Elsewhere: {}.", names.join("; ")))
}

/// The values of a key in the presets.
fn presets(key: &Key) -> Option<String> {
    let presets = [
        ("finlora", preset::finlora()),
        ("axolotl", preset::axolotl()),
    ];
    let values = presets.into_iter().filter_map(|(name, values)| {
        let (_, value) = values.into_iter().find(|(of, _)| *of == key.name)?;
        Some(format!("`{name}` `{value}`"))
    });
    let values: Vec<String> = values.collect();
    (!values.is_empty()).then(|| format!("Presets: {}.", values.join(", ")))
}

/// The key that excludes this one.
fn exclusive(key: &Key) -> Option<String> {
    let found = EXCLUSIVE.iter().find(|(a, b)| [*a, *b].contains(&key.name));
    found.map(|(a, b)| {
        format!(
            "Only one of `{a}` and `{b}` may be set. A key given with `--set` replaces the other one."
        )
    })
}

fn page() -> String {
    let (defaults, required) = defaults();
    let mut text = String::from(PAGE);
    let mut section = "";
    for key in keys() {
        if key.section != section {
            section = key.section;
            text += &format!("\n## {section}\n");
        }
        text += &format!("\n### `{}`\n\n", key.name);
        text += &wrapped(&sentences(&key), "");
        let default = if required.contains(&key.name.to_string()) {
            "Required.".into()
        } else {
            let default = written(&defaults[key.name]);
            // The name of the file that has the defaults is not a default.
            format!("Default: `{}`.", default.replace("all-keys", "NAME"))
        };
        text += "\n";
        text += &wrapped(&format!("{default} Values: {}.", key.allowed), "");
        for more in [
            exclusive(&key),
            elsewhere(&key),
            presets(&key),
            further(&key),
        ]
        .into_iter()
        .flatten()
        {
            text += "\n";
            text += &wrapped(&more, "");
        }
    }
    text += &format!(
        "\n## Presets\n\n### `preset`\n\n{}",
        wrapped(preset::DOCUMENTATION, "")
    );
    text
}

fn example() -> String {
    let (defaults, _) = defaults();
    let mut text = String::from(EXAMPLE);
    let mut section = "";
    for key in keys() {
        if key.section != section {
            section = key.section;
            text += &format!("\n# ----- {section} -----\n");
        }
        text += "\n";
        text += &wrapped(&sentences(&key).replace('`', ""), "# ");
        text += &wrapped(&format!("Values: {}.", key.allowed), "# ");
        text.extend(exclusive(&key).map(|only| wrapped(&only.replace('`', ""), "# ")));
        text += &format!("{} = {}\n", key.name, written(&defaults[key.name]));
    }
    text += "\n";
    text += &wrapped(&preset::DOCUMENTATION.replace('`', ""), "# ");
    text += "preset = \"none\"\n";
    text
}

fn compare(path: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path);
    if std::env::var_os("LORA_UPDATE_CONFIGURATION").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let differ = committed.lines().zip(text.lines()).find(|(a, b)| a != b);
    assert!(
        committed == text,
        "{} is not what the table of keys says, first in {differ:?}; \
         LORA_UPDATE_CONFIGURATION=1 cargo xtask test table_of_keys writes it again",
        path.display()
    );
}

#[test]
fn the_documentation_is_that_of_the_table_of_keys() {
    compare("docs/configuration.md", &page());
}

#[test]
fn the_commented_example_is_that_of_the_table_of_keys_and_has_the_defaults() {
    let example = example();
    compare("configs/all-keys.toml", &example);
    let parse =
        |text: &str| Config::parse(text, Some(Path::new("all-keys.toml")), None, &[]).unwrap();
    let least = "base_model = \"embedded\"\ndataset_path = \"embedded\"";
    assert_eq!(parse(&example), parse(least));
}

#[test]
fn lines_are_wrapped_and_a_key_without_meaning_is_noticed() {
    let long = wrapped("word ".repeat(50).trim_end(), "# ");
    assert!(
        long.lines().count() == 3 && long.lines().all(|line| line.len() <= WIDTH),
        "{long}"
    );
    for key in keys() {
        let text = sentences(&key);
        assert!(
            text.len() > 10 && text.ends_with('.'),
            "{}: {text:?}",
            key.name
        );
        assert!(
            !key.samples.is_empty() && !key.allowed.is_empty(),
            "{}",
            key.name
        );
    }
}

#[test]
fn the_sections_that_explain_keys_further_exist() {
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    for (key, link, _) in FURTHER {
        assert!(keys().iter().any(|known| known.name == key), "{key}");
        let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
        let text = std::fs::read_to_string(docs.join(file)).unwrap();
        let headings = text.lines().filter(|line| line.starts_with("## "));
        let mut anchors = headings.map(|line| line[3..].to_lowercase().replace(' ', "-"));
        assert!(
            anchor.is_empty() || anchors.any(|known| known == anchor),
            "{link}"
        );
    }
}
