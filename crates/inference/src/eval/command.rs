//! `trainer eval`: base model and adapters on the same examples.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use llama_burn::Llama;

use super::answering::{Answer, Answering, Task, TaskOptions};
use super::error::EvalError;
use super::named::{BASE, NamedAdapter, named};
use super::results::{Contender, FileResults, Results, Scorer, Verdict};
use super::suite::{self, Suite};
use data::PromptTemplate;

use crate::model::{Inference, ModelArgs};
use data::{self, Format, ModelFiles, RowTokenizer, Rows, TrainingPrompt, effective_template};
use device::KernelArgs;
use run_config::EMBEDDED;
use run_config::embedded;
use terminal::Screen;
use terminal::human;

/// The command's arguments.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// PEFT adapters, each a folder or a name on the Hub; each is compared with the base model
    #[arg(long, value_name = "[NAME=]DIR", num_args = 1..)]
    pub(super) adapter: Vec<PathBuf>,
    /// A benchmark instead of --data: its files in --data-dir, its answer lengths and scores. For finlora the default
    /// of --model is the base model that the adapters name
    #[arg(
        long,
        value_enum,
        value_name = "NAME",
        requires = "data_dir",
        conflicts_with_all = ["data", "scorer", "labels", "lists", "held_out", "max_new_tokens"]
    )]
    suite: Option<Suite>,
    /// With --suite: the folder of its test files
    #[arg(long, value_name = "DIR", requires = "suite")]
    pub(super) data_dir: Option<PathBuf>,
    /// With --suite: only these tasks, separated by commas, such as fpb,xbrl_finer
    #[arg(long, value_name = "TASK", value_delimiter = ',', requires = "suite")]
    pub(super) tasks: Vec<String>,
    /// With --suite: compute BERTScore with this Python, which needs the package bert-score
    #[arg(long, value_name = "PYTHON", requires = "suite")]
    pub(super) bertscore: Option<PathBuf>,
    /// Examples to answer: JSON lines, JSON, CSV or Parquet with context and target, messages and so on; or
    /// `embedded`
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "suite")]
    data: Vec<PathBuf>,
    /// Scorers, separated by commas [default: all]
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    scorer: Vec<Scorer>,
    /// The labels, separated by commas [default: detected from the targets]
    #[arg(long, value_name = "LABEL", value_delimiter = ',')]
    labels: Vec<String>,
    /// Targets are comma-separated lists whose items are scored one by one (FinLoRA's FiNER and FNXL)
    #[arg(long)]
    lists: bool,
    /// The prompt template [default: the one that the adapters were trained with, else raw]
    #[arg(long, value_name = "NAME")]
    template: Option<PromptTemplate>,
    /// Evaluate although the prompt template differs from the adapters' training
    #[arg(long)]
    force: bool,
    /// Leave out the base model
    #[arg(long, requires = "adapter")]
    pub(super) no_base: bool,
    /// Only the examples that training with this val_set_size and --seed held out
    #[arg(long, value_name = "SIZE")]
    held_out: Option<f64>,
    /// Only this many examples of each file, drawn by --seed
    #[arg(long, value_name = "N")]
    pub(super) rows: Option<usize>,
    /// The seed that --held-out and --rows draw examples with
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub(super) seed: u64,
    /// The maximum number of tokens per answer [default: that of the longest target, at least FinLoRA's 10]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Examples per batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch_size: usize,
    /// The folder for results.json, results.md and answers.jsonl (with --suite also answers/ and bertscore/)
    #[arg(long, value_name = "DIR", default_value = "target/eval")]
    pub(super) output: PathBuf,
}

impl EvalArgs {
    /// Switches of the GPU's kernels.
    pub fn kernels(&self) -> KernelArgs {
        self.model.kernels.clone()
    }
}

/// A file's examples before they are tokenized.
struct Sample {
    path: PathBuf,
    rows: Rows,
    /// The targets of all its examples, including those that were not drawn.
    targets: Vec<String>,
}

/// Runs the command.
///
/// # Errors
///
/// An error of the arguments, the files, the model or an adapter.
pub fn run(args: &EvalArgs, screen: &Screen) -> Result<(), EvalError> {
    match args.suite {
        Some(Suite::Finlora) => suite::run(args, screen),
        None => run_on_files(args, screen),
    }
}

fn run_on_files(args: &EvalArgs, screen: &Screen) -> Result<(), EvalError> {
    check(args)?;
    // Before the weights are loaded, so that a mistake costs nothing.
    let adapters = named(&args.adapter)?;
    let folders = adapters
        .iter()
        .map(|adapter| hub::adapter_folder(&adapter.folder));
    let prompts = training_prompts(&folders.collect::<Result<Vec<_>, _>>()?)?;
    let template = template(args, &prompts)?;
    let samples = args.data.iter().map(|path| sample(args, path));
    let samples: Vec<Sample> = samples.collect::<Result<_, _>>()?;

    let inference = Inference::load(&args.model, screen)?;
    let tasks = tasks(args, &samples, &inference, &template, &prompts)?;
    let mut results = Results {
        model: args.model.model.clone(),
        quant_bits: args.model.quant_bits,
        device: inference.selected.name.clone(),
        prompt_template: template.to_string(),
        seed: args.seed,
        files: tasks
            .iter()
            .map(|(task, _)| FileResults::new(task))
            .collect(),
    };
    let mut written = String::new();
    let contenders = adapters.iter();
    let contenders = contenders.map(|NamedAdapter { name, folder }| (name.as_str(), Some(folder)));
    let base = (!args.no_base).then_some((BASE, None));
    for (name, adapter) in base.into_iter().chain(contenders) {
        let model = match adapter {
            None => inference.base.clone(),
            Some(folder) => inference.with_adapter(folder)?.1,
        };
        for ((task, tokenizer), file) in tasks.iter().zip(&mut results.files) {
            let (mut contender, answers) =
                answer(args, &inference, &model, name, (task, tokenizer), screen)?;
            contender.adapter = adapter.cloned();
            write_answers(&mut written, task, name, &answers);
            file.add(contender);
        }
    }
    for line in results.lines() {
        screen.line(&line);
    }
    let path = |name: &str| args.output.join(name);
    let json = serde_json::to_string_pretty(&results)?;
    durable::write_atomically(&path("results.json"), format!("{json}\n").as_bytes())?;
    durable::write_atomically(&path("results.md"), results.markdown().as_bytes())?;
    durable::write_atomically(&path("answers.jsonl"), written.as_bytes())?;
    screen.line("");
    screen.line(&format!(
        "written: {}, results.md, answers.jsonl",
        path("results.json").display()
    ));
    Ok(())
}

pub(super) fn check(args: &EvalArgs) -> Result<(), EvalError> {
    for (name, number) in [
        ("--batch-size", Some(args.batch_size)),
        ("--rows", args.rows),
        ("--max-new-tokens", args.max_new_tokens),
    ] {
        if number == Some(0) {
            return Err(EvalError::Zero(name));
        }
    }
    if let Some(size) = args.held_out {
        let fits = (size > 0.0 && size < 1.0) || (size >= 1.0 && size.fract() == 0.0);
        if !fits || !size.is_finite() {
            return Err(EvalError::HeldOut(size));
        }
    }
    if args.labels.iter().any(|label| label.trim().is_empty()) {
        return Err(EvalError::EmptyLabel);
    }
    if args.lists && args.scorer == [Scorer::Likelihood] {
        return Err(EvalError::ListsHaveNoLikelihood);
    }
    Ok(())
}

/// The training prompt of each adapter, from its folder.
pub(super) fn training_prompts(
    adapters: &[PathBuf],
) -> Result<Vec<(PathBuf, Option<TrainingPrompt>)>, EvalError> {
    let prompts = adapters.iter().map(|folder| {
        if !folder.is_dir() {
            return Err(EvalError::NoAdapterFolder(folder.clone()));
        }
        Ok((folder.clone(), TrainingPrompt::read(folder)?))
    });
    prompts.collect()
}

/// The template to evaluate with: `--template`, else the adapters' own, which must be the same.
pub(super) fn template(
    args: &EvalArgs,
    prompts: &[(PathBuf, Option<TrainingPrompt>)],
) -> Result<PromptTemplate, EvalError> {
    let known = prompts
        .iter()
        .filter_map(|(folder, prompt)| Some((folder, prompt.as_ref()?)));
    let template = match (&args.template, known.clone().next()) {
        (Some(template), _) => template.clone(),
        (None, Some((folder, prompt))) => {
            let template = prompt.template();
            template.map_err(|reason| EvalError::TrainingTemplate {
                folder: folder.clone(),
                reason,
            })?
        }
        (None, None) => PromptTemplate::Raw,
    };
    for (folder, prompt) in known {
        if prompt.prompt_template != template.to_string() && !args.force {
            return Err(EvalError::OtherTemplate {
                folder: folder.clone(),
                trained: prompt.prompt_template.clone(),
                evaluated: template.to_string(),
            });
        }
    }
    for (folder, _) in prompts.iter().filter(|(_, prompt)| prompt.is_none()) {
        let file = data::PROMPT_FILE;
        match &args.template {
            None => log::warn!(
                "{} has no {file} with the prompt template of its training; {template} is used. If it was another, \
                 set it with --template",
                folder.display()
            ),
            Some(_) => log::info!("{} has no {file}", folder.display()),
        }
    }
    Ok(template)
}

/// A file's examples, or a sample of them.
fn sample(args: &EvalArgs, path: &Path) -> Result<Sample, EvalError> {
    let path = if path == Path::new(EMBEDDED) {
        embedded::materialise()?.validation
    } else {
        path.to_path_buf()
    };
    let Rows {
        mut rows,
        source,
        ignored,
    } = data::read_rows(&path, None)?;
    let targets = rows.iter().filter_map(|row| row.example.target());
    let targets = targets.map(String::from).collect();
    if let Some(size) = args.held_out {
        rows = data::split(rows, size, args.seed)
            .map_err(|source| EvalError::Split {
                size,
                path: path.clone(),
                source: Box::new(source),
            })?
            .1;
    }
    if let Some(count) = args.rows {
        rows = data::sample(rows, count, args.seed);
    }
    Ok(Sample {
        path,
        rows: Rows {
            rows,
            source,
            ignored,
        },
        targets,
    })
}

/// The model's files with the date of the adapters' training prompts.
pub(super) fn dated(
    files: &ModelFiles,
    prompts: &[(PathBuf, Option<TrainingPrompt>)],
) -> ModelFiles {
    let times = prompts
        .iter()
        .filter_map(|(folder, prompt)| Some((folder, prompt.as_ref()?.chat_template_time?)));
    let mut times = times.peekable();
    let first = times.peek().map(|(_, time)| *time);
    for (folder, time) in times {
        if Some(time) != first {
            log::warn!(
                "the chat template writes the date, and the adapter in {} was trained with another date than the first; \
                 the date of the first is used",
                folder.display()
            );
        }
    }
    ModelFiles {
        time: first,
        ..files.clone()
    }
}

/// The tokenizer for a file's examples, whose prompts must be those of the adapters' training.
pub(super) fn row_tokenizer(
    args: &EvalArgs,
    files: &ModelFiles,
    template: &PromptTemplate,
    prompts: &[(PathBuf, Option<TrainingPrompt>)],
    (path, format): (&Path, Format),
) -> Result<RowTokenizer, EvalError> {
    let mut tokenizer = RowTokenizer::new(files, template)?;
    tokenizer.prepare(files, template, format, path)?;
    let effective = effective_template(template, format);
    let now = TrainingPrompt::of_template(files, effective.as_ref().unwrap_or(template));
    for (folder, prompt) in prompts {
        let difference = prompt.as_ref().and_then(|prompt| prompt.difference(&now));
        if let Some(difference) = difference.filter(|_| !args.force) {
            return Err(EvalError::OtherPrompts {
                path: path.into(),
                folder: folder.clone(),
                difference,
            });
        }
    }
    Ok(tokenizer)
}

/// Tokenizes the files' examples, each with the tokenizer that its format needs.
fn tasks(
    args: &EvalArgs,
    samples: &[Sample],
    inference: &Inference,
    template: &PromptTemplate,
    prompts: &[(PathBuf, Option<TrainingPrompt>)],
) -> Result<Vec<(Task, RowTokenizer)>, EvalError> {
    let files = &dated(&inference.files, prompts);
    let options = TaskOptions {
        labels: &args.labels,
        lists: args.lists,
        max_new_tokens: args.max_new_tokens,
        vocab_size: inference.config.vocab_size,
        positions: inference.config.positions(),
    };
    let mut tasks = Vec::new();
    for Sample {
        path,
        rows,
        targets,
    } in samples
    {
        let format = rows.source.format;
        let tokenizer = row_tokenizer(args, files, template, prompts, (path, format))?;
        let task = Task::new(path, rows.source, &rows.rows, targets, &tokenizer, options)?;
        if !task.has_likelihoods() && args.scorer == [Scorer::Likelihood] {
            return Err(EvalError::NoLabels(path.clone()));
        }
        tasks.push((task, tokenizer));
    }
    Ok(tasks)
}

/// A model to evaluate.
pub(super) struct Writer<'a> {
    pub model: &'a Llama,
    /// Its name in the results.
    pub name: &'a str,
    /// Whether it generates answers.
    pub writes: bool,
    /// Whether it compares the likelihood of labels.
    pub compares: bool,
}

/// Answers a task with a model and shows the progress; returns the answers and the seconds they
/// took.
pub(super) fn answers_of(
    args: &EvalArgs,
    inference: &Inference,
    writer: &Writer,
    (task, tokenizer): (&Task, &RowTokenizer),
    screen: &Screen,
) -> Result<(Vec<Answer>, f64), EvalError> {
    let end_tokens = inference.end_tokens(tokenizer.end_token())?;
    let answering = Answering {
        model: writer.model,
        tokenizer,
        end_tokens: &end_tokens,
        batch_size: args.batch_size,
        writes: writer.writes,
        compares: writer.compares,
    };
    let started = Instant::now();
    let progress = screen.task(writer.name, task.questions.len());
    let answers = answering.answer(task, &mut |done| progress.at(done))?;
    let seconds = started.elapsed().as_secs_f64();
    let rows = task.questions.len();
    progress.done(&format!(
        "{} of {}, {} per second",
        human::counted(rows as u64, "example"),
        task.path.display(),
        human::rate(rows as f64 / seconds)
    ));
    Ok((answers, seconds))
}

/// Answers a task with a model, and scores the answers.
fn answer(
    args: &EvalArgs,
    inference: &Inference,
    model: &Llama,
    name: &str,
    (task, tokenizer): (&Task, &RowTokenizer),
    screen: &Screen,
) -> Result<(Contender, Vec<Answer>), EvalError> {
    let asked = |scorer: Scorer| args.scorer.is_empty() || args.scorer.contains(&scorer);
    let compares = asked(Scorer::Likelihood) && task.has_likelihoods();
    let writer = Writer {
        model,
        name,
        writes: asked(Scorer::Finlora) || asked(Scorer::Strict),
        compares,
    };
    let (answers, seconds) = answers_of(args, inference, &writer, (task, tokenizer), screen)?;
    let scorers = Scorer::ALL.into_iter().filter(|scorer| match scorer {
        Scorer::Likelihood => compares,
        other => asked(*other),
    });
    let targets: Vec<usize> = task.targets().collect();
    let verdict = |scorer| Verdict::new(scorer, &task.answers, &targets, &answers);
    let scores: BTreeMap<Scorer, Verdict> =
        scorers.map(|scorer| (scorer, verdict(scorer))).collect();
    let contender = Contender {
        name: name.into(),
        adapter: None,
        seconds,
        scores,
    };
    Ok((contender, answers))
}

/// Appends every answer as a line of JSON.
fn write_answers(out: &mut String, task: &Task, contender: &str, answers: &[Answer]) {
    let rows = task.questions.iter().zip(&task.right);
    let asked =
        rows.flat_map(|(question, right)| right.iter().map(|right| (question.line, *right)));
    for ((line, right), answer) in asked.zip(answers) {
        let label = |index: usize| task.answers.all[index].as_str();
        let likelihoods: serde_json::Map<String, serde_json::Value> = answer
            .likelihoods
            .iter()
            .enumerate()
            .map(|(index, likelihood)| (label(index).to_string(), (*likelihood).into()))
            .collect();
        let line = serde_json::json!({
            "file": task.path, "line": line, "contender": contender, "target": label(right),
            "written": answer.written, "finlora": task.answers.first_found(&answer.finlora).map(label),
            "likeliest": answer.likeliest.map(label), "log_likelihoods": likelihoods,
        });
        *out += &format!("{line}\n");
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        args: EvalArgs,
    }

    fn args(more: &[&str]) -> EvalArgs {
        let all = ["eval", "--data", "a.jsonl"].iter().chain(more);
        Command::try_parse_from(all)
            .unwrap_or_else(|error| panic!("{error}"))
            .args
    }

    #[test]
    fn a_suite_has_its_own_data_lengths_and_scores() {
        let parse = |more: &[&str]| Command::try_parse_from(["eval"].iter().chain(more));
        let suite = ["--suite", "finlora", "--data-dir", "d"];
        let args = parse(&[&suite[..], &["--tasks", "fpb,ner"]].concat());
        assert_eq!(args.unwrap().args.tasks, ["fpb", "ner"]);
        for (wrong, part) in [
            (&suite[..2], "--data-dir"),
            (&["--tasks", "fpb", "--data", "a"], "--suite"),
            (&[], "--data"),
        ] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        for more in [
            ["--data", "a"],
            ["--max-new-tokens", "3"],
            ["--scorer", "strict"],
            ["--labels", "a"],
            ["--held-out", "1"],
        ] {
            let error = parse(&[&suite[..], &more].concat()).unwrap_err();
            assert!(error.to_string().contains(more[0]), "{error}");
        }
    }

    #[test]
    fn arguments_that_cannot_be_meant_are_refused() {
        for (wrong, part) in [
            (["--rows", "0"], "--rows is 0"),
            (["--batch-size", "0"], "--batch-size is 0"),
            (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
            (["--held-out", "1.5"], "--held-out is 1.5"),
            (["--held-out", "0"], "--held-out is 0"),
            (["--held-out", "NaN"], "--held-out is NaN"),
            (["--labels", "a,,b"], "empty label"),
        ] {
            let error = check(&args(&wrong)).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        check(&args(&["--held-out", "400"])).unwrap();
        check(&args(&["--held-out", "0.1"])).unwrap();
        assert!(check(&args(&["--lists", "--scorer", "likelihood"])).is_err());
    }

    fn trained(template: &str) -> (PathBuf, Option<TrainingPrompt>) {
        let prompt = TrainingPrompt {
            prompt_template: template.into(),
            dataset_format: None,
            chat_template_sha256: None,
            chat_template_time: None,
        };
        ("runs/a/adapter".into(), Some(prompt))
    }

    #[test]
    fn the_template_of_training_is_used_and_another_refused_unless_forced() {
        let prompts = [trained("inst"), ("peft".into(), None)];
        assert_eq!(
            template(&args(&[]), &prompts).unwrap(),
            PromptTemplate::Inst
        );
        let error = template(&args(&["--template", "raw"]), &prompts)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("runs/a/adapter") && error.contains("--force"),
            "{error}"
        );
        let forced = template(&args(&["--template", "raw", "--force"]), &prompts).unwrap();
        assert_eq!(forced, PromptTemplate::Raw);
        let unlike = template(&args(&[]), &[trained("raw"), trained("chat")]).unwrap_err();
        assert!(unlike.to_string().contains("\"chat\""), "{unlike}");
        let unknown = [("peft".into(), None)];
        assert_eq!(template(&args(&[]), &unknown).unwrap(), PromptTemplate::Raw);
    }
}
