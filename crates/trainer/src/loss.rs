//! Cross entropy over supervised positions.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use llama_burn::Llama;

use crate::data::Batch;

/// Scores exist for this many positions at a time: with a vocabulary of 128,256 that is 125 MiB.
pub(crate) const POSITIONS_AT_ONCE: usize = 256;

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
    for (start, targets) in pieces(&batch.target_ids) {
        let hidden = hidden.clone().narrow(0, start, targets.len());
        let (loss, _) = piece(model, hidden, targets, &mut predicted);
        total += loss;
    }
    sums(total, &predicted, batch)
}

/// As [`loss`], and the gradient of the summed loss with respect to `hidden`.
pub fn loss_and_gradient(model: &Llama, hidden: Tensor<2>, batch: &Batch) -> (LossSums, Tensor<2>) {
    let mut total = 0.0;
    let mut predicted = Vec::new();
    let mut gradients = Vec::new();
    for (start, targets) in pieces(&batch.target_ids) {
        let hidden = hidden.clone().narrow(0, start, targets.len());
        let hidden = hidden.autodiff().require_grad();
        let (loss, tape) = piece(model, hidden.clone(), targets, &mut predicted);
        let gradient = hidden.grad(&tape.backward());
        gradients.push(gradient.expect("the loss depends on the hidden states"));
        total += loss;
    }
    (sums(total, &predicted, batch), Tensor::cat(gradients, 0))
}

fn pieces(targets: &[u32]) -> impl Iterator<Item = (usize, &[u32])> {
    let starts = (0..).step_by(POSITIONS_AT_ONCE);
    starts.zip(targets.chunks(POSITIONS_AT_ONCE))
}

/// The summed loss as a number and as a tensor for the backward pass; adds the best-scored tokens.
fn piece(
    model: &Llama,
    hidden: Tensor<2>,
    targets: &[u32],
    predicted: &mut Vec<u32>,
) -> (f64, Tensor<1>) {
    let tokens = targets.len();
    let targets = token_ids(targets, &hidden.device().without_autodiff());
    let logits = model.logits(hidden);
    let best = logits.clone().inner().argmax(1).reshape([tokens]);
    let log_probabilities = log_softmax(logits, 1).gather(1, targets.reshape([tokens, 1]));
    let loss = log_probabilities.sum().neg();
    // One read for all numbers, since each read waits for the device; f32 holds ids below 2^24 exactly.
    let best = best.float().cast(DType::F32);
    let read = Tensor::cat(vec![loss.clone().inner(), best], 0).into_data();
    let read = read
        .try_to_vec::<f32>()
        .unwrap_or_else(|_| vec![f32::NAN; tokens + 1]);
    predicted.extend(read[1..].iter().map(|id| *id as u32));
    (read[0] as f64, loss)
}

/// Counts what was predicted right, position by position and row by row.
fn sums(loss: f64, predicted: &[u32], batch: &Batch) -> LossSums {
    let mut sums = LossSums {
        loss,
        tokens: predicted.len(),
        ..LossSums::default()
    };
    let mut next = 0;
    let mut end = 0;
    for length in &batch.tokens.segment_lengths {
        end += length;
        let mut right = true;
        while next < predicted.len() && (batch.target_positions[next] as usize) < end {
            let hit = predicted[next] == batch.target_ids[next];
            sums.correct += usize::from(hit);
            right &= hit;
            next += 1;
        }
        sums.rows += 1;
        sums.correct_rows += usize::from(right);
    }
    sums
}

/// Token or position indices on a device.
pub(crate) fn token_ids(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}
