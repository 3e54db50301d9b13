//! The trainer's numbers compared with those of transformers and PEFT, on every device of this
//! build.
//!
//! The second half tests the comparison: each mistake that is easy to make in a trainer is made in
//! a copy of a fixture, and must be found.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use llama_burn::{LlamaConfig, LoadOptions, PackedTokens};
use lora_core::Quantization;
use parity::{Report, against_reference};
use safetensors::SafeTensors;
use serde_json::json;
use tests::workspace::{copy_folder, edit_json};
use tests::{devices, fixture, stories260k};

/// The learning rate of `make_fixtures.py`.
const LEARNING_RATE: f64 = 1e-3;

/// Compares every device with a fixture and prints the table.
fn agrees(name: &str, model: Option<&Path>) {
    let report = against_reference(&fixture(name), model, LEARNING_RATE, &devices())
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    println!("{report}");
    assert!(report.passed(), "{report}");
}

#[test]
fn tied_head_and_grouped_queries_agree_with_transformers_and_peft() {
    agrees("tied", None);
}

#[test]
fn untied_head_and_bf16_weights_agree_with_transformers_and_peft() {
    agrees("untied", None);
}

#[test]
fn llama3_rope_scaling_agrees_with_transformers_and_peft() {
    agrees("llama3_rope", None);
}

#[test]
fn linear_rope_scaling_in_a_version_4_config_agrees_with_transformers_and_peft() {
    agrees("linear_rope", None);
}

#[test]
fn attention_and_mlp_biases_agree_with_transformers_and_peft() {
    agrees("biases", None);
}

#[test]
fn shards_rslora_and_all_linear_agree_with_transformers_and_peft() {
    agrees("sharded_rslora_all_linear", None);
}

#[test]
fn packed_rows_agree_with_rows_that_transformers_pads() {
    agrees("padded_rows", None);
}

#[test]
fn dora_agrees_with_peft_magnitudes_training_and_merge_included() {
    agrees("dora", None);
}

#[test]
fn vera_agrees_with_peft_vectors_training_and_merge_included() {
    agrees("vera", None);
    for end in ["q_proj.vera_lambda_b", "q_proj.vera_lambda_d", "vera_A"] {
        notices("vera", &["logits", "loss", "LoRA gradients"], |folder| {
            double(&folder.join("adapter").join(peft::WEIGHTS_FILE), end);
        });
    }
}

#[test]
fn shared_matrices_that_are_not_saved_are_drawn_again_as_peft_draws_them() {
    let (config, tensors) = peft::read_adapter(&fixture("vera/adapter")).expect("an adapter");
    let saved = tensors.shared.expect("shared matrices").factors;
    let [d_in, _, d_out] = saved.shape;
    // Bit for bit.
    assert_eq!(config.lora.shared_factors([[d_in, d_out]]), Some(saved));

    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_folder(&fixture("vera"), folder.path());
    for adapter in ["adapter", "trained"].map(|name| folder.path().join(name)) {
        let (mut config, tensors) = peft::read_adapter(&adapter).expect("an adapter");
        config.lora.save_projection = false;
        peft::write_adapter(&adapter, &config, &tensors).expect("a writable folder");
        let (read, without) = peft::read_adapter(&adapter).expect("an adapter");
        assert_eq!((read, without.shared), (config, None));
    }
    let report = on_the_cpu(folder.path());
    assert!(report.passed(), "{report}");
    edit_json(
        &folder.path().join("adapter").join(peft::CONFIG_FILE),
        |config| {
            config["projection_prng_key"] = json!(8);
        },
    );
    assert!(!on_the_cpu(folder.path()).passed());
}

#[test]
fn a_learning_rate_of_its_own_for_b_agrees_with_pefts_loraplus_optimizer() {
    agrees("loraplus", None);
    // With one learning rate for A and B the losses are others.
    notices("loraplus", &["train_losses", "adapter after"], |folder| {
        edit_floats(folder, "loraplus_lr_ratio", |ratio| ratio.fill(1.0));
    });
}

#[test]
fn adapters_that_are_taken_out_of_the_weights_agree_with_pefts_pissa_and_olora() {
    agrees("pissa", None);
    agrees("olora", None);
    // Another part of the weights, with which nothing is as in the reference.
    for (name, init) in [("pissa", "olora"), ("olora", "pissa")] {
        notices(name, &["initial adapters", "logits", "loss"], |folder| {
            edit_init(folder, init);
        });
    }
}

#[test]
fn a_randomized_decomposition_with_many_iterations_is_pefts_exact_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_folder(&fixture("pissa"), folder.path());
    edit_init(folder.path(), "pissa_niter_300");
    let report = on_the_cpu(folder.path());
    assert!(report.passed(), "{report}");
    edit_init(folder.path(), "pissa_niter_0");
    assert!(!on_the_cpu(folder.path()).passed());
}

#[test]
fn patterns_of_ranks_alphas_and_exclusion_agree_with_peft() {
    agrees("patterns", None);
}

#[test]
fn an_adapter_of_a_tied_head_agrees_with_peft_training_included() {
    agrees("adapted_head", None);
}

#[test]
fn trained_biases_of_modules_and_of_b_agree_with_peft() {
    agrees("trained_biases", None);
    agrees("lora_bias", None);
    // A bias of B without the scale.
    notices("lora_bias", &["logits", "LoRA gradients"], |folder| {
        double(
            &folder.join("adapter").join(peft::WEIGHTS_FILE),
            "lora_B.bias",
        );
    });
}

#[test]
fn trained_norms_agree_with_peft() {
    agrees("saved_norms", None);
}

#[test]
fn a_trained_embedding_and_head_of_a_tied_model_agree_with_peft() {
    for name in ["saved_embedding", "saved_head", "saved_tables"] {
        agrees(name, None);
    }
}

#[test]
fn whole_linear_layers_and_untied_tables_agree_with_peft() {
    agrees("saved_linears", None);
    notices(
        "saved_linears",
        &["logits", "loss", "LoRA gradients"],
        |folder| {
            double(
                &folder.join("adapter").join(peft::WEIGHTS_FILE),
                "layers.0.self_attn.o_proj.weight",
            );
        },
    );
}

#[test]
fn whole_modules_and_an_adapted_embedding_agree_with_peft() {
    agrees("whole_modules", None);
}

#[test]
fn mistral_with_an_adapter_on_every_module_agrees_with_transformers_and_peft() {
    agrees("mistral", None);
}

#[test]
fn qwen2_with_biases_of_queries_keys_and_values_agrees_with_transformers_and_peft() {
    agrees("qwen2", None);
}

#[test]
fn qwen3_with_norms_of_heads_agrees_with_transformers_and_peft() {
    agrees("qwen3", None);
}

#[test]
fn qwen3_with_biases_and_gradients_through_the_norms_of_all_layers_agrees_with_transformers_and_peft()
 {
    agrees("qwen3_biases", None);
}

#[test]
fn a_sliding_window_of_all_layers_and_of_some_agrees_with_transformers_and_peft() {
    agrees("mistral_window", None);
    agrees("qwen2_window", None);
}

#[test]
fn a_window_of_another_length_or_in_other_layers_is_noticed() {
    for (name, key, value) in [
        ("mistral_window", "sliding_window", json!(null)),
        ("mistral_window", "sliding_window", json!(6)),
        ("qwen2_window", "use_sliding_window", json!(false)),
        (
            "qwen2_window",
            "layer_types",
            json!(["sliding_attention", "full_attention"]),
        ),
    ] {
        notices(name, &["base_logits", "LoRA gradients"], |folder| {
            edit_json(&folder.join("model/config.json"), |config| {
                config[key] = value;
            });
        });
    }
}

#[test]
fn norms_of_queries_and_keys_and_biases_that_differ_are_noticed() {
    for (name, end) in [
        ("qwen3", "layers.1.self_attn.q_norm.weight"),
        ("qwen3", "layers.0.self_attn.k_norm.weight"),
        ("qwen2", "layers.0.self_attn.v_proj.bias"),
        ("qwen2", "layers.1.self_attn.k_proj.bias"),
    ] {
        notices(name, &["base_logits", "LoRA gradients"], |folder| {
            double(&folder.join("model/model.safetensors"), end);
        });
    }
}

#[test]
fn a_magnitude_a_rank_s_scale_a_bias_and_a_norm_that_are_left_out_are_noticed() {
    notices("dora", &["logits", "loss", "LoRA gradients"], |folder| {
        for adapter in ["adapter", "trained"] {
            double(
                &folder.join(adapter).join(peft::WEIGHTS_FILE),
                "q_proj.lora_magnitude_vector",
            );
        }
    });
    notices("patterns", &["logits", "LoRA gradients"], |folder| {
        edit_json(&folder.join("adapter").join(peft::CONFIG_FILE), |config| {
            config["alpha_pattern"] = json!({});
        });
    });
    notices("trained_biases", &["logits"], |folder| {
        let path = folder.join("adapter").join(peft::WEIGHTS_FILE);
        double(&path, "layers.0.self_attn.k_proj.bias");
    });
    notices("whole_modules", &["logits"], |folder| {
        double(
            &folder.join("adapter").join(peft::WEIGHTS_FILE),
            "model.norm.weight",
        );
    });
}

/// Doubles the elements of every f32 tensor whose name ends with `end`.
fn double(path: &Path, end: &str) {
    let bytes = fs::read(path).expect("the fixture can be read");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut found = 0;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        let mut data = view.data().to_vec();
        if name.ends_with(end) {
            found += 1;
            for word in data.chunks_exact_mut(4) {
                let value = f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                word.copy_from_slice(&(2.0 * value).to_le_bytes());
            }
        }
        tensors.push((name.to_string(), view.dtype(), view.shape().to_vec(), data));
    }
    assert!(found > 0, "no tensor ends with {end}");
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data);
        (name, view.expect("the same shape and type"))
    });
    let written = safetensors::serialize(views, None).expect("the same tensors");
    fs::write(path, written).expect("a temporary folder is writable");
}

#[test]
fn stories260k_agrees_with_transformers_and_peft() {
    if let Some(model) = stories260k() {
        agrees("stories260k", Some(&model));
    }
}

/// Compares the CPU with a changed copy of a fixture, which must fail at least in `quantities`.
fn notices(name: &str, quantities: &[&str], change: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_folder(&fixture(name), folder.path());
    change(folder.path());
    let report = on_the_cpu(folder.path());
    for quantity in quantities {
        let found = report
            .failures()
            .any(|(_, check)| check.quantity.starts_with(quantity));
        assert!(found, "{quantity} should have failed:\n{report}");
    }
}

fn on_the_cpu(folder: &Path) -> Report {
    let devices = [("cpu".to_string(), Device::flex())];
    against_reference(folder, None, LEARNING_RATE, &devices).expect("the folder can be read")
}

#[test]
fn another_adapter_scale_is_noticed() {
    notices(
        "tied",
        &["logits", "loss", "LoRA gradients", "merged weights"],
        |folder| {
            for adapter in ["adapter", "trained"] {
                edit_json(&folder.join(adapter).join(peft::CONFIG_FILE), |config| {
                    config["lora_alpha"] = json!(15.9);
                });
            }
        },
    );
}

#[test]
fn alpha_over_r_in_place_of_its_root_is_noticed() {
    notices(
        "sharded_rslora_all_linear",
        &["logits", "loss", "LoRA gradients"],
        |folder| {
            edit_json(&folder.join("adapter").join(peft::CONFIG_FILE), |config| {
                config["use_rslora"] = json!(false);
            });
        },
    );
}

#[test]
fn a_rope_scaling_that_is_left_out_is_noticed() {
    notices(
        "llama3_rope",
        &["base_logits", "logits", "loss", "LoRA gradients"],
        |folder| {
            edit_json(&folder.join("model/config.json"), |config| {
                config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 100.0});
            });
        },
    );
    notices(
        "linear_rope",
        &["base_logits", "logits", "loss", "LoRA gradients"],
        |folder| {
            edit_json(&folder.join("model/config.json"), |config| {
                config["rope_scaling"] = json!(null);
            });
        },
    );
}

#[test]
fn another_rope_theta_is_noticed() {
    notices("untied", &["base_logits"], |folder| {
        edit_json(&folder.join("model/config.json"), |config| {
            config["rope_parameters"]["rope_theta"] = json!(10_000.0);
        });
    });
}

/// Rewrites `reference.safetensors` with the integers of one tensor changed, row by row.
fn edit_integers(folder: &Path, name: &str, change: impl Fn(&mut [i64])) {
    edit_tensor(folder, name, |shape, bytes| {
        let words = bytes.chunks_exact(8);
        let mut integers: Vec<i64> = words
            .map(|word| i64::from_le_bytes(word.try_into().expect("eight bytes")))
            .collect();
        integers.chunks_mut(shape[1]).for_each(change);
        let integers = integers.iter();
        integers.flat_map(|integer| integer.to_le_bytes()).collect()
    });
}

/// As [`edit_integers`], for the f32 elements of one tensor.
fn edit_floats(folder: &Path, name: &str, change: impl Fn(&mut [f32])) {
    edit_tensor(folder, name, |_, bytes| {
        let words = bytes.chunks_exact(4);
        let mut floats: Vec<f32> = words
            .map(|word| f32::from_le_bytes(word.try_into().expect("four bytes")))
            .collect();
        change(&mut floats);
        floats
            .iter()
            .flat_map(|float| float.to_le_bytes())
            .collect()
    });
}

/// Rewrites `reference.safetensors` with the bytes of one tensor changed; `change` also gets its shape.
fn edit_tensor(folder: &Path, name: &str, change: impl FnOnce(&[usize], &[u8]) -> Vec<u8>) {
    let path = folder.join("reference.safetensors");
    let bytes = fs::read(&path).expect("the fixture can be read");
    let file = SafeTensors::deserialize(&bytes).expect("the fixture is a safetensors file");
    let view = file.tensor(name).expect("the fixture has this tensor");
    let changed = change(view.shape(), view.data());
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("the same file");
    let metadata = header.metadata().clone();
    let tensors = file.iter().map(|(key, view)| {
        if key == name {
            let view =
                safetensors::tensor::TensorView::new(view.dtype(), view.shape().into(), &changed);
            (key, view.expect("the same shape and type"))
        } else {
            (key, view)
        }
    });
    fs::write(
        &path,
        safetensors::serialize(tensors, metadata).expect("the same tensors"),
    )
    .expect("a temporary folder is writable");
}

/// Rewrites `reference.safetensors` with another name of the initialization.
fn edit_init(folder: &Path, init: &str) {
    let path = folder.join("reference.safetensors");
    let bytes = fs::read(&path).expect("the fixture can be read");
    let file = SafeTensors::deserialize(&bytes).expect("the fixture is a safetensors file");
    let metadata = HashMap::from([("init_lora_weights".to_string(), init.to_string())]);
    let written = safetensors::serialize(file.tensors(), Some(metadata));
    fs::write(&path, written.expect("the same tensors")).expect("a temporary folder is writable");
}

#[test]
fn labels_that_are_off_by_one_are_noticed() {
    notices(
        "padded_rows",
        &["loss", "LoRA gradients", "train_losses"],
        |folder| {
            edit_integers(folder, "labels", |row| row.rotate_left(1));
        },
    );
}

#[test]
fn one_supervised_token_less_is_noticed() {
    notices("padded_rows", &["loss", "LoRA gradients"], |folder| {
        edit_integers(folder, "labels", |row| {
            let first = row
                .iter()
                .position(|label| *label != -100)
                .expect("a label");
            row[first] = -100;
        });
    });
}

#[test]
fn another_token_in_the_middle_is_noticed() {
    notices("padded_rows", &["base_logits", "logits"], |folder| {
        edit_integers(folder, "input_ids", |row| row[2] = 3 + (row[2] + 1) % 60);
    });
}

#[test]
fn a_token_of_padding_that_is_taken_for_a_row_s_end_is_an_error_or_noticed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_folder(&fixture("padded_rows"), folder.path());
    // One token too few: the last position in the loss of each sequence is missing.
    edit_integers(folder.path(), "attention_mask", |row| {
        let last = row.iter().rposition(|place| *place == 1).expect("a token");
        row[last] = 0;
    });
    let report = on_the_cpu(folder.path());
    assert!(
        report.failures().any(|(_, check)| check.quantity == "loss"),
        "{report}"
    );
}

#[test]
fn a_merge_of_another_adapter_is_noticed() {
    notices(
        "biases",
        &["merged weights", "adapter after training"],
        |folder| {
            fs::copy(
                folder.join("adapter").join(peft::WEIGHTS_FILE),
                folder.join("trained").join(peft::WEIGHTS_FILE),
            )
            .expect("the file can be copied");
        },
    );
}

#[test]
fn a_file_of_the_reference_that_is_missing_or_cut_off_is_an_error_that_names_it() {
    for (file, word) in [
        ("reference.safetensors", "reference.safetensors"),
        (
            "adapter/adapter_model.safetensors",
            "adapter_model.safetensors",
        ),
        ("trained/adapter_config.json", "adapter_config.json"),
        ("model/model.safetensors", "model.safetensors"),
        ("model/config.json", "config.json"),
    ] {
        for cut in [false, true] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            copy_folder(&fixture("tied"), folder.path());
            let path = folder.path().join(file);
            if cut {
                let bytes = fs::read(&path).expect("the fixture can be read");
                fs::write(&path, &bytes[..bytes.len() / 2]).expect("it can be written");
            } else {
                fs::remove_file(&path).expect("it can be removed")
            }
            let devices = [("cpu".to_string(), Device::flex())];
            let error = against_reference(folder.path(), None, LEARNING_RATE, &devices)
                .expect_err("the folder is broken")
                .to_string();
            assert!(error.contains(word), "{file}, cut off: {cut}: {error}");
        }
    }
}

#[test]
fn an_adapter_of_peft_is_written_again_tensor_by_tensor_as_it_was() {
    for name in [
        "tied",
        "linear_rope",
        "sharded_rslora_all_linear",
        "padded_rows",
        "dora",
        "vera",
        "patterns",
        "adapted_head",
        "trained_biases",
        "whole_modules",
    ] {
        let theirs = fixture(name).join("adapter");
        let (config, tensors) = peft::read_adapter(&theirs).expect("PEFT's adapter can be read");
        let folder = tempfile::tempdir().expect("a temporary folder");
        peft::write_adapter(folder.path(), &config, &tensors).expect("it can be written");
        let read = |folder: &Path| fs::read(folder.join(peft::WEIGHTS_FILE)).expect("weights");
        let (theirs_bytes, ours_bytes) = (read(&theirs), read(folder.path()));
        let theirs_file = SafeTensors::deserialize(&theirs_bytes).expect("PEFT's file");
        let ours_file = SafeTensors::deserialize(&ours_bytes).expect("our file");
        assert_eq!(theirs_file.len(), ours_file.len());
        for (tensor, view) in theirs_file.iter() {
            let ours = ours_file.tensor(tensor).expect("the same names");
            assert_eq!(
                (view.dtype(), view.shape(), view.data()),
                (ours.dtype(), ours.shape(), ours.data())
            );
        }
        // Every field that both files have is equal.
        let json = |folder: &Path| -> serde_json::Value {
            let text = fs::read_to_string(folder.join(peft::CONFIG_FILE)).expect("a configuration");
            serde_json::from_str(&text).expect("JSON")
        };
        let (theirs_json, ours_json) = (json(&theirs), json(folder.path()));
        for (field, value) in ours_json.as_object().expect("an object") {
            assert_eq!(theirs_json.get(field), Some(value), "{name}: {field}");
        }
    }
}

#[test]
fn packed_rows_give_the_logits_of_each_row_alone_on_every_device() {
    let folder = fixture("padded_rows").join("model");
    let config = LlamaConfig::from_file(&folder).expect("the fixture's config");
    let rows: [&[u32]; 3] = [&[5, 9, 33, 12, 8, 40, 41], &[7, 7, 20], &[3, 63, 4, 18]];
    for (name, device) in devices() {
        for quantization in [Quantization::None, Quantization::Bits8] {
            let options = LoadOptions {
                quantize_lm_head: false,
                quantization,
                ..LoadOptions::default()
            };
            let model =
                llama_burn::load(&folder, &config, options, &device, |_| {}).expect("a model");
            let run = |packed: &PackedTokens| -> Vec<f32> {
                let logits = model.logits(model.hidden_states(packed));
                logits
                    .into_data()
                    .convert::<f32>()
                    .try_to_vec()
                    .expect("f32 values")
            };
            let packed = run(&PackedTokens::from_sequences(rows));
            let alone = rows
                .map(|row| run(&PackedTokens::from_sequences([row])))
                .concat();
            let difference = packed
                .iter()
                .zip(&alone)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            println!("{name}, {quantization:?}: {difference:.1e}");
            // f32 sums in another order; a sequence that attends to its neighbour would differ by
            // 0.1 and more.
            assert!(
                packed.len() == alone.len() && difference < 1e-4,
                "{name}: {difference}"
            );
        }
    }
}
