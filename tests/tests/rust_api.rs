//! The training library as a Rust program uses it: the example of `lora-train`, and what an observer sees of a run.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use lora_train::metrics::{TrainLine, ValidationLine};
use lora_train::output::OutputFolder;
use lora_train::{
    Backend, Config, Ended, Interrupt, Request, RunResult, RunSummary, TrainingCallback, evaluate,
    train,
};
use tests::program::run;
use tests::runs::{adapter_bytes, lines};

#[path = "../../crates/lora-train/examples/train_and_evaluate.rs"]
#[allow(dead_code)] // Its `main`.
mod example;

/// A run catches panics of the whole process: one at a time.
static RUNS: Mutex<()> = Mutex::new(());

#[test]
fn the_example_trains_what_the_program_trains_and_evaluates_what_the_run_reported() {
    let _one = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().join("api");
    let (before, after, adapter) = example::train_and_evaluate(&output).expect("it trains");
    assert_eq!(adapter, output.join("adapter"));
    assert!(after.loss < 0.2 * before.loss, "{before:?} {after:?}");
    assert!(after.row_accuracy > 0.5, "{before:?} {after:?}");

    let validations = lines(&output);
    let losses: Vec<f64> = validations
        .iter()
        .filter_map(|line| line["val_loss"].as_f64())
        .collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    for (got, expected) in [(before.loss, losses[0]), (after.loss, best)] {
        assert!((got / expected - 1.0).abs() < 1e-3, "{got} {losses:?}");
    }

    let program = folder.path().join("program").display().to_string();
    let arguments = ["train", "--output-dir", &program];
    let settings = ["--set", "max_steps=100", "--set", "eval_steps=50"];
    run(&[&arguments[..], &settings].concat()).succeeded();
    assert!(
        adapter_bytes(&output) == adapter_bytes(Path::new(&program)),
        "the library's adapter is not the program's"
    );
}

/// Writes down what it is told.
#[derive(Default)]
struct Recorder {
    events: Vec<String>,
    base_loss: Option<f64>,
}

impl TrainingCallback for Recorder {
    fn on_already_done(&mut self, output: &OutputFolder, total_steps: usize) {
        let adapter = output.adapter().join("adapter_model.safetensors");
        assert!(adapter.is_file(), "{}", adapter.display());
        self.events.push(format!("already done: {total_steps}"));
    }

    fn on_loading(&mut self, done: usize, total: usize) {
        if done == 0 || done == total {
            self.events.push(format!("loading {}", done == total));
        }
    }

    fn on_loaded(&mut self) {
        self.events.push("loaded".into());
    }

    fn on_start(&mut self, summary: &RunSummary) {
        self.events.push(format!("start: {}", summary.steps.total));
    }

    fn on_step(&mut self, line: &TrainLine) {
        self.events.push(format!("step {}", line.step));
    }

    fn on_validation(&mut self, line: &ValidationLine) {
        self.base_loss.get_or_insert(line.val_loss);
        self.events.push(format!("validation {}", line.step));
    }

    fn on_checkpoint(&mut self, step: usize, folder: &Path) {
        assert!(
            folder.join("manifest.json").is_file(),
            "{}",
            folder.display()
        );
        self.events.push(format!("checkpoint {step}"));
    }

    fn on_finish(&mut self, result: &RunResult) {
        assert_eq!(result.base.map(|scores| scores.loss), self.base_loss);
        self.events.push(format!("finish: {}", result.steps));
    }
}

/// Three steps with a checkpoint after each and a validation at the end.
fn request(output: &Path) -> Request {
    let settings = ["max_steps=3", "eval_steps=3", "save_steps=1"].map(String::from);
    let mut config = Config::load(None, None, &settings).expect("valid settings");
    config.output_dir = output.into();
    Request {
        backend: Backend::Cpu,
        ..Request::new(config)
    }
}

#[test]
fn an_observer_sees_a_run_in_its_order_and_a_complete_one_when_it_is_resumed() {
    let _one = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a folder");
    let mut request = request(&folder.path().join("run"));
    let mut seen = Recorder::default();
    train(&request, &Interrupt::default(), &mut seen).expect("it trains");
    assert_eq!(
        seen.events,
        [
            "loading false",
            "loading true",
            "loaded",
            "start: 3",
            "validation 0",
            "step 1",
            "checkpoint 1",
            "step 2",
            "checkpoint 2",
            "step 3",
            "validation 3",
            "checkpoint 3",
            "finish: 3",
        ]
    );

    // A folder that holds a run is refused, unless the run is resumed.
    let refused = train(&request, &Interrupt::default(), &mut Recorder::default());
    assert!(refused.is_err_and(|error| error.to_string().contains("already holds a run")));
    request.resume = Some(lora_train::checkpoint::Resume {
        from: request.config.output_dir.clone(),
        or_start: false,
        force: false,
    });
    let mut seen = Recorder::default();
    train(&request, &Interrupt::default(), &mut seen).expect("it is done");
    assert_eq!(seen.events, ["already done: 3"]);
}

#[test]
fn an_interrupted_run_says_so_and_an_evaluation_without_examples_has_no_scores() {
    let _one = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a folder");
    let mut request = request(&folder.path().join("run"));
    let interrupt = Interrupt::default();
    interrupt.ask();
    let ended = train(&request, &interrupt, &mut lora_train::Silent).expect("it stops");
    assert!(matches!(ended, Ended::Interrupted(_)), "{ended:?}");

    let rows = folder.path().join("rows.jsonl");
    let row = r#"{"context": "a", "target": "b"}"#;
    fs::write(&rows, format!("{row}\n{row}\n")).expect("it can be written");
    request.config.dataset_path = rows;
    request.config.val_set_size = 0.0;
    let scores = evaluate(&request.config, request.backend, None).expect("it is read");
    assert_eq!(scores, None);
}
