//! Products on the CPU that read transposed and narrowed operands in place, and add to a sum in its memory.

use burn::tensor::Tensor;

use super::{Matrix, MatrixMut, Threads};
use crate::cpu;

/// `sum + scale · left · right`, all f32.
pub fn multiply_add(
    sum: Option<Tensor<2>>,
    scale: f64,
    left: Tensor<2>,
    right: Tensor<2>,
) -> Tensor<2> {
    let ([n, k], m) = (left.dims(), right.dims()[1]);
    let (left, right) = (View::new(left), View::new(right));
    let (left, right) = (left.matrix(n, k), right.matrix(k, m));
    let scale = scale as f32;
    match sum {
        Some(sum) => {
            let mut sum = cpu::values(sum);
            let output = MatrixMut::new(sum.as_mut_slice(), n, m, m);
            cpu::multiply(output, true, scale, left, right, Threads::All);
            sum.into_tensor()
        }
        None => cpu::tensor(cpu::product(scale, left, right, Threads::All), [n, m]),
    }
}

/// A tensor's memory with its strides, so that a transposed or narrowed operand needs no copy.
struct View {
    tensor: cpu::FlexTensor,
    strides: [usize; 2],
    start: usize,
}

impl View {
    fn new(x: Tensor<2>) -> Self {
        let tensor = cpu::primitive_of(x);
        let layout = tensor.layout();
        let strides = layout.strides();
        // A view with negative strides is copied; no caller makes one.
        if strides.iter().all(|stride| *stride >= 0) {
            Self {
                strides: [strides[0] as usize, strides[1] as usize],
                start: layout.start_offset(),
                tensor,
            }
        } else {
            let tensor = tensor.to_contiguous();
            let strides = tensor.layout().strides();
            Self {
                strides: [strides[0] as usize, strides[1] as usize],
                start: 0,
                tensor,
            }
        }
    }

    fn matrix(&self, rows: usize, columns: usize) -> Matrix<'_> {
        let data = &self.tensor.storage::<f32>()[self.start..];
        Matrix::strided(data, [rows, columns], self.strides)
    }
}
