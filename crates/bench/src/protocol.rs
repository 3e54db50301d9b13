//! What a contender is told and what it answers.
//!
//! Every contender is a process of its own, so that its peak memory is its own. It is started with the
//! path of a [`WorkerSpec`] in JSON, reads one [`Command`] a line on standard input and answers each with
//! one [`Answer`] a line on standard output. `peft_worker.py` speaks the same.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything that a contender needs to know before its first command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// How it trains.
    pub contender: Contender,
    /// The device, as `--device` names it; never `auto`.
    pub device: String,
    /// A folder with `config.json`, and with weights unless they are random.
    pub model: PathBuf,
    /// Fill the model with random numbers instead of the folder's weights.
    pub random_weights: bool,
    /// The adapter to start from, in PEFT's layout.
    pub adapter: PathBuf,
    /// Of AdamW, without weight decay, warm-up or clipping.
    pub learning_rate: f64,
    /// The rows that the steps use.
    pub rows: Vec<Row>,
    /// The rows' indices of every micro-batch of every optimizer step.
    pub steps: Vec<Step>,
}

/// The row indices of each micro-batch of an optimizer step.
pub type Step = Vec<Vec<usize>>;

/// A tokenized row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Prompt, target and end token.
    pub ids: Vec<u32>,
    /// How many of them are the prompt, at least 1; the loss is on the others.
    pub prompt_tokens: usize,
}

/// Who trains, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Contender {
    /// This program.
    Ours(OursSettings),
    /// Burn's own `apply_qlora` with 8 bits in blocks of 32.
    BurnQlora,
    /// PEFT on PyTorch.
    Peft(PeftSettings),
}

/// What can be set of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OursSettings {
    /// 4, 8, or 16 for a base that is not quantized.
    pub quant_bits: u8,
    /// `auto`, `f32`, `bf16` or `f16`.
    pub compute_dtype: String,
    /// Whether layers run again in the backward pass; `None` decides as a training run does.
    pub gradient_checkpointing: Option<bool>,
    /// Whether a beginning that rows of a micro-batch share is computed once.
    pub share_prefixes: bool,
    /// The plain way: the whole model on Burn's tape, which knows no checkpointing.
    pub in_graph: bool,
}

/// What can be set of PEFT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeftSettings {
    /// PyTorch's name of the type that weights are stored and computed in.
    pub dtype: String,
    /// 8: bitsandbytes' `LLM.int8()`; else 16.
    pub bits: u8,
}

/// One line to a contender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Say what the device is.
    Describe,
    /// Measure what the device can do at most.
    Floors {
        /// Products `[m, k] × [k, n]` to measure.
        products: Vec<Product>,
        /// Bytes of the buffer that is read and copied.
        buffer_bytes: usize,
        /// Measurements of each.
        repeats: usize,
    },
    /// Load the model and the adapter.
    Load,
    /// Train on these steps of the specification.
    Round {
        /// The first of them.
        first_step: usize,
        /// How many.
        steps: usize,
    },
    /// End.
    Quit,
}

/// A matrix product to measure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Product {
    /// What it is in the model.
    pub name: String,
    /// `[m, k, n]`.
    pub shape: [usize; 3],
}

/// One line from a contender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Command::Describe`].
    Device(DeviceDescription),
    /// To [`Command::Floors`].
    Floors(Floors),
    /// To [`Command::Load`].
    Loaded(Loaded),
    /// To [`Command::Round`].
    Round(Round),
    /// To any; the process then ends.
    Error {
        /// What went wrong, for people.
        message: String,
    },
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// The backend's word; never `auto`.
    pub backend: String,
    /// As the screen shows it.
    pub name: String,
    /// Whether its memory is not the process's.
    pub on_gpu: bool,
    /// The types that a training run can compute in, the default first.
    pub compute_dtypes: Vec<String>,
    /// Why there is no bf16 where there is none.
    pub no_bf16: Option<String>,
}

/// What the device can do at most.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Floors {
    /// Products, in each type that the device computes in.
    pub products: Vec<ProductRate>,
    /// Memory.
    pub bandwidths: Vec<Bandwidth>,
}

/// How fast a product was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProductRate {
    /// Which.
    #[serde(flatten)]
    pub product: Product,
    /// `f32` or `bf16`.
    pub dtype: String,
    /// 10⁹ multiplications and additions per second, each measurement.
    pub gflops: Vec<f64>,
}

/// How fast memory was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// `read` or `copy`.
    pub name: String,
    /// Bytes of the buffer.
    pub bytes: usize,
    /// 10⁹ bytes moved per second, each measurement; a copy counts what is read and what is written.
    pub gb_per_s: Vec<f64>,
}

/// A model is ready.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Loaded {
    /// What was loaded, for people: precision, checkpointing, versions.
    pub description: String,
    /// Seconds it took.
    pub seconds: f64,
    /// Memory so far.
    pub memory: PeakMemory,
}

/// What training on some steps took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Seconds.
    pub seconds: f64,
    /// Tokens of the rows, each counted in full whatever is shared.
    pub useful_tokens: u64,
    /// Tokens that went through the layers: with padding, without what was shared.
    pub computed_tokens: u64,
    /// The mean loss a supervised token of each step, before its update.
    pub losses: Vec<f64>,
    /// Where the seconds went.
    pub phases: Phases,
    /// Memory so far.
    pub memory: PeakMemory,
}

/// Seconds by part of a step. A part that cannot be told apart is none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Phases {
    /// Putting rows together.
    pub data: f64,
    /// Forward, loss and backward together.
    pub pass: f64,
    /// The layers, forward.
    pub forward: Option<f64>,
    /// Final norm, head and cross entropy: forward, and backward where it is done at once.
    pub loss: Option<f64>,
    /// The layers, backward.
    pub backward: Option<f64>,
    /// AdamW, and making its gradients from sums.
    pub optimizer: f64,
}

impl Phases {
    /// Adds another step's seconds.
    pub fn add(&mut self, other: Self) {
        let add = |sum: &mut Option<f64>, seconds: Option<f64>| {
            if let Some(seconds) = seconds {
                *sum = Some(sum.unwrap_or(0.0) + seconds);
            }
        };
        self.data += other.data;
        self.pass += other.pass;
        add(&mut self.forward, other.forward);
        add(&mut self.loss, other.loss);
        add(&mut self.backward, other.backward);
        self.optimizer += other.optimizer;
    }
}

/// The most memory that the process has had, in bytes; none where the system does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PeakMemory {
    /// Resident: Linux's `VmHWM`.
    pub resident: Option<u64>,
    /// On a GPU, what the framework's allocator has reserved.
    pub device: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, from_str, json, to_string, to_value};

    fn round_trip<T>(value: &T)
    where
        T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug,
    {
        let line = to_string(value).unwrap();
        assert!(!line.contains('\n'), "one line: {line}");
        assert_eq!(&from_str::<T>(&line).unwrap(), value);
    }

    #[test]
    fn commands_and_answers_read_back_as_they_were_written() {
        let product = Product {
            name: "square".into(),
            shape: [2, 3, 4],
        };
        for command in [
            Command::Describe,
            Command::Floors {
                products: vec![product.clone()],
                buffer_bytes: 1,
                repeats: 2,
            },
            Command::Load,
            Command::Round {
                first_step: 3,
                steps: 5,
            },
            Command::Quit,
        ] {
            round_trip(&command);
        }
        round_trip(&Answer::Floors(Floors {
            products: vec![ProductRate {
                product,
                dtype: "f32".into(),
                gflops: vec![1.5],
            }],
            bandwidths: Vec::new(),
        }));
        round_trip(&Answer::Error {
            message: "two\nlines".into(),
        });
        for contender in [
            Contender::BurnQlora,
            Contender::Peft(PeftSettings {
                dtype: "bfloat16".into(),
                bits: 16,
            }),
        ] {
            round_trip(&contender);
        }
    }

    #[test]
    fn the_words_are_those_that_the_python_worker_uses() {
        let round = to_value(Command::Round {
            first_step: 3,
            steps: 5,
        });
        assert_eq!(
            round.unwrap(),
            json!({"command": "round", "first_step": 3, "steps": 5})
        );
        assert_eq!(to_value(Command::Load).unwrap(), json!({"command": "load"}));
        let answer: Answer = serde_json::from_value(json!({
            "answer": "round", "seconds": 2.0, "useful_tokens": 10, "computed_tokens": 12,
            "losses": [1.0], "memory": {"resident": 5, "device": Value::Null},
            "phases": {"data": 0.1, "pass": 1.8, "forward": 0.6, "loss": null, "backward": 1.2,
                "optimizer": 0.1},
        }))
        .unwrap();
        let Answer::Round(round) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(round.memory.resident, Some(5));
        assert_eq!((round.phases.forward, round.phases.loss), (Some(0.6), None));
    }

    #[test]
    fn a_part_that_no_step_tells_stays_unknown() {
        let mut sum = Phases::default();
        let step = Phases {
            pass: 1.0,
            forward: Some(0.25),
            ..Phases::default()
        };
        sum.add(step);
        sum.add(step);
        assert_eq!((sum.pass, sum.forward, sum.loss), (2.0, Some(0.5), None));
    }
}
