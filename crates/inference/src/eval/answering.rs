//! From examples to answers.

use std::path::{Path, PathBuf};

use llama_burn::Llama;

use super::labels::{Answers, finlora_answer, is_python_space};
use super::likelihood::{LikelihoodError, log_likelihoods, most_likely};
use crate::generate::{GenerateError, Generator, Limits, Sampling};
use data::contained::decoded;
use data::{DataError, Question, Row, RowTokenizer, Source};

/// FinLoRA's answer length for classification tasks, in tokens.
const LEAST_NEW_TOKENS: usize = 10;
/// The maximum answer length that is derived from the targets.
const MOST_NEW_TOKENS: usize = 512;

/// Why a task cannot be answered.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum AnsweringError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error(transparent)]
    Likelihood(#[from] LikelihoodError),
    /// A target that is not one of the given labels.
    #[error("{}:{line}: the target {target:?} is not one of the labels {labels}", path.display())]
    NotALabel {
        path: PathBuf,
        line: usize,
        target: String,
        labels: String,
    },
    /// No example fits the model.
    #[error(
        "all {rows} examples of {} are too long: the model has {positions} positions, of which an answer may take {answer}",
        path.display()
    )]
    AllTooLong {
        path: PathBuf,
        rows: usize,
        positions: usize,
        answer: usize,
    },
}

/// A file of examples to answer.
#[derive(Debug)]
pub struct Task {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub source: Source,
    /// The possible answers.
    pub answers: Answers,
    /// The examples, as questions.
    pub questions: Vec<Question>,
    /// The right answers of each example, as indices into `answers`: one, or those of a list.
    pub right: Vec<Vec<usize>>,
    /// Whether targets are comma-separated lists whose items are judged one by one (FinLoRA's
    /// batched tasks).
    pub lists: bool,
    /// Examples that are too long for the model.
    pub too_long: usize,
    /// The maximum number of tokens per answer.
    pub max_new_tokens: usize,
    /// The tokens that training appends to a prompt for each label; empty without labels to
    /// compare.
    answer_ids: Vec<Vec<u32>>,
}

/// How a task is made of examples.
#[derive(Debug, Clone, Copy)]
pub struct TaskOptions<'a> {
    /// The labels, if they are not to be detected from the targets.
    pub labels: &'a [String],
    /// Targets are comma-separated lists.
    pub lists: bool,
    /// The maximum number of tokens per answer, if it is not to be derived from the targets.
    pub max_new_tokens: Option<usize>,
    /// The size of the model's vocabulary.
    pub vocab_size: usize,
    /// The model's positions.
    pub positions: usize,
}

impl Task {
    /// The task of answering `rows`. `all` are the targets of the whole file, from which labels are
    /// detected.
    ///
    /// # Errors
    ///
    /// An example without a question, a target that is not one of the given labels, an example that
    /// the tokenizer refuses; or no example that fits the model.
    pub fn new(
        path: &Path,
        source: Source,
        rows: &[Row],
        all: &[String],
        tokenizer: &RowTokenizer,
        options: TaskOptions,
    ) -> Result<Self, AnsweringError> {
        let questions = rows.iter().map(|row| tokenizer.question(row, path));
        let questions: Vec<Question> = questions.collect::<Result<_, _>>()?;
        for question in &questions {
            tokenizer.check(&question.prompt, options.vocab_size, path, question.line)?;
        }
        let items = |target: &str| items(target, options.lists);
        let answers = match options.labels {
            [] => {
                let all: Vec<String> = all.iter().flat_map(|target| items(target)).collect();
                let mut answers = Answers::of_targets(all.iter().map(String::as_str));
                if !answers.are_labels {
                    // FinLoRA looks for the targets of the examples that it asks.
                    let asked: Vec<String> = questions
                        .iter()
                        .flat_map(|question| items(&question.target))
                        .collect();
                    answers = Answers::of_texts(asked.iter().map(String::as_str));
                }
                answers
            }
            labels => Answers::of_labels(labels),
        };
        let mut right = Vec::with_capacity(questions.len());
        for question in &questions {
            let of_row = items(&question.target).into_iter().map(|target| {
                answers
                    .exact(&target)
                    .ok_or_else(|| AnsweringError::NotALabel {
                        path: path.into(),
                        line: question.line,
                        target,
                        labels: answers.all.join(", "),
                    })
            });
            right.push(of_row.collect::<Result<Vec<_>, _>>()?);
        }
        let answer_ids: Vec<Vec<u32>> = if answers.are_labels && !options.lists {
            let ids = answers
                .all
                .iter()
                .map(|answer| tokenizer.answer(answer, path, 0));
            ids.collect::<Result<_, _>>()?
        } else {
            Vec::new()
        };
        let max_new_tokens = match options.max_new_tokens {
            Some(tokens) => tokens,
            None => {
                let mut longest = answer_ids.iter().map(Vec::len).max().unwrap_or(0);
                if answer_ids.is_empty() {
                    for question in &questions {
                        let ids = tokenizer.answer(&question.target, path, question.line)?;
                        longest = longest.max(ids.len());
                    }
                }
                longest.clamp(LEAST_NEW_TOKENS, MOST_NEW_TOKENS)
            }
        };
        let mut task = Self {
            path: path.into(),
            source,
            answers,
            questions: Vec::new(),
            right: Vec::new(),
            lists: options.lists,
            too_long: 0,
            max_new_tokens,
            answer_ids,
        };
        let longest_answer = task.answer_ids.iter().map(Vec::len).max().unwrap_or(0);
        let answer = max_new_tokens.max(longest_answer);
        for (question, right) in questions.into_iter().zip(right) {
            if question.prompt.len() + answer > options.positions {
                task.too_long += 1
            } else {
                task.questions.push(question);
                task.right.push(right);
            }
        }
        if task.questions.is_empty() {
            Err(AnsweringError::AllTooLong {
                path: path.into(),
                rows: task.too_long,
                positions: options.positions,
                answer,
            })
        } else {
            Ok(task)
        }
    }

    /// Whether the likelihoods of labels can be compared: if there are labels, one per example.
    pub fn has_likelihoods(&self) -> bool {
        !self.answer_ids.is_empty()
    }

    /// The right answers of all examples, one after the other.
    pub fn targets(&self) -> impl Iterator<Item = usize> {
        self.right.iter().flatten().copied()
    }
}

/// A target, or the items of a list: FinLoRA's `process_batched`.
pub fn items(text: &str, lists: bool) -> Vec<String> {
    if lists {
        let items = text.split(',');
        let stripped = items.map(|item| item.trim_matches(is_python_space));
        stripped.map(|item| item.replace('\n', "")).collect()
    } else {
        vec![text.trim().to_string()]
    }
}

/// A model's answer to an example, or to an item of its list.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// The generated text, up to the end token.
    pub written: String,
    /// The text that FinLoRA would take for the answer.
    pub finlora: String,
    /// The log-probability of each label as the whole answer.
    pub likelihoods: Vec<f64>,
    /// The label with the highest log-probability.
    pub likeliest: Option<usize>,
}

/// A model with its settings for answering.
#[derive(Debug, Clone, Copy)]
pub struct Answering<'a> {
    /// The model, with or without an adapter.
    pub model: &'a Llama,
    /// Its tokenizer.
    pub tokenizer: &'a RowTokenizer,
    /// The tokens that end an answer.
    pub end_tokens: &'a [u32],
    /// Examples per batch.
    pub batch_size: usize,
    /// Whether it generates answers.
    pub writes: bool,
    /// Whether it compares the likelihood of labels.
    pub compares: bool,
}

impl Answering<'_> {
    /// Answers a task's examples; `done` gets the number of examples answered so far.
    ///
    /// # Errors
    ///
    /// An example that the model cannot process, or a device that fails.
    pub fn answer(
        &self,
        task: &Task,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Answer>, AnsweringError> {
        let mut answers = Vec::with_capacity(task.questions.len());
        let batches = task.questions.chunks(self.batch_size.max(1));
        let mut first = 0;
        for questions in batches {
            let prompts: Vec<&[u32]> = questions.iter().map(|row| &row.prompt[..]).collect();
            let written = if self.writes {
                self.write(&prompts, first, task.max_new_tokens)?
            } else {
                vec![Answer::default(); prompts.len()]
            };
            let likelihoods = if self.compares {
                log_likelihoods(self.model, &prompts, &task.answer_ids)?
            } else {
                vec![Vec::new(); prompts.len()]
            };
            for (index, (answer, likelihoods)) in written.into_iter().zip(likelihoods).enumerate() {
                let answer = Answer {
                    likeliest: most_likely(&likelihoods),
                    likelihoods,
                    ..answer
                };
                if task.lists {
                    answers.extend(of_items(&answer, task.right[first + index].len()))
                } else {
                    answers.push(answer)
                }
            }
            first += questions.len();
            done(first);
        }
        Ok(answers)
    }

    fn write(
        &self,
        prompts: &[&[u32]],
        first: usize,
        max_new_tokens: usize,
    ) -> Result<Vec<Answer>, AnsweringError> {
        let tokenizer = self.tokenizer.tokenizer();
        let generator = Generator {
            model: self.model,
            tokenizer,
        };
        let limits = Limits {
            max_new_tokens,
            end_tokens: self.end_tokens.to_vec(),
            stop: Vec::new(),
        };
        let greedy = Sampling::default();
        let (written, _) = generator.generate(prompts, first, &limits, &greedy, &mut |_, _| {})?;
        let decode = |ids: &[u32]| decoded(tokenizer, ids, true);
        let answers = prompts.iter().zip(written).map(|(prompt, written)| {
            let whole = decode(&[prompt, &written.tokens[..]].concat());
            let asked = self.tokenizer.asks_contexts().then(|| decode(prompt));
            let finlora = finlora_answer(&whole, asked.as_deref(), &written.text);
            Answer {
                finlora: finlora.to_string(),
                written: written.text,
                ..Answer::default()
            }
        });
        Ok(answers.collect())
    }
}

/// The answers to a list's items: as many as there are targets, empty if fewer were generated
/// (FinLoRA's `process_batched`).
pub fn of_items(answer: &Answer, count: usize) -> Vec<Answer> {
    let part = |text: &str| {
        let mut items = items(text, true);
        items.resize(count, String::new());
        items
    };
    let items = part(&answer.written).into_iter().zip(part(&answer.finlora));
    items
        .map(|(written, finlora)| Answer {
            written,
            finlora,
            ..Answer::default()
        })
        .collect()
}
