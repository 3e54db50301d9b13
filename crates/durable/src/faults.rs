//! Fault injection, for tests that a run survives faults. Nothing here acts unless the environment
//! variable `LORA_TRAINER_FAULT` is set.
//!
//! Its value is a comma-separated list of:
//!
//! | fault | effect |
//! | --- | --- |
//! | `delay=MS` | each write, sync, rename and removal is delayed by up to MS milliseconds |
//! | `trace=FILE` | each of these operations is appended to FILE, with its path, when it is done |
//! | `full=STEP..STEP` | the disk is full during these optimizer steps (the second not included) |
//! | `nan=STEP..STEP` | the losses of these steps are NaN |
//! | `oom=STEP>ROWS` | from this step on, the device runs out of memory on a micro-batch of more than ROWS sequences |
//! | `lost=STEP` | the device is lost in this step |
//! | `thread_panic=STEP` | another thread panics in this step, and the calling thread continues |
//! | `wrong_kernel=OPERATION[:STEP]` | a GPU's results of an operation (one of [`Kernels::operations`]) are 10 % too large, from the start or from this step on |

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The environment variable.
pub const VARIABLE: &str = "LORA_TRAINER_FAULT";

/// The variable holds something that is not a fault.
#[derive(Debug, thiserror::Error)]
#[error(
    "{VARIABLE}: {part:?} is not one of delay=MS, trace=FILE, full=STEP..STEP, nan=STEP..STEP, \
     oom=STEP>ROWS, lost=STEP, thread_panic=STEP, wrong_kernel=OPERATION[:STEP] with one of {}; unset the variable, \
     it is for tests",
    operations.join(", ")
)]
pub struct FaultError {
    /// The part of the list that is not a fault.
    part: String,
    /// The operations that can be made wrong.
    operations: &'static [&'static str],
}

/// Makes the results of a GPU's kernels wrong on purpose.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    /// The operations that can be made wrong.
    pub operations: &'static [&'static str],
    /// Makes this operation wrong from now on, or none.
    pub spoil: fn(Option<&str>),
}

/// An operation on a file or folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Writes all bytes of a new file.
    Write,
    /// Waits until a file's content is on the disk.
    Sync,
    /// Renames, atomically.
    Rename,
    /// Waits until a folder's entries are on the disk.
    SyncFolder,
    /// Removes a file or folder.
    Remove,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Rename => "rename",
            Self::SyncFolder => "sync-folder",
            Self::Remove => "remove",
        })
    }
}

#[derive(Debug, Default)]
struct Faults {
    delay_ms: u64,
    trace: Option<Mutex<File>>,
    full: Range<usize>,
    nan: Range<usize>,
    oom: Option<(usize, usize)>,
    lost: Option<usize>,
    thread_panic: Option<usize>,
    wrong_kernel: Option<(String, usize)>,
}

static FAULTS: OnceLock<(Faults, Kernels)> = OnceLock::new();
/// The current optimizer step.
static STEP: AtomicUsize = AtomicUsize::new(0);

/// Reads the variable. Without this call no fault is injected.
///
/// # Errors
///
/// [`FaultError`] if its value is not a list of faults.
pub fn init(kernels: Kernels) -> Result<(), FaultError> {
    let Some(text) = std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) else {
        return Ok(());
    };
    let faults = parse(&text.to_string_lossy(), kernels.operations)?;
    log::warn!("{VARIABLE} is set: this run injects faults");
    // A second run in the same process has the same environment.
    let _ = FAULTS.set((faults, kernels));
    at_step(0);
    Ok(())
}

fn parse(text: &str, operations: &'static [&'static str]) -> Result<Faults, FaultError> {
    let mut faults = Faults::default();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let understood = part
            .split_once('=')
            .and_then(|(name, value)| set(&mut faults, operations, name, value));
        if understood.is_none() {
            return Err(FaultError {
                part: part.into(),
                operations,
            });
        }
    }
    Ok(faults)
}

fn set(faults: &mut Faults, operations: &[&str], name: &str, value: &str) -> Option<()> {
    let steps = |text: &str| {
        let (first, last) = text.split_once("..")?;
        Some(first.parse().ok()?..last.parse().ok()?)
    };
    match name {
        "delay" => faults.delay_ms = value.parse().ok()?,
        "trace" => {
            let file = OpenOptions::new().create(true).append(true).open(value);
            faults.trace = Some(Mutex::new(file.ok()?));
        }
        "full" => faults.full = steps(value)?,
        "nan" => faults.nan = steps(value)?,
        "oom" => {
            let (step, rows) = value.split_once('>')?;
            faults.oom = Some((step.parse().ok()?, rows.parse().ok()?));
        }
        "lost" => faults.lost = Some(value.parse().ok()?),
        "thread_panic" => faults.thread_panic = Some(value.parse().ok()?),
        "wrong_kernel" => {
            let (operation, step) = value.split_once(':').unwrap_or((value, "0"));
            operations.iter().find(|known| **known == operation)?;
            faults.wrong_kernel = Some((operation.into(), step.parse().ok()?));
        }
        _ => return None,
    }
    Some(())
}

fn faults() -> Option<&'static Faults> {
    FAULTS.get().map(|(faults, _)| faults)
}

/// Sets the current optimizer step, counted from 1.
pub fn at_step(step: usize) {
    STEP.store(step, Ordering::Relaxed);
    let Some((faults, kernels)) = FAULTS.get() else {
        return;
    };
    if let Some((operation, first)) = &faults.wrong_kernel {
        (kernels.spoil)((step >= *first).then_some(operation.as_str()));
    }
}

/// Call before an operation: waits if `delay` is set.
pub fn before(_operation: Operation) {
    let Some(faults) = faults().filter(|faults| faults.delay_ms > 0) else {
        return;
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let random = u64::from(now.map_or(0, |now| now.subsec_micros()));
    std::thread::sleep(Duration::from_millis(random % (faults.delay_ms + 1)));
}

/// Call after an operation: records it if `trace` is set.
pub fn after(operation: Operation, path: &Path) {
    if let Some(trace) = faults().and_then(|faults| faults.trace.as_ref()) {
        let mut trace = trace.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(trace, "{operation} {}", path.display());
    }
}

/// Fails while `full` is set for the current step.
///
/// # Errors
///
/// [`io::ErrorKind::StorageFull`].
pub fn space() -> io::Result<()> {
    let step = STEP.load(Ordering::Relaxed);
    if faults().is_some_and(|faults| faults.full.contains(&step)) {
        Err(io::ErrorKind::StorageFull.into())
    } else {
        Ok(())
    }
}

/// Returns the loss of a micro-batch, or NaN if `nan` is set for the current step.
pub fn loss(loss: f64) -> f64 {
    let step = STEP.load(Ordering::Relaxed);
    if faults().is_some_and(|faults| faults.nan.contains(&step)) {
        f64::NAN
    } else {
        loss
    }
}

/// Fails as a device does: with a panic and the message of one of CubeCL's errors. `rows` is the
/// number of sequences in the micro-batch.
///
/// # Panics
///
/// If `oom` or `lost` is set for the current step.
pub fn device(rows: usize) {
    let Some(faults) = faults() else {
        return;
    };
    let step = STEP.load(Ordering::Relaxed);
    if faults.lost == Some(step) {
        panic!("The device was poisoned: the wgpu device was lost (by {VARIABLE})");
    }
    if faults.thread_panic == Some(step) {
        let thread = std::thread::spawn(|| panic!("a task of the device failed (by {VARIABLE})"));
        // Only the panic matters, not its result.
        let _ = thread.join();
    }
    if faults
        .oom
        .is_some_and(|(first, most)| step >= first && rows > most)
    {
        panic!("out of device memory allocating 1073741824 bytes (by {VARIABLE})");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPERATIONS: &[&str] = &["rope", "attention"];

    #[test]
    fn faults_are_read_and_a_slip_is_named() {
        let faults = parse(
            "delay=20,full=3..5,nan=2..3,oom=4>2,lost=9,thread_panic=8,wrong_kernel=rope:6",
            OPERATIONS,
        )
        .unwrap();
        assert_eq!((faults.delay_ms, faults.lost), (20, Some(9)));
        assert_eq!(faults.thread_panic, Some(8));
        assert_eq!(faults.wrong_kernel, Some(("rope".into(), 6)));
        assert_eq!((faults.full, faults.nan), (3..5, 2..3));
        assert_eq!(faults.oom, Some((4, 2)));
        for wrong in [
            "dealy=20",
            "full=3",
            "oom=4",
            "lost",
            "nan=a..b",
            "wrong_kernel=softmax",
        ] {
            let error = parse(wrong, OPERATIONS).unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
        assert!(parse("", OPERATIONS).unwrap().trace.is_none());
    }
}
