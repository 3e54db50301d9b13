//! The GPU kernels as operations on a backend's tensors.

use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor, QuantizedTensor};
use burn::backend::{Backend, backend_extension};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use crate::product::Operands;
use crate::{
    AdamWNumbers, attention, joint_product, low_rank, optimizer, product, rope, rows, swiglu,
};

/// Which terms a [`packed_product`](GpuOps::packed_product) has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Whether the weight is transposed.
    pub transposed: bool,
    /// Whether `sum` is a term; else it is ignored.
    pub sum: bool,
    /// The first column of `low` and the number of columns, if `low · b` is a term; else both are ignored.
    pub low: Option<(usize, usize)>,
    /// The output's type.
    pub dtype: DType,
}

/// Which terms a [`joint_product`](GpuOps::joint_product) has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joint {
    /// The number of products. Tensors of those that are not there are ignored.
    pub members: usize,
    /// Whether the weights are transposed.
    pub transposed: bool,
    /// Per product the first column of `low` and the number of columns, if it has a term of low rank.
    pub low: [Option<(usize, usize)>; low_rank::MEMBERS],
    /// The output's type.
    pub dtype: DType,
}

/// The layers of a product of low rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// 0 for a layer that is not there; such layers come last.
    pub ranks: [usize; low_rank::MEMBERS],
    /// The products' factors γ.
    pub scales: [f32; low_rank::MEMBERS],
    /// Of columns: whether the factors are transposed, `[rank, length]`. Of gradients: whether the outputs are,
    /// `[length, rank]`.
    pub transposed: bool,
    /// The type of columns.
    pub dtype: DType,
}

/// Where the index tables of a [`tiled_attention`](GpuOps::tiled_attention) begin, and its sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TiledAttention {
    /// The sizes.
    pub shape: attention::Shape,
    /// See the crate `kernels`' `Tables`, as are the next two.
    pub spans: usize,
    /// The lists of tiles of keys.
    pub keys_of: usize,
    /// The lists of tiles of queries.
    pub queries_of: usize,
}

/// The kernels, on a backend's tensors. Only CubeCL's backends have them.
#[backend_extension(Cube, Fusion)]
pub trait GpuOps: Backend {
    /// `[sum +] x · W [+ low · b]`.
    #[fusion(dtype = terms.dtype, shape = product_shape(x, weight, terms))]
    fn packed_product(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
        sum: FloatTensor<Self>,
        low: FloatTensor<Self>,
        b: FloatTensor<Self>,
        terms: Terms,
    ) -> FloatTensor<Self>;

    /// `Σ xᵢ · Wᵢ [+ lowᵢ · bᵢ]`, where `lowᵢ` are columns of `low`. If no product has such a term, `low` is ignored, and
    /// the `bᵢ` of products without one.
    #[fusion(dtype = joint.dtype, shape = joint_shape(x0, weight0, joint))]
    #[allow(clippy::too_many_arguments)]
    fn joint_product(
        x0: FloatTensor<Self>,
        x1: FloatTensor<Self>,
        x2: FloatTensor<Self>,
        weight0: QuantizedTensor<Self>,
        weight1: QuantizedTensor<Self>,
        weight2: QuantizedTensor<Self>,
        low: FloatTensor<Self>,
        b0: FloatTensor<Self>,
        b1: FloatTensor<Self>,
        b2: FloatTensor<Self>,
        joint: Joint,
    ) -> FloatTensor<Self>;

    /// SwiGLU's up, `x · W [+ low · b]`, and its output `silu(gate) · up`. A sum is no term of `terms`.
    #[fusion(meta = gated_outputs)]
    fn gated_product(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
        gate: FloatTensor<Self>,
        low: FloatTensor<Self>,
        b: FloatTensor<Self>,
        terms: Terms,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of SwiGLU's gate and up; that of its output is `x · W [+ low · b]`.
    #[fusion(meta = |_, _, gate, up, _, _, _| (gate.clone(), up.clone()))]
    #[allow(clippy::too_many_arguments)]
    fn gated_product_backward(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        low: FloatTensor<Self>,
        b: FloatTensor<Self>,
        terms: Terms,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `[x₀·F₀·γ₀ | x₁·F₁·γ₁ | x₂·F₂·γ₂]` for the layers with a rank.
    #[fusion(dtype = group.dtype, shape = Shape::from([x0[0], group.ranks.iter().sum()]))]
    #[allow(clippy::too_many_arguments)]
    fn low_rank_columns(
        x0: FloatTensor<Self>,
        x1: FloatTensor<Self>,
        x2: FloatTensor<Self>,
        factor0: FloatTensor<Self>,
        factor1: FloatTensor<Self>,
        factor2: FloatTensor<Self>,
        group: Group,
    ) -> FloatTensor<Self>;

    /// Per layer `γ · lowᵀ · wide` in f32, `[rank, length]`, or transposed. If `normed`, `wide` is the input of an RMSNorm
    /// with these factors of rows and this gain, and its output is meant; else both are ignored.
    #[fusion(meta = gradient_outputs)]
    #[allow(clippy::too_many_arguments)]
    fn low_rank_gradients(
        low: FloatTensor<Self>,
        wide0: FloatTensor<Self>,
        wide1: FloatTensor<Self>,
        wide2: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        normed: bool,
        group: Group,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// RMSNorm in `dtype`, and each row's factor, `[n, 1]`.
    #[fusion(meta = |x, _, _, dtype| (
        TensorSpec::new(x.shape.clone(), *dtype),
        TensorSpec::new(Shape::from([x.shape[0], 1]), DType::F32),
    ))]
    fn rms_norm_rows(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        eps: f32,
        dtype: DType,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `sum` plus the gradient of RMSNorm's input, and the same in type `rounded`; without one the second output is
    /// `[1, 4]` and never read.
    #[fusion(meta = |_, _, _, _, sum, rounded| (
        sum.clone(),
        match rounded {
            Some(dtype) => TensorSpec::new(sum.shape.clone(), *dtype),
            None => TensorSpec::new(Shape::from([1, 4]), sum.dtype),
        },
    ))]
    fn rms_norm_rows_backward(
        x: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        sum: FloatTensor<Self>,
        rounded: Option<DType>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Every head rotated by its row's angles times `sign`, times `scale`.
    #[fusion(dtype = x, shape = x)]
    fn rotate_heads(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        scale: f32,
        sign: f32,
    ) -> FloatTensor<Self>;

    /// `silu(gate) · up`.
    #[fusion(dtype = gate, shape = gate)]
    fn swiglu_rows(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    /// The gradients of gate and up.
    #[fusion(meta = |gate, up, _| (gate.clone(), up.clone()))]
    fn swiglu_rows_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `scale` times the gradient of cross entropy in `dtype`, and each row's loss and hit, `[m]`.
    #[fusion(meta = |logits, targets, _, dtype| (
        TensorSpec::new(logits.shape.clone(), *dtype),
        TensorSpec::new(targets.shape.clone(), DType::F32),
        TensorSpec::new(targets.shape.clone(), DType::F32),
    ))]
    fn cross_entropy_rows(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        scale: f32,
        dtype: DType,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// 256 partial sums of the squares of `values`, `[count]`.
    #[fusion(dtype = values, shape = Shape::from([256]))]
    fn partial_squares(values: FloatTensor<Self>) -> FloatTensor<Self>;

    /// The updated parameters and moments of an AdamW step, all `[count]` in f32.
    #[fusion(meta = |parameters, _, _, _, _| (
        parameters.clone(), parameters.clone(), parameters.clone(),
    ))]
    fn adamw_update(
        parameters: FloatTensor<Self>,
        gradients: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        numbers: AdamWNumbers,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// The attention output and the log-sum-exp of each query's scores, `[n, heads]`. `pairs` is the number of pairs
    /// of a query and a visible key over all heads, for those who count operations.
    #[fusion(meta = attention_outputs)]
    fn tiled_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        tables: IntTensor<Self>,
        pairs: usize,
        tiled: TiledAttention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of queries, keys and values.
    #[fusion(meta = |q, k, v, _, _, _, _, _, _| (q.clone(), k.clone(), v.clone()))]
    #[allow(clippy::too_many_arguments)]
    fn tiled_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        tables: IntTensor<Self>,
        pairs: usize,
        tiled: TiledAttention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

impl GpuOps for CubeBackend {
    fn packed_product(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
        sum: FloatTensor<Self>,
        low: FloatTensor<Self>,
        b: FloatTensor<Self>,
        terms: Terms,
    ) -> FloatTensor<Self> {
        let [output, _] = product::launch(operands(sum, x, weight, low, b, terms));
        output
    }

    fn joint_product(
        x0: FloatTensor<Self>,
        x1: FloatTensor<Self>,
        x2: FloatTensor<Self>,
        weight0: QuantizedTensor<Self>,
        weight1: QuantizedTensor<Self>,
        weight2: QuantizedTensor<Self>,
        low: FloatTensor<Self>,
        b0: FloatTensor<Self>,
        b1: FloatTensor<Self>,
        b2: FloatTensor<Self>,
        joint: Joint,
    ) -> FloatTensor<Self> {
        let members = [(x0, weight0, b0), (x1, weight1, b1), (x2, weight2, b2)];
        let members = members.into_iter().zip(joint.low).take(joint.members);
        let members = members.map(|((x, weight, b), term)| {
            let terms = Terms {
                transposed: joint.transposed,
                sum: false,
                // Without a term, both factors are bound and not read.
                low: Some(term.unwrap_or((0, 0))),
                dtype: joint.dtype,
            };
            operands(x.clone(), x, weight, low.clone(), b, terms)
        });
        joint_product::launch_sum(members.collect())
    }

    fn gated_product(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
        gate: FloatTensor<Self>,
        low: FloatTensor<Self>,
        b: FloatTensor<Self>,
        terms: Terms,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let operands = operands(x.clone(), x, weight, low, b, terms).behind_gate(gate);
        let [up, output] = product::launch(operands);
        (up, output)
    }

    fn gated_product_backward(
        x: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        low: FloatTensor<Self>,
        b: FloatTensor<Self>,
        terms: Terms,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let operands = operands(x.clone(), x, weight, low, b, terms).before_gate(gate, up);
        let [d_gate, d_up] = product::launch(operands);
        (d_gate, d_up)
    }

    fn low_rank_columns(
        x0: FloatTensor<Self>,
        x1: FloatTensor<Self>,
        x2: FloatTensor<Self>,
        factor0: FloatTensor<Self>,
        factor1: FloatTensor<Self>,
        factor2: FloatTensor<Self>,
        group: Group,
    ) -> FloatTensor<Self> {
        let Group {
            ranks,
            scales,
            transposed,
            dtype,
        } = group;
        let mut factors = [factor0, factor1, factor2];
        if transposed {
            factors.iter_mut().for_each(|factor| factor.meta.swap(0, 1));
        }
        low_rank::launch_columns([x0, x1, x2], factors, ranks, scales, dtype)
    }

    fn low_rank_gradients(
        low: FloatTensor<Self>,
        wide0: FloatTensor<Self>,
        wide1: FloatTensor<Self>,
        wide2: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        normed: bool,
        group: Group,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let wide = [wide0, wide1, wide2];
        let norm = normed.then_some([inverse, gain]);
        let Group {
            ranks,
            scales,
            transposed,
            ..
        } = group;
        let [a, b, c] = low_rank::launch_gradients(low, wide, ranks, scales, transposed, norm);
        (a, b, c)
    }

    fn rms_norm_rows(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        eps: f32,
        dtype: DType,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        rows::launch_rms_norm(x, gain, eps, dtype)
    }

    fn rms_norm_rows_backward(
        x: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        sum: FloatTensor<Self>,
        rounded: Option<DType>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        rows::launch_rms_norm_backward(x, inverse, gain, gradient, sum, rounded)
    }

    fn rotate_heads(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        scale: f32,
        sign: f32,
    ) -> FloatTensor<Self> {
        rope::launch(x, cos, sin, scale, sign)
    }

    fn swiglu_rows(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        swiglu::launch(gate, up)
    }

    fn swiglu_rows_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        swiglu::launch_backward(gate, up, gradient)
    }

    fn cross_entropy_rows(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        scale: f32,
        dtype: DType,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        rows::launch_cross_entropy(logits, targets, scale, dtype)
    }

    fn partial_squares(values: FloatTensor<Self>) -> FloatTensor<Self> {
        optimizer::launch_squares(values)
    }

    fn adamw_update(
        parameters: FloatTensor<Self>,
        gradients: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        numbers: AdamWNumbers,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        optimizer::launch_update(parameters, gradients, [first, second], numbers)
    }

    fn tiled_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        tables: IntTensor<Self>,
        _pairs: usize,
        tiled: TiledAttention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::launch_forward([q, k, v], tables, tiled)
    }

    fn tiled_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        tables: IntTensor<Self>,
        _pairs: usize,
        tiled: TiledAttention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        attention::launch_backward([q, k, v], [output, gradient, log_sums], tables, tiled)
    }
}

/// The operands of a product with these terms.
fn operands(
    sum: CubeTensor,
    x: CubeTensor,
    weight: CubeTensor,
    low: CubeTensor,
    b: CubeTensor,
    terms: Terms,
) -> Operands {
    let low_rank = terms.low.map(|(first, rank)| product::LowRankTerm {
        low,
        first,
        rank,
        b,
    });
    let sum = terms.sum.then_some(sum);
    Operands::new(sum, x, weight, terms.transposed, low_rank, terms.dtype)
}

fn gated_outputs(
    _x: &TensorSpec,
    _weight: &TensorSpec,
    gate: &TensorSpec,
    _low: &TensorSpec,
    _b: &TensorSpec,
    _terms: &Terms,
) -> (TensorSpec, TensorSpec) {
    (gate.clone(), gate.clone())
}

fn joint_shape(x: &Shape, weight: &Shape, joint: &Joint) -> Shape {
    Shape::from([x[0], weight[usize::from(!joint.transposed)]])
}

fn product_shape(x: &Shape, weight: &Shape, terms: &Terms) -> Shape {
    Shape::from([x[0], weight[usize::from(!terms.transposed)]])
}

#[allow(clippy::too_many_arguments)] // Those of the operation.
fn gradient_outputs(
    _low: &TensorSpec,
    wide0: &TensorSpec,
    wide1: &TensorSpec,
    wide2: &TensorSpec,
    _inverse: &TensorSpec,
    _gain: &TensorSpec,
    _normed: &bool,
    group: &Group,
) -> (TensorSpec, TensorSpec, TensorSpec) {
    let output = |i: usize, wide: &TensorSpec| {
        let shape = match (group.ranks[i], wide.shape[1]) {
            (0, _) => [1, 1],
            (rank, length) if group.transposed => [length, rank],
            (rank, length) => [rank, length],
        };
        TensorSpec::new(Shape::from(shape), DType::F32)
    };
    (output(0, wide0), output(1, wide1), output(2, wide2))
}

fn attention_outputs(
    q: &TensorSpec,
    _k: &TensorSpec,
    _v: &TensorSpec,
    _tables: &TensorSpec,
    _pairs: &usize,
    tiled: &TiledAttention,
) -> (TensorSpec, TensorSpec) {
    let heads = tiled.shape.group * tiled.shape.key_heads;
    let log_sums = Shape::from([q.shape[0], heads]);
    (q.clone(), TensorSpec::new(log_sums, DType::F32))
}
