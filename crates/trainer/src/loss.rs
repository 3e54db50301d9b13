//! Cross entropy over supervised positions.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use llama_burn::Llama;

/// Scores exist for this many positions at a time: with a vocabulary of 128,256 that is 125 MiB.
const POSITIONS_AT_ONCE: usize = 256;

/// Sums over the supervised positions of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// Cross entropies in nats, added up.
    pub loss: f64,
    /// Positions whose best-scored token is the target.
    pub correct: usize,
    /// Positions.
    pub tokens: usize,
}

impl LossSums {
    /// Adds another batch's sums.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct += other.correct;
        self.tokens += other.tokens;
    }

    /// Cross entropy a token, in nats; not a number without tokens.
    pub fn mean(&self) -> f64 {
        self.loss / self.tokens as f64
    }

    /// Share of positions predicted right.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.tokens as f64
    }
}

/// Loss at the positions whose hidden states are given, without a tape.
///
/// # Shapes
///
/// - `hidden`: `[m, hidden]`, the last layer's output at the `m` positions that predict
/// - `targets`: `m` token ids
pub fn loss(model: &Llama, hidden: Tensor<2>, targets: &[u32]) -> LossSums {
    let mut sums = LossSums::default();
    for (start, targets) in pieces(targets) {
        let hidden = hidden.clone().narrow(0, start, targets.len());
        sums.add(piece(model, hidden, targets).0);
    }
    sums
}

/// As [`loss`], and the gradient of the summed loss with respect to `hidden`.
pub fn loss_and_gradient(model: &Llama, hidden: Tensor<2>, targets: &[u32]) -> (LossSums, Tensor<2>) {
    let mut sums = LossSums::default();
    let mut gradients = Vec::new();
    for (start, targets) in pieces(targets) {
        let hidden = hidden.clone().narrow(0, start, targets.len());
        let hidden = hidden.autodiff().require_grad();
        let (piece_sums, loss) = piece(model, hidden.clone(), targets);
        let gradient = hidden.grad(&loss.backward());
        gradients.push(gradient.expect("the loss depends on the hidden states"));
        sums.add(piece_sums);
    }
    (sums, Tensor::cat(gradients, 0))
}

fn pieces(targets: &[u32]) -> impl Iterator<Item = (usize, &[u32])> {
    let starts = (0..).step_by(POSITIONS_AT_ONCE);
    starts.zip(targets.chunks(POSITIONS_AT_ONCE))
}

/// The sums, and the summed loss as a tensor for the backward pass.
fn piece(model: &Llama, hidden: Tensor<2>, targets: &[u32]) -> (LossSums, Tensor<1>) {
    let device = hidden.device().without_autodiff();
    let targets = token_ids(targets, &device);
    let tokens = targets.dims()[0];
    let logits = model.logits(hidden);
    let predicted = logits.clone().inner().argmax(1).reshape([tokens]);
    let hits = predicted.equal(targets.clone()).float().sum().cast(DType::F32);
    let log_probabilities = log_softmax(logits, 1).gather(1, targets.reshape([tokens, 1]));
    let loss = log_probabilities.sum().neg();
    // One read for both numbers: each waits for the device.
    let both = Tensor::cat(vec![loss.clone().inner(), hits], 0).into_data().convert::<f32>();
    let both = both.try_to_vec::<f32>().unwrap_or_default();
    let sums = LossSums {
        loss: both.first().map_or(f64::NAN, |loss| *loss as f64),
        correct: both.get(1).map_or(0, |hits| *hits as usize),
        tokens,
    };
    (sums, loss)
}

/// Token or position indices on a device.
pub(crate) fn token_ids(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}
