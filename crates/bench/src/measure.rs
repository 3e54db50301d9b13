//! Runs the contenders of a scenario in turn.

use std::path::{Path, PathBuf};

use llama_burn::LlamaConfig;

use super::adapter;
use super::contenders::Entrant;
use super::error::BenchError;
use super::options::BenchOptions;
use super::protocol::{Contender, DeviceDescription, Floors, Loaded, WorkerSpec};
use super::results::{Absent, ScenarioResult};
use super::rows::{self, Work};
use super::running::{Running, progress};
use super::scenario::{Model, Rows, Scenario};
use device::Machine;
use lora_train::plan::flops::FlopsModel;
use terminal::Screen;
use terminal::human;

use run_config::embedded;

/// Of every contender, as in FinLoRA's configurations.
const LEARNING_RATE: f64 = 1e-4;

/// The inputs that all scenarios share.
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

impl Bench<'_> {
    /// Loads every contender of a scenario, warms each up with a round, and measures in turn.
    ///
    /// A contender that fails is left out, with its reason.
    ///
    /// # Errors
    ///
    /// If the examples cannot be made, or a contender of this trainer fails.
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
        let sizes = used.map(|row| {
            let row = &work.rows[*row];
            let tokens = row.ids.len() as u64;
            (tokens, tokens - row.prompt_tokens as u64)
        });
        let flops_per_token = flops.per_token(sizes);

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
                        steps: if entrant.grouped {
                            work.grouped.clone()
                        } else {
                            work.steps.clone()
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

    fn start(
        &self,
        entrant: &Entrant,
        spec: &WorkerSpec,
        folder: &Path,
        steps: usize,
    ) -> Result<Running, BenchError> {
        let mut contender = Running::start(entrant, spec, folder, self.options.peft.as_deref())?;
        let Loaded {
            description,
            seconds,
            ..
        } = &contender.loaded;
        self.screen.line(&format!(
            "  {}: {description} ({seconds:.1}s)",
            entrant.name
        ));
        contender.warm_up(steps)?;
        Ok(contender)
    }

    fn model_folder(&self, scenario: &Scenario, folder: &Path) -> Result<PathBuf, BenchError> {
        Ok(match &scenario.model {
            Model::Given => self.model.to_path_buf(),
            Model::Folder(folder) => folder.clone(),
            Model::Embedded => embedded::materialise()?.model_dir,
            Model::Random(shape) => {
                let folder = folder.join("model");
                durable::write_atomically(&folder.join("config.json"), shape.as_bytes())?;
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

impl Entrant {
    /// The reason to leave this contender out; an error of this trainer stays an error.
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
