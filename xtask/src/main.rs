//! `cargo xtask …`: builds the trainer for the backend asked for and runs it; tests; continuous
//! integration.
//!
//! It is thin on purpose: it knows cargo features, drivers and exit codes, and depends on none of
//! the other crates, so that the first thing a new user types compiles in seconds. What a
//! sub-command of the trainer means, and every flag but `--backend` and `--backends`, is the
//! trainer's own business.

mod backend;
mod bundle;
mod cargo;
mod ci;
mod detect;
mod gpu_report;
mod interop;
mod test;
mod trainer;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::backend::Backend;
use crate::bundle::BundleArgs;
use crate::cargo::USAGE;

/// What `cargo xtask` says when it is not told what to do.
const WELCOME: &str = "\
Two commands do everything on a fresh machine:

  cargo xtask train    train the small model that comes with the repository
  cargo xtask test     run every test

Then `cargo xtask train --config configs/FILE` for a model of your own;
`cargo xtask --help` lists the rest.";

const TRAIN_HELP: &str = "\
Fine-tunes a model with LoRA; without --config, the small model that comes with the repository.

Usage: cargo xtask train [OPTIONS]

  --backend BACKEND   auto (default), cpu, cuda, wgpu, vulkan or metal
  --config FILE       a TOML or JSON file; `configs/` holds commented examples
  --run NAME          one of the named runs of a FinLoRA config file
  --set KEY=VALUE     overrides one key of the config; may be repeated
  --output-dir DIR    where the adapter, the metrics and the resolved config go
  --resume [auto|DIR] go on with a run: DIR is its output folder or one of its checkpoints; auto takes the
                      output folder's newest checkpoint, or starts if there is none
  --no-fusion         a kernel for each operation; slower, for drivers that get fused kernels wrong
  --no-autotune       the first kernel that fits; another build, without timing several
  --force-resume      resume although the configuration, the data or the model has changed

Ctrl-C finishes the step, writes a checkpoint and exits with code 75; a second one leaves at once.

Only the backend asked for is compiled. Every flag goes to the trainer as it is.";

const BENCH_HELP: &str = "\
Measures speed and memory of training: the machine's floors, then ours, Burn's own apply_qlora and, given a
Python, PEFT, on the same rows in turn, each in a process of its own.

Usage: cargo xtask bench [OPTIONS]

  --peft PYTHON       a Python with torch, transformers and peft: compares with it
  --device DEVICE     auto (default), cpu, cuda, wgpu, vulkan or metal
  --model DIR         a Hugging Face model folder (models/SmolLM2-135M-Instruct)
  --data FILE         rows to train on (data/fpb_train.jsonl)
  --rounds N          measured rounds (5); medians are over them
  --steps N           optimizer steps of a round (5)
  --only NAME,…       floors, main (default), all-linear, r64, long, accumulation, scaling, 8b
  --all               every scenario but 8b
  --contenders ID,…   ours, ours-bf16, ours-dense, ours-plain, ours-checkpointed, burn, peft-f32, …
  --bf16              PEFT in bfloat16 even where the processor has no instructions for it
  --quick             the embedded model, seconds: whether it works, not how fast
  --output DIR        results.json, results.md and speed.svg go there (target/bench)

Only the backend asked for is compiled. Every flag goes to the trainer as it is.";

const GPU_REPORT_HELP: &str = "\
Finds out whether a GPU computes right and how fast it is, and writes a report to keep or to send.

Usage: cargo xtask gpu-report [OPTIONS]

  --backend BACKEND   auto (default), cuda, wgpu, vulkan or metal
  --quick             small sizes, a minute or two: whether it works, not how fast; for software drivers
  --seconds N         it ends by then (540); what was left out is in the report
  --output DIR        report.md, report.json and logs/ go there (target/gpu-report)
  --only NAME,…       device, operations, model, speed, counts, training:SHAPE, other-types:SHAPE
  --peft PYTHON       a Python with torch, transformers and peft: measured in turn with ours
  --peft-script FILE  what that Python runs (../shared/tools/peft_bench.py)
  --peft-device NAME  PyTorch's device (cuda for CUDA, mps for Metal, else cpu)

The exit code is 1 where a comparison with the CPU fails. Only the backend asked for is compiled. Every flag goes to
the trainer as it is.";

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = WELCOME)]
/// Fine-tunes Llama-family models with LoRA over 8-bit weights, on the hardware you have.
struct Cli {
    #[command(subcommand)]
    task: Option<Task>,
}

#[derive(Subcommand)]
enum Task {
    /// Train: [--backend auto|cpu|cuda|wgpu|vulkan|metal] [--config FILE] [--run NAME] [--set
    /// KEY=VALUE]
    #[command(override_help = TRAIN_HELP)]
    Train(Trainer),
    /// Continue prompts: --model DIR [--adapter DIR] [--prompt TEXT | --prompts FILE]
    Generate(Trainer),
    /// Write GGUF for llama.cpp: --model PATH [--adapter DIR [--lora]] --output FILE [--type f16|q8_0|f32]
    ExportGguf(Trainer),
    /// Measure base model and adapters on a task: --model DIR [--adapter DIR …] --data FILE…
    Eval(Trainer),
    /// Merge an adapter into a whole model folder: --model DIR --adapter DIR --output DIR
    Merge(Trainer),
    /// Take an adapter out of a merged model: --model DIR --adapter DIR --output DIR
    Unmerge(Trainer),
    /// Print rows of a data set with their tokens and the loss mask: --config FILE
    InspectData(Trainer),
    /// One adapter from several: --adapter DIR=WEIGHT … --output DIR [--type cat|linear|svd]
    Combine(Trainer),
    /// Parameters and predicted peak memory of a model, without its weights: --config FILE; with --gpu also
    /// a step's launches, bytes and operations, and the time they take at a card's stated peak
    Plan(Trainer),
    /// Compare with a reference or across backends: [--reference DIR] [--backends cpu,wgpu,…]
    Parity(Trainer),
    /// Measure speed and memory, beside PEFT and Burn: [--peft PYTHON] [--only NAME,…]
    #[command(override_help = BENCH_HELP)]
    Bench(Trainer),
    /// Whether a GPU computes right and how fast it is, in nine minutes: [--quick] [--seconds N] [--peft PYTHON]
    #[command(override_help = GPU_REPORT_HELP)]
    GpuReport(Trainer),
    /// One file with the trainer for CUDA, Vulkan and wgpu and a script that reports, for a machine with a GPU
    GpuBundle(BundleArgs),
    /// Make the embedded model, tokenizer and data set again, from their seed
    MakeAssets(Trainer),
    /// Run every test; words after it select tests by name
    Test(Filter),
    /// Run the tests against transformers, PEFT and llama.cpp; arguments go to pytest
    Interop(Filter),
    /// Formatting, lints, documentation and tests, as continuous integration runs them
    Ci {
        /// Also makes the GPU bundle and tries it on the software driver: an hour more
        #[arg(long)]
        full: bool,
    },
    /// Ask the drivers (a process of its own, see detect.rs)
    #[command(name = detect::PROBE, hide = true)]
    Probe,
}

/// Arguments that go to the trainer as they are.
#[derive(Args)]
struct Trainer {
    /// Arguments for the trainer
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// Arguments that go to the test harness, or to pytest.
#[derive(Args)]
struct Filter {
    /// Names, or parts of names, of the tests to run
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<OsString>,
}

/// A plan needs no GPU's build, but for what counts a step's launches.
fn plan_backend(args: &[OsString]) -> Backend {
    let on_gpu = |arg: &OsString| {
        arg.to_str()
            .is_some_and(|arg| arg.split('=').next() == Some("--gpu"))
    };
    if args.iter().any(on_gpu) {
        Backend::Auto
    } else {
        Backend::Cpu
    }
}

fn main() -> ExitCode {
    let Some(task) = Cli::parse().task else {
        println!("{WELCOME}");
        return ExitCode::from(USAGE);
    };
    let outcome = match task {
        Task::Train(it) => trainer::run("train", it.args, Backend::Auto),
        Task::Generate(it) => trainer::run("generate", it.args, Backend::Auto),
        Task::Eval(it) => trainer::run("eval", it.args, Backend::Auto),
        // These compute nothing on a GPU, so they need not wait for its build.
        Task::Merge(it) => trainer::run("merge", it.args, Backend::Cpu),
        Task::Unmerge(it) => trainer::run("unmerge", it.args, Backend::Cpu),
        Task::InspectData(it) => trainer::run("inspect-data", it.args, Backend::Cpu),
        Task::Combine(it) => trainer::run("combine", it.args, Backend::Cpu),
        Task::Plan(it) => trainer::run("plan", it.args.clone(), plan_backend(&it.args)),
        Task::GpuReport(it) => trainer::run("gpu-report", it.args, Backend::Auto),
        Task::GpuBundle(args) => bundle::run(&args),
        Task::ExportGguf(it) => trainer::run("export-gguf", it.args, Backend::Cpu),
        // The embedded model has to come out the same on every machine.
        Task::MakeAssets(it) => trainer::run("make-assets", it.args, Backend::Cpu),
        Task::Parity(it) => trainer::parity(it.args),
        Task::Bench(it) => trainer::run("bench", it.args, Backend::Auto),
        Task::Test(it) => test::run(it.filter),
        Task::Interop(it) => interop::run(it.filter),
        Task::Ci { full } => ci::run(full),
        Task::Probe => detect::probe().map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::from(USAGE)
    })
}
