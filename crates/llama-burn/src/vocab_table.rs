//! The weight of the embedding and of the output layer: one row per token.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, FloatDType, IndexingUpdateOp, Tensor};
use kernels::{
    Ints, Uploaded, Uploads, multiply_in_f32, table_dtype, table_logits, table_logits_backward,
};
use lora_core::{Accumulate, Trained};

/// A `[vocab, hidden]` weight in shards of at most [`PIECE_BYTES`], because GPUs limit the size of one buffer. A device
/// that binds larger buffers gets larger shards, so that logits need not be concatenated. On the CPU the weight may
/// keep its file's 16 bits, although the model computes in f32.
#[derive(Module, Debug)]
pub struct VocabTable {
    /// The shards in order, `[rows, hidden]` each; all except the last have `rows_per_piece` rows.
    pub pieces: Vec<Param<Tensor<2>>>,
    /// Rows of every shard except the last.
    pub rows_per_piece: usize,
    /// The type that products are computed in, if that is not decided by the shards' type: those of a trained weight are
    /// f32.
    #[module(skip)]
    pub compute: Option<DType>,
}

/// The rows of a batch's tokens.
pub(crate) struct PlannedRows {
    /// A shard, and the rows of it that the batch needs.
    pieces: Vec<(usize, Ints)>,
    /// Each token's index among those rows, if they come from several shards.
    order: Option<Ints>,
}

/// WebGPU's default limit for a buffer that a shader reads is 128 MiB; this leaves some room.
pub const PIECE_BYTES: usize = 120 << 20;

/// The largest shard on any device: indices into it fit 32 bits.
const MOST_BYTES: usize = 2 << 30;

impl VocabTable {
    /// How many rows of `hidden` elements of `element_bytes` bytes a shard holds on `device`.
    pub fn rows_per_piece(hidden: usize, element_bytes: usize, device: &Device) -> usize {
        let piece = match kernels::largest_buffer(device) {
            Some(largest) => (largest / 16 * 15).clamp(PIECE_BYTES, MOST_BYTES),
            None => PIECE_BYTES,
        };
        (piece / (hidden * element_bytes)).max(1)
    }

    /// The type that products with the weight are computed in.
    pub fn compute_dtype(&self) -> DType {
        let of_shards = || table_dtype(&self.pieces[0].val().without_autodiff());
        self.compute.unwrap_or_else(of_shards)
    }

    /// The shards, if the weight is trained.
    pub(crate) fn trained(&self) -> impl Iterator<Item = Trained<'_>> {
        self.pieces.iter().filter_map(Trained::matrix)
    }

    /// Whether the weight is trained.
    pub fn trains(&self) -> bool {
        self.trained().next().is_some()
    }

    /// The rows of these tokens, in the compute type.
    ///
    /// # Shapes
    ///
    /// - output: `[ids.len(), hidden]`
    ///
    /// # Panics
    ///
    /// If an id is outside the vocabulary; [`PackedTokens::check`](crate::PackedTokens::check) reports it as an error.
    pub fn rows(&self, ids: &[u32]) -> Tensor<2> {
        let mut uploads = Uploads::default();
        let planned = self.planned_rows(ids, &mut uploads);
        let uploaded = uploads.send(&self.pieces[0].lazy_device());
        self.rows_of(&planned, &uploaded, value)
    }

    /// Plans the rows of these tokens, for [`rows_at`](Self::rows_at).
    ///
    /// # Panics
    ///
    /// As [`rows`](Self::rows).
    pub(crate) fn planned_rows(&self, ids: &[u32], uploads: &mut Uploads) -> PlannedRows {
        let per_piece = self.rows_per_piece;
        let mut order = vec![0i32; ids.len()];
        let mut next = 0;
        let mut pieces = Vec::new();
        for piece in 0..self.pieces.len() {
            let here = || (0..ids.len()).filter(|i| ids[*i] as usize / per_piece == piece);
            if here().next().is_none() {
                continue;
            }
            for position in here() {
                order[position] = next;
                next += 1;
            }
            let local = here().map(|i| (ids[i] as usize % per_piece) as i32);
            pieces.push((piece, uploads.ints(local)));
        }
        assert_eq!(
            next as usize,
            ids.len(),
            "a token id is outside the vocabulary"
        );
        PlannedRows {
            order: (pieces.len() > 1).then(|| uploads.ints(order)),
            pieces,
        }
    }

    /// As [`rows`](Self::rows), outside an autodiff graph, for rows whose indices are on the device already.
    pub(crate) fn rows_at(&self, planned: &PlannedRows, uploaded: &Uploaded) -> Tensor<2> {
        self.rows_of(planned, uploaded, detached)
    }

    fn rows_of(
        &self,
        planned: &PlannedRows,
        uploaded: &Uploaded,
        value: fn(&Param<Tensor<2>>) -> Tensor<2>,
    ) -> Tensor<2> {
        let found = planned
            .pieces
            .iter()
            .map(|(piece, rows)| value(&self.pieces[*piece]).select(0, uploaded.ints(rows)));
        let mut found: Vec<Tensor<2>> = found.collect();
        let rows = match &planned.order {
            None => found.remove(0),
            Some(order) => Tensor::cat(found, 0).select(0, uploaded.ints(order)),
        };
        self.widened(rows)
    }

    /// The logits for each row of `hidden`, in the autodiff graph of `hidden` if it is in one.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[m, hidden]`
    /// - output: `[m, vocab]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        let products = self.pieces.iter().map(|piece| {
            if hidden.is_autodiff() {
                let piece = self.widened(value(piece)).autodiff();
                hidden.clone().matmul(piece.transpose())
            } else {
                table_logits(hidden.clone(), self.computed(piece))
            }
        });
        let mut products: Vec<Tensor<2>> = products.collect();
        match products.len() {
            1 => products.remove(0),
            _ => Tensor::cat(products, 1),
        }
    }

    /// The gradient of `hidden` from that of [`logits`](Self::logits), outside any autodiff graph.
    ///
    /// # Shapes
    ///
    /// - `gradient`: `[m, vocab]`
    /// - output: `[m, hidden]`
    pub fn logits_backward(&self, gradient: Tensor<2>) -> Tensor<2> {
        let mut start = 0;
        let mut sum = None;
        for piece in &self.pieces {
            let piece = self.computed(piece);
            let rows = piece.dims()[0];
            let gradient = gradient.clone().narrow(1, start, rows);
            sum = Some(table_logits_backward(sum, gradient, piece));
            start += rows;
        }
        sum.unwrap_or_else(|| gradient.narrow(1, 0, 0))
    }

    /// The gradient of a trained output layer from that of [`logits`](Self::logits), in f32.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[m, hidden]`
    /// - `gradient`: `[m, vocab]`
    pub(crate) fn gradient_of_logits(
        &self,
        hidden: &Tensor<2>,
        gradient: &Tensor<2>,
        accumulate: &mut Accumulate<'_>,
    ) {
        let mut start = 0;
        for piece in self.trained() {
            let [rows, _] = piece.value().dims();
            let gradient = gradient.clone().narrow(1, start, rows);
            let product = multiply_in_f32(gradient.transpose(), hidden.clone());
            piece.accumulate(product, accumulate);
            start += rows;
        }
    }

    /// The gradient of a trained embedding from that of the rows of `ids`, in f32: the sum over each token's positions.
    ///
    /// # Shapes
    ///
    /// - `gradient`: `[ids.len(), hidden]`
    pub fn gradient_of_rows(
        &self,
        ids: &[u32],
        gradient: &Tensor<2>,
        accumulate: &mut Accumulate<'_>,
    ) {
        let mut uploads = Uploads::default();
        let per_piece = self.rows_per_piece;
        let of_shards = self.trained().enumerate().map(|(index, piece)| {
            let positions = (0..ids.len()).filter(|i| ids[*i] as usize / per_piece == index);
            let positions: Vec<u32> = positions.map(|i| i as u32).collect();
            let rows = positions
                .iter()
                .map(|i| (ids[*i as usize] as usize % per_piece) as i32);
            let rows = (!positions.is_empty()).then(|| uploads.ints(rows));
            (piece, rows, uploads.indices(&positions))
        });
        let of_shards: Vec<_> = of_shards.collect();
        let uploaded = uploads.send(&gradient.device());
        for (piece, rows, positions) in of_shards {
            let zeros = Tensor::zeros(piece.value().dims(), (&gradient.device(), DType::F32));
            let sums = match rows {
                None => zeros,
                Some(rows) => {
                    let part = gradient.clone().select(0, uploaded.ints(&positions));
                    let part = part.cast(DType::F32);
                    zeros.select_assign(0, uploaded.ints(&rows), part, IndexingUpdateOp::Add)
                }
            };
            piece.accumulate(sums, accumulate);
        }
    }

    /// The shard outside the autodiff graph, as products read it.
    fn computed(&self, piece: &Param<Tensor<2>>) -> Tensor<2> {
        let piece = detached(piece);
        match self.compute {
            Some(dtype) => piece.cast(dtype),
            None => piece,
        }
    }

    fn widened(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = self.compute_dtype();
        if x.dtype() == dtype {
            x
        } else {
            x.cast(FloatDType::from(dtype))
        }
    }
}

/// The shard, outside the autodiff graph.
fn detached(piece: &Param<Tensor<2>>) -> Tensor<2> {
    piece.val().without_autodiff()
}

/// The shard, outside the autodiff graph unless it is trained.
fn value(piece: &Param<Tensor<2>>) -> Tensor<2> {
    let tensor = piece.val();
    if tensor.is_require_grad() {
        tensor
    } else {
        tensor.without_autodiff()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Int, TensorData};

    #[test]
    fn shards_act_as_one_weight() {
        let device = Device::flex();
        let values: Vec<f32> = (0..10 * 4).map(|i| (i as f32).sin()).collect();
        let whole = Tensor::<2>::from_data(TensorData::new(values, [10, 4]), &device);
        let pieces = [(0, 4), (4, 4), (8, 2)]
            .map(|(start, rows)| Param::from_tensor(whole.clone().narrow(0, start, rows)));
        let table = VocabTable {
            pieces: pieces.to_vec(),
            rows_per_piece: 4,
            compute: None,
        };
        let ids = [9u32, 0, 4, 3, 9, 5];
        let index = Tensor::<1, Int>::from_data([9, 0, 4, 3, 9, 5], &device);
        let expected = whole.clone().select(0, index);
        table
            .rows(&ids)
            .into_data()
            .assert_eq(&expected.clone().into_data(), true);
        let logits = table.logits(expected.clone());
        logits.into_data().assert_approx_eq::<f32>(
            &expected.matmul(whole.transpose()).into_data(),
            burn::tensor::Tolerance::absolute(1e-6),
        );
    }
}
