//! Products with the weight of the output layer, which is often the embedding's (`tie_word_embeddings`).

use burn::tensor::{DType, Device, Tensor};

use crate::dispatch::{of, of_device};

/// The type that products with a vocabulary weight are computed in. The CPU keeps the weight in the 16 bits of its file
/// and computes in f32: half the memory without loss of accuracy.
pub fn table_dtype(table: &Tensor<2>) -> DType {
    of(table).table_dtype(table.dtype())
}

/// Whether products on `device` read a vocabulary weight in 16 bits and compute in f32: see [`table_dtype`].
pub fn widens_tables(device: &Device) -> bool {
    of_device(device).table_dtype(DType::BF16) == DType::F32
}

/// `x · tableᵀ`: one logit per row of the vocabulary weight, outside an autodiff graph.
///
/// # Shapes
///
/// - `x`: `[n, width]`
/// - `table`: `[rows, width]`
/// - output: `[n, rows]`, f32
pub fn table_logits(x: Tensor<2>, table: Tensor<2>) -> Tensor<2> {
    of(&x).table_logits(x, table)
}

/// `sum + gradient · table`: the gradient of [`table_logits`]' input, added to that of other shards.
///
/// # Shapes
///
/// - `gradient`: `[n, rows]`
/// - `table`: `[rows, width]`
/// - `sum`, output: `[n, width]`
pub fn table_logits_backward(
    sum: Option<Tensor<2>>,
    gradient: Tensor<2>,
    table: Tensor<2>,
) -> Tensor<2> {
    of(&gradient).table_logits_backward(sum, gradient, table)
}
