//! The search for what fits: micro-batches and gradient checkpointing, the fastest first.

use burn::tensor::{DType, FloatDType};
use llama_burn::LlamaConfig;
use lora_core::{LoraError, Quantization};

use super::{Fit, FitError, is_comfortable, prefixes};
use crate::plan::{Plan, PlanOptions, Workload};
use crate::prepare::quantization;
use data::{Data, Order, Prefixes};
use device::{Backend, Selected};
use run_config::{BatchSize, Checkpointing, Config};
use terminal::human;

/// A run that is predicted to take more than this share of the free memory is refused. The rest is
/// for errors of the prediction.
const AT_MOST: f64 = 0.95;

/// The search for the largest micro-batch looks at this many; of longer runs, at the first ones.
const LOOKED_AT: usize = 50_000;

/// Whether micro-batches of an update may be computed together. Not with dropout, whose masks
/// belong to a micro-batch, and not with a configured limit of tokens.
fn merges(config: &Config) -> bool {
    config.merge_micro_batches && config.lora_dropout == 0.0 && config.max_batch_tokens.is_none()
}

/// The settings that a configuration leaves open, tried in the order of their speed.
pub(super) struct Search<'a> {
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
    pub(super) fn new(
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
            // If the memory is unknown, the run itself finds out.
            available: device::device_memory(selected, config.device_memory)
                .map(|memory| memory.usable(selected.backend)),
            limit: device::largest_buffer(selected),
        }
    }

    pub(super) fn run(&self) -> Result<Fit, FitError> {
        self.check_weights()?;
        let auto = self.config.gradient_checkpointing == Checkpointing::Auto;
        let choices: &[bool] = match self.config.gradient_checkpointing {
            Checkpointing::On => &[true],
            Checkpointing::Off => &[false],
            Checkpointing::Auto => &[false, true],
        };
        // Small micro-batches save memory. With enough memory, more examples at once share more
        // prefixes and dequantize the weights less often, for the same update.
        if choices.contains(&false) {
            for (rows, steps) in self.mergers() {
                let fit = self.at(rows, steps, false)?;
                if self.is_comfortable(&fit) {
                    return Ok(fit);
                }
            }
        }
        let mut smallest: Option<Fit> = None;
        // Recomputing costs more time than smaller micro-batches, so those are tried first.
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
                what: format!("a micro-batch of {} examples", fit.batch_size),
                needed: fit.largest_activation,
                limit: self.limit.unwrap_or(0),
                advice: "A smaller batch_size with more gradient_accumulation_steps, or a smaller max_seq_len, makes it \
                    smaller",
            }),
            Some(fit) if self.fits(&fit.plan) => Ok(fit),
            Some(fit) => Err(self.refuse(&fit)?),
            // At least one division exists.
            None => Ok(self.at(self.config.batch_size.rows(), 1, true)?),
        }
    }

    fn is_comfortable(&self, fit: &Fit) -> bool {
        let peak = fit.plan.resident_peak();
        self.binds(fit) && is_comfortable(peak, self.available, self.on_gpu)
    }

    /// Whether the device has buffers for the activations. A driver refuses larger ones however
    /// much memory is free.
    pub(super) fn binds(&self, fit: &Fit) -> bool {
        self.limit
            .is_none_or(|limit| fit.largest_activation <= limit)
    }

    /// As [`binds`](Self::binds) for the weights: on a GPU each is dequantized into one buffer for
    /// its product.
    fn check_weights(&self) -> Result<(), FitError> {
        let linears = self.model.layer_linears();
        let largest = linears.iter().max_by_key(|linear| linear.elements());
        let (Some(limit), Some(linear)) = (self.limit, largest) else {
            return Ok(());
        };
        let needed = (linear.elements() * self.float_bytes) as u64;
        if needed <= limit {
            Ok(())
        } else {
            Err(FitError::Buffer {
                what: format!("the dequantized weight of {}", linear.name),
                needed,
                limit,
                advice: "compute_dtype = \"f16\", where the device has it, halves it; --backend cpu, or another GPU, \
                has no such limit",
            })
        }
    }

    /// Examples per micro-batch and micro-batches per update, the largest micro-batches first.
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

    /// As [`divisions`](Self::divisions), with larger micro-batches than configured.
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

    pub(super) fn fits(&self, plan: &Plan) -> bool {
        self.available
            .is_none_or(|available| plan.resident_peak() as f64 <= AT_MOST * available as f64)
    }

    /// The run with these settings.
    pub(super) fn at(
        &self,
        rows: usize,
        steps: usize,
        checkpointing: bool,
    ) -> Result<Fit, LoraError> {
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
        let widths = linears.iter().map(|linear| linear.d_out);
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

    /// Of the micro-batches of the run: the one with the most tokens, the one with the most tokens
    /// in the loss, and the one with the longest example. The order of the examples is known, so
    /// nothing is estimated.
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

    /// The error, with the settings that would fit.
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
            "No setting fits that leaves the result unchanged: a smaller model, shorter examples \
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
                (false, Some(_)) => "are allowed by device_memory",
                (false, None) => "are free",
            },
            what: largest.map_or_else(String::new, |part| part.name.clone()),
            advice,
        })
    }
}
