//! The work of a step on a GPU, counted, and the time that it takes at a device's stated peak.

use burn::tensor::{DType, FloatDType};
use gpu_counts::{Counts, KindCounts, Mode};
use llama_burn::{LlamaConfig, LoadOptions};
use lora_core::LoraError;

use super::cards::{self, Peak};
use super::flops::FlopsModel;
use super::{PlanOptions, Workload};
use crate::guard::Guard;
use device::{Backend, Selected};
use terminal::human;
use train_step::step_counts::{StepCounts, StepShape, count_step, examples};

/// The peaks to compare with: the given ones, the named card, or every known card.
///
/// # Errors
///
/// A sentence that lists the known cards if the name is not one of them, or that names what is
/// missing.
pub fn peaks(
    name: Option<&str>,
    tflops: Option<f64>,
    gbs: Option<f64>,
) -> Result<Vec<Peak>, String> {
    let known = || {
        let names: Vec<String> = cards::all().into_iter().map(|card| card.name).collect();
        names.join(", ")
    };
    let card = match name.filter(|name| !name.is_empty()) {
        None => None,
        Some(name) => Some(cards::named(name).ok_or_else(|| {
            format!(
                "--gpu {name}: the known cards are {}; describe any other with --peak-tflops and --peak-gbs",
                known()
            )
        })?),
    };
    let positive = |flag: &str, value: Option<f64>| match value {
        Some(value) if !(value > 0.0 && value.is_finite()) => {
            Err(format!("{flag} {value}: expected a number above 0"))
        }
        value => Ok(value),
    };
    let (tflops, gbs) = (
        positive("--peak-tflops", tflops)?,
        positive("--peak-gbs", gbs)?,
    );
    match (card, tflops, gbs) {
        (None, None, None) => Ok(cards::all()),
        (Some(card), tflops, gbs) => Ok(vec![Peak {
            tflops_16: tflops.unwrap_or(card.tflops_16),
            tflops_32: tflops.unwrap_or(card.tflops_32),
            gbs: gbs.unwrap_or(card.gbs),
            ..card
        }]),
        (None, Some(tflops), Some(gbs)) => Ok(vec![Peak {
            name: "this peak".into(),
            tflops_16: tflops,
            tflops_32: tflops,
            gbs,
        }]),
        (None, _, _) => {
            Err("give both --peak-tflops and --peak-gbs, or a known card with --gpu NAME".into())
        }
    }
}

/// The step's counts with times. If the step cannot be counted: its operations alone, and the
/// reason.
///
/// # Errors
///
/// If the adapters' configuration does not fit the model.
pub fn lines(
    model: &LlamaConfig,
    options: &PlanOptions,
    backend: Backend,
    peaks: &[Peak],
) -> Result<Vec<String>, LoraError> {
    let workload = options.workload;
    let counted = match counting_device(backend) {
        Ok(selected) => count(model, options, &selected),
        Err(why) => Err(why),
    };
    let mut lines = vec![String::new()];
    match counted {
        Ok((counts, dtype, device)) => {
            lines.extend(table(&counts, dtype, &device, peaks));
            let checkpointing = if options.gradient_checkpointing {
                "on"
            } else {
                "off"
            };
            lines.push(format!("gradient checkpointing {checkpointing}"));
        }
        Err(why) => {
            let flops = FlopsModel::new(model, &options.lora)?;
            let of_row = flops.of_row(workload.longest_row as u64, workload.longest_row as u64);
            let flops = of_row as f64 * workload.rows as f64;
            lines.push(format!(
                "the launches and bytes of a step are not counted: {why}"
            ));
            lines.push(format!(
                "its matrix products are {} TFLOP; in 16 bits: {}",
                human::number(flops / 1e12),
                peaks
                    .iter()
                    .map(|peak| format!(
                        "{} on {}",
                        milliseconds(flops / peak.tflops_16 / 1e12),
                        peak.name
                    ))
                    .collect::<Vec<_>>()
                    .join(", ")
            ));
        }
    }
    Ok(lines)
}

/// The device to count on. A software driver is enough, because nothing is run.
fn counting_device(asked: Backend) -> Result<Selected, String> {
    let gpus = [
        Backend::Cuda,
        Backend::Metal,
        Backend::Vulkan,
        Backend::Wgpu,
    ];
    let asked = match asked {
        Backend::Auto => gpus
            .into_iter()
            .filter(|&gpu| device::is_compiled_in(gpu))
            .collect(),
        one => vec![one],
    };
    let mut why = Vec::new();
    for backend in asked {
        match device::select(backend) {
            Ok(selected) if selected.backend == Backend::Cpu => {}
            Ok(selected) => return Ok(selected),
            Err(error) => why.push(error.to_string()),
        }
    }
    Err(if why.is_empty() {
        "this build has no GPU backend, or none was selected; `cargo xtask plan --gpu --backend wgpu` counts with any Vulkan \
         driver, also a software driver"
    .into()
    } else {
        why.join("; ")
    })
}

type Counted = (StepCounts, FloatDType, String);

fn count(
    model: &LlamaConfig,
    options: &PlanOptions,
    selected: &Selected,
) -> Result<Counted, String> {
    let types = device::types(selected);
    let sixteen = types
        .iter()
        .find(|it| DType::from(**it).size() == options.float_bytes);
    let dtype = sixteen.copied().unwrap_or(FloatDType::F32);
    let Workload {
        rows, longest_row, ..
    } = options.workload;
    let shape = StepShape {
        options: LoadOptions {
            quantization: options.quantization,
            dtype: DType::from(dtype),
            ..LoadOptions::default()
        },
        lora: options.lora.clone(),
        examples: examples(rows, longest_row, model.vocab_size),
        supervised: longest_row,
        micro_batches: 1,
        gradient_checkpointing: options.gradient_checkpointing,
        mode: Mode::DryRun,
        model: model.clone(),
    };
    let counted = Guard::install().run(|| count_step(&shape, &selected.device));
    match counted {
        Ok(Ok(Some(counts))) => Ok((counts, dtype, selected.name.clone())),
        Ok(Ok(None)) => Err(format!("{} cannot count launches", selected.name)),
        Ok(Err(error)) => Err(error.to_string()),
        Err(fault) => Err(format!("{}: {fault}", selected.name)),
    }
}

/// Seconds of these launches at a peak: products or memory traffic, whichever takes longer.
fn seconds(counts: &KindCounts, dtype: FloatDType, peak: &Peak) -> f64 {
    let tflops = match DType::from(dtype).size() {
        2 => peak.tflops_16,
        _ => peak.tflops_32,
    };
    let bytes = (counts.bytes_read + counts.bytes_written) as f64;
    (counts.flops as f64 / tflops / 1e12).max(bytes / peak.gbs / 1e9)
}

fn table(counts: &StepCounts, dtype: FloatDType, device: &str, peaks: &[Peak]) -> Vec<String> {
    let step: &Counts = &counts.step;
    let texts = |texts: &[&str]| {
        texts
            .iter()
            .map(|text| text.to_string())
            .collect::<Vec<_>>()
    };
    let mut header = texts(&["per step", "launches", "GB", "TFLOP"]);
    header.extend(peaks.iter().map(|peak| peak.name.clone()));
    let row = |name: String, kind: &KindCounts, seconds: Vec<f64>| {
        let mut row = vec![
            name,
            human::count(kind.launches),
            human::number((kind.bytes_read + kind.bytes_written) as f64 / 1e9),
            human::number(kind.flops as f64 / 1e12),
        ];
        row.extend(seconds.into_iter().map(milliseconds));
        row
    };
    let at = |kind: &KindCounts| -> Vec<f64> {
        let peaks = peaks.iter();
        peaks.map(|peak| seconds(kind, dtype, peak)).collect()
    };
    let mut rows = vec![header];
    for (kind, of_kind) in &step.kinds {
        rows.push(row(kind.to_string(), of_kind, at(of_kind)));
    }
    // Kinds run one after the other, so their times add up.
    let sums = peaks.iter().map(|peak| {
        let kinds = step.kinds.values();
        kinds.map(|kind| seconds(kind, dtype, peak)).sum()
    });
    rows.push(row("all".into(), &step.total(), sums.collect()));
    let right: Vec<usize> = (1..rows[0].len()).collect();
    let mut lines = human::columns(&rows, &right);
    lines.push(format!(
        "{} launches per layer; {} of {} and {} per step; counted with {} kernels compiled for {device}; nothing was launched",
        human::count(counts.layer.launches()),
        human::counted(step.uploads, "upload"),
        human::bytes(step.upload_bytes),
        human::counted(step.reads, "blocking read"),
        device::type_name(dtype),
    ));
    lines.push(
        "time per kernel type: its FLOPs at the stated rate or its bytes at the stated bandwidth, whichever takes longer".into(),
    );
    lines.push(
        "these times are lower bounds: launch overhead and kernels below the peak add to them"
            .into(),
    );
    lines
}

fn milliseconds(seconds: f64) -> String {
    format!("{} ms", human::number(1e3 * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpu_counts::Kind;

    fn peak() -> Peak {
        Peak {
            name: "a card".into(),
            tflops_16: 100.0,
            tflops_32: 10.0,
            gbs: 1000.0,
        }
    }

    #[test]
    fn a_peak_is_a_card_a_card_with_other_numbers_or_both_numbers() {
        assert_eq!(peaks(Some(""), None, None).unwrap(), cards::all());
        assert_eq!(peaks(Some("h100"), None, None).unwrap()[0].gbs, 3350.0);
        assert_eq!(peaks(Some("h100"), None, Some(9.0)).unwrap()[0].gbs, 9.0);
        assert_eq!(peaks(None, Some(3.0), Some(4.0)).unwrap()[0].tflops_16, 3.0);
        assert!(
            peaks(None, Some(3.0), None)
                .unwrap_err()
                .contains("--peak-gbs")
        );
        assert!(
            peaks(Some("x"), None, None)
                .unwrap_err()
                .contains("RTX 4090")
        );
        assert!(peaks(Some("h100"), Some(f64::NAN), None).is_err());
    }

    #[test]
    fn a_kind_takes_as_long_as_its_products_or_its_bytes() {
        let kind = KindCounts {
            launches: 1,
            bytes_read: 6_000_000_000,
            bytes_written: 4_000_000_000,
            flops: 500_000_000_000,
            ..KindCounts::default()
        };
        // 10 GB at 1,000 GB/s, 0.5 TFLOP at 100 or 10 TFLOP/s.
        assert_eq!(seconds(&kind, FloatDType::F16, &peak()), 0.01);
        assert_eq!(seconds(&kind, FloatDType::F32, &peak()), 0.05);
        let step = Counts {
            kinds: [(Kind::Product, kind), (Kind::Copy, kind)].into(),
            ..Counts::default()
        };
        let counts = StepCounts {
            layer: Counts::default(),
            step,
            layers: 1,
            tokens: 1,
        };
        let text = table(&counts, FloatDType::F32, "here", &[peak()]).join("\n");
        assert!(
            text.contains("50.00 ms") && text.contains("100.00 ms"),
            "{text}"
        );
    }

    #[test]
    fn a_build_without_a_gpu_names_the_one_that_counts() {
        let why = counting_device(Backend::Cpu).unwrap_err();
        assert!(why.contains("--backend wgpu"), "{why}");
    }
}
