//! The state of a run that is shown, and the lines of a step and of a validation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::{StepSummary, result};
use crate::metrics::{History, TrainLine, ValidationLine};
use terminal::Style;
use terminal::human;

/// The state of a run that is shown.
pub(super) struct Run {
    pub bar: ProgressBar,
    pub total: usize,
    pub logging_steps: usize,
    started: Instant,
    /// End of the first step, which compiles kernels on some devices and is not typical of the others.
    first: Option<(usize, Instant)>,
    /// When the run will end, in milliseconds after `started`; 0 while unknown.
    end: Arc<AtomicU64>,
    pub losses: Vec<f64>,
    smoothed: Smoothed,
    /// Tokens and seconds of recent steps.
    speed: (Smoothed, Smoothed),
    pub validations: Vec<(usize, f64)>,
    /// Loss and accuracy.
    last_validation: Option<(f64, f64)>,
    best: f64,
}

impl Run {
    /// A run that begins now. `end` is where the bar reads when the run will end.
    pub fn new(bar: ProgressBar, end: Arc<AtomicU64>, steps: &StepSummary) -> Self {
        Self {
            bar,
            total: steps.total,
            logging_steps: steps.logging_steps.max(1),
            started: Instant::now(),
            first: None,
            end,
            losses: Vec::new(),
            smoothed: Smoothed::over(20.0),
            speed: (Smoothed::over(10.0), Smoothed::over(10.0)),
            validations: Vec::new(),
            last_validation: None,
            best: f64::INFINITY,
        }
    }

    /// Restores the state of an earlier session.
    pub fn resume(&mut self, step: usize, history: &History) {
        self.bar.set_position(step as u64);
        self.losses = history.losses.clone();
        for loss in &history.losses {
            self.smoothed.add(*loss);
        }
        for (step, loss, accuracy) in &history.validations {
            self.validations.push((*step, *loss));
            self.last_validation = Some((*loss, *accuracy));
            self.best = self.best.min(*loss);
        }
    }

    /// Whether this step is the first of this session.
    pub fn is_first(&self, step: usize) -> bool {
        self.first.is_some_and(|(first, _)| first == step)
    }

    pub fn record(&mut self, line: &TrainLine) {
        self.losses.push(line.loss);
        self.smoothed.add(line.loss);
        self.speed.0.add(line.tokens as f64);
        self.speed.1.add(line.step_s);
        let now = Instant::now();
        let (first_step, first_end) = *self.first.get_or_insert((line.step, now));
        let steps = line.step.saturating_sub(first_step);
        if steps > 0 {
            // Validations between the steps are included, as they will be in the rest of the run.
            let per_step = (now - first_end).as_secs_f64() / steps as f64;
            let left = per_step * self.total.saturating_sub(line.step) as f64;
            let end = (now - self.started).as_secs_f64() + left;
            self.end
                .store(((end * 1000.0) as u64).max(1), Ordering::Relaxed);
        }
    }

    fn tokens_per_s(&self) -> f64 {
        self.speed.0.mean() / self.speed.1.mean()
    }

    /// The numbers of a step, as many as fit the width.
    pub fn numbers(&self, line: &TrainLine, width: usize) -> Vec<String> {
        let memory = match line.device_memory_mib {
            Some(mib) => format!("{} GPU", memory(mib)),
            None => memory(line.memory_mib),
        };
        let (loss, smoothed) = (human::number(line.loss), self.smoothed.mean());
        // The number with the highest rank is dropped first.
        let mut numbers = vec![
            (4, format!("epoch {:.2}", line.epoch)),
            (0, format!("loss {loss}")),
            (1, format!("smoothed {}", human::number(smoothed))),
            (2, format!("lr {}", human::number(line.learning_rate))),
            (5, format!("grad norm {}", human::number(line.grad_norm))),
            (1, format!("{} tokens/s", human::rate(self.tokens_per_s()))),
            (3, memory),
        ];
        let size = |numbers: &[(u8, String)]| {
            let texts = numbers
                .iter()
                .map(|(_, text)| console::measure_text_width(text) + 2);
            texts.sum::<usize>().saturating_sub(2)
        };
        while size(&numbers) > width && numbers.len() > 1 {
            let least = numbers.iter().map(|(rank, _)| *rank).max().unwrap_or(0);
            if let Some(at) = numbers.iter().rposition(|(rank, _)| *rank == least) {
                numbers.remove(at);
            }
        }
        numbers.into_iter().map(|(_, text)| text).collect()
    }

    pub fn plain_line(&self, line: &TrainLine) -> String {
        let elapsed = self.started.elapsed();
        let mut parts = vec![format!("step {}/{}", line.step, self.total)];
        parts.extend(self.numbers(line, usize::MAX));
        parts.push(format!("{} elapsed", human::clock(elapsed)));
        let end = self.end.load(Ordering::Relaxed);
        if end > 0 {
            let left = Duration::from_millis(end).saturating_sub(elapsed);
            parts.push(format!("{} left", human::clock(left)));
        }
        parts.join("  ")
    }

    pub fn validation(&mut self, line: &ValidationLine, style: Style) -> String {
        let when = match line.step {
            0 => "before training".to_string(),
            step => format!("step {}/{}", step, self.total),
        };
        let (mut loss, mut accuracy) = (
            human::number(line.val_loss),
            human::percent(line.val_accuracy),
        );
        if let Some((last_loss, last_accuracy)) = self.last_validation {
            let by = line.val_loss - last_loss;
            loss += &format!(" ({})", result::signed(by, &human::number(by.abs())));
            let by = (line.val_accuracy - last_accuracy) * 100.0;
            accuracy += &format!(" ({})", result::signed(by, &format!("{:.1}", by.abs())));
        }
        let is_best = line.val_loss < self.best;
        let best = if is_best && self.last_validation.is_some() {
            format!("  {}", style.good("best"))
        } else {
            String::new()
        };
        if is_best {
            self.best = line.val_loss;
        }
        self.validations.push((line.step, line.val_loss));
        self.last_validation = Some((line.val_loss, line.val_accuracy));
        let exact = human::percent(line.val_row_accuracy);
        format!(
            "{when}  validation loss {loss}  token accuracy {accuracy}  exact match {exact}{best}"
        )
    }
}

/// An exponential moving average with Adam's bias correction.
/// Values that are not finite are skipped.
#[derive(Debug, Clone, Copy)]
struct Smoothed {
    keep: f64,
    sum: f64,
    weight: f64,
}

impl Smoothed {
    /// Looks back over about this many values.
    fn over(values: f64) -> Self {
        Self {
            keep: 1.0 - 1.0 / values,
            sum: 0.0,
            weight: 0.0,
        }
    }

    fn add(&mut self, value: f64) {
        if value.is_finite() {
            self.sum = self.sum * self.keep + value;
            self.weight = self.weight * self.keep + 1.0;
        }
    }

    /// Not a number before the first value.
    fn mean(&self) -> f64 {
        self.sum / self.weight
    }
}

fn memory(mib: f64) -> String {
    human::bytes((mib * 1024.0 * 1024.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_fit_the_width_and_the_loss_stays() {
        let line = TrainLine {
            step: 1,
            epoch: 0.1,
            loss: 3.0,
            learning_rate: 1.25e-4,
            grad_norm: 0.5,
            tokens: 456,
            tokens_per_s: 912.0,
            step_s: 0.5,
            memory_mib: 812.0,
            device_memory_mib: None,
            loss_scale: None,
        };
        let end = Arc::new(AtomicU64::new(0));
        let mut run = Run::new(ProgressBar::hidden(), end, &StepSummary::default());
        run.record(&line);
        assert_eq!(run.numbers(&line, 200).len(), 7);
        for width in [40, 60, 80] {
            let text = run.numbers(&line, width).join("  ");
            assert!(
                text.len() <= width && text.contains("loss 3.0000"),
                "{text}"
            );
        }
        assert_eq!(run.numbers(&line, 0), ["loss 3.0000"]);
    }

    #[test]
    fn smoothing_is_a_mean_from_the_first_value_on_and_leaves_out_what_is_not_finite() {
        let mut smoothed = Smoothed::over(10.0);
        assert!(smoothed.mean().is_nan());
        for value in [2.0, f64::NAN, 2.0, f64::INFINITY, 2.0] {
            smoothed.add(value);
            assert!((smoothed.mean() - 2.0).abs() < 1e-12);
        }
    }
}
