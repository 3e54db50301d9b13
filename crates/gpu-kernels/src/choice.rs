//! The kernels of a product, and the choice between them by measurement on the user's device, once per shape. Results are
//! kept on disk with Burn's own measurements.

use std::fmt;

use burn::tensor::DType;
use burn::tensor::quantization::{QuantScheme, QuantStore};
use cubecl::ir::DeviceProperties;

use crate::matrix_product::Fragment;

#[cfg(feature = "autotune")]
pub use measured::{burn_is_faster, fastest};

/// A product, as far as the choice of its kernel depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Rows of x, the inner dimension, columns of the output.
    pub lengths: [usize; 3],
    /// Bits of the weight's integers.
    pub bits: usize,
    /// Integers that share a scale.
    pub block: usize,
    /// Whether words lie along the output's columns.
    pub along_cols: bool,
    /// The types of x and of the output.
    pub types: [DType; 2],
}

impl Product {
    /// The product `[n, k] · W`, or with Wᵀ if `transposed`, of a weight `[d_in, d_out]` in this scheme.
    pub fn new(
        n: usize,
        [d_in, d_out]: [usize; 2],
        scheme: &QuantScheme,
        transposed: bool,
        types: [DType; 2],
    ) -> Self {
        let (k, m) = if transposed {
            (d_out, d_in)
        } else {
            (d_in, d_out)
        };
        let block = scheme.block_size().map_or(k.max(m), |block| {
            block.iter().map(|b| *b as usize).product()
        });
        Self {
            lengths: [n, k, m],
            bits: scheme.size_bits_value(),
            block,
            along_cols: words_lie_along_d_out(scheme) != transposed,
            types,
        }
    }
}

/// Whether a weight's words lie along d_out, as in our blocks; else along d_in, as in GGUF's.
pub fn words_lie_along_d_out(scheme: &QuantScheme) -> bool {
    !matches!(scheme.store, QuantStore::PackedU32(1))
}

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
    /// The candidates for products of this type on a device.
    pub fn of(properties: &DeviceProperties, dtype: DType) -> Vec<Self> {
        if Fragment::of(properties, dtype).is_some() {
            vec![Self::MatrixLarge, Self::MatrixSmall, Self::Composed]
        } else {
            vec![Self::Units, Self::Composed]
        }
    }

    #[cfg(feature = "autotune")]
    const ALL: [Self; 4] = [
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
    use burn_cubecl::tensor::CubeTensor;
    use burn_cubecl::{CubeDevice, CubeTuneId};
    use cubecl::AutotuneKey;
    use cubecl::ir::ElemType;
    use cubecl::tune::{LocalTuner, Tunable, TunableSet, local_tuner};
    use serde::{Deserialize, Serialize};

    use super::{Candidate, Product};
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

    /// Whether a measurement showed that Burn's kernels are faster for such a product. Then the caller can compose it of
    /// Burn's operations, which fuse more than a single operation can.
    pub fn burn_is_faster(device: &CubeDevice, product: Product) -> bool {
        let id = CubeTuneId::new(&device.client(), device);
        let candidates = TUNER.init(&id, candidates);
        let known = TUNER.fastest_identity(&id, &candidates, &product.key());
        known == Some(Candidate::Composed)
    }

    impl Product {
        fn key(self) -> ProductKey {
            let [rows, inner, cols] = self.lengths;
            let types = self.types.map(element);
            ProductKey::new(
                rows,
                inner,
                cols,
                self.bits,
                self.block,
                self.along_cols,
                types,
            )
        }
    }

    fn key(operands: &Operands) -> ProductKey {
        let packing = operands.packing;
        let product = Product {
            lengths: operands.lengths(),
            bits: packing.bits,
            block: packing.block,
            along_cols: packing.along_cols,
            types: [operands.x.dtype, operands.output.dtype],
        };
        product.key()
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
