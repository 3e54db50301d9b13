//! The gated feed-forward block, SwiGLU (Shazeer, 2020, <https://arxiv.org/abs/2002.05202>).

use std::mem::MaybeUninit;

use burn::module::Module;
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::{DType, Tensor};
use lora_core::{LoraLinear, cpu, in_vectors};
use rayon::prelude::*;

use crate::decoder_layer::DropoutSeeds;

/// `down(silu(gate(x)) · up(x))`.
#[derive(Module, Debug)]
#[allow(missing_docs)] // Hugging Face's names.
pub struct Mlp {
    pub gate_proj: LoraLinear,
    pub up_proj: LoraLinear,
    pub down_proj: LoraLinear,
}

impl Mlp {
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`
    /// - output: `[n, hidden]`
    pub(crate) fn forward(&self, x: Tensor<2>, seeds: &DropoutSeeds) -> Tensor<2> {
        let gate = self.gate_proj.forward_seeded(x.clone(), seeds.module(4));
        let up = self.up_proj.forward_seeded(x, seeds.module(5));
        self.down_proj
            .forward_seeded(silu(gate) * up, seeds.module(6))
    }
}

/// `silu(gate) · up`, outside any tape; computed in f32 and returned in the type of `gate`.
pub(crate) fn gated(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    if !cpu::is_native(gate) || !cpu::is_native(up) {
        let dtype = gate.dtype();
        let [gate, up] = [gate, up].map(|x| x.clone().cast(DType::F32));
        return (silu(gate) * up).cast(dtype);
    }
    let [n, width] = gate.dims();
    let (gate, up) = (cpu::values(gate.clone()), cpu::values(up.clone()));
    let (gate, up) = (gate.as_slice(), up.as_slice());
    let product = cpu::fill_rows(n, width, |first, piece| {
        let at = first * width;
        gate_piece(&gate[at..][..piece.len()], &up[at..][..piece.len()], piece);
    });
    cpu::tensor(product, [n, width])
}

/// The gradients of `gate` and `up` from that of [`gated`]'s output, in their memory where nobody else
/// has it: with σ the sigmoid of gate, `G·up·σ·(1 + gate·(1 − σ))` and `G·gate·σ`.
pub(crate) fn gated_backward(
    gate: Tensor<2>,
    up: Tensor<2>,
    gradient: Tensor<2>,
) -> (Tensor<2>, Tensor<2>) {
    if !cpu::is_native(&gate) || !cpu::is_native(&up) {
        let dtype = gate.dtype();
        let [gate, up, gradient] = [gate, up, gradient].map(|x| x.cast(DType::F32));
        let s = sigmoid(gate.clone());
        let through_up = gradient.clone() * gate.clone() * s.clone();
        let slope = s.clone() * (gate * (s.neg().add_scalar(1.0))).add_scalar(1.0);
        return ((gradient * up * slope).cast(dtype), through_up.cast(dtype));
    }
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
            let through_up = gradient * *gate * s;
            *gate = gradient * *up * s * (1.0 + *gate * (1.0 - s));
            *up = through_up;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Tolerance};
    use lora_core::{CounterRng, normal};

    #[test]
    fn the_passes_are_those_of_the_tape() {
        let device = Device::flex().autodiff();
        let mut rng = CounterRng::new(1);
        let mut random = |std| normal([9, 70], std, &mut rng, &device);
        let (gate, up) = (random(3.0).require_grad(), random(1.0).require_grad());
        let gradient = random(1.0);
        let y = silu(gate.clone()) * up.clone();
        let tape = (y.clone() * gradient.clone()).sum().backward();
        // Burn's exponential and ours differ in the last bits.
        let tolerance = Tolerance::absolute(3e-6);
        let (plain_gate, plain_up) = (gate.clone().inner(), up.clone().inner());
        let got = gated(&plain_gate, &plain_up).into_data();
        got.assert_approx_eq::<f32>(&y.into_data(), tolerance);
        let (d_gate, d_up) = gated_backward(plain_gate, plain_up, gradient.inner());
        for (got, expected) in [(d_gate, gate.grad(&tape)), (d_up, up.grad(&tape))] {
            let expected = expected.unwrap().into_data();
            got.into_data()
                .assert_approx_eq::<f32>(&expected, tolerance);
        }
    }
}
