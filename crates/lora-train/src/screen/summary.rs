//! What will be trained, before it is.

use std::path::PathBuf;

use terminal::Style;
use terminal::{KEPT_SPACE, human, wrap};

/// Everything that a user should see before the first step. Plain data, which
/// [`on_start`](crate::TrainingCallback::on_start) receives.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunSummary {
    /// The run's name.
    pub name: String,
    /// The model and its shape: `SmolLM2-135M: 30 layers, hidden 576, vocabulary 49,152`.
    pub model: String,
    /// How weights are stored and what is computed in: `8-bit weights, f32 computation`.
    pub precision: String,
    /// The device.
    pub device: String,
    /// Why this one.
    pub device_reason: String,
    /// What is trained.
    pub adapters: AdapterSummary,
    /// Predicted peak memory by part, in bytes, largest or most telling first.
    pub memory: Vec<(String, u64)>,
    /// What there is of it: `24.0 GiB`; empty where nobody tells.
    pub memory_there: String,
    /// What it is trained on.
    pub data: DataSummary,
    /// How.
    pub steps: StepSummary,
    /// Where the result goes.
    pub output: PathBuf,
    /// What the user should know: a slow device, rows left out, a folder with a number.
    pub warnings: Vec<String>,
}

/// The adapters of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterSummary {
    /// The targets as configured: `q_proj, k_proj, v_proj`.
    pub targets: String,
    /// Modules that get an adapter.
    pub modules: usize,
    /// Rank.
    pub r: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// The scale γ.
    pub scale: f64,
    /// Dropout on the adapters' input.
    pub dropout: f64,
    /// Parameters that train.
    pub trainable: u64,
    /// Parameters of the base model.
    pub frozen: u64,
}

/// The rows of a run, after those too long were left out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DataSummary {
    /// The file.
    pub name: String,
    /// Rows to train on.
    pub train_rows: usize,
    /// Rows to validate on.
    pub validation_rows: usize,
    /// Rows left out because they have more than `max_seq_len` tokens.
    pub too_long_rows: usize,
    /// The limit.
    pub max_seq_len: usize,
    /// Tokens of all training rows.
    pub tokens: u64,
    /// Tokens of the longest training row.
    pub longest_row: usize,
    /// Tokens of all training rows that the loss is on.
    pub supervised_tokens: u64,
}

/// The steps of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepSummary {
    /// Optimizer steps.
    pub total: usize,
    /// Passes over the training rows.
    pub epochs: f64,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// The micro-batches of a step and their rows as they were asked for, where more are computed together.
    pub merged_from: Option<[usize; 2]>,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// What it does over the run: `cosine after 12 steps of warm-up`.
    pub schedule: String,
    /// Steps between two progress lines where there is no terminal.
    pub logging_steps: usize,
}

impl RunSummary {
    /// The lines to show, not wider than `width` where words can be wrapped.
    pub(super) fn lines(&self, style: Style, width: usize) -> Vec<String> {
        let rows: [(&str, Vec<String>); 9] = [
            ("model", vec![self.model.clone()]),
            (
                "device",
                vec![join(": ", &[&self.device, &self.device_reason])],
            ),
            ("precision", vec![self.precision.clone()]),
            ("adapters", self.adapters.sentences()),
            ("parameters", vec![self.adapters.parameters()]),
            ("memory", self.memory()),
            ("data", self.data.sentences()),
            ("steps", self.steps.sentences()),
            ("output", vec![self.output.display().to_string()]),
        ];
        let mut lines = vec![style.bold(&format!("LoRA fine-tuning: {}", self.name))];
        for (name, sentences) in rows {
            let mut heading = format!("{name:<10}");
            for sentence in sentences.iter().filter(|sentence| !sentence.is_empty()) {
                for line in wrap(sentence, width.saturating_sub(14)) {
                    lines.push(format!("  {}  {line}", style.dim(&heading)));
                    heading = " ".repeat(10);
                }
            }
        }
        for warning in &self.warnings {
            for (i, line) in wrap(warning, width.saturating_sub(14)).iter().enumerate() {
                let heading = if i == 0 { "note      " } else { "          " };
                lines.push(format!("  {}  {line}", style.warn(heading)));
            }
        }
        lines.push(String::new());
        lines
    }

    fn memory(&self) -> Vec<String> {
        let total: u64 = self.memory.iter().map(|(_, bytes)| bytes).sum();
        if total == 0 {
            return Vec::new();
        }
        let parts: Vec<String> = self
            .memory
            .iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(name, bytes)| {
                format!("{name} {}", human::bytes(*bytes)).replace(' ', KEPT_SPACE)
            })
            .collect();
        vec![
            if self.memory_there.is_empty() {
                format!("about {} at the peak", human::bytes(total))
            } else {
                format!(
                    "about {} of {} at the peak",
                    human::bytes(total),
                    self.memory_there
                )
            },
            parts.join(", "),
        ]
    }
}

impl AdapterSummary {
    fn sentences(&self) -> Vec<String> {
        let dropout = if self.dropout > 0.0 {
            format!(", dropout {}", self.dropout)
        } else {
            String::new()
        };
        vec![format!(
            "{} ({}), r {}, alpha {}, scale {}{dropout}",
            self.targets,
            human::counted(self.modules as u64, "module"),
            self.r,
            self.alpha,
            trim(self.scale),
        )]
    }

    fn parameters(&self) -> String {
        let (trainable, frozen) = (human::count(self.trainable), human::count(self.frozen));
        match self.trainable {
            0 => format!("none train, {frozen} frozen"),
            count => {
                let ratio = self.frozen as f64 / count as f64;
                format!("{trainable} train, {frozen} frozen: 1 in {ratio:.1}")
            }
        }
    }
}

impl DataSummary {
    fn sentences(&self) -> Vec<String> {
        let mut rows = format!(
            "{}: {} to train, {} to validate",
            self.name,
            human::counted(self.train_rows as u64, "row"),
            human::count(self.validation_rows as u64),
        );
        if self.too_long_rows > 0 {
            rows += &format!(
                ", {} left out (more than {} tokens)",
                human::count(self.too_long_rows as u64),
                human::count(self.max_seq_len as u64),
            );
        }
        let mut sentences = vec![rows];
        if self.train_rows > 0 {
            let a_row = |tokens: u64| tokens as f64 / self.train_rows as f64;
            sentences.push(format!(
                "{:.1} tokens per example, the longest {}; the loss is on {:.1} of them",
                a_row(self.tokens),
                human::count(self.longest_row as u64),
                a_row(self.supervised_tokens),
            ));
        }
        sentences
    }
}

impl StepSummary {
    fn sentences(&self) -> Vec<String> {
        let rows = self.batch_size * self.gradient_accumulation_steps;
        let accumulation = match (self.merged_from, self.gradient_accumulation_steps) {
            (Some([steps, rows]), _) => {
                format!(" ({steps} x {rows}, {} computed together)", self.batch_size)
            }
            (None, 0 | 1) => String::new(),
            (None, steps) => format!(" ({steps} x {})", self.batch_size),
        };
        vec![
            format!(
                "{} of {}{accumulation}, {}",
                human::counted(self.total as u64, "step"),
                human::counted(rows as u64, "row"),
                match trim(self.epochs).as_str() {
                    "1" => "1 epoch".to_string(),
                    epochs => format!("{epochs} epochs"),
                },
            ),
            format!(
                "learning rate {}, {}",
                human::number(self.learning_rate),
                self.schedule
            ),
        ]
    }
}

/// Up to three decimals, none that say nothing.
fn trim(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn join(separator: &str, parts: &[&str]) -> String {
    let parts: Vec<&str> = parts
        .iter()
        .copied()
        .filter(|part| !part.is_empty())
        .collect();
    parts.join(separator)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn summary() -> RunSummary {
        RunSummary {
            name: "smollm2-fpb".into(),
            model: "SmolLM2-135M: 30 layers, hidden 576, vocabulary 49,152".into(),
            precision: "8-bit weights, f32 computation".into(),
            device: "CPU (2 threads)".into(),
            device_reason: "no GPU answered".into(),
            adapters: AdapterSummary {
                targets: "q_proj, k_proj, v_proj".into(),
                modules: 90,
                r: 8,
                alpha: 16.0,
                scale: 2.0,
                dropout: 0.0,
                trainable: 460_800,
                frozen: 134_515_008,
            },
            memory: vec![
                ("embedding".into(), 108 << 20),
                ("weights".into(), 114 << 20),
                ("moments".into(), 0),
            ],
            memory_there: String::new(),
            data: DataSummary {
                name: "fpb_train.jsonl".into(),
                train_rows: 2800,
                validation_rows: 300,
                too_long_rows: 2,
                max_seq_len: 512,
                tokens: 159_600,
                longest_row: 143,
                supervised_tokens: 6720,
            },
            steps: StepSummary {
                total: 175,
                epochs: 1.0,
                batch_size: 8,
                merged_from: None,
                gradient_accumulation_steps: 2,
                learning_rate: 2e-4,
                schedule: "cosine after 12 steps of warm-up".into(),
                logging_steps: 10,
            },
            output: "runs/smollm2-fpb".into(),
            warnings: vec![],
        }
    }

    #[test]
    fn the_summary_says_what_will_be_trained() {
        let text = summary().lines(Style::plain(), 80).join("\n");
        for part in [
            "smollm2-fpb",
            "30 layers",
            "CPU (2 threads): no GPU answered",
            "q_proj, k_proj, v_proj (90 modules), r 8, alpha 16, scale 2",
            "460,800 train, 134,515,008 frozen: 1 in 291.9",
            "about 222 MiB",
            "embedding 108 MiB, weights 114 MiB",
            "2,800 rows to train, 300 to validate, 2 left out",
            "57.0 tokens per example, the longest 143; the loss is on 2.4",
            "175 steps of 16 rows (2 x 8), 1 epoch",
            "learning rate 2e-4, cosine",
            "runs/smollm2-fpb",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        assert!(!text.contains("moments"), "a part of nothing is left out");
        let there = RunSummary {
            memory_there: "24.0 GiB".into(),
            ..summary()
        };
        let text = there.lines(Style::plain(), 80).join("\n");
        assert!(
            text.contains("about 222 MiB of 24.0 GiB at the peak"),
            "{text}"
        );
    }

    #[test]
    fn lines_keep_to_the_width() {
        let mut summary = summary();
        summary.warnings = vec!["a driver that imitates a GPU on the CPU ".repeat(5)];
        for width in [60, 80, 120] {
            for line in summary.lines(Style::plain(), width) {
                assert!(console::measure_text_width(&line) <= width, "{line}");
            }
        }
    }

    #[test]
    fn an_empty_summary_does_not_divide_by_zero() {
        let text = RunSummary::default().lines(Style::plain(), 0).join("\n");
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }
}
