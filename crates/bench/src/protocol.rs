//! The commands to a contender and its answers.
//!
//! Every contender is a process of its own, so that its peak memory is its own. It is started with
//! the path of a [`WorkerSpec`] in JSON, reads one [`Command`] per line on standard input and
//! answers each with one [`Answer`] per line on standard output. `peft_worker.py` uses the same
//! protocol.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The specification of a contender, known before its first command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// How it trains.
    pub contender: Contender,
    /// The device, as in `--device`; never `auto`.
    pub device: String,
    /// A folder with `config.json`, and with weights unless they are random.
    pub model: PathBuf,
    /// Fill the model with random numbers instead of the folder's weights.
    pub random_weights: bool,
    /// The adapter to start from, in PEFT's layout.
    pub adapter: PathBuf,
    /// The learning rate of AdamW, without weight decay, warm-up or clipping.
    pub learning_rate: f64,
    /// The examples that the steps use.
    pub rows: Vec<Row>,
    /// The indices of the examples of every micro-batch of every optimizer step.
    pub steps: Vec<Step>,
}

/// The indices of the examples of each micro-batch of an optimizer step.
pub type Step = Vec<Vec<usize>>;

/// A tokenized example.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Prompt, target and end token.
    pub ids: Vec<u32>,
    /// The length of the prompt, at least 1; the other tokens are in the loss.
    pub prompt_tokens: usize,
}

/// The program that trains, with its settings.
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

/// The settings of this trainer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OursSettings {
    /// 4, 8, or 16 for a base that is not quantized.
    pub quant_bits: u8,
    /// `auto`, `f32`, `bf16` or `f16`.
    pub compute_dtype: String,
    /// Whether gradient checkpointing is on; `None` decides as a training run does.
    pub gradient_checkpointing: Option<bool>,
    /// Whether a prefix that examples of a micro-batch share is computed once.
    pub share_prefixes: bool,
    /// Whether to train through Burn's autodiff graph over the whole model, which has no gradient
    /// checkpointing.
    pub in_graph: bool,
}

/// The settings of PEFT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeftSettings {
    /// PyTorch's name of the type that weights are stored and computed in.
    pub dtype: String,
    /// 8: bitsandbytes' `LLM.int8()`; else 16.
    pub bits: u8,
}

/// A command to a contender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Describe the device.
    Describe,
    /// Measure the device's roofline.
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
        /// Their number.
        steps: usize,
    },
    /// End.
    Quit,
}

/// A matrix product to measure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Product {
    /// Its name in the model.
    pub name: String,
    /// `[m, k, n]`.
    pub shape: [usize; 3],
}

/// A contender's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// The answer to [`Command::Describe`].
    Device(DeviceDescription),
    /// The answer to [`Command::Floors`].
    Floors(Floors),
    /// The answer to [`Command::Load`].
    Loaded(Loaded),
    /// The answer to [`Command::Round`].
    Round(Round),
    /// An error, in answer to any command; the process then ends.
    Error {
        /// The message for the user.
        message: String,
    },
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// The backend's name; never `auto`.
    pub backend: String,
    /// Its name on the screen.
    pub name: String,
    /// Whether its memory is separate from the process's.
    pub on_gpu: bool,
    /// The types that a training run can compute in, the default first.
    pub compute_dtypes: Vec<String>,
    /// Why bf16 is not available, if so.
    pub no_bf16: Option<String>,
}

/// The device's roofline.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Floors {
    /// Products, in each type that the device computes in.
    pub products: Vec<ProductRate>,
    /// Memory.
    pub bandwidths: Vec<Bandwidth>,
}

/// The measured rate of a product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProductRate {
    /// The product.
    #[serde(flatten)]
    pub product: Product,
    /// `f32` or `bf16`.
    pub dtype: String,
    /// 10⁹ multiplications and additions per second, for each measurement.
    pub gflops: Vec<f64>,
}

/// The measured bandwidth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// `read` or `copy`.
    pub name: String,
    /// Bytes of the buffer.
    pub bytes: usize,
    /// 10⁹ bytes per second, for each measurement; a copy counts reads and writes.
    pub gb_per_s: Vec<f64>,
}

/// A model is loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Loaded {
    /// A description for the user: precision, checkpointing, versions.
    pub description: String,
    /// Seconds it took.
    pub seconds: f64,
    /// Memory so far.
    pub memory: PeakMemory,
}

/// The measurements of some steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Seconds.
    pub seconds: f64,
    /// Tokens of the examples, each counted in full even if prefixes are shared.
    pub useful_tokens: u64,
    /// Tokens that went through the layers: with padding, shared prefixes once.
    pub computed_tokens: u64,
    /// The mean loss per token in the loss of each step, before its update.
    pub losses: Vec<f64>,
    /// The seconds by part.
    pub phases: Phases,
    /// Memory so far.
    pub memory: PeakMemory,
}

/// Seconds by part of a step; `None` for a part that cannot be measured on its own.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Phases {
    /// Making batches of examples.
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

/// Peak memory in bytes; `None` if the system does not report it.
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
