//! RoPE on the CPU, in the memory of its input.

use burn::tensor::Tensor;

use crate::rope::{RotaryTables, Rotation};
use crate::{cpu, in_vectors};

/// [`crate::rotate`] for f32.
pub fn rotate(x: Tensor<2>, tables: &RotaryTables, rotation: Rotation) -> Tensor<2> {
    let (width, half) = (x.dims()[1], tables.cos.dims()[1]);
    let mut x = cpu::values(x);
    let (cos, sin) = (
        cpu::values(tables.cos.clone()),
        cpu::values(tables.sin.clone()),
    );
    let (cos, sin) = (cos.as_slice(), sin.as_slice());
    let sign = match rotation {
        Rotation::Forward => 1.0,
        Rotation::Inverse => -1.0,
    };
    cpu::for_each_piece(x.as_mut_slice(), width, |first, piece| {
        let here = first * half..first * half + piece.len() / width * half;
        rotate_rows(piece, &cos[here.clone()], &sin[here], [width, half], sign);
    });
    x.into_tensor()
}

in_vectors! {
    /// Rotates the heads of rows of `width` by the angles of `[rows, half]`.
    fn rotate_rows(x: &mut [f32], cos: &[f32], sin: &[f32], widths: [usize; 2], sign: f32) {
        let [width, half] = widths;
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (x, (cos, sin)) in x.chunks_exact_mut(width).zip(angles) {
            for head in x.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                let halves = first.iter_mut().zip(second);
                for (((first, second), cos), sin) in halves.zip(cos).zip(sin) {
                    let sin = sign * sin;
                    let rotated = *first * cos - *second * sin;
                    *second = *second * cos + *first * sin;
                    *first = rotated;
                }
            }
        }
    }
}
