//! Sums of the cross entropy over the loss positions, on the device and read back to the host.

use burn::tensor::{Device, Int, Tensor, TensorData};
use gpu_counts::read_floats;

use crate::flat::joined;
pub use crate::manual::{loss, loss_and_gradient};

/// The number of positions whose logits take at most `logits_bytes` bytes, at least 1.
pub fn positions_at_once(vocab_size: usize, logits_bytes: usize) -> usize {
    (logits_bytes / (4 * vocab_size.max(1))).max(1)
}

/// Sums over the loss positions of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// The sum of the cross entropies, in nats.
    pub loss: f64,
    /// The number of positions whose most likely token is the target.
    pub correct: usize,
    /// The number of positions.
    pub tokens: usize,
    /// The number of examples whose every position is predicted correctly.
    pub correct_examples: usize,
    /// The number of examples.
    pub examples: usize,
}

impl LossSums {
    /// Adds another batch's sums.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct += other.correct;
        self.tokens += other.tokens;
        self.correct_examples += other.correct_examples;
        self.examples += other.examples;
    }

    /// Cross entropy per token, in nats; NaN without tokens.
    pub fn mean(&self) -> f64 {
        self.loss / self.tokens as f64
    }

    /// Share of positions predicted correctly.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.tokens as f64
    }

    /// Share of examples whose whole completion, end token included, is predicted correctly.
    pub fn row_accuracy(&self) -> f64 {
        self.correct_examples as f64 / self.examples as f64
    }
}

/// The sums of a batch, on the host or still on the device.
#[derive(Debug, Clone)]
pub enum Loss {
    /// On the host.
    Known(LossSums),
    /// Still being computed by a GPU; the host need not wait.
    OnDevice(LossOnDevice),
}

impl Loss {
    /// The sums on the host. Waits for the device where it is still computing.
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
    /// The summed cross entropy of each chunk, `[1]` each.
    pub(crate) losses: Vec<Tensor<1>>,
    /// 1 for each position of a chunk that is predicted correctly, else 0: `[m]` per chunk.
    pub(crate) hits: Vec<Tensor<1>>,
    pub(crate) targets_per_example: Vec<usize>,
}

/// Reads losses and hits, together with more numbers of any meaning, in one transfer. Returns the sum of those numbers.
/// `None` without anything to read.
///
/// # Panics
///
/// If the device does not return them.
pub fn read(numbers: Option<Tensor<1>>, losses: Vec<LossOnDevice>) -> Option<(f64, LossSums)> {
    let of_losses = losses
        .iter()
        .flat_map(|loss| loss.losses.iter().chain(&loss.hits));
    let parts: Vec<Tensor<1>> = numbers.iter().chain(of_losses).cloned().collect();
    if parts.is_empty() {
        return None;
    }
    let read = read_floats(joined(parts));
    let read =
        read.unwrap_or_else(|error| panic!("a loss cannot be read from the device: {error}"));
    let mut read = read.into_iter();
    let count = numbers.map_or(0, |numbers| numbers.dims()[0]);
    let first = read.by_ref().take(count).map(f64::from).sum();
    let mut sums = LossSums::default();
    for loss in losses {
        let parts = read.by_ref().take(loss.losses.len());
        let total = parts.map(f64::from).sum();
        let positions = loss.targets_per_example.iter().sum();
        let hits: Vec<bool> = read
            .by_ref()
            .take(positions)
            .map(|hit| hit == 1.0)
            .collect();
        sums.add(counted(total, &hits, &loss.targets_per_example));
    }
    Some((first, sums))
}

/// Counts the correct predictions per position and per example.
pub(crate) fn counted(loss: f64, hits: &[bool], targets_per_example: &[usize]) -> LossSums {
    let mut sums = LossSums {
        loss,
        tokens: hits.len(),
        ..LossSums::default()
    };
    let mut next = 0;
    for targets in targets_per_example {
        let correct = hits[next..next + targets]
            .iter()
            .filter(|hit| **hit)
            .count();
        next += targets;
        sums.correct += correct;
        sums.examples += 1;
        sums.correct_examples += usize::from(correct == *targets);
    }
    sums
}

/// Token or position indices on a device.
pub fn token_ids(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}
