//! Chooses the implementation of an operation: one [`Kernels`] per kind of device.

use std::fmt::Debug;

use burn::tensor::{DType, Device, Tensor};

use crate::adamw::{AdamWSettings, AdamWState};
use crate::attention::{AttentionLayout, Heads, SavedAttention};
use crate::composed;
use crate::cpu;
use crate::frozen_linear::{Direction, JointTerm, one_after_the_other};
use crate::kv_cache::{KvCache, PromptTokens};
use crate::loss::{CrossEntropy, LOGITS_BYTES_GPU, Targets};
use crate::low_rank::{LowRankTerm, Normalized};
use crate::rms_norm::InverseRms;
use crate::rope::{RotaryTables, Rotation};

/// The operations of a LoRA training step outside an autodiff graph. Every default body is a composition of Burn's
/// operations that works on any backend. A backend overrides a method with a faster kernel.
///
/// The arguments are those of the crate's functions of the same names, which choose the implementation by the device
/// of their first tensor.
#[allow(missing_docs)] // Each method is documented at the function of its name.
pub trait Kernels: Debug + Sync {
    // The layout of operands.

    /// Whether a batch's index tables are copied to the device as one tensor per type. Every copy makes a GPU wait.
    fn joins_uploads(&self) -> bool {
        true
    }

    /// Whether attention reads the ranges of a packed sequence on the host, so that it needs no padded index tables.
    fn attention_reads_ranges(&self) -> bool {
        false
    }

    /// The factor by which queries are multiplied before attention: 1/√d, or 1 if attention scales the scores.
    fn query_scale(&self, heads: Heads) -> f64 {
        1.0 / (heads.d as f64).sqrt()
    }

    /// Whether RoPE rotates the halves of a head in place, so that it needs no tables for whole heads.
    fn rotates_halves(&self) -> bool {
        false
    }

    /// Whether the hidden activations x·A of several adapters are computed transposed. They are slices of one tensor: a
    /// slice of rows is contiguous, while a slice of columns would be copied.
    fn transposes_low_rank(&self) -> bool {
        true
    }

    /// The type that products with a vocabulary table stored in `stored` are computed in.
    fn table_dtype(&self, stored: DType) -> DType {
        stored
    }

    /// The largest number of bytes of logits in memory at a time.
    fn logits_bytes(&self, device: &Device) -> usize {
        crate::largest_buffer(device).map_or(LOGITS_BYTES_GPU, |most| LOGITS_BYTES_GPU.min(most))
    }

    // Products.

    fn multiply_add(
        &self,
        sum: Option<Tensor<2>>,
        scale: f64,
        left: Tensor<2>,
        right: Tensor<2>,
    ) -> Tensor<2> {
        composed::products::multiply_add(sum, scale, left, right)
    }

    fn frozen_product(
        &self,
        sum: Option<Tensor<2>>,
        x: Tensor<2>,
        weight: Tensor<2>,
        direction: Direction,
    ) -> Tensor<2> {
        composed::products::frozen_product(sum, x, weight, direction)
    }

    fn adapted_product(
        &self,
        sum: Option<Tensor<2>>,
        x: Tensor<2>,
        weight: Tensor<2>,
        low_rank: Option<LowRankTerm>,
        direction: Direction,
    ) -> Tensor<2> {
        let dtype = x.dtype();
        let product = self.frozen_product(sum, x, weight, direction);
        match low_rank {
            Some(term) => {
                let (low, b) = (term.low.of_layer().cast(dtype), term.b.cast(dtype));
                self.multiply_add(Some(product), 1.0, low, b)
            }
            None => product,
        }
    }

    fn joint_product(
        &self,
        low: Option<&Tensor<2>>,
        terms: Vec<JointTerm>,
        direction: Direction,
    ) -> Tensor<2> {
        one_after_the_other(self, low, terms, direction)
    }

    fn gated_product(
        &self,
        gate: &Tensor<2>,
        x: Tensor<2>,
        weight: Tensor<2>,
        low_rank: Option<LowRankTerm>,
    ) -> (Tensor<2>, Tensor<2>) {
        product_then_gate(self, gate, x, weight, low_rank)
    }

    fn gated_product_backward(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        gradient: Tensor<2>,
        weight: Tensor<2>,
        low_rank: Option<LowRankTerm>,
    ) -> (Tensor<2>, Tensor<2>) {
        product_then_gate_backward(self, gate, up, gradient, weight, low_rank)
    }

    fn low_rank_columns(
        &self,
        _wide: &[Tensor<2>],
        _factors: &[Tensor<2>],
        _transposed: bool,
        _scales: &[f64],
    ) -> Option<Tensor<2>> {
        None
    }

    fn low_rank_gradients(
        &self,
        _low: &Tensor<2>,
        _wide: &[Tensor<2>],
        _ranks: &[usize],
        _transposed: bool,
    ) -> Option<Vec<Tensor<2>>> {
        None
    }

    fn low_rank_gradients_of_norm(
        &self,
        _low: &Tensor<2>,
        _normalized: &Normalized,
        _ranks: &[usize],
    ) -> Option<Vec<Tensor<2>>> {
        None
    }

    fn table_logits(&self, x: Tensor<2>, table: Tensor<2>) -> Tensor<2> {
        crate::multiply_in_f32(x, table.transpose())
    }

    fn table_logits_backward(
        &self,
        sum: Option<Tensor<2>>,
        gradient: Tensor<2>,
        table: Tensor<2>,
    ) -> Tensor<2> {
        self.multiply_add(sum, 1.0, gradient, table)
    }

    // Chains of element-wise operations.

    fn rms_norm(
        &self,
        x: &Tensor<2>,
        gain: Tensor<2>,
        eps: f64,
        dtype: DType,
    ) -> (Tensor<2>, InverseRms) {
        composed::rms_norm::forward(x, gain, eps, dtype)
    }

    fn inverse_rms(&self, x: &Tensor<2>, eps: f64) -> InverseRms {
        InverseRms(Some(composed::rms_norm::inverse(x, eps)))
    }

    #[allow(clippy::too_many_arguments)]
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
        let inverse = inverse.0;
        let inverse = inverse.unwrap_or_else(|| composed::rms_norm::inverse(x, eps));
        let result = composed::rms_norm::backward(x, inverse, gain, gradient, sum);
        (result.clone(), result.cast(dtype))
    }

    fn rotate(
        &self,
        x: Tensor<2>,
        tables: &RotaryTables,
        rotation: Rotation,
        scale: f64,
    ) -> Tensor<2> {
        composed::rope::rotate(x, tables, rotation, scale)
    }

    fn swiglu(&self, gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
        composed::swiglu::forward(gate, up)
    }

    fn swiglu_backward(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        gradient: Tensor<2>,
    ) -> (Tensor<2>, Tensor<2>) {
        composed::swiglu::backward(gate, up, gradient)
    }

    // Attention.

    fn attention(
        &self,
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        layout: &AttentionLayout,
        heads: Heads,
    ) -> (Tensor<2>, SavedAttention) {
        let (output, saved) = composed::attention::forward(q, k, v, layout.padded(), heads);
        (output, SavedAttention::Padded(Box::new(saved)))
    }

    fn kv_cache(&self, k: Tensor<2>, v: Tensor<2>, prompts: PromptTokens) -> Box<dyn KvCache> {
        Box::new(composed::kv_cache::Cache::new([k, v], prompts))
    }

    // Loss and optimizer.

    fn cross_entropy(
        &self,
        logits: Tensor<2>,
        targets: Targets,
        scale: f64,
        dtype: DType,
    ) -> CrossEntropy {
        composed::loss::cross_entropy(logits, targets).scaled(scale, dtype)
    }

    fn sums_of_squares(&self, values: &Tensor<1>) -> Tensor<1> {
        values.clone().square().sum()
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
        composed::adamw::step(
            settings,
            learning_rate,
            factor,
            parameters,
            gradients,
            state,
        )
    }
}

/// [`Kernels::gated_product`] as a product and SwiGLU behind it.
pub(crate) fn product_then_gate(
    kernels: &(impl Kernels + ?Sized),
    gate: &Tensor<2>,
    x: Tensor<2>,
    weight: Tensor<2>,
    low_rank: Option<LowRankTerm>,
) -> (Tensor<2>, Tensor<2>) {
    let up = kernels.adapted_product(None, x, weight, low_rank, Direction::Forward);
    let output = kernels.swiglu(gate, &up);
    (up, output)
}

/// [`Kernels::gated_product_backward`] as a product and SwiGLU's backward pass behind it.
pub(crate) fn product_then_gate_backward(
    kernels: &(impl Kernels + ?Sized),
    gate: Tensor<2>,
    up: Tensor<2>,
    gradient: Tensor<2>,
    weight: Tensor<2>,
    low_rank: Option<LowRankTerm>,
) -> (Tensor<2>, Tensor<2>) {
    let gradient = kernels.adapted_product(None, gradient, weight, low_rank, Direction::Backward);
    kernels.swiglu_backward(gate, up, gradient)
}

/// Burn's compositions, for any device.
#[derive(Debug)]
pub(crate) struct Composed;

impl Kernels for Composed {}

/// The kernels for `x`. A tensor in an autodiff graph gets the compositions: the graph has to see every operation.
pub(crate) fn of<const D: usize>(x: &Tensor<D>) -> &'static dyn Kernels {
    if x.is_autodiff() {
        &Composed
    } else {
        of_device(&x.device())
    }
}

/// The kernels for tensors on `device` outside an autodiff graph.
pub(crate) fn of_device(device: &Device) -> &'static dyn Kernels {
    if cpu::is_cpu(device) {
        return &cpu::Cpu;
    }
    #[cfg(feature = "cube")]
    if crate::gpu::is_gpu(device) {
        return &crate::gpu::Gpu;
    }
    &Composed
}
