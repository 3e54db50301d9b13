//! Errors of reading or writing a GGUF file.

use std::path::PathBuf;

/// Why a GGUF file cannot be used or written.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The system cannot open, read or write it.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is not a GGUF file.
    #[error("{} is not a GGUF file: it begins with {got:?} instead of \"GGUF\"", file.display())]
    NotGguf {
        /// The file.
        file: PathBuf,
        /// Its first bytes.
        got: String,
    },
    /// A version or byte order of the format that is not supported.
    #[error("{}: {what}; GGUF versions 2 and 3 in little-endian byte order are read", file.display())]
    Version {
        /// The file.
        file: PathBuf,
        /// The version or byte order.
        what: String,
    },
    /// The file contradicts itself or ends too early.
    #[error("{}: {reason} (byte {at}); the file is cut off or damaged, download it again", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// The offset of the error.
        at: u64,
        /// What is wrong there.
        reason: String,
    },
    /// A metadata key is missing or has a value that cannot be used.
    #[error("{}: {key} {reason}", file.display())]
    Metadata {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that cannot be used.
    #[error("{}: the tensor {name} {reason}", file.display())]
    Tensor {
        /// The file.
        file: PathBuf,
        /// llama.cpp's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}
