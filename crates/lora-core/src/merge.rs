//! Between a layer with an adapter and a plain `Linear`.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Tensor};

use crate::{LoraError, LoraLinear};

impl LoraLinear {
    /// The layer as a plain `Linear` with the weight `W₀ + γ·A·B`, outside the autodiff graph, its columns scaled if the
    /// adapter's method scales outputs.
    ///
    /// A quantized W₀ is dequantized first, so the result is dense. Without an adapter the weight is W₀.
    ///
    /// # Shapes
    ///
    /// - weight of the output: `[d_in, d_out]`
    pub fn merge(&self) -> Linear {
        let base = self.dense_base();
        let weight = match self.adapter_delta() {
            Some(delta) => {
                let delta = delta.cast(base.dtype());
                match self.output_factor() {
                    Some(factor) => (base + delta) * factor,
                    None => base + delta,
                }
            }
            None => base,
        };
        self.plain_linear(weight)
    }

    /// Subtracts this layer's adapter from `merged`: the weight becomes `W − γ·A·B`. Columns that the adapter
    /// scales are first divided by their factors.
    ///
    /// The result equals W₀ up to one rounding of the sum.
    ///
    /// # Errors
    ///
    /// [`LoraError::NoAdapter`] without an adapter, [`LoraError::Shape`] if `merged` is of another size.
    pub fn unmerge(&self, merged: Linear) -> Result<Linear, LoraError> {
        let delta = self.adapter_delta().ok_or(LoraError::NoAdapter)?;
        let weight = merged.weight.val().without_autodiff();
        if weight.dims() != self.dims() {
            return Err(LoraError::Shape {
                name: "the merged weight",
                expected: self.dims().to_vec(),
                got: weight.dims().to_vec(),
            });
        }
        let delta = delta.cast(weight.dtype());
        let weight = match self.output_factor() {
            Some(factor) => weight / factor,
            None => weight,
        };
        Ok(self.plain_linear(weight - delta))
    }

    /// W₀, dense and outside the autodiff graph, `[d_in, d_out]`.
    pub fn dense_base(&self) -> Tensor<2> {
        let base = self.weight.base().without_autodiff();
        match base.dtype() {
            DType::QFloat(_) => base.dequantize(),
            _ => base,
        }
    }

    /// `γ·A·B`, `[d_in, d_out]`: what the adapter adds to the weight, outside the autodiff graph.
    pub fn adapter_delta(&self) -> Option<Tensor<2>> {
        self.adapter().map(|adapter| {
            let [a, b] = adapter.detached_factors();
            a.matmul(b).mul_scalar(adapter.scale())
        })
    }

    /// The adapter's factor per column, `[1, d_out]`, in the type of the dense weight.
    fn output_factor(&self) -> Option<Tensor<2>> {
        let base = self.weight.base();
        let dtype = match base.dtype() {
            DType::QFloat(_) => DType::F32,
            dtype => dtype,
        };
        let scaling = self.adapter()?.scaling(&base)?;
        Some(scaling.factor.cast(dtype))
    }

    fn plain_linear(&self, weight: Tensor<2>) -> Linear {
        let frozen = |tensor| Param::from_tensor(tensor).set_require_grad(false);
        let frozen_bias = |bias: Tensor<1>| Param::from_tensor(bias).set_require_grad(false);
        Linear {
            weight: frozen(weight),
            bias: match (&self.bias, &self.lora_bias) {
                (Some(bias), None) => Some(frozen_bias(bias.val().without_autodiff())),
                _ => self.added_bias(DType::F32).map(frozen_bias),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::LinearConfig;
    use burn::tensor::{Device, Tolerance};
    use kernels::{CounterRng, Quantization, normal};

    fn adapted(quantization: Quantization, bias: bool) -> (LoraLinear, Tensor<2>) {
        let device = Device::flex();
        let mut rng = CounterRng::new(3);
        let linear = LinearConfig::new(64, 96).with_bias(bias).init(&device);
        let a = normal([64, 4], 0.2, &mut rng, &device);
        let b = normal([4, 96], 0.2, &mut rng, &device);
        let layer = LoraLinear::frozen(linear)
            .with_adapter(a, b, 2.5)
            .unwrap()
            .quantize(quantization)
            .unwrap();
        (layer, normal([5, 64], 1.0, &mut rng, &device))
    }

    #[test]
    fn merging_then_running_equals_running_with_the_adapter() {
        for (quantization, bias) in [
            (Quantization::None, true),
            (Quantization::Bits8, true),
            (Quantization::Bits4, false),
        ] {
            let (layer, x) = adapted(quantization, bias);
            let expected = layer.forward(x.clone());
            let merged = layer.merge().forward(x);
            // f32 sums of 64 products of order 1, in another order.
            let tolerance = Tolerance::absolute(1e-5);
            merged
                .into_data()
                .assert_approx_eq::<f32>(&expected.into_data(), tolerance);
        }
    }

    #[test]
    fn unmerging_restores_the_frozen_weight() {
        let (layer, _) = adapted(Quantization::Bits8, true);
        let restored = layer.unmerge(layer.merge()).unwrap();
        let difference = (restored.weight.val() - layer.dense_base()).abs().max();
        // One rounding of a sum of magnitude below 4.
        assert!(difference.into_scalar::<f32>() <= 4.8e-7);
    }

    #[test]
    fn a_layer_without_an_adapter_merges_to_itself_and_cannot_be_unmerged() {
        let (layer, _) = adapted(Quantization::None, false);
        let plain = layer.without_adapter();
        let merged = plain.merge();
        merged
            .weight
            .val()
            .into_data()
            .assert_eq(&plain.weight.base().into_data(), true);
        assert_eq!(plain.unmerge(merged).unwrap_err(), LoraError::NoAdapter);
    }
}
