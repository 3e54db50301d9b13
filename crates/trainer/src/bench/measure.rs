//! Runs the contenders of a scenario in turn.

use std::path::{Path, PathBuf};

use llama_burn::LlamaConfig;

use super::adapter;
use super::child::Child;
use super::contenders::Entrant;
use super::error::BenchError;
use super::flops::FlopsModel;
use super::machine::Machine;
use super::options::BenchOptions;
use super::protocol::{
    Answer, Command, Contender, DeviceDescription, Floors, Loaded, OursSettings, Product, Round,
    WorkerSpec,
};
use super::results::{Absent, Measured, ScenarioResult};
use super::rows::{self, Work};
use super::scenario::{Model, Rows, Scenario};
use super::statistics::Spread;
use crate::screen::Screen;
use crate::{embedded, human, output};

/// Of every contender, as in FinLoRA's configurations.
const LEARNING_RATE: f64 = 1e-4;

/// What all scenarios share.
pub(super) struct Bench<'a> {
    pub options: &'a BenchOptions,
    pub machine: &'a Machine,
    pub device: &'a DeviceDescription,
    pub floors: &'a Floors,
    /// The folder that `--model` names.
    pub model: &'a Path,
    /// The file that `--data` names.
    pub data: &'a Path,
    /// For specifications, adapters and logs.
    pub folder: &'a Path,
    pub screen: &'a Screen,
}

/// A contender that is loaded, and what it has measured so far.
struct Running {
    entrant: Entrant,
    child: Child,
    loaded: Loaded,
    warm_up: Vec<f64>,
    rounds: Vec<Round>,
}

impl Bench<'_> {
    /// Loads every contender of a scenario, warms each up with a round, and measures in turn.
    ///
    /// A contender that fails is left out with its reason.
    ///
    /// # Errors
    ///
    /// If the rows cannot be made, or one of ours fails.
    pub fn scenario(
        &self,
        scenario: &Scenario,
        index: usize,
    ) -> Result<ScenarioResult, BenchError> {
        let folder = self.folder.join(format!("{index}-{}", scenario.name));
        std::fs::create_dir_all(&folder).map_err(BenchError::io("make", &folder))?;
        let model = self.model_folder(scenario, &folder)?;
        let config = LlamaConfig::from_file(&model)?;
        let steps = scenario.steps.filter(|_| self.options.steps.is_none());
        let steps = steps.unwrap_or(self.options.steps());
        let rounds = self.options.rounds();
        let work = self.work(scenario, &config, (rounds + 1) * steps)?;
        let adapter = folder.join("adapter");
        adapter::write_initial(&adapter, &config, &scenario.lora, rows::SEED)?;

        let heading = format!("{}: {}", scenario.name, scenario.title);
        self.screen.line(&format!(
            "{heading}, {} of {}",
            human::counted(rounds as u64, "round"),
            human::counted(steps as u64, "step"),
        ));
        let flops = FlopsModel::new(&config, &scenario.lora)?;
        let used = work.steps.iter().flatten().flatten();
        let flops_per_token = flops.per_token(used.map(|row| &work.rows[*row]));

        let mut absent = Vec::new();
        let mut running = Vec::new();
        for entrant in &scenario.entrants {
            let reason = entrant.absent(self.options, self.machine, self.device);
            let started = match reason {
                Some(reason) => Err(reason),
                None => {
                    let spec = WorkerSpec {
                        contender: entrant.contender.clone(),
                        device: self.device.backend.clone(),
                        model: model.clone(),
                        random_weights: matches!(scenario.model, Model::Random(_)),
                        adapter: adapter.clone(),
                        learning_rate: LEARNING_RATE,
                        rows: work.rows.clone(),
                        steps: match entrant.grouped {
                            true => work.grouped.clone(),
                            false => work.steps.clone(),
                        },
                    };
                    match self.start(entrant, &spec, &folder, steps) {
                        Ok(contender) => Ok(contender),
                        Err(error) => Err(entrant.excused(error)?),
                    }
                }
            };
            match started {
                Ok(contender) => running.push(contender),
                Err(reason) => absent.push(entrant.left_out(reason)),
            }
        }
        for round in 1..=rounds {
            let mut next = Vec::new();
            for mut contender in running {
                match contender.round(round * steps, steps) {
                    Ok(()) => next.push(contender),
                    Err(error) => {
                        let reason = contender.entrant.excused(error)?;
                        absent.push(contender.entrant.left_out(reason));
                    }
                }
            }
            running = next;
            self.screen.line(&progress(round, rounds, &running));
        }
        let measured = |contender: Running| contender.measured(flops_per_token, self.floors);
        Ok(ScenarioResult {
            name: scenario.name,
            title: scenario.title.clone(),
            model: match scenario.model {
                Model::Random(_) => "random weights".into(),
                _ => model.display().to_string(),
            },
            rounds,
            steps_per_round: steps,
            longest_row: work.longest(),
            flops_per_token,
            contenders: running.into_iter().map(measured).collect(),
            absent,
        })
    }

    /// Starts and loads a contender and lets it train on the first round's steps.
    fn start(
        &self,
        entrant: &Entrant,
        spec: &WorkerSpec,
        folder: &Path,
        steps: usize,
    ) -> Result<Running, BenchError> {
        let python = self.options.peft.as_deref();
        let mut child = Child::start(entrant.name, entrant.id, spec, folder, python)?;
        let loaded = match child.ask(&Command::Load)? {
            Answer::Loaded(loaded) => loaded,
            other => return Err(child.unexpected(&other)),
        };
        self.screen.line(&format!(
            "  {}: {} ({:.1}s)",
            entrant.name, loaded.description, loaded.seconds
        ));
        let mut contender = Running {
            entrant: entrant.clone(),
            child,
            loaded,
            warm_up: Vec::new(),
            rounds: Vec::new(),
        };
        contender.round(0, steps)?;
        contender.warm_up = contender.rounds.remove(0).losses;
        Ok(contender)
    }

    fn model_folder(&self, scenario: &Scenario, folder: &Path) -> Result<PathBuf, BenchError> {
        Ok(match &scenario.model {
            Model::Given => self.model.to_path_buf(),
            Model::Folder(folder) => folder.clone(),
            Model::Embedded => embedded::materialise()?.model_dir,
            Model::Random(shape) => {
                let folder = folder.join("model");
                output::write_atomically(&folder.join("config.json"), shape.as_bytes())?;
                folder
            }
        })
    }

    fn work(
        &self,
        scenario: &Scenario,
        config: &LlamaConfig,
        steps: usize,
    ) -> Result<Work, BenchError> {
        let count = steps * scenario.batch_size * scenario.accumulation;
        let limit = config.max_position_embeddings;
        let from_file = || rows::from_file(self.model, self.data, config.vocab_size, limit);
        let rows = match scenario.rows {
            Rows::Data => from_file()?,
            Rows::Long { tokens } => rows::concatenated(&from_file()?, tokens, count),
            Rows::Random { tokens } => rows::random(tokens, count, config.vocab_size),
        };
        let work = Work::new(rows, scenario.batch_size, scenario.accumulation, steps);
        match work.longest() {
            tokens if tokens > limit => Err(BenchError::RowsTooLong {
                scenario: format!("{} ({})", scenario.name, scenario.title),
                tokens,
                limit,
            }),
            _ => Ok(work),
        }
    }
}

impl Running {
    fn round(&mut self, first_step: usize, steps: usize) -> Result<(), BenchError> {
        match self.child.ask(&Command::Round { first_step, steps })? {
            Answer::Round(round) => self.rounds.push(round),
            other => return Err(self.child.unexpected(&other)),
        }
        Ok(())
    }

    fn measured(self, flops_per_token: f64, floors: &Floors) -> Measured {
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

impl Entrant {
    /// The reason to leave this one out; an error of ours stays an error.
    fn excused(&self, error: BenchError) -> Result<String, BenchError> {
        match self.contender {
            Contender::Ours(_) => Err(error),
            _ => Ok(error.to_string()),
        }
    }

    fn left_out(&self, reason: String) -> Absent {
        Absent {
            id: self.id,
            name: self.name,
            reason,
        }
    }
}

/// `round 1/5  ours f32 812  PEFT float32 190`: useful tokens a second.
fn progress(round: usize, rounds: usize, running: &[Running]) -> String {
    let speeds = running.iter().map(|contender| {
        let last = contender.rounds.last();
        let speed = last.map_or(0.0, |round| round.useful_tokens as f64 / round.seconds);
        format!("{} {}", contender.entrant.id, human::rate(speed))
    });
    let speeds: Vec<String> = speeds.collect();
    format!("  round {round}/{rounds}, tokens/s: {}", speeds.join(", "))
}

/// Asks a process of its own what the device is, and what it can do at most with this model.
///
/// # Errors
///
/// If the device does not start or fails.
pub(super) fn device_and_floors(
    options: &BenchOptions,
    model: &Path,
    folder: &Path,
) -> Result<(DeviceDescription, Floors), BenchError> {
    let config = LlamaConfig::from_file(model)?;
    let spec = WorkerSpec {
        contender: Contender::Ours(OursSettings {
            quant_bits: 8,
            compute_dtype: "auto".into(),
            gradient_checkpointing: None,
            share_prefixes: true,
        }),
        device: options.device.name().into(),
        model: model.into(),
        random_weights: false,
        adapter: folder.join("adapter"),
        learning_rate: LEARNING_RATE,
        rows: Vec::new(),
        steps: Vec::new(),
    };
    let mut child = Child::start("the device", "floors", &spec, folder, None)?;
    let device = match child.ask(&Command::Describe)? {
        Answer::Device(device) => device,
        other => return Err(child.unexpected(&other)),
    };
    let command = Command::Floors {
        products: products(&config, options.quick, device.on_gpu),
        buffer_bytes: if options.quick { 32 << 20 } else { 1 << 30 },
        repeats: if options.quick { 3 } else { 7 },
    };
    match child.ask(&command)? {
        Answer::Floors(floors) => Ok((device, floors)),
        other => Err(child.unexpected(&other)),
    }
}

/// A large square, and the model's products with as many rows as a batch has tokens.
fn products(config: &LlamaConfig, quick: bool, on_gpu: bool) -> Vec<Product> {
    const TOKENS: usize = 512;
    let square = match (quick, on_gpu) {
        (true, _) => 256,
        (false, true) => 4096,
        (false, false) => 2048,
    };
    let mut products = vec![Product {
        name: "square".into(),
        shape: [square; 3],
    }];
    for (name, d_in, d_out, _) in config.layer_linears() {
        let shape = [TOKENS, d_in, d_out];
        let name = name.split('.').next_back().unwrap_or(name);
        match products.iter_mut().find(|product| product.shape == shape) {
            Some(same) => same.name += &format!(", {name}"),
            None => products.push(Product {
                name: name.into(),
                shape,
            }),
        }
    }
    products
}
