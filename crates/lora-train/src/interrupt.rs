//! Ctrl-C and similar signals: the first asks the run to stop where it can be resumed, the second
//! ends it immediately.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The exit code of a run that stopped before its end and can be resumed: `EX_TEMPFAIL` of
/// `sysexits.h`, "try again".
pub const RESUMABLE: u8 = 75;

/// How soon a signal is reported on the screen.
const NOTICE: Duration = Duration::from_millis(100);

/// Whether the run should stop. A clone shares the flag.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    asked: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens for SIGINT and SIGTERM. A second signal ends the process immediately, with 128 plus
    /// the signal's number as the exit code, as a shell would report it. All files are intact then,
    /// because none is written in place.
    ///
    /// # Errors
    ///
    /// If the system does not let the process listen.
    pub fn of_signals() -> io::Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset, passes, and sets it.
            flag::register_conditional_shutdown(
                signal,
                128 + signal,
                Arc::clone(&interrupt.asked),
            )?;
            flag::register(signal, Arc::clone(&interrupt.asked))?;
        }
        let watched = interrupt.clone();
        // A step may take minutes, and the user should see that the key was noticed. A signal
        // handler itself must not print.
        std::thread::Builder::new()
            .name("interrupt".into())
            .spawn(move || {
                while !watched.asked() {
                    std::thread::sleep(NOTICE);
                }
                log::warn!(
                    "stopping after this step is finished and saved; Ctrl-C again exits immediately"
                );
            })?;
        Ok(interrupt)
    }

    /// Whether the run was asked to stop.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Asks the run to stop.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
    }
}
