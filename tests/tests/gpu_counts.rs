//! What a step asks of a GPU, counted on whichever adapter there is.
#![cfg(feature = "wgpu")]

use burn::tensor::DType;
use gpu_counts::{Counts, Mode};
use llama_burn::{LlamaConfig, LoadOptions};
use lora_core::LoraConfig;
use trainer::step_counts::{StepShape, count_step, examples};

fn llama_8b() -> LlamaConfig {
    let text = r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": false}"#;
    match serde_json::from_str(text).unwrap() {
        serde_json::Value::Object(object) => LlamaConfig::from_json(&object).unwrap(),
        _ => unreachable!(),
    }
}

fn print(name: &str, counts: &Counts) {
    println!(
        "{name}: {} launches, {:.3} GB, {:.2} TFLOP, {} uploads ({} bytes), {} reads, {:.2} GiB reserved",
        counts.launches(),
        counts.bytes() as f64 / 1e9,
        counts.total().flops as f64 / 1e12,
        counts.uploads,
        counts.upload_bytes,
        counts.reads,
        counts.reserved_bytes as f64 / (1u64 << 30) as f64
    );
    for (kind, of_kind) in &counts.kinds {
        println!(
            "  {kind:<24} {:>6} launches {:>9.3} GB",
            of_kind.launches,
            (of_kind.bytes_read + of_kind.bytes_written) as f64 / 1e9
        );
    }
    for (name, times) in &counts.details {
        println!("    {times:>4} of {name}");
    }
}

#[test]
#[ignore]
fn print_counts() {
    let selected = trainer::device::select(trainer::device::Backend::Wgpu).unwrap();
    let f16 = std::env::var_os("COUNT_F16").is_some();
    let tokens: usize = std::env::var("COUNT_TOKENS").map_or(2048, |n| n.parse().unwrap());
    let model = llama_8b();
    let shape = StepShape {
        options: LoadOptions {
            dtype: if f16 { DType::F16 } else { DType::F32 },
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
    let counts = count_step(&shape, &selected.device).unwrap().unwrap();
    print("layer", &counts.layer);
    print("step", &counts.step);
}
