//! The work of a training step of the 8B shape on the device, counted without running it.

use burn::tensor::{DType, FloatDType};
use gpu_counts::Mode;
use llama_burn::LoadOptions;
use lora_core::LoraConfig;

use super::error::ReportError;
use super::finding::{Failed, Finding, KindFinding, LeftOut, StepFinding};
use super::shapes::Shape;
use device::{Backend, Selected};
use lora_train::guard::{DeviceFault, FaultKind, Guard};
use train_step::step_counts::{StepCounts, StepShape, count_step, examples};

/// Tokens of the example.
pub const TOKENS: usize = 2048;

/// The largest buffer per kernel for which memory traffic is counted: cards with 8 GB bind as much.
const CARD_BINDS: usize = 2 << 30;

/// Tokens of the example if a step of [`TOKENS`] does not fit the device's memory.
const FEWER: usize = 512;

/// Counts a step of one example of 2,048 tokens, all of them in the loss.
///
/// # Errors
///
/// If the adapters do not fit the shape, or the device fails for another reason than its memory.
pub fn run(
    selected: &Selected,
    guard: &Guard,
    tell: &mut dyn FnMut(Finding),
) -> Result<(), ReportError> {
    let left_out = |why: &str| {
        Finding::LeftOut(LeftOut {
            what: "counts of a step".into(),
            why: why.into(),
        })
    };
    if selected.backend == Backend::Cpu {
        tell(left_out("the CPU backend launches no kernels"));
        return Ok(());
    }
    let dtype = device::compute_dtype(selected, None)?;
    for tokens in [TOKENS, FEWER] {
        match guard.run(|| counted(selected, dtype, tokens)) {
            Ok(Ok(Some(finding))) => {
                tell(Finding::Counts(Box::new(finding)));
                return Ok(());
            }
            Ok(Ok(None)) => {
                tell(left_out("launches cannot be counted on this device"));
                return Ok(());
            }
            Ok(Err(error)) => return Err(error),
            Err(fault) if fault.kind == FaultKind::OutOfMemory && tokens > FEWER => {
                tell(left_out(&format!("{tokens} tokens: {fault}")));
            }
            Err(fault) => {
                tell(failed("counts of a step", &fault));
                return Ok(());
            }
        }
    }
    Ok(())
}

fn failed(what: &str, fault: &DeviceFault) -> Finding {
    Finding::Failed(Failed {
        what: what.into(),
        message: fault.to_string(),
        lost: fault.kind == FaultKind::Lost,
    })
}

fn counted(
    selected: &Selected,
    dtype: FloatDType,
    tokens: usize,
) -> Result<Option<StepFinding>, ReportError> {
    let step = |dtype: FloatDType| -> Result<Option<StepCounts>, ReportError> {
        let model = Shape::Llama8B.config()?;
        let shape = StepShape {
            options: LoadOptions {
                dtype: DType::from(dtype),
                ..LoadOptions::default()
            },
            lora: LoraConfig::default(),
            examples: examples(1, tokens, model.vocab_size),
            supervised: tokens,
            micro_batches: 1,
            gradient_checkpointing: false,
            mode: Mode::DryRun,
            model,
        };
        Ok(count_step(&shape, &selected.device)?)
    };
    let Some(counts) = step(dtype)? else {
        return Ok(None);
    };
    // Traffic is counted in 16 bits, whatever this device computes in: bf16's tensors are as large
    // as f16's.
    let sixteen = match DType::from(dtype).size() {
        2 => Some(dtype),
        _ => {
            Some(FloatDType::F16).filter(|f16| device::compute_dtype(selected, Some(*f16)).is_ok())
        }
    };
    let _card = kernels::AssumedBuffer::new(CARD_BINDS);
    let traffic = match sixteen {
        Some(sixteen) => step(sixteen)?.map(|counts| (counts, sixteen)),
        None => None,
    };
    Ok(Some(finding(&counts, traffic.as_ref(), dtype, tokens)))
}

/// The counts with the rule by which they were scaled; `traffic` is the step in 16 bits, if the
/// device supports them.
fn finding(
    counts: &StepCounts,
    traffic: Option<&(StepCounts, FloatDType)>,
    dtype: FloatDType,
    tokens: usize,
) -> StepFinding {
    let step = &counts.step;
    let (bytes, bytes_in) = match traffic {
        Some((counts, sixteen)) => (counts.step.fused_bytes(), *sixteen),
        None => (step.fused_bytes(), dtype),
    };
    let kinds = step.kinds.iter().map(|(kind, of_kind)| KindFinding {
        kind: kind.to_string(),
        launches: of_kind.launches,
        bytes: of_kind.bytes_read + of_kind.bytes_written,
        flops: of_kind.flops,
    });
    StepFinding {
        shape: Shape::Llama8B.name().into(),
        dtype: device::type_name(dtype),
        tokens,
        launches_per_layer: counts.layer.launches(),
        launches_per_step: step.launches(),
        uploads_per_step: step.uploads,
        reads_per_step: step.reads,
        bytes_per_step: bytes,
        flops_per_step: step.total().flops,
        rule: format!(
            "A step of the model cut to 2 layers and one cut to 3 were counted at {tokens} tokens, every width and the \
             vocabulary as they are; their difference is a layer, and a step of {layers} layers is the first plus {more} \
             differences. A launch reads each input once and writes each output once. Kernels were not run. Launches, uploads \
             and reads are those of {own} on this device; bytes are those of {sixteen}, for a card that binds 2 GiB to a \
             kernel and runs what Burn fuses as one launch, as autotuned builds do.",
            own = device::type_name(dtype),
            sixteen = device::type_name(bytes_in),
            layers = counts.layers,
            more = counts.layers.saturating_sub(2),
        ),
        kinds: kinds.collect(),
    }
}

/// The bytes of a step at 2,048 tokens, from a counted one, and the rule.
pub fn bytes_at_2048(counted: &StepFinding) -> (u64, String) {
    match counted.tokens {
        TOKENS => (counted.bytes_per_step, counted.rule.clone()),
        tokens => {
            let factor = TOKENS as f64 / tokens.max(1) as f64;
            let rule = format!(
                "{} This was multiplied by {factor} for {TOKENS} tokens: an estimate, because weights are read once whatever the \
                 number of tokens, and attention grows with its square.",
                counted.rule
            );
            ((counted.bytes_per_step as f64 * factor) as u64, rule)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpu_counts::{Counts, Kind, KindCounts};

    #[test]
    fn a_step_of_fewer_tokens_is_scaled_and_says_so() {
        let of_kind = KindCounts {
            launches: 5,
            bytes_read: 600,
            bytes_written: 400,
            flops: 7,
            ..KindCounts::default()
        };
        let step = Counts {
            kinds: [(Kind::Product, of_kind)].into(),
            ..Counts::default()
        };
        let counts = StepCounts {
            layer: Counts::default(),
            step,
            layers: 32,
            tokens: 512,
        };
        let whole = finding(&counts, None, FloatDType::F32, TOKENS);
        assert_eq!(bytes_at_2048(&whole).0, 1000);
        assert!(whole.rule.contains("30 differences"), "{}", whole.rule);
        let (bytes, rule) = bytes_at_2048(&finding(&counts, None, FloatDType::F32, 512));
        assert_eq!(bytes, 4000);
        assert!(rule.contains("multiplied by 4"), "{rule}");
    }
}
