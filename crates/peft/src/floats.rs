//! Tensors in f32 that are written to a safetensors file.

use std::borrow::Cow;

use kernels::cpu;
use safetensors::{Dtype, View};

/// A borrowed tensor. Its bytes are created when they are written.
#[derive(Debug, Clone)]
pub struct Floats<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
    /// The shape of `values`, if the file gets the transpose.
    transposed: Option<[usize; 2]>,
}

impl<'a> Floats<'a> {
    /// A tensor of this shape, row-major.
    ///
    /// # Panics
    ///
    /// If the number of values does not match the shape.
    pub fn new(values: &'a [f32], shape: Vec<usize>) -> Self {
        let count: usize = shape.iter().product();
        assert_eq!(values.len(), count, "a tensor of {shape:?}");
        Self {
            shape,
            values,
            transposed: None,
        }
    }

    /// The transpose `[columns, rows]` of a row-major `[rows, columns]` matrix.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new).
    pub fn transposed(values: &'a [f32], [rows, columns]: [usize; 2]) -> Self {
        Self {
            transposed: Some([rows, columns]),
            ..Self::new(values, vec![columns, rows])
        }
    }

    /// The values in memory order, not transposed.
    pub fn values(&self) -> &'a [f32] {
        self.values
    }
}

impl View for Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = |values: &[f32]| {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes());
            Cow::Owned(bytes.collect())
        };
        match self.transposed {
            Some(shape) => bytes(&cpu::transposed(self.values, shape)),
            None => bytes(self.values),
        }
    }

    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transpose_has_the_bytes_of_its_columns() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let transposed = Floats::transposed(&values, [2, 3]);
        let columns = [1.0, 4.0, 2.0, 5.0, 3.0, 6.0];
        let plain = Floats::new(&columns, vec![3, 2]);
        assert_eq!(transposed.shape(), plain.shape());
        assert_eq!(transposed.data(), plain.data());
        assert_eq!(transposed.data().len(), transposed.data_len());
    }
}
