//! The kernels of a product, and the choice between them by measurement on the user's device, once per shape. Results are
//! kept on disk with Burn's own measurements.

use std::fmt;

#[cfg(feature = "autotune")]
pub use measured::fastest;

/// A kernel of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Candidate {
    /// `product.rs`.
    Units,
    /// `matrix_product.rs` with its large tile.
    MatrixLarge,
    /// `matrix_product.rs` with its small tile.
    MatrixSmall,
    /// Burn's: the weight dequantized into memory, then a product.
    Composed,
}

impl Candidate {
    /// Every kernel.
    pub const ALL: [Self; 4] = [
        Self::Composed,
        Self::Units,
        Self::MatrixLarge,
        Self::MatrixSmall,
    ];
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Units => "units",
            Self::MatrixLarge => "matrix units, large tile",
            Self::MatrixSmall => "matrix units, small tile",
            Self::Composed => "dequantization and product",
        })
    }
}

#[cfg(feature = "autotune")]
mod measured {
    use burn_cubecl::CubeTuneId;
    use burn_cubecl::tensor::CubeTensor;
    use cubecl::AutotuneKey;
    use cubecl::ir::ElemType;
    use cubecl::tune::{LocalTuner, Tunable, TunableSet, local_tuner};
    use serde::{Deserialize, Serialize};

    use super::Candidate;
    use crate::launch::element;
    use crate::product::Operands;

    /// What a measurement is valid for.
    #[derive(Hash, Eq, PartialEq, Debug, Clone, Serialize, Deserialize, AutotuneKey)]
    pub struct ProductKey {
        #[autotune(anchor)]
        rows: usize,
        inner: usize,
        cols: usize,
        bits: usize,
        block: usize,
        along_cols: bool,
        types: [ElemType; 2],
    }

    static TUNER: LocalTuner<ProductKey, CubeTuneId> = local_tuner!();

    /// The fastest candidate, measured now if it is not known yet.
    pub fn fastest(operands: &Operands) -> Candidate {
        let id = CubeTuneId::new(&operands.x.client, &operands.x.device);
        let candidates = TUNER.init(&id, candidates);
        let key = key(operands);
        let known = || TUNER.fastest_identity(&id, &candidates, &key);
        known().unwrap_or_else(|| {
            // Only the product itself is measured: the other terms cost every candidate the same.
            let operands = operands.without_terms();
            // Burn measures its own candidates for the dense product before, not within the measurement here.
            let _ = operands.clone().launch(Candidate::Composed);
            let client = operands.x.client.clone();
            TUNER.execute(&id, &client, candidates.clone(), operands);
            known().unwrap_or(Candidate::Composed)
        })
    }

    fn key(operands: &Operands) -> ProductKey {
        let [rows, inner, cols] = operands.lengths();
        let packing = operands.packing;
        ProductKey {
            rows,
            inner,
            cols,
            bits: packing.bits,
            block: packing.block,
            along_cols: packing.along_cols,
            types: [&operands.x, &operands.output].map(|tensor| element(tensor.dtype)),
        }
    }

    fn candidates() -> TunableSet<ProductKey, Operands, CubeTensor, Candidate> {
        let set = TunableSet::new_cloning_inputs(|operands: &Operands| key(operands));
        Candidate::ALL.into_iter().fold(set, |set, candidate| {
            let run = move |operands: Operands| {
                if operands.can(candidate) {
                    Ok(operands.launch(candidate))
                } else {
                    Err("not for these operands")
                }
            };
            set.with(Tunable::identified(candidate, run))
        })
    }
}
