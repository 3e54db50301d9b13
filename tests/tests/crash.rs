//! The trainer is killed (SIGKILL) at random moments and resumed each time; then its adapter is
//! compared byte for byte with that of an undisturbed run.
//!
//! Ten kills as a part of the tests. The long form is one command:
//!
//! ```text
//! LORA_CRASH_KILLS=50 cargo xtask test killed_at_random --nocapture
//! ```

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lora_core::CounterRng;
use tests::program::run;
use tests::reliability::{Row, record};
use tests::runs::{Running, adapter_bytes, checkpoints, last_step, numbers};

/// Optimizer steps of the run.
const STEPS: usize = 150;

/// The embedded model with dropout and a checkpoint every third step. Every write, sync and rename
/// of a checkpoint is slow, so that many kills hit one.
fn arguments(output: &str) -> Vec<String> {
    let settings = [
        "max_steps=150",
        "save_steps=3",
        "eval_steps=20",
        "lora_dropout=0.05",
        "logging_steps=1000",
    ];
    let mut arguments = [
        "train",
        "--backend",
        "cpu",
        "--resume",
        "auto",
        "--output-dir",
        output,
    ]
    .map(String::from)
    .to_vec();
    for setting in settings {
        arguments.extend(["--set".into(), setting.into()]);
    }
    arguments
}

/// The moment of a kill.
#[derive(Debug, Default)]
struct Hits {
    /// Before the first step of a session.
    starting: usize,
    /// Between two checkpoints.
    training: usize,
    /// In the middle of writing a checkpoint.
    saving: usize,
}

#[test]
fn a_run_killed_at_random_moments_gives_the_undisturbed_adapter() {
    let kills: usize = match std::env::var("LORA_CRASH_KILLS") {
        Ok(kills) => kills.parse().expect("LORA_CRASH_KILLS is a number"),
        Err(_) => 10,
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    let whole = arguments(&path("whole").display().to_string());
    let whole: Vec<&str> = whole.iter().map(String::as_str).collect();
    run(&whole).succeeded();

    let out = path("killed");
    let disturbed = arguments(&out.display().to_string());
    let disturbed: Vec<&str> = disturbed.iter().map(String::as_str).collect();
    let slow = [("LORA_TRAINER_FAULT", "delay=12")];
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = now.expect("the clock is set").as_nanos() as u64;
    println!("{kills} kills, seed {seed}");
    let mut random = CounterRng::new(seed);
    let mut hits = Hits::default();
    let mut recoveries: Vec<Duration> = Vec::new();
    // The time of a session from its start to its first step, measured during the test.
    let mut start_s = 1.0;
    let mut killed = 0;
    while killed < kills {
        let before = last_step(&out);
        let started = Instant::now();
        let mut running = Running::start(&disturbed, &slow, &path("log"));
        // One kill in eight hits the start. The others come after some of this kill's share of
        // steps, at any moment of a step and of the work after it.
        if random.uniform() < 0.125 {
            std::thread::sleep(Duration::from_secs_f64(start_s * random.uniform()));
        } else {
            let mut wait_for = |step: usize| {
                let there = running.wait_until(|| last_step(&out) >= step);
                assert!(there, "kill {killed} at step {before}:\n{}", running.text());
            };
            wait_for((before + 1).min(STEPS));
            start_s = started.elapsed().as_secs_f64();
            recoveries.push(started.elapsed());
            // Steps since the last checkpoint are repeated, so the mean may be above the share.
            let share = (STEPS - before) as f64 / (kills - killed + 1) as f64;
            let steps = (2.0 * share * random.uniform()) as usize;
            let last = (before + steps).clamp(before, (STEPS - 10).max(before));
            wait_for(last);
            let a_step =
                (started.elapsed().as_secs_f64() - start_s) / (last - before).max(1) as f64;
            std::thread::sleep(Duration::from_secs_f64(
                2.0 * a_step.max(0.02) * random.uniform(),
            ));
        }
        let steps = last_step(&out).saturating_sub(before);
        let text = running.text();
        if !running.kill() {
            panic!(
                "the run ended by itself after {killed} kills of {kills}, at step {before}:\n{text}"
            );
        }
        killed += 1;
        let names = checkpoints(&out);
        match names.iter().any(|name| name.starts_with('.')) {
            true => hits.saving += 1,
            false if steps == 0 => hits.starting += 1,
            false => hits.training += 1,
        }
        println!(
            "kill {killed}: at step {} after {:.2} s; {}",
            last_step(&out),
            started.elapsed().as_secs_f64(),
            names.join(" ")
        );
    }
    run(&disturbed).succeeded();
    assert_eq!(numbers(&out), numbers(&path("whole")), "seed {seed}");
    assert!(
        adapter_bytes(&out) == adapter_bytes(&path("whole")),
        "seed {seed}: the adapters differ"
    );
    assert!(
        checkpoints(&out).iter().all(|name| !name.starts_with('.')),
        "nothing half written stays: {:?}",
        checkpoints(&out)
    );
    recoveries.sort();
    let median = recoveries.get(recoveries.len() / 2).copied();
    println!(
        "{killed} kills: {} while starting, {} between checkpoints, {} while one was written; adapters and all \
         losses equal, byte for byte. Back at the step it was killed at after {:.2} s (median), {:.2} s at most",
        hits.starting,
        hits.training,
        hits.saving,
        median.unwrap_or_default().as_secs_f64(),
        recoveries.last().copied().unwrap_or_default().as_secs_f64()
    );
    record(&Row {
        place: 10,
        fault: "The process is killed, or the power fails (SIGKILL at random moments, also while a checkpoint is \
                written)",
        happened: "`--resume` resumes from the newest intact checkpoint; a partly written one is removed",
        lost: "nothing; the steps since that checkpoint are repeated",
        recovery: median,
    });
}
