//! How a configuration fits the memory: `batch_size = "auto"`, `gradient_checkpointing = "auto"`,
//! micro-batches computed together, and the refusal of a run before any weight is loaded.
//!
//! This file holds the result, and `search.rs` the search for it.

mod search;

use burn::tensor::FloatDType;
use llama_burn::LlamaConfig;
use lora_core::LoraError;

use self::search::Search;
use crate::checkpoint::Division;
use crate::plan::Plan;
use data::{Data, Prefixes};
use device::Selected;
use run_config::{Checkpointing, Config};
use terminal::human;

/// Gradient checkpointing is off if the run then takes at most this share of the free memory. The
/// rest is for other programs.
const COMFORTABLE: f64 = 0.5;

/// As [`COMFORTABLE`] on a GPU, whose memory other programs seldom want during a run. The rest is
/// for errors of the prediction. The driver's share is not counted as free in the first place.
const COMFORTABLE_ON_GPU: f64 = 0.9;

/// As [`COMFORTABLE`], in bytes, for devices whose free memory is unknown.
const SMALL: u64 = 1 << 30;

/// The settings of a run that fits.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// Examples per micro-batch.
    pub batch_size: usize,
    /// Micro-batches per update.
    pub gradient_accumulation_steps: usize,
    /// Whether gradient checkpointing is on.
    pub gradient_checkpointing: bool,
    /// Whether shared prefixes are computed once.
    pub prefixes: Prefixes,
    /// The predicted memory.
    pub plan: Plan,
    /// Bytes of the largest tensor that grows with the examples of a micro-batch.
    pub largest_activation: u64,
}

/// Why a run does not fit.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// The adapters' configuration.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// Too little memory.
    #[error(
        "this run needs about {needed} of memory, but only {available} {whose}. The largest part is {what}. {advice}",
        needed = human::bytes(*needed),
        available = human::bytes(*available),
    )]
    TooLarge {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are available.
        available: u64,
        /// What the available bytes are, in words that continue "… GiB".
        whose: &'static str,
        /// The largest part.
        what: String,
        /// Settings that would fit, or that no setting fits.
        advice: String,
    },
    /// One tensor is too large, whatever the memory.
    #[error(
        "{what} takes {needed} in one tensor, and this device's largest buffer is {limit}. {advice}",
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

/// Decides the settings that `config` leaves open and checks that the run fits.
///
/// # Errors
///
/// If it does not fit, with the settings that would.
pub fn fit(
    config: &Config,
    model: &LlamaConfig,
    selected: &Selected,
    dtype: FloatDType,
    data: &Data,
) -> Result<Fit, FitError> {
    Search::new(config, model, selected, dtype, data).run()
}

/// As [`fit`] for a run that is resumed: it divides its examples into micro-batches as before,
/// because the last bits of float sums depend on the division. If the division no longer fits, as
/// on another machine, a new one is chosen and the second value is true.
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
    // Recomputing changes no bit, so a setting in the configuration takes precedence.
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
    /// The same update in smaller micro-batches, for a device whose memory is too small; if that is
    /// not possible, with gradient checkpointing on where the configuration leaves it open. `None`
    /// if neither is possible.
    pub fn smaller(&self, config: &Config) -> Option<Self> {
        let rows = self.batch_size;
        // The largest divisor up to the half, so that an update keeps its examples.
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

/// Whether a run computes shared prompt prefixes once. Dropout draws a mask per example, and shared
/// tokens could have only one. Sharing is also off if the length of an example changes its rotary
/// frequencies.
pub fn prefixes(config: &Config, model: &LlamaConfig, data: &Data) -> Prefixes {
    let rows = data.train.rows.iter().chain(&data.validation.rows);
    let longest = rows.map(|row| row.ids.len()).max().unwrap_or(0);
    if config.share_prefixes && config.lora_dropout == 0.0 && !model.rotates_by_length(longest) {
        Prefixes::Shared
    } else {
        Prefixes::Apart
    }
}

/// Whether a run of this peak needs no gradient checkpointing under `gradient_checkpointing =
/// "auto"`.
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

#[cfg(test)]
mod tests {
    use lora_core::Quantization;

    use super::*;
    use crate::plan::{PlanOptions, Workload};

    #[test]
    fn if_the_free_memory_is_unknown_only_small_runs_need_no_gradient_checkpointing() {
        assert!(is_comfortable(500 << 20, None, false));
        assert!(!is_comfortable(9 << 30, None, true));
        assert!(is_comfortable(9 << 30, Some(20 << 30), false));
        assert!(!is_comfortable(500 << 20, Some(600 << 20), false));
        assert!(is_comfortable(500 << 20, Some(600 << 20), true));
    }

    #[test]
    fn micro_batches_become_smaller_for_the_same_update_and_then_gradient_checkpointing_is_on() {
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
