//! Training passes on every GPU backend of this build against the CPU: losses, hits and gradients, with beginnings that
//! examples share, examples longer than a tile of attention scores, several micro-batches, recomputation.

use std::collections::BTreeMap;

use burn::tensor::Device;
use llama_burn::{Llama, LlamaConfig};
use lora_core::{CounterRng, LoraConfig, Quantization, TargetModules};
use tests::devices;
use trainer::data::{Batch, BatchRow, Prefixes};
use trainer::gradients::{AdapterGradients, PassOptions, accumulate, evaluate};
use trainer::loss::LossSums;
use trainer::peft::AdapterTensors;

/// Relative Frobenius distance of a gradient from the CPU's. Sums in f32 over up to 2,100 tokens in another order give
/// 1e-6 to 5e-6; a key that is seen and should not be, or a token that counts twice, gives 1e-3 and more.
const TOLERANCE: f64 = 2e-5;

/// A small Llama in 8 bits with adapters on every linear module, B ≠ 0 and γ = 2. Eight heads make attention's tiles
/// end within 2,100 tokens.
fn model(device: &Device) -> Llama {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "initializer_range": 0.15,
    });
    let config = LlamaConfig::from_json(json.as_object().expect("an object")).expect("valid");
    let lora = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let mut model = Llama::random(&config, 1, &device.clone().autodiff());
    for (_, linear) in model.linears_mut() {
        *linear = linear
            .clone()
            .quantize(Quantization::Bits8)
            .expect("without an adapter");
    }
    let model = model.with_lora(&lora, 2).expect("the settings are valid");
    let mut adapter = AdapterTensors::from_model(&model).expect("the device returns its tensors");
    let mut rng = CounterRng::new(3);
    let numbers = adapter.modules.values_mut().flat_map(|pair| &mut pair.b);
    numbers.for_each(|value| *value = 0.05 * rng.normal() as f32);
    adapter
        .put_on(model, &lora)
        .expect("the adapter fits its own model")
}

/// Examples of these lengths, of which the first `alike` tokens are the same; the loss is on the last third.
fn batch(lengths: &[usize], alike: usize) -> Batch {
    let tokens = |example: usize, count: usize| -> Vec<u32> {
        let mut rng = CounterRng::new(7).fork(example as u64);
        (0..count).map(|_| (rng.next_u64() % 96) as u32).collect()
    };
    let ids: Vec<Vec<u32>> = lengths
        .iter()
        .enumerate()
        .map(|(example, length)| [tokens(1000, alike), tokens(example, length - alike)].concat())
        .collect();
    let rows: Vec<BatchRow> = ids
        .iter()
        .enumerate()
        .map(|(example, ids)| BatchRow {
            ids,
            targets: (ids.len() * 2 / 3..ids.len())
                .map(|at| (at - 1, ids[at]))
                .collect(),
            line: example + 1,
        })
        .collect();
    Batch::new(&rows, Prefixes::Shared)
}

type Gradients = BTreeMap<String, Vec<f32>>;

fn run(model: &Llama, micro_batches: &[Batch], recomputed: bool) -> (LossSums, f64, Gradients) {
    let mut sums = AdapterGradients::default();
    for batch in micro_batches {
        let options = PassOptions {
            gradient_checkpointing: recomputed,
            dropout_seed: 0,
        };
        accumulate(model, batch, options, &mut sums);
    }
    let mean = sums.into_mean(0.0);
    let named = model.trainable().flat_map(|(module, params)| {
        let named = params.into_iter().enumerate().map(|(index, param)| {
            let gradient = mean.get(param.id).expect("every factor has a gradient");
            let values = gradient.into_data().try_to_vec::<f32>();
            (format!("{module}.{index}"), values.expect("f32"))
        });
        named.collect::<Vec<_>>()
    });
    let named = named.collect();
    (mean.totals, mean.norm, named)
}

fn distance(got: &[f32], expected: &[f32]) -> f64 {
    let pairs = || got.iter().zip(expected);
    let difference: f64 = pairs().map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let norm: f64 = pairs().map(|(_, b)| f64::from(*b).powi(2)).sum();
    assert!(norm > 0.0, "nothing to compare");
    (difference / norm).sqrt()
}

#[test]
fn losses_and_gradients_are_those_of_the_cpu() {
    let devices = devices();
    let cpu = model(&Device::flex());
    let cases = [
        ("examples of one length", vec![batch(&[12, 12], 0)]),
        ("examples of many lengths", vec![batch(&[9, 21, 5, 14], 0)]),
        ("a shared beginning", vec![batch(&[40, 33, 36, 90], 31)]),
        ("longer than a tile", vec![batch(&[2100], 0)]),
        (
            "micro-batches",
            vec![
                batch(&[30, 20, 25], 15),
                batch(&[9, 21], 0),
                batch(&[33], 0),
            ],
        ),
    ];
    // The CPU comes first.
    for (name, device) in devices.iter().skip(1) {
        let gpu = model(device);
        for (what, micro_batches) in &cases {
            let expected = run(&cpu, micro_batches, false);
            for recomputed in [false, true] {
                let got = run(&gpu, micro_batches, recomputed);
                let loss = (got.0.loss - expected.0.loss).abs() / expected.0.loss;
                let norm = (got.1 - expected.1).abs() / expected.1;
                let furthest = expected
                    .2
                    .iter()
                    .map(|(factor, expected)| (distance(&got.2[factor], expected), factor))
                    .fold((0.0, ""), |worst, (distance, factor)| {
                        if distance > worst.0 {
                            (distance, factor)
                        } else {
                            worst
                        }
                    });
                println!(
                    "{name}, {what}, recomputed {recomputed}: loss {loss:.1e}, norm {norm:.1e}, gradients {:.1e} ({})",
                    furthest.0, furthest.1
                );
                assert!(loss < TOLERANCE && norm < TOLERANCE && furthest.0 < TOLERANCE);
                let counts =
                    |sums: LossSums| (sums.tokens, sums.correct, sums.rows, sums.correct_rows);
                assert_eq!(counts(got.0), counts(expected.0));
            }
            // As on a weak GPU: products in pieces of 24 rows and fewer.
            lora_core::limit_launches(Some(300_000));
            let in_pieces = run(&gpu, micro_batches, false);
            lora_core::limit_launches(None);
            for (factor, expected) in &expected.2 {
                let distance = distance(&in_pieces.2[factor], expected);
                assert!(
                    distance < TOLERANCE,
                    "{what}, in pieces: {factor} {distance:e}"
                );
            }
            let (got, expected) = (
                evaluate(&gpu, &micro_batches[0]),
                evaluate(&cpu, &micro_batches[0]),
            );
            assert!((got.loss - expected.loss).abs() < TOLERANCE * expected.loss);
        }
    }
}
