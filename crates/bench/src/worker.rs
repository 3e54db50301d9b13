//! A contender's process: commands in, answers out. See [`protocol`](super::protocol).

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use super::burn_qlora::BurnQlora;
use super::error::BenchError;
use super::floors;
use super::ours::{Ours, StepReport};
use super::protocol::{Answer, Command, Contender, Loaded, PeakMemory, Phases, Round, WorkerSpec};
use device::Selected;

/// Serves the commands on standard input until `quit` or its end. A failure is an answer, not an
/// error.
///
/// # Errors
///
/// If standard output is closed.
pub fn serve(spec: &Path) -> std::io::Result<()> {
    let input = std::io::stdin().lock();
    let mut output = std::io::stdout().lock();
    let mut worker = match Worker::new(spec) {
        Ok(worker) => worker,
        Err(error) => return write(&mut output, &error_answer(&error)),
    };
    for line in input.lines() {
        let line = line?;
        let (answer, last) = match serde_json::from_str(&line) {
            Ok(command) => match worker.answer(command) {
                Ok(Some(answer)) => (answer, false),
                Ok(None) => return Ok(()),
                Err(error) => (error_answer(&error), true),
            },
            Err(error) => {
                let message = format!("{line:?} is not a command: {error}");
                (Answer::Error { message }, true)
            }
        };
        write(&mut output, &answer)?;
        if last {
            return Ok(());
        }
    }
    Ok(())
}

fn write(output: &mut impl Write, answer: &Answer) -> std::io::Result<()> {
    let line = serde_json::to_string(answer)?;
    writeln!(output, "{line}")?;
    output.flush()
}

fn error_answer(error: &BenchError) -> Answer {
    Answer::Error {
        message: error.to_string(),
    }
}

/// The program that trains in this process.
enum Trainee {
    Ours(Box<Ours>),
    Burn(Box<BurnQlora>),
}

impl Trainee {
    fn load(spec: &WorkerSpec, selected: &Selected) -> Result<(Self, Loaded), BenchError> {
        match &spec.contender {
            Contender::Ours(settings) => {
                let (ours, loaded) = Ours::load(spec, settings, selected)?;
                Ok((Self::Ours(Box::new(ours)), loaded))
            }
            Contender::BurnQlora => {
                let (burn, loaded) = BurnQlora::load(spec, selected)?;
                Ok((Self::Burn(Box::new(burn)), loaded))
            }
            Contender::Peft(_) => Err(BenchError::NotHere("PEFT")),
        }
    }

    fn step(self, micro_batches: &[Vec<usize>]) -> Result<(Self, StepReport), BenchError> {
        Ok(match self {
            Self::Ours(ours) => {
                let (ours, report) = ours.step(micro_batches)?;
                (Self::Ours(Box::new(ours)), report)
            }
            Self::Burn(burn) => {
                let (burn, report) = burn.step(micro_batches)?;
                (Self::Burn(Box::new(burn)), report)
            }
        })
    }

    fn memory(&self) -> PeakMemory {
        match self {
            Self::Ours(ours) => ours.memory(),
            Self::Burn(burn) => burn.memory(),
        }
    }
}

struct Worker {
    spec: WorkerSpec,
    selected: Selected,
    /// `None` before `load`, and while a step runs.
    trainee: Option<Trainee>,
}

impl Worker {
    fn new(path: &Path) -> Result<Self, BenchError> {
        let text = std::fs::read_to_string(path).map_err(BenchError::io("read", path))?;
        let spec: WorkerSpec = serde_json::from_str(&text).map_err(|error| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
            BenchError::io("understand", path)(source)
        })?;
        let selected = device::select(spec.device.parse()?)?;
        Ok(Self {
            spec,
            selected,
            trainee: None,
        })
    }

    /// `None` to `quit`.
    fn answer(&mut self, command: Command) -> Result<Option<Answer>, BenchError> {
        Ok(Some(match command {
            Command::Describe => Answer::Device(floors::describe(&self.selected)),
            Command::Floors {
                products,
                buffer_bytes,
                repeats,
            } => {
                let selected = &self.selected;
                Answer::Floors(floors::measure(selected, &products, buffer_bytes, repeats)?)
            }
            Command::Load => {
                let (trainee, loaded) = Trainee::load(&self.spec, &self.selected)?;
                self.trainee = Some(trainee);
                Answer::Loaded(loaded)
            }
            Command::Round { first_step, steps } => Answer::Round(self.round(first_step, steps)?),
            Command::Quit => return Ok(None),
        }))
    }

    fn round(&mut self, first_step: usize, steps: usize) -> Result<Round, BenchError> {
        let started = Instant::now();
        let (mut losses, mut phases) = (Vec::new(), Phases::default());
        let (mut useful_tokens, mut computed_tokens) = (0, 0);
        for index in first_step..first_step + steps {
            let step = self.spec.steps.get(index).ok_or(BenchError::NoSuchStep {
                step: index,
                steps: self.spec.steps.len(),
            })?;
            let trainee = self.trainee.take().ok_or(BenchError::NotLoaded)?;
            let (trainee, report) = trainee.step(step)?;
            self.trainee = Some(trainee);
            let rows = step.iter().flatten().map(|row| &self.spec.rows[*row]);
            useful_tokens += rows.map(|row| row.ids.len() as u64).sum::<u64>();
            computed_tokens += report.computed_tokens;
            losses.push(report.loss);
            phases.add(report.phases);
        }
        let trainee = self.trainee.as_ref().ok_or(BenchError::NotLoaded)?;
        Ok(Round {
            seconds: started.elapsed().as_secs_f64(),
            useful_tokens,
            computed_tokens,
            losses,
            phases,
            memory: trainee.memory(),
        })
    }
}
