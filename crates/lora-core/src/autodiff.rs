//! The forward pass in Burn's autodiff graph.
//!
//! Rust programs that put a [`LoraLinear`] into a model of their own call it. The manual passes in `manual.rs` compute
//! the same outside a graph.

use burn::tensor::Tensor;
use kernels::{frozen_linear, product};

use crate::LoraLinear;

impl LoraLinear {
    /// The layer's output. In training with dropout, each call draws a new mask.
    ///
    /// # Shapes
    ///
    /// - `x`: `[..., d_in]`
    /// - output: `[..., d_out]`
    ///
    /// # Panics
    ///
    /// If the last dimension of `x` is not `d_in`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.forward_seeded(x, None)
    }

    /// As [`forward`](Self::forward), with the dropout mask fixed by `dropout_seed`. The mask is the same on every
    /// device, in a recomputation, and outside an autodiff graph. See
    /// [`AdapterDropout::forward`](crate::AdapterDropout::forward).
    pub fn forward_seeded<const D: usize>(
        &self,
        x: Tensor<D>,
        dropout_seed: Option<u64>,
    ) -> Tensor<D> {
        let mut shape = x.dims();
        let [d_in, d_out] = self.dims();
        assert_eq!(
            shape[D - 1],
            d_in,
            "x is {shape:?}, the layer takes [..., {d_in}]"
        );
        let rows = shape[..D - 1].iter().product::<usize>();
        let x = x.reshape([rows, d_in]);
        let base = self.weight.base();
        // Only `unfreeze()` makes the base trainable, for full fine-tuning.
        let base_product = |x: Tensor<2>| {
            if base.is_require_grad() {
                product(x, base.clone())
            } else {
                frozen_linear(x, base.clone())
            }
        };
        let mut y = base_product(x.clone());
        if let Some(adapter) = self.adapter() {
            let dropped = self.dropout.forward(x.clone(), dropout_seed);
            let dtype = x.dtype();
            // γ multiplies x·A, `[n, r]`, the smallest tensor of the chain.
            let [a, b] = adapter.factors().map(|factor| factor.cast(dtype));
            let xa = product(dropped.clone(), a);
            let delta = product(xa.mul_scalar(adapter.scale()), b);
            y = match adapter.scaling_in_graph(&base, x.is_autodiff()) {
                None => y + delta,
                Some(factor) => {
                    let factor = factor.cast(dtype);
                    if self.dropout.acts(&x, dropout_seed) {
                        // As in PEFT: the base layer gets the whole input, the scaled part the dropped one.
                        let dropped_base = base_product(dropped);
                        y - dropped_base.clone() + (dropped_base + delta) * factor
                    } else {
                        (y + delta) * factor
                    }
                }
            };
        }
        if let Some(bias) = &self.bias {
            y = y + bias.val().unsqueeze();
        }
        if let Some(bias) = &self.lora_bias {
            let scale = self.adapter().map_or(1.0, |adapter| adapter.scale());
            y = y + bias.val().mul_scalar(scale).unsqueeze();
        }
        shape[D - 1] = d_out;
        y.reshape(shape)
    }
}

#[cfg(test)]
mod tests {
    use crate::AdapterDropout;
    use crate::linear::tests::{adapted, random, values};
    use burn::module::Module;
    use burn::tensor::{Device, Tolerance};
    use kernels::Quantization;

    #[test]
    fn forward_is_the_frozen_product_plus_bias_plus_the_scaled_adapter() {
        let device = Device::flex();
        let layer = adapted(&device, Quantization::None);
        let x = random([2 * 3, 64], 3, &device);
        let adapter = layer.adapter().unwrap();
        let [a, b] = adapter.factors();
        let weight = layer.weight.base() + a.matmul(b) * 4.0;
        let expected = x.clone().matmul(weight) + layer.bias.as_ref().unwrap().val().unsqueeze();
        let got = layer.forward(x.reshape([2, 3, 64]));
        assert_eq!(got.dims(), [2, 3, 96]);
        let tolerance = Tolerance::absolute(2e-5);
        got.reshape([6, 96])
            .into_data()
            .assert_approx_eq::<f32>(&expected.into_data(), tolerance);
    }

    #[test]
    fn gradients_are_those_of_the_dense_formula_and_the_frozen_weight_has_none() {
        let device = Device::flex().autodiff();
        for quantization in [Quantization::None, Quantization::Bits8] {
            let layer = adapted(&device, quantization);
            let [a, b] = layer.adapter().unwrap().factors();
            let x = random([7, 64], 3, &device).require_grad();
            let grad = random([7, 96], 4, &device);
            let gradients = (layer.forward(x.clone()) * grad.clone()).sum().backward();

            let (plain_a, plain_b) = (a.clone().inner(), b.clone().inner());
            let (plain_x, grad) = (x.clone().inner(), grad.inner());
            let base = match quantization {
                Quantization::None => layer.weight.base().inner(),
                _ => layer.weight.base().inner().dequantize(),
            };
            // h = x·W₀ + 4·x·A·B: the textbook derivatives, on the dense weight.
            let d_xa = grad.clone().matmul(plain_b.transpose()) * 4.0;
            let expected_a = plain_x.clone().transpose().matmul(d_xa.clone());
            let expected_b = (plain_x.matmul(plain_a.clone()) * 4.0)
                .transpose()
                .matmul(grad.clone());
            let expected_x = grad.matmul(base.transpose()) + d_xa.matmul(plain_a.transpose());
            for (got, expected) in [
                (a.grad(&gradients), expected_a),
                (b.grad(&gradients), expected_b),
                (x.grad(&gradients), expected_x),
            ] {
                let (got, expected) = (got.unwrap(), expected);
                let norm = expected
                    .clone()
                    .powf_scalar(2.)
                    .sum()
                    .sqrt()
                    .into_scalar::<f32>();
                let difference = (got - expected)
                    .powf_scalar(2.)
                    .sum()
                    .sqrt()
                    .into_scalar::<f32>();
                assert!(
                    difference / norm < 2e-6,
                    "{quantization:?}: {}",
                    difference / norm
                );
            }
            assert!(layer.weight.base().grad(&gradients).is_none());
            assert!(
                layer
                    .bias
                    .as_ref()
                    .unwrap()
                    .val()
                    .grad(&gradients)
                    .is_none()
            );
        }
    }

    #[test]
    fn dropout_acts_in_training_only_and_a_seed_fixes_it() {
        let device = Device::flex().autodiff();
        let mut layer = adapted(&device, Quantization::None);
        layer.dropout = AdapterDropout::new(0.5);
        let x = random([5, 64], 3, &device);
        let run = |seed| values(&layer.forward_seeded(x.clone(), seed).inner());
        assert_eq!(run(Some(1)), run(Some(1)));
        assert_ne!(run(Some(1)), run(Some(2)));
        let mut undropped = layer.clone();
        undropped.dropout = AdapterDropout::new(0.0);
        let valid = values(&layer.valid().forward(x.clone().inner()));
        assert_eq!(valid, values(&undropped.forward(x.clone()).inner()));
        assert_ne!(valid, run(Some(1)));
    }
}
