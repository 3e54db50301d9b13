//! `trainer eval --suite finlora`: arguments, files, models, in the order of a run.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use llama_burn::Llama;

use super::super::answering::{Answer, AnsweringError};
use super::super::command::{EvalArgs, Writer, answers_of, dated, row_tokenizer, template};
use super::super::command::{check, training_prompts};
use super::super::named::{BASE, NamedAdapter, named};
use super::base_model;
use super::bert_score::{self, BertScoreFiles};
use super::folder::Folder;
use super::questions::{Asked, Sample};
use super::results::{Averages, SuiteContender, SuiteResults, TaskScores};
use super::score::{finlora_scores, strict_scores};
use super::tasks::Judged;
use crate::hub;
use crate::inference::{Inference, ModelArgs};
use crate::output::write_atomically;
use crate::screen::Screen;

/// Runs the command.
///
/// # Errors
///
/// What is wrong with the arguments, the files, the model or an adapter; a program for BERTScore that fails, once
/// everything else is written.
pub fn run(args: &EvalArgs, screen: &Screen) -> anyhow::Result<()> {
    check(args)?;
    let data_dir = args.data_dir.as_deref().unwrap_or(Path::new("."));
    // Before the weights are loaded, so that a mistake costs nothing.
    let folder = Folder::read(data_dir, &args.tasks)?;
    let adapters = named(&args.adapter)?;
    let folders = adapters.iter().map(|it| hub::adapter_folder(&it.folder));
    let folders: Vec<PathBuf> = folders.collect::<Result<_, _>>()?;
    let prompts = training_prompts(&folders)?;
    let template = template(args, &prompts)?;
    let stated = base_model::stated(&adapters, &folders)?;
    let model = base_model::choose(&args.model.model, &adapters, &stated)?;
    if let Some(python) = &args.bertscore {
        bert_score::check(python)?;
    }
    let drawn = (args.rows, args.seed);
    let samples = folder.tasks.iter();
    let samples = samples.map(|(suite, path)| Sample::read(suite, path, drawn));
    let samples: Vec<Sample> = samples.collect::<Result<_, _>>()?;
    for note in folder.notes() {
        screen.note(&note);
    }
    if model != args.model.model {
        screen.note(&format!("base model: {model}, named by the adapters"));
    }
    for note in base_model::notes(&model, &adapters, &stated) {
        screen.note(&note);
    }

    let model_args = ModelArgs {
        model: model.clone(),
        ..args.model.clone()
    };
    let loaded = Inference::load(&model_args, screen);
    let inference = match model == args.model.model {
        true => loaded?,
        false => loaded.with_context(|| {
            format!(
                "{model:?} is the base model that the adapters name; where it is another folder, give that with --model"
            )
        })?,
    };
    // Each is put on once before anything is asked: one that does not fit must not be found out hours later.
    for (adapter, folder) in adapters.iter().zip(&folders) {
        let fits = inference.with_adapter(folder);
        fits.with_context(|| format!("--adapter {}", adapter.name))?;
    }
    let files = &dated(&inference.files, &prompts);
    let shape = (
        inference.config.vocab_size,
        inference.config.max_position_embeddings,
    );
    let mut asked = Vec::new();
    let mut left_out = Vec::new();
    for sample in &samples {
        let format = sample.rows.source.format;
        let tokenizer = row_tokenizer(args, files, &template, &prompts, (&sample.path, format))?;
        match Asked::new(sample, tokenizer, shape) {
            Ok(questions) => asked.push(questions),
            // A table of the other tasks is worth more than none.
            Err(error @ AnsweringError::AllTooLong { .. }) if samples.len() > 1 => {
                let note = format!("{} is left out: {error}", sample.suite.name);
                screen.note(&note);
                left_out.push(note);
            }
            Err(error) => return Err(error.into()),
        }
    }
    if asked.is_empty() {
        bail!("no task is left to evaluate:\n{}", left_out.join("\n"));
    }

    let results = SuiteResults {
        suite: "finlora",
        model,
        quant_bits: args.model.quant_bits,
        device: inference.selected.name.clone(),
        prompt_template: template.to_string(),
        seed: args.seed,
        data_dir: data_dir.into(),
        missing: folder.missing,
        ignored: folder.ignored,
        left_out,
        tasks: asked.iter().map(Asked::results).collect(),
        contenders: Vec::new(),
    };
    let mut suite = Run {
        args,
        screen,
        inference: &inference,
        asked: &asked,
        results,
        written: BTreeMap::new(),
        bert_scores: Vec::new(),
    };
    if !args.no_base {
        suite.contender(BASE, None, &inference.base)?;
    }
    for (NamedAdapter { name, folder }, path) in adapters.iter().zip(&folders) {
        let model = inference.with_adapter(path)?.1;
        suite.contender(name, Some(folder.clone()), &model)?;
    }
    let scored = suite.bert_scores();
    suite.write()?;
    suite.show();
    scored
}

/// A run under way.
struct Run<'a> {
    args: &'a EvalArgs,
    screen: &'a Screen,
    inference: &'a Inference,
    asked: &'a [Asked],
    results: SuiteResults,
    /// Each task's answers, as lines of JSON.
    written: BTreeMap<&'static str, Vec<u8>>,
    /// Files for BERTScore, with the places of contender and task in the results.
    bert_scores: Vec<(usize, usize, BertScoreFiles)>,
}

impl Run<'_> {
    /// Has a model answer every task. The files are written after each model, so that a run that is cut off leaves
    /// what it had.
    fn contender(
        &mut self,
        name: &str,
        adapter: Option<PathBuf>,
        model: &Llama,
    ) -> anyhow::Result<()> {
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
    ) -> anyhow::Result<TaskScores> {
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

    fn keep(&mut self, asked: &Asked, name: &str, answers: &[Answer]) -> anyhow::Result<()> {
        let out = self.written.entry(asked.suite.name).or_default();
        for (target, answer) in asked.targets.iter().zip(answers) {
            let line = serde_json::json!({
                "task": asked.suite.name, "line": target.line, "item": target.item, "contender": name,
                "target": target.text, "finlora_target": target.finlora,
                "written": answer.written, "answer": answer.finlora,
            });
            writeln!(out, "{line}")?;
        }
        Ok(())
    }

    /// Runs the program for BERTScore, where that was asked for.
    fn bert_scores(&mut self) -> anyhow::Result<()> {
        let Some(python) = &self.args.bertscore else {
            return Ok(());
        };
        for (contender, task, files) in &self.bert_scores {
            let contender = &mut self.results.contenders[*contender];
            let task = &mut contender.tasks[*task];
            let progress = self.screen.task(&contender.name, 1);
            let score = files.run(python);
            let score = score.with_context(|| {
                let output = self.args.output.display();
                format!(
                    "the answers and all other scores are in {output}; BERTScore was not computed"
                )
            })?;
            progress.done(&format!("BERTScore of {}: F1 {:.3}", task.task, score.f1));
            task.bert_score = Some(score);
            contender.average = Averages::of(&contender.tasks);
        }
        Ok(())
    }

    fn write(&self) -> anyhow::Result<()> {
        let path = |name: &str| self.args.output.join(name);
        for (task, lines) in &self.written {
            write_atomically(&path(&format!("answers/{task}.jsonl")), lines)?;
        }
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

/// A contender's name as a part of a file's; its number tells apart what would be the same.
fn file_name(name: &str, number: usize) -> String {
    let is_plain = |character: char| character.is_alphanumeric() || "._-".contains(character);
    match name.chars().all(is_plain) {
        true => name.into(),
        false => {
            let plain = name.replace(|character| !is_plain(character), "_");
            format!("{plain}-{number}")
        }
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
