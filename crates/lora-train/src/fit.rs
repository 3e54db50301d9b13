//! What of a configuration fits the memory there is: `batch_size = "auto"`, `gradient_checkpointing =
//! "auto"`, micro-batches computed together, and a refusal before any weight is loaded.

use burn::tensor::{DType, FloatDType};
use llama_burn::LlamaConfig;
use lora_core::{LoraError, Quantization};

use crate::checkpoint::Division;
use crate::plan::{Plan, PlanOptions, Workload};
use crate::prepare::quantization;
use data::{Data, Order, Prefixes};
use device::{Backend, Selected};
use run_config::{BatchSize, Checkpointing, Config};
use terminal::human;

/// Activations are kept rather than recomputed where the run then takes at most this share of the
/// memory that is free: other programs want some too.
const COMFORTABLE: f64 = 0.5;

/// As [`COMFORTABLE`] on a GPU, whose memory others seldom want in the middle of a run; the rest is for what a
/// prediction may be off by. What is left to the driver is not counted as free in the first place.
const COMFORTABLE_ON_GPU: f64 = 0.9;

/// As [`COMFORTABLE`] where nobody tells what is free: a run that no machine minds.
const SMALL: u64 = 1 << 30;

/// A run that is predicted to take more than this share of the free memory is refused. The rest is
/// for what a prediction may be off by.
const AT_MOST: f64 = 0.95;

/// Micro-batches looked at for the heaviest; of longer runs, the first ones.
const LOOKED_AT: usize = 50_000;

/// A run as it will be.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an update.
    pub gradient_accumulation_steps: usize,
    /// Whether activations are recomputed.
    pub gradient_checkpointing: bool,
    /// Whether common beginnings are computed once.
    pub prefixes: Prefixes,
    /// What it will need.
    pub plan: Plan,
    /// Bytes of the largest tensor that grows with the rows of a micro-batch.
    pub largest_activation: u64,
}

/// Why a run cannot be.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// The adapters' configuration.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// Too little memory.
    #[error(
        "this run needs about {needed} of memory and {available} {whose}: {what} is the most of it. {advice}",
        needed = human::bytes(*needed),
        available = human::bytes(*available),
    )]
    TooLarge {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that there are for it.
        available: u64,
        /// What these are, in words that continue "… GiB".
        whose: &'static str,
        /// The largest part.
        what: String,
        /// Settings that would fit, or that none would.
        advice: String,
    },
    /// One tensor is too large, whatever the memory.
    #[error(
        "{what} takes {needed} in one tensor and this device's buffers end at {limit}. {advice}",
        needed = human::bytes(*needed),
        limit = human::bytes(*limit),
    )]
    Buffer {
        /// The tensor.
        what: String,
        /// Its bytes.
        needed: u64,
        /// The largest buffer.
        limit: u64,
        /// What would fit.
        advice: &'static str,
    },
}

/// Decides what `config` leaves open and checks that it fits.
///
/// # Errors
///
/// If it does not, with the settings that would.
pub fn fit(
    config: &Config,
    model: &LlamaConfig,
    selected: &Selected,
    dtype: FloatDType,
    data: &Data,
) -> Result<Fit, FitError> {
    Search::new(config, model, selected, dtype, data).run()
}

/// As [`fit`] for a run that goes on: it divides its rows as before, because sums of floats depend on that in
/// their last bits. Where that does not fit any more, as on another machine, it is decided anew, and the
/// second value says so.
///
/// # Errors
///
/// As [`fit`].
pub fn refit(
    config: &Config,
    model: &LlamaConfig,
    selected: &Selected,
    dtype: FloatDType,
    data: &Data,
    before: Division,
) -> Result<(Fit, bool), FitError> {
    let search = Search::new(config, model, selected, dtype, data);
    // Recomputing changes no bit, so a word of the user's counts.
    let checkpointing = match config.gradient_checkpointing {
        Checkpointing::On => true,
        Checkpointing::Off => false,
        Checkpointing::Auto => before.gradient_checkpointing,
    };
    let rows = before.batch_size.max(1);
    let steps = before.gradient_accumulation_steps.max(1);
    let mut fit = search.at(rows, steps, checkpointing)?;
    if !before.share_prefixes {
        fit.prefixes = Prefixes::Apart;
    }
    if search.binds(&fit) && search.fits(&fit.plan) {
        Ok((fit, false))
    } else {
        Ok((search.run()?, true))
    }
}

impl Fit {
    /// The same update in smaller micro-batches, for a device whose memory is too small; without that, with
    /// activations recomputed where the configuration leaves it open. `None` where neither is possible.
    pub fn smaller(&self, config: &Config) -> Option<Self> {
        let rows = self.batch_size;
        // The largest divisor up to the half, so that an update keeps its rows.
        let fewer = (1..=rows / 2)
            .rev()
            .find(|fewer| rows.is_multiple_of(*fewer));
        match fewer {
            Some(fewer) => Some(Self {
                batch_size: fewer,
                gradient_accumulation_steps: self.gradient_accumulation_steps * (rows / fewer),
                ..self.clone()
            }),
            None if !self.gradient_checkpointing
                && config.gradient_checkpointing == Checkpointing::Auto =>
            {
                Some(Self {
                    gradient_checkpointing: true,
                    ..self.clone()
                })
            }
            None => None,
        }
    }
}

/// Whether a run computes common prompt prefixes once. Dropout draws a mask for each example: shared, they would have
/// one. Nor are prefixes shared where an example's length changes what its tokens are rotated by.
pub fn prefixes(config: &Config, model: &LlamaConfig, data: &Data) -> Prefixes {
    let rows = data.train.rows.iter().chain(&data.validation.rows);
    let longest = rows.map(|row| row.ids.len()).max().unwrap_or(0);
    if config.share_prefixes && config.lora_dropout == 0.0 && !model.rotates_by_length(longest) {
        Prefixes::Shared
    } else {
        Prefixes::Apart
    }
}

/// Whether micro-batches of an update may be computed together. Dropout's masks belong to a micro-batch,
/// and a limit of tokens was asked for.
fn merges(config: &Config) -> bool {
    config.merge_micro_batches && config.lora_dropout == 0.0 && config.max_batch_tokens.is_none()
}

/// Whether a run of this peak may keep its activations, by `gradient_checkpointing = "auto"`.
pub fn is_comfortable(peak: u64, available: Option<u64>, on_gpu: bool) -> bool {
    let share = if on_gpu {
        COMFORTABLE_ON_GPU
    } else {
        COMFORTABLE
    };
    match available {
        Some(available) => peak as f64 <= share * available as f64,
        None => peak < SMALL,
    }
}

struct Search<'a> {
    config: &'a Config,
    model: &'a LlamaConfig,
    data: &'a Data,
    float_bytes: usize,
    on_gpu: bool,
    available: Option<u64>,
    /// The largest buffer of the device.
    limit: Option<u64>,
}

impl<'a> Search<'a> {
    fn new(
        config: &'a Config,
        model: &'a LlamaConfig,
        selected: &Selected,
        dtype: FloatDType,
        data: &'a Data,
    ) -> Self {
        Self {
            config,
            model,
            data,
            float_bytes: DType::from(dtype).size(),
            on_gpu: selected.backend != Backend::Cpu,
            // Where nobody tells, the run itself finds out.
            available: device::device_memory(selected, config.device_memory)
                .map(|memory| memory.usable(selected.backend)),
            limit: device::largest_buffer(selected),
        }
    }

    fn run(&self) -> Result<Fit, FitError> {
        self.check_weights()?;
        let auto = self.config.gradient_checkpointing == Checkpointing::Auto;
        let choices: &[bool] = match self.config.gradient_checkpointing {
            Checkpointing::On => &[true],
            Checkpointing::Off => &[false],
            Checkpointing::Auto => &[false, true],
        };
        // Micro-batches are small to save memory. Where there is plenty, more rows at once share more
        // beginnings and unpack the weights less often, for the same update.
        if choices.contains(&false) {
            for (rows, steps) in self.mergers() {
                let fit = self.at(rows, steps, false)?;
                if self.is_comfortable(&fit) {
                    return Ok(fit);
                }
            }
        }
        let mut smallest: Option<Fit> = None;
        // Recomputing costs more time than smaller micro-batches do, so those are tried first.
        for checkpointing in choices {
            for (rows, steps) in self.divisions() {
                let fit = self.at(rows, steps, *checkpointing)?;
                let is_good = if auto && !checkpointing {
                    self.is_comfortable(&fit)
                } else {
                    self.binds(&fit) && self.fits(&fit.plan)
                };
                if is_good {
                    return Ok(fit);
                }
                if smallest
                    .as_ref()
                    .is_none_or(|smallest| fit.plan.resident_peak() < smallest.plan.resident_peak())
                {
                    smallest = Some(fit);
                }
            }
        }
        match smallest {
            Some(fit) if !self.binds(&fit) => Err(FitError::Buffer {
                what: format!("a micro-batch of {} rows", fit.batch_size),
                needed: fit.largest_activation,
                limit: self.limit.unwrap_or(0),
                advice: "A smaller batch_size with more gradient_accumulation_steps, or a smaller max_seq_len, makes it \
                    smaller",
            }),
            Some(fit) if self.fits(&fit.plan) => Ok(fit),
            Some(fit) => Err(self.refuse(&fit)?),
            // There is always a division.
            None => Ok(self.at(self.config.batch_size.rows(), 1, true)?),
        }
    }

    fn is_comfortable(&self, fit: &Fit) -> bool {
        let peak = fit.plan.resident_peak();
        self.binds(fit) && is_comfortable(peak, self.available, self.on_gpu)
    }

    /// Whether the device has buffers for the activations. A driver refuses larger ones however much memory is
    /// free.
    fn binds(&self, fit: &Fit) -> bool {
        self.limit
            .is_none_or(|limit| fit.largest_activation <= limit)
    }

    /// As [`binds`](Self::binds) for the weights: on a GPU each is unpacked into one buffer for its product.
    fn check_weights(&self) -> Result<(), FitError> {
        let linears = self.model.layer_linears();
        let largest = linears
            .iter()
            .max_by_key(|(_, d_in, d_out, _)| d_in * d_out);
        let (Some(limit), Some((name, d_in, d_out, _))) = (self.limit, largest) else {
            return Ok(());
        };
        let needed = (d_in * d_out * self.float_bytes) as u64;
        if needed <= limit {
            Ok(())
        } else {
            Err(FitError::Buffer {
                what: format!("the weight of {name}, unpacked for a product,"),
                needed,
                limit,
                advice: "compute_dtype = \"f16\", where the device has it, halves it; --backend cpu, or another GPU, \
                has no such limit",
            })
        }
    }

    /// Rows of a micro-batch and micro-batches of an update, the largest micro-batches first.
    fn divisions(&self) -> Vec<(usize, usize)> {
        let steps = self.config.gradient_accumulation_steps;
        match self.config.batch_size {
            BatchSize::Rows(rows) => vec![(rows, steps)],
            BatchSize::Auto => {
                let all = BatchSize::Auto.rows() * steps;
                let rows = (1..=all).rev().filter(|rows| all.is_multiple_of(*rows));
                rows.map(|rows| (rows, all / rows)).collect()
            }
        }
    }

    /// As [`divisions`](Self::divisions), with larger micro-batches than the configuration's.
    fn mergers(&self) -> Vec<(usize, usize)> {
        let config = self.config;
        let steps = config.gradient_accumulation_steps;
        match config.batch_size {
            BatchSize::Rows(rows) if merges(config) => (1..steps)
                .filter(|fewer| steps.is_multiple_of(*fewer))
                .map(|fewer| (rows.saturating_mul(steps / fewer), fewer))
                .collect(),
            _ => Vec::new(),
        }
    }

    fn fits(&self, plan: &Plan) -> bool {
        self.available
            .is_none_or(|available| plan.resident_peak() as f64 <= AT_MOST * available as f64)
    }

    /// The run with these settings.
    fn at(&self, rows: usize, steps: usize, checkpointing: bool) -> Result<Fit, LoraError> {
        let prefixes = prefixes(self.config, self.model, self.data);
        let mut heaviest: Option<Plan> = None;
        let mut tokens = 0;
        for workload in self.heaviest(rows, steps, prefixes) {
            tokens = tokens.max(workload.tokens);
            let plan = Plan::new(self.model, &self.options(workload, steps, checkpointing))?;
            if heaviest
                .as_ref()
                .is_none_or(|heaviest| heaviest.peak() < plan.peak())
            {
                heaviest = Some(plan);
            }
        }
        let plan = match heaviest {
            Some(plan) => plan,
            None => Plan::new(
                self.model,
                &self.options(Workload::of_rows(&[], 0), steps, checkpointing),
            )?,
        };
        Ok(Fit {
            batch_size: rows,
            gradient_accumulation_steps: steps,
            gradient_checkpointing: checkpointing,
            prefixes,
            plan,
            largest_activation: (tokens * self.widest() * self.float_bytes) as u64,
        })
    }

    /// The widest output of a linear module.
    fn widest(&self) -> usize {
        let linears = self.model.layer_linears();
        let widths = linears.iter().map(|(_, _, d_out, _)| *d_out);
        widths.max().unwrap_or(0)
    }

    fn options(&self, workload: Workload, steps: usize, checkpointing: bool) -> PlanOptions {
        PlanOptions {
            lora: self.config.lora_config(),
            quantization: quantization(self.config),
            float_bytes: self.float_bytes,
            gradient_checkpointing: checkpointing,
            accumulates: steps > 1 || self.config.max_batch_tokens.is_some(),
            on_gpu: self.on_gpu,
            workload,
        }
    }

    /// Of the micro-batches that the run will take, those with the most tokens, with the most
    /// supervised positions, and with the longest row. The order is known, so nothing is guessed.
    fn heaviest(&self, rows: usize, steps: usize, prefixes: Prefixes) -> Vec<Workload> {
        let train = &self.data.train;
        let config = self.config;
        let order = Order::new(config.seed, train, rows, steps, config.max_batch_tokens);
        let total = order.total_steps(config.num_epochs, config.max_steps);
        let batches = (0..total).flat_map(|step| order.step(step)).take(LOOKED_AT);
        let (mut tokens, mut supervised, mut longest) = (None, None, None);
        let keep = |best: &mut Option<Workload>, now: Workload, size: fn(&Workload) -> usize| {
            if best.as_ref().is_none_or(|best| size(best) < size(&now)) {
                *best = Some(now);
            }
        };
        for indices in batches {
            let workload = Workload::of_batch(&train.batch(&indices, prefixes));
            keep(&mut tokens, workload, |workload| workload.tokens);
            keep(&mut supervised, workload, |workload| workload.supervised);
            keep(&mut longest, workload, |workload| workload.longest_row);
        }
        [tokens, supervised, longest]
            .into_iter()
            .flatten()
            .collect()
    }

    /// The error, with what would fit.
    fn refuse(&self, smallest: &Fit) -> Result<FitError, LoraError> {
        let plan = &smallest.plan;
        let parts = plan.base.iter().chain(&plan.adapters).chain(&plan.step);
        let largest = parts.max_by_key(|part| part.bytes);
        let mut advice = Vec::new();
        let config = self.config;
        let rows = smallest.batch_size;
        let steps = smallest.gradient_accumulation_steps;
        let mut offer = |setting: String, plan: Plan| {
            if self.fits(&plan) {
                advice.push(format!(
                    "{setting} ({})",
                    human::bytes(plan.resident_peak())
                ));
            }
        };
        if !smallest.gradient_checkpointing {
            let setting = "gradient_checkpointing = \"on\"".to_string();
            offer(setting, self.at(rows, steps, true)?.plan);
        }
        if rows > 1 {
            let alone = self.at(1, rows * steps, true)?.plan;
            let setting = "batch_size = \"auto\" with gradient_checkpointing = \"auto\"";
            offer(setting.to_string(), alone);
        }
        if quantization(config) == Quantization::None {
            let mut quantized = config.clone();
            quantized.quant_bits = 8;
            let search = Search {
                config: &quantized,
                ..*self
            };
            offer(
                "quant_bits = 8".to_string(),
                search.at(rows, steps, true)?.plan,
            );
        }
        let advice = if advice.is_empty() {
            "No setting that leaves the result as it is would fit: a smaller model, shorter rows \
        (max_seq_len), fewer target_modules or a smaller lora_r would need less"
                .to_string()
        } else {
            format!("This would fit: {}", advice.join("; "))
        };
        Ok(FitError::TooLarge {
            needed: plan.resident_peak(),
            available: self.available.unwrap_or(0),
            whose: match (self.on_gpu, self.config.device_memory) {
                (true, None) => "of this device's memory may be used",
                (true, Some(_)) => "of device_memory may be used",
                (false, Some(_)) => "are what device_memory allows",
                (false, None) => "are free",
            },
            what: largest.map_or_else(String::new, |part| part.name.clone()),
            advice,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_nobody_tells_what_is_free_only_small_runs_keep_their_activations() {
        assert!(is_comfortable(500 << 20, None, false));
        assert!(!is_comfortable(9 << 30, None, true));
        assert!(is_comfortable(9 << 30, Some(20 << 30), false));
        assert!(!is_comfortable(500 << 20, Some(600 << 20), false));
        assert!(is_comfortable(500 << 20, Some(600 << 20), true));
    }

    #[test]
    fn smaller_micro_batches_keep_an_update_s_rows_and_then_activations_go() {
        let config = Config::load(None, None, &[]).unwrap();
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 8,
            "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        });
        let model = LlamaConfig::from_json(json.as_object().unwrap()).unwrap();
        let options = PlanOptions {
            lora: config.lora_config(),
            quantization: Quantization::None,
            float_bytes: 4,
            gradient_checkpointing: false,
            accumulates: false,
            on_gpu: false,
            workload: Workload::of_rows(&[], 0),
        };
        let fit = |batch_size| Fit {
            batch_size,
            gradient_accumulation_steps: 2,
            gradient_checkpointing: false,
            prefixes: Prefixes::Shared,
            plan: Plan::new(&model, &options).unwrap(),
            largest_activation: 0,
        };
        let divided = |rows| {
            let smaller = fit(rows).smaller(&config).unwrap();
            (smaller.batch_size, smaller.gradient_accumulation_steps)
        };
        assert_eq!(
            (divided(8), divided(9), divided(5)),
            ((4, 4), (3, 6), (1, 10))
        );
        let alone = fit(1).smaller(&config).unwrap();
        assert!(alone.gradient_checkpointing && alone.batch_size == 1);
        assert_eq!(alone.smaller(&config), None);
    }
}
