//! The progress of a download, on standard error: a bar on a terminal, else a line from time to time.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use terminal::human;

/// Without a terminal, one line per tenth of the download, and not more often than this.
const PAUSE: Duration = Duration::from_secs(5);

/// Shows a download. Standard output is left to the output of the command.
pub struct Progress {
    bar: ProgressBar,
    kind: Kind,
}

enum Kind {
    Hidden,
    Terminal,
    Lines(Mutex<Lines>),
}

struct Lines {
    said: Instant,
    tenth: u64,
}

impl Progress {
    /// On standard error.
    pub fn new() -> Self {
        let lines = Lines {
            said: Instant::now(),
            tenth: 0,
        };
        Self::of_kind(if Term::stderr().is_term() {
            Kind::Terminal
        } else {
            Kind::Lines(Mutex::new(lines))
        })
    }

    /// Shows nothing.
    pub fn hidden() -> Self {
        Self::of_kind(Kind::Hidden)
    }

    fn of_kind(kind: Kind) -> Self {
        Self {
            bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
            kind,
        }
    }

    pub(super) fn line(&self, text: &str) {
        match self.kind {
            Kind::Hidden => {}
            Kind::Terminal => self.bar.suspend(|| eprintln!("{text}")),
            Kind::Lines(_) => eprintln!("{text}"),
        }
    }

    /// Starts a download of this many bytes.
    pub(super) fn start(&self, what: &str, bytes: u64) {
        self.bar.set_length(bytes);
        self.bar.set_position(0);
        self.line(what);
        if !matches!(self.kind, Kind::Terminal) {
            return;
        }
        let style = ProgressStyle::with_template(
            "[{wide_bar:.green/dim}] {bytes}/{total_bytes}  {bytes_per_sec}, {eta} left",
        );
        if let Ok(style) = style {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_draw_target(ProgressDrawTarget::stderr());
    }

    pub(super) fn forward(&self, bytes: u64) {
        self.bar.inc(bytes);
        let (Kind::Lines(lines), Some(all)) = (&self.kind, self.bar.length()) else {
            return;
        };
        let Ok(mut lines) = lines.lock() else {
            return;
        };
        let tenth = 10 * self.bar.position() / all.max(1);
        if tenth != lines.tenth && lines.said.elapsed() >= PAUSE {
            (lines.tenth, lines.said) = (tenth, Instant::now());
            let position = human::bytes(self.bar.position());
            eprintln!("  {position} of {}", human::bytes(all));
        }
    }

    /// This many bytes must be downloaded again.
    pub(super) fn back(&self, bytes: u64) {
        self.bar.dec(bytes);
    }

    pub(super) fn done(&self, text: &str) {
        self.bar.finish_and_clear();
        self.line(text);
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.bar.is_finished() {
            self.bar.abandon();
        }
    }
}
