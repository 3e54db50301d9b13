//! The rows of each optimizer step: seeded, the same on every machine, and computed for any step without the steps before.

use super::dataset::Dataset;
use super::random::{Purpose, generator, permutation};

/// The order of the training rows.
///
/// Every epoch is a new permutation that depends on the seed and the epoch only. The last step of an epoch takes the
/// remaining rows, so every row is used exactly once per epoch.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    lengths: Vec<usize>,
    batch_size: usize,
    accumulation: usize,
    max_batch_tokens: Option<usize>,
}

impl Order {
    /// An order of the rows of `dataset` in micro-batches of `batch_size`, with `gradient_accumulation_steps`
    /// micro-batches per step.
    ///
    /// A micro-batch with more than `max_batch_tokens` tokens is split; the rows of a step stay the same. A longer
    /// row is a micro-batch by itself.
    ///
    /// # Panics
    ///
    /// If there are no rows, or one of the two sizes is 0.
    pub fn new(
        seed: u64,
        dataset: &Dataset,
        batch_size: usize,
        gradient_accumulation_steps: usize,
        max_batch_tokens: Option<usize>,
    ) -> Self {
        assert!(
            !dataset.is_empty() && batch_size > 0 && gradient_accumulation_steps > 0,
            "an order needs rows, a batch size and accumulation steps; got {}, {batch_size} and \
             {gradient_accumulation_steps}",
            dataset.len()
        );
        Self {
            seed,
            lengths: dataset.lengths().collect(),
            batch_size,
            accumulation: gradient_accumulation_steps,
            max_batch_tokens,
        }
    }

    /// Optimizer steps per epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.lengths.len().div_ceil(self.rows_per_step())
    }

    /// Optimizer steps of a run: `max_steps` if given, else those of `num_epochs`, rounded up (as in transformers).
    pub fn total_steps(&self, num_epochs: f64, max_steps: Option<usize>) -> usize {
        max_steps.unwrap_or_else(|| (num_epochs * self.steps_per_epoch() as f64).ceil() as usize)
    }

    /// Epochs completed after `steps` optimizer steps: rows used, divided by the number of rows.
    pub fn epoch_at(&self, steps: usize) -> f64 {
        let (epochs, steps) = (
            steps / self.steps_per_epoch(),
            steps % self.steps_per_epoch(),
        );
        epochs as f64 + (steps * self.rows_per_step()) as f64 / self.lengths.len() as f64
    }

    /// The row indices of each micro-batch of optimizer step `step` of the run, from 0. They do not depend on
    /// earlier steps, so a run can be resumed at any step.
    pub fn step(&self, step: usize) -> Vec<Vec<usize>> {
        let (epoch, step) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        // Computed again for every step: a permutation of 100 000 rows takes less than a millisecond.
        let mut rng = generator(self.seed, Purpose::Order, epoch as u64);
        let rows = permutation(self.lengths.len(), &mut rng);
        let start = step * self.rows_per_step();
        let end = (start + self.rows_per_step()).min(rows.len());
        micro_batches(
            &rows[start..end],
            self.batch_size,
            self.max_batch_tokens,
            &self.lengths,
        )
    }

    fn rows_per_step(&self) -> usize {
        self.batch_size
            .saturating_mul(self.accumulation)
            .min(self.lengths.len())
    }
}

impl Dataset {
    /// All row indices in the order of the file, in batches of `batch_size` rows and at most
    /// `max_batch_tokens` tokens, as for a validation.
    ///
    /// # Panics
    ///
    /// If `batch_size` is 0.
    pub fn in_order(&self, batch_size: usize, max_batch_tokens: Option<usize>) -> Vec<Vec<usize>> {
        let rows: Vec<usize> = (0..self.len()).collect();
        let lengths: Vec<usize> = self.lengths().collect();
        micro_batches(&rows, batch_size, max_batch_tokens, &lengths)
    }
}

/// Rows in batches, within both limits.
fn micro_batches(
    rows: &[usize],
    batch_size: usize,
    max_batch_tokens: Option<usize>,
    lengths: &[usize],
) -> Vec<Vec<usize>> {
    let chunks = rows.chunks(batch_size);
    let Some(tokens) = max_batch_tokens else {
        return chunks.map(<[usize]>::to_vec).collect();
    };
    let mut batches = Vec::new();
    for chunk in chunks {
        let (mut batch, mut used) = (Vec::new(), 0);
        for row in chunk {
            if !batch.is_empty() && used + lengths[*row] > tokens {
                batches.push(std::mem::take(&mut batch));
                used = 0;
            }
            used += lengths[*row];
            batch.push(*row);
        }
        batches.push(batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::super::tokenize::TokenizedRow;
    use super::*;

    fn dataset(lengths: &[usize]) -> Dataset {
        let row = |length: &usize| TokenizedRow::answer(1, vec![1; *length], 1);
        Dataset {
            rows: lengths.iter().map(row).collect(),
            ..Dataset::default()
        }
    }

    fn order(seed: u64, rows: usize, batch_size: usize, accumulation: usize) -> Order {
        Order::new(
            seed,
            &dataset(&vec![2; rows]),
            batch_size,
            accumulation,
            None,
        )
    }

    #[test]
    fn every_epoch_takes_every_row_once_in_another_order() {
        let order = order(42, 23, 4, 2);
        assert_eq!(order.steps_per_epoch(), 3);
        let epoch = |first: usize| (first..first + 3).flat_map(|step| order.step(step).concat());
        let epochs: [Vec<usize>; 2] = [epoch(0).collect(), epoch(3).collect()];
        assert_ne!(epochs[0], epochs[1]);
        for mut rows in epochs {
            rows.sort_unstable();
            assert_eq!(rows, (0..23).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_last_step_of_an_epoch_takes_what_is_left() {
        let order = order(42, 23, 4, 2);
        let sizes = |step| order.step(step).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(
            (sizes(0), sizes(2), sizes(3)),
            (vec![4, 4], vec![4, 3], vec![4, 4])
        );
        assert_eq!((order.epoch_at(0), order.epoch_at(1)), (0.0, 8.0 / 23.0));
        assert_eq!(
            (order.epoch_at(3), order.epoch_at(4)),
            (1.0, 1.0 + 8.0 / 23.0)
        );
    }

    #[test]
    fn the_seed_decides_and_a_step_needs_none_before_it() {
        assert_eq!(order(1, 50, 3, 1).step(39), order(1, 50, 3, 1).step(39));
        assert_ne!(order(2, 50, 3, 1).step(39), order(1, 50, 3, 1).step(39));
    }

    #[test]
    fn accumulation_takes_the_rows_of_one_big_batch() {
        let accumulated = order(9, 64, 2, 4).step(3);
        assert_eq!(accumulated.len(), 4);
        assert_eq!(accumulated.concat(), order(9, 64, 8, 1).step(3).concat());
    }

    #[test]
    fn a_limit_on_tokens_splits_micro_batches_and_keeps_the_rows() {
        let lengths: Vec<usize> = (0..30).map(|row| 10 + row).collect();
        let limited = Order::new(4, &dataset(&lengths), 8, 2, Some(60)).step(1);
        let free = order(4, 30, 8, 2).step(1);
        assert_eq!(limited.concat(), free.concat());
        assert!(limited.len() > free.len());
        for batch in &limited {
            assert!(batch.iter().map(|row| lengths[*row]).sum::<usize>() <= 60);
        }
        let alone = dataset(&[5, 100, 5, 5]).in_order(3, Some(20));
        assert_eq!(alone, [vec![0], vec![1], vec![2], vec![3]]);
        assert_eq!(dataset(&[5; 4]).in_order(3, None), [vec![0, 1, 2], vec![3]]);
    }

    #[test]
    fn a_run_has_as_many_steps_as_its_epochs_take() {
        let steps = |epochs, max| order(4, 30, 8, 1).total_steps(epochs, max);
        assert_eq!(
            (steps(2.0, None), steps(0.3, None), steps(2.0, Some(3))),
            (8, 2, 3)
        );
        assert_eq!(order(4, 3, 8, 100).steps_per_epoch(), 1);
    }

    #[test]
    fn the_order_is_this_one_on_every_machine() {
        // Computed by a program of its own in Python, from the same definition.
        let expected = [8, 5, 4, 6, 7, 3, 9, 1, 0, 2];
        assert_eq!(order(42, 10, 10, 1).step(0), [expected]);
    }
}
