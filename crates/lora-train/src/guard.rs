//! Failures of a device. Burn reports them as panics, which this module turns into errors.

use std::any::Any;
use std::backtrace::Backtrace;
use std::fmt;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, PoisonError};

use panics::{Panic, Watch};

/// What went wrong on the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFault {
    /// The kind of failure.
    pub kind: FaultKind,
    /// The device's message, in one line.
    pub message: String,
}

/// What a failure means for the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The device's memory was too small. The device still works.
    OutOfMemory,
    /// One tensor is larger than the device's limit for a buffer, however much memory is free.
    TooLargeTensor,
    /// The device is gone: reset by its driver, unplugged, poisoned by a kernel.
    Lost,
    /// CubeCL could not compile a kernel. While kernels are tuned this only removes a candidate, so
    /// that the same work succeeds when it is repeated.
    KernelCompilation,
    /// Another failure, perhaps an error in this program.
    Other,
}

impl fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            FaultKind::OutOfMemory => "the device's memory is too small",
            FaultKind::TooLargeTensor => "a tensor is larger than this device's largest buffer",
            FaultKind::Lost => "the device was lost",
            FaultKind::KernelCompilation => "a kernel could not be compiled",
            FaultKind::Other => "the computation failed",
        };
        write!(f, "{what}: {}", self.message)
    }
}

impl std::error::Error for DeviceFault {}

impl DeviceFault {
    /// The fault that a message describes.
    pub fn new(message: &str) -> Self {
        // Errors come with their backtraces, which do not help a user.
        let message = message.split("Backtrace").next().unwrap_or(message);
        // A read quotes the cause after everything that failed because of it.
        let cause = message.find("can't allocate buffer of size");
        let message = cause.map_or(message, |at| &message[at..]);
        Self {
            kind: kind(message),
            message: in_one_line(message),
        }
    }
}

/// Classifies the messages of CubeCL and of drivers (cubecl-runtime's `IoError`, `LaunchError` and
/// `DevicePoison`, CUDA's result codes, wgpu's `Error`).
///
/// On WGSL none of them is a `Result`: wgpu reports a failed allocation to its handler of uncaptured errors, where
/// CubeCL panics on the device's thread ("wgpu error: Out of Memory"). CubeCL's `BufferTooBig` ("can't allocate
/// buffer of size") and wgpu's validation errors name a limit on one buffer. That is not a lack of memory, and
/// smaller micro-batches need not help.
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

impl From<&Panic> for DeviceFault {
    fn from(panic: &Panic) -> Self {
        let mut fault = Self::new(&panic.message);
        let compiler = panic.file.as_deref().is_some_and(is_kernel_compiler);
        // A device that is lost while a kernel is compiled still counts as lost.
        if fault.kind == FaultKind::Other && compiler {
            fault.kind = FaultKind::KernelCompilation;
        }
        fault
    }
}

/// The parts of CubeCL that turn a kernel's definition into a program for the device: the name of
/// the crate without its version, and the folder in it.
///
/// Parts that also run tasks on the device are not listed, because their panics may be anything.
const KERNEL_COMPILER: [(&str, &str); 10] = [
    ("cubecl-core", "src/codegen"),
    ("cubecl-core", "src/frontend"),
    ("cubecl-core", "src/post_processing"),
    ("cubecl-cpp", "src"),
    ("cubecl-ir", "src"),
    ("cubecl-llvm", "src"),
    ("cubecl-opt", "src"),
    ("cubecl-spirv", "src"),
    ("cubecl-wgpu", "src/compiler"),
    // The framework of CubeCL's intermediate representation.
    ("pliron", "src"),
];

/// Whether a source file is part of CubeCL's compiler. The path of a panic survives stripping, the
/// names in a backtrace do not.
fn is_kernel_compiler(file: &str) -> bool {
    // A path of the machine that built the program, which may be another system.
    let file = file.replace('\\', "/");
    KERNEL_COMPILER.iter().any(|(name, folder)| {
        let mut parts = Path::new(&file).components();
        let in_crate = |part: Component<'_>| {
            let part = part.as_os_str().to_str().unwrap_or_default();
            let version = part.strip_prefix(name).and_then(|v| v.strip_prefix('-'));
            version.is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()))
        };
        parts.any(in_crate) && parts.as_path().starts_with(folder)
    })
}

/// While a guard lives, panics are collected instead of printed; [`run`](Self::run) returns them.
///
/// Burn's backends work on threads of their own, where CubeCL catches a task's panic and logs it. The
/// program then continues without the results of that task. Where something waits for such a task, the
/// caller's panic is only "the channel is closed": the first panic seen is the cause.
///
/// Two kinds of panics are not counted. Those of other crates' parsers are caught on purpose
/// ([`data::contained`]). Those in the definition of a kernel become an error of its outputs, which the
/// next read returns (cubecl-runtime, `define_kernel`), or, while kernels are tuned, only remove a candidate.
pub struct Guard {
    seen: Arc<Mutex<Vec<Panic>>>,
    _watch: Watch,
}

impl Guard {
    /// Installs a watch on the process's panics.
    pub fn install() -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let seen_by_hook = Arc::clone(&seen);
        let watch = panics::watch(move |info| {
            log::debug!("{info}");
            if !defines_a_kernel(info) {
                let mut seen = seen_by_hook.lock().unwrap_or_else(PoisonError::into_inner);
                seen.push(Panic::of(info));
            }
        });
        Self {
            seen,
            _watch: watch,
        }
    }

    /// Runs `work`.
    ///
    /// # Errors
    ///
    /// If any thread panicked since the last call, even if `work` returned: the results of a failed task of
    /// the device are wrong. Values that `work` was changing are then in an unknown state.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, DeviceFault> {
        let outcome = panic::catch_unwind(AssertUnwindSafe(work));
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let first = seen.drain(..).next();
        match (outcome, first) {
            (Ok(value), None) => Ok(value),
            (_, Some(panic)) => Err(DeviceFault::from(&panic)),
            (Err(payload), None) => Err(DeviceFault::new(&words(payload))),
        }
    }

    /// As [`run`](Self::run), and repeats `work` once, after `wait`, if a kernel could not be compiled: by
    /// then the tuning has removed that kernel. `wait` waits for unfinished work of the device.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run), of the second attempt if there was one.
    pub fn run_repeatable<T>(
        &self,
        mut work: impl FnMut() -> T,
        wait: impl FnOnce(),
    ) -> Result<T, DeviceFault> {
        match self.run(&mut work) {
            Err(fault) if fault.kind == FaultKind::KernelCompilation => {
                log::warn!("{fault}; repeating the computation once");
                self.settle(wait);
                self.run(&mut work)
            }
            outcome => outcome,
        }
    }

    /// Runs `work` and discards the panics before and during it: for unfinished work after a failure that
    /// was handled.
    pub fn settle(&self, work: impl FnOnce()) {
        if let Err(fault) = self.run(work) {
            log::debug!("after a failure: {fault}");
        }
    }
}

/// Whether a panic comes from a kernel's definition. CubeCL catches it without a mark, so only its source
/// location shows it.
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

fn words(payload: Box<dyn Any + Send>) -> String {
    panics::message(payload.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_classified_by_its_message() {
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

    fn panic(message: &str, file: &str) -> Panic {
        Panic {
            message: message.into(),
            file: Some(file.into()),
        }
    }

    #[test]
    fn a_panic_of_cubecls_compiler_is_recognized_by_its_file() {
        const REGISTRY: &str = "/root/.cargo/registry/src/index.crates.io-1949cf8c6b5b557f";
        let kind = |file: &str| {
            let message = "Expected op cube.copy v0 to implement UnrollOp";
            DeviceFault::from(&panic(message, file)).kind
        };
        for file in [
            "cubecl-core-0.11.3/src/post_processing/unroll.rs",
            "cubecl-opt-0.11.3/src/passes/mod.rs",
            "cubecl-wgpu-0.11.3/src/compiler/wgsl/to_wgsl.rs",
            "pliron-0.19.0/src/op.rs",
        ] {
            let path = format!("{REGISTRY}/{file}");
            assert_eq!(kind(&path), FaultKind::KernelCompilation, "{file}");
            let windows = format!("C:\\Users\\x\\registry\\{}", file.replace('/', "\\"));
            assert_eq!(kind(&windows), FaultKind::KernelCompilation, "{windows}");
        }
        for file in [
            "cubecl-core-0.11.3/src/compute/launcher.rs",
            "cubecl-wgpu-0.11.3/src/compute/server.rs",
            "cubecl-runtime-0.11.3/src/client.rs",
            "cubecl-cuda-0.11.3/src/compute/server.rs",
            "pliron-llvm-0.19.0/src/lib.rs",
            "my-cubecl-opt-1/src/lib.rs",
        ] {
            assert_eq!(
                kind(&format!("{REGISTRY}/{file}")),
                FaultKind::Other,
                "{file}"
            );
        }
        assert_eq!(kind("crates/lora-train/src/step.rs"), FaultKind::Other);
        // The message takes precedence.
        let lost = panic(
            "the device was lost",
            &format!("{REGISTRY}/cubecl-core-0.11.3/src/codegen/compiler.rs"),
        );
        assert_eq!(DeviceFault::from(&lost).kind, FaultKind::Lost);
    }

    /// Work that is repeated by a guard, with one of `faults` per attempt as if the device had panicked.
    fn attempts(faults: &[&str]) -> (Result<usize, DeviceFault>, usize) {
        use std::cell::Cell;

        let guard = Guard::install();
        let (tried, waited) = (Cell::new(0), Cell::new(0));
        let work = || {
            let attempt = tried.get();
            tried.set(attempt + 1);
            if let Some(file) = faults.get(attempt) {
                let panic = panic("it failed", file);
                guard.seen.lock().unwrap().push(panic);
            }
            attempt
        };
        let outcome = guard.run_repeatable(work, || waited.set(waited.get() + 1));
        assert_eq!(waited.get() + 1, tried.get(), "it waits between attempts");
        (outcome, tried.get())
    }

    #[test]
    fn work_is_repeated_once_if_a_kernel_could_not_be_compiled() {
        const COMPILER: &str = "/cubecl-core-0.11.3/src/post_processing/unroll.rs";
        assert_eq!(attempts(&[]), (Ok(0), 1));
        assert_eq!(attempts(&[COMPILER]), (Ok(1), 2));
        let (outcome, tried) = attempts(&[COMPILER, COMPILER, COMPILER]);
        assert_eq!(outcome.unwrap_err().kind, FaultKind::KernelCompilation);
        assert_eq!(tried, 2);
        // Any other failure is final.
        let (outcome, tried) = attempts(&["crates/lora-train/src/step.rs"]);
        assert_eq!(outcome.unwrap_err().kind, FaultKind::Other);
        assert_eq!(tried, 1);
        let (outcome, _) = attempts(&[COMPILER, "crates/lora-train/src/step.rs"]);
        assert_eq!(outcome.unwrap_err().kind, FaultKind::Other);
    }
}
