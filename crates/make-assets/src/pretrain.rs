//! Pretraining: every weight of a small Llama, on the corpus, by next-token prediction.

use std::collections::HashSet;
use std::time::Instant;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Tensor, TensorData};
use llama_burn::{Llama, LlamaConfig, PackedTokens};
use lora_core::CounterRng;
use tokenizers::Tokenizer;

use super::corpus::document;
use super::draw::Draw;
use super::error::MakeAssetsError;
use super::tokenizer::{BEGIN, END};
use run_config::{Decay, Schedule};
use train_step::loss::token_ids;
use train_step::optimizer::AdamW;

/// The length and the learning rate of pretraining.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    pub steps: usize,
    pub documents_per_step: usize,
    pub peak_learning_rate: f64,
}

/// The weight of a prompt's tokens in the loss; an answer's tokens have weight 1. The names and
/// figures of the news are random, so their consequences are what the model should learn.
const PROMPT_WEIGHT: f32 = 0.2;

impl Default for Recipe {
    /// 48,000 documents, each seen once, 1.3 million tokens.
    fn default() -> Self {
        Self {
            steps: 1_000,
            documents_per_step: 48,
            peak_learning_rate: 3e-3,
        }
    }
}

/// Trains a model from random weights on documents drawn from `draw`, without the sentences in
/// `held_out`, on the CPU in f32.
///
/// AdamW (β 0.9 and 0.95, weight decay 0.05), warm-up over a twentieth of the steps, then half a
/// cosine down to zero. `progress` receives the loss from time to time.
///
/// # Errors
///
/// If the loss becomes NaN or infinite.
pub(crate) fn pretrain(
    config: &LlamaConfig,
    tokenizer: &Tokenizer,
    draw: &Draw,
    held_out: &HashSet<String>,
    recipe: Recipe,
    progress: &mut dyn FnMut(&str),
) -> Result<Llama, MakeAssetsError> {
    let device = Device::flex();
    let mut numbers = draw.stream(0);
    let mut documents = draw.stream(1);
    let seed = CounterRng::new(numbers.below(usize::MAX) as u64).next_u64();
    let mut model = Llama::random(config, seed, &device.clone().autodiff()).unfreeze();
    let adamw = AdamW {
        beta_2: 0.95,
        weight_decay: 0.05,
        ..AdamW::default()
    };
    let mut optimizer = adamw.init();
    let schedule = Schedule {
        peak: recipe.peak_learning_rate,
        warmup_steps: recipe.steps / 20,
        total_steps: recipe.steps,
        decay: Decay::Cosine,
    };
    let started = Instant::now();
    for step in 1..=recipe.steps {
        let rows = (0..recipe.documents_per_step).map(|_| row(tokenizer, &mut documents, held_out));
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        let loss = next_token_loss(&model, &rows, &device);
        let value: f32 = loss.clone().inner().into_scalar();
        if !value.is_finite() {
            return Err(MakeAssetsError::Diverged { step, loss: value });
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(schedule.rate(step), model, gradients);
        if step % 50 == 0 || step == 1 {
            let seconds = started.elapsed().as_secs();
            progress(&format!(
                "pretraining: step {step} of {}, loss {value:.3}, {seconds} s",
                recipe.steps
            ));
        }
    }
    Ok(model.valid())
}

/// A document's tokens between [`BEGIN`] and [`END`], and the weight of each in the loss.
struct Row {
    ids: Vec<u32>,
    weights: Vec<f32>,
}

/// The next document; prompt and answer are tokenized separately, as the trainer does with
/// examples.
fn row(
    tokenizer: &Tokenizer,
    draw: &mut Draw,
    held_out: &HashSet<String>,
) -> Result<Row, MakeAssetsError> {
    let failed = |error: tokenizers::Error| MakeAssetsError::Tokenizer(error.to_string());
    let document = document(draw, held_out);
    let mut ids: Vec<u32> = tokenizer.token_to_id(BEGIN).into_iter().collect();
    let prompt = tokenizer
        .encode_fast(document.prompt, false)
        .map_err(failed)?;
    let answer = tokenizer
        .encode_fast(document.answer, false)
        .map_err(failed)?;
    ids.extend(prompt.get_ids());
    let mut weights = vec![PROMPT_WEIGHT; ids.len()];
    ids.extend(answer.get_ids());
    ids.extend(tokenizer.token_to_id(END));
    weights.resize(ids.len(), 1.0);
    Ok(Row { ids, weights })
}

/// Weighted mean cross entropy of every token except the first of its sequence, given those before
/// it.
fn next_token_loss(model: &Llama, rows: &[Row], device: &Device) -> Tensor<1> {
    let packed = PackedTokens::from_sequences(rows.iter().map(|row| &row.ids[..row.ids.len() - 1]));
    let targets: Vec<u32> = rows.iter().flat_map(|row| &row.ids[1..]).copied().collect();
    let weights: Vec<f32> = rows
        .iter()
        .flat_map(|row| &row.weights[1..])
        .copied()
        .collect();
    let (count, total) = (targets.len(), weights.iter().sum::<f32>());
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [count, 1]), device);
    let logits = model.logits(model.hidden_states(&packed));
    let targets = token_ids(&targets, device).reshape([count, 1]);
    let scores = log_softmax(logits, 1).gather(1, targets);
    (scores * weights.autodiff()).sum().div_scalar(-total)
}

#[cfg(test)]
mod tests {
    use super::super::{model, tokenizer};
    use super::*;

    #[test]
    fn a_few_steps_lower_the_loss_and_repeat_exactly() {
        let held_out = HashSet::new();
        let tokenizer = tokenizer::train(&mut Draw::new(2), &held_out).unwrap();
        let config = model::config().as_object().unwrap().clone();
        let mut config = LlamaConfig::from_json(&config).unwrap();
        config.num_hidden_layers = 1;
        let recipe = Recipe {
            steps: 50,
            documents_per_step: 4,
            peak_learning_rate: 4e-3,
        };
        let run = || {
            let mut lines = Vec::new();
            let mut note = |line: &str| {
                let loss = line
                    .split("loss ")
                    .nth(1)
                    .and_then(|rest| rest.split(',').next());
                lines.push(loss.unwrap().parse::<f32>().unwrap());
            };
            let draw = Draw::new(2);
            let trained =
                pretrain(&config, &tokenizer, &draw, &held_out, recipe, &mut note).unwrap();
            (lines, model::safetensors(&trained).unwrap())
        };
        let (losses, weights) = run();
        assert!(losses[1] < 0.8 * losses[0], "{losses:?}");
        assert!(weights == run().1, "the same seed gave other weights");
    }
}
