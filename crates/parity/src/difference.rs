//! Measures of the difference of numbers from their reference.

/// The largest absolute difference and its index; infinite if the lengths differ, NaN if a number
/// is NaN.
pub(super) fn max_abs(got: &[f32], expected: &[f32]) -> (f64, usize) {
    if got.len() != expected.len() {
        return (f64::INFINITY, 0);
    }
    let mut worst = (0.0f64, 0);
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (*got as f64 - *expected as f64).abs();
        if difference.is_nan() {
            return (f64::NAN, index);
        }
        if difference > worst.0 {
            worst = (difference, index);
        }
    }
    worst
}

/// Frobenius norm of the difference over that of the reference; the norm of the difference itself
/// if the reference is zero.
pub(super) fn relative(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let pairs = got.iter().zip(expected);
    let squares = pairs.map(|(got, expected)| (*got as f64 - *expected as f64).powi(2));
    let difference = squares.sum::<f64>().sqrt();
    let norm = expected
        .iter()
        .map(|value| (*value as f64).powi(2))
        .sum::<f64>()
        .sqrt();
    if norm > 0.0 {
        difference / norm
    } else {
        difference
    }
}

/// The largest relative difference of two curves, and its step (counted from 1).
pub(super) fn curves(got: &[f64], expected: &[f64]) -> (f64, usize) {
    if got.len() != expected.len() {
        return (f64::INFINITY, 0);
    }
    let mut worst = (0.0f64, 1);
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got - expected).abs() / expected.abs().max(f64::MIN_POSITIVE);
        if difference.is_nan() {
            return (f64::NAN, index + 1);
        }
        if difference > worst.0 {
            worst = (difference, index + 1);
        }
    }
    worst
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_what_they_say() {
        assert_eq!(max_abs(&[1.0, -2.0, 3.0], &[1.0, 2.0, 2.5]), (4.0, 1));
        assert_eq!(relative(&[3.0, 4.0], &[3.0, 0.0]), 4.0 / 3.0);
        assert_eq!(relative(&[3.0, 4.0], &[0.0, 0.0]), 5.0);
        assert_eq!(curves(&[2.0, 1.1], &[2.0, 1.0]).1, 2);
    }

    #[test]
    fn other_lengths_and_nan_never_look_equal() {
        assert_eq!(max_abs(&[1.0], &[1.0, 2.0]).0, f64::INFINITY);
        assert_eq!(relative(&[], &[1.0]), f64::INFINITY);
        assert_eq!(curves(&[], &[1.0]).0, f64::INFINITY);
        assert!(max_abs(&[f32::NAN, 9.0], &[1.0, 1.0]).0.is_nan());
        assert!(relative(&[f32::NAN], &[1.0]).is_nan());
        assert!(curves(&[f64::NAN, 1.0], &[1.0, 9.0]).0.is_nan());
    }
}
