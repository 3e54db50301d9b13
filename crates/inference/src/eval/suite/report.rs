//! The table of a suite: adapters and tasks.

use super::super::report::heading;
use super::results::{Averages, SuiteContender, SuiteResults, TaskScores};
use super::tasks::{Judged, of_name};
use data::PromptTemplate;
use terminal::Table;
use terminal::human;

/// Wider tables are shown with one line per task.
const WIDTH: usize = 100;

impl SuiteResults {
    /// For the screen: adapters × tasks, or tasks × adapters if that is too wide.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.heading(), String::new()];
        let table = self.table();
        let header = human::columns(
            &[vec![table.header.clone()], table.rows.clone()].concat(),
            &[],
        );
        let is_wide = header
            .iter()
            .any(|line| console::measure_text_width(line) > WIDTH);
        lines.extend(if is_wide {
            self.turned(table).lines()
        } else {
            table.lines()
        });
        lines
    }

    /// For a Markdown file.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "## Evaluation\n\n{}\n\n{}",
            self.heading(),
            self.table().markdown()
        );
        let commands: Vec<&str> = self.commands().collect();
        if !commands.is_empty() {
            text += &format!("\n```\n{}\n```\n", commands.join("\n"));
        }
        text
    }

    /// The commands for BERTScores that were not computed.
    pub fn commands(&self) -> impl Iterator<Item = &str> {
        let scores = self
            .contenders
            .iter()
            .flat_map(|contender| &contender.tasks);
        let open = scores.filter(|task| task.bert_score.is_none());
        open.filter_map(|task| task.bert_score_command.as_deref())
    }

    fn heading(&self) -> String {
        heading(
            &self.model,
            self.quant_bits,
            &self.device,
            &self.prompt_template,
        )
    }

    fn table(&self) -> Table {
        let tasks = self.tasks.iter().map(|task| task.task);
        let header: Vec<&str> = ["", "scorer"]
            .into_iter()
            .chain(tasks)
            .chain(["average"])
            .collect();
        let title = "FinLoRA's tasks: accuracy in % / weighted F1; for texts - / BERTScore F1";
        let mut table = Table::new(title, &header);
        table.words = vec![1];
        let rows = self.tasks.iter().map(|task| human::count(task.rows as u64));
        let mut first = vec!["examples".to_string(), String::new()];
        first.extend(rows.chain([String::new()]));
        table.rows.push(first);
        for contender in &self.contenders {
            table
                .rows
                .extend([contender.finlora_row(), contender.strict_row()]);
        }
        table.notes = self.notes();
        table
    }

    /// The table with one line per task and one column per adapter and scorer.
    fn turned(&self, table: Table) -> Table {
        let heading = |row: &Vec<String>| format!("{} {}", row[0], row[1]).trim().to_string();
        let mut header = vec![String::new()];
        header.extend(table.rows.iter().map(heading));
        let rows = (2..table.header.len()).map(|column| {
            let cells = table.rows.iter().map(|row| row[column].clone());
            [table.header[column].clone()]
                .into_iter()
                .chain(cells)
                .collect()
        });
        Table {
            rows: rows.collect(),
            header,
            words: Vec::new(),
            ..table
        }
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            "finlora: correct if the first of the file's targets that occurs in the answer is the example's target, ignoring case; strict: \
             correct if the answer equals the target, ignoring surrounding white space"
                .to_string(),
            self.note_of_average(),
        ];
        notes.extend(self.left_out.iter().cloned());
        if self.prompt_template != PromptTemplate::Raw.to_string() {
            notes.push(format!(
                "FinLoRA's own evaluation uses the contexts without a template (--template raw --force); here they are in the \
                 prompt template {}",
                self.prompt_template
            ));
        }
        for task in &self.tasks {
            let rows = |count: usize| human::counted(count as u64, "example");
            if task.too_long > 0 {
                notes.push(format!(
                    "{}: {} skipped, longer than the model's positions",
                    task.task,
                    rows(task.too_long)
                ));
            }
            if task.without_mark > 0 {
                notes.push(format!(
                    "{}: {} without \"Answer:\"; the answer is the generated text, while FinLoRA would also search the prompt",
                    task.task,
                    rows(task.without_mark)
                ));
            }
            if task.targets_reread {
                notes.push(format!(
                    "{}: every target is a number, and FinLoRA reads them through pandas, which changes the form of some \
                     (\"finlora_target\" in the answers); strict compares the targets of the file",
                    task.task
                ));
            }
        }
        notes
    }

    fn note_of_average(&self) -> String {
        let texts = self.tasks.iter().map(|task| task.task);
        let is_text = |name: &&str| of_name(name).is_some_and(|task| task.judged == Judged::Text);
        let texts: Vec<&str> = texts.filter(is_text).collect();
        let computed = self.commands().next().is_none();
        let texts = match (texts.is_empty(), computed) {
            (true, _) => String::new(),
            (false, true) => format!(
                "; the accuracy of {} is 100 · BERTScore F1",
                texts.join(" and ")
            ),
            (false, false) => format!(
                "; without {}, whose BERTScore was not computed",
                texts.join(" and ")
            ),
        };
        format!(
            "average: mean accuracy of the tasks (FinLoRA's Overall Average) / mean weighted F1{texts}"
        )
    }
}

impl SuiteContender {
    fn finlora_row(&self) -> Vec<String> {
        let cell = |task: &TaskScores| match (&task.finlora, &task.bert_score) {
            (Some(scores), _) => cell(Some(scores.accuracy), Some(scores.weighted_f1)),
            (None, Some(score)) => cell(None, Some(score.f1)),
            (None, None) => cell(None, None),
        };
        let Averages {
            overall,
            finlora_weighted_f1,
            ..
        } = self.average;
        self.row("finlora", cell, (overall, finlora_weighted_f1))
    }

    fn strict_row(&self) -> Vec<String> {
        let cell = |task: &TaskScores| {
            let scores = task.strict.as_ref();
            cell(
                scores.map(|scores| scores.accuracy),
                scores.map(|scores| scores.weighted_f1),
            )
        };
        let Averages {
            strict_accuracy,
            strict_weighted_f1,
            ..
        } = self.average;
        self.row("strict", cell, (strict_accuracy, strict_weighted_f1))
    }

    fn row(
        &self,
        scorer: &str,
        of_task: impl Fn(&TaskScores) -> String,
        (accuracy, f1): (Option<f64>, Option<f64>),
    ) -> Vec<String> {
        let mut row = vec![self.name.clone(), scorer.into()];
        row.extend(self.tasks.iter().map(of_task));
        row.push(cell(accuracy, f1));
        row
    }
}

/// `71.67 / 0.702`.
fn cell(accuracy: Option<f64>, f1: Option<f64>) -> String {
    let accuracy = accuracy.map(|accuracy| format!("{:.2}", 100.0 * accuracy));
    let f1 = f1.map(|f1| format!("{f1:.3}"));
    let or_none = |number: Option<String>| number.unwrap_or_else(|| "-".into());
    format!("{} / {}", or_none(accuracy), or_none(f1))
}

#[cfg(test)]
mod tests {
    use super::super::results::TaskResults;
    use super::super::results::tests::scores;
    use super::*;

    fn results(names: &[&str]) -> SuiteResults {
        let tasks = scores();
        let of_task = |scores: &TaskScores| TaskResults {
            task: scores.task,
            file: "file",
            rows: 2,
            answers: 2,
            too_long: 0,
            max_new_tokens: 10,
            without_mark: 0,
            targets_reread: false,
        };
        let contender = |name: &&str| SuiteContender {
            name: name.to_string(),
            adapter: None,
            average: Averages::of(&tasks),
            tasks: tasks.clone(),
        };
        SuiteResults {
            suite: "finlora",
            model: "m".into(),
            quant_bits: 16,
            device: "CPU".into(),
            prompt_template: "raw".into(),
            seed: 42,
            data_dir: "data".into(),
            missing: Vec::new(),
            ignored: Vec::new(),
            left_out: vec!["ner is skipped".into()],
            contenders: names.iter().map(contender).collect(),
            tasks: tasks.iter().map(of_task).collect(),
        }
    }

    #[test]
    fn a_row_has_every_task_and_the_average() {
        let text = results(&["base", "a|b"]).markdown();
        for line in [
            "|  | scorer | fpb | tfns | xbrl_term | average |",
            "| examples |  | 2 | 2 | 2 |  |",
            "| base | finlora | 50.00 / 0.500 | 100.00 / 1.000 | - / 0.600 | 70.00 / 0.750 |",
            "| a\\|b | strict | 0.00 / 0.000 | 100.00 / 1.000 | - / - | 50.00 / 0.500 |",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(
            text.contains("the accuracy of xbrl_term is 100 · BERTScore F1"),
            "{text}"
        );
        assert!(!text.contains("```"), "{text}");
    }

    #[test]
    fn what_is_open_or_unlike_finlora_is_noted() {
        let mut results = results(&["base"]);
        results.contenders[0].tasks[2].bert_score = None;
        results.prompt_template = "inst".into();
        results.tasks[0].too_long = 1;
        results.tasks[1].without_mark = 2;
        results.tasks[1].targets_reread = true;
        let text = results.markdown();
        for part in [
            "without xbrl_term, whose BERTScore was not computed",
            "```\nbert-score …\n```",
            "--template raw --force",
            "fpb: 1 example skipped",
            "tfns: 2 examples without \"Answer:\"",
            "tfns: every target is a number",
            "ner is skipped",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn a_screen_that_is_too_narrow_gets_a_line_for_each_task() {
        let narrow = results(&["base"]).lines().join("\n");
        assert!(narrow.contains("base      finlora"), "{narrow}");
        let names = ["base", "a_long_name_of_an_adapter", "another"];
        let mut wide = results(&names);
        for name in ["x", "y", "z"] {
            let mut more = scores();
            wide.tasks.extend(results(&names).tasks);
            for contender in &mut wide.contenders {
                contender.tasks.append(&mut more.clone());
            }
            more[0].task = name;
        }
        let lines = wide.lines();
        assert!(
            lines.iter().any(|line| line.contains("another strict")),
            "{lines:?}"
        );
        assert!(lines.iter().any(|line| line.starts_with("  average")));
    }
}
