//! The result of a run.

use std::path::PathBuf;
use std::time::Duration;

use super::curve;
use crate::metrics::Scores;
use terminal::Style;
use terminal::human;

/// The result of a run. Plain data, which [`on_finish`](crate::TrainingCallback::on_finish) receives.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunResult {
    /// Optimizer steps taken.
    pub steps: usize,
    /// Tokens of all examples trained on, without padding.
    pub tokens: u64,
    /// From the first step to the last validation.
    pub elapsed: Duration,
    /// Peak resident memory, in bytes.
    pub peak_memory: u64,
    /// Peak memory reserved on the device, in bytes; `None` on the CPU.
    pub device_memory: Option<u64>,
    /// The base model on the validation examples.
    pub base: Option<Scores>,
    /// The adapter that was kept: its step and its validation.
    pub kept: Option<(usize, Scores)>,
    /// Why the run ended early, if so.
    pub stopped: Option<String>,
    /// Written files: `("adapter", path)`.
    pub written: Vec<(String, PathBuf)>,
    /// Suggested commands: what each does, and the command.
    pub next: Vec<(String, String)>,
}

impl RunResult {
    /// The lines to show. `losses` holds one training loss per step, `validations` `(step, loss)`.
    pub(super) fn lines(
        &self,
        losses: &[f64],
        validations: &[(usize, f64)],
        style: Style,
        width: usize,
    ) -> Vec<String> {
        let mut lines = vec![String::new()];
        lines.extend(curve::draw(losses, validations, width));
        if lines.len() > 1 {
            let legend = if validations.is_empty() {
                "training loss"
            } else {
                "training loss, ● validation loss"
            };
            lines.push(style.dim(&format!("{:10}{legend}, by step", "")));
            lines.push(String::new());
        }
        lines.push(style.good(&self.headline()));
        lines.extend(self.scores(losses, style));
        lines.push(String::new());
        let written: Vec<Vec<String>> = self
            .written
            .iter()
            .map(|(what, path)| vec![format!("  {}", style.dim(what)), path.display().to_string()])
            .collect();
        lines.extend(human::columns(&written, &[]));
        for (what, command) in &self.next {
            lines.push(String::new());
            lines.push(format!("{what}:"));
            lines.push(format!("  {}", style.bold(command)));
        }
        lines
    }

    fn headline(&self) -> String {
        let what = match &self.stopped {
            Some(reason) => format!("Stopped ({reason}) after"),
            None => "Done:".into(),
        };
        let seconds = self.elapsed.as_secs_f64();
        let speed = if seconds > 0.0 {
            format!(
                " ({} per second)",
                human::rate(self.tokens as f64 / seconds)
            )
        } else {
            String::new()
        };
        let device = match self.device_memory {
            Some(bytes) => format!(", {} on the device", human::bytes(bytes)),
            None => String::new(),
        };
        format!(
            "{what} {} in {}, {}{speed}, peak memory {}{device}",
            human::counted(self.steps as u64, "step"),
            human::duration(self.elapsed),
            human::counted(self.tokens, "token"),
            human::bytes(self.peak_memory),
        )
    }

    fn scores(&self, losses: &[f64], style: Style) -> Vec<String> {
        let Some((step, kept)) = self.kept else {
            // Without validation examples only the training loss is known.
            return match (losses.first(), losses.last()) {
                (Some(first), Some(last)) => vec![format!(
                    "  training loss {} -> {}",
                    human::number(*first),
                    human::number(*last)
                )],
                _ => Vec::new(),
            };
        };
        let kept_name = format!("step {}", human::count(step as u64));
        let row = |name: &str, value: &dyn Fn(&Scores) -> String, change: String| {
            let base = self.base.as_ref().map_or("-".into(), value);
            vec![format!("  {name}"), base, value(&kept), change]
        };
        let change = |of: fn(Scores) -> f64| self.base.map(|base| of(kept) - of(base));
        let loss = change(|scores| scores.loss).map(|by| signed(by, &human::number(by.abs())));
        let accuracy = change(|scores| scores.accuracy)
            .map(|by| signed(by, &format!("{:.1} points", by.abs() * 100.0)));
        let whole = change(|scores| scores.row_accuracy)
            .map(|by| signed(by, &format!("{:.1} points", by.abs() * 100.0)));
        let rows = [
            vec![
                String::new(),
                "base model".into(),
                kept_name,
                "change".into(),
            ],
            row(
                "validation loss",
                &|scores| human::number(scores.loss),
                loss.unwrap_or_default(),
            ),
            row(
                "token accuracy",
                &|scores| human::percent(scores.accuracy),
                accuracy.unwrap_or_default(),
            ),
            row(
                "exact match",
                &|scores| human::percent(scores.row_accuracy),
                whole.unwrap_or_default(),
            ),
        ];
        let mut lines = human::columns(&rows, &[1, 2, 3]);
        lines[0] = style.dim(&lines[0]);
        lines
    }
}

/// `+text`, `-text`, or `±text` for no change.
pub(super) fn signed(change: f64, text: &str) -> String {
    let sign = match change {
        change if change > 0.0 => "+",
        change if change < 0.0 => "-",
        _ => "±",
    };
    format!("{sign}{text}")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn result() -> RunResult {
        RunResult {
            steps: 175,
            tokens: 159_600,
            elapsed: Duration::from_secs(242),
            peak_memory: 812 << 20,
            device_memory: None,
            base: Some(Scores {
                loss: 3.12,
                accuracy: 0.0,
                row_accuracy: 0.0,
            }),
            kept: Some((
                150,
                Scores {
                    loss: 0.4,
                    accuracy: 0.875,
                    row_accuracy: 0.75,
                },
            )),
            stopped: None,
            written: vec![("adapter".into(), "runs/x/adapter".into())],
            next: vec![("Look at it".into(), "cargo xtask look".into())],
        }
    }

    #[test]
    fn the_result_compares_what_was_kept_with_the_base_model() {
        let losses = [3.0, 2.0, 1.0, 0.5];
        let text = result()
            .lines(&losses, &[(4, 0.4)], Style::plain(), 80)
            .join("\n");
        for part in [
            "Done: 175 steps in 4m 02s, 159,600 tokens (660 per second), peak memory 812 MiB",
            "base model  step 150",
            "3.1200    0.4000       -2.7200",
            "0.0 %    87.5 %  +87.5 points",
            "adapter  runs/x/adapter",
            "  cargo xtask look",
            "●",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
    }

    #[test]
    fn without_validation_the_training_loss_is_the_result() {
        let result = RunResult {
            base: None,
            kept: None,
            stopped: Some("interrupted".into()),
            device_memory: Some(3 << 30),
            elapsed: Duration::ZERO,
            ..result()
        };
        let text = result
            .lines(&[3.0, 0.5], &[], Style::plain(), 80)
            .join("\n");
        assert!(text.contains("training loss 3.0000 -> 0.5000"), "{text}");
        assert!(
            text.contains("Stopped (interrupted) after 175 steps"),
            "{text}"
        );
        assert!(text.contains("3.00 GiB on the device"), "{text}");
        assert!(!text.contains("per second"));
        let empty = RunResult::default()
            .lines(&[], &[], Style::plain(), 0)
            .join("\n");
        assert!(!empty.contains("NaN"), "{empty}");
    }
}
