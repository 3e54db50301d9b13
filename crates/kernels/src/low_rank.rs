//! Products of low rank: those that adapters add to the products with frozen weights.

use burn::tensor::Tensor;

use crate::dispatch::of;
use crate::rms_norm::InverseRms;

/// Columns of low rank that belong to one of several layers.
#[derive(Debug, Clone)]
pub struct LowRankPart {
    /// The columns of all layers, `[n, Σ r]`.
    pub all: Tensor<2>,
    /// The layer's first column.
    pub first: usize,
    /// The number of the layer's columns.
    pub rank: usize,
}

impl LowRankPart {
    /// The columns of a layer that shares them with no other, `[n, r]`.
    pub fn whole(all: Tensor<2>) -> Self {
        let rank = all.dims()[1];
        Self {
            all,
            first: 0,
            rank,
        }
    }

    /// The layer's columns, `[n, r]`. On GPUs this may copy them.
    pub fn of_layer(self) -> Tensor<2> {
        if self.rank == self.all.dims()[1] {
            self.all
        } else {
            self.all.narrow(1, self.first, self.rank)
        }
    }
}

/// The term `low · b` that a product with a frozen weight adds.
#[derive(Debug, Clone)]
pub struct LowRankTerm {
    /// `[n, r]`
    pub low: LowRankPart,
    /// `[r, d_out]`, or `[r, d_in]` in a product with the transposed weight; of any float type, may be a transposed view.
    pub b: Tensor<2>,
}

/// `γ · x · F` of several layers side by side, `[n, Σ r]` in f32, by a kernel for all of them; `None` where there is
/// none.
///
/// # Shapes
///
/// - `wide`: `[n, length]` per layer
/// - `factors`: `[length, r]` per layer, or with `transposed` `[r, length]`
///
/// # Panics
///
/// If the numbers of layers differ.
pub fn low_rank_columns(
    wide: &[Tensor<2>],
    factors: &[Tensor<2>],
    transposed: bool,
    scales: &[f64],
) -> Option<Tensor<2>> {
    assert!(
        wide.len() == factors.len() && wide.len() == scales.len(),
        "one factor and one scale per layer"
    );
    of(wide.first()?).low_rank_columns(wide, factors, transposed, scales)
}

/// `lowᵀ · wide` of each layer in f32, `[r, length]`, or with `transposed` `[length, r]`, by a kernel for all of them;
/// `None` where there is none.
///
/// # Shapes
///
/// - `low`: `[n, Σ r]`, from [`low_rank_columns`]
/// - `wide`: `[n, length]` per layer
///
/// # Panics
///
/// If there is not one rank per layer.
pub fn low_rank_gradients(
    low: &Tensor<2>,
    wide: &[Tensor<2>],
    ranks: &[usize],
    transposed: bool,
) -> Option<Vec<Tensor<2>>> {
    assert_eq!(wide.len(), ranks.len(), "one rank per layer");
    of(low).low_rank_gradients(low, wide, ranks, transposed)
}

/// The output of an RMSNorm that is not in memory: its input, the saved value and its gain.
#[derive(Debug, Clone)]
pub struct Normalized {
    /// The norm's input, `[n, hidden]` in f32.
    pub x: Tensor<2>,
    /// From [`rms_norm`](crate::rms_norm).
    pub inverse: InverseRms,
    /// From [`gain_row`](crate::gain_row).
    pub gain: Tensor<2>,
}

/// As [`low_rank_gradients`] with transposed outputs, `[hidden, r]`, for layers that all have the output of a norm as
/// `wide`. That output is not computed again; nothing is rounded to 16 bits.
pub fn low_rank_gradients_of_norm(
    low: &Tensor<2>,
    normalized: &Normalized,
    ranks: &[usize],
) -> Option<Vec<Tensor<2>>> {
    of(low).low_rank_gradients_of_norm(low, normalized, ranks)
}
