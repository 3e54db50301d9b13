//! GPUs: which operations run as kernels of the crate `gpu-kernels`, and the tables that attention needs.

#[cfg(all(test, any(feature = "wgpu", feature = "vulkan")))]
mod sixteen_bits;
#[cfg(all(test, any(feature = "wgpu", feature = "vulkan")))]
mod tests;
mod tiles;

use burn::backend::{Dispatch, DispatchDevice, DispatchTensor};
use burn::tensor::{DType, Device, Int, Tensor};

use crate::Kernels;
use crate::adamw::{AdamWSettings, AdamWState};
use crate::attention::{AttentionLayout, Heads, SavedAttention};
use crate::dispatch::{Composed, product_then_gate, product_then_gate_backward};
use crate::frozen_linear::{Direction, JointTerm, one_after_the_other};
use crate::limits::{client, has_tf32, rows_at_once};
use crate::loss::{CrossEntropy, LossTerms, Targets};
use crate::low_rank::{LowRankTerm, Normalized};
use crate::ranges::{AttentionRanges, Segment};
use crate::rms_norm::InverseRms;
use crate::rope::{RotaryTables, Rotation};
use crate::spoil::spoilt;
use crate::switches::Kernel;
use crate::uploads::{Ints, Uploaded, Uploads};
use gpu_kernels::{
    AdamWNumbers, AttentionShape, Candidate, FEW_ROWS, GpuOps as _, Group, Joint, MEMBERS, Product,
    Terms, TiledAttention, burn_is_faster, force_product,
};

pub use gpu_kernels::set_software_driver;

/// See [`crate::for_each_product_kernel`].
pub(crate) fn for_each_product_kernel<E>(
    device: &Device,
    dtype: DType,
    mut measure: impl FnMut(&str) -> Result<(), E>,
) -> Result<(), E> {
    let Some(client) = client(device).filter(|_| computes_products(dtype, device)) else {
        return Ok(());
    };
    let kernels = Candidate::of(client.properties(), dtype).into_iter();
    let mut results = kernels.map(|kernel| {
        force_product(Some(kernel));
        measure(&kernel.to_string())
    });
    let result = results.find(Result::is_err).unwrap_or(Ok(()));
    force_product(None);
    result
}

/// Whether this is a device of CubeCL.
pub(crate) fn is_gpu(device: &Device) -> bool {
    matches!(
        device.clone().without_autodiff().as_dispatch(),
        DispatchDevice::Cube(_)
    )
}

/// The implementation for GPUs.
#[derive(Debug)]
pub(crate) struct Gpu;

impl Kernels for Gpu {
    fn frozen_product(
        &self,
        sum: Option<Tensor<2>>,
        x: Tensor<2>,
        weight: Tensor<2>,
        direction: Direction,
    ) -> Tensor<2> {
        self.adapted_product(sum, x, weight, None, direction)
    }

    fn adapted_product(
        &self,
        sum: Option<Tensor<2>>,
        x: Tensor<2>,
        weight: Tensor<2>,
        low_rank: Option<LowRankTerm>,
        direction: Direction,
    ) -> Tensor<2> {
        let on = if x.dims()[0] < FEW_ROWS {
            // Bound by the reading of the weight: matrix units would not help.
            Kernel::FewRows.is_on() && matches!(weight.dtype(), DType::QFloat(_))
        } else {
            has_kernel(sum.as_ref(), &x, &weight, direction)
        };
        if on {
            packed_product(sum, x, weight, low_rank, direction)
        } else {
            Composed.adapted_product(sum, x, weight, low_rank, direction)
        }
    }

    fn joint_product(
        &self,
        low: Option<&Tensor<2>>,
        terms: Vec<JointTerm>,
        direction: Direction,
    ) -> Tensor<2> {
        if !joins(&terms, direction) {
            return one_after_the_other(self, low, terms, direction);
        }
        let of_low = terms.iter().map(|term| {
            let own = term.low_rank.as_ref();
            own.map(|(first, b)| (*first, b.dims()[0]))
        });
        let joint = Joint {
            members: terms.len(),
            transposed: direction == Direction::Backward,
            low: padded(&of_low.collect::<Vec<_>>(), None),
            dtype: terms[0].x.dtype(),
        };
        // Operands that are ignored; something has to stand in their place.
        let any_b = terms.iter().find_map(|term| term.low_rank.clone());
        let any_b = any_b.map_or_else(|| terms[0].x.clone(), |(_, b)| b);
        let low = low.unwrap_or(&terms[0].x).clone().into_dispatch();
        let (mut x, mut weights, mut b) = (Vec::new(), Vec::new(), Vec::new());
        for term in terms {
            x.push(term.x);
            weights.push(term.weight);
            b.push(term.low_rank.map_or_else(|| any_b.clone(), |(_, b)| b));
        }
        drop(any_b);
        let [x0, x1, x2] = owned_members(x);
        let [w0, w1, w2] = owned_members(weights);
        let [b0, b1, b2] = owned_members(b);
        let sum = Dispatch::joint_product(x0, x1, x2, w0, w1, w2, low, b0, b1, b2, joint);
        spoilt(operation_of(direction), Tensor::from_dispatch(sum))
    }

    fn gated_product(
        &self,
        gate: &Tensor<2>,
        x: Tensor<2>,
        weight: Tensor<2>,
        low_rank: Option<LowRankTerm>,
    ) -> (Tensor<2>, Tensor<2>) {
        let (dtype, direction) = (x.dtype(), Direction::Forward);
        if gate.dtype() != dtype || !ends_in_gate(&x, &weight, direction) {
            return product_then_gate(self, gate, x, weight, low_rank);
        }
        let (terms, [low, b]) = terms(&x, None, low_rank, direction);
        let (up, output) = Dispatch::gated_product(
            x.into_dispatch(),
            weight.into_dispatch(),
            gate.clone().into_dispatch(),
            low.into_dispatch(),
            b.into_dispatch(),
            terms,
        );
        let up = spoilt("quantized_product", Tensor::from_dispatch(up));
        (up, Tensor::from_dispatch(output))
    }

    fn gated_product_backward(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        gradient: Tensor<2>,
        weight: Tensor<2>,
        low_rank: Option<LowRankTerm>,
    ) -> (Tensor<2>, Tensor<2>) {
        let (dtype, direction) = (gradient.dtype(), Direction::Backward);
        let same = gate.dtype() == dtype && up.dtype() == dtype;
        if !same || !ends_in_gate(&gradient, &weight, direction) {
            return product_then_gate_backward(self, gate, up, gradient, weight, low_rank);
        }
        let (terms, [low, b]) = terms(&gradient, None, low_rank, direction);
        let (d_gate, d_up) = Dispatch::gated_product_backward(
            gradient.into_dispatch(),
            weight.into_dispatch(),
            gate.into_dispatch(),
            up.into_dispatch(),
            low.into_dispatch(),
            b.into_dispatch(),
            terms,
        );
        let [d_gate, d_up] = [d_gate, d_up].map(Tensor::from_dispatch);
        let spoilt = |x| spoilt("quantized_product_backward", x);
        (spoilt(d_gate), spoilt(d_up))
    }

    fn low_rank_columns(
        &self,
        wide: &[Tensor<2>],
        factors: &[Tensor<2>],
        transposed: bool,
        scales: &[f64],
    ) -> Option<Tensor<2>> {
        let rank = |factor: &Tensor<2>| factor.dims()[usize::from(!transposed)];
        let ranks: Vec<usize> = factors.iter().map(rank).collect();
        if !groups(wide, factors.len()) {
            return None;
        }
        let group = Group {
            ranks: padded(&ranks, 0),
            scales: padded(scales, 0.0).map(|scale| scale as f32),
            transposed,
            dtype: DType::F32,
        };
        let [x0, x1, x2] = all_members(wide);
        let [factor0, factor1, factor2] = all_members(factors);
        let columns = Dispatch::low_rank_columns(x0, x1, x2, factor0, factor1, factor2, group);
        Some(spoilt("low_rank", Tensor::from_dispatch(columns)))
    }

    fn low_rank_gradients(
        &self,
        low: &Tensor<2>,
        wide: &[Tensor<2>],
        ranks: &[usize],
        transposed: bool,
    ) -> Option<Vec<Tensor<2>>> {
        groups(wide, ranks.len()).then(|| low_rank_gradients(low, wide, ranks, transposed, None))
    }

    fn low_rank_gradients_of_norm(
        &self,
        low: &Tensor<2>,
        normalized: &Normalized,
        ranks: &[usize],
    ) -> Option<Vec<Tensor<2>>> {
        let wide = std::slice::from_ref(&normalized.x);
        let inverse = normalized.inverse.0.clone()?;
        let norm = [inverse, normalized.gain.clone()];
        groups(wide, ranks.len()).then(|| low_rank_gradients(low, wide, ranks, true, Some(norm)))
    }

    fn rms_norm(
        &self,
        x: &Tensor<2>,
        gain: Tensor<2>,
        eps: f64,
        dtype: DType,
    ) -> (Tensor<2>, InverseRms) {
        if !Kernel::RmsNorm.is_on() || !x.dims()[1].is_multiple_of(4) {
            return Composed.rms_norm(x, gain, eps, dtype);
        }
        let (x, gain) = (x.clone().into_dispatch(), gain.into_dispatch());
        let (output, inverse) = Dispatch::rms_norm_rows(x, gain, eps as f32, dtype);
        let inverse = InverseRms(Some(Tensor::from_dispatch(inverse)));
        (Tensor::from_dispatch(output), inverse)
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor<2>,
        inverse: InverseRms,
        gain: Tensor<2>,
        eps: f64,
        gradient: Tensor<2>,
        sum: Tensor<2>,
        dtype: DType,
    ) -> (Tensor<2>, Tensor<2>) {
        let on = Kernel::RmsNorm.is_on() && x.dims()[1].is_multiple_of(4);
        let Some(factors) = inverse.0.clone().filter(|_| on) else {
            return Composed.rms_norm_backward(x, inverse, gain, eps, gradient, sum, dtype);
        };
        let rounded = (dtype != sum.dtype()).then_some(dtype);
        let (result, second) = Dispatch::rms_norm_rows_backward(
            x.clone().into_dispatch(),
            factors.into_dispatch(),
            gain.into_dispatch(),
            gradient.into_dispatch(),
            sum.into_dispatch(),
            rounded,
        );
        let result = spoilt("rms_norm_backward", Tensor::from_dispatch(result));
        match rounded {
            Some(_) => (result, Tensor::from_dispatch(second)),
            None => (result.clone(), result),
        }
    }

    fn rotates_halves(&self) -> bool {
        Kernel::Rope.is_on()
    }

    fn rotate(
        &self,
        x: Tensor<2>,
        tables: &RotaryTables,
        rotation: Rotation,
        scale: f64,
    ) -> Tensor<2> {
        if tables.whole.is_some() {
            return Composed.rotate(x, tables, rotation, scale);
        }
        let sign = match rotation {
            Rotation::Forward => 1.0,
            Rotation::Inverse => -1.0,
        };
        Tensor::from_dispatch(Dispatch::rotate_heads(
            x.into_dispatch(),
            tables.cos.clone().into_dispatch(),
            tables.sin.clone().into_dispatch(),
            scale as f32,
            sign,
        ))
    }

    fn swiglu(&self, gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
        if !Kernel::SwiGlu.is_on() || !gate.dims()[1].is_multiple_of(4) {
            return Composed.swiglu(gate, up);
        }
        let (gate, up) = (gate.clone().into_dispatch(), up.clone().into_dispatch());
        Tensor::from_dispatch(Dispatch::swiglu_rows(gate, up))
    }

    fn swiglu_backward(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        gradient: Tensor<2>,
    ) -> (Tensor<2>, Tensor<2>) {
        if !Kernel::SwiGlu.is_on() || !gate.dims()[1].is_multiple_of(4) {
            return Composed.swiglu_backward(gate, up, gradient);
        }
        let [gate, up, gradient] = [gate, up, gradient].map(Tensor::into_dispatch);
        let (d_gate, d_up) = Dispatch::swiglu_rows_backward(gate, up, gradient);
        (Tensor::from_dispatch(d_gate), Tensor::from_dispatch(d_up))
    }

    fn cross_entropy(
        &self,
        logits: Tensor<2>,
        targets: Targets,
        scale: f64,
        dtype: DType,
    ) -> CrossEntropy {
        if !Kernel::CrossEntropy.is_on() || logits.dtype() != DType::F32 {
            return Composed.cross_entropy(logits, targets, scale, dtype);
        }
        let (logits, targets) = (logits.into_dispatch(), targets.on_device.into_dispatch());
        let (gradient, losses, hits) =
            Dispatch::cross_entropy_rows(logits, targets, scale as f32, dtype);
        let losses = Tensor::<1>::from_dispatch(losses);
        CrossEntropy {
            gradient: spoilt("cross_entropy", Tensor::from_dispatch(gradient)),
            terms: LossTerms::OnDevice {
                loss: losses.sum(),
                hits: Tensor::from_dispatch(hits),
            },
        }
    }

    fn sums_of_squares(&self, values: &Tensor<1>) -> Tensor<1> {
        if !Kernel::AdamW.is_on() || values.dtype() != DType::F32 {
            return Composed.sums_of_squares(values);
        }
        Tensor::from_dispatch(Dispatch::partial_squares(values.clone().into_dispatch()))
    }

    fn adamw(
        &self,
        settings: AdamWSettings,
        learning_rate: f64,
        factor: f64,
        parameters: Tensor<1>,
        gradients: Tensor<1>,
        state: Option<AdamWState>,
    ) -> (Tensor<1>, Option<AdamWState>) {
        let floats = parameters.dtype() == DType::F32 && gradients.dtype() == DType::F32;
        if !Kernel::AdamW.is_on() || !floats {
            let (parameters, rate) = (parameters, learning_rate);
            return Composed.adamw(settings, rate, factor, parameters, gradients, state);
        }
        let state = state.unwrap_or_else(|| {
            AdamWState::new(0, parameters.zeros_like(), parameters.zeros_like())
        });
        let time = state.time + 1;
        let betas = [settings.beta_1, settings.beta_2];
        let decay = learning_rate * f64::from(settings.weight_decay);
        let numbers = AdamWNumbers {
            factor: factor as f32,
            betas,
            epsilon: settings.epsilon,
            corrections: betas.map(|beta| 1.0 - beta.powi(time as i32)),
            kept: (1.0 - decay) as f32,
            rate: learning_rate as f32,
        };
        let (parameters, first, second) = Dispatch::adamw_update(
            parameters.into_dispatch(),
            gradients.into_dispatch(),
            state.moment_1.into_dispatch(),
            state.moment_2.into_dispatch(),
            numbers,
        );
        let [first, second] = [first, second].map(Tensor::from_dispatch);
        let state = AdamWState::new(time, first, second);
        (Tensor::from_dispatch(parameters), Some(state))
    }

    fn attention(
        &self,
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        layout: &AttentionLayout,
        heads: Heads,
    ) -> (Tensor<2>, SavedAttention) {
        let Some(tables) = layout.tiled() else {
            return Composed.attention(q, k, v, layout, heads);
        };
        let tiled = tables.at();
        let (output, log_sums) = Dispatch::tiled_attention(
            q.clone().into_dispatch(),
            k.clone().into_dispatch(),
            v.clone().into_dispatch(),
            tables.all.clone().into_dispatch(),
            tables.pairs * heads.query,
            tiled,
        );
        let (output, log_sums) = (
            Tensor::from_dispatch(output),
            Tensor::from_dispatch(log_sums),
        );
        let saved = SavedAttention::Tiled {
            qkv: [q, k, v],
            output: output.clone(),
            log_sums,
        };
        (output, saved)
    }
}

/// Whether one launch can add these products: several with many rows that are not divided, in one packing.
fn joins(terms: &[JointTerm], direction: Direction) -> bool {
    let n = terms[0].x.dims()[0];
    let scheme = terms[0].weight.dtype();
    let factors = || terms.iter().filter_map(|term| term.low_rank.as_ref());
    let of_one_type = |dtype| factors().all(|(_, b)| b.dtype() == dtype);
    let joins = |term: &JointTerm| {
        let (k, m) = direction.inner_and_outer(term.weight.dims());
        term.weight.dtype() == scheme
            && rows_at_once([n, k, m]) >= n
            && has_kernel(None, &term.x, &term.weight, direction)
    };
    Kernel::JointProduct.is_on()
        && (2..=MEMBERS).contains(&terms.len())
        && n >= FEW_ROWS
        && factors().next().is_none_or(|(_, b)| of_one_type(b.dtype()))
        && terms.iter().all(joins)
}

/// Whether a product with a quantized weight can have SwiGLU's gate behind it: with many rows that are not divided.
fn ends_in_gate(x: &Tensor<2>, weight: &Tensor<2>, direction: Direction) -> bool {
    let n = x.dims()[0];
    let (k, m) = direction.inner_and_outer(weight.dims());
    Kernel::SwiGlu.is_on()
        && n >= FEW_ROWS
        && m.is_multiple_of(4)
        && rows_at_once([n, k, m]) >= n
        && has_kernel(None, x, weight, direction)
}

/// Whether a kernel multiplies: the weight is quantized, and no measurement showed that Burn multiplies faster.
fn has_kernel(
    sum: Option<&Tensor<2>>,
    x: &Tensor<2>,
    weight: &Tensor<2>,
    direction: Direction,
) -> bool {
    let DType::QFloat(scheme) = weight.dtype() else {
        return false;
    };
    if !computes_products(x.dtype(), &x.device()) {
        return false;
    }
    let types = [x.dtype(), sum.map_or(x.dtype(), Tensor::dtype)];
    let transposed = direction == Direction::Backward;
    let product = Product::new(x.dims()[0], weight.dims(), &scheme, transposed, types);
    match x.device().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => !burn_is_faster(device, product),
        _ => false,
    }
}

/// A product with a quantized weight by the kernel for it.
fn packed_product(
    sum: Option<Tensor<2>>,
    x: Tensor<2>,
    weight: Tensor<2>,
    low_rank: Option<LowRankTerm>,
    direction: Direction,
) -> Tensor<2> {
    let [d_in, d_out] = weight.dims();
    let n = x.dims()[0];
    let rows = rows_at_once([n, d_in, d_out]);
    if rows < n {
        let parts = (0..n).step_by(rows).map(|first| {
            let part = |x: Tensor<2>| x.narrow(0, first, rows.min(n - first));
            let low_rank = low_rank.clone().map(|mut term| {
                term.low.all = part(term.low.all);
                term
            });
            let (sum, x) = (sum.clone().map(part), part(x.clone()));
            packed_product(sum, x, weight.clone(), low_rank, direction)
        });
        return Tensor::cat(parts.collect(), 0);
    }
    let (terms, [low, b]) = terms(&x, sum.as_ref(), low_rank, direction);
    // An operand that is not a term is ignored; something has to stand in its place.
    let sum = sum.unwrap_or_else(|| x.clone());
    let product = Dispatch::packed_product(
        x.into_dispatch(),
        weight.into_dispatch(),
        sum.into_dispatch(),
        low.into_dispatch(),
        b.into_dispatch(),
        terms,
    );
    spoilt(operation_of(direction), Tensor::from_dispatch(product))
}

/// The name of the operation in checks of a device.
fn operation_of(direction: Direction) -> &'static str {
    match direction {
        Direction::Forward => "quantized_product",
        Direction::Backward => "quantized_product_backward",
    }
}

/// The terms of a product, and both factors of the low-rank term; without one x stands in their place.
fn terms(
    x: &Tensor<2>,
    sum: Option<&Tensor<2>>,
    low_rank: Option<LowRankTerm>,
    direction: Direction,
) -> (Terms, [Tensor<2>; 2]) {
    let terms = Terms {
        transposed: direction == Direction::Backward,
        sum: sum.is_some(),
        low: low_rank
            .as_ref()
            .map(|term| (term.low.first, term.low.rank)),
        dtype: sum.map_or(x.dtype(), Tensor::dtype),
    };
    let factors = match low_rank {
        Some(term) => [term.low.all, term.b],
        None => [x.clone(), x.clone()],
    };
    (terms, factors)
}

/// Whether one launch can compute the products of low rank of these layers.
fn groups(wide: &[Tensor<2>], layers: usize) -> bool {
    Kernel::LowRank.is_on()
        && layers <= MEMBERS
        && wide.iter().all(|x| x.dims()[1].is_multiple_of(4))
}

/// The gradients of up to three layers; of layers with the same `wide`, one is sufficient. `norm`: the factors of rows
/// and the gain of an RMSNorm whose output is meant.
fn low_rank_gradients(
    low: &Tensor<2>,
    wide: &[Tensor<2>],
    ranks: &[usize],
    transposed: bool,
    norm: Option<[Tensor<2>; 2]>,
) -> Vec<Tensor<2>> {
    let group = Group {
        ranks: padded(ranks, 0),
        scales: [1.0; MEMBERS],
        transposed,
        dtype: DType::F32,
    };
    let [x0, x1, x2] = all_members(wide);
    let normed = norm.is_some();
    // Operands that are ignored; something has to stand in their place.
    let norm = norm.unwrap_or_else(|| [low.clone(), low.clone()]);
    let [inverse, gain] = norm.map(Tensor::into_dispatch);
    let low = low.clone().into_dispatch();
    let (a, b, c) = Dispatch::low_rank_gradients(low, x0, x1, x2, inverse, gain, normed, group);
    let outputs = [a, b, c].into_iter().take(ranks.len());
    outputs
        .map(|output| spoilt("low_rank", Tensor::from_dispatch(output)))
        .collect()
}

/// Operands for a kernel of [`MEMBERS`] layers; the first stands for those that are not there.
fn all_members(tensors: &[Tensor<2>]) -> [DispatchTensor; MEMBERS] {
    std::array::from_fn(|i| {
        tensors
            .get(i)
            .unwrap_or(&tensors[0])
            .clone()
            .into_dispatch()
    })
}

/// As [`all_members`], of tensors that nothing else needs.
fn owned_members(tensors: Vec<Tensor<2>>) -> [DispatchTensor; MEMBERS] {
    let first = tensors[0].clone();
    let mut tensors = tensors.into_iter();
    std::array::from_fn(|_| {
        tensors
            .next()
            .unwrap_or_else(|| first.clone())
            .into_dispatch()
    })
}

fn padded<T: Copy>(values: &[T], with: T) -> [T; MEMBERS] {
    std::array::from_fn(|i| values.get(i).copied().unwrap_or(with))
}

/// The gradients of queries, keys and values of [`Gpu`]'s attention.
pub(crate) fn attention_backward(
    [q, k, v]: [Tensor<2>; 3],
    output: Tensor<2>,
    log_sums: Tensor<2>,
    gradient: Tensor<2>,
    tables: &TiledTables,
    heads: Heads,
) -> [Tensor<2>; 3] {
    let (d_q, d_k, d_v) = Dispatch::tiled_attention_backward(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        output.into_dispatch(),
        log_sums.into_dispatch(),
        gradient.into_dispatch(),
        tables.all.clone().into_dispatch(),
        tables.pairs * heads.query,
        tables.at(),
    );
    [d_q, d_k, d_v].map(Tensor::from_dispatch)
}

/// The index tables of tiled attention that are about to be copied to the device.
#[derive(Debug)]
pub(crate) struct PlannedTiles {
    spans: Ints,
    keys_of: Ints,
    queries_of: Ints,
    pairs: usize,
    shape: AttentionShape,
}

/// The same on the device.
#[derive(Debug, Clone)]
pub(crate) struct TiledTables {
    /// Every index of the batch, `[count]`; a slice of it would be copied.
    all: Tensor<1, Int>,
    spans: usize,
    keys_of: usize,
    queries_of: usize,
    /// Pairs of a token and a token that it attends to.
    pairs: usize,
    shape: AttentionShape,
}

impl PlannedTiles {
    /// `None` if no kernel for tiles computes attention between these heads: not on the CPU, nor in an autodiff graph.
    pub(crate) fn new(
        segments: &[Segment],
        ranges: &AttentionRanges,
        heads: Heads,
        dtype: DType,
        device: &Device,
        uploads: &mut Uploads,
    ) -> Option<Self> {
        let shape = shape(heads, dtype, device)?.with_window(ranges.window.is_some());
        let tables = tiles::Tables::new(segments, ranges, shape.tokens(), shape.side);
        Some(Self {
            spans: uploads.ints(tables.spans),
            keys_of: uploads.ints(tables.keys_of),
            queries_of: uploads.ints(tables.queries_of),
            pairs: ranges.pairs(),
            shape,
        })
    }

    pub(crate) fn on_device(self, uploaded: &Uploaded) -> TiledTables {
        TiledTables {
            all: uploaded.all_ints(),
            spans: self.spans.start(),
            keys_of: self.keys_of.start(),
            queries_of: self.queries_of.start(),
            pairs: self.pairs,
            shape: self.shape,
        }
    }
}

impl TiledTables {
    fn at(&self) -> TiledAttention {
        TiledAttention {
            shape: self.shape,
            spans: self.spans,
            keys_of: self.keys_of,
            queries_of: self.queries_of,
        }
    }
}

/// The tiles of attention between these heads; `None` without a kernel for it.
fn shape(heads: Heads, dtype: DType, device: &Device) -> Option<AttentionShape> {
    if device.is_autodiff() || !Kernel::Attention.is_on() || multiplies_in_tf32(dtype, device) {
        return None;
    }
    let client = client(device)?;
    AttentionShape::of(client.properties(), dtype, heads.query, heads.key, heads.d)
}

/// Whether products with quantized weights are computed by kernels here, if they are faster than Burn's.
fn computes_products(dtype: DType, device: &Device) -> bool {
    Kernel::Product.is_on() && !multiplies_in_tf32(dtype, device)
}

/// Whether Burn's products of this type run on matrix units in TF32. The kernels here have no such variant.
fn multiplies_in_tf32(dtype: DType, device: &Device) -> bool {
    dtype == DType::F32 && has_tf32(device)
}
