//! The label that a model finds most likely, without generating text.
//!
//! A label's score is the sum of the log-probabilities of its tokens and of the end token, given
//! the prompt: the negative of the training loss. Sequences of one prompt with every label, and
//! prompts with a common prefix, share it ([`PackedTokens::sharing_for`]), so a prompt is computed
//! once.

use burn::tensor::Tensor;
use kernels::logits_bytes;
use llama_burn::{LayerPass, Llama, PackedError, PackedTokens};
use rayon::prelude::*;

use train_step::loss::{positions_at_once, token_ids};

/// Shorter prefixes are computed for each sequence: the bookkeeping would cost more.
const LEAST_SHARED: usize = 4;

/// Why likelihoods cannot be computed.
#[derive(Debug, thiserror::Error)]
pub enum LikelihoodError {
    /// A prompt that the model cannot process.
    #[error(transparent)]
    Prompt(#[from] PackedError),
    /// The device failed.
    #[error("the device did not return the logits: {0}")]
    Device(String),
}

/// The log-probability, in nats, of each answer after each prompt: `[prompts][answers]`.
///
/// An answer's tokens are those that training appends to a prompt, including the end token.
///
/// # Errors
///
/// A prompt or an answer without tokens, a sequence longer than the model's positions, a token
/// outside its vocabulary; a device that fails.
pub fn log_likelihoods(
    model: &Llama,
    prompts: &[&[u32]],
    answers: &[Vec<u32>],
) -> Result<Vec<Vec<f64>>, LikelihoodError> {
    if prompts.is_empty() || answers.is_empty() {
        return Ok(vec![Vec::new(); prompts.len()]);
    }
    if prompts.iter().any(|prompt| prompt.is_empty()) || answers.iter().any(Vec::is_empty) {
        return Err(PackedError::Empty.into());
    }
    let rows: Vec<Vec<u32>> = prompts
        .iter()
        .flat_map(|prompt| answers.iter().map(|answer| [prompt, &answer[..]].concat()))
        .collect();
    // The last tokens are not read, so packing ignores them.
    let vocab_size = model.config.vocab_size;
    let last = answers.iter().filter_map(|answer| answer.last());
    if let Some((position, id)) = last.enumerate().find(|(_, id)| **id as usize >= vocab_size) {
        let id = *id;
        return Err(PackedError::OutsideVocabulary {
            position,
            id,
            vocab_size,
        }
        .into());
    }
    // Nothing is predicted from an answer's last token.
    let ids: Vec<&[u32]> = rows.iter().map(|row| &row[..row.len() - 1]).collect();
    let (packed, places) = PackedTokens::sharing_for(&ids, LEAST_SHARED, &model.config);
    packed.check(&model.config)?;

    // The positions that predict each answer's tokens. Sequences share their last prompt token:
    // each position once.
    let mut predicts: Vec<u32> = Vec::new();
    let mut wanted: Vec<Vec<(u32, u32)>> = Vec::with_capacity(rows.len());
    for (index, (row, places)) in rows.iter().zip(&places).enumerate() {
        let prompt = prompts[index / answers.len()].len();
        let targets = prompt..row.len();
        let targets = targets.map(|position| (places[position - 1], row[position]));
        let targets: Vec<(u32, u32)> = targets.collect();
        predicts.extend(targets.iter().map(|(place, _)| place));
        wanted.push(targets);
    }
    predicts.sort_unstable();
    predicts.dedup();

    let hidden = hidden_at(model, &packed, &predicts);
    // The tokens needed at each position, so that a chunk of logits is read and freed.
    let mut asked: Vec<Vec<u32>> = vec![Vec::new(); predicts.len()];
    let place_of = |place: u32| predicts.binary_search(&place).unwrap_or(0);
    for (place, id) in wanted.iter().flatten() {
        asked[place_of(*place)].push(*id);
    }
    let vocab = model.config.vocab_size;
    let at_once = positions_at_once(vocab, logits_bytes(&model.device()));
    let mut known: Vec<Vec<f64>> = Vec::with_capacity(predicts.len());
    for (start, asked) in (0..).step_by(at_once).zip(asked.chunks(at_once)) {
        let scores = model.manual_logits(&hidden.clone().narrow(0, start, asked.len()));
        let scores = read(scores)?;
        known.par_extend(
            scores
                .par_chunks_exact(vocab)
                .zip(asked)
                .map(|(scores, ids)| log_probabilities(scores, ids)),
        );
    }
    let mut taken = vec![0; predicts.len()];
    let mut sums = wanted.iter().map(|targets| {
        let of_target = targets.iter().map(|(place, _)| {
            let place = place_of(*place);
            taken[place] += 1;
            known[place][taken[place] - 1]
        });
        of_target.sum::<f64>()
    });
    let of_prompt = prompts
        .iter()
        .map(|_| sums.by_ref().take(answers.len()).collect());
    Ok(of_prompt.collect())
}

/// The most likely answer; the first of equals. `None` if a likelihood is not a number.
pub fn most_likely(likelihoods: &[f64]) -> Option<usize> {
    if likelihoods.iter().any(|likelihood| likelihood.is_nan()) {
        return None;
    }
    let best = likelihoods.iter().copied().reduce(f64::max)?;
    likelihoods
        .iter()
        .position(|likelihood| *likelihood == best)
}

/// The last layer's output at these positions, `[m, hidden]`.
fn hidden_at(model: &Llama, packed: &PackedTokens, places: &[u32]) -> Tensor<2> {
    let context = model.manual_context(packed);
    let wanted = token_ids(places, &model.device().without_autodiff());
    let mut hidden = model.manual_embeddings(&packed.ids);
    for (index, layer) in model.layers.iter().enumerate() {
        let pass = LayerPass {
            layer,
            context: &context,
            dropout_seed: None,
            output_positions: (index + 1 == model.layers.len()).then_some(&wanted),
        };
        hidden = pass.forward(&hidden).0;
    }
    if model.layers.is_empty() {
        hidden.select(0, wanted)
    } else {
        hidden
    }
}

/// Log softmax of `scores` at `ids`, in 64 bits because the sums run over a large vocabulary.
fn log_probabilities(scores: &[f32], ids: &[u32]) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials = scores.iter().map(|score| f64::from(score - largest).exp());
    let log_sum = exponentials.sum::<f64>().ln() + f64::from(largest);
    let scores = ids
        .iter()
        .map(|id| f64::from(scores[*id as usize]) - log_sum);
    scores.collect()
}

/// Logits on the host.
fn read(scores: Tensor<2>) -> Result<Vec<f32>, LikelihoodError> {
    let failed = |error: String| LikelihoodError::Device(error);
    let data = scores.try_into_data();
    let data = data.map_err(|error| failed(format!("{error:?}")))?;
    let values = data.convert::<f32>().try_to_vec();
    values.map_err(|error| failed(format!("{error:?}")))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use llama_burn::{LlamaConfig, RopeScaling};

    use super::*;
    use data::{Batch, BatchRow, Prefixes};
    use train_step::gradients;

    fn model() -> Llama {
        let config = LlamaConfig {
            vocab_size: 40,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            max_position_embeddings: 24,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: true,
            initializer_range: 0.3,
            bos_token_id: None,
            eos_token_ids: vec![],
            weight_bytes: 4,
            ..LlamaConfig::default()
        };
        Llama::random(&config, 3, &Device::flex())
    }

    #[test]
    fn an_answers_likelihood_is_the_loss_that_training_would_have_on_it() {
        let model = model();
        let prompts: [&[u32]; 3] = [&[1, 5, 6, 7, 8, 9], &[1, 5, 6, 7, 8, 30, 31], &[4]];
        let answers = vec![vec![10, 2], vec![10, 11, 12, 2], vec![13, 2], vec![2]];
        let likelihoods = log_likelihoods(&model, &prompts, &answers).unwrap();
        for (prompt, likelihoods) in prompts.iter().zip(&likelihoods) {
            for (answer, likelihood) in answers.iter().zip(likelihoods) {
                let ids = [prompt, &answer[..]].concat();
                let targets = prompt.len()..ids.len();
                let row = BatchRow {
                    ids: &ids,
                    targets: targets.map(|at| (at - 1, ids[at])).collect(),
                    line: 1,
                };
                let alone = gradients::evaluate(&model, &Batch::new(&[row], Prefixes::Apart));
                // f32 hidden states summed in another order; losses of about 10.
                assert!(
                    (alone.loss + likelihood).abs() < 1e-4,
                    "{} {likelihood}",
                    alone.loss
                );
            }
        }
        // Answers with equal scores would make the comparison above an easy one.
        let spread = likelihoods[0][0] - likelihoods[0][2];
        assert!(spread.abs() > 0.1, "{likelihoods:?}");
    }

    #[test]
    fn what_cannot_be_scored_is_an_error() {
        let model = model();
        let likelihoods = |prompt: &[u32], answers: &[Vec<u32>]| {
            log_likelihoods(&model, &[prompt], answers).map_err(|error| error.to_string())
        };
        assert!(likelihoods(&[], &[vec![1]]).is_err());
        assert!(likelihoods(&[1], &[vec![]]).is_err());
        assert!(
            likelihoods(&[1; 25], &[vec![1]])
                .unwrap_err()
                .contains("24")
        );
        assert!(likelihoods(&[40], &[vec![1]]).unwrap_err().contains("40"));
        assert!(
            likelihoods(&[1], &[vec![1, 41]])
                .unwrap_err()
                .contains("41")
        );
        assert_eq!(likelihoods(&[1], &[]).unwrap(), [Vec::<f64>::new()]);
    }

    #[test]
    fn the_largest_likelihood_wins_and_no_number_wins_nothing() {
        assert_eq!(most_likely(&[-3.0, -1.0, -1.0]), Some(1));
        assert_eq!(most_likely(&[f64::NEG_INFINITY]), Some(0));
        assert_eq!(most_likely(&[-1.0, f64::NAN]), None);
        assert_eq!(most_likely(&[]), None);
    }
}
