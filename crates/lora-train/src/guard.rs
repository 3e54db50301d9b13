//! Failures of a device. Burn reports them as panics, which end here and become errors.

use std::any::Any;
use std::backtrace::Backtrace;
use std::cell::RefCell;
use std::fmt;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Arc, Mutex, PoisonError};

use data::contained;

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
    /// One tensor is larger than the device takes at all, however much memory is free.
    TooLargeTensor,
    /// The device is gone: reset by its driver, unplugged, poisoned by a kernel.
    Lost,
    /// Something else, perhaps an error in this program.
    Other,
}

impl fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            FaultKind::OutOfMemory => "the device's memory is too small",
            FaultKind::TooLargeTensor => "a tensor is larger than this device takes",
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
        // A read quotes what failed behind everything that failed because of it.
        let cause = message.find("can't allocate buffer of size");
        let message = cause.map_or(message, |at| &message[at..]);
        Self {
            kind: kind(message),
            message: in_one_line(message),
        }
    }
}

/// The words by which CubeCL's and the drivers' errors are told apart (cubecl-runtime's `IoError`,
/// `LaunchError` and `DevicePoison`, CUDA's result codes, wgpu's `Error`).
///
/// On WGSL nothing of this is a result: wgpu hands an allocation that fails to its handler of uncaptured errors,
/// where CubeCL panics on the device's thread ("wgpu error: Out of Memory"). CubeCL's `BufferTooBig` ("can't
/// allocate buffer of size") and wgpu's validation errors name a limit on one buffer, which smaller micro-batches
/// need not cure: that is no lack of memory.
fn kind(message: &str) -> FaultKind {
    let message = message.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    let limit = [
        "can't allocate buffer of size",
        "buffer_binding_size",
        "greater than the maximum buffer size",
    ];
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
        () if has(&limit) => FaultKind::TooLargeTensor,
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
/// Burn's backends work on threads of their own, where CubeCL catches a task's panic and logs it: the work goes on
/// without what the task should have done. Where something waits for such a task, the caller's panic is only "the
/// channel is closed", and the first panic seen is the one that says what went wrong.
///
/// Two kinds of panics are not counted. Those of other people's parsers are caught on purpose
/// ([`data::contained`]). Those in the definition of a kernel become an error of its outputs, which the
/// next read gives (cubecl-runtime, `define_kernel`), or, while kernels are tuned, only strike out a candidate.
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
            if contained::is_inside() || defines_a_kernel(info) {
                return;
            }
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
    /// If something panicked since the last call, on whatever thread and even if `work` came to its end: a task of
    /// the device that was not done leaves wrong numbers behind. What `work` was changing is then in an unknown state.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, DeviceFault> {
        let outcome = panic::catch_unwind(AssertUnwindSafe(work));
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let first = seen.drain(..).next();
        match (outcome, first) {
            (Ok(value), None) => Ok(value),
            (_, Some(message)) => Err(DeviceFault::new(&message)),
            (Err(payload), None) => Err(DeviceFault::new(words(payload.as_ref()))),
        }
    }

    /// Runs `work` and forgets what panicked before and in it: for what is still on its way after a failure that
    /// was dealt with.
    pub fn settle(&self, work: impl FnOnce()) {
        if let Err(fault) = self.run(work) {
            log::debug!("after a failure: {fault}");
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

/// Whether a panic comes out of a kernel's definition. Nothing else tells: CubeCL catches it without a mark.
fn defines_a_kernel(info: &PanicHookInfo<'_>) -> bool {
    let in_kernels = |file: &str| file.contains("/cubek-") || file.contains("\\cubek-");
    if info
        .location()
        .is_some_and(|place| in_kernels(place.file()))
    {
        return true;
    }
    let trace = Backtrace::force_capture().to_string();
    ["define_kernel", "CubeKernel"]
        .iter()
        .any(|name| trace.contains(name))
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
                FaultKind::TooLargeTensor,
            ),
            (
                "wgpu error: Buffer binding 0 range 268435456 exceeds `max_*_buffer_binding_size` limit 134217728",
                FaultKind::TooLargeTensor,
            ),
            (
                "wgpu error: Buffer size 9 is greater than the maximum buffer size (8)",
                FaultKind::TooLargeTensor,
            ),
            ("wgpu error: Out of Memory", FaultKind::OutOfMemory),
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
