//! Useful tokens per second and peak memory of a shape.

use std::time::{Duration, Instant};

use burn::tensor::{DType, FloatDType};
use llama_burn::LlamaConfig;
use lora_core::{LoraConfig, Quantization};

use super::clock::Clock;
use super::error::ReportError;
use super::finding::{Check, Failed, Finding, LeftOut, Training};
use super::shapes::Shape;
use super::timing::sync;
use super::trainee::{Trainee, batch};
use device::{Backend, Selected};
use lora_train::guard::{FaultKind, Guard};
use lora_train::plan::{Plan, PlanOptions, Workload};
use terminal::human;
use terminal::statistics::Spread;

use device::process_memory as memory;

/// Tokens per step, which determine the number of examples.
const TOKENS_PER_STEP: usize = 2048;

/// Lengths of the examples.
pub const LENGTHS: [usize; 2] = [512, 2048];

/// Steps before the measured ones: in the first, kernels are compiled and tuned.
const WARM_UP: usize = 2;

/// Measured steps: the minimum, the maximum, and the time after which no more are made.
const STEPS: (usize, usize) = (3, 10);
const LONG_ENOUGH: Duration = Duration::from_secs(6);

/// The share of a device's memory that a run is planned with: the rest is used by the driver, the
/// pools and other programs.
const USABLE: f64 = 0.9;

const LEARNING_RATE: f64 = 1e-4;

/// The lengths of examples for a shape, with the examples per step.
pub fn workloads(config: &LlamaConfig, quick: bool) -> Vec<(usize, usize)> {
    let limit = config.max_position_embeddings;
    let lengths: Vec<usize> = if quick {
        vec![32]
    } else {
        LENGTHS.iter().map(|length| *length.min(&limit)).collect()
    };
    let mut workloads: Vec<(usize, usize)> = Vec::new();
    for length in lengths {
        let examples = if quick {
            2
        } else {
            (TOKENS_PER_STEP / length).max(1)
        };
        if !workloads.contains(&(length, examples)) {
            workloads.push((length, examples));
        }
    }
    workloads
}

/// Trains `shape` in each of these types.
///
/// # Errors
///
/// If the embedded model cannot be unpacked, or the adapters do not fit the shape.
pub fn run(
    shape: Shape,
    types: &[FloatDType],
    selected: &Selected,
    (clock, quick): (Clock, bool),
    guard: &Guard,
    tell: &mut dyn FnMut(Finding),
) -> Result<(), ReportError> {
    let config = shape.config()?;
    for dtype in types {
        for (tokens, examples) in workloads(&config, quick) {
            let what = format!(
                "training {}, {}, {tokens} tokens per example",
                shape.name(),
                device::type_name(*dtype)
            );
            let left_out = |why: String| {
                Finding::LeftOut(LeftOut {
                    what: what.clone(),
                    why,
                })
            };
            if !clock.has(3.0) {
                tell(left_out("no time left".into()));
                continue;
            }
            let checkpointing = match fitting(&config, *dtype, (tokens, examples), selected)? {
                Fitting::Keeps => false,
                Fitting::Recomputes => true,
                Fitting::Not { needed, there } => {
                    tell(left_out(format!(
                        "this needs about {}, the device has {}",
                        human::bytes(needed),
                        human::bytes(there)
                    )));
                    continue;
                }
            };
            let work = Work {
                shape,
                config: &config,
                dtype: *dtype,
                tokens,
                examples,
                checkpointing,
                quick,
            };
            match guard.run(|| work.run(selected, clock)) {
                Ok(Ok(training)) => {
                    tell(Finding::Check(is_finite(&what, &training)));
                    tell(Finding::Training(training));
                }
                Ok(Err(error)) => return Err(error),
                Err(fault) => {
                    tell(Finding::Failed(Failed {
                        what,
                        message: fault.to_string(),
                        lost: fault.kind == FaultKind::Lost,
                    }));
                    if fault.kind != FaultKind::OutOfMemory {
                        return Ok(());
                    }
                }
            }
        }
    }
    Ok(())
}

/// A speed is worthless if losses are not numbers.
fn is_finite(what: &str, training: &Training) -> Check {
    let losses = training.losses.unwrap_or([f64::NAN; 2]);
    let wrong = losses.iter().filter(|loss| !loss.is_finite()).count();
    let note = format!(
        "number of losses that are not numbers; losses {:.4} to {:.4}",
        losses[0], losses[1]
    );
    Check::new(what.into(), wrong as f64, 0.0, note)
}

/// Whether a step fits the device's memory.
#[derive(Debug, PartialEq)]
enum Fitting {
    Keeps,
    Recomputes,
    Not { needed: u64, there: u64 },
}

fn fitting(
    config: &LlamaConfig,
    dtype: FloatDType,
    (tokens, examples): (usize, usize),
    selected: &Selected,
) -> Result<Fitting, ReportError> {
    let there = match selected.backend {
        Backend::Cpu => memory::available(),
        // A software driver uses the machine's memory.
        _ if selected.is_software => memory::available(),
        // If the driver does not report its memory: few cards have more than the machine, and an
        // integrated GPU uses the machine's memory.
        _ => device::hardware(selected)
            .memory_bytes
            .or_else(memory::available),
    };
    let Some(there) = there else {
        return Ok(Fitting::Keeps);
    };
    let peak = |gradient_checkpointing| {
        let options = PlanOptions {
            lora: LoraConfig::default(),
            quantization: Quantization::Bits8,
            float_bytes: DType::from(dtype).size(),
            gradient_checkpointing,
            accumulates: false,
            on_gpu: selected.backend != Backend::Cpu,
            workload: Workload {
                supervised: tokens * examples / 2,
                ..Workload::of_rows(&vec![tokens; examples], 0)
            },
        };
        Plan::new(config, &options).map(|plan| plan.peak())
    };
    let usable = (USABLE * there as f64) as u64;
    Ok(match (peak(false)?, peak(true)?) {
        (keeping, _) if keeping <= usable => Fitting::Keeps,
        (_, recomputing) if recomputing <= usable => Fitting::Recomputes,
        (_, needed) => Fitting::Not { needed, there },
    })
}

/// A measurement.
struct Work<'a> {
    shape: Shape,
    config: &'a LlamaConfig,
    dtype: FloatDType,
    tokens: usize,
    examples: usize,
    checkpointing: bool,
    quick: bool,
}

impl Work<'_> {
    fn run(&self, selected: &Selected, clock: Clock) -> Result<Training, ReportError> {
        let device = &selected.device;
        // Memory of an earlier length is not part of this one.
        device.memory_cleanup();
        let started = Instant::now();
        let stored = device::prepare(selected, self.dtype)?;
        let mut trainee = Trainee::random(self.config, stored, self.checkpointing, device)?;
        let batch = batch(self.examples, self.tokens, self.config.vocab_size);
        let mut losses = Vec::new();
        let warm_up = if self.quick { 1 } else { WARM_UP };
        for _ in 0..warm_up {
            let (next, loss) = trainee.step(&batch, LEARNING_RATE);
            trainee = next;
            losses.push(loss);
            sync(device)?;
        }
        let warm_up_s = started.elapsed().as_secs_f64();
        let (least, most) = if self.quick { (2, 2) } else { STEPS };
        let measuring = Instant::now();
        let mut seconds = Vec::new();
        while seconds.len() < most {
            let enough = seconds.len() >= least && measuring.elapsed() >= LONG_ENOUGH;
            if enough || !seconds.is_empty() && !clock.has(2.0 * seconds[0]) {
                break;
            }
            let started = Instant::now();
            let (next, loss) = trainee.step(&batch, LEARNING_RATE);
            trainee = next;
            sync(device)?;
            seconds.push(started.elapsed().as_secs_f64());
            losses.push(loss);
        }
        let spread = Spread::of(&seconds).ok_or(ReportError::NoTime)?;
        let peak = match device::memory_reserved(device) {
            Some(reserved) => Some(reserved),
            None => memory::resident().map(|memory| memory.peak),
        };
        Ok(Training {
            program: "ours".into(),
            shape: self.shape.name().into(),
            dtype: device::type_name(self.dtype),
            bits: 8,
            tokens_per_example: self.tokens,
            examples_per_step: self.examples,
            tokens_per_s: (self.tokens * self.examples) as f64 / spread.median,
            seconds_per_step: [spread.median, spread.min, spread.max],
            steps: seconds.len(),
            peak_mib: peak.map(human::mib),
            gradient_checkpointing: self.checkpointing,
            losses: Some([losses[0], losses[losses.len() - 1]]),
            warm_up_s: Some(warm_up_s),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_as_many_tokens_whatever_the_examples_length_and_no_longer_ones_than_the_model_takes()
     {
        let small = Shape::Embedded.config().unwrap();
        let limit = small.max_position_embeddings;
        assert_eq!(workloads(&small, false), [(limit, TOKENS_PER_STEP / limit)]);
        let large = Shape::Llama8B.config().unwrap();
        for (tokens, examples) in workloads(&large, false) {
            assert_eq!(tokens * examples, TOKENS_PER_STEP);
        }
    }

    #[test]
    fn a_loss_that_is_no_number_is_a_check_that_fails() {
        let selected = device::select(Backend::Cpu).unwrap();
        let guard = Guard::install();
        let clock = Clock::new(Duration::from_secs(60));
        let mut found = Vec::new();
        let types = [FloatDType::F32];
        let quick = (clock, true);
        run(
            Shape::Embedded,
            &types,
            &selected,
            quick,
            &guard,
            &mut |it| found.push(it),
        )
        .unwrap();
        let [Finding::Check(check), Finding::Training(training)] = &found[..] else {
            panic!("{found:?}");
        };
        assert!(check.ok && training.tokens_per_s > 0.0, "{found:?}");
        let mut wrong = training.clone();
        wrong.losses = Some([1.0, f64::NAN]);
        assert!(!is_finite("x", &wrong).ok);
    }
}
