//! A loaded contender that is measured in turn with others.

use std::path::Path;

use super::child::Child;
use super::contenders::Entrant;
use super::error::BenchError;
use super::protocol::{Answer, Command, Floors, Loaded, Round, WorkerSpec};
use super::results::Measured;
use terminal::human;
use terminal::statistics::Spread;

/// A loaded contender, and its measurements so far.
pub(super) struct Running {
    pub entrant: Entrant,
    child: Child,
    pub loaded: Loaded,
    warm_up: Vec<f64>,
    rounds: Vec<Round>,
}

impl Running {
    /// Starts and loads a contender.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or reports an error.
    pub fn start(
        entrant: &Entrant,
        spec: &WorkerSpec,
        folder: &Path,
        python: Option<&Path>,
    ) -> Result<Self, BenchError> {
        let mut child = Child::start(entrant.name, entrant.id, spec, folder, python)?;
        match child.ask(&Command::Load)? {
            Answer::Loaded(loaded) => Ok(Self {
                entrant: entrant.clone(),
                child,
                loaded,
                warm_up: Vec::new(),
                rounds: Vec::new(),
            }),
            other => Err(child.unexpected(&other)),
        }
    }

    /// Trains on steps that are not measured: threads start, kernels are compiled, memory is
    /// allocated.
    ///
    /// # Errors
    ///
    /// As [`round`](Self::round).
    pub fn warm_up(&mut self, steps: usize) -> Result<(), BenchError> {
        self.warm_up = self.train(0, steps)?.losses;
        Ok(())
    }

    /// Trains on steps that are measured.
    ///
    /// # Errors
    ///
    /// If the contender ended, or reports an error.
    pub fn round(&mut self, first_step: usize, steps: usize) -> Result<(), BenchError> {
        let round = self.train(first_step, steps)?;
        self.rounds.push(round);
        Ok(())
    }

    fn train(&mut self, first_step: usize, steps: usize) -> Result<Round, BenchError> {
        match self.child.ask(&Command::Round { first_step, steps })? {
            Answer::Round(round) => Ok(round),
            other => Err(self.child.unexpected(&other)),
        }
    }

    /// Ends it and returns its measurements.
    pub fn measured(self, flops_per_token: f64, floors: &Floors) -> Measured {
        let losses = self.rounds.iter().flat_map(|round| &round.losses);
        let losses = self.warm_up.iter().chain(losses).copied().collect();
        let memory = self.rounds.last().map(|round| round.memory);
        let mut measured = Measured {
            id: self.entrant.id,
            name: self.entrant.name,
            description: self.loaded.description,
            dtype: self.entrant.dtype,
            grouped: self.entrant.grouped,
            same_weights_as: self.entrant.same_weights_as,
            load_seconds: self.loaded.seconds,
            loaded_memory: self.loaded.memory,
            useful_tokens_per_s: None,
            peak_memory: memory.unwrap_or(self.loaded.memory),
            utilisation: None,
            losses,
            rounds: self.rounds,
        };
        measured.useful_tokens_per_s = Spread::of(&measured.speeds());
        let rate = floors.matmul_rate(measured.dtype);
        measured.utilisation = measured
            .speed()
            .zip(rate)
            .map(|(speed, rate)| speed * flops_per_token / rate);
        measured
    }
}

/// `round 1/5  ours f32 812  PEFT float32 190`: useful tokens per second.
pub(super) fn progress(round: usize, rounds: usize, running: &[Running]) -> String {
    let speeds = running.iter().map(|contender| {
        let last = contender.rounds.last();
        let speed = last.map_or(0.0, |round| round.useful_tokens as f64 / round.seconds);
        format!("{} {}", contender.entrant.id, human::rate(speed))
    });
    let speeds: Vec<String> = speeds.collect();
    format!("  round {round}/{rounds}, tokens/s: {}", speeds.join(", "))
}
