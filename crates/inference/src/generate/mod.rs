//! Text generation: many prompts at once, each continued until it ends.
//!
//! Prompts are prefilled as one batch, and shared prefixes are computed once. Every later step
//! reads one token per sequence. A sequence that has ended leaves the batch. Results keep the order
//! of the prompts, and sampling depends on the seed, the sequence and the step, not on the batch.

mod command;
mod error;
mod sampling;
mod text;

use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use llama_burn::{Llama, PackedError};
use serde::Serialize;
use tokenizers::Tokenizer;

pub use command::{GenerateArgs, run};
pub use error::GenerateCommandError;
pub use sampling::Sampling;

use text::GrowingText;

/// When a text ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// The maximum number of new tokens; fewer if the model's positions end earlier.
    pub max_new_tokens: usize,
    /// Tokens that end a text. They are not part of it.
    pub end_tokens: Vec<u32>,
    /// Strings that end a text. They are not part of it.
    pub stop: Vec<String>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model generated an end token.
    EndToken,
    /// A stop string occurred.
    StopString,
    /// The maximum number of new tokens was reached, or the model has no more positions.
    Length,
}

/// The generated text of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Their text, without special tokens.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
}

/// Token counts and times.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Timing {
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// New tokens, including end tokens.
    pub new_tokens: usize,
    /// Time of the prefill, up to the first new token.
    pub prefill: Duration,
    /// Time of the other tokens.
    pub decode: Duration,
}

impl Timing {
    /// Adds the counts and times of another batch.
    pub fn add(&mut self, other: Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.new_tokens += other.new_tokens;
        self.prefill += other.prefill;
        self.decode += other.decode;
    }
}

/// Why generation fails.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// A prompt that the model cannot process.
    #[error(transparent)]
    Prompt(#[from] PackedError),
    /// The device failed.
    #[error("the device did not return the logits: {0}")]
    Device(String),
}

/// A model with its tokenizer.
#[derive(Debug, Clone, Copy)]
pub struct Generator<'a> {
    /// The model, with or without an adapter.
    pub model: &'a Llama,
    /// The tokenizer that decodes its tokens.
    pub tokenizer: &'a Tokenizer,
}

/// A sequence that is being continued.
struct Row {
    /// The prompt and the new tokens.
    ids: Vec<u32>,
    prompt: usize,
    text: GrowingText,
    finish: Option<Finish>,
}

impl Generator<'_> {
    /// Continues each prompt. `on_text(row, piece)` gets the text while it is generated, in whole
    /// characters.
    ///
    /// `first_row` is the number of the first prompt among all prompts, for the random numbers of
    /// [`Sampling`].
    ///
    /// # Errors
    ///
    /// A prompt without tokens, longer than the model's positions, or with a token outside its
    /// vocabulary; a device that fails.
    pub fn generate(
        &self,
        prompts: &[&[u32]],
        first_row: usize,
        limits: &Limits,
        sampling: &Sampling,
        on_text: &mut dyn FnMut(usize, &str),
    ) -> Result<(Vec<Generation>, Timing), GenerateError> {
        let mut rows: Vec<Row> = prompts
            .iter()
            .map(|prompt| Row {
                ids: prompt.to_vec(),
                prompt: prompt.len(),
                text: GrowingText::default(),
                finish: None,
            })
            .collect();
        let mut timing = Timing {
            prompt_tokens: prompts.iter().map(|prompt| prompt.len()).sum(),
            ..Timing::default()
        };
        if prompts.is_empty() {
            return Ok((Vec::new(), timing));
        }
        let started = Instant::now();
        let (mut cache, mut hidden) = self.model.prefill(prompts)?;
        let mut left: Vec<usize> = (0..rows.len()).collect();
        let positions = self.model.config.positions();
        for step in 0..limits.max_new_tokens {
            let vocab = self.model.config.vocab_size;
            let mut scores = read(self.model.manual_logits(&hidden))?;
            for (scores, index) in scores.chunks_exact_mut(vocab).zip(&left) {
                let row = &mut rows[*index];
                let next = sampling.next(scores, &row.ids, first_row + index, step);
                timing.new_tokens += 1;
                self.push(row, next, limits);
                let end = row.finish.is_some();
                let stop = if end { &[][..] } else { &limits.stop };
                let piece = row.text.take(stop);
                if !piece.is_empty() {
                    on_text(*index, piece);
                }
            }
            if step == 0 {
                timing.prefill = started.elapsed();
            }
            for index in &left {
                let row = &mut rows[*index];
                if row.finish.is_none() && row.ids.len() >= positions {
                    row.finish = Some(Finish::Length);
                }
            }
            let goes_on = |row: &usize| rows[*row].finish.is_none();
            if !left.iter().any(goes_on) || step + 1 == limits.max_new_tokens {
                break;
            }
            let kept: Vec<usize> = (0..left.len()).filter(|at| goes_on(&left[*at])).collect();
            if kept.len() < left.len() {
                cache.keep(&kept);
                left.retain(goes_on);
            }
            let last = left.iter().filter_map(|row| rows[*row].ids.last().copied());
            hidden = self.model.decode(&mut cache, &last.collect::<Vec<u32>>())?;
        }
        timing.decode = started.elapsed().saturating_sub(timing.prefill);
        let mut generations = Vec::with_capacity(rows.len());
        for (index, mut row) in rows.into_iter().enumerate() {
            let finish = row.finish.unwrap_or(Finish::Length);
            if finish != Finish::StopString {
                row.text.finish(self.tokenizer);
            }
            let rest = row.text.take(&[]);
            if !rest.is_empty() {
                on_text(index, rest);
            }
            generations.push(Generation {
                tokens: row.ids.split_off(row.prompt),
                text: row.text.text().to_string(),
                finish,
            });
        }
        Ok((generations, timing))
    }

    fn push(&self, row: &mut Row, next: u32, limits: &Limits) {
        if limits.end_tokens.contains(&next) {
            row.finish = Some(Finish::EndToken);
            return;
        }
        row.ids.push(next);
        row.text.push(next, self.tokenizer);
        if row.text.stops(&limits.stop) {
            row.finish = Some(Finish::StopString);
        }
    }
}

/// Logits on the host.
fn read(scores: Tensor<2>) -> Result<Vec<f32>, GenerateError> {
    let failed = |error: String| GenerateError::Device(error);
    let data = scores.try_into_data();
    let data = data.map_err(|error| failed(format!("{error:?}")))?;
    let values = data.convert::<f32>().try_to_vec();
    values.map_err(|error| failed(format!("{error:?}")))
}
