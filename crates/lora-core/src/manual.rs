//! Forward and backward passes of LoRA layers written out, without a tape.
//!
//! A tape computes the gradient of every operation by itself. Written out, layers with the same input
//! share the products with it, sums are accumulated where they lie, nothing is kept that the backward
//! pass does not read, and the order of every sum is fixed. The mathematics is that of
//! [`LoraLinear::forward`]; the tests compare with Burn's tape.
//!
//! For `h = x·W₀ + γ·(x·A)·B` and the gradient G of h (Hu et al., 2021,
//! <https://arxiv.org/abs/2106.09685>): ∂A = γ·xᵀ·(G·Bᵀ), ∂B = γ·(x·A)ᵀ·G, ∂x = G·W₀ᵀ + γ·(G·Bᵀ)·Aᵀ.
//!
//! A DoRA scales h by m/n for each output, n a constant: ∂m = Σ G ⊙ h / n over the rows, and G ⊙ m/n takes
//! G's place in the rest.

use burn::module::Param;
use burn::tensor::{DType, Tensor};

use kernels::{
    Direction, frozen_product, multiply_add, multiply_in_f32, product, transposes_low_rank,
};

use crate::LoraLinear;
use crate::dora::Scaling;

/// Layers that take the same input, run together outside any tape.
///
/// The frozen weights get no gradient, trainable or not.
#[derive(Debug, Clone, Copy)]
pub struct LinearGroup<'a, const N: usize> {
    layers: [&'a LoraLinear; N],
    dropout_seeds: [Option<u64>; N],
}

/// What a forward pass leaves for the backward pass: the adapters' low-rank products γ·x·A, `[n, r]` each, and
/// of a DoRA what it scales, `[n, d_out]`.
#[derive(Debug, Clone)]
pub struct LowRank<const N: usize> {
    products: [Option<Tensor<2>>; N],
    scaled: [Option<Scaled>; N],
    /// The adapters' A side by side, `[d_in, Σ r]`, where all share one product with the input; on GPUs times γ where
    /// that is one number.
    all_a: Option<Tensor<2>>,
}

/// What a DoRA scales, before that.
#[derive(Debug, Clone)]
struct Scaled {
    output: Tensor<2>,
    scaling: Scaling,
}

impl<'a, const N: usize> LinearGroup<'a, N> {
    /// A group. With seeds the layers' dropout acts, as in [`LoraLinear::forward_seeded`].
    pub fn new(layers: [&'a LoraLinear; N], dropout_seeds: [Option<u64>; N]) -> Self {
        Self {
            layers,
            dropout_seeds,
        }
    }

    /// Whether a layer has an adapter, so that the backward pass needs the input.
    pub fn has_adapters(&self) -> bool {
        self.layers.iter().any(|layer| layer.adapter().is_some())
    }

    /// The outputs, each added to its sum where one is given. An output has the type of its sum, or without one the
    /// type of `x`, which products are computed in.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, d_in]`
    /// - `sums`, outputs: `[n, d_out]` of each layer
    ///
    /// # Panics
    ///
    /// If the shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor<2>,
        mut sums: [Option<Tensor<2>>; N],
    ) -> ([Tensor<2>; N], LowRank<N>) {
        let (products, all_a) = self.low_rank(x);
        let mut scaled = [const { None }; N];
        let outputs = std::array::from_fn(|i| {
            let layer = self.layers[i];
            let weight = layer.weight.base();
            let sum = sums[i].take();
            let mut y = match (&products[i], layer.adapter(), &layer.dora) {
                (Some(low), Some(adapter), Some(dora)) => {
                    let scaling = dora.scaling(&weight, adapter);
                    let b = factor(&adapter.b, x.dtype());
                    let by = scaling.factor.clone().cast(x.dtype());
                    let dropped = self.dropped(i, x.clone());
                    let through = frozen_product(None, dropped, weight.clone(), Direction::Forward);
                    // Under dropout the base's own part sees the whole input.
                    let base = self.drops_in(i).then(|| {
                        let own = frozen_product(None, x.clone(), weight, Direction::Forward);
                        own - through.clone()
                    });
                    let output = multiply_add(Some(through), 1.0, low.clone(), b);
                    let y = output.clone() * by;
                    scaled[i] = Some(Scaled { output, scaling });
                    let y = match base {
                        Some(base) => y + base,
                        None => y,
                    };
                    match sum {
                        Some(sum) => {
                            let dtype = sum.dtype();
                            sum + y.cast(dtype)
                        }
                        None => y,
                    }
                }
                (Some(low), Some(adapter), None) => {
                    let y = frozen_product(sum, x.clone(), weight, Direction::Forward);
                    let b = factor(&adapter.b, x.dtype());
                    multiply_add(Some(y), 1.0, low.clone(), b)
                }
                _ => frozen_product(sum, x.clone(), weight, Direction::Forward),
            };
            if let Some(bias) = &layer.bias {
                let dtype = y.dtype();
                y = y + bias.val().without_autodiff().cast(dtype).unsqueeze();
            }
            y
        });
        let low = LowRank {
            products,
            scaled,
            all_a,
        };
        (outputs, low)
    }

    /// The gradients of the adapters, each given to `accumulate` in f32, and, if `input_gradient` is set, of `x`.
    ///
    /// `x` is called only where there are adapters: it may compute the input again. `low` is what the
    /// forward pass left.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[n, d_in]`
    /// - `gradients`: `[n, d_out]` of each layer
    pub fn backward(
        &self,
        x: impl FnOnce() -> Tensor<2>,
        low: LowRank<N>,
        gradients: [Tensor<2>; N],
        input_gradient: bool,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) -> Option<Tensor<2>> {
        let dtype = gradients[0].dtype();
        // What is left of a gradient behind a DoRA's scaling, and under dropout what it changes of the base.
        let mut beside: [Option<Tensor<2>>; N] = [const { None }; N];
        let gradients: [Tensor<2>; N] = {
            let mut index = 0;
            gradients.map(|gradient| {
                let i = index;
                index += 1;
                let (Some(dora), Some(scaled)) = (&self.layers[i].dora, &low.scaled[i]) else {
                    return gradient;
                };
                let product =
                    gradient.clone().cast(DType::F32) * scaled.output.clone().cast(DType::F32);
                let sum = product.sum_dim(0) / scaled.scaling.norms.clone();
                accumulate(&dora.magnitude, sum);
                let through = gradient.clone() * scaled.scaling.factor.clone().cast(dtype);
                if self.drops_in(i) {
                    beside[i] = Some(gradient);
                }
                through
            })
        };
        for (i, gradient) in gradients.iter().enumerate() {
            if let (Some(adapter), Some(low)) = (self.layers[i].adapter(), &low.products[i]) {
                let b = multiply_in_f32(low.clone().transpose(), gradient.clone());
                accumulate(&adapter.b, b);
            }
        }
        let low_gradients = if self.drops() {
            LowGradients::Apart(std::array::from_fn(|i| {
                let adapter = self.layers[i].adapter()?;
                let b = factor(&adapter.b, dtype).transpose();
                Some(multiply_add(None, adapter.scale, gradients[i].clone(), b))
            }))
        } else {
            LowGradients::Together(self.low_gradients(&gradients, dtype))
        };
        let mut below = None;
        let mut through_mask: [Option<Tensor<2>>; N] = [const { None }; N];
        if input_gradient {
            for (i, gradient) in gradients.into_iter().enumerate() {
                let weight = self.layers[i].weight.base();
                let own = match beside[i].take() {
                    None => gradient,
                    Some(own) => {
                        let rest = gradient - own.clone();
                        let weight = weight.clone();
                        through_mask[i] =
                            Some(frozen_product(None, rest, weight, Direction::Backward));
                        own
                    }
                };
                below = Some(frozen_product(below, own, weight, Direction::Backward));
            }
        }
        if self.has_adapters() {
            let x = x();
            match low_gradients {
                LowGradients::Together(Some(all)) => {
                    self.through_shared(x, all, low.all_a, &mut below, accumulate);
                }
                LowGradients::Together(None) => {}
                LowGradients::Apart(all) => {
                    self.through_dropped(x, all, through_mask, &mut below, accumulate);
                }
            }
        }
        below
    }

    /// γ·x·A of every adapter; one product for all of them unless dropout gives each an input of its own.
    fn low_rank(&self, x: &Tensor<2>) -> ([Option<Tensor<2>>; N], Option<Tensor<2>>) {
        if !self.has_adapters() {
            return ([const { None }; N], None);
        }
        if self.drops() {
            let apart = std::array::from_fn(|i| {
                let adapter = self.layers[i].adapter()?;
                let a = factor(&adapter.a, x.dtype());
                let dropped = self.dropped(i, x.clone());
                Some(multiply_add(None, adapter.scale, dropped, a))
            });
            return (apart, None);
        }
        let scale = self.common_scale();
        let (low, all) = if transposes_low_rank(x) {
            // Transposed, so that each adapter's part is contiguous.
            let all = scaled(self.all_a(x.dtype()), scale);
            (product(all.clone().transpose(), x.clone().transpose()), all)
        } else {
            let all = self.all_a(x.dtype());
            (
                multiply_add(None, scale.unwrap_or(1.0), x.clone(), all.clone()),
                all,
            )
        };
        let mut start = 0;
        let products = std::array::from_fn(|i| {
            let adapter = self.layers[i].adapter()?;
            let r = adapter.a.lazy_shape()[1];
            start += r;
            let low = if transposes_low_rank(x) {
                low.clone().narrow(0, start - r, r).transpose()
            } else {
                low.clone().narrow(1, start - r, r)
            };
            Some(match scale {
                Some(_) => low,
                None => low.mul_scalar(adapter.scale),
            })
        });
        (products, Some(all))
    }

    /// γ·G·Bᵀ of every adapter side by side: `[n, Σ r]`. Where [`transposes_low_rank`] it is turned, `[Σ r, n]`, and without a γ that
    /// is one number.
    fn low_gradients(&self, gradients: &[Tensor<2>; N], dtype: DType) -> Option<Tensor<2>> {
        let turned = transposes_low_rank(&gradients[0]);
        let common = self.common_scale().is_some();
        let parts = self
            .layers
            .iter()
            .zip(gradients)
            .filter_map(|(layer, gradient)| {
                let adapter = layer.adapter()?;
                let b = factor(&adapter.b, dtype);
                Some(if turned {
                    let part = product(b, gradient.clone().transpose());
                    scaled(part, (!common).then_some(adapter.scale))
                } else {
                    multiply_add(None, adapter.scale, gradient.clone(), b.transpose())
                })
            });
        let mut parts: Vec<Tensor<2>> = parts.collect();
        Some(match parts.len() {
            0 => return None,
            1 => parts.remove(0),
            _ => Tensor::cat(parts, if turned { 0 } else { 1 }),
        })
    }

    /// The scale of all adapters, if it is one.
    fn common_scale(&self) -> Option<f64> {
        let mut scales = self
            .layers
            .iter()
            .filter_map(|layer| Some(layer.adapter()?.scale));
        let first = scales.next()?;
        scales.all(|scale| scale == first).then_some(first)
    }

    /// The adapters' A side by side, `[d_in, Σ r]`.
    fn all_a(&self, dtype: DType) -> Tensor<2> {
        let adapters = self.layers.iter().filter_map(|layer| layer.adapter());
        let mut all: Vec<_> = adapters.map(|adapter| factor(&adapter.a, dtype)).collect();
        match all.len() {
            1 => all.remove(0),
            _ => Tensor::cat(all, 1),
        }
    }

    fn through_shared(
        &self,
        x: Tensor<2>,
        all: Tensor<2>,
        all_a: Option<Tensor<2>>,
        below: &mut Option<Tensor<2>>,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) {
        let dtype = x.dtype();
        let turned = transposes_low_rank(&x);
        let a_gradients = if turned {
            scaled(multiply_in_f32(all.clone(), x), self.common_scale())
        } else {
            multiply_in_f32(x.transpose(), all.clone())
        };
        let mut start = 0;
        for adapter in self.layers.iter().filter_map(|layer| layer.adapter()) {
            let r = adapter.a.lazy_shape()[1];
            let gradient = if turned {
                a_gradients.clone().narrow(0, start, r).transpose()
            } else {
                a_gradients.clone().narrow(1, start, r)
            };
            accumulate(&adapter.a, gradient);
            start += r;
        }
        if let Some(sum) = below.take() {
            // On GPUs it has the factor γ that the gradients lack.
            let a = all_a.unwrap_or_else(|| self.all_a(dtype)).transpose();
            let all = if turned { all.transpose() } else { all };
            *below = Some(multiply_add(Some(sum), 1.0, all, a));
        }
    }

    fn through_dropped(
        &self,
        x: Tensor<2>,
        low_gradients: [Option<Tensor<2>>; N],
        mut through_mask: [Option<Tensor<2>>; N],
        below: &mut Option<Tensor<2>>,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) {
        for (i, gradient) in low_gradients.into_iter().enumerate() {
            let (Some(gradient), Some(adapter)) = (gradient, self.layers[i].adapter()) else {
                continue;
            };
            let dropped = self.dropped(i, x.clone());
            let a = multiply_in_f32(dropped.transpose(), gradient.clone());
            accumulate(&adapter.a, a);
            if let Some(sum) = below.take() {
                let a = factor(&adapter.a, x.dtype()).transpose();
                let through = multiply_add(through_mask[i].take(), 1.0, gradient, a);
                // The mask scales what it keeps, in both directions alike.
                *below = Some(sum + self.dropped(i, through));
            }
        }
    }

    fn drops(&self) -> bool {
        (0..N).any(|layer| self.drops_in(layer))
    }

    fn drops_in(&self, layer: usize) -> bool {
        self.dropout_seeds[layer].is_some() && self.layers[layer].dropout.prob > 0.0
    }

    /// `x` through a layer's dropout mask, which its seed fixes.
    fn dropped(&self, layer: usize, x: Tensor<2>) -> Tensor<2> {
        match self.dropout_seeds[layer] {
            Some(seed) => self.layers[layer].dropout.forward(x, Some(seed)),
            None => x,
        }
    }
}

/// What reaches the adapters' low-rank products.
#[allow(clippy::large_enum_variant)] // It lives for a few lines.
enum LowGradients<const N: usize> {
    /// Of all adapters, as they share their input.
    Together(Option<Tensor<2>>),
    /// Of each, as under dropout.
    Apart([Option<Tensor<2>>; N]),
}

fn scaled(x: Tensor<2>, scale: Option<f64>) -> Tensor<2> {
    match scale {
        Some(scale) if scale != 1.0 => x.mul_scalar(scale),
        _ => x,
    }
}

/// A factor's value in the type that is computed in, off the tape.
fn factor(param: &Param<Tensor<2>>, dtype: DType) -> Tensor<2> {
    param.val().without_autodiff().cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterDropout;
    use burn::module::ParamId;
    use burn::nn::LinearConfig;
    use burn::tensor::Device;
    use kernels::{CounterRng, Quantization, normal};
    use std::collections::HashMap;

    fn random(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
        normal(shape, 0.3, &mut CounterRng::new(seed), device)
    }

    /// Three layers of different widths and ranks, the second without an adapter, one with a bias; with
    /// `dora` the first is one.
    fn layers(
        device: &Device,
        quantization: Quantization,
        dropout: f64,
        dora: bool,
    ) -> [LoraLinear; 3] {
        let layer = |d_out: usize, r: usize, bias: bool| {
            let linear = LinearConfig::new(64, d_out).with_bias(bias).init(device);
            let mut layer = LoraLinear::frozen(linear);
            if r > 0 {
                let (a, b) = (random([64, r], 1, device), random([r, d_out], 2, device));
                layer = layer.with_adapter(a, b, 1.5).unwrap();
            }
            layer.dropout = AdapterDropout::new(dropout);
            layer = layer.quantize(quantization).unwrap();
            if dora && bias {
                let magnitude = random([1, d_out], 8, device).add_scalar(2.0);
                layer = layer.with_dora(Some(magnitude)).unwrap();
            }
            layer
        };
        [layer(96, 4, true), layer(32, 0, false), layer(64, 7, false)]
    }

    fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
        let norm = |x: Tensor<2>| x.powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        norm(a.clone() - b.clone()) / norm(b.clone())
    }

    #[test]
    fn outputs_and_gradients_are_those_of_the_tape() {
        let device = Device::flex().autodiff();
        for quantization in [Quantization::None, Quantization::Bits8] {
            for (dropout, dora) in [(0.0, false), (0.3, false), (0.0, true), (0.3, true)] {
                let layers = layers(&device, quantization, dropout, dora);
                let seeds = [Some(5), Some(6), Some(7)];
                let x = random([9, 64], 3, &device).require_grad();
                let gradients = [96, 32, 64].map(|width| random([9, width], width as u64, &device));

                let mut outputs = Vec::new();
                let mut sum = Tensor::<1>::zeros([1], &device);
                for i in 0..3 {
                    let y = layers[i].forward_seeded(x.clone(), seeds[i]);
                    sum = sum + (y.clone() * gradients[i].clone()).sum();
                    outputs.push(y.inner());
                }
                let tape = sum.backward();

                let group = LinearGroup::new(layers.each_ref(), seeds);
                let plain = x.clone().inner();
                let start = outputs[2].clone() * 2.0;
                let (got, low) = group.forward(&plain, [None, None, Some(start)]);
                let [first, second, third] = got;
                let expected_third = outputs[2].clone() * 3.0;
                for (got, expected) in [
                    (&first, &outputs[0]),
                    (&second, &outputs[1]),
                    (&third, &expected_third),
                ] {
                    assert!(distance(got, expected) < 2e-6);
                }

                let mut collected: HashMap<ParamId, Tensor<2>> = HashMap::new();
                let below = group.backward(
                    || plain.clone(),
                    low,
                    gradients.clone().map(|gradient| gradient.inner()),
                    true,
                    &mut |param, gradient| {
                        collected.insert(param.id, gradient);
                    },
                );
                // f32 sums of up to 96 products in another order.
                assert!(distance(&below.unwrap(), &x.grad(&tape).unwrap()) < 2e-6);
                assert_eq!(collected.len(), if dora { 5 } else { 4 });
                for param in layers.iter().flat_map(LoraLinear::trainable) {
                    let expected = param.val().grad(&tape).unwrap();
                    assert!(distance(&collected[&param.id], &expected) < 2e-6);
                }
            }
        }
    }

    #[test]
    fn without_adapters_the_input_is_not_asked_for() {
        let device = Device::flex();
        let layer = LoraLinear::frozen(LinearConfig::new(8, 4).init(&device));
        let group = LinearGroup::new([&layer], [None]);
        let (_, low) = group.forward(&Tensor::ones([3, 8], &device), [None]);
        let below = group.backward(
            || panic!("nothing needs the input"),
            low,
            [Tensor::ones([3, 4], &device)],
            true,
            &mut |_, _| panic!("nothing is trained"),
        );
        assert_eq!(below.unwrap().dims(), [3, 8]);
        let none = group.backward(
            || panic!("nothing needs the input"),
            group.forward(&Tensor::ones([3, 8], &device), [None]).1,
            [Tensor::ones([3, 4], &device)],
            false,
            &mut |_, _| panic!("nothing is trained"),
        );
        assert!(none.is_none());
    }
}
