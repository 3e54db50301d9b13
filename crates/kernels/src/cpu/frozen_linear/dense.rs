//! The backward product with a frozen f32 weight on the CPU: in the tiles of quantized weights, if the processor has
//! the instructions. They transpose the weight faster than the general product does (transposing takes a tenth of the
//! time here). The forward product transposes nothing, and the general product is as fast.

use burn::backend::Flex;
use burn::tensor::Tensor;

use super::panels::{self, Stored};
use super::{Direction, f32_tiles};
use crate::cpu;

/// Whether [`backward`] can be used.
pub fn applies(sum: &Option<Tensor<2>>, x: &Tensor<2>, weight: &Tensor<2>) -> bool {
    let native = cpu::is_native(x) && cpu::is_native(weight);
    let [d_in, d_out] = weight.dims();
    let is_empty = d_in == 0 || d_out == 0;
    f32_tiles::is_supported() && native && !is_empty && sum.as_ref().is_none_or(cpu::is_native)
}

/// `sum + x · Wᵀ`; without a sum, the product alone.
pub fn backward(sum: Option<Tensor<2>>, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let (n, shape) = (x.dims()[0], weight.dims());
    let sum = sum.map(cpu::values);
    let (x, weight) = (cpu::values(x), cpu::values(weight));
    let dense = Dense {
        values: weight.as_slice(),
        shape,
    };
    let product = panels::product(sum, x.as_slice(), n, &dense, Direction::Backward);
    Tensor::from_primitive::<Flex>(product)
}

struct Dense<'a> {
    values: &'a [f32],
    shape: [usize; 2],
}

impl Stored for Dense<'_> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn block(&self) -> usize {
        1
    }

    #[inline(always)]
    fn unpack(&self, first: usize, panel: &mut [f32]) {
        panel.copy_from_slice(&self.values[first..][..panel.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, frozen_linear_backward, init};
    use burn::tensor::{Device, Tolerance};

    #[test]
    fn it_is_the_product_with_the_transposed_weight() {
        let device = Device::flex();
        let mut rng = CounterRng::new(8);
        for (n, d_in, d_out) in [(1, 40, 33), (20, 576, 1536), (13, 70, 1024)] {
            let weight = init::normal([d_in, d_out], 0.1, &mut rng, &device);
            let x = init::normal([n, d_out], 1.0, &mut rng, &device);
            let sum = init::normal([n, d_in], 1.0, &mut rng, &device);
            let expected = x.clone().matmul(weight.clone().transpose());
            // Sums of up to 1,536 products of about a tenth, in another order.
            let same = |got: Tensor<2>, expected: Tensor<2>| {
                let tolerance = Tolerance::absolute(5e-5);
                let (got, expected) = (got.into_data(), expected.into_data());
                got.assert_approx_eq::<f32>(&expected, tolerance);
            };
            let got = frozen_linear_backward(x.clone(), weight.clone());
            same(got, expected.clone());
            if f32_tiles::is_supported() {
                let got = backward(Some(sum.clone()), x, weight);
                same(got, expected + sum);
            }
        }
    }
}
