//! The measurements, as in `results.json`.

use serde::Serialize;

use super::protocol::{DeviceDescription, Floors, PeakMemory, Phases, Round};
use device::Machine;
use terminal::statistics::{Spread, largest_relative_difference, median};

/// The measurements of one run of the benchmark.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Results {
    /// The trainer's version.
    pub version: &'static str,
    /// The machine.
    pub machine: Machine,
    /// The device.
    pub device: DeviceDescription,
    /// Its roofline.
    pub floors: Floors,
    /// Which operations are counted.
    pub flops_counted: &'static str,
    /// The comparisons.
    pub scenarios: Vec<ScenarioResult>,
    /// The goals.
    pub goals: Vec<Goal>,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScenarioResult {
    /// Its name for `--only`.
    pub name: &'static str,
    /// Its title, which distinguishes it from others of that name.
    pub title: String,
    /// The model's folder, or that its weights are random.
    pub model: String,
    /// Measured rounds.
    pub rounds: usize,
    /// Steps per round.
    pub steps_per_round: usize,
    /// Tokens of the longest example.
    pub longest_row: usize,
    /// Operations per useful token, see `flops_counted`.
    pub flops_per_token: f64,
    /// The contenders that were measured.
    pub contenders: Vec<Measured>,
    /// The contenders that were not measured.
    pub absent: Vec<Absent>,
}

/// A contender that was not measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Absent {
    /// Its name for `--contenders`.
    pub id: &'static str,
    /// Its name for the user.
    pub name: &'static str,
    /// The reason.
    pub reason: String,
}

/// A contender's measurements.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Its name for `--contenders`.
    pub id: &'static str,
    /// Its name for the user.
    pub name: &'static str,
    /// Its own description.
    pub description: String,
    /// Its compute type.
    pub dtype: &'static str,
    /// Whether its batches differ from those of the other contenders.
    pub grouped: bool,
    /// The contender of this trainer with the same weights.
    pub same_weights_as: &'static str,
    /// Seconds to load.
    pub load_seconds: f64,
    /// Peak memory until then.
    pub loaded_memory: PeakMemory,
    /// Useful tokens per second over the measured rounds.
    pub useful_tokens_per_s: Option<Spread>,
    /// Peak memory in total.
    pub peak_memory: PeakMemory,
    /// Useful operations per second relative to the device's product rate in the same type; `None`
    /// if that was not measured.
    pub utilisation: Option<f64>,
    /// The loss of every step, warm-up included.
    pub losses: Vec<f64>,
    /// The measured rounds.
    pub rounds: Vec<Round>,
}

/// A goal.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goal {
    /// The comparison.
    pub what: String,
    /// The goal: `at least 2.00 times`.
    pub asked: String,
    /// The measured value; `None` if it could not be measured.
    pub measured: Option<f64>,
    /// The measured value with its unit.
    pub shown: String,
    /// Whether the goal is reached; `None` if it was not measured.
    pub holds: Option<bool>,
}

impl Measured {
    /// Useful tokens per second of each round.
    pub fn speeds(&self) -> Vec<f64> {
        let rounds = self.rounds.iter();
        rounds
            .map(|round| round.useful_tokens as f64 / round.seconds)
            .collect()
    }

    /// Useful tokens per second.
    pub fn speed(&self) -> Option<f64> {
        self.useful_tokens_per_s.map(|spread| spread.median)
    }

    /// Bytes of the memory that is the limit: the device's on a GPU, else resident memory.
    pub fn memory(&self) -> Option<u64> {
        self.peak_memory.device.or(self.peak_memory.resident)
    }

    /// Seconds per step.
    pub fn seconds_per_step(&self) -> Option<f64> {
        let rounds = self.rounds.iter();
        let seconds = rounds.map(|round| round.seconds / round.losses.len() as f64);
        median(&seconds.collect::<Vec<f64>>())
    }

    /// Computed tokens per useful token: above 1 with padding, below 1 with shared prefixes.
    pub fn computed_share(&self) -> f64 {
        let sum = |tokens: fn(&Round) -> u64| self.rounds.iter().map(tokens).sum::<u64>() as f64;
        sum(|round| round.computed_tokens) / sum(|round| round.useful_tokens)
    }

    /// Seconds per step by part, over all rounds.
    pub fn phases(&self) -> Phases {
        let mut sum = Phases::default();
        let mut steps = 0;
        for round in &self.rounds {
            sum.add(round.phases);
            steps += round.losses.len();
        }
        let each = |seconds: f64| seconds / steps.max(1) as f64;
        Phases {
            data: each(sum.data),
            pass: each(sum.pass),
            forward: sum.forward.map(each),
            loss: sum.loss.map(each),
            backward: sum.backward.map(each),
            optimizer: each(sum.optimizer),
        }
    }
}

impl ScenarioResult {
    /// A contender by its id, if it was measured.
    pub fn contender(&self, id: &str) -> Option<&Measured> {
        self.contenders.iter().find(|measured| measured.id == id)
    }

    /// The largest relative difference of a contender's losses from those of this trainer with the
    /// same weights; `None` if the batches differ or nothing was measured to compare with.
    pub fn loss_difference(&self, measured: &Measured) -> Option<f64> {
        let reference = self.contender(measured.same_weights_as)?;
        if measured.grouped || measured.id == reference.id {
            None
        } else {
            largest_relative_difference(&measured.losses, &reference.losses)
        }
    }
}

impl Floors {
    /// The rate of the largest product in a type, in operations per second.
    pub fn matmul_rate(&self, dtype: &str) -> Option<f64> {
        let of_type = self.products.iter().filter(|rate| rate.dtype == dtype);
        let square = of_type.max_by_key(|rate| rate.product.shape.iter().product::<usize>());
        Some(median(&square?.gflops)? * 1e9)
    }
}
