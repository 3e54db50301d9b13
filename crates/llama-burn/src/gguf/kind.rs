//! How a tensor is stored.

/// A supported ggml tensor type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types)] // ggml's names.
pub enum TensorKind {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Id in the file, kind, elements per block, bytes per block.
const KINDS: [(u32, TensorKind, usize, usize); 11] = [
    (0, TensorKind::F32, 1, 4),
    (1, TensorKind::F16, 1, 2),
    (30, TensorKind::BF16, 1, 2),
    (2, TensorKind::Q4_0, 32, 18),
    (3, TensorKind::Q4_1, 32, 20),
    (6, TensorKind::Q5_0, 32, 22),
    (7, TensorKind::Q5_1, 32, 24),
    (8, TensorKind::Q8_0, 32, 34),
    (12, TensorKind::Q4_K, 256, 144),
    (13, TensorKind::Q5_K, 256, 176),
    (14, TensorKind::Q6_K, 256, 210),
];

impl TensorKind {
    pub(super) fn from_id(id: u32) -> Result<Self, String> {
        match KINDS.iter().find(|kind| kind.0 == id) {
            Some((_, kind, _, _)) => Ok(*kind),
            None => Err(format!(
                "is of type {}; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are read \
                 (llama.cpp's llama-quantize makes such a file)",
                foreign_name(id)
            )),
        }
    }

    fn row(self) -> (u32, TensorKind, usize, usize) {
        let found = KINDS.iter().find(|kind| kind.1 == self);
        *found.expect("every kind is in the table")
    }

    pub(super) fn id(self) -> u32 {
        self.row().0
    }

    /// The number of elements per block, along a row.
    pub fn block(self) -> usize {
        self.row().2
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// llama.cpp's `general.file_type` of a model that is mostly of this kind.
    pub fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            Self::Q4_K => 15,
            Self::Q5_K => 17,
            Self::Q6_K => 18,
            Self::BF16 => 32,
        }
    }
}

/// ggml's name of an unsupported type.
fn foreign_name(id: u32) -> String {
    let name = match id {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {id}, which is unknown"),
    };
    name.into()
}
