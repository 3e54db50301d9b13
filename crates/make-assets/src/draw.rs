//! Choices drawn from a seed.

use lora_core::CounterRng;

/// Draws whole numbers and list entries from lora-core's SplitMix64 generator, so that the same seed
/// makes the same text on every machine.
#[derive(Debug, Clone)]
pub(crate) struct Draw(CounterRng);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(CounterRng::new(seed))
    }

    /// The independent random stream number `index`; draws from one do not affect another.
    pub(crate) fn stream(&self, index: u64) -> Self {
        Self(self.0.fork(index))
    }

    /// A whole number in `0..bound`. `bound` is a few hundred at most, so the bias of a remainder
    /// of 64 random bits is below 1e-16.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.0.next_u64() % bound.max(1) as u64) as usize
    }

    /// A whole number in `low..=high`.
    pub(crate) fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// An entry of a list, which must not be empty.
    pub(crate) fn choose<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// True with a probability of `percent` %.
    pub(crate) fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// Shuffles a list (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffled_list_holds_the_same_entries_in_an_order_that_the_seed_fixes() {
        let shuffled = |seed| {
            let mut list: Vec<usize> = (0..50).collect();
            Draw::new(seed).shuffle(&mut list);
            list
        };
        let mut sorted = shuffled(3);
        assert_eq!(shuffled(3), sorted);
        assert_ne!(shuffled(4), sorted);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }
}
