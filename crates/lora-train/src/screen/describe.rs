//! The texts of a run's summary, and its notes to the user before the first step.

use burn::tensor::FloatDType;

use super::summary::{AdapterSummary, DataSummary, RunSummary, StepSummary};
use crate::checkpoint::Resumed;
use crate::fit::Fit;
use crate::plan;
use crate::prepare::Setup;
use data::{Data, Dataset};
use device::{Backend, DeviceMemory, Known};
use run_config::{BatchSize, Config};
use terminal::human;

impl RunSummary {
    /// The summary of a run that is about to train.
    pub(crate) fn of(setup: &Setup, fit: &Fit) -> Self {
        let (config, selected) = (&setup.config, setup.selected());
        let memory_there = device::device_memory(selected, config.device_memory);
        let shape = plan::shape(&setup.loader.config);
        Self {
            name: run_name(config),
            model: format!("{}: {shape}", config.base_model),
            precision: precision(config, setup.loader.compute_dtype, fit),
            device: selected.name.clone(),
            device_reason: selected.reason.clone(),
            adapters: adapter_summary(config, fit),
            memory: fit.plan.summary(),
            memory_there: memory_there.map_or_else(String::new, memory_in_words),
            data: data_summary(config, &setup.data),
            steps: step_summary(setup, fit),
            output: setup.folder.path().to_path_buf(),
            warnings: warnings(setup, memory_there),
        }
    }
}

fn run_name(config: &Config) -> String {
    let folder = config.output_dir.file_name();
    folder.map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned())
}

fn adapter_summary(config: &Config, fit: &Fit) -> AdapterSummary {
    let (lora, counts) = (config.lora_config(), &fit.plan.counts);
    AdapterSummary {
        targets: plan::targets(&lora.target_modules) + &plan::beside(&lora),
        modules: counts.adapted_modules,
        r: lora.r,
        alpha: lora
            .method
            .facts()
            .has("lora_alpha")
            .then_some(lora.lora_alpha),
        scale: lora.scale(),
        dropout: lora.lora_dropout,
        trainable: counts.trainable,
        frozen: counts.frozen,
    }
}

fn step_summary(setup: &Setup, fit: &Fit) -> StepSummary {
    let config = &setup.config;
    StepSummary {
        total: setup.total_steps,
        epochs: setup.order.epoch_at(setup.total_steps),
        batch_size: fit.batch_size,
        merged_from: merged_from(config, fit),
        gradient_accumulation_steps: fit.gradient_accumulation_steps,
        learning_rate: config.learning_rate,
        schedule: format!("{:?}", config.lr_scheduler).to_lowercase(),
        logging_steps: config.logging_steps,
    }
}

/// The configured micro-batches, if `fit` has fewer and larger ones.
fn merged_from(config: &Config, fit: &Fit) -> Option<[usize; 2]> {
    let steps = config.gradient_accumulation_steps;
    match config.batch_size {
        BatchSize::Rows(rows) if rows != fit.batch_size => Some([steps, rows]),
        _ => None,
    }
}

/// The types of the weights and of the computation, and whether gradient checkpointing is on.
pub(crate) fn precision(config: &Config, compute_dtype: FloatDType, fit: &Fit) -> String {
    let base = match config.quant_bits {
        16 => "base not quantized".to_string(),
        bits => format!("{bits}-bit base"),
    };
    let checkpointing = if fit.gradient_checkpointing {
        "on"
    } else {
        "off"
    };
    format!(
        "{base}, {} compute, gradient checkpointing {checkpointing}",
        format!("{compute_dtype:?}").to_lowercase()
    )
}

fn data_summary(config: &Config, data: &Data) -> DataSummary {
    let name = if config.embedded_data() {
        "embedded".into()
    } else {
        config.dataset_path.display().to_string()
    };
    let sum = |dataset: &Dataset| dataset.lengths().map(|length| length as u64).sum();
    DataSummary {
        name: format!("{name} ({})", data.formats()),
        train_rows: data.train.len(),
        validation_rows: data.validation.len(),
        too_long_rows: data.too_long(),
        max_seq_len: config.max_seq_len,
        tokens: sum(&data.train),
        longest_row: data.train.lengths().max().unwrap_or(0),
        supervised_tokens: data.train.supervised() as u64,
    }
}

/// The memory of a device, as text.
fn memory_in_words(memory: DeviceMemory) -> String {
    let bytes = human::bytes(memory.bytes);
    match memory.known {
        Known::Free => format!("{bytes} free"),
        Known::Stated | Known::Total => bytes,
    }
}

/// The values that a preset set, and how another trainer's file was read.
fn preset(config: &Config) -> Vec<String> {
    let source = &config.source;
    let values = source.preset.iter();
    let values: Vec<String> = values
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    let mut notes = source.notes.clone();
    if !values.is_empty() {
        let whose = match source.preset_name.as_str() {
            "axolotl" => "axolotl",
            _ => "FinLoRA's finetune.py",
        };
        let note = format!(
            "the preset {:?} sets the keys that the configuration leaves out, as in {whose}: {}. The file's own keys and --set \
             take precedence",
            source.preset_name,
            values.join(", ")
        );
        notes.insert(0, note);
    }
    notes
}

/// Notes to the user before the first step.
fn warnings(setup: &Setup, memory_there: Option<DeviceMemory>) -> Vec<String> {
    let selected = setup.selected();
    let mut warnings = preset(&setup.config);
    warnings.extend(selected.warning());
    if selected.backend != Backend::Cpu {
        warnings.push(device::first_step(setup.kept_kernels));
    }
    if memory_there.is_none() {
        warnings.push(
            "this device does not report its memory: by default, gradient checkpointing is on unless the run is small, and \
             micro-batches are halved if memory runs out. Set device_memory, for example \"8GiB\", to plan for that size"
                .into(),
        );
    }
    let switches = device::switches();
    if !switches.is_empty() {
        warnings.push(format!("running with {}", switches.join(", ")));
    }
    if let Some(resumed) = &setup.resumed {
        warnings.extend(resumption(setup, resumed));
    }
    warnings.extend(setup.data.warnings.iter().cloned());
    warnings
}

/// The step that a run resumes from, and what may differ from the earlier session.
fn resumption(setup: &Setup, resumed: &Resumed) -> Vec<String> {
    let state = &resumed.checkpoint.state;
    let mut warnings = vec![format!(
        "resuming after step {} of {}, from {}",
        state.progress.step,
        state.total_steps,
        resumed.checkpoint.folder().display()
    )];
    warnings.extend(resumed.notes.iter().cloned());
    if state.device != setup.selected().name {
        warnings.push(format!(
            "the run was on {}: the results agree up to rounding, not bit for bit",
            state.device
        ));
    }
    if setup.divided_anew {
        warnings.push(
            "the examples of an update are divided into other micro-batches, because less memory is free than before: \
             the results agree up to rounding, not bit for bit"
                .into(),
        );
    }
    warnings
}
