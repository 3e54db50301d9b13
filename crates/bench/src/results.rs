//! What was measured, as `results.json` holds it.

use serde::Serialize;

use super::protocol::{DeviceDescription, Floors, PeakMemory, Phases, Round};
use device::Machine;
use terminal::statistics::{Spread, largest_relative_difference, median};

/// Everything that one run of the benchmark measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Results {
    /// The trainer's version.
    pub version: &'static str,
    /// The machine.
    pub machine: Machine,
    /// The device.
    pub device: DeviceDescription,
    /// What it can do at most.
    pub floors: Floors,
    /// What operations are counted.
    pub flops_counted: &'static str,
    /// The comparisons.
    pub scenarios: Vec<ScenarioResult>,
    /// What has to hold.
    pub goals: Vec<Goal>,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScenarioResult {
    /// What `--only` takes.
    pub name: &'static str,
    /// What distinguishes it from others of that name.
    pub title: String,
    /// The model's folder, or that its weights are random.
    pub model: String,
    /// Measured rounds.
    pub rounds: usize,
    /// Steps of a round.
    pub steps_per_round: usize,
    /// Tokens of the longest row.
    pub longest_row: usize,
    /// Operations that a useful token takes, see `flops_counted`.
    pub flops_per_token: f64,
    /// Those that were measured.
    pub contenders: Vec<Measured>,
    /// Those that were not.
    pub absent: Vec<Absent>,
}

/// A contender that was not measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Absent {
    /// What `--contenders` takes.
    pub id: &'static str,
    /// For people.
    pub name: &'static str,
    /// Why.
    pub reason: String,
}

/// A contender's measurements.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// What `--contenders` takes.
    pub id: &'static str,
    /// For people.
    pub name: &'static str,
    /// What it says of itself.
    pub description: String,
    /// The type it computes in.
    pub dtype: &'static str,
    /// Whether its batches are others than those of the rest.
    pub grouped: bool,
    /// Which of ours has the same weights.
    pub same_weights_as: &'static str,
    /// Seconds to load.
    pub load_seconds: f64,
    /// The most memory until then.
    pub loaded_memory: PeakMemory,
    /// Useful tokens per second over the measured rounds.
    pub useful_tokens_per_s: Option<Spread>,
    /// The most memory in all.
    pub peak_memory: PeakMemory,
    /// Useful operations per second by the device's matrix rate in the same type; none without one.
    pub utilisation: Option<f64>,
    /// The loss of every step, warm-up included.
    pub losses: Vec<f64>,
    /// The measured rounds.
    pub rounds: Vec<Round>,
}

/// Something that has to hold.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goal {
    /// What is compared.
    pub what: String,
    /// What is asked for: `at least 2.00 times`.
    pub asked: String,
    /// What was measured; none where it could not be.
    pub measured: Option<f64>,
    /// In words, with its unit.
    pub shown: String,
    /// Whether it holds; none where it was not measured.
    pub holds: Option<bool>,
}

impl Measured {
    /// Useful tokens per second, each round.
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

    /// Bytes of the memory that decides whether it fits: the device's, on a GPU, else the resident.
    pub fn memory(&self) -> Option<u64> {
        self.peak_memory.device.or(self.peak_memory.resident)
    }

    /// Seconds a step.
    pub fn seconds_per_step(&self) -> Option<f64> {
        let rounds = self.rounds.iter();
        let seconds = rounds.map(|round| round.seconds / round.losses.len() as f64);
        median(&seconds.collect::<Vec<f64>>())
    }

    /// Computed by useful tokens: above 1 padding, below 1 sharing.
    pub fn computed_share(&self) -> f64 {
        let sum = |tokens: fn(&Round) -> u64| self.rounds.iter().map(tokens).sum::<u64>() as f64;
        sum(|round| round.computed_tokens) / sum(|round| round.useful_tokens)
    }

    /// Seconds a step by part, over all rounds.
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
    /// A contender by its id, where it was measured.
    pub fn contender(&self, id: &str) -> Option<&Measured> {
        self.contenders.iter().find(|measured| measured.id == id)
    }

    /// The largest relative difference of a contender's losses from those of ours with the same weights;
    /// none where the batches differ or there is nothing to compare with.
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
