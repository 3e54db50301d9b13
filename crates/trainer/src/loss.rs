//! Cross entropy over supervised positions.
//!
//! Scores exist for some positions at a time, so that those of a large vocabulary never exist whole and
//! no buffer passes what a graphics driver binds. Pieces of positions need no second pass over the
//! scores, as pieces of the vocabulary would.

use burn::module::Param;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use llama_burn::Llama;
use lora_core::{cpu, in_vectors};
use rayon::prelude::*;

use crate::data::Batch;

/// Bytes of scores at a time.
const SCORE_BYTES: usize = 32 << 20;

/// Positions whose scores exist at a time.
pub(crate) fn positions_at_once(vocab_size: usize) -> usize {
    (SCORE_BYTES / (4 * vocab_size.max(1))).max(1)
}

/// Sums over the supervised positions of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// Cross entropies in nats, added up.
    pub loss: f64,
    /// Positions whose best-scored token is the target.
    pub correct: usize,
    /// Positions.
    pub tokens: usize,
    /// Rows whose every position is predicted right.
    pub correct_rows: usize,
    /// Rows.
    pub rows: usize,
}

impl LossSums {
    /// Adds another batch's sums.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct += other.correct;
        self.tokens += other.tokens;
        self.correct_rows += other.correct_rows;
        self.rows += other.rows;
    }

    /// Cross entropy a token, in nats; not a number without tokens.
    pub fn mean(&self) -> f64 {
        self.loss / self.tokens as f64
    }

    /// Share of positions predicted right.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.tokens as f64
    }

    /// Share of rows predicted right as a whole: the answer, word for word, and its end.
    pub fn row_accuracy(&self) -> f64 {
        self.correct_rows as f64 / self.rows as f64
    }
}

/// Loss of a batch whose supervised hidden states are given, without a tape.
///
/// # Shapes
///
/// - `hidden`: `[m, hidden]`, the last layer's output at the batch's `m` positions that predict
pub fn loss(model: &Llama, hidden: Tensor<2>, batch: &Batch) -> LossSums {
    let mut total = 0.0;
    let mut predicted = Vec::new();
    for (start, targets) in pieces(model, &batch.target_ids) {
        let hidden = hidden.clone().narrow(0, start, targets.len());
        total += piece(model, &hidden, targets, &mut predicted).0;
    }
    sums(total, &predicted, batch)
}

/// As [`loss`], and the gradient of the summed loss with respect to `hidden`; those of the head's adapter go
/// to `collect`, piece by piece.
pub fn loss_and_gradient(
    model: &Llama,
    hidden: Tensor<2>,
    batch: &Batch,
    collect: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
) -> (LossSums, Tensor<2>) {
    let mut total = 0.0;
    let mut predicted = Vec::new();
    let mut gradients = Vec::new();
    for (start, targets) in pieces(model, &batch.target_ids) {
        let hidden = hidden.clone().narrow(0, start, targets.len());
        let (loss, gradient) = piece(model, &hidden, targets, &mut predicted);
        gradients.push(model.logits_backward(&hidden, gradient, collect));
        total += loss;
    }
    let gradient = match gradients.len() {
        1 => gradients.remove(0),
        _ => Tensor::cat(gradients, 0),
    };
    (sums(total, &predicted, batch), gradient)
}

/// As [`loss`], on the tape that `hidden` is on: the summed loss, for a backward pass.
pub fn loss_on_tape(model: &Llama, hidden: Tensor<2>, batch: &Batch) -> (LossSums, Tensor<1>) {
    let tokens = batch.target_ids.len();
    let targets = token_ids(&batch.target_ids, &hidden.device().without_autodiff());
    let logits = model.logits(hidden);
    let best = logits.clone().inner().argmax(1).reshape([tokens]);
    let log_probabilities = log_softmax(logits, 1).gather(1, targets.reshape([tokens, 1]));
    let loss = log_probabilities.sum().neg();
    let (total, predicted) = read(loss.clone().inner(), best);
    (sums(total, &predicted, batch), loss)
}

fn pieces<'a>(model: &Llama, targets: &'a [u32]) -> impl Iterator<Item = (usize, &'a [u32])> {
    let at_once = positions_at_once(model.config.vocab_size);
    (0..).step_by(at_once).zip(targets.chunks(at_once))
}

/// The summed loss and the gradient of the scores, `[m, vocab]`; adds the best-scored tokens.
fn piece(
    model: &Llama,
    hidden: &Tensor<2>,
    targets: &[u32],
    predicted: &mut Vec<u32>,
) -> (f64, Tensor<2>) {
    let tokens = targets.len();
    let logits = model.logits_plain(hidden);
    if cpu::is_native(&logits) {
        return cross_entropy(logits, targets, predicted);
    }
    let targets = token_ids(targets, &hidden.device()).reshape([tokens, 1]);
    let best = logits.clone().argmax(1).reshape([tokens]);
    let log_probabilities = log_softmax(logits, 1);
    let chosen = log_probabilities.clone().gather(1, targets.clone());
    let one_less = Tensor::<2>::ones([tokens, 1], &hidden.device())
        .cast(DType::F32)
        .neg();
    let gradient = log_probabilities
        .exp()
        .scatter(1, targets, one_less, IndexingUpdateOp::Add);
    let (loss, best) = read(chosen.sum().neg(), best);
    predicted.extend(best);
    (loss, lora_core::spoil::spoilt("cross_entropy", gradient))
}

/// One read for all numbers, since each read waits for the device; f32 holds ids below 2^24 exactly.
fn read(loss: Tensor<1>, best: Tensor<1, Int>) -> (f64, Vec<u32>) {
    let tokens = best.dims()[0];
    let best = best.float().cast(DType::F32);
    let read = Tensor::cat(vec![loss, best], 0).into_data();
    let read = read
        .try_to_vec::<f32>()
        .unwrap_or_else(|_| vec![f32::NAN; tokens + 1]);
    let best = read[1..].iter().map(|id| *id as u32).collect();
    (read[0] as f64, best)
}

/// As [`piece`], on the CPU, in the memory of the scores: softmax(x) − the target's unit vector.
fn cross_entropy(logits: Tensor<2>, targets: &[u32], predicted: &mut Vec<u32>) -> (f64, Tensor<2>) {
    let vocab = logits.dims()[1];
    let mut logits = cpu::values(logits);
    let rows = logits.as_mut_slice().par_chunks_exact_mut(vocab);
    let rows = rows.zip(targets).map(|(row, target)| {
        let (row_loss, best) = cross_entropy_row(row, *target as usize);
        (row_loss, best.unwrap_or(0) as u32)
    });
    let rows: Vec<(f64, u32)> = rows.collect();
    predicted.extend(rows.iter().map(|(_, best)| *best));
    let loss = rows.iter().map(|(loss, _)| loss).sum();
    (loss, logits.into_tensor())
}

in_vectors! {
    /// Turns scores into the gradient of the loss, which it gives, with the first place of the largest score, as
    /// an argmax would; scores that are not numbers have none.
    fn cross_entropy_row(scores: &mut [f32], target: usize) -> (f64, Option<usize>) {
        let largest = cpu::max(scores);
        let best = scores.iter().position(|score| *score == largest);
        let chosen = scores[target];
        let sum = cpu::exp_and_sum(scores, largest);
        let scale = 1.0 / sum;
        for probability in scores.iter_mut() {
            *probability *= scale;
        }
        scores[target] -= 1.0;
        // A score that is not a number is passed over by the maximum, not by the sum.
        (largest as f64 + (sum as f64).ln() - chosen as f64, best)
    }
}

/// Counts what was predicted right, position by position and row by row.
fn sums(loss: f64, predicted: &[u32], batch: &Batch) -> LossSums {
    let mut sums = LossSums {
        loss,
        tokens: predicted.len(),
        ..LossSums::default()
    };
    let mut next = 0;
    for targets in &batch.targets_per_row {
        let of_row = next..next + targets;
        let hits = of_row
            .filter(|i| predicted[*i] == batch.target_ids[*i])
            .count();
        next += targets;
        sums.correct += hits;
        sums.rows += 1;
        sums.correct_rows += usize::from(hits == *targets);
    }
    sums
}

/// Token or position indices on a device.
pub(crate) fn token_ids(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}
