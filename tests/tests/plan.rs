//! The planner's peak of a step compared with every byte that real passes allocate.
//!
//! Only one test: the counting allocator counts every thread of the process.

use burn::tensor::Device;
use data::{Batch, BatchRow, Prefixes};
use llama_burn::{Llama, LlamaConfig, RopeScaling, TokenRows};
use lora_core::{LoraConfig, Method, Quantization, TargetModules};
use lora_train::plan::{Plan, PlanOptions, Workload};
use tests::allocator::CountingAllocator;
use train_step::gradients::{AdapterGradients, PassOptions, accumulate};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Buffers of the matrix product that stay allocated; in the plan they belong to the program.
const PRODUCT_BUFFERS: f64 = 1.5e6;

/// A tenth, for allocations that no formula includes: lists, indices, the thread pool's queue.
const TOLERANCE: f64 = 0.1;

/// A model, a micro-batch, adapters.
#[derive(Debug, Clone, Copy)]
struct Case {
    vocab: usize,
    hidden: usize,
    feed_forward: usize,
    layers: usize,
    heads: [usize; 2],
    rows: usize,
    length: usize,
    supervised: usize,
    r: usize,
    all_linear: bool,
    method: Method,
    bits8: bool,
    checkpointing: bool,
    /// Adapters of the last layer only, and rows of the embedding and the output layer tied to it.
    token_rows: bool,
    /// Modules that are trained as a whole.
    saved: &'static [&'static str],
    /// Norms of each head's queries and keys.
    head_norms: bool,
    /// The width of a head if it is not `hidden` over the number of heads.
    head_dim: Option<usize>,
}

const CASE: Case = Case {
    vocab: 64,
    hidden: 256,
    feed_forward: 512,
    layers: 6,
    heads: [4, 2],
    rows: 8,
    length: 64,
    supervised: 2,
    r: 4,
    all_linear: false,
    method: Method::Lora,
    bits8: true,
    checkpointing: false,
    token_rows: false,
    saved: &[],
    head_norms: false,
    head_dim: None,
};

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    vec![
        CASE,
        Case { checkpointing: true, rows: 16, ..CASE },
        Case { rows: 1, length: 512, ..CASE },
        Case { rows: 1, length: 2048, checkpointing: true, ..CASE },
        Case { all_linear: true, r: 64, ..CASE },
        Case { all_linear: true, r: 64, checkpointing: true, rows: 32, ..CASE },
        Case { feed_forward: 1536, heads: [4, 1], ..CASE },
        Case { hidden: 512, heads: [8, 8], ..CASE },
        Case { vocab: 49_152, hidden: 64, feed_forward: 128, supervised: 8, ..CASE },
        Case { vocab: 49_152, hidden: 64, feed_forward: 128, supervised: 60, checkpointing: true, ..CASE },
        Case { method: Method::Dora, ..CASE },
        Case { method: Method::Dora, all_linear: true, ..CASE },
        Case { method: Method::Dora, all_linear: true, checkpointing: true, rows: 16, ..CASE },
        Case { method: Method::Vera, r: 64, ..CASE },
        Case { method: Method::Vera, r: 64, all_linear: true, ..CASE },
        Case { method: Method::Vera, r: 256, all_linear: true, checkpointing: true, rows: 16, ..CASE },
        Case { bits8: false, ..CASE },
        Case { layers: 2, rows: 32, supervised: 64, ..CASE },
        Case { layers: 12, rows: 32, length: 16, ..CASE },
        Case { head_norms: true, ..CASE },
        Case { head_norms: true, head_dim: Some(128), checkpointing: true, rows: 16, ..CASE },
        Case { head_norms: true, head_dim: Some(128), rows: 1, length: 512, ..CASE },
        Case { token_rows: true, ..CASE },
        Case { token_rows: true, checkpointing: true, rows: 16, ..CASE },
        Case { token_rows: true, vocab: 49_152, hidden: 64, feed_forward: 128, supervised: 8, ..CASE },
        Case { saved: &["norm"], ..CASE },
        Case { saved: &["norm"], head_norms: true, checkpointing: true, rows: 16, ..CASE },
        Case { saved: &["o_proj"], ..CASE },
        Case { saved: &["down_proj"], rows: 16, checkpointing: true, ..CASE },
        Case { saved: &["embed_tokens"], vocab: 16_384, ..CASE },
        Case { saved: &["lm_head"], vocab: 49_152, hidden: 64, feed_forward: 128, supervised: 60, checkpointing: true, ..CASE },
        Case { saved: &["embed_tokens", "lm_head"], vocab: 16_384, supervised: 8, ..CASE },
    ]
}

fn config(case: Case) -> LlamaConfig {
    LlamaConfig {
        vocab_size: case.vocab,
        hidden_size: case.hidden,
        intermediate_size: case.feed_forward,
        num_hidden_layers: case.layers,
        num_attention_heads: case.heads[0],
        num_key_value_heads: case.heads[1],
        head_dim: case.head_dim.unwrap_or(case.hidden / case.heads[0]),
        query_key_norm: case.head_norms,
        max_position_embeddings: 8192,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: true,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: vec![],
        weight_bytes: 4,
        ..LlamaConfig::default()
    }
}

/// Among those of the rows.
const TRAINED_TOKENS: [usize; 2] = [3, 40];

fn lora(case: Case) -> LoraConfig {
    let mut lora = LoraConfig {
        r: case.r,
        method: case.method,
        modules_to_save: case.saved.iter().map(ToString::to_string).collect(),
        ..LoraConfig::default()
    };
    if case.all_linear {
        lora.target_modules = TargetModules::AllLinear;
    }
    if case.token_rows {
        lora.layers_to_transform = Some(vec![case.layers - 1]);
        lora.trainable_token_indices = vec![("embed_tokens".into(), TRAINED_TOKENS.to_vec())];
    }
    lora
}

/// Bytes at the peak of a micro-batch that were not in use before it.
fn measured(case: Case, batch: &Batch) -> f64 {
    let mut model = Llama::random(&config(case), 1, &Device::flex().autodiff());
    if case.bits8 {
        for (_, linear) in model.linears_mut() {
            let quantized = linear.clone().quantize(Quantization::Bits8);
            *linear = quantized.expect("the widths are multiples of a block");
        }
    }
    let counts = model.count(&lora(case)).expect("the settings are valid");
    let before = CountingAllocator::bytes_in_use();
    let mut model = model
        .with_lora(&lora(case), 1)
        .expect("the settings are valid");
    if counts.shared > 0 {
        // Matrices that all modules share are there once. What describes the tensors of a module takes 5 KB (measured);
        // copies of the matrices would take 90 KB and more.
        let added = (CountingAllocator::bytes_in_use() - before) as u64;
        let most = 4 * (counts.shared + counts.trainable) + 8192 * counts.adapted_modules as u64;
        assert!(added < most, "{added} bytes, at most {most}");
    }
    if case.token_rows {
        let values = vec![0.02; TRAINED_TOKENS.len() * case.hidden];
        let device = model.device();
        model.embed_rows = Some(TokenRows::new(TRAINED_TOKENS.to_vec(), values, &device));
    }
    let options = PassOptions {
        gradient_checkpointing: case.checkpointing,
        dropout_seed: 1,
        ..PassOptions::default()
    };
    // Once before measuring: thread pools and their buffers stay allocated.
    accumulate(&model, batch, options, &mut AdapterGradients::default());
    let before = CountingAllocator::bytes_in_use();
    CountingAllocator::reset_peak();
    accumulate(&model, batch, options, &mut AdapterGradients::default());
    (CountingAllocator::peak() - before) as f64
}

fn predicted(case: Case, batch: &Batch) -> (f64, &'static str) {
    let options = PlanOptions {
        lora: lora(case),
        quantization: if case.bits8 {
            Quantization::Bits8
        } else {
            Quantization::None
        },
        float_bytes: 4,
        gradient_checkpointing: case.checkpointing,
        accumulates: false,
        on_gpu: false,
        workload: Workload::of_batch(batch),
    };
    let plan = Plan::new(&config(case), &options).expect("the settings are valid");
    let step: u64 = plan.step.iter().map(|part| part.bytes).sum();
    ((step + plan.adapters[1].bytes) as f64, plan.phase)
}

#[test]
fn the_predicted_peak_of_a_step_is_within_a_tenth_of_what_is_allocated() {
    let mut wrong = Vec::new();
    for case in cases() {
        for prefixes in [Prefixes::Apart, Prefixes::Shared] {
            // The first third of every sequence is the same.
            let rows: Vec<Vec<u32>> = (0..case.rows)
                .map(|row| {
                    let token = |i| if i < case.length / 3 { i } else { i + row };
                    (0..case.length).map(|i| (token(i) % 60) as u32).collect()
                })
                .collect();
            let rows: Vec<BatchRow> = rows
                .iter()
                .map(|ids| BatchRow {
                    ids,
                    targets: (0..case.supervised)
                        .map(|i| (case.length - 2 - i % (case.length - 1), 3))
                        .collect(),
                    line: 1,
                })
                .collect();
            let batch = Batch::new(&rows, prefixes);
            let measured = measured(case, &batch);
            let (predicted, phase) = predicted(case, &batch);
            let off = (predicted + PRODUCT_BUFFERS) / (measured + PRODUCT_BUFFERS) - 1.0;
            let line = format!(
                "{off:+.3}  {:6.2} MB predicted, {:6.2} MB measured, in {phase}: {prefixes:?} {case:?}",
                predicted / 1e6,
                measured / 1e6
            );
            println!("{line}");
            if off.abs() > TOLERANCE {
                wrong.push(line);
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
