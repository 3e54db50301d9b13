//! `trainer gpu-report`: what anybody with a GPU runs, and sends us: whether it computes right, and how fast.
//!
//! ```text
//! section.rs                        the parts, in order of importance
//! child.rs, worker.rs, finding.rs   each in a process of its own; a line of JSON for each thing found
//! making.rs, clock.rs, lines.rs     runs them within the time there is, and shows what they find
//! start_up.rs, operations.rs, small_model.rs, compare.rs   against the CPU
//! speed.rs, timing.rs               products, attention, chains, beside the device's peak
//! training.rs, trainee.rs, shapes.rs, peft_bench.rs   steps of models with random weights, ours and PEFT's
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

use anyhow::Context;

pub use finding::{Check, Finding};
pub use report::Report;
pub use section::Section;
pub use worker::{WorkerOptions, serve};

use clock::Clock;
use device::Backend;
use finding::LeftOut;
use making::{LEAST, Making};
use terminal::Screen;

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

/// A section's share of a short limit is not less than this.
const SHORTEST: Duration = Duration::from_secs(30);

/// Makes the report, section by section.
///
/// # Errors
///
/// If there is no GPU, or the files cannot be written. What goes wrong on the device is in the report.
pub fn run(options: &ReportOptions, screen: &Screen) -> anyhow::Result<Report> {
    let clock = Clock::new(options.limit);
    let logs = options.output.join("logs");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
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

/// The backend of the first GPU that answers, each asked in a process of its own; a software driver will do for a
/// quick report only.
///
/// # Errors
///
/// If there is none, with what was found in its place.
fn found(quick: bool, log: &Path) -> anyhow::Result<Backend> {
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
        let mut answer = format!("{backend} does not answer");
        let mut is_found = false;
        child::run(&options, log, &mut |finding| match finding {
            Finding::Device(device) if device.is_software && !quick => {
                answer = format!("{} is no GPU", device.name);
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
    anyhow::bail!(
        "no GPU was found: {why}. A software driver is reported on with --backend wgpu --quick"
    )
}
