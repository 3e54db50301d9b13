//! Training passes on every GPU backend of this build compared with the CPU: losses, correct
//! predictions and gradients, with shared prefixes, examples longer than a tile of attention
//! scores, several micro-batches, recomputation.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use data::{Batch, BatchRow, Prefixes};
use llama_burn::{Llama, LlamaConfig};
use lora_core::{CounterRng, LoraConfig, Quantization, TargetModules};
use peft::AdapterTensors;
use tests::devices;
use train_step::gradients::{AdapterGradients, PassOptions, accumulate, evaluate};
use train_step::loss::LossSums;

/// Relative Frobenius distance of a gradient from the CPU's. Sums in f32 over up to 2,100 tokens in
/// another order give 1e-6 to 5e-6; a key that is wrongly visible, or a token that counts twice,
/// gives 1e-3 and more.
const TOLERANCE: f64 = 2e-5;

/// A small Llama in 8 bits with adapters on every linear module, B ≠ 0 and γ = 2. With eight heads,
/// attention has several tiles within 2,100 tokens.
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

/// Examples of these lengths, of which the first `alike` tokens are the same; the last third is in
/// the loss.
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

/// The model with its embedding and head in f16, so that it computes products in f16; on the CPU in
/// f32, with the same numbers.
fn in_f16(mut model: Llama) -> Llama {
    for table in std::iter::once(&mut model.embed_tokens).chain(&mut model.lm_head) {
        for piece in &mut table.pieces {
            let rounded = piece.val().without_autodiff().cast(DType::F16);
            *piece = Param::from_tensor(rounded).set_require_grad(false);
        }
    }
    model
}

type Gradients = BTreeMap<String, Vec<f32>>;

fn run(model: &Llama, micro_batches: &[Batch], recomputed: bool) -> (LossSums, f64, Gradients) {
    let options = PassOptions {
        gradient_checkpointing: recomputed,
        ..PassOptions::default()
    };
    run_with(model, micro_batches, options)
}

fn run_with(
    model: &Llama,
    micro_batches: &[Batch],
    options: PassOptions,
) -> (LossSums, f64, Gradients) {
    let mut sums = AdapterGradients::default();
    for batch in micro_batches {
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

/// The largest distance of a factor's gradient, and the factor.
fn furthest(got: &Gradients, expected: &Gradients) -> (f64, String) {
    let distances = expected
        .iter()
        .map(|(factor, expected)| (distance(&got[factor], expected), factor.clone()));
    distances.fold((0.0, String::new()), |worst, next| {
        if next.0 > worst.0 || next.0.is_nan() {
            next
        } else {
            worst
        }
    })
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
    let _alone = alone();
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
                let furthest = furthest(&got.2, &expected.2);
                println!(
                    "{name}, {what}, recomputed {recomputed}: loss {loss:.1e}, norm {norm:.1e}, gradients {:.1e} ({})",
                    furthest.0, furthest.1
                );
                assert!(loss < TOLERANCE && norm < TOLERANCE && furthest.0 < TOLERANCE);
                let counts = |sums: LossSums| {
                    (
                        sums.tokens,
                        sums.correct,
                        sums.examples,
                        sums.correct_examples,
                    )
                };
                assert_eq!(counts(got.0), counts(expected.0));
            }
            // As on a weak GPU: products in pieces of 24 rows and fewer.
            kernels::limit_launches(Some(300_000));
            let in_pieces = run(&gpu, micro_batches, false);
            kernels::limit_launches(None);
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

/// Relative distances of a loss, of the gradients' norm and of a factor's gradient in f16 from the
/// CPU's in f32. A rounding to f16 is off by up to 4.9e-4, and some sixteen follow each other in a
/// layer and back. Their independent parts add up as a root: 2e-3. Gradients of queries and keys
/// are differences of rounded numbers, which lose more digits: measured 5e-3.
const TOLERANCES_F16: [f64; 3] = [5e-4, 2e-3, 1.2e-2];

/// These tests set process-wide switches, and count launches of the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn in_f16_hidden_states_and_gradients_stay_near_those_in_f32_whatever_the_loss_scale() {
    let _alone = alone();
    let cpu = in_f16(model(&Device::flex()));
    assert_eq!(cpu.dtype(), DType::F32);
    let micro_batches = [batch(&[40, 33, 36, 90], 31), batch(&[300], 0)];
    let expected = run(&cpu, &micro_batches, false);
    for (name, device) in devices().iter().skip(1) {
        if !device.supports_dtype(DType::F16) {
            println!("not tested: {name} has no f16");
            continue;
        }
        let gpu = in_f16(model(device));
        assert_eq!(gpu.dtype(), DType::F16);
        let scaled = |loss_scale: f64, gradient_checkpointing: bool| {
            let options = PassOptions {
                gradient_checkpointing,
                loss_scale,
                ..PassOptions::default()
            };
            run_with(&gpu, &micro_batches, options)
        };
        for (loss_scale, recomputed) in [(64.0, false), (1024.0, false), (1024.0, true)] {
            let got = scaled(loss_scale, recomputed);
            let loss = (got.0.loss - expected.0.loss).abs() / expected.0.loss;
            let norm = (got.1 - expected.1).abs() / expected.1;
            let furthest = furthest(&got.2, &expected.2);
            println!(
                "{name}, f16, loss scale {loss_scale}: loss {loss:.1e}, norm {norm:.1e}, gradients {:.1e} ({})",
                furthest.0, furthest.1
            );
            let mut all = [loss, norm, furthest.0].into_iter().zip(TOLERANCES_F16);
            assert!(all.all(|(distance, tolerance)| distance < tolerance));
        }
        // Out of range: this must be detected, so that the scale can be halved.
        let (sums, norm, _) = scaled(2f64.powi(30), false);
        assert!(sums.loss.is_finite() && !norm.is_finite(), "{norm}");
        let options = PassOptions::default();
        let in_f32 = run_with(&model(device), &micro_batches, options);
        let rounding = furthest(&scaled(1024.0, false).2, &in_f32.2).0;
        assert!(
            rounding > TOLERANCE,
            "products were not computed in f16: {rounding:e}"
        );
    }
}

#[test]
fn products_that_avoid_tf32_are_the_same_products() {
    let _alone = alone();
    let cpu = model(&Device::flex());
    let micro_batches = [batch(&[40, 33, 36, 90], 31)];
    let expected = run(&cpu, &micro_batches, false);
    for (name, device) in devices().iter().skip(1) {
        let gpu = model(device);
        kernels::use_exact_f32(true);
        let (got, counts) = gpu_counts::count(device, gpu_counts::Mode::Run, || {
            run(&gpu, &micro_batches, false)
        });
        kernels::use_exact_f32(false);
        let furthest = furthest(&got.2, &expected.2);
        println!("{name}: gradients {:.1e} ({})", furthest.0, furthest.1);
        assert!(furthest.0 < TOLERANCE && (got.1 - expected.1).abs() < TOLERANCE * expected.1);
        let details = counts.expect("a GPU counts").details;
        let of = |word: &str| details.keys().any(|operation| operation.contains(word));
        assert!(of("exact_product") && !of("Matmul"), "{details:#?}");
    }
}

#[test]
fn products_in_an_autodiff_graph_avoid_tf32_too() {
    let _alone = alone();
    let on = |device: &Device| {
        let device = device.clone().autodiff();
        let mut rng = CounterRng::new(7);
        let mut random = |shape: [usize; 3]| {
            let values = (0..shape.iter().product()).map(|_| rng.normal() as f32);
            Tensor::<3>::from_data(TensorData::new(values.collect::<Vec<_>>(), shape), &device)
        };
        let left = random([3, 5, 8]).require_grad();
        // Repeated for each of the three.
        let right = random([1, 8, 6]).require_grad();
        let weights = random([3, 5, 6]);
        let gradients = (kernels::product(left.clone(), right.clone()) * weights)
            .sum()
            .backward();
        let [left, right] = [&left, &right].map(|factor| factor.grad(&gradients).unwrap());
        assert_eq!((left.dims(), right.dims()), ([3, 5, 8], [1, 8, 6]));
        [left, right].map(|gradient| gradient.into_data().try_to_vec::<f32>().unwrap())
    };
    let expected = on(&Device::flex());
    for (name, device) in devices().iter().skip(1) {
        kernels::use_exact_f32(true);
        let (got, counts) = gpu_counts::count(device, gpu_counts::Mode::Run, || on(device));
        kernels::use_exact_f32(false);
        for (got, expected) in got.iter().zip(&expected) {
            let distance = distance(got, expected);
            println!("{name}: {distance:.1e}");
            assert!(distance < TOLERANCE);
        }
        let details = counts.expect("a GPU counts").details;
        assert!(
            !details.keys().any(|operation| operation.contains("Matmul")),
            "{details:#?}"
        );
    }
}
