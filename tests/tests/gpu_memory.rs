//! The device memory of a training step, without running it. In a process of its own: a device's memory pools are
//! shared by all of a process.
#![cfg(feature = "wgpu")]

use burn::tensor::{DType, FloatDType};
use device::Backend;
use gpu_counts::Mode;
use llama_burn::{LlamaConfig, LoadOptions};
use lora_core::LoraConfig;
use train_step::step_counts::{StepShape, examples, reserved_by_step};

/// Llama 3.1 8B in 8 bits, one example of 2,048 tokens, all of them in the loss. All 32 layers, because pools grow by
/// pages. No kernel runs, so that the memory is reserved and never touched.
#[test]
fn a_step_of_llama_8b_in_16_bits_reserves_less_than_18_gib_and_recomputed_less_than_12() {
    let selected = match device::select(Backend::Wgpu) {
        Ok(selected) => selected,
        Err(error) if std::env::var_os("LORA_REQUIRE_WGPU").is_none() => {
            eprintln!("not tested: {error}");
            return;
        }
        Err(error) => panic!("LORA_REQUIRE_WGPU is set: {error}"),
    };
    if !selected.device.supports_dtype(FloatDType::F16) {
        eprintln!("not tested: this device has no f16");
        return;
    }
    // As on a card with 8 GB or more: lavapipe binds 128 MiB.
    let _large = kernels::AssumedBuffer::new(2 << 30);
    let text = include_str!("../../crates/bench/src/shapes/llama-3.1-8b.json");
    let object = serde_json::from_str(text).expect("an object");
    let model = LlamaConfig::from_json(&object).expect("a valid configuration");
    // The pools keep what the first step reserved, so that the smaller one comes first.
    for (gradient_checkpointing, most) in [(true, 12.0), (false, 18.0)] {
        let shape = StepShape {
            options: LoadOptions {
                dtype: DType::F16,
                ..LoadOptions::default()
            },
            lora: LoraConfig::default(),
            examples: examples(1, 2048, model.vocab_size),
            supervised: 2047,
            micro_batches: 1,
            gradient_checkpointing,
            mode: Mode::DryRun,
            model: model.clone(),
        };
        let bytes = reserved_by_step(&shape, &selected.device).expect("the adapters fit");
        let gib = bytes.expect("a GPU is counted") as f64 / (1u64 << 30) as f64;
        println!("recomputed {gradient_checkpointing}: {gib:.2} GiB");
        assert!(
            gib < most,
            "recomputed {gradient_checkpointing}: {gib:.2} GiB"
        );
    }
}
