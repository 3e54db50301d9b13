//! Lines on standard output. On a terminal, a progress bar stays below the lines; elsewhere only plain
//! lines are written.
//!
//! Write errors are ignored: a closed pipe (`| head`) must not stop a run.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use console::Term;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use indicatif_log_bridge::LogWrapper;

use crate::human;
use crate::style::Style;

/// What standard output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScreenKind {
    /// A terminal: progress bar, and colors unless `NO_COLOR` is set.
    Terminal,
    /// A file, a pipe or a terminal without cursor control: plain lines.
    Plain,
}

impl ScreenKind {
    /// Detects what standard output is.
    pub fn detect() -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if Term::stdout().is_term() && !dumb {
            Self::Terminal
        } else {
            Self::Plain
        }
    }
}

/// Width of lines without a terminal.
const PLAIN_WIDTH: usize = 100;

type Lines = Arc<Mutex<Box<dyn Write + Send>>>;

/// Prints lines and shows progress. A clone is the same screen.
#[derive(Clone)]
pub struct Screen {
    style: Style,
    /// Draws nothing without a terminal.
    bars: MultiProgress,
    /// The destination of lines without a terminal.
    plain: Option<Printer>,
}

impl Screen {
    /// A screen on standard output.
    pub fn new(kind: ScreenKind) -> Self {
        match kind {
            ScreenKind::Plain => Self::writing_to(Box::new(std::io::stdout())),
            ScreenKind::Terminal => Self {
                style: Style::of_terminal(),
                bars: MultiProgress::with_draw_target(ProgressDrawTarget::stdout()),
                plain: None,
            },
        }
    }

    /// A screen that writes plain lines to `writer`.
    pub fn writing_to(writer: Box<dyn Write + Send>) -> Self {
        Self {
            style: Style::plain(),
            bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
            plain: Some(Printer(Arc::new(Mutex::new(writer)))),
        }
    }

    /// Installs the program's logger. Its lines are printed above the progress bar.
    ///
    /// # Errors
    ///
    /// If a logger is already installed.
    pub fn install_logger(&self, logger: env_logger::Logger) -> Result<(), log::SetLoggerError> {
        let level = logger.filter();
        LogWrapper::new(self.bars.clone(), logger).try_init()?;
        // The bridge only asks the logger for the level of an empty target.
        log::set_max_level(level);
        Ok(())
    }

    /// Prints a line, above the progress bar if one is shown.
    pub fn line(&self, text: &str) {
        match &self.plain {
            Some(printer) => printer.line(text),
            // `MultiProgress::println` would cut lines at the terminal's width.
            None => self.bars.suspend(|| {
                let _ = writeln!(std::io::stdout(), "{text}");
            }),
        }
    }

    /// Prints something that the user should know, with the prefix "note".
    pub fn note(&self, text: &str) {
        let wrapped = wrap(text, self.width().saturating_sub(6));
        for (index, line) in wrapped.iter().enumerate() {
            let heading = if index == 0 { "note  " } else { "      " };
            self.line(&format!("{}{line}", self.style.warn(heading)));
        }
    }

    /// Shows the progress of work of known length before the run, such as loading weights.
    pub fn task(&self, name: &str, length: usize) -> Task {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        bar.set_length(length as u64);
        bar.set_style(bar_style(
            "{msg} [{bar:30}] {pos}/{len}, {elapsed_text}",
            &[("elapsed_text", elapsed)],
        ));
        let bar = self.bars.add(bar);
        bar.set_message(name.to_string());
        Task {
            screen: self.clone(),
            bar,
            name: name.into(),
            started: Instant::now(),
        }
    }

    /// Adds a progress bar below the lines. Without a terminal it draws nothing.
    pub fn add(&self, bar: ProgressBar) -> ProgressBar {
        self.bars.add(bar)
    }

    /// The destination of lines without a terminal; `None` on a terminal.
    pub fn printer(&self) -> Option<Printer> {
        self.plain.clone()
    }

    /// The colors of this screen.
    pub fn style(&self) -> Style {
        self.style
    }

    /// The width of this screen in columns.
    pub fn width(&self) -> usize {
        match self.plain {
            Some(_) => PLAIN_WIDTH,
            None => usize::from(Term::stdout().size().1).clamp(40, 120),
        }
    }
}

/// Writes plain lines. Any thread may call it.
#[derive(Clone)]
pub struct Printer(Lines);

impl Printer {
    /// Writes a line and ignores errors.
    pub fn line(&self, text: &str) {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(writer, "{text}").and_then(|()| writer.flush());
    }
}

/// Printed as a space; [`wrap`] does not break a line here.
pub const KEPT_SPACE: &str = "\u{a0}";

/// Breaks text into lines at spaces. A word longer than `width` gets a line of its own.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split(' ') {
        let size = console::measure_text_width(word);
        if used > 0 && used + 1 + size > width {
            lines.push(String::new());
            used = 0;
        }
        if let Some(line) = lines.last_mut() {
            if used > 0 {
                line.push(' ');
                used += 1;
            }
            line.push_str(word);
            used += size;
        }
    }
    let spaced = lines.iter().map(|line| line.replace(KEPT_SPACE, " "));
    spaced.collect()
}

/// Work of known length in progress. Dropping it removes its progress bar.
pub struct Task {
    screen: Screen,
    bar: ProgressBar,
    name: String,
    started: Instant,
}

impl Task {
    /// Sets how much of it is done.
    pub fn at(&self, done: usize) {
        self.bar.set_position(done as u64);
    }

    /// Ends it and prints a line with `text`, its result, and the time it took.
    pub fn done(self, text: &str) {
        self.bar.finish_and_clear();
        let took = human::duration(self.started.elapsed());
        self.screen.line(&format!("{}: {text} ({took})", self.name));
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Writes a value into the template of a progress bar.
pub type Key = fn(&ProgressState, &mut dyn fmt::Write);

fn elapsed(state: &ProgressState, out: &mut dyn fmt::Write) {
    let _ = out.write_str(&human::clock(state.elapsed()));
}

/// The style of a progress bar with this template and these keys. A template is a constant; if it is
/// invalid, the bar has indicatif's default style.
pub fn bar_style(template: &str, keys: &[(&'static str, Key)]) -> ProgressStyle {
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    keys.iter()
        .fold(style, |style, (name, key)| style.with_key(name, *key))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Collects what a plain screen prints.
    #[derive(Clone, Default)]
    struct Printed(Arc<Mutex<Vec<u8>>>);

    impl Write for Printed {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Printed {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn screen() -> (Screen, Printed) {
        let printed = Printed::default();
        (Screen::writing_to(Box::new(printed.clone())), printed)
    }

    #[test]
    fn a_task_says_when_it_is_done_and_nothing_when_it_is_not() {
        let (screen, printed) = screen();
        let task = screen.task("loading", 10);
        task.at(3);
        drop(task);
        assert_eq!(printed.text(), "");
        screen.task("loading", 10).done("10 tensors");
        assert!(printed.text().starts_with("loading: 10 tensors ("));
    }
}
