//! Reads thousands of mutated files with a parser and checks panics, memory, time and the length of
//! messages.
//!
//! A process that uses this installs [`CountingAllocator`] as its allocator and does nothing else
//! in the meantime.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::allocator::CountingAllocator;
use crate::mutate::{Format, Mutator};

/// Files per parser; `HOSTILE_FILES` sets another number for a longer search.
const FILES: usize = 2000;
/// No file may take longer to be read or refused. On a busy machine, files take up to tenths of
/// this.
const LONGEST: Duration = Duration::from_secs(10);
/// An error may quote from the file, but not without limit.
const LONGEST_MESSAGE: usize = 16 << 10;

/// Reads a file; an error is the text that a user would see.
pub type Read<'a> = dyn FnMut(&[u8]) -> Result<(), String> + 'a;

/// A parser under test.
pub struct Parser<'a> {
    /// Its name in the table.
    pub name: &'static str,
    /// Valid files, from which mutated files are made.
    pub seeds: Vec<(Format, Vec<u8>)>,
    /// The most bytes that it may allocate at one time, in addition to 32 times the file's size.
    pub memory: usize,
    /// Reads a file: returns a correct load, or an error's message.
    pub read: Box<Read<'a>>,
}

/// The results of a parser's files.
#[derive(Debug, Default)]
pub struct Summary {
    /// The parser.
    pub name: &'static str,
    /// Mutated files.
    pub files: usize,
    /// Files that were refused with a message.
    pub errors: usize,
    /// Files that were read.
    pub loads: usize,
    /// The most bytes that were allocated at one time for a file.
    pub peak: usize,
    /// The longest time for a file.
    pub slowest: Duration,
    /// The longest message, in bytes.
    pub longest_message: usize,
    /// Failures: the file's number and what happened.
    pub failures: Vec<String>,
}

/// The file being read, for the watchdog and for the allocator's last message.
static READING: Mutex<Option<(String, Instant)>> = Mutex::new(None);
static WATCHING: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The number of files per parser.
pub fn files() -> usize {
    let asked = std::env::var("HOSTILE_FILES")
        .ok()
        .and_then(|count| count.parse().ok());
    asked.unwrap_or(FILES)
}

/// Reads the unchanged seeds, which must load, and [`files`] mutated ones.
///
/// Every mutated file is kept in `folder` while it is read, so that a file that ends the process
/// can be inspected.
pub fn read_all(mut parser: Parser, folder: &Path) -> Summary {
    watch();
    let mut summary = Summary {
        name: parser.name,
        ..Summary::default()
    };
    for (index, (_, seed)) in parser.seeds.iter().enumerate() {
        if let Err(error) = (parser.read)(seed) {
            summary
                .failures
                .push(format!("seed {index} is valid and was refused: {error}"));
        }
    }
    let reporting = panic::take_hook();
    panic::set_hook(Box::new(|info| {
        PANIC.with(|panic| *panic.borrow_mut() = Some(info.to_string()));
    }));
    // Names are stable, so that one parser's files do not depend on the other parsers.
    let seed = parser.name.bytes().fold(7u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut mutator = Mutator::new(seed);
    let current: PathBuf = folder.join(format!("{}.file", parser.name.replace([' ', '/'], "-")));
    for number in 0..files() {
        let (format, seed) = &parser.seeds[number % parser.seeds.len()];
        let file = mutator.mutate(*format, seed);
        let _ = std::fs::write(&current, &file);
        let before = CountingAllocator::bytes_in_use();
        let most = parser.memory + 32 * file.len();
        CountingAllocator::reset_peak();
        CountingAllocator::refuse_beyond(before.saturating_add(most.saturating_mul(4)));
        let started = Instant::now();
        set_reading(Some((
            format!("{} {number}, {}", parser.name, current.display()),
            started,
        )));
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| (parser.read)(&file)));
        set_reading(None);
        CountingAllocator::refuse_beyond(usize::MAX);
        let took = started.elapsed();
        let peak = CountingAllocator::peak().saturating_sub(before);
        summary.files += 1;
        summary.peak = summary.peak.max(peak);
        summary.slowest = summary.slowest.max(took);
        let mut failure = None;
        match outcome {
            Ok(Ok(())) => summary.loads += 1,
            Ok(Err(message)) => {
                summary.errors += 1;
                summary.longest_message = summary.longest_message.max(message.len());
                if message.len() > LONGEST_MESSAGE + 2 * file.len() {
                    failure = Some(format!("a message of {} bytes", message.len()));
                }
            }
            Err(_) => {
                let panic = PANIC.with(|panic| panic.borrow_mut().take());
                failure = Some(panic.unwrap_or_else(|| "a panic".into()));
            }
        }
        if peak > most {
            failure = Some(format!(
                "{peak} bytes allocated for a file of {}",
                file.len()
            ));
        }
        if took > LONGEST {
            failure = Some(format!("it took {took:?}"));
        }
        if let Some(failure) = failure {
            let kept = current.with_extension(number.to_string());
            let _ = std::fs::write(&kept, &file);
            summary
                .failures
                .push(format!("file {number} ({}): {failure}", kept.display()));
        }
    }
    panic::set_hook(reporting);
    let _ = std::fs::remove_file(&current);
    summary
}

fn set_reading(what: Option<(String, Instant)>) {
    *READING.lock().unwrap_or_else(PoisonError::into_inner) = what;
}

/// Ends the process if a file is read for far too long; otherwise a hang would report nothing.
fn watch() {
    if WATCHING.swap(1, Ordering::SeqCst) == 1 {
        return;
    }
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let reading = READING
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some((what, since)) = reading
                && since.elapsed() > 6 * LONGEST
            {
                eprintln!("{what} is being read for {:?}", since.elapsed());
                std::process::abort();
            }
        }
    });
}

/// The file being read at this moment, for the last message of a process that wanted too much
/// memory.
pub fn reading() -> Option<String> {
    let reading = READING.try_lock().ok()?;
    reading.as_ref().map(|(what, _)| what.clone())
}

/// The summaries as a table.
pub fn table(summaries: &[Summary]) -> String {
    let mut text = format!(
        "{:<34} {:>6} {:>7} {:>6} {:>11} {:>9} {:>8}\n",
        "parser", "files", "errors", "loads", "peak memory", "slowest", "panics"
    );
    for summary in summaries {
        text += &format!(
            "{:<34} {:>6} {:>7} {:>6} {:>7.1} MiB {:>6} ms {:>8}\n",
            summary.name,
            summary.files,
            summary.errors,
            summary.loads,
            summary.peak as f64 / (1 << 20) as f64,
            summary.slowest.as_millis(),
            summary.failures.len()
        );
    }
    text
}
