//! The tables of an evaluation, for the screen and for Markdown.

use super::metrics::{LabelScores, Scores};
use super::results::{Contender, Difference, FileResults, Results, Scorer};
use terminal::Table;
use terminal::human;

/// For more labels than this, the table of labels is only in the file of results.
const MOST_SHOWN: usize = 20;

impl Results {
    /// For the screen.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.heading()];
        for table in self.tables() {
            lines.push(String::new());
            lines.extend(table.lines());
        }
        lines
    }

    /// For a Markdown file.
    pub fn markdown(&self) -> String {
        let mut text = format!("## Evaluation\n\n{}\n", self.heading());
        for table in self.tables() {
            text += &format!("\n{}", table.markdown());
        }
        text
    }

    fn heading(&self) -> String {
        heading(
            &self.model,
            self.quant_bits,
            &self.device,
            &self.prompt_template,
        )
    }

    fn tables(&self) -> Vec<Table> {
        let mut tables = Vec::new();
        for file in &self.files {
            tables.push(file.overview());
            for contender in &file.contenders {
                for (scorer, verdict) in &contender.scores {
                    let labels = verdict.scores.labels.as_ref();
                    if let Some(labels) = labels.filter(|_| file.shows_labels()) {
                        let title = format!("{}, {}", contender.name, scorer.word());
                        tables.push(of_labels(title, labels));
                    }
                }
            }
        }
        tables
    }
}

/// The line above the tables: model, device and prompt template.
pub(super) fn heading(model: &str, quant_bits: u8, device: &str, template: &str) -> String {
    let bits = match quant_bits {
        16 => "not quantized".to_string(),
        bits => format!("{bits} bits"),
    };
    format!("{model}, {bits}, {device}; prompt template {template}")
}

impl FileResults {
    fn shows_labels(&self) -> bool {
        !self.labels.is_empty() && self.labels.len() <= MOST_SHOWN
    }

    /// All models side by side.
    fn overview(&self) -> Table {
        let mut title = format!(
            "{}: {}",
            self.path.display(),
            human::counted(self.rows as u64, "example")
        );
        if self.answers != self.rows {
            title += &format!(" with {}", human::counted(self.answers as u64, "answer"));
        }
        title += &match self.labels.len() {
            0 => format!(", free text ({})", self.format),
            1..=MOST_SHOWN => format!(", labels {} ({})", self.labels.join(", "), self.format),
            count => format!(", {count} labels ({})", self.format),
        };
        let header = [
            "",
            "scorer",
            "accuracy",
            "95 %",
            "macro F1",
            "weighted F1",
            "no label",
            "difference",
            "p",
        ];
        let mut table = Table::new(title, &header);
        table.words = vec![1];
        if let Some(majority) = &self.majority {
            let mut row = vec![String::new(); header.len()];
            row[0] = format!("always {}", shortened(&majority.label));
            row[2] = human::percent(majority.accuracy);
            table.rows.push(row);
        }
        for scorer in Scorer::ALL {
            for contender in &self.contenders {
                if let Some(verdict) = contender.scores.get(&scorer) {
                    let difference = self.against_first(contender, scorer);
                    table
                        .rows
                        .push(overview_row(contender, scorer, &verdict.scores, difference));
                }
            }
        }
        table.notes = self.notes();
        table
    }

    /// The contender compared with the first one; `None` for the first.
    fn against_first(&self, contender: &Contender, scorer: Scorer) -> Option<&Difference> {
        let first = &self.contenders.first()?.name;
        let mut all = self.differences.iter();
        all.find(|it| it.scorer == scorer && it.first == *first && it.second == contender.name)
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for contender in &self.contenders {
            let finlora = contender.scores.get(&Scorer::Finlora);
            if let Some(theirs) = finlora.and_then(|verdict| verdict.finlora_weighted_f1) {
                notes.push(format!(
                    "{}: weighted F1 as computed by FinLoRA {theirs:.3}",
                    contender.name
                ));
            }
        }
        if let Some(first) = self
            .contenders
            .first()
            .filter(|_| self.contenders.len() > 1)
        {
            notes.push(format!(
                "difference: accuracy above that of {}, in percentage points; p: exact McNemar test on the same examples, two-sided",
                first.name
            ));
        }
        for difference in &self.differences {
            let first = self.contenders.first();
            if first.is_some_and(|first| first.name != difference.first) {
                notes.push(format!(
                    "{}, {} over {}: {} points, p {}",
                    difference.scorer.word(),
                    difference.second,
                    difference.first,
                    points(difference.accuracy),
                    p_value(difference.test.p_value),
                ));
            }
        }
        if self.too_long > 0 {
            notes.push(format!(
                "{} skipped: longer than the model's positions",
                human::counted(self.too_long as u64, "example")
            ));
        }
        notes
    }
}

fn overview_row(
    contender: &Contender,
    scorer: Scorer,
    scores: &Scores,
    difference: Option<&Difference>,
) -> Vec<String> {
    let [low, high] = scores.interval;
    let f1 = |f1: fn(&LabelScores) -> f64| {
        scores
            .labels
            .as_ref()
            .map_or(String::new(), |labels| format!("{:.3}", f1(labels)))
    };
    let no_label = match scores.labels {
        Some(_) => human::count(scores.no_label as u64),
        None => String::new(),
    };
    vec![
        contender.name.clone(),
        scorer.word().into(),
        human::percent(scores.accuracy),
        format!("{:.1} to {:.1}", 100.0 * low, 100.0 * high),
        f1(|labels| labels.macro_f1),
        f1(|labels| labels.weighted_f1),
        no_label,
        difference.map_or(String::new(), |it| points(it.accuracy)),
        difference.map_or(String::new(), |it| p_value(it.test.p_value)),
    ]
}

/// Each label, and the answers to its examples.
fn of_labels(title: String, scores: &LabelScores) -> Table {
    let mut header = vec!["label", "precision", "recall", "F1", "support"];
    let answered: Vec<String> = if scores.confusion.is_empty() {
        Vec::new()
    } else {
        let labels = scores
            .each
            .iter()
            .map(|label| format!("→ {}", shortened(&label.label)));
        labels.chain(["→ no label".to_string()]).collect()
    };
    header.extend(answered.iter().map(String::as_str));
    let mut table = Table::new(title, &header);
    for (index, label) in scores.each.iter().enumerate() {
        let mut row = vec![
            shortened(&label.label),
            format!("{:.3}", label.precision),
            format!("{:.3}", label.recall),
            format!("{:.3}", label.f1),
            human::count(label.support as u64),
        ];
        let counts = scores.confusion.get(index).into_iter().flatten();
        row.extend(counts.map(|count| human::count(*count as u64)));
        table.rows.push(row);
    }
    table
}

/// A label in a table: one line, not too long.
fn shortened(label: &str) -> String {
    const CHARACTERS: usize = 24;
    let label = label.replace(char::is_control, " ");
    match label.char_indices().nth(CHARACTERS) {
        None => label,
        Some((end, _)) => format!("{}…", &label[..end]),
    }
}

fn points(share: f64) -> String {
    format!("{:+.1}", 100.0 * share)
}

fn p_value(p: f64) -> String {
    match p {
        p if p < 1e-3 => format!("{p:.0e}"),
        p => format!("{p:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::metrics::{correct, score_labels};
    use super::super::results::{Majority, Verdict};
    use super::*;

    fn contender(name: &str, answers: &[Option<usize>]) -> Contender {
        let labels = ["bad", "go|od"].map(String::from);
        let targets = [0, 0, 1, 1];
        let verdict = Verdict {
            scores: score_labels(&targets, answers, &labels),
            finlora_weighted_f1: Some(0.25),
            correct: correct(&targets, answers),
        };
        Contender {
            name: name.into(),
            adapter: None,
            seconds: 1.0,
            scores: BTreeMap::from([(Scorer::Finlora, verdict)]),
        }
    }

    fn results() -> Results {
        let mut file = FileResults {
            path: "fpb.jsonl".into(),
            format: "JSON lines".into(),
            rows: 4,
            answers: 4,
            too_long: 2,
            labels: ["bad", "go|od"].map(String::from).to_vec(),
            max_new_tokens: 10,
            majority: Some(Majority {
                label: "bad".into(),
                accuracy: 0.5,
            }),
            contenders: Vec::new(),
            differences: Vec::new(),
        };
        file.add(contender("base", &[None, Some(0), None, Some(0)]));
        file.add(contender("one", &[Some(0), Some(0), Some(1), Some(0)]));
        file.add(contender("two", &[Some(0); 4]));
        Results {
            model: "m".into(),
            quant_bits: 8,
            device: "CPU".into(),
            prompt_template: "raw".into(),
            seed: 42,
            files: vec![file],
        }
    }

    #[test]
    fn everyone_stands_beside_the_first_with_difference_and_significance() {
        let lines = results().lines();
        let line = |part: &str| {
            let found = lines.iter().find(|line| line.contains(part));
            found
                .unwrap_or_else(|| panic!("{part:?} in\n{}", lines.join("\n")))
                .clone()
        };
        let row = |name: &str| line(&format!("  {name:<10}  finlora"));
        assert!(line("always bad").contains("50.0 %"));
        assert!(row("base").contains("25.0 %"));
        let one = row("one");
        assert!(
            one.contains("75.0 %") && one.contains("+50.0") && one.ends_with("0.500"),
            "{one}"
        );
        line("finlora, two over one: -25.0 points, p 1.000");
        line("2 examples skipped");
        line("weighted F1 as computed by FinLoRA 0.250");
        line("→ no label");
    }

    #[test]
    fn markdown_holds_the_same_and_keeps_its_cells() {
        let text = results().markdown();
        assert!(
            text.starts_with("## Evaluation\n\nm, 8 bits, CPU; prompt template raw\n"),
            "{text}"
        );
        assert!(text.contains("| one | finlora | 75.0 % |"), "{text}");
        assert!(text.contains("| go\\|od |"), "{text}");
    }

    #[test]
    fn a_label_of_any_length_and_content_stays_in_its_line() {
        assert_eq!(shortened("a\nb"), "a b");
        assert_eq!(shortened(&"ü".repeat(30)).chars().count(), 25);
        assert_eq!(
            (p_value(0.04), p_value(3.2e-9)),
            ("0.040".into(), "3e-9".into())
        );
    }
}
