//! `cargo xtask …`: builds a program for the backend asked for and runs it; tests; continuous
//! integration.
//!
//! It is thin on purpose: it knows cargo features, drivers and exit codes, and depends on no other
//! crate of the workspace but `backends`, so that the first thing a new user types compiles in
//! seconds. What a command means, and every option but `--backend` and `--backends`, is known to the
//! program alone. `--help` is therefore the program's own. xtask does not build the program for it:
//! before the first build, which takes ten minutes, it prints where the options are described.

mod bundle;
mod cargo;
mod ci;
mod detect;
mod gpu_offline;
mod gpu_report;
mod interop;
mod job;
mod program;
mod test;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use backends::Backend;
use clap::{Args, Parser, Subcommand};

use crate::bundle::BundleArgs;
use crate::cargo::USAGE;
use crate::program::Program;

/// The text that `cargo xtask` prints without a command.
const WELCOME: &str = "\
Two commands do everything on a fresh machine:

  cargo xtask train    train the small model that comes with the repository
  cargo xtask test     run every test

Then `cargo xtask train --config configs/FILE` for a model of your own;
`cargo xtask --help` lists the rest.";

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = WELCOME)]
/// Fine-tunes Llama-family models with LoRA over 8-bit weights, on the hardware you have.
struct Cli {
    #[command(subcommand)]
    task: Option<Task>,
}

#[derive(Subcommand)]
enum Task {
    /// Train: [--backend NAME] [--config FILE] [--run NAME] [--set KEY=VALUE]
    Train(Passed),
    /// Continue prompts: --model DIR [--adapter DIR] [--prompt TEXT | --prompts FILE]
    Generate(Passed),
    /// Write GGUF for llama.cpp: --model PATH [--adapter DIR [--lora]] --output FILE [--type f16|q8_0|f32]
    ExportGguf(Passed),
    /// Measure base model and adapters on a task: --model DIR [--adapter DIR …] --data FILE…
    Eval(Passed),
    /// Merge an adapter into a whole model folder: --model DIR --adapter DIR --output DIR
    Merge(Passed),
    /// Subtract an adapter from a merged model: --model DIR --adapter DIR --output DIR
    Unmerge(Passed),
    /// Print examples with their tokens and the loss mask: --config FILE
    InspectData(Passed),
    /// One adapter from several: --adapter DIR=WEIGHT … --output DIR [--type cat|linear|svd]
    Combine(Passed),
    /// Parameters and predicted peak memory of a model, without its weights: --config FILE; with --gpu also
    /// a step's launches, bytes and operations, and the time they take at a card's stated peak
    Plan(Passed),
    /// Compare with a reference or across backends: [--reference DIR] [--backends cpu,wgpu,…]
    Parity(Passed),
    /// Measure speed and memory, beside PEFT and Burn: [--peft PYTHON] [--only NAME,…]
    Bench(Passed),
    /// Check a GPU's results and measure its speed, in nine minutes: [--quick] [--seconds N] [--peft PYTHON --peft-script FILE]
    GpuReport(Passed),
    /// One file with the trainer for CUDA, Vulkan and wgpu and a script that runs gpu-report, for a machine with a GPU
    GpuBundle(BundleArgs),
    /// Compile the GPU kernels for NVIDIA's GPUs and Vulkan without a GPU: registers, spills, occupancy
    GpuOffline(Passed),
    /// Regenerate the embedded model, tokenizer and data set from their seed
    MakeAssets(Passed),
    /// Run every test; arguments select tests by name
    Test(Filter),
    /// Run the tests against transformers, PEFT and llama.cpp; arguments go to pytest
    Interop(Filter),
    /// Formatting, lints, documentation and tests, as continuous integration runs them
    Ci {
        /// Also compiles for other processors and GPUs, makes the GPU bundle and tries it: an hour more
        #[arg(long)]
        full: bool,
    },
    /// Ask the drivers (a process of its own, see detect.rs)
    #[command(name = detect::PROBE, hide = true)]
    Probe,
}

/// Arguments that go to a program as they are, `--help` included.
#[derive(Args)]
#[command(disable_help_flag = true)]
struct Passed {
    /// The program's own; `--help` lists them
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

/// Runs a command of the trainer.
fn trainer(command: &'static str, args: Vec<OsString>, default: Backend) -> Result<ExitCode> {
    job::run(Program::Trainer(command), args, default)
}

fn main() -> ExitCode {
    let Some(task) = Cli::parse().task else {
        println!("{WELCOME}");
        return ExitCode::from(USAGE);
    };
    let outcome = match task {
        Task::Train(it) => trainer("train", it.args, Backend::Auto),
        Task::Generate(it) => trainer("generate", it.args, Backend::Auto),
        Task::Eval(it) => trainer("eval", it.args, Backend::Auto),
        // These compute nothing on a GPU, so they need not wait for its build.
        Task::Merge(it) => trainer("merge", it.args, Backend::Cpu),
        Task::Unmerge(it) => trainer("unmerge", it.args, Backend::Cpu),
        Task::InspectData(it) => trainer("inspect-data", it.args, Backend::Cpu),
        Task::Combine(it) => trainer("combine", it.args, Backend::Cpu),
        Task::Plan(it) => trainer("plan", it.args.clone(), plan_backend(&it.args)),
        Task::GpuReport(it) => trainer("gpu-report", it.args, Backend::Auto),
        Task::GpuBundle(args) => bundle::run(&args),
        Task::GpuOffline(it) => gpu_offline::command(&it.args),
        Task::ExportGguf(it) => trainer("export-gguf", it.args, Backend::Cpu),
        // The embedded model has to come out the same on every machine.
        Task::MakeAssets(it) => job::run(Program::MakeAssets, it.args, Backend::Cpu),
        Task::Parity(it) => job::parity(it.args),
        Task::Bench(it) => job::run(Program::Bench, it.args, Backend::Auto),
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
