//! What a product does with its sums: the operations that Burn would launch behind it.

use cubecl::prelude::*;

use super::fault::Fault;
use super::product::Lengths;
use super::swiglu::{gated, gated_backward};

/// What becomes of a product P.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ending {
    /// `out = P`.
    Plain,
    /// `out = sum + P`.
    Sum,
    /// P is SwiGLU's up, and `sum` its gate: `out = P` and `other = silu(sum)·P`.
    Gate,
    /// P is the gradient of SwiGLU's output. `out` holds the gate and `other` up; their gradients take their places.
    GateBackward,
}

impl Ending {
    /// Whether `sum` is read.
    pub const fn reads_sum(self) -> bool {
        matches!(self, Self::Sum | Self::Gate)
    }
}

/// Writes the vector of outputs that begins at this row and column.
#[cube]
pub fn finish<S: Float, O: Float, N: Size>(
    product: Vector<f32, N>,
    sum: &[Vector<S, N>],
    out: &mut [Vector<O, N>],
    other: &mut [Vector<O, N>],
    row: usize,
    col: usize,
    lengths: &Lengths,
    #[comptime] ending: Ending,
    #[comptime] fault: Fault,
) {
    let width = N::value();
    let sum_at = (row * lengths.sum_row + col) / width;
    let at = (row * lengths.m + col) / width;
    if comptime!(ending == Ending::Plain) {
        out[at] = Vector::cast_from(product);
    } else if comptime!(ending == Ending::Sum) {
        out[at] = Vector::cast_from(product + Vector::cast_from(sum[sum_at]));
    } else if comptime!(ending == Ending::Gate) {
        // SwiGLU's backward pass reads up as it is in memory.
        let up = Vector::<O, N>::cast_from(product);
        let gate = Vector::<f32, N>::cast_from(sum[sum_at]);
        out[at] = up;
        other[at] = Vector::cast_from(gated::<N>(gate, Vector::cast_from(up)));
    } else {
        let gate = Vector::<f32, N>::cast_from(out[at]);
        let up = Vector::<f32, N>::cast_from(other[at]);
        let (d_gate, d_up) = gated_backward::<N>(gate, up, product, fault);
        out[at] = Vector::cast_from(d_gate);
        other[at] = Vector::cast_from(d_up);
    }
}
