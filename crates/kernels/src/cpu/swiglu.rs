//! SwiGLU on the CPU, the backward pass in the memory of its inputs.

use std::mem::MaybeUninit;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::{cpu, in_vectors};

/// [`crate::swiglu`] for f32.
pub fn forward(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    let [n, width] = gate.dims();
    let (gate, up) = (cpu::values(gate.clone()), cpu::values(up.clone()));
    let (gate, up) = (gate.as_slice(), up.as_slice());
    let product = cpu::fill_rows(n, width, |first, piece| {
        let at = first * width;
        gate_piece(&gate[at..][..piece.len()], &up[at..][..piece.len()], piece);
    });
    cpu::tensor(product, [n, width])
}

/// [`crate::swiglu_backward`] for f32.
pub fn backward(gate: Tensor<2>, up: Tensor<2>, gradient: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let width = gate.dims()[1];
    let (mut gate, mut up) = (cpu::values(gate), cpu::values(up));
    let gradient = cpu::values(gradient);
    let piece = cpu::rows_per_piece(width) * width.max(1);
    gate.as_mut_slice()
        .par_chunks_mut(piece)
        .zip(up.as_mut_slice().par_chunks_mut(piece))
        .zip(gradient.as_slice().par_chunks(piece))
        .for_each(|((gate, up), gradient)| gate_piece_backward(gate, up, gradient));
    (gate.into_tensor(), up.into_tensor())
}

in_vectors! {
    fn gate_piece(gate: &[f32], up: &[f32], out: &mut [MaybeUninit<f32>]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            out.write(gate * up / (1.0 + cpu::exp(-gate)));
        }
    }
}

in_vectors! {
    /// Replaces both by their gradients.
    fn gate_piece_backward(gate: &mut [f32], up: &mut [f32], gradient: &[f32]) {
        for ((gate, up), gradient) in gate.iter_mut().zip(up).zip(gradient) {
            let s = 1.0 / (1.0 + cpu::exp(-*gate));
            let d_up = gradient * *gate * s;
            *gate = gradient * *up * s * (1.0 + *gate * (1.0 - s));
            *up = d_up;
        }
    }
}
