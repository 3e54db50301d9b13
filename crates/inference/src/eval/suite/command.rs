//! `trainer eval --suite finlora`: arguments, files, models, in the order of a run.

use std::path::{Path, PathBuf};

use super::super::answering::AnsweringError;
use super::super::command::{EvalArgs, check, dated, row_tokenizer, template, training_prompts};
use super::super::error::EvalError;
use super::super::named::{BASE, NamedAdapter, named};
use super::base_model;
use super::bert_score;
use super::folder::Folder;
use super::questions::{Asked, Sample};
use super::results::SuiteResults;
use super::run::Run;
use crate::model::{Inference, ModelArgs};
use data::PromptTemplate;
use data::TrainingPrompt;
use terminal::Screen;

/// Runs the command.
///
/// # Errors
///
/// An error of the arguments, the files, the model or an adapter; a program for BERTScore that
/// fails, after everything else is written.
pub fn run(args: &EvalArgs, screen: &Screen) -> Result<(), EvalError> {
    let plan = Plan::new(args, screen)?;
    let inference = plan.load(args, screen)?;
    let (asked, left_out) = plan.questions(args, &inference, screen)?;
    let Plan {
        data_dir,
        folder,
        adapters,
        template,
        model,
        ..
    } = plan;
    let results = SuiteResults {
        suite: "finlora",
        model,
        quant_bits: args.model.quant_bits,
        device: inference.selected.name.clone(),
        prompt_template: template.to_string(),
        seed: args.seed,
        data_dir,
        missing: folder.missing,
        ignored: folder.ignored,
        left_out,
        tasks: asked.iter().map(Asked::results).collect(),
        contenders: Vec::new(),
    };
    let mut run = Run::new(args, screen, &inference, &asked, results);
    if !args.no_base {
        run.contender(BASE, None, &inference.base)?;
    }
    for (NamedAdapter { name, folder }, local) in adapters {
        let model = inference.with_adapter(&local)?.1;
        run.contender(&name, Some(folder), &model)?;
    }
    run.finish()
}

/// Everything that is known before the weights are loaded, so that a mistake costs no time.
struct Plan {
    data_dir: PathBuf,
    folder: Folder,
    /// Each with its folder on this machine.
    adapters: Vec<(NamedAdapter, PathBuf)>,
    prompts: Vec<(PathBuf, Option<TrainingPrompt>)>,
    template: PromptTemplate,
    /// The base model.
    model: String,
    samples: Vec<Sample>,
}

impl Plan {
    fn new(args: &EvalArgs, screen: &Screen) -> Result<Self, EvalError> {
        check(args)?;
        let data_dir = args.data_dir.as_deref().unwrap_or(Path::new("."));
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
        Ok(Self {
            data_dir: data_dir.into(),
            folder,
            adapters: adapters.into_iter().zip(folders).collect(),
            prompts,
            template,
            model,
            samples,
        })
    }

    /// Loads the base model and applies each adapter once, so that an adapter that does not fit is
    /// found now and not hours later.
    fn load(&self, args: &EvalArgs, screen: &Screen) -> Result<Inference, EvalError> {
        let model_args = ModelArgs {
            model: self.model.clone(),
            ..args.model.clone()
        };
        let loaded = Inference::load(&model_args, screen);
        let inference = if self.model == args.model.model {
            loaded?
        } else {
            loaded.map_err(|source| EvalError::NamedModel {
                model: self.model.clone(),
                source: Box::new(source),
            })?
        };
        for (adapter, folder) in &self.adapters {
            let fits = inference.with_adapter(folder);
            fits.map_err(|source| EvalError::Adapter {
                name: adapter.name.clone(),
                source: Box::new(source),
            })?;
        }
        Ok(inference)
    }

    /// Every task's questions, and the tasks that the model has too few positions for.
    fn questions(
        &self,
        args: &EvalArgs,
        inference: &Inference,
        screen: &Screen,
    ) -> Result<(Vec<Asked>, Vec<String>), EvalError> {
        let files = &dated(&inference.files, &self.prompts);
        let shape = (
            inference.config.vocab_size,
            inference.config.max_position_embeddings,
        );
        let mut asked = Vec::new();
        let mut left_out = Vec::new();
        for sample in &self.samples {
            let file = (sample.path.as_path(), sample.rows.source.format);
            let tokenizer = row_tokenizer(args, files, &self.template, &self.prompts, file)?;
            match Asked::new(sample, tokenizer, shape) {
                Ok(questions) => asked.push(questions),
                // A table of the other tasks is worth more than none.
                Err(error @ AnsweringError::AllTooLong { .. }) if self.samples.len() > 1 => {
                    let note = format!("{} is skipped: {error}", sample.suite.name);
                    screen.note(&note);
                    left_out.push(note);
                }
                Err(error) => return Err(error.into()),
            }
        }
        if asked.is_empty() {
            Err(EvalError::NoTask(left_out))
        } else {
            Ok((asked, left_out))
        }
    }
}
