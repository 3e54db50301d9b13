//! Lines on standard output: on a terminal a progress bar keeps to the bottom, elsewhere there are plain lines only.
//!
//! A closed pipe (`| head`) is no reason to stop, so errors of writing are ignored.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use console::Term;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use indicatif_log_bridge::LogWrapper;

use crate::human;
use crate::style::Style;

/// Where the screen is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScreenKind {
    /// A terminal: progress bar, colours unless `NO_COLOR` is set.
    Terminal,
    /// A file, a pipe, a dumb terminal: lines.
    Plain,
}

impl ScreenKind {
    /// What standard output is.
    pub fn detect() -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if Term::stdout().is_term() && !dumb {
            Self::Terminal
        } else {
            Self::Plain
        }
    }
}

/// Lines without a terminal are this wide.
const PLAIN_WIDTH: usize = 100;

type Lines = Arc<Mutex<Box<dyn Write + Send>>>;

/// Shows lines and progress. A clone is the same screen.
#[derive(Clone)]
pub struct Screen {
    style: Style,
    /// Draws nothing where there is no terminal.
    bars: MultiProgress,
    /// Where lines go where there is no terminal.
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

    /// A screen of plain lines that go to `writer`.
    pub fn writing_to(writer: Box<dyn Write + Send>) -> Self {
        Self {
            style: Style::plain(),
            bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
            plain: Some(Printer(Arc::new(Mutex::new(writer)))),
        }
    }

    /// Makes `logger` the program's, its lines above the progress bar rather than through it.
    ///
    /// # Errors
    ///
    /// If the program has a logger already.
    pub fn install_logger(&self, logger: env_logger::Logger) -> Result<(), log::SetLoggerError> {
        let level = logger.filter();
        LogWrapper::new(self.bars.clone(), logger).try_init()?;
        // The bridge asks the logger for the level of an empty target only.
        log::set_max_level(level);
        Ok(())
    }

    /// Prints a line, above the progress bar if there is one.
    pub fn line(&self, text: &str) {
        match &self.plain {
            Some(printer) => printer.line(text),
            // Not `MultiProgress::println`, which cuts lines at the terminal's width.
            None => self.bars.suspend(|| {
                let _ = writeln!(std::io::stdout(), "{text}");
            }),
        }
    }

    /// Prints something that the user should know, after "note".
    pub fn note(&self, text: &str) {
        let wrapped = wrap(text, self.width().saturating_sub(6));
        for (index, line) in wrapped.iter().enumerate() {
            let heading = if index == 0 { "note  " } else { "      " };
            self.line(&format!("{}{line}", self.style.warn(heading)));
        }
    }

    /// Shows the progress of something of known length that comes before the run, such as loading weights.
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

    /// Adds a progress bar below the lines; the bar draws nothing where there is no terminal.
    pub fn add(&self, bar: ProgressBar) -> ProgressBar {
        self.bars.add(bar)
    }

    /// Where lines go where there is no terminal.
    pub fn printer(&self) -> Option<Printer> {
        self.plain.clone()
    }

    /// The colours of this screen.
    pub fn style(&self) -> Style {
        self.style
    }

    /// Columns of this screen.
    pub fn width(&self) -> usize {
        match self.plain {
            Some(_) => PLAIN_WIDTH,
            None => usize::from(Term::stdout().size().1).clamp(40, 120),
        }
    }
}

/// Writes plain lines, from any thread.
#[derive(Clone)]
pub struct Printer(Lines);

impl Printer {
    /// Writes a line. Errors are ignored.
    pub fn line(&self, text: &str) {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(writer, "{text}").and_then(|()| writer.flush());
    }
}

/// A space at which [`wrap`] does not break a line.
pub const KEPT_SPACE: &str = "\u{a0}";

/// Breaks at spaces; a word longer than `width` gets a line of its own.
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

/// Something with a known length that is under way; dropping it takes its bar away.
pub struct Task {
    screen: Screen,
    bar: ProgressBar,
    name: String,
    started: Instant,
}

impl Task {
    /// So much of it is done.
    pub fn at(&self, done: usize) {
        self.bar.set_position(done as u64);
    }

    /// It is done: `text` says with what.
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

/// Writes a value into a bar's template.
pub type Key = fn(&ProgressState, &mut dyn fmt::Write);

fn elapsed(state: &ProgressState, out: &mut dyn fmt::Write) {
    let _ = out.write_str(&human::clock(state.elapsed()));
}

/// A style with these keys. The templates are constants of this file; if one were wrong, the bar
/// would have indicatif's look.
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

    /// What a plain screen has printed.
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
