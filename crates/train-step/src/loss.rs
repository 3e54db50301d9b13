//! Cross entropy over supervised positions.
//!
//! Scores exist for some positions at a time, so that those of a large vocabulary never exist whole and
//! no buffer passes what a graphics driver binds. Pieces of positions need no second pass over the
//! scores, as pieces of the vocabulary would.

use std::ops::Range;

use burn::module::Param;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use gpu_counts::read_floats;
use kernels::{CrossEntropy, LossTerms, Targets, logits_bytes};
use llama_burn::Llama;

use crate::flat::joined;
use data::Batch;

/// Positions whose scores take at most this many bytes.
pub fn positions_at_once(vocab_size: usize, logits_bytes: usize) -> usize {
    (logits_bytes / (4 * vocab_size.max(1))).max(1)
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

/// The sums of a batch, where they are.
#[derive(Debug, Clone)]
pub enum Loss {
    /// On the host.
    Known(LossSums),
    /// Still being computed by a GPU, which the host need not wait for.
    OnDevice(LossOnDevice),
}

impl Loss {
    /// The sums on the host, which waits for them if it has to.
    ///
    /// # Panics
    ///
    /// If the device does not return them.
    pub fn sums(self) -> LossSums {
        match self {
            Self::Known(sums) => sums,
            Self::OnDevice(loss) => {
                read(None, vec![loss]).map_or_else(LossSums::default, |(_, sums)| sums)
            }
        }
    }
}

/// A batch's loss as a GPU computes it.
#[derive(Debug, Clone)]
pub struct LossOnDevice {
    /// Cross entropies of each piece, added up: `[1]` each.
    losses: Vec<Tensor<1>>,
    /// 1 where a piece's position is predicted right, else 0: `[m]` each.
    hits: Vec<Tensor<1>>,
    targets_per_row: Vec<usize>,
}

/// Loss of the supervised positions.
///
/// # Shapes
///
/// - `hidden`: `[m, hidden]`, the last layer's output at the positions that predict
/// - `targets`: `[m]`, the tokens that they predict
pub fn loss(model: &Llama, hidden: Tensor<2>, batch: &Batch, targets: &Tensor<1, Int>) -> Loss {
    let mut sums = Sums::default();
    for piece in pieces(model, batch) {
        let hidden = hidden.clone().narrow(0, piece.start, piece.len());
        scores_gradient(model, &hidden, batch, targets, piece, &mut sums);
    }
    sums.of(batch)
}

/// As [`loss()`], and the gradient of the summed loss with respect to `hidden`, times `scale`; those of the head's
/// adapter go to `accumulate`, piece by piece.
pub fn loss_and_gradient(
    model: &Llama,
    hidden: Tensor<2>,
    batch: &Batch,
    targets: &Tensor<1, Int>,
    scale: f64,
    accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
) -> (Loss, Tensor<2>) {
    let mut sums = Sums::default();
    let mut gradients = Vec::new();
    for piece in pieces(model, batch) {
        let hidden = hidden.clone().narrow(0, piece.start, piece.len());
        let gradient = scores_gradient(model, &hidden, batch, targets, piece, &mut sums);
        let gradient = if scale == 1.0 {
            gradient
        } else {
            gradient.mul_scalar(scale)
        };
        gradients.push(model.manual_logits_backward(&hidden, gradient, accumulate));
    }
    let gradient = match gradients.len() {
        1 => gradients.remove(0),
        _ => Tensor::cat(gradients, 0),
    };
    (sums.of(batch), gradient)
}

/// As [`loss()`], on the tape that `hidden` is on: the summed loss, for a backward pass.
pub fn loss_in_graph(model: &Llama, hidden: Tensor<2>, batch: &Batch) -> (LossSums, Tensor<1>) {
    let tokens = batch.target_ids.len();
    let targets = token_ids(&batch.target_ids, &hidden.device().without_autodiff());
    let logits = model.logits(hidden);
    let best = logits.clone().inner().argmax(1).reshape([tokens]);
    let log_probabilities = log_softmax(logits, 1).gather(1, targets.reshape([tokens, 1]));
    let loss = log_probabilities.sum().neg();
    let (best, sum) = (best.float().cast(DType::F32), loss.clone().inner());
    let read =
        read_floats(Tensor::cat(vec![sum, best], 0)).unwrap_or_else(|error| panic!("{error}"));
    let hit = |(best, target): (&f32, &u32)| *best as u32 == *target;
    let hits: Vec<bool> = read[1..].iter().zip(&batch.target_ids).map(hit).collect();
    (
        counted(f64::from(read[0]), &hits, &batch.targets_per_row),
        loss,
    )
}

/// Positions whose scores exist together.
fn pieces(model: &Llama, batch: &Batch) -> impl Iterator<Item = Range<usize>> + use<> {
    let at_once = positions_at_once(model.config.vocab_size, logits_bytes(&model.device()));
    let count = batch.target_ids.len();
    (0..count)
        .step_by(at_once)
        .map(move |start| start..count.min(start + at_once))
}

/// What the pieces of a batch sum up to.
#[derive(Default)]
struct Sums {
    loss: f64,
    hits: Vec<bool>,
    on_device: Option<(Vec<Tensor<1>>, Vec<Tensor<1>>)>,
}

impl Sums {
    fn of(self, batch: &Batch) -> Loss {
        match self.on_device {
            None => Loss::Known(counted(self.loss, &self.hits, &batch.targets_per_row)),
            Some((losses, hits)) => Loss::OnDevice(LossOnDevice {
                losses,
                hits,
                targets_per_row: batch.targets_per_row.clone(),
            }),
        }
    }
}

/// The gradient of a piece's scores, `[m, vocab]` in f32; its loss goes to `sums`.
fn scores_gradient(
    model: &Llama,
    hidden: &Tensor<2>,
    batch: &Batch,
    targets: &Tensor<1, Int>,
    piece: Range<usize>,
    sums: &mut Sums,
) -> Tensor<2> {
    let (m, logits) = (piece.len(), model.manual_logits(hidden));
    let targets = Targets {
        on_device: targets.clone().narrow(0, piece.start, m),
        ids: &batch.target_ids[piece],
    };
    let CrossEntropy { gradient, terms } = kernels::cross_entropy(logits, targets);
    match terms {
        LossTerms::OnHost { loss, hits } => {
            sums.loss += loss;
            sums.hits.extend(hits);
        }
        LossTerms::OnDevice { loss, hits } => {
            let (losses, all_hits) = sums.on_device.get_or_insert_default();
            losses.push(loss);
            all_hits.push(hits);
        }
    }
    gradient
}

/// Reads losses and hits, with one more number of any meaning, in one go; `None` where there is nothing to read.
///
/// # Panics
///
/// If the device does not return them.
pub fn read(number: Option<Tensor<1>>, losses: Vec<LossOnDevice>) -> Option<(f64, LossSums)> {
    let of_losses = losses
        .iter()
        .flat_map(|loss| loss.losses.iter().chain(&loss.hits));
    let parts: Vec<Tensor<1>> = number.iter().chain(of_losses).cloned().collect();
    if parts.is_empty() {
        return None;
    }
    let read = read_floats(joined(parts));
    let read =
        read.unwrap_or_else(|error| panic!("a loss cannot be read from the device: {error}"));
    let mut read = read.into_iter();
    let first = number.map_or(0.0, |_| f64::from(read.next().unwrap_or(f32::NAN)));
    let mut sums = LossSums::default();
    for loss in losses {
        let parts = read.by_ref().take(loss.losses.len());
        let total = parts.map(f64::from).sum();
        let positions = loss.targets_per_row.iter().sum();
        let hits: Vec<bool> = read
            .by_ref()
            .take(positions)
            .map(|hit| hit == 1.0)
            .collect();
        sums.add(counted(total, &hits, &loss.targets_per_row));
    }
    Some((first, sums))
}

/// Counts what was predicted right, position by position and row by row.
fn counted(loss: f64, hits: &[bool], targets_per_row: &[usize]) -> LossSums {
    let mut sums = LossSums {
        loss,
        tokens: hits.len(),
        ..LossSums::default()
    };
    let mut next = 0;
    for targets in targets_per_row {
        let right = hits[next..next + targets]
            .iter()
            .filter(|hit| **hit)
            .count();
        next += targets;
        sums.correct += right;
        sums.rows += 1;
        sums.correct_rows += usize::from(right == *targets);
    }
    sums
}

/// Token or position indices on a device.
pub fn token_ids(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}
