//! Every model answers every task; scores, files, the table.

use std::collections::BTreeMap;
use std::path::PathBuf;

use llama_burn::Llama;

use super::super::answering::Answer;
use super::super::command::{EvalArgs, Writer, answers_of};
use super::super::error::EvalError;
use super::bert_score::BertScoreFiles;
use super::questions::Asked;
use super::results::{Averages, SuiteContender, SuiteResults, TaskScores};
use super::score::{finlora_scores, strict_scores};
use super::tasks::Judged;
use crate::model::Inference;
use durable::write_atomically;
use terminal::Screen;

/// A running evaluation.
pub struct Run<'a> {
    args: &'a EvalArgs,
    screen: &'a Screen,
    inference: &'a Inference,
    asked: &'a [Asked],
    results: SuiteResults,
    /// Each task's answers, as JSON lines.
    written: BTreeMap<&'static str, String>,
    /// Files for BERTScore, with the indices of contender and task in the results.
    bert_scores: Vec<(usize, usize, BertScoreFiles)>,
}

impl<'a> Run<'a> {
    /// A run without answers; `results` describes the tasks.
    pub fn new(
        args: &'a EvalArgs,
        screen: &'a Screen,
        inference: &'a Inference,
        asked: &'a [Asked],
        results: SuiteResults,
    ) -> Self {
        Self {
            args,
            screen,
            inference,
            asked,
            results,
            written: BTreeMap::new(),
            bert_scores: Vec::new(),
        }
    }

    /// Answers every task with a model. Answers are written after each task and scores after each
    /// model, so that an interrupted run leaves its results so far.
    ///
    /// # Errors
    ///
    /// A device that fails, a file that cannot be written.
    pub fn contender(
        &mut self,
        name: &str,
        adapter: Option<PathBuf>,
        model: &Llama,
    ) -> Result<(), EvalError> {
        let asked = self.asked;
        let mut tasks = Vec::with_capacity(asked.len());
        for asked in asked {
            let writer = Writer {
                model,
                name,
                writes: true,
                compares: false,
            };
            let (answers, seconds) = answers_of(
                self.args,
                self.inference,
                &writer,
                (&asked.task, &asked.tokenizer),
                self.screen,
            )?;
            self.keep(asked, name, &answers)?;
            let scores = self.scores(asked, name, &answers, seconds, tasks.len())?;
            tasks.push(scores);
        }
        self.results.contenders.push(SuiteContender {
            name: name.into(),
            adapter,
            average: Averages::of(&tasks),
            tasks,
        });
        self.write()
    }

    fn scores(
        &mut self,
        asked: &Asked,
        name: &str,
        answers: &[Answer],
        seconds: f64,
        task: usize,
    ) -> Result<TaskScores, EvalError> {
        let targets: Vec<&str> = asked.targets.iter().map(|it| it.finlora.as_str()).collect();
        let texts: Vec<&str> = asked.targets.iter().map(|it| it.text.as_str()).collect();
        let finlora: Vec<&str> = answers.iter().map(|it| it.finlora.as_str()).collect();
        let written: Vec<&str> = answers.iter().map(|it| it.written.as_str()).collect();
        let mut scores = TaskScores {
            task: asked.suite.name,
            seconds,
            finlora: None,
            strict: None,
            bert_score: None,
            bert_score_command: None,
        };
        if asked.suite.judged == Judged::Text {
            let contender = self.results.contenders.len();
            let file = file_name(name, contender);
            let folder = self.args.output.join("bertscore");
            let files =
                BertScoreFiles::write(&folder, asked.suite.name, &file, &targets, &finlora)?;
            scores.bert_score_command = Some(files.command());
            self.bert_scores.push((contender, task, files));
        } else {
            scores.finlora = Some(finlora_scores(&targets, &finlora));
            scores.strict = Some(strict_scores(&texts, &written));
        }
        Ok(scores)
    }

    fn keep(&mut self, asked: &Asked, name: &str, answers: &[Answer]) -> Result<(), EvalError> {
        let out = self.written.entry(asked.suite.name).or_default();
        for (target, answer) in asked.targets.iter().zip(answers) {
            let line = serde_json::json!({
                "task": asked.suite.name, "line": target.line, "item": target.item, "contender": name,
                "target": target.text, "finlora_target": target.finlora,
                "written": answer.written, "answer": answer.finlora,
            });
            *out += &format!("{line}\n");
        }
        let file = format!("answers/{}.jsonl", asked.suite.name);
        Ok(write_atomically(
            &self.args.output.join(file),
            out.as_bytes(),
        )?)
    }

    /// Runs the program for BERTScore if it was requested, writes all files and shows the table.
    ///
    /// # Errors
    ///
    /// A file that cannot be written; a program for BERTScore that fails, after everything else is
    /// written.
    pub fn finish(mut self) -> Result<(), EvalError> {
        let scored = self.bert_scores();
        self.write()?;
        self.show();
        scored
    }

    fn bert_scores(&mut self) -> Result<(), EvalError> {
        let Some(python) = &self.args.bertscore else {
            return Ok(());
        };
        for (contender, task, files) in &self.bert_scores {
            let contender = &mut self.results.contenders[*contender];
            let task = &mut contender.tasks[*task];
            let progress = self.screen.task(&contender.name, 1);
            let score = files.run(python);
            let score = score.map_err(|source| EvalError::NoBertScore {
                output: self.args.output.clone(),
                source,
            })?;
            progress.done(&format!("BERTScore of {}: F1 {:.3}", task.task, score.f1));
            task.bert_score = Some(score);
            contender.average = Averages::of(&contender.tasks);
        }
        Ok(())
    }

    fn write(&self) -> Result<(), EvalError> {
        let path = |name: &str| self.args.output.join(name);
        let json = serde_json::to_string_pretty(&self.results)?;
        write_atomically(&path("results.json"), format!("{json}\n").as_bytes())?;
        write_atomically(&path("results.md"), self.results.markdown().as_bytes())?;
        Ok(())
    }

    fn show(&self) {
        for line in self.results.lines() {
            self.screen.line(&line);
        }
        let commands: Vec<&str> = self.results.commands().collect();
        if !commands.is_empty() {
            self.screen.line("");
            self.screen
                .line("BERTScore (pip install bert-score; or --bertscore PYTHON):");
            for command in commands {
                self.screen.line(&format!("  {command}"));
            }
        }
        self.screen.line("");
        self.screen.line(&format!(
            "written: {}, results.md, answers/",
            self.args.output.join("results.json").display()
        ));
    }
}

/// A contender's name as a part of a file name; its number keeps the names distinct.
fn file_name(name: &str, number: usize) -> String {
    let is_plain = |character: char| character.is_alphanumeric() || "._-".contains(character);
    if name.chars().all(is_plain) {
        name.into()
    } else {
        let plain = name.replace(|character| !is_plain(character), "_");
        format!("{plain}-{number}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_as_a_name_stays_in_the_folder() {
        assert_eq!(file_name("fpb-8bits.r8", 1), "fpb-8bits.r8");
        assert_eq!(file_name("../a/x", 2), ".._a_x-2");
        assert_ne!(file_name("a/x", 1), file_name("a_x", 2));
        assert_ne!(file_name("a/x", 1), file_name("a x", 2));
    }
}
