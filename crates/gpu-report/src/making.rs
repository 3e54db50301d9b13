//! Makes a report: runs sections, collects their findings, writes the files.

use std::path::Path;
use std::time::Duration;

use super::ReportOptions;
use super::child::{self, Ended};
use super::clock::Clock;
use super::error::ReportError;
use super::finding::{Failed, Finding, LeftOut};
use super::lines::{last_words, line};
use super::peft_bench::{self, Peft};
use super::report::{Report, SectionRun};
use super::section::Section;
use super::shapes::Shape;
use super::training;
use super::worker::WorkerOptions;
use device::Backend;
use terminal::Screen;

/// Nothing is started with less time than this, because a device has to start first.
pub const LEAST: Duration = Duration::from_secs(8);

/// A report in the making.
pub struct Making<'a> {
    pub options: &'a ReportOptions,
    pub backend: Backend,
    pub logs: &'a Path,
    pub clock: Clock,
    pub report: Report,
    pub screen: &'a Screen,
}

impl Making<'_> {
    pub fn sections(&self) -> Vec<Section> {
        let mut sections = if self.options.only.is_empty() {
            Section::all(self.options.quick)
        } else {
            self.options.only.clone()
        };
        sections.dedup();
        sections
    }

    /// Runs a section; returns false if it found no device or lost it.
    pub fn section(&mut self, section: Section, limit: Duration) -> Result<bool, ReportError> {
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

    /// PEFT on the workloads of a shape, with a dense base: bitsandbytes does not quantize random
    /// weights made on the device.
    pub fn peft(&mut self, python: &Path, shape: Shape) -> Result<(), ReportError> {
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
        let dtype = self.type_of(shape);
        for workload in training::workloads(&config, self.options.quick) {
            let what = format!("PEFT, {}, {} tokens", shape.name(), workload.0);
            if self.clock.remaining() < LEAST {
                let why = "no time left".into();
                self.take_in(Finding::LeftOut(LeftOut { what, why }))?;
                continue;
            }
            let limit = self.options.limit.mul_f64(0.15).min(self.clock.remaining());
            let trained = peft.train(shape, workload, peft_bench::long(&dtype), limit);
            self.take_in(match trained {
                Ok(training) => Finding::Training(training),
                Err(error) => Finding::LeftOut(LeftOut {
                    what,
                    why: error.to_string(),
                }),
            })?;
        }
        Ok(())
    }

    /// The type that PEFT computes in: the one of this trainer's run, or of the run that was
    /// skipped, so that the two can be compared.
    fn type_of(&self, shape: Shape) -> String {
        let mut trained = self.report.training.iter().rev();
        let ours = trained.find(|it| it.program == "ours" && it.shape == shape.name());
        let of_device = || self.report.device.as_ref()?.types.first().cloned();
        let ours = ours.map(|training| training.dtype.clone());
        ours.or_else(of_device)
            .unwrap_or_else(|| match self.backend {
                Backend::Cuda => "bf16".into(),
                _ => "f32".into(),
            })
    }

    /// Adds a finding, shows it, and writes the files.
    pub fn take_in(&mut self, finding: Finding) -> Result<(), ReportError> {
        if let Some(line) = line(&finding) {
            self.screen.line(&format!("  {line}"));
        }
        self.report.add(finding);
        self.report.seconds = self.clock.elapsed().as_secs_f64();
        self.report.write(&self.options.output)?;
        Ok(())
    }

    pub fn end(mut self) -> Result<Report, ReportError> {
        self.report.seconds = self.clock.elapsed().as_secs_f64();
        let written = self.report.write(&self.options.output)?;
        for path in written {
            self.screen.line(&path.display().to_string());
        }
        Ok(self.report)
    }
}
