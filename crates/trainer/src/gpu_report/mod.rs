//! `trainer gpu-report`: what anybody with a GPU runs, and sends us: whether it computes right, and how fast.
//!
//! ```text
//! section.rs                        the parts, in order of importance
//! child.rs, worker.rs, finding.rs   each in a process of its own; a line of JSON for each thing found
//! clock.rs                          how much time is left
//! start_up.rs, operations.rs, small_model.rs, compare.rs   against the CPU
//! speed.rs, timing.rs               products, attention, chains, beside the device's peak
//! training.rs, trainee.rs, shapes.rs, peft.rs   steps of models with random weights, ours and PEFT's
//! counting.rs                       launches, uploads, reads, bytes
//! report.rs, markdown.rs            report.json, report.md
//! ```
//!
//! The report itself never touches the device: a driver that crashes, hangs or loses its device takes one section with
//! it. The files are written after every finding.

mod child;
mod clock;
mod compare;
mod counting;
mod finding;
mod markdown;
mod operations;
mod peft;
mod report;
mod section;
mod shapes;
mod small_model;
mod speed;
mod start_up;
mod timing;
mod trainee;
mod training;
mod worker;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

pub use finding::{Check, Finding};
pub use report::Report;
pub use section::Section;
pub use worker::{WorkerOptions, serve};

use crate::device::{self, Backend};
use crate::human;
use crate::screen::Screen;
use child::Ended;
use clock::Clock;
use finding::{Failed, LeftOut, Training};
use peft::Peft;
use report::SectionRun;
use shapes::Shape;

/// What a report is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportOptions {
    /// On which backend; `auto` has to find a GPU.
    pub backend: Backend,
    /// Small sizes: whether it works, not how fast.
    pub quick: bool,
    /// It ends by then.
    pub limit: Duration,
    /// Where the files go.
    pub output: PathBuf,
    /// A Python with torch, transformers and peft.
    pub peft: Option<PathBuf>,
    /// `peft_bench.py`.
    pub peft_script: PathBuf,
    /// PyTorch's word for the device.
    pub peft_device: Option<String>,
    /// Only these sections; all where there is none.
    pub only: Vec<Section>,
}

/// Sections in a row that may find no device before the rest is given up.
const GIVE_UP_AFTER: usize = 2;

/// Nothing is begun with less time than this: a device has to start first.
const LEAST: Duration = Duration::from_secs(8);

/// Makes the report, section by section.
///
/// # Errors
///
/// If there is no GPU, or the files cannot be written. What goes wrong on the device is in the report.
pub fn run(options: &ReportOptions, screen: &Screen) -> anyhow::Result<Report> {
    let backend = gpu(options.backend)?;
    let logs = options.output.join("logs");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    // What cannot be written is found now and not after minutes.
    File::create(logs.join("device.log"))
        .with_context(|| format!("cannot write to {}", logs.display()))?;
    let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let mut making = Making {
        options,
        backend,
        logs: &logs,
        clock: Clock::new(options.limit),
        report: Report::new(command, options.quick),
        screen,
    };
    let mut without_device = 0;
    for section in making.sections() {
        let limit = options
            .limit
            .mul_f64(section.share())
            .min(making.clock.remaining());
        if limit < LEAST || without_device >= GIVE_UP_AFTER {
            let why = match limit < LEAST {
                true => "no time left",
                false => "the device was lost, or did not start, twice in a row",
            };
            making.take_in(Finding::LeftOut(LeftOut {
                what: section.to_string(),
                why: why.into(),
            }))?;
            continue;
        }
        match making.section(section, limit)? {
            true => without_device = 0,
            false => without_device += 1,
        }
        if let (Some(python), Some(shape)) = (&options.peft, section.trains()) {
            making.peft(python, shape)?;
        }
    }
    making.end()
}

/// The backend to report on.
fn gpu(asked: Backend) -> anyhow::Result<Backend> {
    if asked != Backend::Auto {
        return Ok(asked);
    }
    let selected = device::select(Backend::Auto)?;
    anyhow::ensure!(
        selected.backend != Backend::Cpu,
        "no GPU was found: {}. --backend names one; a software driver is reported on with --backend wgpu --quick",
        selected.reason
    );
    Ok(selected.backend)
}

/// A report that is being made.
struct Making<'a> {
    options: &'a ReportOptions,
    backend: Backend,
    logs: &'a Path,
    clock: Clock,
    report: Report,
    screen: &'a Screen,
}

impl Making<'_> {
    fn sections(&self) -> Vec<Section> {
        let mut sections = match self.options.only.is_empty() {
            true => Section::all(self.options.quick),
            false => self.options.only.clone(),
        };
        sections.dedup();
        sections
    }

    /// Runs a section; false where it found no device or lost it.
    fn section(&mut self, section: Section, limit: Duration) -> anyhow::Result<bool> {
        self.screen.line(&format!("{section}"));
        let clock = Clock::new(limit);
        let log = self.logs.join(format!("{section}.log").replace(':', "-"));
        let options = WorkerOptions {
            section,
            backend: self.backend,
            quick: self.options.quick,
            limit,
        };
        let (mut found, mut lost) = (0, false);
        let mut wrong = None;
        let ended = child::run(&options, &log, &mut |finding| {
            match &finding {
                Finding::Failed(failed) => lost |= failed.lost,
                _ => found += 1,
            }
            let taken_in = self.take_in(finding);
            wrong = wrong.take().or(taken_in.err());
        })?;
        if let Some(error) = wrong {
            return Err(error);
        }
        let words = match &ended {
            Ended::Done => "done".to_owned(),
            Ended::Stopped => format!("stopped at its limit of {:.0} s", limit.as_secs_f64()),
            Ended::Died(how) => format!("its process died: {how}"),
        };
        match &ended {
            Ended::Done => {}
            Ended::Stopped => self.take_in(Finding::LeftOut(LeftOut {
                what: format!("the rest of {section}"),
                why: words.clone(),
            }))?,
            Ended::Died(_) => self.take_in(Finding::Failed(Failed {
                what: section.to_string(),
                message: format!("{words}; {}", last_words(&log)),
                lost: false,
            }))?,
        }
        self.report.sections.push(SectionRun {
            section: section.to_string(),
            seconds: clock.elapsed().as_secs_f64(),
            ended: words,
        });
        Ok(found > 0 && !lost)
    }

    /// PEFT on the workloads of a shape, each with a dense base and, on CUDA, with an 8-bit one.
    fn peft(&mut self, python: &Path, shape: Shape) -> anyhow::Result<()> {
        let ours: Vec<Training> = self.report.training.iter().rev().cloned().collect();
        let config = shape.config()?;
        let device = match (&self.options.peft_device, self.backend) {
            (Some(device), _) => device.as_str(),
            (None, Backend::Cuda) => "cuda",
            (None, Backend::Metal) => "mps",
            (None, _) => "cpu",
        };
        let peft = Peft {
            python,
            script: &self.options.peft_script,
            device,
            folder: self.logs,
        };
        for workload in training::workloads(&config, self.options.quick) {
            // The type that ours computed in, so that the two can be compared.
            let of_shape = |it: &&Training| it.program == "ours" && it.shape == shape.name();
            let dtype = ours
                .iter()
                .find(of_shape)
                .map_or("f32", |it| it.dtype.as_str());
            for bits in if device == "cuda" {
                &[16u8, 8][..]
            } else {
                &[16]
            } {
                let what = format!("PEFT, {}, {} tokens, {bits} bits", shape.name(), workload.0);
                if self.clock.remaining() < LEAST {
                    let why = "no time left".into();
                    self.take_in(Finding::LeftOut(LeftOut { what, why }))?;
                    continue;
                }
                let limit = self.options.limit.mul_f64(0.15).min(self.clock.remaining());
                let trained = peft.train(shape, workload, peft::long(dtype), *bits, limit);
                self.take_in(match trained {
                    Ok(training) => Finding::Training(training),
                    Err(error) => Finding::LeftOut(LeftOut {
                        what,
                        why: format!("{error:#}"),
                    }),
                })?;
            }
        }
        Ok(())
    }

    /// Takes in a finding, shows it, and writes the files.
    fn take_in(&mut self, finding: Finding) -> anyhow::Result<()> {
        if let Some(line) = line(&finding) {
            self.screen.line(&format!("  {line}"));
        }
        self.report.add(finding);
        self.report.seconds = self.clock.elapsed().as_secs_f64();
        self.report.write(&self.options.output)?;
        Ok(())
    }

    fn end(mut self) -> anyhow::Result<Report> {
        self.report.seconds = self.clock.elapsed().as_secs_f64();
        let written = self.report.write(&self.options.output)?;
        for path in written {
            self.screen.line(&path.display().to_string());
        }
        Ok(self.report)
    }
}

/// A finding for the screen.
fn line(finding: &Finding) -> Option<String> {
    Some(match finding {
        Finding::Device(device) => format!("{} (driver: {})", device.name, device.driver),
        Finding::Check(check) => {
            let difference = check
                .difference
                .map_or("none".into(), |it| format!("{it:.1e}"));
            let verdict = if check.ok { "ok  " } else { "FAIL" };
            format!(
                "{verdict} {}: {difference} of {:.1e}",
                check.name, check.tolerance
            )
        }
        Finding::Rate(rate) => {
            let tflops = rate
                .tflops
                .map(|it| format!("{} TFLOP/s", human::number(it)));
            let speed = tflops.or(rate.gbs.map(|it| format!("{} GB/s", human::number(it))));
            format!(
                "{}, {}, {}: {}",
                rate.what,
                rate.dtype,
                rate.size,
                speed.unwrap_or_default()
            )
        }
        Finding::Counts(step) => format!(
            "{} launches a layer, {} uploads and {} reads a step, {:.1} GB a step",
            step.launches_per_layer,
            step.uploads_per_step,
            step.reads_per_step,
            step.bytes_per_step as f64 / 1e9
        ),
        Finding::Training(it) => format!(
            "{}, {}, {}, {} tokens an example: {} tokens/s, {}",
            it.program,
            it.shape,
            it.dtype,
            it.tokens_per_example,
            human::rate(it.tokens_per_s),
            it.peak_mib
                .map_or("memory not known".into(), |mib| format!("{mib:.0} MiB"))
        ),
        Finding::LeftOut(left_out) => format!("left out: {}: {}", left_out.what, left_out.why),
        Finding::Failed(failed) => format!("FAILED: {}: {}", failed.what, failed.message),
        Finding::Done => return None,
    })
}

/// The end of what a section said on standard error.
fn last_words(log: &Path) -> String {
    let said = std::fs::read_to_string(log).unwrap_or_default();
    let last = said.lines().rfind(|line| !line.trim().is_empty());
    match last {
        Some(line) => llama_burn::limited::clipped(line.trim(), 300).into_owned(),
        None => format!("it said nothing ({})", log.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_one_clear_line() {
        match gpu(Backend::Auto) {
            Ok(backend) => assert_ne!(backend, Backend::Cpu),
            Err(error) => {
                let message = error.to_string();
                assert!(message.contains("--backend wgpu --quick"), "{message}");
            }
        }
        assert_eq!(gpu(Backend::Cpu).unwrap(), Backend::Cpu);
    }
}
