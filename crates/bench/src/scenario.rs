//! The scenarios: model, examples, adapters, batch.

use std::path::{Path, PathBuf};

use lora_core::{LoraConfig, TargetModules};

use super::contenders::{self, Entrant};
use super::error::BenchError;
use super::options::BenchOptions;

/// The names that `--only` accepts.
pub(super) const NAMES: [&str; 8] = [
    "floors",
    "main",
    "all-linear",
    "r64",
    "long",
    "accumulation",
    "scaling",
    "8b",
];

/// Example lengths of the scaling scenario.
const LENGTHS: [usize; 7] = [64, 128, 256, 512, 1024, 2048, 4096];

/// Tokens per example when models are compared with each other, and examples per step.
const MODEL_ROWS: (usize, usize) = (128, 4);

/// The title of the 1B shape in the scaling scenario.
pub(super) const ONE_BILLION: &str = "Llama 3.2 1B's shape, random weights";

/// The source of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Model {
    /// `--model`, or the embedded one with `--quick`.
    Given,
    /// The embedded model.
    Embedded,
    /// A folder.
    Folder(PathBuf),
    /// A shape (`config.json`) with random weights.
    Random(&'static str),
}

/// The source of the examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// `--data`.
    Data,
    /// Examples of `--data`, concatenated.
    Long {
        /// Tokens per example.
        tokens: usize,
    },
    /// Random tokens.
    Random {
        /// Tokens per example.
        tokens: usize,
    },
}

/// One comparison.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scenario {
    /// One of [`NAMES`].
    pub name: &'static str,
    /// Its title, which distinguishes it from others of the name.
    pub title: String,
    pub model: Model,
    pub rows: Rows,
    pub lora: LoraConfig,
    pub batch_size: usize,
    pub accumulation: usize,
    pub entrants: Vec<Entrant>,
    /// Steps per round, if they differ from the options.
    pub steps: Option<usize>,
}

/// The scenarios that `options` select.
///
/// # Errors
///
/// An unknown name, with the known ones.
pub(super) fn asked_for(options: &BenchOptions) -> Result<Vec<Scenario>, BenchError> {
    let known = |flag, what, words: &[String], names: &[&str]| match words
        .iter()
        .find(|word| !names.contains(&word.as_str()))
    {
        None => Ok(()),
        Some(word) => Err(BenchError::Unknown {
            flag,
            what,
            word: word.clone(),
            known: names.iter().map(|name| name.to_string()).collect(),
        }),
    };
    let ids: Vec<&str> = contenders::all().iter().map(|entrant| entrant.id).collect();
    known("only", "scenario", &options.only, &NAMES)?;
    known("contenders", "contender", &options.contenders, &ids)?;
    let wanted = |name: &str| match (options.only.is_empty(), options.all) {
        (false, _) => options.only.iter().any(|only| only == name),
        (true, true) => name != "8b",
        (true, false) => name == "main",
    };
    let mut scenarios = everything();
    scenarios.retain(|scenario| wanted(scenario.name));
    for scenario in &mut scenarios {
        let named = |id: &str| options.contenders.iter().any(|word| word == id);
        scenario
            .entrants
            .retain(|entrant| options.contenders.is_empty() || named(entrant.id));
    }
    Ok(scenarios)
}

/// Every scenario with every contender that it compares.
fn everything() -> Vec<Scenario> {
    let main = Scenario {
        name: "main",
        title: "r 8, q, k and v, 8 examples per step".into(),
        model: Model::Given,
        rows: Rows::Data,
        lora: LoraConfig::default(),
        batch_size: 8,
        accumulation: 1,
        entrants: entrants(|entrant| entrant.id != "peft-int8"),
        steps: None,
    };
    let against_peft = |ids: &[&str]| {
        entrants(|entrant| {
            let fixed = ["ours", "ours-bf16", "ours-dense", "peft-f32", "peft-bf16"];
            fixed.contains(&entrant.id) || ids.contains(&entrant.id)
        })
    };
    let grouped = ["peft-f32-grouped", "peft-bf16-grouped"];
    let mut all = vec![
        Scenario {
            name: "all-linear",
            title: "r 8, all linear modules, 8 examples per step".into(),
            lora: LoraConfig {
                target_modules: TargetModules::AllLinear,
                ..LoraConfig::default()
            },
            entrants: against_peft(&grouped),
            ..main.clone()
        },
        Scenario {
            name: "r64",
            title: "r 64, q, k and v, 8 examples per step".into(),
            lora: LoraConfig {
                r: 64,
                lora_alpha: 128.0,
                ..LoraConfig::default()
            },
            entrants: against_peft(&grouped),
            ..main.clone()
        },
        Scenario {
            name: "long",
            title: "examples of 2,048 tokens, 1 per step".into(),
            rows: Rows::Long { tokens: 2048 },
            batch_size: 1,
            // One example per batch cannot be grouped.
            entrants: against_peft(&[]),
            steps: Some(1),
            ..main.clone()
        },
        Scenario {
            name: "accumulation",
            title: "4 micro-batches of 2 examples per step".into(),
            batch_size: 2,
            accumulation: 4,
            entrants: against_peft(&grouped),
            ..main.clone()
        },
    ];
    all.extend(scaling(&main));
    all.extend([512, 2048].map(|tokens| Scenario {
        name: "8b",
        title: format!("Llama 3.1 8B's shape, random weights, {tokens} tokens, 1 example per step"),
        model: Model::Random(include_str!("shapes/llama-3.1-8b.json")),
        rows: Rows::Random { tokens },
        batch_size: 1,
        entrants: entrants(|entrant| ["ours-bf16", "peft-bf16", "peft-int8"].contains(&entrant.id)),
        ..main.clone()
    }));
    all.insert(0, main);
    all
}

/// This trainer alone over example lengths, then over models.
fn scaling(main: &Scenario) -> Vec<Scenario> {
    let alone = Scenario {
        name: "scaling",
        entrants: entrants(|entrant| entrant.id == "ours"),
        ..main.clone()
    };
    let lengths = LENGTHS.map(|tokens| Scenario {
        title: format!("{tokens} tokens per example"),
        rows: Rows::Random { tokens },
        batch_size: 1,
        steps: Some((1024 / tokens).clamp(1, 8)),
        ..alone.clone()
    });
    let (tokens, batch_size) = MODEL_ROWS;
    let mut models = vec![
        ("embedded", Model::Embedded),
        ("the model given", Model::Given),
        (
            ONE_BILLION,
            Model::Random(include_str!("shapes/llama-3.2-1b.json")),
        ),
    ];
    if let Some(folder) = stories260k() {
        models.insert(0, ("stories260k", Model::Folder(folder)));
    }
    let models = models.into_iter().map(|(title, model)| Scenario {
        title: title.into(),
        model,
        rows: Rows::Random { tokens },
        batch_size,
        steps: Some(1),
        ..alone.clone()
    });
    lengths.into_iter().chain(models).collect()
}

fn entrants(filter: impl Fn(&Entrant) -> bool) -> Vec<Entrant> {
    contenders::all().into_iter().filter(filter).collect()
}

/// The folder of the stories260k model, if it is in one of the usual places.
fn stories260k() -> Option<PathBuf> {
    let places = ["models", "shared/models", "../shared/models"];
    let mut folders = places
        .iter()
        .map(|place| Path::new(place).join("stories260k"));
    folders.find(|folder| folder.join("model.safetensors").is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::Backend;
    use llama_burn::LlamaConfig;

    fn options(only: &[&str], all: bool) -> BenchOptions {
        BenchOptions {
            device: Backend::Cpu,
            peft: None,
            model: None,
            data: None,
            rounds: None,
            steps: None,
            only: only.iter().map(|word| word.to_string()).collect(),
            all,
            contenders: Vec::new(),
            bf16: false,
            quick: false,
            output: "target/bench".into(),
        }
    }

    #[test]
    fn main_is_the_default_and_the_8b_shape_runs_only_when_asked_for() {
        let names = |options: &BenchOptions| {
            let mut names: Vec<&str> = asked_for(options).unwrap().iter().map(|s| s.name).collect();
            names.dedup();
            names
        };
        assert_eq!(names(&options(&[], false)), ["main"]);
        assert_eq!(names(&options(&["8b"], false)), ["8b"]);
        assert_eq!(names(&options(&["floors"], false)), [""; 0]);
        assert_eq!(names(&options(&[], true)).len(), NAMES.len() - 2);
        let error = asked_for(&options(&["r32"], false))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("r32") && error.contains("accumulation"),
            "{error}"
        );
    }

    #[test]
    fn the_shapes_are_the_published_ones() {
        let count = |text: &str| {
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            let config = LlamaConfig::from_json(value.as_object().unwrap()).unwrap();
            let shapes = config.tensor_shapes();
            let sizes = shapes
                .iter()
                .map(|(_, shape)| shape.iter().product::<usize>());
            sizes.sum::<usize>()
        };
        assert_eq!(
            count(include_str!("shapes/llama-3.2-1b.json")),
            1_235_814_400
        );
        assert_eq!(
            count(include_str!("shapes/llama-3.1-8b.json")),
            8_030_261_248
        );
    }
}
