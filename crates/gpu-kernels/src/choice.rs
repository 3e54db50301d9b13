//! The kernels of a product, and the choice between them by measurement on the user's device, once per shape. Results are
//! kept on disk with Burn's own measurements.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::DType;
use burn::tensor::quantization::{QuantScheme, QuantStore};
use burn_cubecl::CubeDevice;
use cubecl::ir::DeviceProperties;

use crate::fragment::Fragment;
#[cfg(not(feature = "autotune"))]
use expected as chosen;
#[cfg(feature = "autotune")]
use measured as chosen;

pub use chosen::fastest;

/// One more than the index in [`Candidate::ALL`]; 0 without a forced candidate.
static FORCED: AtomicUsize = AtomicUsize::new(0);

/// Uses this kernel for every product of this process that it can compute; `None` chooses again. For measurements.
pub fn force(candidate: Option<Candidate>) {
    let index = Candidate::ALL
        .iter()
        .position(|other| Some(*other) == candidate);
    FORCED.store(index.map_or(0, |index| index + 1), Ordering::Relaxed);
}

/// The candidate that [`force`] chose.
pub fn forced() -> Option<Candidate> {
    let index = FORCED.load(Ordering::Relaxed).checked_sub(1)?;
    Candidate::ALL.get(index).copied()
}

/// Whether a measurement showed that Burn's kernels are faster for such a product. Then the caller can compose it of
/// Burn's operations, which fuse more than a single operation can. Not while a candidate is forced.
pub fn burn_is_faster(device: &CubeDevice, product: Product) -> bool {
    forced().is_none() && chosen::known(device, product) == Some(Candidate::Composed)
}

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
        // As in our blocks; GGUF's words lie along d_in.
        let words_lie_along_d_out = !matches!(scheme.store, QuantStore::PackedU32(1));
        Self {
            lengths: [n, k, m],
            bits: scheme.size_bits_value(),
            block,
            along_cols: words_lie_along_d_out != transposed,
            types,
        }
    }
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

/// Without measurements.
#[cfg(not(feature = "autotune"))]
mod expected {
    use burn_cubecl::CubeDevice;

    use super::{Candidate, Product};
    use crate::fragment::only_burn_has_units;
    use crate::matrix_product::{self, MatrixTile};
    use crate::product::Operands;

    /// The candidate that is expected to be the fastest.
    pub fn fastest(operands: &Operands) -> Candidate {
        let (properties, [n, _, m]) = (operands.x.client.properties(), operands.product.lengths);
        let processors = properties.hardware.num_streaming_multiprocessors;
        let fills = |tile: MatrixTile| {
            n.div_ceil(tile.rows) * m.div_ceil(tile.cols) >= processors.unwrap_or(32) as usize
        };
        let large = matrix_product::tile(operands, Candidate::MatrixLarge);
        if large.is_some_and(fills) {
            Candidate::MatrixLarge
        } else if operands.can(Candidate::MatrixSmall) {
            Candidate::MatrixSmall
        } else if only_burn_has_units(properties, operands.x.dtype) {
            Candidate::Composed
        } else {
            Candidate::Units
        }
    }

    /// No measurement is known.
    pub fn known(_device: &CubeDevice, _product: Product) -> Option<Candidate> {
        None
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
        let (device, product) = (&operands.x.device, operands.product);
        known(device, product).unwrap_or_else(|| {
            // Only the product itself is measured: the other terms cost every candidate the same.
            let operands = operands.without_terms();
            // Burn measures its own candidates for the dense product before, not within the measurement here.
            let _ = operands.clone().launch(Candidate::Composed);
            let client = operands.x.client.clone();
            let id = CubeTuneId::new(&client, device);
            TUNER.execute(&id, &client, TUNER.init(&id, candidates), operands);
            known(device, product).unwrap_or(Candidate::Composed)
        })
    }

    /// The fastest candidate, if it has been measured.
    pub fn known(device: &CubeDevice, product: Product) -> Option<Candidate> {
        let id = CubeTuneId::new(&device.client(), device);
        let candidates = TUNER.init(&id, candidates);
        TUNER.fastest_identity(&id, &candidates, &key(product))
    }

    fn key(product: Product) -> ProductKey {
        let Product {
            lengths: [rows, inner, cols],
            bits,
            block,
            along_cols,
            types,
        } = product;
        ProductKey::new(
            rows,
            inner,
            cols,
            bits,
            block,
            along_cols,
            types.map(element),
        )
    }

    fn candidates() -> TunableSet<ProductKey, Operands, CubeTensor, Candidate> {
        let set = TunableSet::new_cloning_inputs(|operands: &Operands| key(operands.product));
        Candidate::ALL.into_iter().fold(set, |set, candidate| {
            let run = move |operands: Operands| {
                if operands.can(candidate) {
                    let [output, _] = operands.launch(candidate);
                    Ok(output)
                } else {
                    Err("not for these operands")
                }
            };
            set.with(Tunable::identified(candidate, run))
        })
    }
}
