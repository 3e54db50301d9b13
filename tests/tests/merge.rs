//! The memory of merging from folder to folder. The allocator counts all threads, so this test is a
//! program of its own.

use std::fs;
use std::path::Path;

use export::merge::{MergeOptions, merge};
use safetensors::Dtype;
use serde_json::json;
use tests::allocator::CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const HIDDEN: usize = 256;
const WIDE: usize = 24_576;
const VOCABULARY: usize = 65_536;

#[test]
fn a_merge_holds_one_changed_tensor_and_none_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let (model, adapter) = (folder.path().join("model"), folder.path().join("adapter"));
    fs::create_dir(&model).unwrap();
    fs::create_dir(&adapter).unwrap();
    let largest = write_model(&model);
    write_adapter(&adapter);
    assert_eq!(largest, 32 << 20);

    let options = MergeOptions {
        model,
        adapter,
        output: folder.path().join("merged"),
        dtype: Some(Dtype::F32),
        largest_shard: 100 << 20,
        overwrite: false,
        without_tokenizer: true,
    };
    CountingAllocator::reset_peak();
    let before = CountingAllocator::bytes_in_use();
    let report = merge(&options, &mut |_, _| {}).unwrap();
    let held = CountingAllocator::peak() - before;
    assert_eq!(report.modules, 1);
    assert!(report.bytes > 200 << 20, "{}", report.bytes);
    println!("held at most {} KiB", held >> 10);
    let changed = WIDE * HIDDEN * size_of::<f32>();
    assert_eq!(changed, 24 << 20);
    // The changed tensor in f32, beside it a run of rows as read and as numbers (2 + 4 MiB), the
    // file's buffer (1 MiB), the adapter's file and matrices (4 · 25,000 floats, 0.4 MiB each), and
    // headers. The embedding alone would be 64 MiB in f32, the model 114 MiB in its own type.
    assert!(held < changed + (10 << 20), "held {held} bytes");
}

/// A model with a 32 MiB embedding and 12 MiB matrices, all zeros; returns the size of its largest
/// tensor.
fn write_model(folder: &Path) -> usize {
    let config = json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "torch_dtype": "float16",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let shapes = llama_burn::LlamaConfig::from_file(folder)
        .unwrap()
        .tensor_shapes();
    let tensors: Vec<_> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            (name, shape, vec![0u8; count * 2])
        })
        .collect();
    write(&folder.join("model.safetensors"), Dtype::F16, &tensors);
    tensors.iter().map(|(_, _, data)| data.len()).max().unwrap()
}

fn write_adapter(folder: &Path) {
    let config = json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["up_proj"], "layers_to_transform": [1],
    });
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let name = |half| format!("base_model.model.model.layers.1.mlp.up_proj.lora_{half}.weight");
    let tensor = |half, shape: [usize; 2]| {
        let bytes = [0.25f32; 1].map(f32::to_le_bytes).concat();
        (
            name(half),
            shape.to_vec(),
            bytes.repeat(shape[0] * shape[1]),
        )
    };
    let tensors = [tensor("A", [4, HIDDEN]), tensor("B", [WIDE, 4])];
    write(
        &folder.join("adapter_model.safetensors"),
        Dtype::F32,
        &tensors,
    );
}

fn write(path: &Path, dtype: Dtype, tensors: &[(String, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, shape, data)| {
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), data);
        (name, view.unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
