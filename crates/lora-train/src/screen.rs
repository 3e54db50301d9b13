//! The screen output of a run: on a terminal a progress bar below the other lines, elsewhere plain
//! lines.

mod curve;
mod describe;
mod preparing;
mod result;
mod run;
mod summary;

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState};
use terminal::{Screen, ScreenKind, Task, bar_style, human};

use self::preparing::Preparing;
use self::run::Run;
use crate::callback::TrainingCallback;
use crate::metrics::{History, TrainLine, ValidationLine};
use crate::output::OutputFolder;

pub(crate) use describe::precision;
pub use result::RunResult;
pub use summary::{AdapterSummary, DataSummary, RunSummary, StepSummary};

/// Shows a run: on a terminal with a progress bar, elsewhere as plain lines.
pub struct RunScreen {
    screen: Screen,
    run: Option<Run>,
    /// Until the first step is done.
    preparing: Option<Preparing>,
    /// While weights are loaded.
    loading: Option<Task>,
}

impl From<Screen> for RunScreen {
    fn from(screen: Screen) -> Self {
        Self {
            screen,
            run: None,
            preparing: None,
            loading: None,
        }
    }
}

impl RunScreen {
    /// A screen on standard output.
    pub fn new(kind: ScreenKind) -> Self {
        Screen::new(kind).into()
    }

    /// A screen of plain lines that go to `writer`.
    pub fn writing_to(writer: Box<dyn Write + Send>) -> Self {
        Screen::writing_to(writer).into()
    }

    /// The bar of a run of this length. It also shows the time left until `end` milliseconds, unless `end` is 0.
    fn bar(&self, steps: usize, end: Arc<AtomicU64>) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        bar.set_length(steps as u64);
        let times = move |state: &ProgressState, out: &mut dyn fmt::Write| {
            let left = match end.load(Ordering::Relaxed) {
                0 => String::new(),
                end => {
                    let left = Duration::from_millis(end).saturating_sub(state.elapsed());
                    format!(", {} left", human::clock(left))
                }
            };
            let elapsed = human::clock(state.elapsed());
            let _ = write!(out, "{elapsed}{left}");
        };
        bar.set_style(
            bar_style(
                "[{wide_bar:.green/dim}] {pos}/{len}  {percent} %  {times}\n{wide_msg}",
                &[],
            )
            .with_key("times", times),
        );
        bar.set_message("the first step takes longest on a GPU, because it compiles kernels");
        let bar = self.screen.add(bar);
        if self.screen.printer().is_none() {
            // The times advance during a long step.
            bar.enable_steady_tick(Duration::from_secs(1));
        }
        bar
    }
}

impl TrainingCallback for RunScreen {
    /// Shows how many kernels are ready: on a bar every second, or without a terminal as a line every 30 seconds.
    fn on_preparing(&mut self, what: &'static str) {
        self.on_prepared();
        let bar = match &self.run {
            Some(run) => run.bar.clone(),
            None => {
                let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
                bar.set_style(bar_style("{msg}", &[]));
                self.screen.add(bar)
            }
        };
        let kernels = device::kept_kernels;
        self.preparing = Some(match self.screen.printer() {
            Some(printer) => {
                let print = move |text: String| printer.line(&text);
                Preparing::new(what, Duration::from_secs(30), kernels, print)
            }
            None => {
                let show = move |text| bar.set_message(text);
                Preparing::new(what, Duration::from_secs(1), kernels, show)
            }
        });
    }

    fn on_prepared(&mut self) {
        self.preparing = None;
    }

    fn on_already_done(&mut self, output: &OutputFolder, total_steps: usize) {
        self.screen.line(&format!(
            "{}: all {total_steps} steps of this run are done. The adapter is in {}",
            output.path().display(),
            output.adapter().display()
        ));
    }

    fn on_loading(&mut self, done: usize, total: usize) {
        let screen = &self.screen;
        let task = self
            .loading
            .get_or_insert_with(|| screen.task("loading weights", total));
        task.at(done);
    }

    fn on_loaded(&mut self) {
        self.loading = None;
    }

    /// Prints the summary, and shows the progress bar.
    fn on_start(&mut self, summary: &RunSummary) {
        for line in summary.lines(self.screen.style(), self.screen.width()) {
            self.screen.line(&line);
        }
        let end = Arc::new(AtomicU64::new(0));
        let bar = self.bar(summary.steps.total, Arc::clone(&end));
        self.run = Some(Run::new(bar, end, &summary.steps));
    }

    fn on_resume(&mut self, step: usize, history: &History) {
        if let Some(run) = &mut self.run {
            run.resume(step, history);
        }
    }

    /// Shows a step: on the bar, or as a line every `logging_steps`.
    fn on_step(&mut self, line: &TrainLine) {
        self.preparing = None;
        let (width, printer) = (self.screen.width(), self.screen.printer());
        let Some(run) = &mut self.run else {
            return;
        };
        run.record(line);
        run.bar.set_position(line.step as u64);
        run.bar.set_message(run.numbers(line, width).join("  "));
        let due = line.step.is_multiple_of(run.logging_steps) || line.step == run.total;
        if let Some(printer) = printer
            && (due || run.is_first(line.step))
        {
            printer.line(&run.plain_line(line));
        }
    }

    fn on_validating(&mut self, done: usize, total: usize) {
        if let Some(run) = &self.run {
            run.bar
                .set_message(format!("validating: {done}/{total} examples"));
        }
    }

    /// Shows a validation, with its change since the last one.
    fn on_validation(&mut self, line: &ValidationLine) {
        let Some(run) = &mut self.run else {
            return;
        };
        let text = run.validation(line, self.screen.style());
        self.screen.line(&text);
    }

    fn on_message(&mut self, text: &str) {
        self.screen.note(text);
    }

    /// Removes the bar and prints the results of the run.
    fn on_finish(&mut self, result: &RunResult) {
        let (losses, validations) = match self.run.take() {
            Some(run) => {
                run.bar.finish_and_clear();
                (run.losses, run.validations)
            }
            None => Default::default(),
        };
        let (style, width) = (self.screen.style(), self.screen.width());
        for line in result.lines(&losses, &validations, style, width) {
            self.screen.line(&line);
        }
    }
}

/// The bar must not overwrite an error's message: it stays where it was, and later lines are printed below it.
impl Drop for RunScreen {
    fn drop(&mut self) {
        self.preparing = None;
        self.loading = None;
        if let Some(run) = &self.run {
            run.bar.abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// The output of a plain screen.
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

    fn screen() -> (RunScreen, Printed) {
        let printed = Printed::default();
        (RunScreen::writing_to(Box::new(printed.clone())), printed)
    }

    fn line(step: usize) -> TrainLine {
        TrainLine {
            step,
            epoch: step as f64 / 10.0,
            loss: 3.0 / step as f64,
            learning_rate: 2e-4,
            grad_norm: 0.5,
            tokens: 456,
            tokens_per_s: 912.0,
            step_s: 0.5,
            memory_mib: 812.0,
            device_memory_mib: None,
            loss_scale: None,
        }
    }

    fn validation(step: usize, val_loss: f64, val_accuracy: f64) -> ValidationLine {
        ValidationLine {
            step,
            epoch: 0.0,
            val_loss,
            val_accuracy,
            val_row_accuracy: val_accuracy / 2.0,
            val_tokens: 10,
            val_s: 1.0,
        }
    }

    #[test]
    fn without_a_terminal_a_run_is_plain_lines() {
        let (mut screen, printed) = screen();
        let mut summary = summary::tests::summary();
        summary.steps.total = 25;
        summary.steps.logging_steps = 10;
        screen.on_start(&summary);
        screen.on_validation(&validation(0, 3.0, 0.0));
        for step in 1..=25 {
            screen.on_step(&line(step));
            screen.on_validating(step, 25);
        }
        screen.on_validation(&validation(25, 0.5, 0.75));
        screen.on_validation(&validation(25, 0.6, 0.75));
        screen.on_finish(&result::tests::result());
        let text = printed.text();
        assert!(
            !text.contains('\u{1b}') && !text.contains('\r'),
            "no control characters"
        );
        let steps: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("step "))
            .collect();
        let start = |line: &&str| line.split("  ").next().unwrap().to_string();
        assert_eq!(
            steps.iter().map(start).collect::<Vec<_>>(),
            [
                "step 1/25",
                "step 10/25",
                "step 20/25",
                "step 25/25",
                "step 25/25",
                "step 25/25"
            ]
        );
        for part in ["loss 0.3000", "912 tokens/s", "812 MiB", "lr 2e-4", "left"] {
            assert!(steps[1].contains(part), "{part:?} in {}", steps[1]);
        }
        assert!(text.contains(
            "before training  validation loss 3.0000  token accuracy 0.0 %  exact match 0.0 %\n"
        ));
        assert!(text.contains(
            "loss 0.5000 (-2.5000)  token accuracy 75.0 % (+75.0)  exact match 37.5 %  best\n"
        ));
        assert!(
            text.contains(
                "loss 0.6000 (+0.1000)  token accuracy 75.0 % (±0.0)  exact match 37.5 %\n"
            )
        );
        assert!(text.contains("Done: 175 steps"));
    }

    #[test]
    fn calls_out_of_order_do_nothing() {
        let (mut screen, printed) = screen();
        screen.on_step(&line(1));
        screen.on_validation(&validation(1, 1.0, 0.5));
        assert_eq!(printed.text(), "");
        screen.on_finish(&RunResult::default());
    }

    /// Refuses all output, like a closed pipe.
    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _bytes: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
    }

    #[test]
    fn a_closed_output_does_not_stop_the_run() {
        let mut screen = RunScreen::writing_to(Box::new(Closed));
        screen.on_start(&summary::tests::summary());
        screen.on_step(&line(1));
        screen.on_finish(&RunResult::default());
    }
}
