//! Confidence intervals of shares, and a test whether two shares of the same examples differ by
//! more than chance.

/// The 97.5 % point of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// The 95 % interval of a share of `successes` in `trials` (Wilson, 1927, without continuity
/// correction). Without trials it is 0 to 1.
pub fn wilson(successes: usize, trials: usize) -> [f64; 2] {
    if trials == 0 {
        return [0.0, 1.0];
    }
    let n = trials as f64;
    let share = successes as f64 / n;
    let scale = 1.0 + Z * Z / n;
    let centre = (share + Z * Z / (2.0 * n)) / scale;
    let half = Z / scale * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    [(centre - half).max(0.0), (centre + half).min(1.0)]
}

/// The examples that only one of two models answered correctly, and the probability of such a
/// difference by chance.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct McNemar {
    /// Examples that only the first answered correctly.
    pub only_first: usize,
    /// Examples that only the second answered correctly.
    pub only_second: usize,
    /// The two-sided p-value of the exact test (McNemar, 1947, with the binomial distribution).
    pub p_value: f64,
}

/// Compares two models on the same examples.
///
/// # Panics
///
/// If the numbers of answers differ.
pub fn mcnemar(first: &[bool], second: &[bool]) -> McNemar {
    assert_eq!(first.len(), second.len(), "both answer the same examples");
    let only = |a: bool| {
        let pairs = first.iter().zip(second);
        pairs
            .filter(|(first, second)| **first == a && **second != a)
            .count()
    };
    let (only_first, only_second) = (only(true), only(false));
    McNemar {
        only_first,
        only_second,
        p_value: two_sided(only_first.min(only_second), only_first + only_second),
    }
}

/// Twice the probability of at most `k` heads in `n` tosses, at most 1. In logarithms, because 2⁻ⁿ
/// is 0 in floats from 1,075 tosses on.
fn two_sided(k: usize, n: usize) -> f64 {
    let mut log_term = -(n as f64) * std::f64::consts::LN_2;
    let mut sum = 0.0;
    for heads in 0..=k {
        sum += log_term.exp();
        log_term += ((n - heads) as f64).ln() - ((heads + 1) as f64).ln();
    }
    (2.0 * sum).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_its_share_and_stays_within_0_and_1() {
        for (successes, trials) in [(0, 1), (1, 1), (3, 7), (399, 400), (0, 0)] {
            let [low, high] = wilson(successes, trials);
            let share = successes as f64 / trials.max(1) as f64;
            assert!(0.0 <= low && low <= share && share <= high && high <= 1.0);
        }
        // No failure in 400 is not certainty: 3.84 / 403.84.
        assert!((wilson(400, 400)[0] - 0.990_488).abs() < 1e-6);
    }

    #[test]
    fn only_rows_on_which_two_differ_count() {
        let first = [true, true, true, false, false, true];
        let second = [true, false, false, true, false, true];
        let test = mcnemar(&first, &second);
        assert_eq!((test.only_first, test.only_second), (2, 1));
        assert_eq!(test.p_value, 1.0);
        assert_eq!(mcnemar(&[true; 5], &[true; 5]).p_value, 1.0);
        assert_eq!(mcnemar(&[true; 5], &[false; 5]).p_value, 2.0 / 32.0);
        assert_eq!(mcnemar(&[false; 5], &[true; 5]).only_second, 5);
    }
}
