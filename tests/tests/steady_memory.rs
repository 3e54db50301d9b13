//! The memory of a run does not grow with its steps.
//!
//! Only one test: the counting allocator counts every thread of the process.

use burn::tensor::Device;
use data::{Batch, BatchRow, Prefixes};
use llama_burn::{Llama, LlamaConfig, RopeScaling};
use lora_core::LoraConfig;
use tests::allocator::CountingAllocator;
use train_step::gradients::{AdapterGradients, PassOptions, accumulate};
use train_step::optimizer::AdamW;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Lists that have grown once stay large; a tensor that is never freed would be a thousand bytes
/// per step.
const TOLERANCE: usize = 20_000;

#[test]
fn what_is_in_use_after_many_steps_is_what_was_in_use_after_some() {
    let config = LlamaConfig {
        vocab_size: 64,
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: true,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: vec![],
        weight_bytes: 4,
        ..LlamaConfig::default()
    };
    let model = Llama::random(&config, 1, &Device::flex().autodiff());
    let mut model = model
        .with_lora(&LoraConfig::default(), 1)
        .expect("the settings are valid");
    let mut optimizer = AdamW::default().resumable();
    let ids: Vec<u32> = (0..24).collect();
    let row = BatchRow {
        ids: &ids,
        targets: vec![(22, 3)],
        line: 1,
    };
    let batch = Batch::new(&[row], Prefixes::Apart);
    let mut steps = |count: usize, mut model: Llama| {
        for _ in 0..count {
            let mut sums = AdapterGradients::default();
            let options = PassOptions {
                gradient_checkpointing: false,
                dropout_seed: 1,
                ..PassOptions::default()
            };
            accumulate(&model, &batch, options, &mut sums);
            model = optimizer.step(1e-3, model, sums.into_mean(1.0).gradients);
        }
        model
    };
    // A multiple of the steps between two clean-ups of the autodiff graph.
    model = steps(64, model);
    let before = CountingAllocator::bytes_in_use();
    model = steps(320, model);
    let after = CountingAllocator::bytes_in_use();
    drop(model);
    assert!(
        after < before + TOLERANCE,
        "{before} bytes became {after} in 320 steps"
    );
}
