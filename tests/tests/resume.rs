//! A resumed run equals a run without interruption.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lora_train::checkpoint::{MANIFEST, Manifest};
use tests::program::{Outcome, run, run_with};
use tests::reliability::{Row, record};
use tests::runs::{Running, adapter_bytes, checkpoints, last_step, lines, losses, numbers};
use tests::workspace::{Workspace, edit_json};

/// A run of 20 steps in 4 epochs with every kind of state: moments, an order of examples, dropout,
/// several micro-batches, a validation in the middle of an epoch.
const SETTINGS: [&str; 6] = [
    "lora_dropout=0.1",
    "batch_size=2",
    "gradient_accumulation_steps=2",
    "eval_steps=3",
    "save_steps=4",
    "warmup_steps=3",
];

/// `trainer train` into a folder of the workspace.
fn train(workspace: &Workspace, folder: &str, more: &[&str], faults: &str) -> Outcome {
    let output = workspace.path(folder).display().to_string();
    let mut arguments = workspace.train_arguments(&SETTINGS);
    arguments.extend(["--output-dir".into(), output]);
    arguments.extend(more.iter().map(ToString::to_string));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run_with(&arguments, &[("LORA_TRAINER_FAULT", faults)])
}

/// `trainer train --resume FOLDER`, with nothing else but the device.
fn resume(from: &Path, more: &[&str]) -> Outcome {
    let from = from.display().to_string();
    run(&[&["train", "--backend", "cpu", "--resume", &from], more].concat())
}

/// A run that stopped in step 8, with checkpoints of steps 6 (the best), 7 and perhaps more.
fn stopped() -> (Workspace, PathBuf) {
    let workspace = Workspace::new();
    let outcome = train(&workspace, "out", &[], "lost=8");
    assert_eq!(outcome.code, Some(75), "{}", outcome.text);
    let out = workspace.path("out");
    assert!(checkpoints(&out).contains(&"step-000007".to_string()));
    (workspace, out)
}

#[test]
fn a_run_that_stopped_three_times_is_the_undisturbed_one_bit_for_bit() {
    let workspace = Workspace::new();
    train(&workspace, "whole", &[], "").succeeded();
    // In the middle of an epoch, right before and right after a validation.
    train(&workspace, "parts", &[], "lost=4").failed_saying(&["Step 3 is saved", "--resume"]);
    for (lost, saved) in [
        ("lost=9", "Step 8 is saved"),
        ("lost=16", "Step 15 is saved"),
    ] {
        let outcome = train(&workspace, "parts", &["--resume"], lost);
        assert_eq!(outcome.code, Some(75), "{}", outcome.text);
        assert!(outcome.text.contains(saved), "{}", outcome.text);
    }
    let started = Instant::now();
    resume(&workspace.path("parts"), &[]).succeeded();
    let recovery = started.elapsed();
    let (whole, parts) = (workspace.path("whole"), workspace.path("parts"));
    assert_eq!(numbers(&whole), numbers(&parts));
    assert!(adapter_bytes(&whole) == adapter_bytes(&parts));
    let config = |run: &Path| fs::read(run.join("adapter/adapter_config.json")).expect("there");
    assert_eq!(config(&whole), config(&parts));
    record(&Row {
        place: 70,
        fault: "The device is lost in the middle of an epoch, three times",
        happened: "the step before is saved, and the resume command is printed; exit code 75",
        lost: "nothing",
        recovery: Some(recovery),
    });
}

#[test]
fn trained_tokens_go_on_bit_for_bit() {
    let workspace = Workspace::new();
    let tokens = ["--set", "trainable_token_indices=[5, 30]"];
    train(&workspace, "whole", &tokens, "").succeeded();
    let stopped = train(&workspace, "parts", &tokens, "lost=9");
    stopped.failed_saying(&["Step 8 is saved"]);
    resume(&workspace.path("parts"), &[]).succeeded();
    let (whole, parts) = (workspace.path("whole"), workspace.path("parts"));
    assert_eq!(numbers(&whole), numbers(&parts));
    assert!(adapter_bytes(&whole) == adapter_bytes(&parts));
    let (_, tensors) = peft::read_adapter(&whole.join("adapter")).expect("it is there");
    assert_eq!(tensors.token_rows.len(), 1);
}

#[test]
fn adapters_with_shared_matrices_go_on_bit_for_bit() {
    let workspace = Workspace::new();
    let vera = [
        "--set",
        "peft_type=vera",
        "--set",
        "save_projection=false",
        "--set",
        "projection_prng_key=9",
        "--set",
        "learning_rate=0.05",
    ];
    train(&workspace, "whole", &vera, "").succeeded();
    let stopped = train(&workspace, "parts", &vera, "lost=9");
    stopped.failed_saying(&["Step 8 is saved"]);
    resume(&workspace.path("parts"), &[]).succeeded();
    let (whole, parts) = (workspace.path("whole"), workspace.path("parts"));
    assert_eq!(numbers(&whole), numbers(&parts));
    assert!(adapter_bytes(&whole) == adapter_bytes(&parts));
}

#[test]
fn trained_biases_and_whole_modules_go_on_bit_for_bit() {
    let workspace = Workspace::new();
    let sets = [
        "--set",
        "modules_to_save=[\"embed_tokens\", \"norm\", \"o_proj\"]",
        "--set",
        "lora_bias=true",
        "--set",
        "loraplus_lr_ratio=4",
        "--set",
        "weight_decay=0.1",
    ];
    train(&workspace, "whole", &sets, "").succeeded();
    let stopped = train(&workspace, "parts", &sets, "lost=9");
    stopped.failed_saying(&["Step 8 is saved"]);
    resume(&workspace.path("parts"), &[]).succeeded();
    let (whole, parts) = (workspace.path("whole"), workspace.path("parts"));
    assert_eq!(numbers(&whole), numbers(&parts));
    assert!(adapter_bytes(&whole) == adapter_bytes(&parts));
    let (config, tensors) = peft::read_adapter(&whole.join("adapter")).expect("it is there");
    assert!(config.lora.lora_bias);
    let layers = lora_core::LoraConfig::default();
    assert_eq!(config.lora.target_modules, layers.target_modules);
    assert!(tensors.modules.values().all(|pair| pair.bias.is_some()));
    for name in ["model.embed_tokens.weight", "model.norm.weight"] {
        assert!(tensors.whole.contains_key(name), "{name}");
    }
    // Another run continues from this adapter.
    let from = format!("init_adapter={}", whole.join("adapter").display());
    train(&workspace, "next", &["--set", &from], "").succeeded();
    let next = workspace.path("next");
    let (config_after, after) = peft::read_adapter(&next.join("adapter")).expect("it is there");
    assert_eq!(
        config_after.lora.modules_to_save,
        config.lora.modules_to_save
    );
    let norm = "model.norm.weight";
    assert_ne!(after.whole[norm], tensors.whole[norm]);
    assert_eq!(after.whole.len(), tensors.whole.len());
}

#[test]
fn adapters_taken_out_of_the_weights_go_on_bit_for_bit_and_are_saved_for_the_base_model() {
    let workspace = Workspace::new();
    for init in ["pissa", "pissa_niter_2", "olora"] {
        let (whole, parts) = (format!("{init}-whole"), format!("{init}-parts"));
        let init = format!("init_lora_weights={init}");
        let sets = ["--set", &init, "--set", "loraplus_lr_ratio=4"];
        train(&workspace, &whole, &sets, "").succeeded();
        let stopped = train(&workspace, &parts, &sets, "lost=9");
        stopped.failed_saying(&["Step 8 is saved"]);
        resume(&workspace.path(&parts), &[]).succeeded();
        let (whole, parts) = (workspace.path(&whole), workspace.path(&parts));
        assert_eq!(numbers(&whole), numbers(&parts));
        assert!(adapter_bytes(&whole) == adapter_bytes(&parts));
        let (config, tensors) = peft::read_adapter(&whole.join("adapter")).expect("it is there");
        assert_eq!(config.lora.init, lora_core::Init::Kaiming);
        let trained = lora_train::checkpoint::config_of(&whole).expect("the run's config");
        let trained = run_config::Config::load(Some(&trained), None, &[]).expect("the run's");
        assert_eq!(config.lora.r, 2 * trained.lora_r);
        assert!(tensors.modules.values().all(|pair| pair.r == config.lora.r));
    }
}

#[test]
fn going_back_to_an_earlier_checkpoint_takes_its_steps_again() {
    let workspace = Workspace::new();
    train(&workspace, "out", &["--set", "save_total_limit=none"], "").succeeded();
    let out = workspace.path("out");
    let (whole, adapter) = (numbers(&out), adapter_bytes(&out));
    resume(&out.join("checkpoints/step-000008"), &[]).succeeded();
    assert_eq!(numbers(&out), whole);
    assert!(adapter_bytes(&out) == adapter);

    // Into another folder: the first run stays, and the second has the lines before its start.
    let other = workspace.path("other").display().to_string();
    let from = out.join("checkpoints/step-000012");
    resume(&from, &["--output-dir", &other]).succeeded();
    assert_eq!(numbers(&workspace.path("other")), whole);
    assert!(adapter_bytes(&workspace.path("other")) == adapter);
    resume(&from, &["--output-dir", &other]).failed_saying(&["already holds a run"]);
}

#[test]
fn auto_starts_where_there_is_nothing_and_says_so_where_nothing_is_left_to_do() {
    let workspace = Workspace::new();
    let once = ["--resume", "auto", "--set", "max_steps=4"];
    let text = train(&workspace, "out", &once, "").succeeded();
    assert!(!text.contains("resuming after step"), "{text}");
    let before = adapter_bytes(&workspace.path("out"));
    let text = train(&workspace, "out", &once, "").succeeded();
    assert!(text.contains("all 4 steps of this run are done"), "{text}");
    assert!(adapter_bytes(&workspace.path("out")) == before);
    // A deleted adapter is written again.
    fs::remove_dir_all(workspace.path("out/adapter")).expect("it is there");
    resume(&workspace.path("out"), &[]).succeeded();
    assert!(adapter_bytes(&workspace.path("out")) == before);
    let card = workspace.path("out/adapter/README.md");
    let text = fs::read_to_string(&card).expect("the card is written again");
    // It has the command of the first start.
    assert!(text.contains("--resume auto"), "{text}");
    record(&Row {
        place: 130,
        fault: "A finished run is resumed",
        happened: "the run reports that all steps are done; exit code 0",
        lost: "nothing",
        recovery: None,
    });
}

#[test]
fn a_folder_without_a_checkpoint_is_refused_with_what_to_do() {
    let workspace = Workspace::new();
    resume(&workspace.path("nowhere"), &[])
        .failed_saying(&["nowhere", "neither the output folder"]);
    assert!(!workspace.path("nowhere").exists());
    let off = ["--set", "save_steps=none", "--set", "save_minutes=none"];
    train(
        &workspace,
        "off",
        &[&off[..], &["--set", "max_steps=2"]].concat(),
        "",
    )
    .succeeded();
    assert!(checkpoints(&workspace.path("off")).is_empty());
    resume(&workspace.path("off"), &[]).failed_saying(&["holds no checkpoint", "--resume"]);
    // Not even auto replaces an adapter.
    train(&workspace, "off", &["--resume"], "").failed_saying(&["no checkpoint", "--overwrite"]);
    record(&Row {
        place: 120,
        fault: "`--resume` with a wrong folder",
        happened: "it is refused before anything is loaded or written; the message names the folder and the valid \
                   choices",
        lost: "nothing",
        recovery: None,
    });
}

#[test]
fn the_last_checkpoints_and_the_best_stay_and_hold_nothing_that_runs_code() {
    let workspace = Workspace::new();
    train(&workspace, "out", &["--set", "save_steps=1"], "").succeeded();
    let out = workspace.path("out");
    let best = lines(&out)
        .into_iter()
        .filter(|line| line["step"] != 0 && !line["val_loss"].is_null())
        .min_by(|a, b| {
            a["val_loss"]
                .as_f64()
                .partial_cmp(&b["val_loss"].as_f64())
                .expect("numbers")
        })
        .expect("there were validations");
    let best = format!("step-{:06}", best["step"].as_u64().expect("a step"));
    let mut expected = vec![best, "step-000019".into(), "step-000020".into()];
    expected.sort();
    expected.dedup();
    assert_eq!(checkpoints(&out), expected);

    let mut folders = vec![out.join("checkpoints")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("it is there") {
            let path = entry.expect("it can be read").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let extension = path.extension().and_then(|extension| extension.to_str());
            assert!(
                matches!(extension, Some("json" | "safetensors" | "toml")),
                "{}",
                path.display()
            );
            // Adapter-sized: the tiny model's adapters have a few thousand parameters.
            let length = fs::metadata(&path).expect("it is there").len();
            assert!(length < 200_000, "{}: {length}", path.display());
        }
    }
    // A checkpoint contains an adapter.
    peft::read_adapter(&out.join("checkpoints/step-000019/adapter"))
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_damaged_checkpoint_gives_way_to_the_one_before() {
    let (workspace, out) = stopped();
    train(&workspace, "whole", &[], "").succeeded();
    let newest = out.join("checkpoints/step-000007");
    let tensors = newest.join("training.safetensors");
    let mut bytes = fs::read(&tensors).expect("it is there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&tensors, &bytes).expect("it is writable");
    // A checkpoint that was named is not silently replaced by another.
    resume(&newest, &[]).failed_saying(&["step-000007 is damaged", "training.safetensors"]);
    let started = Instant::now();
    let text = resume(&out, &[]).succeeded();
    let recovery = started.elapsed();
    for words in ["step-000007 is damaged", "resuming from step 6"] {
        assert!(
            text.replace("\n              ", " ").contains(words),
            "{words}\n{text}"
        );
    }
    assert_eq!(numbers(&out), numbers(&workspace.path("whole")));
    assert!(adapter_bytes(&out) == adapter_bytes(&workspace.path("whole")));
    record(&Row {
        place: 40,
        fault: "The newest checkpoint is damaged (one bit is flipped)",
        happened: "its hash does not match; the run reports it and resumes from the checkpoint before",
        lost: "nothing; the steps between the two checkpoints are repeated",
        recovery: Some(recovery),
    });
}

#[test]
fn where_no_checkpoint_is_whole_the_run_says_what_is_wrong_with_each() {
    let (_workspace, out) = stopped();
    let steps = checkpoints(&out);
    assert!(steps.len() >= 2, "{steps:?}");
    let of = |step: &str, file: &str| out.join("checkpoints").join(step).join(file);
    fs::remove_file(of(&steps[0], "manifest.json")).expect("it is there");
    let state = fs::read(of(&steps[1], "state.json")).expect("it is there");
    fs::write(of(&steps[1], "state.json"), &state[..state.len() / 2]).expect("it is writable");
    for step in &steps[2..] {
        fs::remove_file(of(step, "training.safetensors")).expect("it is there");
    }
    let words = [
        steps[0].as_str(),
        steps[1].as_str(),
        "manifest.json",
        "state.json",
        "--overwrite",
    ];
    resume(&out, &[]).failed_saying(&words);
}

#[test]
fn what_has_changed_since_is_named_and_refused_unless_forced() {
    let (workspace, out) = stopped();
    // Settings that may change when a run is resumed.
    let free = [
        "logging_steps=5",
        "save_steps=3",
        "gradient_checkpointing=on",
    ];
    let free: Vec<&str> = free.iter().flat_map(|set| ["--set", set]).collect();
    let stop = |more: &[&str], faults: &str| {
        let from = out.display().to_string();
        let arguments = ["train", "--backend", "cpu", "--resume", &from];
        run_with(
            &[&arguments, more].concat(),
            &[("LORA_TRAINER_FAULT", faults)],
        )
    };
    assert_eq!(stop(&free, "lost=10").code, Some(75));

    let sets = ["--set", "learning_rate=2e-2", "--set", "num_epochs=5"];
    resume(&out, &sets).failed_saying(&[
        "learning_rate is 0.02, was 0.01",
        "num_epochs is 5.0, was 4.0",
        "--force-resume",
    ]);
    let shape = ["--set", "lora_r=2", "--force-resume"];
    resume(&out, &shape).failed_saying(&["lora.a", "lora_r", "not even with --force-resume"]);

    let rows = fs::read_to_string(workspace.path("rows.jsonl")).expect("it is there");
    workspace.write("rows.jsonl", &rows.replace("w50", "w52"));
    let changed = ["the training data: rows.jsonl has changed", "SHA-256"];
    resume(&out, &[]).failed_saying(&changed);
    workspace.write("rows.jsonl", &rows);

    let tokenizer = workspace.path("model/tokenizer_config.json");
    let before = fs::read(&tokenizer).expect("it is there");
    edit_json(&tokenizer, |json| json["added"] = true.into());
    resume(&out, &[]).failed_saying(&["the tokenizer: tokenizer_config.json has changed"]);
    fs::write(&tokenizer, before).expect("it is writable");

    let weights = workspace.path("model/model.safetensors");
    let mut bytes = fs::read(&weights).expect("it is there");
    *bytes.last_mut().expect("it is not empty") ^= 1;
    fs::write(&weights, &bytes).expect("it is writable");
    resume(&out, &[]).failed_saying(&["the base model: model.safetensors has changed"]);
    *bytes.last_mut().expect("it is not empty") ^= 1;
    fs::write(&weights, &bytes).expect("it is writable");

    let text = resume(&out, &[&sets[..], &["--force-resume"]].concat()).succeeded();
    assert!(
        text.contains("--force-resume: learning_rate is 0.02"),
        "{text}"
    );
    assert_eq!(last_step(&out), 25);
    record(&Row {
        place: 110,
        fault: "Settings, data, tokenizer or base model have changed since the run started",
        happened: "every difference is named and the run is not resumed; `--force-resume` resumes it nevertheless",
        lost: "nothing",
        recovery: None,
    });
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let workspace = Workspace::new();
    let output = workspace.path("out").display().to_string();
    let mut arguments = workspace.train_arguments(&SETTINGS);
    arguments.extend(["--output-dir".into(), output]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    // Slow writing keeps the first run busy.
    let slow = [("LORA_TRAINER_FAULT", "delay=100")];
    let mut first = Running::start(&arguments, &slow, &workspace.path("log"));
    let out = workspace.path("out");
    assert!(
        first.wait_until(|| last_step(&out) >= 1),
        "{}",
        first.text()
    );
    for more in [&["--resume"][..], &["--overwrite"], &[]] {
        let outcome = run(&[&arguments[..], more].concat());
        if more.is_empty() {
            // The run has taken steps, whether it can be resumed or not.
            outcome.failed_saying(&["already holds a run"])
        } else {
            outcome.failed_saying(&["is writing to", "process"])
        }
    }
    // A killed process holds no lock.
    assert!(first.kill());
    run(&[&arguments[..], &["--resume"]].concat()).succeeded();
    record(&Row {
        place: 100,
        fault: "A second run is started in the same output folder",
        happened: "it is refused, and the message names the process that has locked the folder; a killed process \
                   leaves no lock",
        lost: "nothing",
        recovery: None,
    });
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_exits_with_a_command_that_goes_on_and_a_second_one_leaves_at_once() {
    let workspace = Workspace::new();
    train(&workspace, "whole", &[], "").succeeded();
    let output = workspace.path("out").display().to_string();
    let mut arguments = workspace.train_arguments(&SETTINGS);
    arguments.extend([
        "--output-dir".into(),
        output,
        "--resume".into(),
        "auto".into(),
    ]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let out = workspace.path("out");
    let slow = [("LORA_TRAINER_FAULT", "delay=60")];
    let start = || {
        let before = last_step(&out);
        let mut running = Running::start(&arguments, &slow, &workspace.path("log"));
        assert!(
            running.wait_until(|| last_step(&out) > before.max(2)),
            "{}",
            running.text()
        );
        running
    };
    for signal in ["INT", "TERM"] {
        let running = start();
        running.signal(signal);
        let outcome = running.end();
        assert_eq!(outcome.code, Some(75), "{}", outcome.text);
        for words in [
            "Stopped (interrupted)",
            "cargo xtask train --backend cpu --resume",
        ] {
            assert!(outcome.text.contains(words), "{}", outcome.text);
        }
        // The interrupted step was the last, and is saved.
        let newest = format!("step-{:06}", last_step(&out));
        assert!(
            checkpoints(&out).contains(&newest),
            "{newest}\n{}",
            outcome.text
        );
    }
    let running = start();
    running.signal("INT");
    std::thread::sleep(Duration::from_millis(20));
    running.signal("INT");
    let signalled = Instant::now();
    let outcome = running.end();
    // Saving takes longer than this with these delays, unless it was already over.
    assert!(signalled.elapsed() < Duration::from_millis(500));
    assert!(matches!(outcome.code, Some(130 | 75)), "{:?}", outcome.code);
    let started = Instant::now();
    resume(&out, &[]).succeeded();
    let recovery = started.elapsed();
    assert_eq!(numbers(&out), numbers(&workspace.path("whole")));
    assert!(adapter_bytes(&out) == adapter_bytes(&workspace.path("whole")));
    record(&Row {
        place: 20,
        fault: "Ctrl-C (SIGINT), or SIGTERM",
        happened: "the step is finished and saved, and the resume command is printed; exit code 75",
        lost: "nothing",
        recovery: Some(recovery),
    });
    record(&Row {
        place: 30,
        fault: "Ctrl-C twice",
        happened: "the process exits immediately with all files intact; exit code 130",
        lost: "nothing; the steps since the last checkpoint are repeated",
        recovery: Some(recovery),
    });
}

/// wgpu, if this build and this machine have it; if it is missing and CI requires it, the test
/// fails.
fn wgpu() -> Option<device::Selected> {
    let required = std::env::var("LORA_REQUIRE_WGPU").is_ok_and(|value| value == "1");
    match device::select(device::Backend::Wgpu) {
        Ok(selected) => Some(selected),
        Err(error) if required => panic!("LORA_REQUIRE_WGPU is set: {error}"),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn in_f16_the_loss_scale_is_part_of_a_checkpoint_and_one_that_is_too_large_is_halved() {
    let Some(selected) = wgpu() else { return };
    let f16 = burn::tensor::FloatDType::F16;
    if let Err(error) = device::compute_dtype(&selected, Some(f16)) {
        return println!("skipped: {error}");
    }
    let workspace = Workspace::new();
    let more = [
        "compute_dtype=f16",
        "max_steps=4",
        "save_steps=2",
        "save_total_limit=none",
    ];
    let whole = workspace.path("whole");
    let mut arguments = workspace.train_arguments(&[&SETTINGS[..], &more].concat());
    // The workspace's own argument selects the CPU.
    arguments.retain(|argument| argument != "--backend" && argument != "cpu");
    let output = whole.display().to_string();
    arguments.extend(["--backend=wgpu".into(), "--output-dir".into(), output]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run(&arguments).succeeded();
    let scales = |run: &Path| -> Vec<f64> {
        let scale = |line: serde_json::Value| line["loss_scale"].as_f64();
        lines(run).into_iter().filter_map(scale).collect()
    };
    assert_eq!(scales(&whole), [2048.0; 4]);
    let go_on = |folder: &str, factor: Option<f64>| -> PathBuf {
        let checkpoint = whole.join("checkpoints/step-000002");
        if let Some(factor) = factor {
            edit_json(&checkpoint.join("state.json"), |state| {
                let scale = &mut state["progress"]["loss_scale"];
                assert_eq!(scale["steps"], 2, "{scale}");
                scale["factor"] = factor.into();
            });
            let manifest = checkpoint.join(MANIFEST);
            fs::remove_file(&manifest).expect("a checkpoint has a manifest");
            let anew = Manifest::of(&checkpoint).expect("its files can be read");
            fs::write(&manifest, anew.to_bytes()).expect("the folder can be written");
        }
        let to = workspace.path(folder).display().to_string();
        let from = checkpoint.display().to_string();
        let resume = [
            "train",
            "--backend=wgpu",
            "--resume",
            &from,
            "--output-dir",
            &to,
        ];
        run(&resume).succeeded();
        workspace.path(folder)
    };
    // The scale is a power of two, and the scaled values are exact: the same bits.
    let parts = go_on("parts", None);
    assert!(adapter_bytes(&whole) == adapter_bytes(&parts));
    // 2³⁰ takes the gradient of every logit out of the range.
    let halved = go_on("halved", Some(2f64.powi(30)));
    let found = scales(&halved);
    println!("loss scales after 2^30: {found:?}");
    assert!(
        found.len() == 4 && found[2] < 65536.0 && found[3] <= found[2],
        "{found:?}"
    );
    let (whole, halved) = (losses(&whole), losses(&halved));
    // The third step starts from the same adapter, the fourth from one with rounding differences.
    assert_eq!(whole[..3], halved[..3]);
    assert!(
        (whole[3] - halved[3]).abs() < 1e-3 * whole[3],
        "{whole:?}, {halved:?}"
    );
}

#[test]
fn a_run_goes_on_on_another_backend_and_back() {
    if wgpu().is_none() {
        return;
    }
    let workspace = Workspace::new();
    train(&workspace, "whole", &[], "").succeeded();
    train(&workspace, "out", &[], "lost=6").failed_saying(&["Step 5 is saved"]);
    let out = workspace.path("out");
    let from = out.display().to_string();
    let there = ["train", "--backend", "wgpu", "--resume", &from];
    let started = Instant::now();
    let outcome = run_with(&there, &[("LORA_TRAINER_FAULT", "lost=12")]);
    let recovery = started.elapsed();
    assert_eq!(outcome.code, Some(75), "{}", outcome.text);
    assert!(
        outcome.text.contains("the run was on CPU"),
        "{}",
        outcome.text
    );
    resume(&out, &[]).succeeded();
    let (whole, out) = (losses(&workspace.path("whole")), losses(&out));
    assert_eq!(whole.len(), 20);
    // f32 sums in another order, over six steps of AdamW; the dropout masks are the same, others
    // would change the losses by some percent.
    let pairs = whole.iter().zip(&out);
    let worst = pairs.map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
    assert!(
        whole.len() == out.len() && worst < 1e-4,
        "{worst:e}\n{whole:?}\n{out:?}"
    );
    assert_eq!(whole[..5], out[..5]);
    println!("CPU, wgpu, CPU: losses within {worst:.1e}");
    record(&Row {
        place: 140,
        fault: "The run is resumed on another backend (CPU, then wgpu, then CPU)",
        happened: "a note is printed; the losses agree to 1e-4 relative (f32 sums in another order)",
        lost: "nothing",
        recovery: Some(recovery),
    });
}
