//! GGUF: values compared with ggml's reference, models converted in both directions, and thousands
//! of damaged files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use data::PromptTemplate;
use data::{ModelFiles, RowTokenizer};
use llama_burn::gguf::{Array, GgufFile, GgufWriter, TensorKind, TensorPlan, Value, is_gguf};
use llama_burn::{LlamaConfig, Weights};
use lora_core::CounterRng;
use serde_json::json;
use tests::allocator::CountingAllocator;
use tests::fixture;
use tests::program::run;
use tests::workspace::copy_folder;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[test]
fn every_kind_of_block_gives_the_values_of_ggmls_reference() {
    let file = GgufFile::open(&fixture("gguf").join("kinds.gguf")).unwrap();
    let kinds: Vec<&String> = file
        .header
        .tensors
        .keys()
        .filter(|name| !name.contains('.'))
        .collect();
    assert_eq!(kinds.len(), 11);
    for name in kinds {
        let expected = file.floats(&format!("{name}.values")).unwrap();
        let values = file.floats(name).unwrap();
        assert_eq!(values.len(), 3 * 512);
        for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
            // The reference rounds in another order if a block has an offset.
            let tolerance = 1e-6 * expected.abs().max(0.1);
            assert!(
                (value - expected).abs() <= tolerance,
                "{name} {i}: {value} {expected}"
            );
        }
        // Integers times scales are exact.
        if let Some(tensor) = file.integers(name).unwrap() {
            for (i, (integer, value)) in tensor.integers.iter().zip(&values).enumerate() {
                assert_eq!(
                    f32::from(*integer) * tensor.scales[i / tensor.block],
                    *value,
                    "{name}"
                );
            }
        }
    }
    let exact: Vec<_> = ["Q8_0", "Q4_0", "Q5_0", "Q6_K", "Q4_1", "Q4_K", "F16"]
        .map(|name| file.integers(name).unwrap().is_some())
        .into();
    assert_eq!(exact, [true, true, true, true, false, false, false]);
    assert_eq!(
        file.header.metadata["test.epsilon"].as_decimal(),
        Some(1e-5)
    );
    let texts = file.header.metadata["test.texts"].as_texts().unwrap();
    assert_eq!(texts, ["a", "", "Ünïcödé ▁"]);
}

/// A byte-level tokenizer of 64 tokens: 60 printable bytes and some merges.
fn byte_level_tokenizer() -> serde_json::Value {
    let special = ["<unk>", "<s>", "</s>"];
    let merged = ["th", "the", "Ġt", "an"];
    let mut tokens: Vec<String> = special.map(String::from).to_vec();
    tokens.push("Ġ".into());
    tokens.extend(
        ('a'..='z')
            .chain('A'..='Z')
            .chain('0'..='0')
            .map(String::from),
    );
    tokens.extend(merged.map(String::from));
    assert!(tokens.len() <= 64);
    let vocab: serde_json::Map<_, _> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let added = special.iter().enumerate().map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["t", "h"], ["th", "e"], ["Ġ", "t"], ["a", "n"]]},
    })
}

/// A fixture's model as a folder of its own with a tokenizer and a chat template.
fn model_with_tokenizer(name: &str, into: &Path) -> PathBuf {
    let folder = into.join("model");
    copy_folder(&fixture(name).join("model"), &folder);
    fs::write(
        folder.join("tokenizer.json"),
        byte_level_tokenizer().to_string(),
    )
    .unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"});
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

fn export(arguments: &[&str]) -> String {
    let arguments = [&["export-gguf"], arguments].concat();
    run(&arguments).succeeded()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn all_tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let config = LlamaConfig::from_file(path).unwrap();
    let mut weights = Weights::open(path).unwrap();
    let shapes = config.tensor_shapes();
    weights.check(&shapes).unwrap();
    shapes
        .into_iter()
        .map(|(name, _)| (name.clone(), weights.read(&name).unwrap()))
        .collect()
}

#[test]
fn a_model_comes_back_from_gguf_as_it_was() {
    // Grouped queries, tied and untied heads, biases, both scalings of rotary frequencies.
    for name in ["tied", "untied", "llama3_rope", "linear_rope", "biases"] {
        let folder = tempfile::tempdir().unwrap();
        let model = model_with_tokenizer(name, folder.path());
        let file = folder.path().join("model.gguf");
        export(&[
            "--model",
            text(&model),
            "--output",
            text(&file),
            "--type",
            "f32",
        ]);
        assert!(is_gguf(&file));
        let (ours, theirs) = (
            LlamaConfig::from_file(&model).unwrap(),
            LlamaConfig::from_file(&file).unwrap(),
        );
        let frequencies = llama_burn::inverse_frequencies(&theirs);
        for (ours, theirs) in llama_burn::inverse_frequencies(&ours)
            .iter()
            .zip(frequencies)
        {
            assert!(
                (ours / theirs - 1.0).abs() < 1e-5,
                "{name}: {ours} {theirs}"
            );
        }
        assert_eq!(theirs.weight_bytes, 4, "{name}");
        let theirs = LlamaConfig {
            rope_scaling: ours.rope_scaling,
            initializer_range: ours.initializer_range,
            weight_bytes: ours.weight_bytes,
            ..theirs
        };
        assert_eq!(theirs, ours, "{name}");
        assert_eq!(all_tensors(&file), all_tensors(&model), "{name}");
    }
}

#[test]
fn the_tokenizer_and_the_chat_template_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer("tied", folder.path());
    let file = folder.path().join("model.gguf");
    export(&["--model", text(&model), "--output", text(&file)]);
    let (ours, theirs) = (
        ModelFiles::read(&model).unwrap(),
        ModelFiles::read(&file).unwrap(),
    );
    let tokenizers =
        [&ours, &theirs].map(|files| RowTokenizer::new(files, &PromptTemplate::Raw).unwrap());
    let texts = ["the rain in Spain", "THAT  thethe </s> an0", "  than", ""];
    for text in texts {
        let [ours, theirs] =
            [0, 1].map(|i| tokenizers[i].prompt(text, Path::new("prompt"), 1).unwrap());
        assert_eq!(ours, theirs, "{text:?}");
        assert_eq!(ours[0], 1, "the begin token is first");
    }
    assert_eq!(tokenizers[0].end_token(), tokenizers[1].end_token());
    assert!(theirs.has_chat_template());
}

#[test]
fn an_adapter_goes_into_the_weights_as_peft_merges_it() {
    for name in ["tied", "biases"] {
        let folder = tempfile::tempdir().unwrap();
        let model = model_with_tokenizer(name, folder.path());
        let file = folder.path().join("model.gguf");
        let adapter = fixture(name).join("trained");
        export(&[
            "--model",
            text(&model),
            "--adapter",
            text(&adapter),
            "--output",
            text(&file),
            "--type",
            "f32",
        ]);
        let (got, expected) = (
            all_tensors(&file),
            all_tensors(&fixture(name).join("merged")),
        );
        let mut changed = 0;
        for (tensor, expected) in &expected {
            changed += usize::from(all_tensors(&model)[tensor] != *expected);
            for (got, expected) in got[tensor].iter().zip(expected) {
                // PEFT's sums of r products in another order.
                assert!(
                    (got - expected).abs() < 1e-6,
                    "{name} {tensor}: {got} {expected}"
                );
            }
        }
        assert!(changed > 0, "the adapter changes something");
    }
}

#[test]
fn a_lora_file_has_llama_cpps_names_and_its_scale() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer("tied", folder.path());
    let file = folder.path().join("adapter.gguf");
    let adapter = fixture("tied").join("adapter");
    export(&[
        "--model",
        text(&model),
        "--adapter",
        text(&adapter),
        "--lora",
        "--output",
        text(&file),
    ]);
    let gguf = GgufFile::open(&file).unwrap();
    let header = &gguf.header;
    assert_eq!(header.text("general.type").unwrap(), Some("adapter"));
    assert_eq!(header.text("adapter.type").unwrap(), Some("lora"));
    let (config, tensors) = peft::read_adapter(&adapter).unwrap();
    let alpha = header.metadata["adapter.lora.alpha"].as_decimal().unwrap();
    let model = LlamaConfig::from_file(&model).unwrap();
    let q = &tensors.modules["model.layers.1.self_attn.q_proj"];
    let a = gguf.floats("blk.1.attn_q.weight.lora_a").unwrap();
    let b = gguf.floats("blk.1.attn_q.weight.lora_b").unwrap();
    assert_eq!(
        header.tensors["blk.1.attn_q.weight.lora_a"].shape,
        [q.r, q.d_in]
    );
    assert_eq!(
        header.tensors["blk.1.attn_q.weight.lora_b"].shape,
        [q.d_out, q.r]
    );
    assert!((alpha / q.r as f64 - config.lora.scale()).abs() < 1e-6);
    let half = model.head_dim / 2;
    for output in 0..q.d_out {
        let (head, within) = (output / model.head_dim, output % model.head_dim);
        // Hugging Face's halves are llama.cpp's pairs.
        let theirs = head * model.head_dim + within % half * 2 + within / half;
        for rank in 0..q.r {
            assert_eq!(b[theirs * q.r + rank], q.b[rank * q.d_out + output]);
            assert_eq!(a[rank * q.d_in + 1], q.a[q.r + rank]);
        }
    }
    assert_eq!(header.tensors.len(), 2 * tensors.modules.len());
    // The file is an adapter, and loading it as a model reports that.
    let error = LlamaConfig::from_file(&file).unwrap_err().to_string();
    assert!(
        error.contains("general.type") && error.contains("adapter"),
        "{error}"
    );
}

#[test]
fn a_vera_is_written_as_the_lora_that_adds_what_peft_merges() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer("vera", folder.path());
    let file = folder.path().join("adapter.gguf");
    let adapter = fixture("vera").join("trained");
    export(&[
        "--model",
        text(&model),
        "--adapter",
        text(&adapter),
        "--lora",
        "--output",
        text(&file),
    ]);
    let gguf = GgufFile::open(&file).unwrap();
    let alpha = gguf.header.metadata["adapter.lora.alpha"].as_decimal();
    let [a, b] = ["a", "b"].map(|factor| {
        let name = format!("blk.1.ffn_down.weight.lora_{factor}");
        gguf.floats(&name).unwrap()
    });
    let read = |folder: &str| {
        let mut weights = Weights::open(&fixture("vera").join(folder)).unwrap();
        weights.read("model.layers.1.mlp.down_proj.weight").unwrap()
    };
    let (base, merged) = (read("model"), read("merged"));
    let (r, d_in) = (5, 24);
    let scale = alpha.unwrap() as f32 / r as f32;
    let mut largest = 0f32;
    for (index, (base, merged)) in base.iter().zip(&merged).enumerate() {
        let (output, input) = (index / d_in, index % d_in);
        let products = (0..r).map(|rank| b[output * r + rank] * a[rank * d_in + input]);
        let delta = scale * products.sum::<f32>();
        largest = largest.max(delta.abs());
        // Roundings of sums below 4.
        assert!((base + delta - merged).abs() < 2e-6, "{delta}");
    }
    assert!(largest > 0.1, "{largest}");
}

#[test]
fn what_cannot_be_exported_is_said_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_with_tokenizer("tied", folder.path());
    let file = folder.path().join("model.gguf");
    let (model, out) = (text(&model), text(&file));
    let refused = |arguments: &[&str], words: &[&str]| {
        run(&[
            &["export-gguf", "--model", model, "--output", out],
            arguments,
        ]
        .concat())
        .failed_saying(words);
        let left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["model"], "nothing but the model is left");
    };
    refused(&["--type", "q9"], &["f32, f16 or q8_0"]);
    refused(&["--lora"], &["--adapter"]);
    let other = fixture("stories260k").join("adapter");
    refused(
        &["--adapter", text(&other)],
        &["the model have no place for it"],
    );
    // A tokenizer of whole words has no counterpart in llama.cpp.
    let words = tests::workspace::tokenizer(64).to_string();
    fs::write(Path::new(model).join("tokenizer.json"), words).unwrap();
    refused(&[], &["WordLevel", "BPE"]);
    fs::remove_file(Path::new(model).join("tokenizer.json")).unwrap();
    refused(&[], &["tokenizer.json"]);
    fs::write(&file, "something").unwrap();
    run(&["export-gguf", "--model", model, "--output", out]).failed_saying(&["--overwrite"]);
    assert_eq!(fs::read(&file).unwrap(), b"something");
}

/// Writes a complete small model in Q8_0 with a SentencePiece tokenizer.
fn sentence_piece_model(path: &Path) {
    let tokens = [
        "<unk>", "<s>", "</s>", "<0x41>", "▁", "t", "h", "e", "▁t", "▁th", "▁the", "he",
    ];
    let types = [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 1];
    let scores = (0..tokens.len()).map(|i| -(i as f32));
    let mut metadata = vec![
        ("general.architecture", Value::Text("llama".into())),
        ("llama.block_count", Value::U32(1)),
        ("llama.context_length", Value::U32(64)),
        ("llama.embedding_length", Value::U32(32)),
        ("llama.feed_forward_length", Value::U32(64)),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", Value::Text("llama".into())),
        (
            "tokenizer.chat_template",
            Value::Text("{{ messages }}".into()),
        ),
    ];
    let texts = tokens.map(String::from).to_vec();
    metadata.push(("tokenizer.ggml.tokens", Value::Array(Array::Text(texts))));
    metadata.push((
        "tokenizer.ggml.token_type",
        Value::Array(Array::I32(types.to_vec())),
    ));
    metadata.push((
        "tokenizer.ggml.scores",
        Value::Array(Array::F32(scores.collect())),
    ));
    let metadata: Vec<_> = metadata
        .into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect();
    let matrices = [
        ("token_embd", 12, 32),
        ("blk.0.attn_q", 32, 32),
        ("blk.0.attn_k", 32, 32),
        ("blk.0.attn_v", 32, 32),
        ("blk.0.attn_output", 32, 32),
        ("blk.0.ffn_gate", 64, 32),
        ("blk.0.ffn_up", 64, 32),
        ("blk.0.ffn_down", 32, 64),
    ];
    let plan = |name: &str, shape: &[usize], kind| TensorPlan {
        name: format!("{name}.weight"),
        shape: shape.to_vec(),
        kind,
    };
    let mut plans: Vec<_> = matrices
        .iter()
        .map(|(name, out, inner)| plan(name, &[*out, *inner], TensorKind::Q8_0))
        .collect();
    plans.extend(
        ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]
            .map(|name| plan(name, &[32], TensorKind::F32)),
    );
    let mut rng = CounterRng::new(9);
    let mut writer = GgufWriter::new(Vec::new(), &metadata, plans.clone()).unwrap();
    for plan in &plans {
        let count = plan.shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|_| 0.1 * rng.normal() as f32).collect();
        writer.write(&values).unwrap();
    }
    fs::write(path, writer.finish()).unwrap();
}

#[test]
fn integers_go_into_8_bit_tensors_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    sentence_piece_model(&path);
    let config = LlamaConfig::from_file(&path).unwrap();
    let device = burn::tensor::Device::flex();
    let mut errors = Vec::new();
    let model = llama_burn::load(&path, &config, Default::default(), &device, |tensor| {
        errors.extend(tensor.quantization);
    })
    .unwrap();
    assert_eq!(errors.len(), 7);
    assert!(errors.iter().all(|error| error.max_abs == 0.0));
    let mut weights = Weights::open(&path).unwrap();
    for (name, linear) in model.linears() {
        let [d_in, d_out] = linear.dims();
        let dense = weights.read(&format!("{name}.weight")).unwrap();
        let got = linear
            .weight
            .base()
            .dequantize()
            .into_data()
            .try_to_vec::<f32>()
            .unwrap();
        for input in 0..d_in {
            for output in 0..d_out {
                assert_eq!(
                    got[input * d_out + output],
                    dense[output * d_in + input],
                    "{name}"
                );
            }
        }
    }
}

#[test]
fn sentencepiece_merges_by_score() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    sentence_piece_model(&path);
    let files = ModelFiles::read(&path).unwrap();
    let tokenizer = RowTokenizer::new(&files, &PromptTemplate::Raw).unwrap();
    let ids = |text: &str| tokenizer.prompt(text, Path::new("prompt"), 1).unwrap();
    // `▁t` has a better score than `he`, so it is merged first: ▁t, ▁th, ▁the.
    assert_eq!(ids("the"), [1, 10]);
    assert_eq!(ids("hehe"), [1, 4, 11, 11]);
    // A byte that has a token, and a letter that has none.
    assert_eq!(ids("A"), [1, 4, 3]);
    assert_eq!(tokenizer.end_token(), 2);
}

#[test]
fn a_gguf_file_is_trained_planned_and_generated_with_as_a_folder_is() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.gguf");
    export(&["--output", text(&base), "--type", "q8_0"]);
    let rows: String = (0..16)
        .map(|i| {
            let row = json!({"context": format!("Profit rose {i} percent"), "target": "positive"});
            format!("{row}\n")
        })
        .collect();
    let data = folder.path().join("rows.jsonl");
    fs::write(&data, rows).unwrap();
    let output = folder.path().join("out");
    let config = folder.path().join("config.toml");
    let settings = format!(
        "base_model = {base:?}\ndataset_path = {data:?}\noutput_dir = {output:?}\nlora_r = 4\nlora_alpha = 8\n\
         quant_bits = 8\nlearning_rate = 1e-2\nnum_epochs = 6\nbatch_size = 4\nval_set_size = 4\n\
         max_seq_len = 64\nprompt_template = \"raw\"\n"
    );
    fs::write(&config, settings).unwrap();
    run(&["plan", "--config", text(&config)]).succeeded();
    run(&["train", "--backend", "cpu", "--config", text(&config)]).succeeded();
    let adapter = output.join("adapter");
    let generate = |adapter: &[&str]| {
        let arguments = [
            "generate",
            "--backend",
            "cpu",
            "--model",
            text(&base),
            "--template",
            "raw",
            "--max-new-tokens",
            "4",
            "--prompt",
            "Profit rose 20 percent",
        ];
        run(&[&arguments[..], adapter].concat()).succeeded()
    };
    assert!(generate(&["--adapter", text(&adapter)]).contains("positive"));
    let merged = folder.path().join("merged");
    run(&[
        "merge",
        "--model",
        text(&base),
        "--adapter",
        text(&adapter),
        "--output",
        text(&merged),
    ])
    .failed_saying(&["is a GGUF file", "export-gguf"]);
    assert!(!merged.exists());
    // What was trained beside the file's integers is written to the new file.
    let merged = folder.path().join("merged.gguf");
    export(&[
        "--model",
        text(&base),
        "--adapter",
        text(&adapter),
        "--output",
        text(&merged),
    ]);
    let (before, after) = (all_tensors(&base), all_tensors(&merged));
    let q = "model.layers.0.self_attn.q_proj.weight";
    assert!(before[q] != after[q]);
    let (ours, theirs) = (
        GgufFile::open(&base).unwrap(),
        GgufFile::open(&merged).unwrap(),
    );
    for (key, value) in &ours.header.metadata {
        if key.starts_with("tokenizer.") {
            assert_eq!(theirs.header.metadata.get(key), Some(value), "{key}");
        }
    }
}

/// Everything that is done with a file before training.
fn use_file(path: &Path) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let config = LlamaConfig::from_file(path).map_err(|error| text(&error))?;
    let files = ModelFiles::read(path).map_err(|error| text(&error))?;
    let tokenizer =
        RowTokenizer::new(&files, &PromptTemplate::Raw).map_err(|error| text(&error))?;
    tokenizer
        .prompt("the hat", Path::new("prompt"), 1)
        .map_err(|error| text(&error))?;
    let mut weights = Weights::open(path).map_err(|error| text(&error))?;
    let shapes = config.tensor_shapes();
    weights.check(&shapes).map_err(|error| text(&error))?;
    for (name, _) in &shapes {
        weights.integers(name).map_err(|error| text(&error))?;
        weights.read(name).map_err(|error| text(&error))?;
    }
    Ok(())
}

fn mutated(whole: &[u8], header: usize, rng: &mut CounterRng) -> Vec<u8> {
    let mut below = |end: usize| (rng.next_u64() % end.max(1) as u64) as usize;
    let mut bytes = whole.to_vec();
    // Most damage goes where it is interpreted.
    match below(8) {
        0 => bytes.truncate(below(whole.len())),
        1 => bytes.truncate(below(header)),
        2 => {
            for _ in 0..1 + below(8) {
                let at = below(header);
                bytes[at] ^= 1 << below(8);
            }
        }
        3 => {
            // A length or an offset that is huge, or all of them around there.
            let at = below(header.saturating_sub(8));
            let huge = [u64::MAX, 1 << 62, 1 << 40, 1 << 31, u64::MAX / 32, 0][below(6)];
            bytes[at..at + 8].copy_from_slice(&huge.to_le_bytes());
        }
        4 => {
            let (from, length) = (below(header), 1 + below(64));
            bytes.drain(from..(from + length).min(whole.len()));
        }
        5 => {
            let (from, to, length) = (below(header), below(header), 1 + below(64));
            let piece = whole[from..(from + length).min(whole.len())].to_vec();
            bytes.splice(to..to, piece);
        }
        6 => {
            let at = below(header);
            let end = (at + 1 + below(16)).min(header);
            bytes[at..end].fill([0, 0xff, 9, 0x80][below(4)]);
        }
        _ => {
            let at = below(whole.len());
            bytes[at] = below(256) as u8;
        }
    }
    bytes
}

#[test]
fn no_damaged_file_brings_the_program_down_or_takes_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.gguf");
    let sentence_piece = folder.path().join("sentence_piece.gguf");
    sentence_piece_model(&sentence_piece);
    let byte_level = folder.path().join("byte_level.gguf");
    let model = model_with_tokenizer("llama3_rope", folder.path());
    export(&["--model", text(&model), "--output", text(&byte_level)]);
    let mut rng = CounterRng::new(11);
    let (mut good, mut bad) = (0, 0);
    for source in [sentence_piece, byte_level] {
        use_file(&source).unwrap();
        let whole = fs::read(&source).unwrap();
        let first = GgufFile::open(&source).unwrap().header;
        let header = first
            .tensors
            .values()
            .map(|place| place.start)
            .min()
            .unwrap() as usize;
        for _ in 0..1_200 {
            fs::write(&path, mutated(&whole, header, &mut rng)).unwrap();
            CountingAllocator::reset_peak();
            let before = CountingAllocator::bytes_in_use();
            match use_file(&path) {
                Ok(()) => good += 1,
                Err(message) => {
                    assert!(!message.is_empty());
                    bad += 1;
                }
            }
            // A file of some 100 KiB: its tensors as floats, a tokenizer, buffers. Other tests of
            // this program count as well.
            let peak = CountingAllocator::peak() - before;
            assert!(peak < 256 << 20, "{} MiB for a small file", peak >> 20);
        }
    }
    // Damage in a weight cannot be noticed; most other damage can.
    assert!(bad > 1_200 && good > 50, "{bad} bad, {good} good");
}

#[test]
fn a_split_file_another_architecture_and_a_missing_tokenizer_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    sentence_piece_model(&path);
    let header = GgufFile::open(&path).unwrap().header;
    let write = |change: fn(&mut Vec<(String, Value)>)| {
        let mut metadata: Vec<_> = header.metadata.clone().into_iter().collect();
        change(&mut metadata);
        let bytes = GgufWriter::new(Vec::new(), &metadata, vec![])
            .unwrap()
            .finish();
        let path = folder.path().join("changed.gguf");
        fs::write(&path, bytes).unwrap();
        path
    };
    let split = write(|metadata| metadata.push(("split.count".into(), Value::U16(3))));
    let error = LlamaConfig::from_file(&split).unwrap_err().to_string();
    assert!(error.contains("llama-gguf-split --merge"), "{error}");
    let other = write(|metadata| {
        metadata.retain(|(key, _)| key != "general.architecture");
        metadata.push(("general.architecture".into(), Value::Text("gptneox".into())));
    });
    let error = LlamaConfig::from_file(&other).unwrap_err().to_string();
    assert!(
        error.contains("gptneox") && error.contains("\"llama\", \"qwen2\", \"qwen3\""),
        "{error}"
    );
    // Without tensors there is no embedding.
    let empty = write(|_| ());
    let error = LlamaConfig::from_file(&empty).unwrap_err().to_string();
    assert!(error.contains("token_embd.weight"), "{error}");
}
