//! The goals of the project, compared with the measurements.

use super::results::{Goal, Measured, ScenarioResult};
use super::scenario;
use terminal::human;
use terminal::statistics::Ratio;

/// The least ratio of speed and the largest ratio of memory, relative to other contenders.
struct Comparison {
    ours: &'static str,
    /// Of several contenders the fastest counts.
    others: &'static [&'static str],
    what: &'static str,
    speed: f64,
    memory: f64,
}

const COMPARISONS: [Comparison; 4] = [
    Comparison {
        ours: "ours",
        others: &["peft-f32", "peft-f32-grouped"],
        what: "ours f32 against PEFT float32, its fastest",
        speed: 2.0,
        memory: 0.25,
    },
    Comparison {
        ours: "ours-bf16",
        others: &["peft-bf16", "peft-bf16-grouped"],
        what: "ours bf16 against PEFT bfloat16, its fastest",
        speed: 2.0,
        memory: 1.0 / 3.0,
    },
    Comparison {
        ours: "ours",
        others: &["burn"],
        what: "ours f32 against Burn apply_qlora",
        speed: 2.5,
        memory: 0.5,
    },
    Comparison {
        ours: "ours",
        others: &["ours-dense"],
        what: "8-bit base against 16/32-bit base",
        speed: 0.95,
        memory: 0.6,
    },
];

/// Harder settings must reach at least this ratio to PEFT's speed.
const HARDER: f64 = 1.5;

/// A model of 10⁹ parameters with random weights trains within this.
const BYTES_OF_1B: u64 = 4_000_000_000;

/// A model of 8 · 10⁹ parameters, with examples of 2,048 tokens on a GPU, trains within this.
const BYTES_OF_8B: u64 = 12 << 30;

/// The goals that these scenarios can decide.
pub(super) fn goals(scenarios: &[ScenarioResult]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for result in scenarios {
        match result.name {
            "main" => goals.extend(COMPARISONS.iter().flat_map(|it| it.goals(result))),
            "all-linear" | "r64" | "long" | "accumulation" => {
                for comparison in &COMPARISONS[..2] {
                    let what = format!("{}: {}", result.name, comparison.what);
                    goals.push(faster(result, comparison, what, HARDER));
                }
            }
            "scaling" if result.title == scenario::ONE_BILLION => {
                goals.push(smaller(result, "ours", "at most 4 GB", BYTES_OF_1B));
            }
            "8b" if result.longest_row == 2048 => {
                goals.push(smaller(result, "ours-bf16", "under 12 GiB", BYTES_OF_8B));
            }
            _ => {}
        }
    }
    goals
}

impl Comparison {
    fn goals(&self, result: &ScenarioResult) -> [Goal; 2] {
        let speed = faster(result, self, format!("{}: speed", self.what), self.speed);
        let pair = self.pair(result);
        let memory =
            pair.and_then(|(ours, other)| Some(ours.memory()? as f64 / other.memory()? as f64));
        let memory = Goal {
            what: format!("{}: memory", self.what),
            asked: format!("at most {:.2}", self.memory),
            measured: memory,
            shown: memory.map_or_else(not_measured, |share| format!("{share:.2}")),
            holds: memory.map(|share| share <= self.memory),
        };
        [speed, memory]
    }

    /// The contender of this trainer and the fastest of the others, if both were measured.
    fn pair<'a>(&self, result: &'a ScenarioResult) -> Option<(&'a Measured, &'a Measured)> {
        let ours = result.contender(self.ours)?;
        let others = self.others.iter().filter_map(|id| result.contender(id));
        let speed = |measured: &&Measured| measured.speed().unwrap_or(0.0);
        let fastest = others.max_by(|a, b| speed(a).total_cmp(&speed(b)));
        Some((ours, fastest?))
    }
}

fn faster(result: &ScenarioResult, comparison: &Comparison, what: String, asked: f64) -> Goal {
    let pair = comparison.pair(result);
    let ratio = pair.and_then(|(ours, other)| Ratio::of(&ours.speeds(), &other.speeds()));
    Goal {
        what,
        asked: format!("at least {asked:.2} ×"),
        measured: ratio.map(|ratio| ratio.of_medians),
        shown: ratio.map_or_else(not_measured, |ratio| format!("{:.2} ×", ratio.of_medians)),
        holds: ratio.map(|ratio| ratio.of_medians >= asked),
    }
}

fn smaller(result: &ScenarioResult, id: &str, asked: &str, limit: u64) -> Goal {
    let measured = result.contender(id).and_then(Measured::memory);
    Goal {
        what: format!("{}: peak memory", result.title),
        asked: asked.into(),
        measured: measured.map(|bytes| bytes as f64),
        shown: measured.map_or_else(not_measured, human::bytes),
        holds: measured.map(|bytes| bytes <= limit),
    }
}

fn not_measured() -> String {
    "not measured".into()
}
