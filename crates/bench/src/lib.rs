//! The benchmark, `cargo xtask bench`: speed, memory, and whether the training is the same.
//!
//! ```text
//! options.rs, scenario.rs, contenders.rs   the subjects of the comparison
//! rows.rs, adapter.rs, shapes/             examples, their order and the initial adapter, the same for every contender
//! measure.rs, running.rs, probe.rs         loads the contenders, measures in turn; probes the device
//! child.rs, protocol.rs, worker.rs         a process per contender; a line of JSON per command
//! ours.rs                                  this trainer: every call into its hot path
//! burn_qlora.rs, burn_llama.rs             Burn's apply_qlora, as a Burn user writes it
//! peft_worker.py                           PEFT
//! random_model.rs                          shapes without weights
//! floors.rs                                the machine's roofline
//! statistics.rs, results.rs, goals.rs      medians and ratios; results.json; goals
//! table.rs, report.rs, comparison.rs, svg.rs   the screen, results.md, speed.svg
//! ```

mod adapter;
mod burn_llama;
mod burn_qlora;
mod child;
mod comparison;
mod contenders;
mod error;
mod floors;
mod goals;
mod measure;
mod options;
mod ours;
mod probe;
pub mod protocol;
mod random_model;
mod report;
mod results;
mod rows;
mod running;
mod scenario;
mod svg;
mod worker;

use std::path::{Path, PathBuf};

pub use child::WORKER;
pub use device::Machine;
pub use error::BenchError;
pub use options::BenchOptions;
pub use results::{Absent, Goal, Measured, Results, ScenarioResult};
pub use terminal::statistics::{Ratio, Spread};
pub use worker::serve;

use run_config::embedded;
use terminal::Screen;

/// The default paths of the model and the examples.
const MODEL: &str = "models/SmolLM2-135M-Instruct";
const DATA: &str = "data/fpb_train.jsonl";

/// Measures, shows the tables on `screen`, and writes `results.json`, `results.md` and `speed.svg`.
///
/// # Errors
///
/// An error of the options, the model or the examples, before anything is measured; a contender of
/// this trainer that fails. Other contenders that fail are left out, with the reason in the tables.
pub fn run(options: &BenchOptions, screen: &Screen) -> Result<Results, BenchError> {
    for (flag, value) in [("rounds", options.rounds()), ("steps", options.steps())] {
        if value == 0 {
            return Err(BenchError::Zero { flag });
        }
    }
    let scenarios = scenario::asked_for(options)?;
    let (model, data) = files(options)?;
    let folder = options.output.join("work");
    std::fs::create_dir_all(&folder).map_err(BenchError::io("make", &folder))?;
    let machine = Machine::this();
    screen.line("measuring the roofline");
    let (device, floors) = probe::device_and_floors(options, &model, &folder)?;
    let mut results = Results {
        version: env!("CARGO_PKG_VERSION"),
        machine,
        device,
        floors,
        flops_counted: lora_train::plan::flops::COUNTED,
        scenarios: Vec::new(),
        goals: Vec::new(),
    };
    for (index, scenario) in scenarios.iter().enumerate() {
        let bench = measure::Bench {
            options,
            machine: &results.machine,
            device: &results.device,
            floors: &results.floors,
            model: &model,
            data: &data,
            folder: &folder,
            screen,
        };
        match bench.scenario(scenario, index) {
            Ok(result) => results.scenarios.push(result),
            // The other scenarios may fit.
            Err(error @ BenchError::RowsTooLong { .. }) => {
                screen.line(&format!("skipped: {error}"));
                continue;
            }
            Err(error) => return Err(error),
        }
        // The goals are about a model of a real size.
        if !options.quick {
            results.goals = goals::goals(&results.scenarios);
        }
        // After each scenario, so that a run that is stopped leaves its results so far.
        write(&results, &options.output)?;
    }
    let written = write(&results, &options.output)?;
    for line in lines(&results, &written) {
        screen.line(&line);
    }
    Ok(results)
}

/// The model's folder and the file of examples.
fn files(options: &BenchOptions) -> Result<(PathBuf, PathBuf), BenchError> {
    let embedded = if options.quick && (options.model.is_none() || options.data.is_none()) {
        Some(embedded::materialise()?)
    } else {
        None
    };
    let or = |given: &Option<PathBuf>, embedded: Option<PathBuf>, usual: &str| {
        given.clone().or(embedded).unwrap_or_else(|| usual.into())
    };
    let paths = embedded.as_ref();
    let model = or(
        &options.model,
        paths.map(|paths| paths.model_dir.clone()),
        MODEL,
    );
    let data = or(&options.data, paths.map(|paths| paths.train.clone()), DATA);
    match (model.join("config.json").is_file(), data.is_file()) {
        (false, _) => Err(BenchError::NoModel { folder: model }),
        (_, false) => Err(BenchError::NoData { path: data }),
        _ => Ok((model, data)),
    }
}

/// Writes the results' files and prints their paths.
fn write(results: &Results, folder: &Path) -> Result<Vec<PathBuf>, BenchError> {
    let (json, markdown) = (folder.join("results.json"), folder.join("results.md"));
    let text = serde_json::to_string_pretty(results)
        .map_err(|error| BenchError::io("write", &json)(std::io::Error::other(error)))?;
    durable::write_atomically(&json, text.as_bytes())?;
    durable::write_atomically(&markdown, report::markdown(results).as_bytes())?;
    let mut written = vec![json, markdown];
    let picture = folder.join("speed.svg");
    match svg::plot(results) {
        Some(plot) => {
            durable::write_atomically(&picture, plot.as_bytes())?;
            written.push(picture);
        }
        // A picture of an earlier run would be mistaken for this run's; there may be none.
        None => drop(std::fs::remove_file(picture)),
    }
    Ok(written)
}

/// The results for the screen.
fn lines(results: &Results, written: &[PathBuf]) -> Vec<String> {
    let mut lines = vec![String::new()];
    lines.extend(terminal::wrapped(&report::heading(results), ""));
    for table in report::tables(results) {
        lines.push(String::new());
        lines.extend(table.lines());
    }
    lines.push(String::new());
    if !results.scenarios.is_empty() {
        lines.extend(terminal::wrapped(results.flops_counted, ""));
        lines.push(String::new());
    }
    lines.extend(written.iter().map(|path| format!("  {}", path.display())));
    lines
}

#[cfg(test)]
mod tests {
    use super::protocol::{
        Bandwidth, DeviceDescription, Floors, PeakMemory, Phases, Product, ProductRate, Round,
    };
    use super::*;

    fn measured(id: &'static str, name: &'static str, seconds: f64, mebibytes: u64) -> Measured {
        let memory = PeakMemory {
            resident: Some(mebibytes << 20),
            device: None,
        };
        let round = |slower: f64| Round {
            seconds: seconds * slower,
            useful_tokens: 1000,
            computed_tokens: 1200,
            losses: vec![2.0, 1.5],
            phases: Phases {
                data: 0.001,
                pass: seconds,
                ..Phases::default()
            },
            memory,
        };
        let mut measured = Measured {
            id,
            name,
            description: "as it was".into(),
            dtype: "f32",
            grouped: false,
            same_weights_as: "ours",
            load_seconds: 1.0,
            loaded_memory: memory,
            useful_tokens_per_s: None,
            peak_memory: memory,
            utilisation: Some(0.5),
            losses: vec![2.0, 1.5],
            rounds: vec![round(1.0), round(1.1), round(0.9)],
        };
        measured.useful_tokens_per_s = Spread::of(&measured.speeds());
        measured
    }

    /// Three contenders; the second is three times as slow as ours and five times as large.
    pub(super) fn results() -> Results {
        let mut results = Results {
            version: "0",
            machine: Machine::this(),
            device: DeviceDescription {
                backend: "cpu".into(),
                name: "CPU".into(),
                on_gpu: false,
                compute_dtypes: vec!["f32".into()],
                no_bf16: None,
            },
            floors: Floors {
                products: vec![ProductRate {
                    product: Product {
                        name: "square".into(),
                        shape: [256; 3],
                    },
                    dtype: "f32".into(),
                    gflops: vec![100.0, 120.0, 110.0],
                }],
                bandwidths: vec![Bandwidth {
                    name: "read".into(),
                    bytes: 1 << 30,
                    gb_per_s: vec![10.0],
                }],
            },
            flops_counted: lora_train::plan::flops::COUNTED,
            scenarios: vec![ScenarioResult {
                name: "main",
                title: "small".into(),
                model: "model".into(),
                rounds: 3,
                steps_per_round: 2,
                longest_row: 64,
                flops_per_token: 5e8,
                contenders: vec![
                    measured("ours", "ours f32", 1.0, 100),
                    measured("burn", "Burn apply_qlora", 3.0, 500),
                    // The longest name, and numbers as long as they get.
                    measured("peft-bf16-grouped", "PEFT bfloat16, grouped", 0.02, 999),
                ],
                absent: vec![Absent {
                    id: "peft-f32",
                    name: "PEFT float32",
                    reason: "no --peft PYTHON was given".into(),
                }],
            }],
            goals: Vec::new(),
        };
        results.goals = goals::goals(&results.scenarios);
        results
    }

    #[test]
    fn goals_hold_fail_or_are_not_measured() {
        let goals = results().goals;
        let holds = |what: &str| {
            let goal = goals.iter().find(|goal| goal.what == what);
            goal.unwrap_or_else(|| panic!("{what} in {goals:?}")).holds
        };
        assert_eq!(
            holds("ours f32 against Burn apply_qlora: speed"),
            Some(true)
        );
        assert_eq!(
            holds("ours f32 against Burn apply_qlora: memory"),
            Some(true)
        );
        assert_eq!(
            holds("ours f32 against PEFT float32, its fastest: speed"),
            None
        );
        let mut slow = results();
        slow.scenarios[0].contenders[1] = measured("burn", "Burn apply_qlora", 2.0, 150);
        let slow = super::goals::goals(&slow.scenarios);
        assert!(
            slow.iter().filter(|goal| goal.holds == Some(false)).count() == 2,
            "{slow:?}"
        );
    }

    #[test]
    fn every_table_fits_a_screen_and_says_who_was_not_measured() {
        let results = results();
        let lines = lines(&results, &["target/bench/results.json".into()]);
        let text = lines.join("\n");
        for line in &lines {
            assert!(console::measure_text_width(line) <= 100, "{line}");
        }
        for part in [
            "PEFT float32: n/a: no --peft",
            "110",
            "3.00",
            "0.20",
            "yes",
            "n/a",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        let markdown = report::markdown(&results);
        assert!(
            markdown.contains("| ours f32 by Burn apply_qlora | 3.00 | 3.00 | 0.20 |"),
            "{markdown}"
        );
    }
}
