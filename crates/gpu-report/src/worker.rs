//! A section's process: findings go to standard output, one line of JSON each.

use std::io::{Read, Write};
use std::time::Duration;

use super::clock::Clock;
use super::error::ReportError;
use super::finding::{Failed, Finding};
use super::section::Section;
use super::shapes::Shape;
use super::{counting, operations, small_model, speed, start_up, training};
use device::{Backend, Selected};
use lora_train::guard::{FaultKind, Guard};

/// Options of a section's process.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerOptions {
    /// The section.
    pub section: Section,
    /// The backend.
    pub backend: Backend,
    /// Whether to use small sizes.
    pub quick: bool,
    /// The time limit.
    pub limit: Duration,
}

/// Runs a section. A failure is a finding, not an error; the last finding is [`Finding::Done`].
pub fn serve(options: &WorkerOptions) {
    end_with_the_report();
    let clock = Clock::new(options.limit);
    let guard = Guard::install();
    let failed = |message: String, lost| {
        tell(&Finding::Failed(Failed {
            what: options.section.to_string(),
            message,
            lost,
        }));
    };
    match device::select(options.backend) {
        Err(error) => failed(error.to_string(), false),
        Ok(selected) => match guard.run(|| section(options, &selected, clock, &guard)) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed(error.to_string(), false),
            Err(fault) => failed(fault.to_string(), fault.kind == FaultKind::Lost),
        },
    }
    tell(&Finding::Done);
}

fn section(
    options: &WorkerOptions,
    selected: &Selected,
    clock: Clock,
    guard: &Guard,
) -> Result<(), ReportError> {
    let types = device::types(selected);
    let auto = &types[..types.len().min(1)];
    let (device, quick) = (&selected.device, options.quick);
    let tell = &mut |finding: Finding| tell(&finding);
    match options.section {
        Section::Device => {
            tell(Finding::Device(Box::new(device::hardware(selected))));
            let shape = if quick {
                Shape::Embedded
            } else {
                Shape::Llama1B
            };
            start_up::run(selected, shape, tell)
        }
        Section::Operations => operations::run(&types, device, tell),
        Section::Model => small_model::run(&types, device, quick, tell),
        Section::Training(shape) => {
            training::run(shape, auto, selected, (clock, quick), guard, tell)
        }
        Section::OtherTypes(shape) => {
            let others = &types[auto.len()..];
            training::run(shape, others, selected, (clock, quick), guard, tell)
        }
        Section::Speed => speed::run(selected, clock, quick, tell),
        Section::Counts => counting::run(selected, guard, tell),
    }
}

/// An error in writing is ignored: once standard output is closed, nothing reads the findings.
fn tell(finding: &Finding) {
    if let Ok(line) = serde_json::to_string(finding) {
        let mut output = std::io::stdout().lock();
        let _ = writeln!(output, "{line}").and_then(|()| output.flush());
    }
}

/// The report holds this process's standard input open. When the report ends for any reason, this
/// process ends too.
fn end_with_the_report() {
    std::thread::spawn(|| {
        let mut rest = Vec::new();
        let _ = std::io::stdin().lock().read_to_end(&mut rest);
        std::process::exit(1);
    });
}
