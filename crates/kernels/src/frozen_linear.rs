//! The product with a frozen weight. In an autodiff graph it saves the packed weight only.
//!
//! Burn's product with a quantized weight in an autodiff graph dequantizes the weight and saves the dense result for
//! the backward pass (burn-backend `q_matmul`, burn-autodiff `float_matmul`), so that 8-bit storage saves no memory in
//! training. Here the backward pass unpacks the weight again.

use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::{FloatTensor, QuantizedTensor};
use burn::backend::{Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{DType, Device, Tensor};

use crate::cpu::frozen_linear::flex;
use crate::dispatch::{Kernels, of};
use crate::gpu_products::{ProductOps, product, product_of};
use crate::low_rank::{LowRankPart, LowRankTerm};

/// A backend's products with a frozen quantized weight. The default bodies work on every backend; a backend overrides
/// them with faster kernels.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Autodiff, Fusion: cfg(feature = "cube"))]
pub trait FrozenLinearOps: ProductOps {
    /// `x · W`, with x `[n, d_in]` and W `[d_in, d_out]`.
    #[fusion(default)]
    fn frozen_linear_forward(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
    ) -> FloatTensor<Self> {
        let dense = Self::dequantize(weight, x.dtype().into());
        product_of::<Self>(x, dense)
    }

    /// `dY · Wᵀ`, with dY `[n, d_out]` and W `[d_in, d_out]`.
    #[fusion(default)]
    fn frozen_linear_backward(
        grad: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
    ) -> FloatTensor<Self> {
        let dense = Self::dequantize(weight, grad.dtype().into());
        product_of::<Self>(grad, Self::float_transpose(dense))
    }

    /// `sum + x · W`, or with `backward` `sum + x · Wᵀ`, in the sum's type, outside an autodiff graph.
    #[fusion(default)]
    fn frozen_linear_add(
        sum: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
        backward: bool,
    ) -> FloatTensor<Self> {
        let product = if backward {
            Self::frozen_linear_backward(x, weight)
        } else {
            Self::frozen_linear_forward(x, weight)
        };
        let product = if sum.dtype() == product.dtype() {
            product
        } else {
            Self::float_cast(product, sum.dtype().into())
        };
        Self::float_add(sum, product)
    }
}

impl FrozenLinearOps for Flex {
    fn frozen_linear_forward(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
    ) -> FloatTensor<Self> {
        flex::product(None, x, weight, Direction::Forward)
    }

    fn frozen_linear_backward(
        grad: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
    ) -> FloatTensor<Self> {
        flex::product(None, grad, weight, Direction::Backward)
    }

    fn frozen_linear_add(
        sum: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
        backward: bool,
    ) -> FloatTensor<Self> {
        let direction = if backward {
            Direction::Backward
        } else {
            Direction::Forward
        };
        flex::product(Some(sum), x, weight, direction)
    }
}

/// The node in the autodiff graph. Its state is the packed weight: a reference, not a copy of the values.
#[derive(Debug)]
struct FrozenLinearBackward;

impl<B: FrozenLinearOps> Backward<B, 1> for FrozenLinearBackward {
    type State = QuantizedTensor<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let [x] = ops.parents;
        let grad = gradients.consume::<B>(&ops.node);
        if let Some(x) = x {
            gradients.register::<B>(x.id, B::frozen_linear_backward(grad, ops.state));
        }
    }
}

impl<B: FrozenLinearOps, C: CheckpointStrategy> FrozenLinearOps for Autodiff<B, C> {
    fn frozen_linear_forward(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
    ) -> FloatTensor<Self> {
        let prepared = FrozenLinearBackward
            .prepare::<C>([x.node()])
            .compute_bound()
            .stateful();
        let x = x.primitive().clone();
        match prepared {
            OpsKind::Tracked(prepared) => {
                let y = B::frozen_linear_forward(x, weight.clone());
                prepared.finish(weight, y)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(B::frozen_linear_forward(x, weight)),
        }
    }

    fn frozen_linear_backward(
        _grad: FloatTensor<Self>,
        _weight: QuantizedTensor<Self>,
    ) -> FloatTensor<Self> {
        // Only `FrozenLinearBackward` calls it, on the inner backend.
        unreachable!("second derivatives are not supported, as anywhere in burn-autodiff")
    }
}

/// The product of `x` with a frozen weight.
///
/// The weight gets no gradient. A quantized weight is unpacked for each product, forward and backward, and never stored
/// dense: on the CPU panel by panel into a cache-sized buffer, on GPUs by the backend's kernels. A dense weight is a
/// constant.
///
/// # Shapes
///
/// - `x`: `[n, d_in]`, float
/// - `weight`: `[d_in, d_out]`, float or quantized
/// - output: `[n, d_out]`, of `x`'s type
///
/// # Panics
///
/// If the inner dimensions differ.
pub fn frozen_linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let ([_, d_in], [rows, _]) = (x.dims(), weight.dims());
    assert_eq!(
        d_in, rows,
        "frozen_linear: x is [n, {d_in}], the weight [{rows}, d_out]"
    );
    // Detached from its graph the weight is a constant: burn-autodiff computes no gradient for it.
    let weight = weight.without_autodiff();
    match weight.dtype() {
        DType::QFloat(_) => Tensor::from_dispatch(Dispatch::frozen_linear_forward(
            x.into_dispatch(),
            weight.into_dispatch(),
        )),
        _ if x.is_autodiff() => product(x, weight.autodiff()),
        _ => product(x, weight),
    }
}

/// `dY · Wᵀ`: the gradient of [`frozen_linear`]'s input, outside an autodiff graph.
///
/// # Shapes
///
/// - `gradient`: `[n, d_out]`
/// - `weight`: `[d_in, d_out]`, float or quantized
/// - output: `[n, d_in]`
pub fn frozen_linear_backward(gradient: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    frozen_product(None, gradient, weight, Direction::Backward)
}

/// The direction of a product with a weight `[d_in, d_out]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// `x · W`.
    Forward,
    /// `x · Wᵀ`, for gradients.
    Backward,
}

impl Direction {
    /// The lengths of the dimension of a weight `[d_in, d_out]` that the product sums over, and of the output's
    /// dimension.
    pub(crate) fn inner_and_outer(self, [d_in, d_out]: [usize; 2]) -> (usize, usize) {
        match self {
            Self::Forward => (d_in, d_out),
            Self::Backward => (d_out, d_in),
        }
    }
}

/// `sum + x · W`, or with `Wᵀ`, outside an autodiff graph, in the sum's type, and in the sum's memory if it is not
/// shared.
///
/// # Shapes
///
/// - `x`: `[n, d_in]`, backward `[n, d_out]`
/// - `weight`: `[d_in, d_out]`, float or quantized
/// - `sum`, output: `[n, d_out]`, backward `[n, d_in]`
pub fn frozen_product(
    sum: Option<Tensor<2>>,
    x: Tensor<2>,
    weight: Tensor<2>,
    direction: Direction,
) -> Tensor<2> {
    of(&x).frozen_product(sum, x, weight.without_autodiff(), direction)
}

/// As [`frozen_product`], plus a term of low rank.
pub fn adapted_product(
    sum: Option<Tensor<2>>,
    x: Tensor<2>,
    weight: Tensor<2>,
    low_rank: Option<LowRankTerm>,
    direction: Direction,
) -> Tensor<2> {
    of(&x).adapted_product(sum, x, weight.without_autodiff(), low_rank, direction)
}

/// A product that [`joint_product`] adds to others.
#[derive(Debug, Clone)]
pub struct JointTerm {
    /// `[n, d_in]`, backward `[n, d_out]`
    pub x: Tensor<2>,
    /// `[d_in, d_out]`, float or quantized
    pub weight: Tensor<2>,
    /// The first of the shared columns of low rank that belong to this product, and the matrix that they are multiplied
    /// with, as in [`LowRankTerm`].
    pub low_rank: Option<(usize, Tensor<2>)>,
}

impl JointTerm {
    /// The factors of the product and its term of low rank, a part of the columns `low`.
    pub fn apart(self, low: Option<&Tensor<2>>) -> (Tensor<2>, Tensor<2>, Option<LowRankTerm>) {
        let low_rank = self.low_rank.zip(low).map(|((first, b), all)| LowRankTerm {
            low: LowRankPart {
                all: all.clone(),
                first,
                rank: b.dims()[0],
            },
            b,
        });
        (self.x, self.weight, low_rank)
    }
}

/// The sum of products of one size, `Σ xᵢ · Wᵢ [+ lowᵢ · bᵢ]`, or with `Wᵢᵀ`, in the type of the xᵢ: the gradient of an
/// input that several layers share. One launch where there is a kernel, whose partial sums are not rounded to 16 bits.
///
/// # Shapes
///
/// - `low`: the columns of low rank of all products, `[n, Σ r]`
/// - output: `[n, d_out]`, backward `[n, d_in]`
///
/// # Panics
///
/// If there is no product.
pub fn joint_product(
    low: Option<&Tensor<2>>,
    terms: Vec<JointTerm>,
    direction: Direction,
) -> Tensor<2> {
    let terms = terms.into_iter().map(|term| JointTerm {
        weight: term.weight.without_autodiff(),
        ..term
    });
    let terms: Vec<_> = terms.collect();
    of(&terms[0].x).joint_product(low, terms, direction)
}

/// [`joint_product`] as one product after the other.
pub(crate) fn one_after_the_other(
    kernels: &(impl Kernels + ?Sized),
    low: Option<&Tensor<2>>,
    terms: Vec<JointTerm>,
    direction: Direction,
) -> Tensor<2> {
    let mut sum = None;
    for term in terms {
        let (x, weight, low_rank) = term.apart(low);
        sum = Some(kernels.adapted_product(sum, x, weight, low_rank, direction));
    }
    sum.unwrap_or_else(|| unreachable!("there is a product"))
}

/// `sum + x · W` of a quantized weight by the backend's [`FrozenLinearOps`].
pub(crate) fn quantized_product(
    sum: Option<Tensor<2>>,
    x: Tensor<2>,
    weight: Tensor<2>,
    direction: Direction,
) -> Tensor<2> {
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(match (sum, direction) {
        (Some(sum), _) => {
            let backward = direction == Direction::Backward;
            Dispatch::frozen_linear_add(sum.into_dispatch(), x, weight, backward)
        }
        (None, Direction::Forward) => Dispatch::frozen_linear_forward(x, weight),
        (None, Direction::Backward) => Dispatch::frozen_linear_backward(x, weight),
    })
}

/// CubeCL backends (CUDA, ROCm, Vulkan, Metal, WebGPU) use the default bodies: dequantize, then the backend's float
/// product, in both directions. The dense weight exists for one product only, and its buffer is reused for the next
/// one. Burn's fused quantized product reads fewer bytes, but its kernel is chosen for single rows; see
/// docs/decisions/quantized-weights.md.
#[cfg(feature = "cube")]
impl FrozenLinearOps for burn_cubecl::CubeBackend {}

/// Calls `measure` with the name of each kernel that competes for products of quantized weights with tensors of this
/// type on a GPU, while every such product of this process uses that kernel. Never on the CPU. For measurements.
///
/// # Errors
///
/// The first error of `measure`; no kernel is tried after it.
pub fn for_each_product_kernel<E>(
    device: &Device,
    dtype: DType,
    measure: impl FnMut(&str) -> Result<(), E>,
) -> Result<(), E> {
    #[cfg(feature = "cube")]
    return crate::gpu::for_each_product_kernel(device, dtype, measure);
    #[cfg(not(feature = "cube"))]
    {
        let _ = (device, dtype, measure);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, Quantization, init, quantize};

    /// Relative Frobenius distance.
    fn distance(a: Tensor<2>, b: Tensor<2>) -> f32 {
        let norm = b.clone().powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        (a - b).powf_scalar(2.0).sum().sqrt().into_scalar::<f32>() / norm
    }

    #[test]
    fn forward_and_backward_equal_the_dense_product_of_the_dequantized_weight() {
        let device = Device::flex();
        let mut rng = CounterRng::new(11);
        // Widths that are not multiples of the panel, of 32 or of a vector; one row; many rows.
        for (n, d_in, d_out) in [
            (1, 64, 32),
            (7, 100, 172),
            (130, 576, 1536),
            (33, 2050, 640),
        ] {
            for quantization in [Quantization::Bits8, Quantization::Bits4, Quantization::None] {
                let weight = init::normal([d_in, d_out], 0.05, &mut rng, &device);
                let weight = quantize(weight, quantization).unwrap();
                let dense = match weight.dtype() {
                    DType::QFloat(_) => weight.clone().dequantize(),
                    _ => weight.clone(),
                };
                let x = init::normal([n, d_in], 1.0, &mut rng, &device)
                    .autodiff()
                    .require_grad();
                let grad = init::normal([n, d_out], 1.0, &mut rng, &device);

                let y = frozen_linear(x.clone(), weight);
                let gradients = (y.clone() * grad.clone().autodiff()).sum().backward();
                let expected = x.clone().inner().matmul(dense.clone());
                // f32 sums of up to 2050 products in another order.
                let forward = distance(y.inner(), expected);
                let backward =
                    distance(x.grad(&gradients).unwrap(), grad.matmul(dense.transpose()));
                assert!(
                    forward < 2e-6,
                    "{n} {d_in} {d_out} {quantization:?}: {forward}"
                );
                assert!(
                    backward < 2e-6,
                    "{n} {d_in} {d_out} {quantization:?}: {backward}"
                );
            }
        }
    }

    #[test]
    fn outside_an_autodiff_graph_the_result_is_the_same() {
        let device = Device::flex();
        let mut rng = CounterRng::new(12);
        let weight = init::normal([64, 96], 0.05, &mut rng, &device);
        let weight = quantize(weight, Quantization::Bits8).unwrap();
        let x = init::normal([5, 64], 1.0, &mut rng, &device);
        let plain = frozen_linear(x.clone(), weight.clone());
        let tracked = frozen_linear(x.autodiff().require_grad(), weight).inner();
        plain.into_data().assert_eq(&tracked.into_data(), true);
    }

    #[test]
    #[should_panic(expected = "frozen_linear")]
    fn mismatched_inner_dimensions_panic_with_both_shapes() {
        let device = Device::flex();
        let _ = frozen_linear(Tensor::ones([2, 3], &device), Tensor::ones([4, 5], &device));
    }
}
