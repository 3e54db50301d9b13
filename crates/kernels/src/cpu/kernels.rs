//! The CPU's implementation of [`Kernels`]: kernels for f32, compositions for every other type.

use burn::tensor::{DType, Device, Tensor};

use super::frozen_linear::{dense, few_rows, half};
use super::is_native;
use crate::attention::{AttentionLayout, Heads, SavedAttention};
use crate::dispatch::Composed;
use crate::frozen_linear::{Direction, quantized_product};
use crate::kv_cache::{KvCache, PromptTokens};
use crate::loss::{CrossEntropy, LOGITS_BYTES, Targets};
use crate::rms_norm::InverseRms;
use crate::rope::{RotaryTables, Rotation};
use crate::{Kernels, cpu};

/// Burn's CPU backend.
#[derive(Debug)]
pub(crate) struct Cpu;

impl Kernels for Cpu {
    // A copy is free here, and the kernels need tensors that start where their memory starts.
    fn joins_uploads(&self) -> bool {
        false
    }

    fn attention_reads_ranges(&self) -> bool {
        true
    }

    fn query_scale(&self, _heads: Heads) -> f64 {
        1.0
    }

    fn rotates_halves(&self) -> bool {
        true
    }

    // The kernels read a slice of columns in place.
    fn transposes_low_rank(&self) -> bool {
        false
    }

    fn table_dtype(&self, stored: DType) -> DType {
        match stored {
            DType::F16 | DType::BF16 => DType::F32,
            dtype => dtype,
        }
    }

    fn logits_bytes(&self, _device: &Device) -> usize {
        LOGITS_BYTES
    }

    fn multiply_add(
        &self,
        sum: Option<Tensor<2>>,
        scale: f64,
        left: Tensor<2>,
        right: Tensor<2>,
    ) -> Tensor<2> {
        if !is_native(&left) || !is_native(&right) {
            return Composed.multiply_add(sum, scale, left, right);
        }
        match sum {
            Some(sum) if !is_native(&sum) => {
                let dtype = sum.dtype();
                sum + cpu::products::multiply_add(None, scale, left, right).cast(dtype)
            }
            sum => cpu::products::multiply_add(sum, scale, left, right),
        }
    }

    fn frozen_product(
        &self,
        sum: Option<Tensor<2>>,
        x: Tensor<2>,
        weight: Tensor<2>,
        direction: Direction,
    ) -> Tensor<2> {
        if matches!(weight.dtype(), DType::QFloat(_)) {
            return quantized_product(sum, x, weight, direction);
        }
        match direction {
            Direction::Forward if few_rows::applies(&sum, &x, &weight) => {
                few_rows::of_dense(sum, x, weight)
            }
            Direction::Forward => self.multiply_add(sum, 1.0, x, weight),
            Direction::Backward if dense::applies(&sum, &x, &weight) => {
                dense::backward(sum, x, weight)
            }
            Direction::Backward => self.multiply_add(sum, 1.0, x, weight.transpose()),
        }
    }

    fn table_logits(&self, x: Tensor<2>, table: Tensor<2>) -> Tensor<2> {
        if is_native(&x) {
            half::logits(x, table)
        } else {
            Composed.table_logits(x, table)
        }
    }

    fn table_logits_backward(
        &self,
        sum: Option<Tensor<2>>,
        gradient: Tensor<2>,
        table: Tensor<2>,
    ) -> Tensor<2> {
        if is_native(&gradient) {
            half::logits_backward(sum, gradient, table)
        } else {
            self.multiply_add(sum, 1.0, gradient, table)
        }
    }

    fn rms_norm(
        &self,
        x: &Tensor<2>,
        gain: Tensor<2>,
        eps: f64,
        dtype: DType,
    ) -> (Tensor<2>, InverseRms) {
        if is_native(x) {
            (cpu::rms_norm::forward(x, gain, eps), InverseRms(None))
        } else {
            Composed.rms_norm(x, gain, eps, dtype)
        }
    }

    fn inverse_rms(&self, x: &Tensor<2>, eps: f64) -> InverseRms {
        if is_native(x) {
            InverseRms(None)
        } else {
            Composed.inverse_rms(x, eps)
        }
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
        if inverse.0.is_some() {
            return Composed.rms_norm_backward(x, inverse, gain, eps, gradient, sum, dtype);
        }
        let result = cpu::rms_norm::backward(x, gain, eps, gradient, sum);
        (result.clone(), result.cast(dtype))
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
        assert_eq!(scale, 1.0, "attention on the CPU scales the scores");
        cpu::rope::rotate(x, tables, rotation)
    }

    fn swiglu(&self, gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
        if is_native(gate) && is_native(up) {
            cpu::swiglu::forward(gate, up)
        } else {
            Composed.swiglu(gate, up)
        }
    }

    fn swiglu_backward(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        gradient: Tensor<2>,
    ) -> (Tensor<2>, Tensor<2>) {
        if is_native(&gate) && is_native(&up) {
            cpu::swiglu::backward(gate, up, gradient)
        } else {
            Composed.swiglu_backward(gate, up, gradient)
        }
    }

    fn attention(
        &self,
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        layout: &AttentionLayout,
        heads: Heads,
    ) -> (Tensor<2>, SavedAttention) {
        if is_native(&q) {
            return cpu::attention::output([q, k, v], &layout.ranges, heads);
        }
        Composed.attention(q, k, v, layout, heads)
    }

    fn kv_cache(&self, k: Tensor<2>, v: Tensor<2>, prompts: PromptTokens) -> Box<dyn KvCache> {
        if is_native(&k) && is_native(&v) {
            Box::new(cpu::kv_cache::Cache::new([k, v], prompts))
        } else {
            Composed.kv_cache(k, v, prompts)
        }
    }

    fn cross_entropy(
        &self,
        logits: Tensor<2>,
        targets: Targets,
        scale: f64,
        dtype: DType,
    ) -> CrossEntropy {
        if is_native(&logits) {
            cpu::loss::cross_entropy(logits, targets.ids).scaled(scale, dtype)
        } else {
            Composed.cross_entropy(logits, targets, scale, dtype)
        }
    }
}
