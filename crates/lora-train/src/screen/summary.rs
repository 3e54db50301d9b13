//! The summary of a run before its first step.

use std::path::PathBuf;

use terminal::Style;
use terminal::{KEPT_SPACE, human, wrap};

/// The summary of a run before its first step. Plain data, which
/// [`on_start`](crate::TrainingCallback::on_start) receives.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunSummary {
    /// The run's name.
    pub name: String,
    /// The model and its shape: `SmolLM2-135M: 30 layers, hidden 576, vocabulary 49,152`.
    pub model: String,
    /// The types of weights and computation: `8-bit weights, f32 computation`.
    pub precision: String,
    /// The device.
    pub device: String,
    /// Why this device was selected.
    pub device_reason: String,
    /// The adapters.
    pub adapters: AdapterSummary,
    /// Predicted peak memory by part, in bytes, the most informative first.
    pub memory: Vec<(String, u64)>,
    /// The device's memory: `24.0 GiB`; empty if it is unknown.
    pub memory_there: String,
    /// The data.
    pub data: DataSummary,
    /// The steps.
    pub steps: StepSummary,
    /// The output folder.
    pub output: PathBuf,
    /// Notes to the user: a slow device, skipped examples, a renamed output folder.
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
    /// Numerator of the scale; `None` for a method without a scale.
    pub alpha: Option<f64>,
    /// The scale γ.
    pub scale: f64,
    /// Dropout on the adapters' input.
    pub dropout: f64,
    /// Trainable parameters.
    pub trainable: u64,
    /// Parameters of the base model.
    pub frozen: u64,
}

/// The examples of a run, without those that were too long.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DataSummary {
    /// The file.
    pub name: String,
    /// Examples to train on.
    pub train_rows: usize,
    /// Examples to validate on.
    pub validation_rows: usize,
    /// Examples that were skipped because they have more than `max_seq_len` tokens.
    pub too_long_rows: usize,
    /// The limit.
    pub max_seq_len: usize,
    /// Tokens of all training examples.
    pub tokens: u64,
    /// Tokens of the longest training example.
    pub longest_row: usize,
    /// Tokens of all training examples that are in the loss.
    pub supervised_tokens: u64,
}

/// The steps of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepSummary {
    /// Optimizer steps.
    pub total: usize,
    /// Passes over the training examples.
    pub epochs: f64,
    /// Examples per micro-batch.
    pub batch_size: usize,
    /// The configured micro-batches per step and examples per micro-batch, if some are computed together.
    pub merged_from: Option<[usize; 2]>,
    /// Micro-batches per step.
    pub gradient_accumulation_steps: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// The schedule: `cosine after 12 steps of warm-up`.
    pub schedule: String,
    /// Steps between two progress lines without a terminal.
    pub logging_steps: usize,
}

impl RunSummary {
    /// The lines to show, wrapped to `width` between words.
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
        let scale = self.alpha.map_or_else(String::new, |alpha| {
            format!(", alpha {alpha}, scale {}", trim(self.scale))
        });
        vec![format!(
            "{} ({}), r {}{scale}{dropout}",
            self.targets,
            human::counted(self.modules as u64, "module"),
            self.r,
        )]
    }

    fn parameters(&self) -> String {
        let (trainable, frozen) = (human::count(self.trainable), human::count(self.frozen));
        match self.trainable {
            0 => format!("none trainable, {frozen} frozen"),
            count => {
                let ratio = self.frozen as f64 / count as f64;
                format!("{trainable} trainable, {frozen} frozen (1 : {ratio:.1})")
            }
        }
    }
}

impl DataSummary {
    fn sentences(&self) -> Vec<String> {
        let mut examples = format!(
            "{}: {} training and {} validation examples",
            self.name,
            human::count(self.train_rows as u64),
            human::count(self.validation_rows as u64),
        );
        if self.too_long_rows > 0 {
            examples += &format!(
                ", {} skipped (more than {} tokens)",
                human::count(self.too_long_rows as u64),
                human::count(self.max_seq_len as u64),
            );
        }
        let mut sentences = vec![examples];
        if self.train_rows > 0 {
            let per_example = |tokens: u64| tokens as f64 / self.train_rows as f64;
            sentences.push(format!(
                "{:.1} tokens per example on average (max {}), {:.1} of them in the loss",
                per_example(self.tokens),
                human::count(self.longest_row as u64),
                per_example(self.supervised_tokens),
            ));
        }
        sentences
    }
}

impl StepSummary {
    fn sentences(&self) -> Vec<String> {
        let examples = self.batch_size * self.gradient_accumulation_steps;
        let accumulation = match (self.merged_from, self.gradient_accumulation_steps) {
            (Some([steps, each]), _) => {
                format!(" ({steps} x {each}, {} computed together)", self.batch_size)
            }
            (None, 0 | 1) => String::new(),
            (None, steps) => format!(" ({steps} x {})", self.batch_size),
        };
        vec![
            format!(
                "{} of {}{accumulation}, {}",
                human::counted(self.total as u64, "step"),
                human::counted(examples as u64, "example"),
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

/// Up to three decimals, without trailing zeros.
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
                alpha: Some(16.0),
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
        let text = summary().lines(Style::plain(), 100).join("\n");
        for part in [
            "smollm2-fpb",
            "30 layers",
            "CPU (2 threads): no GPU answered",
            "q_proj, k_proj, v_proj (90 modules), r 8, alpha 16, scale 2",
            "460,800 trainable, 134,515,008 frozen (1 : 291.9)",
            "about 222 MiB",
            "embedding 108 MiB, weights 114 MiB",
            "2,800 training and 300 validation examples, 2 skipped",
            "57.0 tokens per example on average (max 143), 2.4 of them in the loss",
            "175 steps of 16 examples (2 x 8), 1 epoch",
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
        summary.warnings = vec!["a driver that emulates a GPU on the CPU ".repeat(5)];
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
