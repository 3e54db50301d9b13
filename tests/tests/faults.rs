//! Faults during a run, and their consequences.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use tests::program::{Outcome, run, run_with};
use tests::reliability::{Row, record};
use tests::runs::{Running, adapter_bytes, checkpoints, last_step, lines, losses, numbers};
use tests::workspace::Workspace;

/// `trainer train` into a folder of the workspace: 20 steps of 4 examples in 4 epochs.
fn train(workspace: &Workspace, folder: &str, settings: &[&str], faults: &str) -> Outcome {
    train_into(workspace, &workspace.path(folder), settings, faults)
}

fn train_into(workspace: &Workspace, output: &Path, settings: &[&str], faults: &str) -> Outcome {
    let mut arguments = workspace.train_arguments(settings);
    arguments.extend(["--output-dir".into(), output.display().to_string()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run_with(&arguments, &[("LORA_TRAINER_FAULT", faults)])
}

fn resume(from: &Path, more: &[&str]) -> Outcome {
    let from = from.display().to_string();
    run(&[&["train", "--backend", "cpu", "--resume", &from], more].concat())
}

/// Wrapped text as one line.
fn unwrapped(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The difference of two runs' adapters: relative Frobenius distance over all matrices.
fn adapter_distance(first: &Path, second: &Path) -> f64 {
    let values = |run: &Path| -> Vec<f64> {
        let read = peft::read_adapter(&run.join("adapter"));
        let (_, tensors) = read.unwrap_or_else(|error| panic!("{error}"));
        let pairs = tensors.modules.into_values();
        let values = pairs.flat_map(|pair| [pair.a, pair.b].concat());
        values.map(f64::from).collect()
    };
    let (first, second) = (values(first), values(second));
    let difference: f64 = first
        .iter()
        .zip(&second)
        .map(|(a, b)| (a - b).powi(2))
        .sum();
    (difference / second.iter().map(|b| b.powi(2)).sum::<f64>()).sqrt()
}

#[test]
fn a_fault_that_does_not_exist_is_named() {
    train(&Workspace::new(), "out", &[], "enospc").failed_saying(&["LORA_TRAINER_FAULT", "enospc"]);
}

// The disk.

#[cfg(unix)]
#[test]
fn a_checkpoint_is_on_the_disk_before_it_gets_its_name() {
    let workspace = Workspace::new();
    let trace = workspace.path("trace");
    let faults = format!("trace={}", trace.display());
    train(&workspace, "out", &["max_steps=4", "save_steps=2"], &faults).succeeded();
    let trace = fs::read_to_string(trace).expect("the trace is there");
    let operations: Vec<(&str, PathBuf)> = trace
        .lines()
        .map(|line| line.split_once(' ').expect("an operation and a path"))
        .map(|(operation, path)| (operation, path.into()))
        .collect();
    let done = |operation: &str, path: &Path| {
        let found = operations
            .iter()
            .position(|(o, p)| *o == operation && p == path);
        found.unwrap_or_else(|| panic!("no {operation} of {}:\n{trace}", path.display()))
    };
    let folder = workspace.path("out/checkpoints");
    let (writing, place) = (
        folder.join(".step-000002.writing"),
        folder.join("step-000002"),
    );
    let renamed = done("rename", &place);
    for name in [
        "state.json",
        "config.toml",
        "training.safetensors",
        "manifest.json",
    ] {
        let (written, synced) = (
            done("write", &writing.join(name)),
            done("sync", &writing.join(name)),
        );
        assert!(written < synced && synced < renamed, "{name}:\n{trace}");
    }
    // The adapter's files get their names in the folder that is being written, and are synced
    // before.
    let adapter = writing.join("adapter");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let named = done("rename", &adapter.join(name));
        let parts = operations[..named].iter().rev();
        let synced = parts.clone().find(|(operation, _)| *operation == "sync");
        assert!(
            synced.is_some_and(|(_, path)| path.starts_with(&adapter)),
            "{name}:\n{trace}"
        );
        assert!(named < renamed);
    }
    assert!(done("sync-folder", &adapter) < renamed, "{trace}");
    assert!(done("sync-folder", &writing) < renamed, "{trace}");
    // The new name itself, and the folder of checkpoints in the run's folder.
    let after = &operations[renamed..];
    let named = after
        .iter()
        .position(|(o, p)| *o == "sync-folder" && *p == folder);
    assert!(named.is_some(), "{trace}");
    assert!(
        done("sync-folder", &workspace.path("out")) < renamed,
        "{trace}"
    );
    // Nothing is removed before the new checkpoint has its name and is synced.
    let removed = operations.iter().position(|(o, p)| {
        *o == "remove"
            && p.starts_with(&folder)
            && *p != writing
            && !p.to_string_lossy().contains("replaced")
    });
    assert!(removed.is_none_or(|removed| removed > renamed), "{trace}");
    // The exported adapter comes after the checkpoint that contains it.
    let handed = done(
        "rename",
        &workspace.path("out/adapter/adapter_model.safetensors"),
    );
    assert!(renamed < handed, "{trace}");
}

#[test]
fn a_full_disk_stops_neither_the_run_nor_harms_what_is_there() {
    let workspace = Workspace::new();
    let settings = ["save_steps=2", "eval_steps=4"];
    train(&workspace, "whole", &settings, "").succeeded();
    // Full from step 7 to step 12, with a validation in between that is the best so far.
    let text = train(&workspace, "out", &settings, "full=7..13").succeeded();
    let said = unwrapped(&text);
    for words in [
        "the checkpoint could not be written, the newest one is of step 6",
        "The run continues and tries again",
        "checkpoints are written again",
        "metrics.jsonl",
    ] {
        assert!(said.contains(words), "{words:?} in\n{text}");
    }
    let (out, whole) = (workspace.path("out"), workspace.path("whole"));
    // Not a single line of the metrics is lost.
    assert_eq!(numbers(&out), numbers(&whole));
    assert!(adapter_bytes(&out) == adapter_bytes(&whole));
    assert!(checkpoints(&out).iter().all(|name| !name.starts_with('.')));

    // Full, and then killed: the adapter and the earlier checkpoint are intact.
    let outcome = train(&workspace, "dead", &settings, "full=7..13,lost=12");
    assert_eq!(outcome.code, Some(75), "{}", outcome.text);
    let dead = workspace.path("dead");
    peft::read_adapter(&dead.join("adapter")).unwrap_or_else(|error| panic!("{error}"));
    let started = Instant::now();
    let text = resume(&dead, &[]).succeeded();
    let recovery = started.elapsed();
    assert!(text.contains("resuming after step 6"), "{text}");
    assert_eq!(numbers(&dead), numbers(&whole));
    assert!(adapter_bytes(&dead) == adapter_bytes(&whole));
    record(&Row {
        place: 50,
        fault: "The disk is full for some steps",
        happened: "older checkpoints are removed; if that is not enough, the run prints a note and continues, with \
                   its metrics in memory; the adapter and the newest checkpoint stay intact",
        lost: "nothing; if the run is killed in the meantime, the steps since the last checkpoint are repeated",
        recovery: Some(recovery),
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_small_file_system_that_fills_up() {
    let workspace = Workspace::new();
    let place = workspace.path("small");
    fs::create_dir(&place).expect("a temporary folder is writable");
    let shell = |command: &str| {
        let status = std::process::Command::new("sh")
            .args(["-c", command])
            .status();
        status.expect("there is a shell").success()
    };
    let small = place.display();
    if !shell(&format!("mount -t tmpfs -o size=1m tmpfs {small} 2>&1")) {
        println!(
            "SKIPPED: no file system can be mounted here; the simulated full disk is tested nevertheless"
        );
        return;
    }
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let umount = std::process::Command::new("umount")
                .arg("-l")
                .arg(&self.0)
                .status();
            assert!(
                umount.is_ok_and(|status| status.success()),
                "umount {}",
                self.0.display()
            );
        }
    }
    let _unmount = Unmount(place.clone());
    let settings = ["save_steps=1", "eval_steps=4", "save_total_limit=none"];
    train(&workspace, "whole", &settings, "").succeeded();
    // More checkpoints than fit the file system: the old ones are removed.
    fs::write(place.join("other"), vec![0; 700 << 10]).expect("there is room");
    let text = train_into(&workspace, &place.join("run"), &settings, "").succeeded();
    let steps = checkpoints(&place.join("run"));
    assert!(
        steps.len() < 20 && steps.contains(&"step-000020".to_string()),
        "{steps:?}\n{text}"
    );
    assert_eq!(
        numbers(&place.join("run")),
        numbers(&workspace.path("whole"))
    );
    assert!(adapter_bytes(&place.join("run")) == adapter_bytes(&workspace.path("whole")));

    // Full from the start: room is made only when the run is over and waits to write its adapter.
    fs::remove_dir_all(place.join("run")).expect("it is there");
    let mut arguments = workspace.train_arguments(&settings);
    let late = place.join("late");
    arguments.extend(["--output-dir".into(), late.display().to_string()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let slow = [("LORA_TRAINER_FAULT", "delay=5")];
    let mut running = Running::start(&arguments, &slow, &workspace.path("log"));
    assert!(
        running.wait_until(|| last_step(&late) >= 1),
        "{}",
        running.text()
    );
    shell(&format!("cat /dev/zero > {small}/filler 2>/dev/null"));
    let waits = || {
        let text = fs::read_to_string(workspace.path("log")).unwrap_or_default();
        unwrapped(&text).contains("the run is over, but")
    };
    assert!(running.wait_until(waits), "{}", running.text());
    fs::remove_file(place.join("filler")).expect("it is there");
    let outcome = running.end();
    assert_eq!(outcome.code, Some(0), "{}", outcome.text);
    assert!(adapter_bytes(&late) == adapter_bytes(&workspace.path("whole")));
}

#[test]
fn a_folder_that_can_no_longer_be_written_to_does_not_stop_the_run() {
    let workspace = Workspace::new();
    let settings = ["save_steps=1", "eval_steps=4"];
    train(&workspace, "whole", &settings, "").succeeded();
    let out = workspace.path("out");
    let mut arguments = workspace.train_arguments(&settings);
    arguments.extend(["--output-dir".into(), out.display().to_string()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let slow = [("LORA_TRAINER_FAULT", "delay=20")];
    let mut running = Running::start(&arguments, &slow, &workspace.path("log"));
    assert!(
        running.wait_until(|| last_step(&out) >= 2),
        "{}",
        running.text()
    );
    // Permissions do not stop root, and tests often run as root. A file in place of the folder
    // does.
    let (folder, aside) = (out.join("checkpoints"), out.join("aside"));
    let swapped = || {
        let moved = fs::rename(&folder, &aside);
        moved
            .and_then(|()| fs::write(&folder, "not a folder"))
            .is_ok()
    };
    assert!(swapped() || swapped(), "the folder can be moved");
    let complained = || {
        let text = fs::read_to_string(workspace.path("log")).unwrap_or_default();
        unwrapped(&text).contains("the checkpoint could not be written, the newest one is of step")
    };
    assert!(running.wait_until(complained), "{}", running.text());
    fs::remove_file(&folder).expect("it is there");
    let outcome = running.end();
    assert_eq!(outcome.code, Some(0), "{}", outcome.text);
    assert!(checkpoints(&out).contains(&"step-000020".to_string()));
    assert_eq!(numbers(&out), numbers(&workspace.path("whole")));
    assert!(adapter_bytes(&out) == adapter_bytes(&workspace.path("whole")));
    record(&Row {
        place: 55,
        fault: "The output folder can no longer be written to",
        happened: "the run prints a note and continues; it writes again as soon as that is possible. A folder that \
                   cannot be written to from the start is refused before any work",
        lost: "nothing; if the run is killed in the meantime, the steps since the last checkpoint are repeated",
        recovery: None,
    });
}

#[test]
fn a_data_file_that_changes_under_the_run_is_told_and_refused_when_resuming() {
    let workspace = Workspace::new();
    train(&workspace, "whole", &["save_steps=1"], "").succeeded();
    let out = workspace.path("out");
    let mut arguments = workspace.train_arguments(&["save_steps=1"]);
    arguments.extend(["--output-dir".into(), out.display().to_string()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let slow = [("LORA_TRAINER_FAULT", "delay=30")];
    let mut running = Running::start(&arguments, &slow, &workspace.path("log"));
    assert!(
        running.wait_until(|| last_step(&out) >= 2),
        "{}",
        running.text()
    );
    let rows = fs::read_to_string(workspace.path("rows.jsonl")).expect("it is there");
    workspace.write(
        "rows.jsonl",
        &format!("{rows}{{\"context\": \"w12\", \"target\": \"w50\"}}\n"),
    );
    let outcome = running.end();
    assert_eq!(outcome.code, Some(0), "{}", outcome.text);
    let said = unwrapped(&outcome.text);
    assert_eq!(
        said.matches("rows.jsonl has changed since the run read it")
            .count(),
        1,
        "{said}"
    );
    // It has read its data once, and trains on that.
    assert_eq!(numbers(&out), numbers(&workspace.path("whole")));
    resume(&out, &[]).failed_saying(&["the training data: rows.jsonl has changed"]);
    record(&Row {
        place: 90,
        fault: "A data file changes during the run",
        happened: "the run reports it at the next checkpoint and continues with the data that it has read; resuming \
                   requires the original file",
        lost: "nothing",
        recovery: None,
    });
}

// Numbers.

#[test]
fn a_loss_that_is_not_a_number_stops_the_run_with_the_step_before_saved() {
    let workspace = Workspace::new();
    train(&workspace, "whole", &[], "").succeeded();
    let outcome = train(&workspace, "out", &[], "nan=7..8");
    assert!(outcome.text.contains("lines"), "{}", outcome.text);
    outcome.failed_saying(&[
        "the loss of step 7 is NaN",
        "on_non_finite",
        "Step 6 is saved",
        "--resume",
    ]);
    let out = workspace.path("out");
    let started = Instant::now();
    resume(&out, &[]).succeeded();
    let recovery = started.elapsed();
    assert_eq!(numbers(&out), numbers(&workspace.path("whole")));
    assert!(adapter_bytes(&out) == adapter_bytes(&workspace.path("whole")));
    record(&Row {
        place: 60,
        fault: "A loss or gradient is not a number (`on_non_finite = \"stop\"`)",
        happened: "the run stops and names the examples; the step before is saved",
        lost: "nothing",
        recovery: Some(recovery),
    });
}

#[test]
fn steps_that_are_not_numbers_are_skipped_within_the_budget() {
    let workspace = Workspace::new();
    let settings = [
        "on_non_finite=skip",
        "max_skipped_steps=2",
        "lr_scheduler=constant",
        "warmup_ratio=0",
    ];
    let text = train(&workspace, "out", &settings, "nan=3..5").succeeded();
    let said = unwrapped(&text);
    for words in [
        "step 3 is NaN",
        "step 4 is NaN",
        "(2 of 2)",
        "0.25 of its schedule",
    ] {
        assert!(said.contains(words), "{words:?} in\n{text}");
    }
    let of_steps = lines(&workspace.path("out"));
    let skipped: Vec<u64> = of_steps
        .iter()
        .filter(|line| line["skipped"].is_string())
        .map(|line| line["step"].as_u64().expect("a step"))
        .collect();
    assert_eq!(skipped, [3, 4]);
    let rates: Vec<f64> = of_steps
        .iter()
        .filter_map(|line| line["learning_rate"].as_f64())
        .collect();
    assert_eq!((rates[0], rates[1], rates[2]), (1e-2, 1e-2, 0.25e-2));

    // The learning rate stays reduced after resuming.
    train(&workspace, "parts", &settings, "nan=3..5,lost=9").failed_saying(&["Step 8 is saved"]);
    resume(&workspace.path("parts"), &[]).succeeded();
    assert_eq!(
        numbers(&workspace.path("parts")),
        numbers(&workspace.path("out"))
    );
    assert!(adapter_bytes(&workspace.path("parts")) == adapter_bytes(&workspace.path("out")));

    train(&workspace, "over", &settings, "nan=3..6").failed_saying(&[
        "the loss of step 5 is NaN",
        "2 steps skipped before it",
        "Step 4 is saved",
    ]);
    record(&Row {
        place: 65,
        fault: "A loss or gradient is not a number (`on_non_finite = \"skip\"`)",
        happened: "the step is skipped, its examples are named, and the learning rate is halved; after \
                   `max_skipped_steps` skipped steps the run stops as above",
        lost: "the update of that step",
        recovery: None,
    });
}

// The device.

#[test]
fn too_little_memory_halves_the_micro_batches_and_the_result_stays() {
    let workspace = Workspace::new();
    let settings = [
        "batch_size=8",
        "save_steps=3",
        "merge_micro_batches=false",
        "eval_steps=5",
    ];
    train(&workspace, "whole", &settings, "").succeeded();
    let text = train(&workspace, "out", &settings, "oom=4>2").succeeded();
    let said = unwrapped(&text);
    for words in [
        "the device's memory is too small: out of device memory allocating 1073741824 bytes",
        "This was planned to need",
        "4 examples instead of 8, with 2 of them per update",
        "2 examples instead of 4, with 4 of them per update",
    ] {
        assert!(said.contains(words), "{words:?} in\n{text}");
    }
    let (whole, out) = (workspace.path("whole"), workspace.path("out"));
    assert_eq!(losses(&whole).len(), losses(&out).len());
    assert_eq!(losses(&whole)[..3], losses(&out)[..3]);
    // f32 sums in another order, after AdamW's steps: 1e-6 without the fault's own effect.
    let distance = adapter_distance(&out, &whole);
    assert!(distance < 1e-4, "{distance:e}");
    println!("adapters within {distance:.1e}");

    // The smaller division is part of the checkpoint: a resumed run divides the same way.
    train(&workspace, "parts", &settings, "oom=4>2,lost=9").failed_saying(&["Step 8 is saved"]);
    let started = Instant::now();
    resume(&workspace.path("parts"), &[]).succeeded();
    let recovery = started.elapsed();
    assert_eq!(numbers(&workspace.path("parts")), numbers(&out));
    assert!(adapter_bytes(&workspace.path("parts")) == adapter_bytes(&out));

    let outcome = train(
        &workspace,
        "stop",
        &[&settings[..], &["on_out_of_memory=stop"]].concat(),
        "oom=4>2",
    );
    assert_eq!(outcome.code, Some(75), "{}", outcome.text);
    outcome.failed_saying(&["too small", "batch_size", "Step 3 is saved"]);
    record(&Row {
        place: 80,
        fault: "The device's memory is too small for a micro-batch",
        happened: "the run reports the memory that was needed, halves the micro-batches and accumulates more of \
                   them: the same updates up to rounding",
        lost: "nothing",
        recovery: Some(recovery),
    });
}

#[test]
fn a_device_that_is_lost_before_the_first_checkpoint_loses_no_step_either() {
    let workspace = Workspace::new();
    let outcome = train(&workspace, "first", &["save_steps=1"], "lost=1");
    assert_eq!(outcome.code, Some(1), "{}", outcome.text);
    outcome.failed_saying(&["the device was lost", "No checkpoint was written yet"]);
    train(&workspace, "out", &["save_minutes=60"], "lost=2").failed_saying(&["Step 1 is saved"]);
}

#[test]
fn a_panic_on_another_thread_fails_the_step_and_the_run_goes_on_from_there() {
    let workspace = Workspace::new();
    let settings = ["save_steps=1"];
    train(&workspace, "whole", &settings, "").succeeded();
    let outcome = train(&workspace, "out", &settings, "thread_panic=7");
    assert_eq!(outcome.code, Some(75), "{}", outcome.text);
    outcome.failed_saying(&["step 7: ", "a task of the device failed", "Step 6 is saved"]);
    let (out, whole) = (workspace.path("out"), workspace.path("whole"));
    let started = Instant::now();
    resume(&out, &[]).succeeded();
    let recovery = started.elapsed();
    assert_eq!(numbers(&out), numbers(&whole));
    assert!(adapter_bytes(&out) == adapter_bytes(&whole));
    record(&Row {
        place: 78,
        fault: "A task panics on a thread of the device, and the step finishes without it",
        happened: "the step fails with the panic's message, because its numbers may be wrong; the step before is \
                   saved",
        lost: "nothing",
        recovery: Some(recovery),
    });
}
