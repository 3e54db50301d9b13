//! The same quantized model on several devices.

use std::collections::BTreeMap;

use burn::tensor::Device;
use llama_burn::{Llama, LlamaConfig, RopeScaling};
use lora_core::{CounterRng, LoraConfig, Quantization, TargetModules};

use super::against_reference::tensors;
use super::difference::{curves, max_abs};
use super::run;
use super::{Check, ParityError, Report, Section};
use data::{Batch, BatchRow, Prefixes};
use peft::AdapterTensors;

// The weights are the same integers and scales everywhere and the arithmetic is f32 everywhere, so
// only the order of sums and the last bits of exp and rsqrt differ: 1e-6 to 1e-5 on logits of size
// 1 to 10. A block scale read from the wrong place gives 1e-1. A device that multiplies in half
// precision or TF32 gives 1e-3, and is meant to fail here.
const LOGITS: f64 = 1e-4;
const LOSS: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;
/// AdamW's division by the gradient's size amplifies rounding noise from step to step.
const LOSS_CURVE: f64 = 1e-3;

const SEED: u64 = 42;
const STEPS: usize = 10;
const LEARNING_RATE: f64 = 1e-2;

/// The quantities of one device.
struct Numbers {
    logits: Vec<f32>,
    loss: f64,
    gradients: BTreeMap<String, Vec<f32>>,
    losses: Vec<f64>,
}

pub(super) fn compare(devices: &[(String, Device)]) -> Result<Report, ParityError> {
    let measured = devices.iter().map(|(_, device)| measure(device));
    let measured = measured.collect::<Result<Vec<_>, _>>()?;
    let mut sections = Vec::new();
    for (first, (first_name, _)) in devices.iter().enumerate() {
        for (second, (second_name, _)) in devices.iter().enumerate().skip(first + 1) {
            let checks = compare_pair(&measured[second], &measured[first])?;
            sections.push(Section {
                title: format!("{second_name} against {first_name}: 8-bit weights, f32 arithmetic"),
                checks,
                left_out: vec![],
            });
        }
    }
    Ok(Report {
        sections,
        absent: vec![],
        broken: vec![],
    })
}

fn compare_pair(got: &Numbers, expected: &Numbers) -> Result<Vec<Check>, ParityError> {
    let vocab = config().vocab_size;
    let (logits, worst) = max_abs(&got.logits, &expected.logits);
    let (curve, step) = curves(&got.losses, &expected.losses);
    Ok(vec![
        Check {
            quantity: "logits".into(),
            difference: logits,
            tolerance: LOGITS,
            note: format!(
                "largest absolute; position {}, token {}",
                worst / vocab,
                worst % vocab
            ),
        },
        Check {
            quantity: "loss".into(),
            difference: (got.loss - expected.loss).abs(),
            tolerance: LOSS,
            note: format!("absolute; {:.6} and {:.6}", got.loss, expected.loss),
        },
        tensors(
            "LoRA gradients",
            GRADIENT,
            &got.gradients,
            &expected.gradients,
        )?,
        Check {
            quantity: format!("loss curve, {STEPS} AdamW steps"),
            difference: curve,
            tolerance: LOSS_CURVE,
            note: format!(
                "relative; largest at step {step}; from {:.4} to {:.4}",
                expected.losses[0],
                expected.losses[STEPS - 1]
            ),
        },
    ])
}

fn measure(device: &Device) -> Result<Numbers, ParityError> {
    let model = model(&device.clone().autodiff())?;
    let batch = batch();
    let gradients = run::gradients(&model, &batch, true)?;
    let logits = run::logits(&model, &batch)?;
    let loss = run::loss(&model, &batch);
    let (_, losses) = run::train(model, &batch, STEPS, LEARNING_RATE, None);
    Ok(Numbers {
        logits,
        loss,
        gradients,
        losses,
    })
}

/// Widths with whole blocks of 32 (hidden) and of 8 only (intermediate), grouped queries, biases, norms of heads.
fn config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: 160,
        hidden_size: 64,
        intermediate_size: 168,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: true,
        biases: llama_burn::Biases::of_blocks(true, false),
        query_key_norm: true,
        initializer_range: 0.15,
        bos_token_id: None,
        eos_token_ids: vec![],
        weight_bytes: 4,
        ..LlamaConfig::default()
    }
}

/// The model, from numbers made on the host: no device's own generator is used.
fn model(device: &Device) -> Result<Llama, ParityError> {
    let lora = LoraConfig {
        r: 4,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let mut model = Llama::random(&config(), SEED, device);
    for (_, linear) in model.linears_mut() {
        *linear = linear.clone().quantize(Quantization::Bits8)?;
    }
    let model = model.with_lora(&lora, SEED)?;
    // With the initial B = 0, A would have no gradient and the scale no effect.
    let mut adapter = AdapterTensors::from_model(&model)?;
    let mut rng = CounterRng::new(SEED);
    for pair in adapter.modules.values_mut() {
        pair.b
            .iter_mut()
            .for_each(|value| *value = 0.05 * rng.normal() as f32);
    }
    Ok(adapter.put_on(model, &lora)?)
}

/// Sequences of different lengths with their last third in the loss.
fn batch() -> Batch {
    let mut rng = CounterRng::new(SEED).fork(1);
    let vocab = config().vocab_size as u64;
    // The first and the last share a prefix, so that devices are also compared on shared
    // computation.
    let mut first: Vec<u32> = Vec::new();
    let rows = [21, 9, 14].map(|length| {
        let mut row: Vec<u32> = (0..length)
            .map(|_| (rng.next_u64() % vocab) as u32)
            .collect();
        match first.is_empty() {
            true => first.clone_from(&row),
            false if length == 14 => row[..10].copy_from_slice(&first[..10]),
            false => {}
        }
        row
    });
    let rows: Vec<BatchRow> = rows
        .iter()
        .enumerate()
        .map(|(index, ids)| BatchRow {
            ids,
            targets: (ids.len() - ids.len() / 3..ids.len())
                .map(|at| (at - 1, ids[at]))
                .collect(),
            line: index + 1,
        })
        .collect();
    Batch::new(&rows, Prefixes::Shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_equals_itself_and_training_lowers_the_loss() {
        let device = Device::flex();
        let devices = [("a".to_string(), device.clone()), ("b".into(), device)];
        let report = compare(&devices).unwrap();
        assert!(report.passed(), "{report}");
        assert_eq!(report.sections.len(), 1);
        let losses = measure(&Device::flex()).unwrap().losses;
        assert!(losses[STEPS - 1] < losses[0] - 0.1, "{losses:?}");
    }

    #[test]
    fn another_scale_of_the_adapter_fails() {
        let ours = measure(&Device::flex()).unwrap();
        let mut other = measure(&Device::flex()).unwrap();
        other.logits.iter_mut().for_each(|value| *value *= 1.001);
        let checks = compare_pair(&other, &ours).unwrap();
        assert!(!checks[0].passed());
    }
}
