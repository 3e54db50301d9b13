//! Failures of a device. Burn reports them as panics, which end here and become errors.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Arc, Mutex, PoisonError};

/// What went wrong on the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFault {
    /// What it means for the run.
    pub kind: FaultKind,
    /// The device's own words, in one line.
    pub message: String,
}

/// What a failure means for the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The device's memory was too small. It works on.
    OutOfMemory,
    /// The device is gone: reset by its driver, unplugged, poisoned by a kernel.
    Lost,
    /// Something else, perhaps an error in this program.
    Other,
}

impl fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            FaultKind::OutOfMemory => "the device's memory is too small",
            FaultKind::Lost => "the device was lost",
            FaultKind::Other => "the computation failed",
        };
        write!(f, "{what}: {}", self.message)
    }
}

impl std::error::Error for DeviceFault {}

impl DeviceFault {
    /// A fault with these words.
    pub fn new(message: &str) -> Self {
        // Errors come with their backtraces, which say nothing to a user.
        let message = message.split("Backtrace").next().unwrap_or(message);
        Self {
            kind: kind(message),
            message: in_one_line(message),
        }
    }
}

/// The words by which CubeCL's and the drivers' errors are told apart (cubecl-runtime's `IoError`,
/// `LaunchError` and `DevicePoison`, CUDA's result codes).
fn kind(message: &str) -> FaultKind {
    let message = message.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    let memory = [
        "out of memory",
        "out-of-memory",
        "out of device memory",
        "outofmemory",
        "out_of_memory",
        "can't allocate",
        "not enough memory",
    ];
    let lost = ["lost", "poisoned", "illegal_address", "illegal address"];
    match () {
        () if has(&lost) => FaultKind::Lost,
        () if has(&memory) => FaultKind::OutOfMemory,
        () => FaultKind::Other,
    }
}

fn in_one_line(message: &str) -> String {
    const CHARACTERS: usize = 300;
    let words: Vec<&str> = message.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// As long as it lives, panics are kept instead of reported; [`run`](Self::run) gives them back.
///
/// Burn's backends work on threads of their own: the caller's panic is then only "the channel is closed",
/// and the first panic seen is the one that says what went wrong.
pub struct Guard {
    seen: Arc<Mutex<Vec<String>>>,
    reporting: RefCell<Option<Box<Hook>>>,
}

type Hook = dyn Fn(&PanicHookInfo<'_>) + Sync + Send + 'static;

impl Guard {
    /// Takes over the process's panics.
    pub fn install() -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let seen_by_hook = Arc::clone(&seen);
        let reporting = panic::take_hook();
        panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            log::debug!("{info}");
            let mut seen = seen_by_hook.lock().unwrap_or_else(PoisonError::into_inner);
            seen.push(words(info.payload()).to_string());
        }));
        Self {
            seen,
            reporting: RefCell::new(Some(reporting)),
        }
    }

    /// Runs `work`.
    ///
    /// # Errors
    ///
    /// If it panicked, on whatever thread; what `work` was changing is then in an unknown state.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, DeviceFault> {
        let outcome = panic::catch_unwind(AssertUnwindSafe(work));
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let first = seen.drain(..).next();
        match outcome {
            Ok(value) => {
                // A thread that went on by itself: told, but no reason to stop.
                if let Some(message) = first {
                    log::warn!("{}", in_one_line(&message));
                }
                Ok(value)
            }
            Err(payload) => {
                let message = first.unwrap_or_else(|| words(payload.as_ref()).to_string());
                Err(DeviceFault::new(&message))
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // A thread that panics may not touch the hook.
        if let Some(reporting) = self.reporting.take().filter(|_| !std::thread::panicking()) {
            panic::set_hook(reporting);
        }
    }
}

fn words(payload: &dyn Any) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("it panicked without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_by_its_words() {
        for (message, expected) in [
            (
                "out of device memory allocating 1024 bytes\n",
                FaultKind::OutOfMemory,
            ),
            (
                "can't allocate buffer of size: 99\nBacktrace: lost",
                FaultKind::OutOfMemory,
            ),
            (
                "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
                FaultKind::OutOfMemory,
            ),
            (
                "The device was poisoned during launch\nCaused by:\n  x",
                FaultKind::Lost,
            ),
            ("the wgpu device was lost (Unknown)", FaultKind::Lost),
            ("index out of bounds", FaultKind::Other),
        ] {
            let fault = DeviceFault::new(message);
            assert_eq!(fault.kind, expected, "{message}");
            assert!(!fault.message.contains('\n') && !fault.message.contains("Backtrace"));
        }
        let long = DeviceFault::new(&"é ".repeat(1000));
        assert_eq!(long.message.chars().count(), 301);
    }
}
