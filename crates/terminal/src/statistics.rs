//! Medians, ranges and ratios of measurements.

use serde::Serialize;

/// Median and range of measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle value, or the mean of the two middle values.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of `values`. `None` if there are none, or if one of them is NaN.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        if values.iter().any(|value| value.is_nan()) {
            return None;
        }
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
        };
        Some(Self { median, min, max })
    }
}

/// The median. `None` if there are no values, or if one of them is NaN.
pub fn median(values: &[f64]) -> Option<f64> {
    Spread::of(values).map(|spread| spread.median)
}

/// The ratio of two series of measurements, computed in two ways. They differ if the machine's speed
/// changed between rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// The ratio of the medians.
    pub of_medians: f64,
    /// The median of the ratios of each round.
    pub median_of_rounds: f64,
}

impl Ratio {
    /// `numerator` over `denominator`, measured in the same rounds. `None` if one of them is empty, or if a
    /// ratio is not finite.
    pub fn of(numerator: &[f64], denominator: &[f64]) -> Option<Self> {
        let rounds = numerator.iter().zip(denominator);
        let rounds: Vec<f64> = rounds.map(|(a, b)| a / b).collect();
        let ratio = Self {
            of_medians: median(numerator)? / median(denominator)?,
            median_of_rounds: median(&rounds)?,
        };
        (ratio.of_medians.is_finite() && ratio.median_of_rounds.is_finite()).then_some(ratio)
    }
}

/// The largest `|a − b| / |b|` of pairs. `None` without a pair. NaN counts as infinite.
pub fn largest_relative_difference(values: &[f64], reference: &[f64]) -> Option<f64> {
    let pairs = values.iter().zip(reference);
    let differences = pairs.map(|(a, b)| match (a - b).abs() / b.abs() {
        difference if difference.is_nan() => f64::INFINITY,
        difference => difference,
    });
    differences.reduce(f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[1.0, f64::NAN]), None);
        let spread = Spread::of(&[5.0, 1.0, 2.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.0, 5.0));
    }

    #[test]
    fn a_slow_round_moves_the_ratio_of_medians_and_not_the_ratio_of_rounds() {
        // The machine is half as fast in the second and third rounds, for one of the two only in the third.
        let (ours, theirs) = ([40.0, 20.0, 20.0], [20.0, 10.0, 20.0]);
        let ratio = Ratio::of(&ours, &theirs).unwrap();
        assert_eq!((ratio.of_medians, ratio.median_of_rounds), (1.0, 2.0));
        assert_eq!(Ratio::of(&[], &[]), None);
        assert_eq!(Ratio::of(&[1.0], &[0.0]), None);
    }

    #[test]
    fn a_loss_that_is_no_number_differs_without_limit() {
        assert_eq!(
            largest_relative_difference(&[1.0, 2.2], &[1.0, 2.0]).map(|d| (d * 1e6).round()),
            Some(100_000.0)
        );
        let nan = largest_relative_difference(&[f64::NAN, 1.0], &[1.0, 1.0]);
        assert_eq!(nan, Some(f64::INFINITY));
        assert_eq!(largest_relative_difference(&[], &[]), None);
    }
}
