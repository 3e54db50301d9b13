//! RMSNorm on the CPU: each row is read and written once. The backward pass recomputes the root mean square while it
//! reads the row.

use std::mem::MaybeUninit;

use burn::tensor::Tensor;

use crate::{cpu, in_vectors};

/// [`crate::rms_norm`] for f32.
pub fn forward(x: &Tensor<2>, gain: Tensor<2>, eps: f64) -> Tensor<2> {
    let [n, width] = x.dims();
    let (x, gain) = (cpu::values(x.clone()), cpu::values(gain));
    let (x, gain, eps) = (x.as_slice(), gain.as_slice(), eps as f32);
    let normalized = cpu::fill_rows(n, width, |first, piece| {
        let x = &x[first * width..][..piece.len()];
        normalize(x, gain, eps, piece);
    });
    cpu::tensor(normalized, [n, width])
}

/// [`crate::rms_norm_backward`] for f32.
pub fn backward(
    x: &Tensor<2>,
    gain: Tensor<2>,
    eps: f64,
    gradient: Tensor<2>,
    sum: Tensor<2>,
) -> Tensor<2> {
    let width = x.dims()[1];
    let (x, gradient, gain) = (
        cpu::values(x.clone()),
        cpu::values(gradient),
        cpu::values(gain),
    );
    let (x, gradient, gain) = (x.as_slice(), gradient.as_slice(), gain.as_slice());
    let eps = eps as f32;
    let mut sum = cpu::values(sum);
    cpu::for_each_piece(sum.as_mut_slice(), width, |first, piece| {
        let here = first * width..first * width + piece.len();
        add_gradients(&x[here.clone()], &gradient[here], gain, eps, piece);
    });
    sum.into_tensor()
}

in_vectors! {
    /// Rows of `x`, normalized, times the gain.
    fn normalize(x: &[f32], gain: &[f32], eps: f32, out: &mut [MaybeUninit<f32>]) {
        let width = gain.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let inverse_root = 1.0 / (cpu::dot(x, x) / width as f32 + eps).sqrt();
            for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
                out.write(x * inverse_root * gain);
            }
        }
    }
}

in_vectors! {
    /// Adds the gradients of rows of `x` to `sum`.
    fn add_gradients(x: &[f32], gradient: &[f32], gain: &[f32], eps: f32, sum: &mut [f32]) {
        let width = gain.len();
        let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
        for ((x, gradient), sum) in rows.zip(sum.chunks_exact_mut(width)) {
            let inverse_root = 1.0 / (cpu::dot(x, x) / width as f32 + eps).sqrt();
            let along = cpu::dot_of_three(gain, gradient, x) / width as f32;
            let along = along * inverse_root * inverse_root * inverse_root;
            for (((sum, x), gradient), gain) in sum.iter_mut().zip(x).zip(gradient).zip(gain) {
                *sum += inverse_root * gain * gradient - x * along;
            }
        }
    }
}
