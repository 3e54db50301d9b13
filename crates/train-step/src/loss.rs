//! Cross entropy over supervised positions.
//!
//! Scores exist for some positions at a time, so that those of a large vocabulary never exist whole and
//! no buffer passes what a graphics driver binds. Pieces of positions need no second pass over the
//! scores, as pieces of the vocabulary would.

use std::ops::Range;

use burn::module::Param;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use gpu_counts::read_floats;
use llama_burn::Llama;
use lora_core::{cpu, in_vectors};
use rayon::prelude::*;

use crate::flat::joined;
use data::Batch;

/// Bytes of scores at a time on the CPU, where they stay near the processor.
pub const SCORE_BYTES: usize = 32 << 20;

/// As [`SCORE_BYTES`] on a GPU: 512 positions of a vocabulary of 128,256. Every piece reads the output layer's weights
/// once forward and once backward.
pub const SCORE_BYTES_GPU: usize = 256 << 20;

/// Bytes of scores that exist at a time on this device: on a GPU no more than it binds to a kernel as one buffer.
pub fn score_bytes(device: &Device) -> usize {
    if cpu::is_cpu(device) {
        SCORE_BYTES
    } else {
        lora_core::largest_buffer(device)
            .map_or(SCORE_BYTES_GPU, |largest| SCORE_BYTES_GPU.min(largest))
    }
}

/// Positions whose scores take at most this many bytes.
pub fn positions_at_once(vocab_size: usize, score_bytes: usize) -> usize {
    (score_bytes / (4 * vocab_size.max(1))).max(1)
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
/// adapter go to `collect`, piece by piece.
pub fn loss_and_gradient(
    model: &Llama,
    hidden: Tensor<2>,
    batch: &Batch,
    targets: &Tensor<1, Int>,
    scale: f64,
    collect: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
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
        gradients.push(model.logits_backward(&hidden, gradient, collect));
    }
    let gradient = match gradients.len() {
        1 => gradients.remove(0),
        _ => Tensor::cat(gradients, 0),
    };
    (sums.of(batch), gradient)
}

/// As [`loss()`], on the tape that `hidden` is on: the summed loss, for a backward pass.
pub fn loss_on_tape(model: &Llama, hidden: Tensor<2>, batch: &Batch) -> (LossSums, Tensor<1>) {
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
    let at_once = positions_at_once(model.config.vocab_size, score_bytes(&model.device()));
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
    let scores = model.logits_plain(hidden);
    if cpu::is_native(&scores) {
        let (loss, gradient) = cross_entropy(scores, &batch.target_ids[piece], &mut sums.hits);
        sums.loss += loss;
        return gradient;
    }
    let m = piece.len();
    let targets = targets.clone().narrow(0, piece.start, m);
    let best = scores.clone().argmax(1).reshape([m]);
    let hits = best.equal(targets.clone()).float().cast(DType::F32);
    let targets = targets.reshape([m, 1]);
    let chosen = scores.clone().gather(1, targets.clone());
    let minus_one = Tensor::<2>::full([m, 1], -1.0, (&hidden.device(), DType::F32));
    let largest = scores.clone().max_dim(1);
    let exponentials = (scores - largest.clone()).exp();
    let sum = exponentials.clone().sum_dim(1);
    let probabilities = exponentials / sum.clone();
    let loss = (sum.log() + largest - chosen).sum();
    let (losses, all_hits) = sums.on_device.get_or_insert_default();
    losses.push(loss);
    all_hits.push(hits);
    let gradient = probabilities.scatter(1, targets, minus_one, IndexingUpdateOp::Add);
    lora_core::spoil::spoilt("cross_entropy", gradient)
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

/// As [`scores_gradient`], on the CPU, in the memory of the scores: softmax(x) − the target's unit vector.
fn cross_entropy(logits: Tensor<2>, targets: &[u32], hits: &mut Vec<bool>) -> (f64, Tensor<2>) {
    let vocab = logits.dims()[1];
    let mut logits = cpu::values(logits);
    let rows = logits.as_mut_slice().par_chunks_exact_mut(vocab);
    let rows = rows.zip(targets).map(|(row, target)| {
        let (row_loss, best) = cross_entropy_row(row, *target as usize);
        (row_loss, best.unwrap_or(0) as u32 == *target)
    });
    let rows: Vec<(f64, bool)> = rows.collect();
    hits.extend(rows.iter().map(|(_, hit)| *hit));
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
