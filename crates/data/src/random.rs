//! Permutations that depend on a seed only.

use lora_core::CounterRng;

/// The uses of a seed; each draws different random numbers.
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
pub(super) enum Purpose {
    Split = 0x5350_4c49_5400,
    Order = 0x4f52_4445_5200,
    Sample = 0x5341_4d50_4c45,
}

/// The generator number `index` of a use.
pub(super) fn generator(seed: u64, purpose: Purpose, index: u64) -> CounterRng {
    CounterRng::new(seed).fork(purpose as u64).fork(index)
}

/// The numbers `0..n` in a random order (Fisher and Yates).
///
/// Integers only, and 64 bits on every platform: `usize` or a float would make the order depend on the machine.
pub(super) fn permutation(n: usize, rng: &mut CounterRng) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        // The high half of a product maps 64 random bits to 0..=last, with a bias of at most n/2⁶⁴.
        let other = (u128::from(rng.next_u64()) * (last as u128 + 1)) >> 64;
        numbers.swap(last, other as usize);
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_holds_every_number_once_and_repeats_with_its_seed() {
        let draw = |seed, index| permutation(100, &mut generator(seed, Purpose::Order, index));
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert_ne!(draw(1, 0), draw(2, 0));
        let mut sorted = draw(1, 0);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_ne!(
            permutation(100, &mut generator(1, Purpose::Split, 0)),
            draw(1, 0)
        );
    }

    #[test]
    fn every_order_of_three_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        let mut rng = generator(3, Purpose::Order, 0);
        for _ in 0..60_000 {
            *counts.entry(permutation(3, &mut rng)).or_insert(0) += 1;
        }
        // 10 000 each, with a standard deviation of 91; five of them.
        assert_eq!(counts.len(), 6);
        assert!(
            counts
                .values()
                .all(|count: &i32| (count - 10_000).abs() < 456),
            "{counts:?}"
        );
    }
}
