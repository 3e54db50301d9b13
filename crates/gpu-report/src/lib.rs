//! `trainer gpu-report`: a report on a GPU for users to keep or to send: whether its results are
//! right, and its speed.
//!
//! ```text
//! section.rs                        the sections, in order of importance
//! child.rs, worker.rs, finding.rs   a process per section; a line of JSON per finding
//! making.rs, clock.rs, lines.rs     runs the sections within the time limit and shows their findings
//! start_up.rs, operations.rs, small_model.rs, compare.rs   comparisons with the CPU
//! speed.rs, timing.rs               products, attention, element-wise chains, relative to the device's peak
//! training.rs, trainee.rs, shapes.rs, peft_bench.rs   steps of models with random weights, here and in PEFT
//! counting.rs                       kernel launches, uploads, reads, bytes
//! report.rs, markdown.rs            report.json, report.md
//! ```
//!
//! The report's own process never uses the device: a driver that crashes, hangs or loses its device
//! costs one section. The files are written after every finding.

mod child;
mod clock;
mod compare;
mod counting;
mod error;
mod finding;
mod lines;
mod making;
mod markdown;
mod operations;
mod peft_bench;
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

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::ReportError;
pub use finding::{Check, Finding};
pub use report::Report;
pub use section::Section;
pub use worker::{WorkerOptions, serve};

use clock::Clock;
use device::Backend;
use finding::LeftOut;
use making::{LEAST, Making};
use terminal::Screen;

/// Options of a report.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportOptions {
    /// The backend; `auto` must find a GPU.
    pub backend: Backend,
    /// Small sizes, for a quick check; speeds are then not meaningful.
    pub quick: bool,
    /// The time limit.
    pub limit: Duration,
    /// The folder for the files.
    pub output: PathBuf,
    /// A Python with torch, transformers and peft.
    pub peft: Option<PathBuf>,
    /// `peft_bench.py`.
    pub peft_script: PathBuf,
    /// PyTorch's name for the device.
    pub peft_device: Option<String>,
    /// Only these sections; empty for all.
    pub only: Vec<Section>,
}

/// After this many sections in a row without a device the rest is skipped.
const GIVE_UP_AFTER: usize = 2;

/// A section's share of a short limit is at least this.
const SHORTEST: Duration = Duration::from_secs(30);

/// Makes the report, section by section.
///
/// # Errors
///
/// If there is no GPU, or the files cannot be written. Failures of the device are part of the
/// report.
pub fn run(options: &ReportOptions, screen: &Screen) -> Result<Report, ReportError> {
    let clock = Clock::new(options.limit);
    let logs = options.output.join("logs");
    std::fs::create_dir_all(&logs).map_err(|source| ReportError::MakeFolder {
        path: logs.clone(),
        source,
    })?;
    let backend = match options.backend {
        Backend::Auto => found(options.quick, &logs.join("device.log"))?,
        named => named,
    };
    let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let mut making = Making {
        options,
        backend,
        logs: &logs,
        clock,
        report: Report::new(command, options.quick),
        screen,
    };
    let mut without_device = 0;
    for section in making.sections() {
        let share = options.limit.mul_f64(section.share()).max(SHORTEST);
        let limit = share.min(making.clock.remaining());
        if limit < LEAST || without_device >= GIVE_UP_AFTER {
            let why = if limit < LEAST {
                "no time left"
            } else {
                "the device was lost, or did not start, twice in a row"
            };
            making.take_in(Finding::LeftOut(LeftOut {
                what: section.to_string(),
                why: why.into(),
            }))?;
            continue;
        }
        if making.section(section, limit)? {
            without_device = 0
        } else {
            without_device += 1
        }
        if let (Some(python), Some(shape)) = (&options.peft, section.trains()) {
            making.peft(python, shape)?;
        }
    }
    making.end()
}

/// The backend of the first GPU that starts, each tried in a process of its own; a software driver
/// is enough for a quick report only.
///
/// # Errors
///
/// If there is no GPU, with the findings for each backend.
fn found(quick: bool, log: &Path) -> Result<Backend, ReportError> {
    let candidates = [
        Backend::Cuda,
        Backend::Metal,
        Backend::Vulkan,
        Backend::Wgpu,
    ];
    let mut passed_over = Vec::new();
    for backend in candidates
        .into_iter()
        .filter(|&it| device::is_compiled_in(it))
    {
        let options = WorkerOptions {
            section: Section::Device,
            backend,
            quick,
            limit: Duration::from_secs(60),
        };
        let mut answer = format!("{backend} does not respond");
        let mut is_found = false;
        child::run(&options, log, &mut |finding| match finding {
            Finding::Device(device) if device.is_software && !quick => {
                answer = format!("{} is not a GPU", device.name);
            }
            Finding::Device(_) => is_found = true,
            Finding::Failed(failed) => answer = failed.message,
            _ => {}
        })?;
        if is_found {
            return Ok(backend);
        } else {
            passed_over.push(answer)
        }
    }
    let why = if passed_over.is_empty() {
        "this build has no GPU backend".into()
    } else {
        passed_over.join("; ")
    };
    Err(ReportError::NoGpu(why))
}
