//! The command line: raw arguments to calls into the library, errors to sentences and exit codes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use llama_burn::LlamaConfig;

use gpu_report::{self, ReportOptions, Section, WorkerOptions};

use device::{Backend, KernelArgs};
use export::combine::{self, CombineArgs};
use export::gguf::{self, ExportGgufArgs};
use export::merge::{self, MergeArgs, UnmergeArgs};
use hub::{self, Need};
use inference::eval::{self, EvalArgs};
use inference::generate::{self, GenerateArgs};
use inference::logits::{self, LogitsArgs};
use inference::tokenize::{self, TokenizeArgs};
use lora_train::checkpoint;
use lora_train::checkpoint::{Resume, run_folder};
use lora_train::interrupt::{Interrupt, RESUMABLE};
use lora_train::output::Existing;
use lora_train::plan;
use lora_train::plan::{Plan, PlanOptions, Workload};
use lora_train::{Ended, Request, RunFiles, RunScreen, TrainError};
use run_config::{self, Config};
use terminal::Screen;

/// Fine-tunes Llama-family models with LoRA over 8-bit weights.
#[derive(Parser)]
#[command(name = "trainer", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train an adapter
    Train(Train),
    /// Continue prompts, with or without an adapter
    Generate(GenerateArgs),
    /// Combine several adapters into one, each with a weight
    Combine(CombineArgs),
    /// Write the logits of given tokens, to compare with another implementation
    Logits(LogitsArgs),
    /// Write a model or an adapter in llama.cpp's GGUF format
    ExportGguf(ExportGgufArgs),
    /// Evaluate the base model and adapters on a task, side by side
    Eval(EvalArgs),
    /// Merge an adapter into a model and write a complete Hugging Face folder
    Merge(MergeArgs),
    /// Subtract an adapter from a merged model
    Unmerge(UnmergeArgs),
    /// Print examples with their tokens and the loss mask
    InspectData(InspectData),
    /// Predict parameters and peak memory of a run, without the model's weights
    Plan(PlanArgs),
    /// Check a GPU's results and measure its speed, in minutes: a report to keep or to send
    GpuReport(GpuReport),
    /// One of the report's processes
    #[command(hide = true)]
    GpuReportWorker(GpuReportWorker),
    /// Write the token ids of given texts, to compare with another implementation
    #[command(hide = true)]
    Tokenize(TokenizeArgs),
}

impl Command {
    /// The kernel switches of commands that compute with a model.
    fn kernels(&self) -> KernelArgs {
        match self {
            Self::Train(args) => args.kernels.clone(),
            Self::Generate(args) => args.kernels(),
            Self::Eval(args) => args.kernels(),
            Self::Logits(args) => args.model.kernels.clone(),
            _ => KernelArgs::default(),
        }
    }
}

#[derive(Args)]
struct ConfigArgs {
    /// A configuration in TOML or JSON, FinLoRA's JSON with several runs, or axolotl's YAML [default: the embedded one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The run to use, if the file holds several named runs
    #[arg(long, value_name = "NAME")]
    run: Option<String>,
    /// Override a key of the configuration; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl ConfigArgs {
    fn load(&self) -> anyhow::Result<Config> {
        let config = Config::load(self.config.as_deref(), self.run.as_deref(), &self.set)?;
        Ok(config)
    }
}

const TRAIN_ENDS: &str = "\
Ctrl-C finishes the step, writes a checkpoint and exits with code 75; a second Ctrl-C exits at once.";

#[derive(Args)]
#[command(after_help = TRAIN_ENDS)]
struct Train {
    #[command(flatten)]
    config: ConfigArgs,
    #[arg(long, default_value = "auto", help = Backend::help())]
    backend: Backend,
    /// The folder for the adapter, the metrics and the resolved configuration
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Replace a run that is in the output folder
    #[arg(long)]
    overwrite: bool,
    /// Resume a run: auto (the newest checkpoint in the output folder, or a new run without one), the folder
    /// of a run, or one of its checkpoints
    #[arg(long, value_name = "auto|DIR", num_args = 0..=1, default_missing_value = "auto",
          conflicts_with = "overwrite")]
    resume: Option<PathBuf>,
    /// Resume although the configuration, the data or the model has changed
    #[arg(long, requires = "resume")]
    force_resume: bool,
    #[command(flatten)]
    kernels: KernelArgs,
}

#[derive(Args)]
struct InspectData {
    #[command(flatten)]
    config: ConfigArgs,
    /// The number of examples
    #[arg(long, value_name = "N", default_value_t = 3)]
    rows: usize,
    /// Print token ids and the ranges in the loss as JSON lines
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Predict GPU memory instead of CPU memory, count the kernel launches, bytes and operations of a step, and print the
    /// least time for them on all known cards, or on one: H100 SXM, A100 80GB, RTX 4090, RTX 3060, M3 Max, iGPU
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "")]
    gpu: Option<String>,
    /// With --gpu: the device's peak in TFLOP/s (10¹² operations per second)
    #[arg(long, value_name = "X", requires = "gpu")]
    peak_tflops: Option<f64>,
    /// With --gpu: the device's memory bandwidth in GB/s (10⁹ bytes per second)
    #[arg(long, value_name = "Y", requires = "gpu")]
    peak_gbs: Option<f64>,
    /// With --gpu: the backend to count with; nothing is run, so a software driver is enough
    #[arg(long, default_value = "auto")]
    backend: Backend,
}

#[derive(Args)]
#[command(after_help = "The exit code is 1 if a comparison with the CPU fails.")]
struct GpuReport {
    #[arg(long, default_value = "auto", help = Backend::help_for_gpus())]
    backend: Backend,
    /// Small sizes, for a quick check or for software drivers; speeds are then not meaningful
    #[arg(long)]
    quick: bool,
    /// The time limit in seconds; the report lists what was skipped
    #[arg(long, value_name = "N", default_value_t = 540)]
    seconds: u64,
    /// The folder for report.md, report.json and logs/
    #[arg(long, value_name = "DIR", default_value = "target/gpu-report")]
    output: PathBuf,
    /// A Python with torch, transformers and peft, to measure PEFT in turn with this trainer
    #[arg(long, value_name = "PYTHON", requires = "peft_script")]
    peft: Option<PathBuf>,
    /// The script that this Python runs; crates/gpu-report/src/peft_bench.rs has its arguments and its output
    #[arg(long, value_name = "FILE", requires = "peft")]
    peft_script: Option<PathBuf>,
    /// PyTorch's device: cuda, mps, cpu [default: cuda for CUDA, mps for Metal, else cpu]
    #[arg(long, value_name = "DEVICE")]
    peft_device: Option<String>,
    /// Only these sections: device, operations, model, speed, counts, training:SHAPE, other-types:SHAPE
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<Section>,
}

#[derive(Args)]
struct GpuReportWorker {
    #[arg(long)]
    section: Section,
    #[arg(long)]
    backend: Backend,
    #[arg(long)]
    seconds: u64,
    #[arg(long)]
    quick: bool,
}

impl From<GpuReport> for ReportOptions {
    fn from(args: GpuReport) -> Self {
        Self {
            backend: args.backend,
            quick: args.quick,
            limit: Duration::from_secs(args.seconds),
            output: args.output,
            peft: args.peft,
            peft_script: args.peft_script.unwrap_or_default(),
            peft_device: args.peft_device,
            only: args.only,
        }
    }
}

/// Runs the command line. An error is printed with all its causes, and the code is 1; wrong usage returns 2. A
/// training run that stopped before its end and can be resumed, because of Ctrl-C or a device that failed,
/// returns 75; one that a second Ctrl-C ended at once, 130, or 143 for SIGTERM.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    command_line::run_with_codes(
        |screen| {
            command.kernels().apply()?;
            run(command, &screen)
        },
        exit_code,
    )
}

/// The exit code of an error.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref() {
        Some(TrainError::Fault {
            resumable: true, ..
        }) => ExitCode::from(RESUMABLE),
        Some(TrainError::WrongNumbers(wrong)) if wrong.resumable => ExitCode::from(RESUMABLE),
        _ => ExitCode::FAILURE,
    }
}

fn run(command: Command, screen: &Screen) -> anyhow::Result<ExitCode> {
    match command {
        Command::Train(args) => return train(args, screen),
        Command::InspectData(args) => {
            let config = args.config.load()?;
            let files = RunFiles::find_for(&config, Need::Text)?;
            let model = LlamaConfig::from_file(&files.model)?;
            let rows = files.data(&config, &model, None)?;
            let colour = console::colors_enabled();
            let mut out = std::io::stdout().lock();
            // A reader that closed the pipe (`| head`) is not an error.
            let written = if args.json {
                data::inspect_as_json(&rows, args.rows, &mut out)
            } else {
                data::inspect(&rows, args.rows, &mut out, colour)
            };
            let _ = written.and_then(|()| out.flush());
        }
        Command::Generate(args) => generate::run(&args, screen)?,
        Command::Combine(args) => combine::run(&args, screen)?,
        Command::Logits(args) => logits::run(&args, screen)?,
        Command::ExportGguf(args) => gguf::run(&args, screen)?,
        Command::Eval(args) => eval::run(&args, screen)?,
        Command::Merge(args) => merge::run_merge(args, screen)?,
        Command::Unmerge(args) => merge::run_unmerge(args, screen)?,
        Command::Plan(args) => show_plan(&args)?,
        Command::GpuReport(args) => {
            let report = gpu_report::run(&args.into(), screen)?;
            return Ok(ExitCode::from(u8::from(!report.passed())));
        }
        Command::GpuReportWorker(args) => gpu_report::serve(&WorkerOptions {
            section: args.section,
            backend: args.backend,
            quick: args.quick,
            limit: Duration::from_secs(args.seconds),
        }),
        Command::Tokenize(args) => tokenize::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Trains; the exit code is 0 for a run that is done and [`RESUMABLE`] for one that stopped before.
fn train(args: Train, screen: &Screen) -> anyhow::Result<ExitCode> {
    let auto = args.resume.as_deref() == Some(Path::new("auto"));
    let from = args.resume.filter(|_| !auto);
    // A run to resume has its configuration in its folder.
    let given = args.config.config.is_some() || args.config.run.is_some();
    let mut config = match from.as_deref().filter(|_| !given) {
        Some(from) => {
            let file = checkpoint::config_of(from).with_context(|| {
                format!(
                    "--resume {}: this is neither the output folder of a run nor one of its checkpoints; give runs/NAME or \
                     runs/NAME/checkpoints/step-NNNNNN",
                    from.display()
                )
            })?;
            Config::load(Some(&file), None, &args.config.set)?
        }
        None => args.config.load()?,
    };
    let existing = match (args.overwrite, &args.output_dir) {
        (true, _) => Existing::Replace,
        _ if auto => Existing::Restart,
        (false, Some(_)) => Existing::Refuse,
        (false, None) => Existing::Number,
    };
    match (args.output_dir, from.as_deref()) {
        (Some(folder), _) => config.output_dir = folder,
        (None, Some(from)) => config.output_dir = run_folder(from),
        (None, None) => {}
    }
    let resume = (auto || from.is_some()).then(|| Resume {
        from: from.unwrap_or_else(|| config.output_dir.clone()),
        or_start: auto,
        force: args.force_resume,
    });
    let request = Request {
        config,
        backend: args.backend,
        existing,
        resume,
    };
    let interrupt = Interrupt::of_signals().context("cannot listen for Ctrl-C")?;
    let mut screen = RunScreen::from(screen.clone());
    match lora_train::train(&request, &interrupt, &mut screen) {
        Ok(Ended::Done(_)) => Ok(ExitCode::SUCCESS),
        Ok(Ended::Interrupted(_)) => Ok(ExitCode::from(RESUMABLE)),
        Err(error) => Err(error.into()),
    }
}

/// A configuration's plan, or that of a bare `config.json` of a model under the default settings.
fn show_plan(args: &PlanArgs) -> anyhow::Result<()> {
    let on_gpu = args.gpu.is_some();
    let peaks = plan::on_gpu::peaks(args.gpu.as_deref(), args.peak_tflops, args.peak_gbs);
    let peaks = peaks.map_err(anyhow::Error::msg)?;
    let bare = args.config.config.as_deref();
    let bare = bare.filter(|path| run_config::is_model(path));
    let (config, model) = match bare {
        Some(path) => {
            if let Some(run) = &args.config.run {
                bail!(
                    "{} is a model and holds no runs; leave out --run {run}",
                    path.display()
                );
            }
            let config = Config::load(None, None, &args.config.set)?;
            (config, LlamaConfig::from_file(path)?)
        }
        None => {
            let config = args.config.load()?;
            let folder = match (config.hub_model(), config.model_folder()) {
                (Some(_), _) => hub::model_folder(&config.base_model, Need::Config)?,
                (None, Some(folder)) => folder,
                (None, None) => RunFiles::find_for(&config, Need::Config)?.model,
            };
            let model = LlamaConfig::from_file(&folder)?;
            (config, model)
        }
    };
    let config = lora_train::continued::continued(&config, &model)?;
    let length = config.max_seq_len.min(model.positions());
    let options = PlanOptions {
        lora: config.lora_config(),
        quantization: lora_train::quantization(&config),
        float_bytes: if on_gpu { 2 } else { 4 },
        gradient_checkpointing: config.gradient_checkpointing != run_config::Checkpointing::Off,
        accumulates: config.gradient_accumulation_steps > 1,
        on_gpu,
        workload: Workload::largest(config.batch_size.rows(), length, config.max_batch_tokens),
    };
    let plan = Plan::new(&model, &options)?;
    let mut out = std::io::stdout().lock();
    for line in plan.lines(&model, &options) {
        let _ = writeln!(out, "{line}");
    }
    for line in plan::alternatives(&model, &options)? {
        let _ = writeln!(out, "{line}");
    }
    if let Some(bytes) = config.device_memory {
        let _ = writeln!(out, "{}", plan.against(bytes, on_gpu));
    }
    if on_gpu {
        for line in plan::on_gpu::lines(&model, &options, args.backend, &peaks)? {
            let _ = writeln!(out, "{line}");
        }
    }
    Ok(())
}
