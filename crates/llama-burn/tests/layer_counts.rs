//! What a decoder layer asks of a GPU, forward and backward.
#![cfg(feature = "wgpu")]

use burn::tensor::{DType, Device, Tensor};
use gpu_counts::{Counts, Mode, count};
use llama_burn::{LayerPass, Llama, LlamaConfig, LoadOptions, PackedTokens};
use lora_core::LoraConfig;

fn llama_8b() -> LlamaConfig {
    let text = r#"{"model_type": "llama", "vocab_size": 256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": false}"#;
    match serde_json::from_str(text).unwrap() {
        serde_json::Value::Object(object) => LlamaConfig::from_json(&object).unwrap(),
        _ => unreachable!(),
    }
}

fn print(name: &str, counts: &Counts) {
    println!(
        "{name}: {} launches, {:.3} GB, {:.3} GB fused, {:.2} TFLOP, {} uploads ({} bytes), {} reads, {:.2} GiB reserved",
        counts.launches(),
        counts.bytes() as f64 / 1e9,
        counts.fused_bytes() as f64 / 1e9,
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
    let f16 = std::env::var_os("COUNT_F16").is_some();
    let tokens: usize = std::env::var("COUNT_TOKENS").map_or(2048, |n| n.parse().unwrap());
    lora_core::set_fusion(lora_core::Fusion::InOrder);
    let device = Device::wgpu(burn::tensor::DeviceKind::DefaultDevice);
    let dtype = if f16 { DType::F16 } else { DType::F32 };
    let config = llama_8b();
    let options = LoadOptions {
        dtype,
        ..LoadOptions::default()
    };
    let (model, _) = count(&device, Mode::DryRun, || {
        Llama::random_on_device(&config, options, &device)
            .with_lora(&LoraConfig::default(), 1)
            .unwrap()
    });
    let ids: Vec<u32> = (0..tokens).map(|i| (i % 256) as u32).collect();
    let packed = PackedTokens::from_rows([&ids[..]]);
    let context = model.pass_context(&packed);
    let x = Tensor::<2>::zeros([tokens, 4096], (&device, dtype));
    let mut counts = None;
    for _ in 0..2 {
        let (_, counted) = count(&device, Mode::DryRun, || {
            let pass = LayerPass {
                layer: &model.layers[0],
                context: &context,
                dropout_seed: None,
                wanted: None,
            };
            let (y, activations) = pass.forward(&x);
            let mut gradients = Vec::new();
            let below = pass.backward(&x, activations, y, true, &mut |_, gradient| {
                gradients.push(gradient)
            });
            (below, gradients)
        });
        counts = counted;
    }
    print("layer", &counts.unwrap());
}
