//! Floats as weight files hold them.

use half::{bf16, f16};

/// Little-endian floats as f32, exactly. `None` where the type is not f32, f16 or bf16.
///
/// `dtype` is the name of the type in any case: `F32` in safetensors, `BF16` and so on.
pub fn to_f32(bytes: &[u8], dtype: &str) -> Option<Vec<f32>> {
    if dtype.eq_ignore_ascii_case("f32") {
        let values = bytes.as_chunks::<4>().0.iter();
        Some(values.map(|b| f32::from_le_bytes(*b)).collect())
    } else if dtype.eq_ignore_ascii_case("f16") {
        Some(halves(bytes, |b| f16::from_le_bytes(b).to_f32()))
    } else if dtype.eq_ignore_ascii_case("bf16") {
        Some(halves(bytes, |b| bf16::from_le_bytes(b).to_f32()))
    } else {
        None
    }
}

/// Little-endian values of two bytes each.
pub(crate) fn halves<T>(bytes: &[u8], value: fn([u8; 2]) -> T) -> Vec<T> {
    bytes.as_chunks::<2>().0.iter().map(|b| value(*b)).collect()
}

/// The first value that is NaN or infinite, with its index.
pub fn first_not_finite(values: impl IntoIterator<Item = f32>) -> Option<(usize, f32)> {
    let mut values = values.into_iter().enumerate();
    values.find(|(_, value)| !value.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_widened_and_other_types_are_none() {
        let one = bf16::from_f32(1.5).to_le_bytes();
        assert_eq!(to_f32(&one, "BF16"), Some(vec![1.5]));
        let one = f16::from_f32(-2.0).to_le_bytes();
        assert_eq!(to_f32(&one, "f16"), Some(vec![-2.0]));
        let two = [0.1f32, -3e38].map(f32::to_le_bytes).concat();
        assert_eq!(to_f32(&two, "F32"), Some(vec![0.1, -3e38]));
        assert_eq!(to_f32(&[0; 8], "I64"), None);
    }

    #[test]
    fn the_first_value_that_is_not_finite_has_its_index() {
        assert_eq!(first_not_finite([1.0, -2.0]), None);
        let (index, value) = first_not_finite([1.0, f32::NAN, f32::INFINITY]).unwrap();
        assert!(index == 1 && value.is_nan());
    }
}
