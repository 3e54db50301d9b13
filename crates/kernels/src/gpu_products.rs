//! Matrix products on GPUs that Burn's `matmul` does not offer: an f32 result from 16-bit factors, and f32 without
//! TF32.

use std::sync::atomic::{AtomicBool, Ordering};

use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{DType, FloatDType, Shape, Tensor};

/// Whether f32 products on GPUs avoid TF32.
static EXACT: AtomicBool = AtomicBool::new(false);

/// Makes f32 products on this process's GPUs keep all 24 bits of their factors' mantissas. Otherwise Burn uses TF32,
/// which keeps 11 bits, on GPUs that have it (NVIDIA since Ampere).
///
/// Applies to the products of this crate, in an autodiff graph and outside one, not to `Tensor::matmul`.
pub fn use_exact_f32(exact: bool) {
    EXACT.store(exact, Ordering::Relaxed);
}

/// Whether f32 products on GPUs keep all bits of their factors ([`use_exact_f32`]).
pub fn is_exact_f32() -> bool {
    EXACT.load(Ordering::Relaxed)
}

/// Products that a backend computes differently from its `float_matmul`. The default bodies work on every backend.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Autodiff, Fusion: cfg(feature = "cube"))]
pub trait ProductOps: Backend {
    /// `left · right` in f32. 16-bit factors are multiplied unchanged, and the sums are not rounded to their type.
    #[fusion(dtype = DType::F32, shape = product_shape(left, right))]
    fn product_in_f32(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        let left = Self::float_cast(left, FloatDType::F32);
        Self::float_matmul(left, Self::float_cast(right, FloatDType::F32))
    }

    /// `left · right` of f32 without rounding the factors.
    #[fusion(dtype = left, shape = product_shape(left, right))]
    fn exact_product(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(left, right)
    }
}

impl ProductOps for Flex {}

/// The backward pass of [`ProductOps::exact_product`] in an autodiff graph.
#[derive(Debug)]
struct ExactProductBackward;

impl<B: ProductOps> Backward<B, 2> for ExactProductBackward {
    /// The factors.
    type State = [FloatTensor<B>; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let [left_node, right_node] = ops.parents;
        let [left, right] = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        let shapes = [left.shape(), right.shape()];
        if let Some(node) = left_node {
            let of_left = B::exact_product(gradient.clone(), B::float_transpose(right));
            gradients.register::<B>(node.id, sum_broadcast::<B>(of_left, &shapes[0]));
        }
        if let Some(node) = right_node {
            let of_right = B::exact_product(B::float_transpose(left), gradient);
            gradients.register::<B>(node.id, sum_broadcast::<B>(of_right, &shapes[1]));
        }
    }
}

/// The sum over the dimensions in which a factor of this shape was broadcast.
fn sum_broadcast<B: Backend>(mut gradient: FloatTensor<B>, shape: &Shape) -> FloatTensor<B> {
    for (dimension, length) in shape.iter().enumerate() {
        if *length == 1 && gradient.shape()[dimension] > 1 {
            gradient = B::float_sum_dim(gradient, dimension);
        }
    }
    gradient
}

impl<B: Backend + ProductOps, C: CheckpointStrategy> ProductOps for Autodiff<B, C> {
    fn exact_product(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        let prepared = ExactProductBackward
            .prepare::<C>([left.node(), right.node()])
            .compute_bound()
            .stateful();
        let factors = [left.primitive().clone(), right.primitive().clone()];
        let [l, r] = factors.clone();
        let product = B::exact_product(l, r);
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(factors, product),
            OpsKind::UnTracked(prepared) => prepared.finish(product),
        }
    }
}

#[cfg(feature = "cube")]
impl ProductOps for burn_cubecl::CubeBackend {
    fn product_in_f32(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};

        let product = matmul(left, right, None, MatmulStrategy::default(), DType::F32);
        product.unwrap_or_else(|error| panic!("no kernel for a product in f32: {error:?}"))
    }

    fn exact_product(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        exact::product(left, right)
    }
}

/// Kernels without matrix units, which support f32 as TF32 only.
#[cfg(feature = "cube")]
mod exact {
    use burn_cubecl::cubecl::ir::{ElemType, FloatKind};
    use burn_cubecl::kernel::matmul::init_matmul_output;
    use burn_cubecl::tensor::CubeTensor;
    use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
    use cubek::matmul::launch::launch_ref;
    use cubek::matmul::multi_level::Strategy;
    use cubek::std::InputBinding;

    use super::DType;

    pub(super) fn product(left: CubeTensor, right: CubeTensor) -> CubeTensor {
        let f32 = ElemType::Float(FloatKind::F32);
        let output = init_matmul_output(&left, &right, DType::F32);
        let client = output.client.clone();
        let mut elements = MatmulElems::from_globals(&MatmulGlobalElems {
            lhs: f32,
            rhs: f32,
            out: f32,
        });
        let launched = launch_ref(
            &Strategy::SimpleUnit(Default::default()).into(),
            &client,
            InputBinding::new(left.binding(), f32),
            InputBinding::new(right.binding(), f32),
            output.clone().binding(),
            &mut elements,
        );
        if let Err(error) = launched {
            panic!("no kernel for an f32 product: {error:?}");
        }
        output
    }
}

/// The product of a backend's primitive tensors, exact if requested ([`use_exact_f32`]).
pub(crate) fn product_of<B: ProductOps>(
    left: FloatTensor<B>,
    right: FloatTensor<B>,
) -> FloatTensor<B> {
    if is_exact_f32() && left.dtype() == DType::F32 {
        B::exact_product(left, right)
    } else {
        B::float_matmul(left, right)
    }
}

/// `left · right`, without TF32 if requested ([`use_exact_f32`]).
///
/// # Shapes
///
/// - `left`: `[.., n, k]`
/// - `right`: `[.., k, m]`
/// - output: `[.., n, m]`
pub fn product<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> Tensor<D> {
    let exact = is_exact_f32() && left.dtype() == DType::F32;
    if exact {
        Tensor::from_dispatch(Dispatch::exact_product(
            left.into_dispatch(),
            right.into_dispatch(),
        ))
    } else {
        left.matmul(right)
    }
}

/// As [`product`], with the result in f32 for every type of the factors.
pub(crate) fn product_in_f32(left: Tensor<2>, right: Tensor<2>) -> Tensor<2> {
    match left.dtype() {
        DType::F32 => product(left, right),
        _ => Tensor::from_dispatch(Dispatch::product_in_f32(
            left.into_dispatch(),
            right.into_dispatch(),
        )),
    }
}

/// The shape of `[.., n, k] · [.., k, m]`; leading dimensions of 1 are broadcast.
#[cfg(feature = "cube")]
fn product_shape(left: &Shape, right: &Shape) -> Shape {
    let (left, right): (Vec<usize>, Vec<usize>) = (
        left.iter().copied().collect(),
        right.iter().copied().collect(),
    );
    let last = left.len() - 1;
    let mut shape: Vec<usize> = left.iter().zip(&right).map(|(a, b)| *a.max(b)).collect();
    shape[last - 1] = left[last - 1];
    shape[last] = right[last];
    Shape::from(shape)
}
