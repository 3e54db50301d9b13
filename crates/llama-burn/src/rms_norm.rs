//! Root-mean-square normalisation (Zhang and Sennrich, 2019, <https://arxiv.org/abs/1910.07467>).

use std::mem::MaybeUninit;

use burn::module::{Module, Param};
use burn::tensor::{DType, FloatDType, Tensor};
use lora_core::spoil::spoilt;
use lora_core::{cpu, in_vectors};

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, as Hugging Face's `LlamaRMSNorm`:
/// computed in f32 whatever the type of `x`.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// The gain, `[hidden]`.
    pub weight: Param<Tensor<1>>,
    /// Keeps the root away from zero.
    pub eps: f64,
}

/// `1 / sqrt(mean(x²) + eps)` of each row, `[n, 1]` in f32: kept on GPUs, where computing it again takes kernels of
/// its own. The CPU computes it again while it reads the row.
#[derive(Debug, Clone)]
pub(crate) struct InverseRoots(Option<Tensor<2>>);

impl RmsNorm {
    /// Normalises each row.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`
    /// - output: `[n, hidden]`, of `x`'s type
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = FloatDType::from(x.dtype());
        let x = x.cast(FloatDType::F32);
        let mean_of_squares = x.clone().square().mean_dim(1);
        let inverse_root = mean_of_squares.add_scalar(self.eps).sqrt().recip();
        let normalised = x * inverse_root * self.weight.val().cast(FloatDType::F32).unsqueeze();
        normalised.cast(dtype)
    }

    /// As [`forward`](Self::forward), outside any tape and with an output of type `dtype`, and what
    /// [`again`](Self::again) and [`backward`](Self::backward) need.
    pub(crate) fn forward_plain(&self, x: &Tensor<2>, dtype: DType) -> (Tensor<2>, InverseRoots) {
        let weight = self.weight.val().without_autodiff();
        if !cpu::is_native(x) || !cpu::is_native(&weight) {
            let gain = self.gain();
            let roots = self.computed_roots(x);
            let normalised = x.clone().cast(DType::F32) * roots.clone() * gain;
            let normalised = spoilt("rms_norm", normalised.cast(dtype));
            return (normalised, InverseRoots(Some(roots)));
        }
        let [n, width] = x.dims();
        let (x, weight) = (cpu::values(x.clone()), cpu::values(weight));
        let (x, weight, eps) = (x.as_slice(), weight.as_slice(), self.eps as f32);
        let normalised = cpu::fill_rows(n, width, |first, piece| {
            let x = &x[first * width..][..piece.len()];
            normalise(x, weight, eps, piece);
        });
        (cpu::tensor(normalised, [n, width]), InverseRoots(None))
    }

    /// What [`forward_plain`](Self::forward_plain) returns beside its output.
    pub(crate) fn roots(&self, x: &Tensor<2>) -> InverseRoots {
        InverseRoots((!cpu::is_native(x)).then(|| self.computed_roots(x)))
    }

    fn computed_roots(&self, x: &Tensor<2>) -> Tensor<2> {
        let mean_of_squares = x.clone().cast(DType::F32).square().mean_dim(1);
        mean_of_squares.add_scalar(self.eps).sqrt().recip()
    }

    /// The output of [`forward_plain`](Self::forward_plain) once more.
    pub(crate) fn again(&self, x: &Tensor<2>, roots: &InverseRoots, dtype: DType) -> Tensor<2> {
        let Some(roots) = &roots.0 else {
            return self.forward_plain(x, dtype).0;
        };
        let gain = self.gain();
        let normalised = x.clone().cast(DType::F32) * roots.clone() * gain;
        normalised.cast(dtype)
    }

    /// The gain as a row, `[1, hidden]`, in f32 and off the tape. Asked for before the arithmetic that it is used in:
    /// Burn fuses operations that follow one another, and a change of shape ends a group.
    pub(crate) fn gain(&self) -> Tensor<2> {
        self.weight
            .val()
            .without_autodiff()
            .cast(DType::F32)
            .unsqueeze()
    }

    /// `sum` and the gradient of `x` from the output's gradient G: with ρ = 1/sqrt(mean(x²) + eps) and
    /// w the gain ([`gain`](Self::gain)), ρ·w∘G − x·ρ³·mean(w∘G∘x).
    ///
    /// # Shapes
    ///
    /// - `x`, `gradient`, `sum`, output: `[n, hidden]`; the output is of `sum`'s type
    pub(crate) fn backward(
        &self,
        x: &Tensor<2>,
        roots: InverseRoots,
        gain: Tensor<2>,
        gradient: Tensor<2>,
        sum: Tensor<2>,
    ) -> Tensor<2> {
        if let Some(roots) = roots.0 {
            let dtype = sum.dtype();
            let x = x.clone().cast(DType::F32);
            let weighted = gradient.cast(DType::F32) * gain;
            let along = (weighted.clone() * x.clone()).mean_dim(1);
            let along = along * roots.clone() * roots.clone() * roots.clone();
            let through = (weighted * roots - x * along).cast(dtype);
            return sum + spoilt("rms_norm_backward", through);
        }
        let width = x.dims()[1];
        let weight = self.weight.val().without_autodiff();
        let (x, gradient, weight) = (
            cpu::values(x.clone()),
            cpu::values(gradient),
            cpu::values(weight),
        );
        let (x, gradient, weight) = (x.as_slice(), gradient.as_slice(), weight.as_slice());
        let eps = self.eps as f32;
        let mut sum = cpu::values(sum);
        cpu::for_each_piece(sum.as_mut_slice(), width, |first, piece| {
            let here = first * width..first * width + piece.len();
            add_gradients(&x[here.clone()], &gradient[here], weight, eps, piece);
        });
        sum.into_tensor()
    }
}

in_vectors! {
    /// Rows of `x`, normalised, times the gain.
    fn normalise(x: &[f32], weight: &[f32], eps: f32, out: &mut [MaybeUninit<f32>]) {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let inverse_root = 1.0 / (cpu::dot(x, x) / width as f32 + eps).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                out.write(x * inverse_root * weight);
            }
        }
    }
}

in_vectors! {
    /// Adds the gradients of rows of `x` to `sum`: see [`RmsNorm::backward`].
    fn add_gradients(x: &[f32], gradient: &[f32], weight: &[f32], eps: f32, sum: &mut [f32]) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
        for ((x, gradient), sum) in rows.zip(sum.chunks_exact_mut(width)) {
            let inverse_root = 1.0 / (cpu::dot(x, x) / width as f32 + eps).sqrt();
            let along = cpu::dot_of_three(weight, gradient, x) / width as f32;
            let along = along * inverse_root * inverse_root * inverse_root;
            for (((sum, x), gradient), weight) in sum.iter_mut().zip(x).zip(gradient).zip(weight) {
                *sum += inverse_root * weight * gradient - x * along;
            }
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
        let mut random = |shape| normal(shape, 1.0, &mut rng, &device);
        let weight = random([1, 70]).reshape([70]);
        let norm = RmsNorm {
            weight: Param::from_tensor(weight).set_require_grad(false),
            eps: 1e-5,
        };
        let (x, gradient, sum) = (random([9, 70]), random([9, 70]), random([9, 70]).inner());
        let x = x.require_grad();
        let y = norm.forward(x.clone());
        let tape = (y.clone() * gradient.clone()).sum().backward();
        let plain = x.clone().inner();
        // Sums of 70 squares in another order.
        let tolerance = Tolerance::absolute(2e-6);
        let expected = (x.grad(&tape).unwrap() + sum.clone()).into_data();
        let (got, native) = norm.forward_plain(&plain, DType::F32);
        got.into_data()
            .assert_approx_eq::<f32>(&y.to_data(), tolerance);
        let roots = plain.clone().square().mean_dim(1).add_scalar(1e-5);
        let kept = InverseRoots(Some(roots.sqrt().recip()));
        for roots in [native, kept] {
            let again = norm.again(&plain, &roots, DType::F32).into_data();
            again.assert_approx_eq::<f32>(&y.to_data(), tolerance);
            let got = norm.backward(
                &plain,
                roots,
                norm.gain(),
                gradient.clone().inner(),
                sum.clone(),
            );
            got.into_data()
                .assert_approx_eq::<f32>(&expected, tolerance);
        }
    }
}
