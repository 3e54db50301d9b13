//! The program as a user runs it: the files of a run, and the messages for errors.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tests::program::Program::{self, Parity};
use tests::program::{Outcome, run, run_with};
use tests::workspace::{Workspace, edit_json};

/// Runs `command` with the workspace's configuration.
fn with_config(command: &str, workspace: &Workspace, more: &[&str]) -> Outcome {
    let config = workspace.path("config.toml").display().to_string();
    run(&[&[command, "--config", &config], more].concat())
}

/// `trainer train` into a folder of the workspace, with more arguments.
fn train_into(workspace: &Workspace, folder: &str, more: &[&str]) -> Outcome {
    let output = workspace.path(folder).display().to_string();
    let arguments = ["--backend", "cpu", "--output-dir", &output];
    with_config("train", workspace, &[&arguments, more].concat())
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("the metrics are there");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("a line is JSON"));
    lines.collect()
}

fn number(line: &Value, key: &str) -> f64 {
    line[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} is not a number in {line}"))
}

// The files of a run.

#[test]
fn a_run_writes_adapter_configuration_and_metrics_and_its_loss_falls() {
    let workspace = Workspace::new();
    let text = train_into(&workspace, "first", &[]).succeeded();
    let out = workspace.path("first");
    for file in [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.toml",
        "metrics.jsonl",
    ] {
        assert!(out.join(file).is_file(), "{file} is missing:\n{text}");
    }

    let lines = lines(&out.join("metrics.jsonl"));
    let training: Vec<&Value> = lines
        .iter()
        .filter(|line| !line["loss"].is_null())
        .collect();
    let validation: Vec<&Value> = lines
        .iter()
        .filter(|line| !line["val_loss"].is_null())
        .collect();
    // 24 examples, 4 of them for validation, 4 per step: 5 steps per epoch, 4 epochs.
    assert_eq!(training.len(), 20, "{text}");
    for (index, line) in training.iter().enumerate() {
        assert_eq!(number(line, "step"), (index + 1) as f64);
        let keys = [
            "epoch",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens",
            "tokens_per_s",
            "step_s",
            "memory_mib",
        ];
        for key in keys {
            assert!(number(line, key) >= 0.0, "{key} in {line}");
        }
        assert!(
            number(line, "tokens") > 0.0 && number(line, "memory_mib") > 1.0,
            "{line}"
        );
    }
    assert!(validation.len() >= 2);
    for line in &validation {
        let (loss, accuracy) = (number(line, "val_loss"), number(line, "val_accuracy"));
        assert!(
            number(line, "step") >= 0.0 && loss > 0.0 && (0.0..=1.0).contains(&accuracy),
            "{line}"
        );
    }
    let mean = |lines: &[&Value]| {
        lines.iter().map(|line| number(line, "loss")).sum::<f64>() / lines.len() as f64
    };
    let (first, last) = (mean(&training[..5]), mean(&training[15..]));
    assert!(
        last < 0.8 * first,
        "the loss went from {first} to {last}:\n{text}"
    );
    let first = number(validation[0], "val_loss");
    let best = validation
        .iter()
        .map(|line| number(line, "val_loss"))
        .fold(f64::INFINITY, f64::min);
    assert!(
        best < first,
        "validation went from {first} to {best} at best:\n{text}"
    );
}

/// The difference of two runs' adapters: relative Frobenius distance over all matrices.
fn adapter_distance(workspace: &Workspace, first: &str, second: &str) -> f64 {
    let values = |folder: &str| -> Vec<f64> {
        let adapter = workspace.path(folder).join("adapter");
        let (_, tensors) = peft::read_adapter(&adapter).unwrap_or_else(|error| panic!("{error}"));
        let pairs = tensors.modules.into_values();
        let values = pairs.flat_map(|pair| [pair.a, pair.b].concat());
        values.map(f64::from).collect()
    };
    let (first, second) = (values(first), values(second));
    assert_eq!(first.len(), second.len());
    let pairs = first.iter().zip(&second);
    let difference: f64 = pairs.map(|(a, b)| (a - b).powi(2)).sum();
    (difference / second.iter().map(|b| b.powi(2)).sum::<f64>()).sqrt()
}

/// The files of a run's adapter.
fn adapter_bytes(workspace: &Workspace, folder: &str) -> Vec<u8> {
    let path = workspace
        .path(folder)
        .join("adapter/adapter_model.safetensors");
    fs::read(path).expect("it is there")
}

#[test]
fn the_written_configuration_runs_again_to_the_same_adapter_and_the_seed_counts() {
    let workspace = Workspace::new();
    let steps = ["--set", "max_steps=6", "--set"];
    train_into(
        &workspace,
        "first",
        &[&steps[..], &["lora_dropout=0.1"]].concat(),
    )
    .succeeded();
    let config = workspace.path("first/config.toml").display().to_string();
    let output = workspace.path("second").display().to_string();
    let arguments = [
        "train",
        "--backend",
        "cpu",
        "--config",
        &config,
        "--output-dir",
        &output,
    ];
    run(&arguments).succeeded();
    let adapter_config = |folder: &str| {
        let path = workspace.path(folder).join("adapter/adapter_config.json");
        fs::read(path).expect("it is there")
    };
    assert!(adapter_config("first") == adapter_config("second"));
    assert!(
        adapter_bytes(&workspace, "first") == adapter_bytes(&workspace, "second"),
        "two runs of one configuration differ by {:e}",
        adapter_distance(&workspace, "first", "second")
    );
    let seeded = [&steps[..], &["lora_dropout=0.1", "--set", "seed=7"]].concat();
    train_into(&workspace, "third", &seeded).succeeded();
    let other = adapter_distance(&workspace, "first", "third");
    assert!(
        other > 0.01,
        "another seed changes the adapter by {other:e} only"
    );
}

#[test]
fn the_adapter_reads_back_with_the_scale_and_modules_of_the_configuration() {
    let workspace = Workspace::new();
    train_into(
        &workspace,
        "out",
        &["--set", "max_steps=2", "--set", "peft_use_rslora=true"],
    )
    .succeeded();
    let adapter = workspace.path("out/adapter");
    let (config, tensors) = peft::read_adapter(&adapter).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        (
            config.lora.r,
            config.lora.lora_alpha,
            config.lora.use_rslora
        ),
        (4, 16.0, true)
    );
    // Two layers, three modules each.
    assert_eq!(tensors.modules.len(), 6);
    let trained = tensors
        .modules
        .values()
        .all(|pair| pair.b.iter().any(|value| *value != 0.0));
    assert!(trained, "a B is still zero after two steps");
}

#[test]
fn gradient_checkpointing_does_not_change_a_run() {
    let workspace = Workspace::new();
    let settings = [
        "max_steps=5",
        "gradient_accumulation_steps=2",
        "lora_dropout=0.2",
    ];
    let settings: Vec<&str> = settings
        .into_iter()
        .flat_map(|setting| ["--set", setting])
        .collect();
    for word in ["on", "off"] {
        let checkpointing = format!("gradient_checkpointing={word}");
        let more = [&settings[..], &["--set", &checkpointing]].concat();
        train_into(&workspace, word, &more).succeeded();
    }
    assert!(
        adapter_bytes(&workspace, "on") == adapter_bytes(&workspace, "off"),
        "{:e}",
        adapter_distance(&workspace, "on", "off")
    );
}

#[test]
fn shared_beginnings_and_micro_batches_that_fit_do_not_change_a_run() {
    let workspace = Workspace::new();
    let runs: [(&str, &[&str]); 5] = [
        ("plain", &["batch_size=16", "share_prefixes=false"]),
        ("shared", &["batch_size=16"]),
        (
            "auto",
            &["batch_size=auto", "gradient_accumulation_steps=2"],
        ),
        ("merged", &["batch_size=4", "gradient_accumulation_steps=4"]),
        (
            "one by one",
            &[
                "batch_size=4",
                "gradient_accumulation_steps=4",
                "merge_micro_batches=false",
            ],
        ),
    ];
    for (folder, settings) in runs {
        let settings = settings.iter().chain(&["max_steps=4"]);
        let more: Vec<&str> = settings.flat_map(|setting| ["--set", *setting]).collect();
        train_into(&workspace, folder, &more).succeeded();
    }
    for folder in ["shared", "auto", "merged", "one by one"] {
        // f32 sums in another order, after four steps of AdamW: 1e-6.
        let difference = adapter_distance(&workspace, folder, "plain");
        assert!(difference < 1e-4, "{folder}: {difference:e}");
    }
}

#[test]
fn without_a_terminal_progress_is_plain_lines() {
    let text = train_into(&Workspace::new(), "out", &["--set", "max_steps=3"]).succeeded();
    assert!(!text.contains('\u{1b}') && !text.contains('\r'), "{text:?}");
    assert!(
        text.lines().filter(|line| line.contains("loss")).count() >= 3,
        "{text}"
    );
    for word in ["CPU", "8-bit", "adapter"] {
        assert!(text.contains(word), "nothing says {word}:\n{text}");
    }
}

#[test]
fn a_run_does_not_overwrite_another_unless_it_is_told_to() {
    let workspace = Workspace::new();
    let once = ["--set", "max_steps=1"];
    train_into(&workspace, "out", &once).succeeded();
    train_into(&workspace, "out", &once).failed_saying(&["already holds a run", "--overwrite"]);
    train_into(&workspace, "out", &[&once[..], &["--overwrite"]].concat()).succeeded();
}

#[test]
fn rows_that_are_too_long_are_counted_and_left_out() {
    let workspace = Workspace::new();
    let long = (0..40)
        .map(|i| format!("w{}", 20 + i % 9))
        .collect::<Vec<_>>()
        .join(" ");
    let rows = fs::read_to_string(workspace.path("rows.jsonl")).expect("it is there");
    let row = json!({"context": long, "target": "w50"});
    workspace.write("rows.jsonl", &format!("{rows}{row}\n{row}\n"));
    let text = train_into(&workspace, "out", &["--set", "max_steps=1"]).succeeded();
    // The line may be wrapped between any two words.
    let words: Vec<&str> = text.split_whitespace().collect();
    let said = words.join(" ").contains("examples, 2 skipped (more than");
    assert!(said, "the two long examples are not reported:\n{text}");
}

#[test]
fn finloras_file_of_named_runs_works_as_it_is() {
    let workspace = Workspace::new();
    let run_of = |r: usize| {
        json!({
            "base_model": workspace.path("model"), "dataset_path": "rows.jsonl", "lora_r": r, "quant_bits": 8,
            "learning_rate": 1e-2, "num_epochs": 1, "batch_size": 4, "gradient_accumulation_steps": 2,
        })
    };
    let runs = json!({"sentiment_llama_3_1_8b_8bits_r8": run_of(8), "sentiment_llama_3_1_8b_8bits_r4": run_of(4)});
    workspace.write("finetune_configs.json", &runs.to_string());
    let file = workspace
        .path("finetune_configs.json")
        .display()
        .to_string();
    let output = workspace.path("named").display().to_string();
    let arguments = [
        "train",
        "--backend",
        "cpu",
        "--config",
        &file,
        "--output-dir",
        &output,
    ];
    run(&arguments).failed_saying(&["--run", "sentiment_llama_3_1_8b_8bits_r4"]);
    run(&[
        &arguments[..],
        &["--run", "sentiment_llama_3_1_8b_8bits_r4"],
    ]
    .concat())
    .succeeded();
    let (config, _) = peft::read_adapter(&workspace.path("named/adapter")).expect("an adapter");
    assert_eq!(config.lora.r, 4);
}

// Commands that show something without training.

#[test]
fn the_plan_of_llama_3_1_70b_needs_no_weights_and_counts_right() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("my-llama.json");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8192,
        "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": false,
        "attention_bias": false, "mlp_bias": false, "hidden_act": "silu", "bos_token_id": 128_000, "eos_token_id": 128_001,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    });
    fs::write(&path, config.to_string()).expect("a temporary folder is writable");
    let text = run(&[
        "plan",
        "--config",
        &path.display().to_string(),
        "--set",
        "lora_r=4",
    ])
    .succeeded();
    for words in ["11,141,120", "70,553,706,496", "6,332.7"] {
        assert!(text.contains(words), "the plan lacks {words}:\n{text}");
    }
    let path = path.display().to_string();
    run(&["inspect-data", "--config", &path])
        .failed_saying(&["a model's config.json", "plan --config"]);
    run(&["plan", "--config", &path, "--run", "one"]).failed_saying(&["holds no runs"]);
}

#[test]
fn the_plans_of_published_sizes_of_other_families_count_right() {
    // Vocabulary, hidden, feed-forward, layers, heads and key heads; tied embeddings; parameters of the model, and of
    // rank 8 on queries, keys and values.
    type Published = (&'static str, [usize; 6], bool, &'static str, &'static str);
    let sizes: [Published; 7] = [
        (
            "mistral",
            [32_768, 4096, 14_336, 32, 32, 8],
            false,
            "7,248,023,552",
            "4,718,592",
        ),
        (
            "qwen2",
            [151_936, 896, 4864, 24, 14, 2],
            true,
            "494,032,768",
            "737,280",
        ),
        (
            "qwen2",
            [151_936, 1536, 8960, 28, 12, 2],
            true,
            "1,543,714,304",
            "1,490,944",
        ),
        (
            "qwen2",
            [152_064, 3584, 18_944, 28, 28, 4],
            false,
            "7,615,616,512",
            "3,440,640",
        ),
        (
            "qwen3",
            [151_936, 1024, 3072, 28, 16, 8],
            true,
            "596,049,920",
            "1,605,632",
        ),
        (
            "qwen3",
            [151_936, 2560, 9728, 36, 32, 8],
            true,
            "4,022,468,096",
            "3,981,312",
        ),
        (
            "qwen3",
            [151_936, 4096, 12_288, 36, 32, 8],
            false,
            "8,190,735,360",
            "5,308,416",
        ),
    ];
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (index, (family, size, tied, parameters, trainable)) in sizes.into_iter().enumerate() {
        let [vocab, hidden, feed_forward, layers, heads, key_heads] = size;
        let mut config = json!({
            "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": feed_forward,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
            "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
            "tie_word_embeddings": tied, "hidden_act": "silu", "attention_dropout": 0.0, "sliding_window": null,
        });
        if family != "mistral" {
            config["use_sliding_window"] = json!(false);
            config["max_window_layers"] = json!(layers);
        }
        if family == "qwen3" {
            config["head_dim"] = json!(128);
            config["attention_bias"] = json!(false);
        }
        let path = folder.path().join(format!("{index}.json"));
        fs::write(&path, config.to_string()).expect("a temporary folder is writable");
        let path = path.display().to_string();
        let text = run(&["plan", "--config", &path, "--set", "lora_r=8"]).succeeded();
        for words in [parameters, trainable] {
            assert!(
                text.contains(words),
                "the plan of {config} lacks {words}:\n{text}"
            );
        }
    }
}

#[test]
fn inspecting_the_data_shows_rows_with_their_tokens() {
    let text = with_config("inspect-data", &Workspace::new(), &["--rows", "2"]).succeeded();
    assert!(
        text.contains("w10") || text.contains("w11"),
        "no prompt:\n{text}"
    );
    assert!(
        text.contains("w50") || text.contains("w51"),
        "no target:\n{text}"
    );
    assert!(text.contains("</s>"), "no end token:\n{text}");
}

#[test]
fn parity_with_a_reference_prints_its_table_and_fails_past_a_tolerance() {
    let folder = tests::fixture("untied").display().to_string();
    let text = Parity.run(&["--reference", &folder]).succeeded();
    for word in [
        "base_logits",
        "LoRA gradients",
        "train_losses",
        "tolerance",
        "ok",
    ] {
        assert!(text.contains(word), "{text}");
    }
    // Another learning rate than the reference's gives another loss curve.
    let outcome = Parity.run(&["--reference", &folder, "--lr", "0.01"]);
    outcome.failed_saying(&["FAIL", "train_losses"]);
}

#[test]
fn parity_says_which_backends_are_not_on_this_machine() {
    let outcome = Parity.run(&["--backends", "cpu,metal,cuda"]);
    for word in ["metal", "cuda"] {
        assert!(outcome.text.contains(word), "{}", outcome.text);
    }
    assert!(!outcome.text.contains("panicked"), "{}", outcome.text);
}

// Errors: a clear message, an exit code that is not zero, no panic.

#[test]
fn a_missing_configuration_is_named() {
    let outcome = run(&["train", "--backend", "cpu", "--config", "no/such/file.toml"]);
    outcome.failed_saying(&["no/such/file.toml", "cannot read"]);
}

#[test]
fn a_missing_model_or_data_set_is_named_and_so_is_its_key() {
    let settings = ["base_model=no/such/folder", "dataset_path=no/such.jsonl"];
    let outcome = Workspace::new().train(&settings);
    outcome.failed_saying(&[
        "base_model",
        "no/such/folder",
        "dataset_path",
        "no/such.jsonl",
    ]);
}

#[test]
fn safetensors_that_are_cut_off_are_named() {
    let workspace = Workspace::new();
    let path = workspace.path("model/model.safetensors");
    let whole = fs::read(&path).expect("the model is there");
    // Truncated in the header, in the weights, and before anything.
    for length in [100, whole.len() - 1000, 4, 0] {
        fs::write(&path, &whole[..length]).expect("the file can be written");
        workspace
            .train(&[])
            .failed_saying(&["model.safetensors", "cut off"]);
    }
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    let workspace = Workspace::new();
    edit_json(&workspace.path("model/config.json"), |config| {
        config["intermediate_size"] = json!(32)
    });
    workspace
        .train(&[])
        .failed_saying(&["_proj.weight", "[24, 16]", "[32, 16]"]);
}

#[test]
fn tensors_that_are_missing_or_too_many_are_named() {
    let workspace = Workspace::new();
    edit_json(&workspace.path("model/config.json"), |config| {
        config["num_hidden_layers"] = json!(3)
    });
    workspace.train(&[]).failed_saying(&["model.layers.2."]);
    edit_json(&workspace.path("model/config.json"), |config| {
        config["num_hidden_layers"] = json!(1)
    });
    workspace.train(&[]).failed_saying(&["model.layers.1."]);
}

#[test]
fn a_model_that_is_no_llama_is_refused() {
    let workspace = Workspace::new();
    let config = workspace.path("model/config.json");
    edit_json(&config, |config| config["model_type"] = json!("gpt2"));
    workspace.train(&[]).failed_saying(&["gpt2", "llama"]);
    edit_json(&config, |config| {
        config["model_type"] = json!("llama");
        config
            .as_object_mut()
            .expect("an object")
            .remove("hidden_size");
    });
    workspace.train(&[]).failed_saying(&["hidden_size"]);
    fs::write(&config, "{\"model_type\": ").expect("the file can be written");
    workspace.train(&[]).failed_saying(&["config.json"]);
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_loading_with_what_would_fit() {
    let workspace = Workspace::new();
    // Layers that no machine can hold; their weights are never read.
    edit_json(&workspace.path("model/config.json"), |config| {
        config["intermediate_size"] = json!(1_000_000);
        config["num_hidden_layers"] = json!(2_048);
    });
    workspace
        .train(&[])
        .failed_saying(&["memory", "are free", "smaller model"]);
}

#[test]
fn an_unknown_key_finds_the_nearest() {
    Workspace::new()
        .train(&["lora_rnk=4"])
        .failed_saying(&["lora_rnk", "lora_r", "did you mean"]);
}

#[test]
fn zero_rank_and_alphas_that_are_not_positive_are_refused() {
    let workspace = Workspace::new();
    workspace
        .train(&["lora_r=0"])
        .failed_saying(&["lora_r = 0", "at least 1"]);
    workspace
        .train(&["lora_alpha=0"])
        .failed_saying(&["lora_alpha = 0", "above 0"]);
    workspace
        .train(&["lora_alpha=-16"])
        .failed_saying(&["lora_alpha = -16", "above 0"]);
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let settings = [
        "lora_r=0",
        "lora_alpha=-1",
        "quant_bits=5",
        "lr_scheduler=cosin",
        "learnin_rate=1",
        "batch_size=x",
    ];
    let words = [
        "lora_r",
        "lora_alpha",
        "quant_bits",
        "lr_scheduler",
        "learning_rate",
        "batch_size",
        "6 problems",
    ];
    Workspace::new().train(&settings).failed_saying(&words);
}

#[test]
fn a_target_that_no_module_has_is_refused() {
    let outcome = Workspace::new().train(&["target_modules=[\"query\"]"]);
    outcome.failed_saying(&["target_modules", "query", "q_proj"]);
    let outcome = Workspace::new().train(&["layers_to_transform=[7]"]);
    outcome.failed_saying(&["selects none", "layers_to_transform"]);
}

#[test]
fn an_empty_data_set_is_refused() {
    let workspace = Workspace::new();
    for content in ["", "\n\n"] {
        workspace.write("rows.jsonl", content);
        workspace.train(&[]).failed_saying(&["rows.jsonl"]);
    }
}

#[test]
fn a_malformed_line_is_named_by_file_and_number() {
    let workspace = Workspace::new();
    let rows = fs::read_to_string(workspace.path("rows.jsonl")).expect("it is there");
    for (line, word) in [
        ("{\"context\": \"w10\", \"target\": ", ""),
        ("{\"context\": \"w10\"}", "target"),
        ("{\"context\": \"w10\", \"target\": \"\"}", "empty"),
        ("{\"context\": 3, \"target\": \"w50\"}", ""),
        ("[1, 2]", ""),
    ] {
        workspace.write("rows.jsonl", &format!("{rows}{line}\n{rows}"));
        // The first 24 examples come before it.
        workspace.train(&[]).failed_saying(&["rows.jsonl:25", word]);
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_refused_before_training() {
    let workspace = Workspace::new();
    let larger = tests::workspace::tokenizer(80);
    workspace.write("model/tokenizer.json", &larger.to_string());
    let rows = fs::read_to_string(workspace.path("rows.jsonl")).expect("it is there");
    let row = json!({"context": "w10 w70", "target": "w50"});
    workspace.write("rows.jsonl", &format!("{rows}{row}\n"));
    workspace
        .train(&[])
        .failed_saying(&["70", "64", "vocabulary"]);
}

#[test]
fn an_output_folder_that_cannot_be_written_is_refused_before_training() {
    let workspace = Workspace::new();
    workspace.write("file", "");
    for folder in [
        workspace.path("file").join("run"),
        workspace.path("file"),
        "/dev/null/run".into(),
    ] {
        let folder = folder.display().to_string();
        let arguments = ["--backend", "cpu", "--output-dir", &folder];
        with_config("train", &workspace, &arguments).failed_saying(&["output folder", &folder]);
    }
    // Permissions do not stop root; the kernel's own file system does.
    #[cfg(target_os = "linux")]
    with_config(
        "train",
        &workspace,
        &["--backend", "cpu", "--output-dir", "/proc/run"],
    )
    .failed_saying(&["output folder", "/proc/run"]);
}

#[test]
fn an_unknown_backend_lists_the_known_ones() {
    let outcome = with_config("train", &Workspace::new(), &["--backend", "rocm"]);
    outcome.failed_saying(&["rocm", "auto, cpu, cuda, wgpu, vulkan, metal"]);
}

#[test]
fn a_backend_without_its_gpu_is_one_clear_line() {
    let workspace = Workspace::new();
    let config = workspace.path("config.toml").display().to_string();
    let train = |backend: &str| {
        // No Vulkan or OpenGL driver is found there, and CUDA reports no device.
        let nothing = "/nonexistent";
        let environment = [
            ("VK_DRIVER_FILES", nothing),
            ("VK_ICD_FILENAMES", nothing),
            ("__EGL_VENDOR_LIBRARY_FILENAMES", nothing),
            ("CUDA_VISIBLE_DEVICES", ""),
        ];
        run_with(
            &["train", "--backend", backend, "--config", &config],
            &environment,
        )
    };
    let mut backends = vec!["cuda"];
    if cfg!(not(target_vendor = "apple")) {
        backends.push("metal");
    }
    // If wgpu also has Direct3D or Metal, a GPU remains without Vulkan's drivers.
    if cfg!(target_os = "linux") {
        backends.extend(["wgpu", "vulkan"]);
    }
    for backend in backends {
        let outcome = train(backend);
        let message = outcome
            .text
            .lines()
            .filter(|line| line.starts_with("error: "))
            .count();
        assert_eq!(message, 1, "{}", outcome.text);
        outcome.failed_saying(&[&format!("backend {backend}")]);
    }
}

#[test]
fn a_precision_that_the_device_lacks_is_refused() {
    Workspace::new()
        .train(&["compute_dtype=f16"])
        .failed_saying(&["compute_dtype", "f16", "f32"]);
    // Some processors have bf16 instructions.
    let bf16 = Workspace::new().train(&["compute_dtype=bf16"]);
    if kernels::has_bf16_products() {
        assert!(bf16.succeeded().contains("bf16 compute"))
    } else {
        bf16.failed_saying(&["compute_dtype", "bf16", "f32"])
    }
}

#[test]
fn wrong_usage_is_no_panic() {
    for arguments in [
        &["train", "--no-such-option"][..],
        &["no-such-command"],
        &[],
        &["train", "--set"],
    ] {
        run(arguments).failed_saying(&["help"]);
    }
}

#[test]
fn every_program_lists_its_options_and_refuses_others_with_code_2() {
    let programs = [
        (Program::Bench, "--contenders"),
        (Program::Parity, "--reference"),
        (Program::MakeAssets, "--seed"),
        (Program::Trainer, "train"),
    ];
    for (program, option) in programs {
        let help = program.run(&["--help"]).succeeded();
        assert!(help.contains(option), "{help}");
        let wrong = program.run(&["--no-such-option"]);
        assert_eq!(wrong.code, Some(2), "{}", wrong.text);
        assert!(wrong.text.contains("--no-such-option"), "{}", wrong.text);
    }
}

#[test]
fn an_error_of_every_program_is_one_line_with_exit_code_1() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = folder.path().join("missing").display().to_string();
    let file = folder.path().join("file");
    fs::write(&file, "").expect("the file is written");
    let file = file.display().to_string();
    let runs = [
        (Program::Bench, ["--model", &missing], "hf download"),
        (Program::Parity, ["--reference", &missing], "cannot read"),
        (Program::MakeAssets, ["--output", &file], "cannot make"),
    ];
    for (program, arguments, words) in runs {
        let outcome = program.run(&arguments);
        let errors = outcome.text.lines().filter(|it| it.starts_with("error: "));
        assert_eq!(errors.count(), 1, "{}", outcome.text);
        assert_eq!(outcome.code, Some(1), "{}", outcome.text);
        outcome.failed_saying(&[words]);
    }
}
