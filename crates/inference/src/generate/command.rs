//! `trainer generate`: one prompt, a file of prompts, or prompts from the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use llama_burn::Llama;
use serde::Serialize;

use super::error::GenerateCommandError;
use super::{Finish, Generator, Limits, Sampling, Timing};
use crate::model::{Inference, ModelArgs};
use data::PromptTemplate;
use data::{ModelFiles, RowTokenizer, TrainingPrompt};
use device::KernelArgs;
use terminal::Screen;
use terminal::human;

/// The command's arguments.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A PEFT adapter: a folder or a name on the Hub
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Merge the adapter into the weights first, instead of computing it separately
    #[arg(long, requires = "adapter")]
    merge: bool,
    /// Merge although too little of the adapter survives when the weights are quantized again
    #[arg(long, requires = "merge")]
    force: bool,
    /// Continue this text. Without --prompt and --prompts, prompts are read from standard input
    #[arg(long, value_name = "TEXT", conflicts_with = "prompts")]
    prompt: Option<String>,
    /// One prompt per line; in a .jsonl file the "prompt" or "context" of each line
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// The file for the answers to --prompts, as JSON lines [default: standard output]
    #[arg(long, value_name = "FILE", requires = "prompts")]
    output: Option<PathBuf>,
    /// raw, inst, chat, or custom: followed by a text around {context} [default: chat if the model has a
    /// chat template, else raw]
    #[arg(long, value_name = "NAME")]
    template: Option<PromptTemplate>,
    /// Prompts per batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch_size: usize,
    #[command(flatten)]
    writing: Writing,
}

impl GenerateArgs {
    /// Switches of the GPU's kernels.
    pub fn kernels(&self) -> KernelArgs {
        self.model.kernels.clone()
    }
}

/// How a text is generated.
#[derive(Debug, Clone, Args)]
struct Writing {
    /// The maximum number of new tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 always takes the most likely token (greedy); higher values give more varied texts
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    temperature: f64,
    /// Sample from the K most likely tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Sample from the most likely tokens that together have this probability; 1 for all
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    top_p: f64,
    /// Above 1, tokens that already occurred become less likely
    #[arg(
        long,
        value_name = "R",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    repetition_penalty: f64,
    /// The seed for sampling
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// End the text before this stop string; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl Writing {
    fn sampling(&self) -> Result<Sampling, GenerateCommandError> {
        let finite = |x: f64| x.is_finite() && x >= 0.0;
        if !finite(self.temperature) {
            return Err(GenerateCommandError::Temperature(self.temperature));
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return Err(GenerateCommandError::TopP(self.top_p));
        }
        if !finite(self.repetition_penalty) || self.repetition_penalty == 0.0 {
            return Err(GenerateCommandError::RepetitionPenalty(
                self.repetition_penalty,
            ));
        }
        if self.temperature == 0.0 && (self.top_k > 0 || self.top_p < 1.0) {
            log::warn!(
                "--top-k and --top-p have no effect at temperature 0, which takes the most likely token"
            );
        }
        Ok(Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        })
    }
}

/// Runs the command.
///
/// # Errors
///
/// An error of the arguments, the model, the adapter or the prompts.
pub fn run(args: &GenerateArgs, screen: &Screen) -> Result<(), GenerateCommandError> {
    let sampling = args.writing.sampling()?;
    if args.batch_size == 0 {
        return Err(GenerateCommandError::BatchSize);
    }
    if args.writing.stop.iter().any(String::is_empty) {
        return Err(GenerateCommandError::EmptyStop);
    }
    // Before the weights are loaded, so that a mistake costs nothing.
    let prompts = args.prompts.as_deref().map(read_prompts).transpose()?;
    let inference = Inference::load(&args.model, screen)?;
    let model = match &args.adapter {
        None => inference.base.clone(),
        Some(folder) => {
            let (_, model) = inference.with_adapter(folder)?;
            if args.merge {
                merged(&inference, model, args.force)?
            } else {
                model
            }
        }
    };
    let template = match &args.template {
        Some(template) => template.clone(),
        None if inference.files.has_chat_template() => PromptTemplate::Chat,
        None => PromptTemplate::Raw,
    };
    let trained = args.adapter.as_deref().map(TrainingPrompt::read);
    let trained = trained.transpose()?.flatten();
    let files = ModelFiles {
        // A template that writes the date writes the date of the training.
        time: trained.and_then(|prompt| prompt.chat_template_time),
        ..inference.files.clone()
    };
    let tokenizer = RowTokenizer::new(&files, &template)?;
    let limits = Limits {
        max_new_tokens: args.writing.max_new_tokens,
        end_tokens: inference.end_tokens(tokenizer.end_token())?,
        stop: args.writing.stop.clone(),
    };
    log::info!("{}, template {template}", inference.selected.name);
    if let Some(warning) = tokenizer.generation_warning(&limits.end_tokens) {
        log::warn!("{warning}");
    }
    let session = Session {
        model: &model,
        tokenizer: &tokenizer,
        limits,
        sampling,
        batch_size: args.batch_size,
    };
    match (&args.prompt, prompts) {
        (Some(prompt), _) => session.one(prompt, 0),
        (None, Some(prompts)) => session.all(&prompts, args.output.as_deref(), screen),
        (None, None) => session.interactive(&template),
    }
}

/// The model with its adapter merged, if enough of the adapter survives quantization.
fn merged(
    inference: &Inference,
    adapted: Llama,
    force: bool,
) -> Result<Llama, GenerateCommandError> {
    let merged = inference.merged(adapted.clone())?;
    if let Some(report) = inference.survival(&adapted, &merged)? {
        log::info!(
            "cosine similarity of the intended and the merged change: {:.4}",
            report.overall()
        );
        match report.refusal() {
            Some(reason) if !force => return Err(GenerateCommandError::LostInMerge(reason)),
            Some(reason) => log::warn!("{reason}"),
            None => {}
        }
    }
    Ok(merged)
}

/// A loaded model with its settings for generation.
struct Session<'a> {
    model: &'a Llama,
    tokenizer: &'a RowTokenizer,
    limits: Limits,
    sampling: Sampling,
    batch_size: usize,
}

/// A line of the file of answers.
#[derive(Serialize)]
struct Answer<'a> {
    prompt: &'a str,
    text: &'a str,
    tokens: &'a [u32],
    finish: Finish,
}

impl Session<'_> {
    fn generator(&self) -> Generator<'_> {
        Generator {
            model: self.model,
            tokenizer: self.tokenizer.tokenizer(),
        }
    }

    fn ids(
        &self,
        prompt: &str,
        source: &Path,
        line: usize,
    ) -> Result<Vec<u32>, GenerateCommandError> {
        let ids = self.tokenizer.prompt(prompt, source, line)?;
        if ids.is_empty() {
            Err(GenerateCommandError::EmptyPrompt {
                source_file: source.into(),
                line,
            })
        } else {
            Ok(ids)
        }
    }

    /// Writes the answer to standard output while it is generated.
    fn one(&self, prompt: &str, number: usize) -> Result<(), GenerateCommandError> {
        let ids = self.ids(prompt, Path::new("--prompt"), 1)?;
        let mut out = std::io::stdout();
        // A reader that closed the pipe is not an error.
        let mut show = |_: usize, piece: &str| {
            let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
        };
        let (_, timing) =
            self.generator()
                .generate(&[&ids], number, &self.limits, &self.sampling, &mut show)?;
        let _ = writeln!(out);
        eprintln!("{}", speed(&timing));
        Ok(())
    }

    /// Answers a file's prompts.
    fn all(
        &self,
        prompts: &[String],
        output: Option<&Path>,
        screen: &Screen,
    ) -> Result<(), GenerateCommandError> {
        let source = Path::new("--prompts");
        let ids = prompts
            .iter()
            .enumerate()
            .map(|(index, prompt)| self.ids(prompt, source, index + 1))
            .collect::<Result<Vec<_>, _>>()?;
        let mut lines = String::new();
        let mut all = Timing::default();
        let task = screen.task("generating", prompts.len());
        for (batch, ids) in ids.chunks(self.batch_size).enumerate() {
            let first = batch * self.batch_size;
            let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
            let (answers, timing) = self.generator().generate(
                &ids,
                first,
                &self.limits,
                &self.sampling,
                &mut |_, _| {},
            )?;
            all.add(timing);
            for (answer, prompt) in answers.iter().zip(&prompts[first..]) {
                let line = serde_json::to_string(&Answer {
                    prompt,
                    text: &answer.text,
                    tokens: &answer.tokens,
                    finish: answer.finish,
                })?;
                if output.is_none() {
                    screen.line(&line);
                }
                lines.push_str(&line);
                lines.push('\n');
            }
            task.at(first + answers.len());
        }
        drop(task);
        if let Some(path) = output {
            durable::write_atomically(path, lines.as_bytes())?;
        }
        eprintln!("{}", speed(&all));
        Ok(())
    }

    /// One prompt per line until the input ends.
    fn interactive(&self, template: &PromptTemplate) -> Result<(), GenerateCommandError> {
        let input = std::io::stdin();
        let asks = input.is_terminal();
        if asks {
            eprintln!("Template {template}. One prompt per line; Ctrl-D ends.");
        }
        let mut number = 0;
        let mut line = String::new();
        loop {
            if asks {
                eprint!("> ");
            }
            line.clear();
            let read = input.lock().read_line(&mut line);
            if read.map_err(GenerateCommandError::Input)? == 0 {
                return Ok(());
            }
            let prompt = line.trim();
            if !prompt.is_empty() {
                self.one(prompt, number)?;
                number += 1;
            }
        }
    }
}

fn speed(timing: &Timing) -> String {
    let rate = |tokens: usize, seconds: f64| {
        if seconds > 0.0 {
            format!("{:.1} per second", tokens as f64 / seconds)
        } else {
            "immediately".to_string()
        }
    };
    let (prefill, decode) = (timing.prefill.as_secs_f64(), timing.decode.as_secs_f64());
    // The first new token of each sequence comes from reading its prompt.
    format!(
        "prompt: {} ({}), generated: {} in {:.2} s ({})",
        human::counted(timing.prompt_tokens as u64, "token"),
        rate(timing.prompt_tokens, prefill),
        human::counted(timing.new_tokens as u64, "token"),
        prefill + decode,
        rate(timing.new_tokens, prefill + decode),
    )
}

fn read_prompts(path: &Path) -> Result<Vec<String>, GenerateCommandError> {
    let text = std::fs::read_to_string(path).map_err(|source| GenerateCommandError::Read {
        path: path.into(),
        source,
    })?;
    let json = path
        .extension()
        .is_some_and(|extension| extension == "jsonl");
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.trim().is_empty());
    let prompts: Vec<String> = lines
        .map(|(index, line)| {
            if json {
                prompt_of(line, path, index + 1)
            } else {
                Ok(line.to_string())
            }
        })
        .collect::<Result<_, _>>()?;
    if prompts.is_empty() {
        return Err(GenerateCommandError::NoPrompts(path.into()));
    }
    Ok(prompts)
}

fn prompt_of(text: &str, path: &Path, line: usize) -> Result<String, GenerateCommandError> {
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|source| GenerateCommandError::NotJson {
            path: path.into(),
            line,
            source,
        })?;
    let prompt = ["prompt", "context"]
        .iter()
        .find_map(|key| value.get(key)?.as_str());
    match prompt {
        Some(prompt) => Ok(prompt.to_string()),
        None => Err(GenerateCommandError::NoPromptKey {
            path: path.into(),
            line,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_lines_or_the_texts_of_json_lines() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let lines = file("a.txt", "one\n\n two \n");
        assert_eq!(read_prompts(&lines).unwrap(), ["one", " two "]);
        let json = file(
            "a.jsonl",
            "{\"prompt\": \"a\\nb\"}\n{\"context\": \"c\", \"target\": \"d\"}\n",
        );
        assert_eq!(read_prompts(&json).unwrap(), ["a\nb", "c"]);
        for (text, part) in [
            ("{\"prompt\": 1}\n", "line 1"),
            ("{\"prompt\": \"a\"}\n{\n", "line 2"),
            ("\n", "holds no prompt"),
        ] {
            let error = read_prompts(&file("b.jsonl", text))
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
