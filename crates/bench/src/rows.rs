//! The examples of a scenario and their order, the same for every contender.

use std::path::Path;

use lora_core::CounterRng;

use super::error::BenchError;
use super::protocol::{Row, Step};
use data::PromptTemplate;
use data::{self, Dataset, ModelFiles, Order, RowTokenizer, TokenizedRow};

/// The seed of the order of examples and of all other random numbers.
pub(super) const SEED: u64 = 42;

/// The training data of a scenario.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Work {
    /// The examples that the steps use.
    pub rows: Vec<Row>,
    /// The indices of the examples of every micro-batch of every step.
    pub steps: Vec<Step>,
    /// The same examples grouped by length, as with `group_by_length`.
    pub grouped: Vec<Step>,
}

impl Work {
    /// A number of steps over `rows` in the trainer's own order.
    ///
    /// # Panics
    ///
    /// If there are no examples, or a size is 0.
    pub fn new(rows: Vec<Row>, batch_size: usize, accumulation: usize, steps: usize) -> Self {
        let tokenized = rows
            .iter()
            .map(|row| TokenizedRow::answer(0, row.ids.clone(), row.prompt_tokens));
        let dataset = Dataset {
            rows: tokenized.collect(),
            ..Dataset::default()
        };
        let order = Order::new(SEED, &dataset, batch_size, accumulation, None);
        let steps: Vec<Step> = (0..steps).map(|step| order.step(step)).collect();
        let (rows, steps) = only_used(rows, steps);
        let grouped = grouped(&rows, &steps, batch_size);
        Self {
            rows,
            steps,
            grouped,
        }
    }

    /// The tokens of the longest example.
    pub fn longest(&self) -> usize {
        let lengths = self.rows.iter().map(|row| row.ids.len());
        lengths.max().unwrap_or(0)
    }
}

/// Removes examples that no step uses, so that they take no memory.
fn only_used(rows: Vec<Row>, steps: Vec<Step>) -> (Vec<Row>, Vec<Step>) {
    let mut place = vec![None; rows.len()];
    let mut used = Vec::new();
    let mut renumbered = |index: &usize| {
        *place[*index].get_or_insert_with(|| {
            used.push(rows[*index].clone());
            used.len() - 1
        })
    };
    let steps = steps.iter().map(|step| {
        let batches = step.iter();
        batches
            .map(|batch| batch.iter().map(&mut renumbered).collect())
            .collect()
    });
    let steps = steps.collect();
    (used, steps)
}

/// All examples of the run sorted by length, cut into batches, and the batches in a random order.
fn grouped(rows: &[Row], steps: &[Step], batch_size: usize) -> Vec<Step> {
    let mut all: Vec<usize> = steps.iter().flatten().flatten().copied().collect();
    all.sort_by_key(|index| rows[*index].ids.len());
    let mut batches: Vec<Vec<usize>> = all.chunks(batch_size).map(<[usize]>::to_vec).collect();
    let mut rng = CounterRng::new(SEED);
    for last in (1..batches.len()).rev() {
        let other = (rng.uniform() * (last + 1) as f64) as usize;
        batches.swap(last, other.min(last));
    }
    let mut batches = batches.into_iter();
    let step = |step: &Step| batches.by_ref().take(step.len()).collect();
    steps.iter().map(step).collect()
}

/// The examples of a data file.
///
/// # Errors
///
/// An error of the model's tokenizer or the file.
pub(super) fn from_file(
    model: &Path,
    data: &Path,
    vocab_size: usize,
    max_tokens: usize,
) -> Result<Vec<Row>, BenchError> {
    let tokenizer = RowTokenizer::new(&ModelFiles::read(model)?, &PromptTemplate::Raw)?;
    let dataset = data::load(data, &tokenizer, max_tokens, vocab_size)?;
    let rows = dataset.rows.into_iter().map(|row| Row {
        prompt_tokens: row.prompt_tokens(),
        ids: row.ids,
    });
    Ok(rows.collect())
}

/// Long documents with a short answer, as in FinLoRA's XBRL tasks: examples concatenated to
/// `tokens` tokens, with the target of the last one in the loss.
pub(super) fn concatenated(rows: &[Row], tokens: usize, count: usize) -> Vec<Row> {
    let mut source = rows.iter().cycle();
    let mut document = || {
        let mut ids: Vec<u32> = Vec::new();
        let mut supervised = 0;
        while ids.len() < tokens {
            let Some(row) = source.next() else { break };
            ids.extend_from_slice(&row.ids);
            supervised = row.ids.len() - row.prompt_tokens;
        }
        // The beginning is cut off, so that the answer keeps its question.
        let ids = ids.split_off(ids.len().saturating_sub(tokens));
        Row {
            prompt_tokens: ids.len().saturating_sub(supervised).max(1),
            ids,
        }
    };
    (0..count).map(|_| document()).collect()
}

/// Examples of random tokens with two tokens in the loss each, for models without a tokenizer. No
/// two share a prefix.
pub(super) fn random(tokens: usize, count: usize, vocab_size: usize) -> Vec<Row> {
    let root = CounterRng::new(SEED);
    let row = |index| {
        let mut rng = root.fork(index as u64);
        let ids = (0..tokens).map(|_| (rng.uniform() * vocab_size as f64) as u32);
        Row {
            ids: ids.collect(),
            prompt_tokens: tokens.saturating_sub(2).max(1),
        }
    };
    (0..count).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(length: usize, prompt_tokens: usize) -> Row {
        Row {
            ids: (0..length as u32).collect(),
            prompt_tokens,
        }
    }

    #[test]
    fn grouping_keeps_the_rows_and_puts_similar_lengths_together() {
        let rows = (0..40).map(|index| row(5 + (index * 7) % 40, 2)).collect();
        let work = Work::new(rows, 4, 2, 5);
        assert!(work.steps.iter().all(|step| step.len() == 2));
        let sorted = |steps: &[Step]| {
            let mut all: Vec<usize> = steps.iter().flatten().flatten().copied().collect();
            all.sort_unstable();
            all
        };
        assert_eq!(sorted(&work.steps), sorted(&work.grouped));
        let padded = |steps: &[Step]| -> usize {
            let batches = steps.iter().flatten();
            let width =
                |batch: &Vec<usize>| batch.iter().map(|row| work.rows[*row].ids.len()).max();
            batches
                .map(|batch| batch.len() * width(batch).unwrap())
                .sum()
        };
        assert!(padded(&work.grouped) < padded(&work.steps));
    }

    #[test]
    fn rows_that_no_step_uses_are_left_out_and_those_used_twice_are_there_once() {
        let rows: Vec<Row> = (0..100).map(|index| row(5 + index, 2)).collect();
        assert_eq!(Work::new(rows.clone(), 2, 1, 3).rows.len(), 6);
        let few = Work::new(rows[..4].to_vec(), 2, 1, 10);
        assert_eq!((few.rows.len(), few.steps.len()), (4, 10));
        assert_eq!(few.longest(), 8);
    }

    #[test]
    fn a_long_row_has_exactly_the_tokens_asked_for_and_ends_with_an_answer() {
        let rows = [row(10, 7), row(6, 5)];
        for long in concatenated(&rows, 32, 3) {
            assert_eq!(long.ids.len(), 32);
            let supervised = 32 - long.prompt_tokens;
            assert!(supervised == 3 || supervised == 1, "{supervised}");
        }
        assert!(
            concatenated(&[], 32, 2)
                .iter()
                .all(|row| row.ids.is_empty())
        );
        let random = random(16, 2, 50);
        assert_ne!(random[0].ids[..4], random[1].ids[..4]);
        assert!(random.iter().flat_map(|row| &row.ids).all(|id| *id < 50));
    }
}
