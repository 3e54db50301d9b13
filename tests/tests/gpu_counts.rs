//! The work of a training step on a GPU, counted and checked against budgets. Any GPU or software
//! driver is sufficient, because the counts do not depend on its speed.
#![cfg(feature = "wgpu")]

use burn::tensor::DType;
use device::{Backend, Selected};
use gpu_counts::{Counts, Kind, Mode};
use llama_burn::{LlamaConfig, LoadOptions};
use lora_core::LoraConfig;
use train_step::step_counts::{StepCounts, StepShape, count_step, examples};

/// One test at a time: counting is process-wide.
static COUNTING: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn wgpu() -> Option<Selected> {
    match device::select(Backend::Wgpu) {
        Ok(selected) => Some(selected),
        Err(error) if std::env::var_os("LORA_REQUIRE_WGPU").is_none() => {
            eprintln!("not tested: {error}");
            None
        }
        Err(error) => panic!("LORA_REQUIRE_WGPU is set: {error}"),
    }
}

fn config(text: &str) -> LlamaConfig {
    match serde_json::from_str(text).expect("valid JSON") {
        serde_json::Value::Object(object) => {
            LlamaConfig::from_json(&object).expect("a valid configuration")
        }
        _ => unreachable!(),
    }
}

fn llama_8b() -> LlamaConfig {
    config(include_str!(
        "../../crates/bench/src/shapes/llama-3.1-8b.json"
    ))
}

/// One example of 2,048 tokens, all of them in the loss, 8-bit weights, adapters of rank 8 on
/// queries, keys and values.
fn step_of_8b(dtype: DType) -> StepShape {
    let model = llama_8b();
    StepShape {
        options: LoadOptions {
            dtype,
            ..LoadOptions::default()
        },
        lora: LoraConfig::default(),
        examples: examples(1, 2048, model.vocab_size),
        supervised: 2047,
        micro_batches: 1,
        gradient_checkpointing: false,
        // The real shapes at full length: kernels are compiled and counted, not run.
        mode: Mode::DryRun,
        model,
    }
}

fn counted(shape: &StepShape, selected: &Selected) -> StepCounts {
    count_step(shape, &selected.device)
        .expect("the adapters fit")
        .expect("a GPU is counted")
}

fn print(name: &str, counts: &Counts) {
    println!(
        "{name}: {} launches, {:.2} GB ({:.2} where groups are fused), {:.2} TFLOP, {} uploads, {} reads",
        counts.launches(),
        counts.bytes() as f64 / 1e9,
        counts.fused_bytes() as f64 / 1e9,
        counts.total().flops as f64 / 1e12,
        counts.uploads,
        counts.reads,
    );
    for (kind, of_kind) in &counts.kinds {
        let bytes = of_kind.bytes_read + of_kind.bytes_written;
        println!(
            "  {kind:<24} {:>6} launches {:>9.3} GB",
            of_kind.launches,
            bytes as f64 / 1e9
        );
    }
    for (name, times) in &counts.details {
        println!("    {times:>4} of {name}");
    }
}

#[test]
fn a_layer_and_a_step_of_llama_8b_stay_within_their_budgets() {
    let _one = COUNTING.lock();
    let Some(selected) = wgpu() else { return };
    let counts = counted(&step_of_8b(DType::F32), &selected);
    print("layer, f32", &counts.layer);
    print("step, f32", &counts.step);
    assert!(counts.layer.launches() <= 28, "{}", counts.layer.launches());
    our_kernels_do_the_work(&counts.step);
    assert_eq!((counts.layer.uploads, counts.layer.reads), (0, 0));
    assert!(counts.step.uploads <= 12, "{}", counts.step.uploads);
    assert_eq!(counts.step.reads, 1);
    // 61 TFLOP of products with frozen weights, attention over the visible keys, the output layer.
    let flops = counts.step.total().flops as f64 / 1e12;
    assert!(flops > 57.0 && flops < 70.0, "{flops}");
}

/// In 16 bits, as on CUDA: bf16 and f16 tensors have the same bytes.
#[test]
fn a_step_of_llama_8b_in_16_bits_moves_at_most_80_gb() {
    let _one = COUNTING.lock();
    let Some(selected) = wgpu() else { return };
    // As on a card with 8 GB or more: lavapipe binds 128 MiB, and the output layer would be read
    // twice as often.
    let _large = kernels::AssumedBuffer::new(2 << 30);
    if !selected
        .device
        .supports_dtype(burn::tensor::FloatDType::F16)
    {
        eprintln!("not tested: this device has no f16");
        return;
    }
    let counts = counted(&step_of_8b(DType::F16), &selected);
    print("layer, f16", &counts.layer);
    print("step, f16", &counts.step);
    assert!(
        counts.step.fused_bytes() <= 80_000_000_000,
        "{}",
        counts.step.fused_bytes()
    );
    assert_eq!((counts.layer.uploads, counts.layer.reads), (0, 0));
    assert!(counts.layer.launches() <= 28, "{}", counts.layer.launches());
    our_kernels_do_the_work(&counts.step);
}

/// Fails if a quantized weight was dequantized into memory, or attention was composed of Burn's operations.
fn our_kernels_do_the_work(step: &Counts) {
    let launches = |kind| step.kinds.get(&kind).map_or(0, |of_kind| of_kind.launches);
    assert_eq!(launches(Kind::Dequantize), 0, "weights are dequantized");
    assert!(launches(Kind::Attention) > 0, "attention is composed");
    let named = |name: &str| step.details.keys().any(|key| key.contains(name));
    for kernel in [
        "packed_product",
        "joint_product",
        "tiled_attention",
        "low_rank_columns",
        "low_rank_gradients",
        "rms_norm_rows",
        "rotate_heads",
        "gated_product",
        "gated_product_backward",
        "cross_entropy_rows",
        "adamw_update",
    ] {
        assert!(named(kernel), "{kernel} is not used");
    }
}

/// The step of `cargo xtask train` without a config: 8 examples of about 46 tokens.
#[test]
fn a_step_of_the_embedded_model_takes_at_most_200_launches() {
    let _one = COUNTING.lock();
    let Some(selected) = wgpu() else { return };
    let model = config(include_str!("../../assets/model/config.json"));
    let shape = StepShape {
        options: LoadOptions::default(),
        lora: LoraConfig::default(),
        examples: examples(8, 46, model.vocab_size),
        supervised: 2,
        micro_batches: 1,
        gradient_checkpointing: false,
        mode: Mode::Run,
        model,
    };
    let counts = counted(&shape, &selected);
    print("embedded, step", &counts.step);
    assert!(counts.step.launches() <= 200, "{}", counts.step.launches());
    our_kernels_do_the_work(&counts.step);
}

/// A small model that is computed: several micro-batches, examples with a shared prefix,
/// recomputation.
#[test]
fn micro_batches_shared_beginnings_and_recomputation_add_no_upload_per_layer_and_no_read() {
    let _one = COUNTING.lock();
    let Some(selected) = wgpu() else { return };
    let model = config(
        r#"{"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5}"#,
    );
    let beginning: Vec<u32> = (0..20).collect();
    let example = |own: u32, length: u32| {
        let own = (0..length).map(|i| 30 + own + i);
        beginning.iter().copied().chain(own).collect::<Vec<u32>>()
    };
    let shape = StepShape {
        options: LoadOptions::default(),
        lora: LoraConfig::default(),
        examples: vec![example(0, 5), example(7, 9), example(20, 3)],
        supervised: 2,
        micro_batches: 3,
        gradient_checkpointing: true,
        mode: Mode::Run,
        model,
    };
    let counts = counted(&shape, &selected);
    print("layer, small", &counts.layer);
    print("step, small", &counts.step);
    assert_eq!(counts.tokens, 37);
    // Products of the few rows in the loss among them.
    let dequantized = counts.step.kinds.get(&Kind::Dequantize);
    assert_eq!(dequantized.map_or(0, |kind| kind.launches), 0);
    assert_eq!((counts.layer.uploads, counts.layer.reads), (0, 0));
    assert!(counts.step.uploads <= 4 * 3, "{}", counts.step.uploads);
    assert_eq!(counts.step.reads, 1);
}

/// Checks the counts: known work on tensors of known sizes.
#[test]
fn launches_bytes_and_operations_of_known_work_are_counted() {
    use burn::tensor::{Tensor, TensorData};
    let _one = COUNTING.lock();
    let Some(selected) = wgpu() else { return };
    let device = &selected.device;
    let (_, counts) = gpu_counts::count(device, Mode::Run, || {
        let values = |count| TensorData::new(vec![1f32; count], [count]);
        let a = Tensor::<1>::from_data(values(64 * 32), device).reshape([64, 32]);
        let b = Tensor::<1>::from_data(values(32 * 128), device).reshape([32, 128]);
        let product: Tensor<2> = a.matmul(b);
        let read = gpu_counts::read_floats(product).expect("the device works");
        assert!(read.iter().all(|value| *value == 32.0));
    });
    let counts = counts.expect("a GPU is counted");
    assert_eq!((counts.uploads, counts.reads), (2, 1));
    assert_eq!(counts.upload_bytes, 4 * (64 * 32 + 32 * 128));
    let total = counts.total();
    assert_eq!(total.flops, 2 * 64 * 32 * 128);
    assert_eq!(total.launches, 1);
    assert_eq!(total.bytes_read, 4 * (64 * 32 + 32 * 128));
    assert_eq!(total.bytes_written, 4 * 64 * 128);
}
