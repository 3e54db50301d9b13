//! `lora_merge.json`: records what was merged into what, so that an adapter can be taken out again and checked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use llama_burn::limited::{self, LARGEST_TABLE};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::MergeError;

/// The file's name in a merged folder.
pub(super) const RECORD_FILE: &str = "lora_merge.json";

/// The record of a merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Version of this file's layout.
    pub(super) version: u32,
    /// The base model's folder.
    pub(super) base_model: String,
    /// The adapter's folder.
    pub(super) adapter: String,
    /// SHA-256 of `adapter_model.safetensors`.
    pub(super) adapter_sha256: String,
    /// The type of each of the base model's tensors.
    pub(super) base_dtypes: BTreeMap<String, String>,
    /// The tensors that were changed.
    pub(super) changed: BTreeMap<String, Changed>,
}

/// A tensor that was changed: SHA-256 of its numbers before ([`Sum::add_numbers`]) and of its bytes after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Changed {
    pub(super) base_sha256: String,
    pub(super) merged_sha256: String,
}

impl Record {
    /// Reads the record of a merged folder. `None` if the file does not exist.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or that is not a record.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>, MergeError> {
        let path = folder.join(RECORD_FILE);
        let unreadable = |reason: String| MergeError::Unreadable {
            file: path.clone(),
            reason,
        };
        let text = match limited::read_to_string(&path, LARGEST_TABLE) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error.to_string())),
        };
        let record: Self =
            serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        match record.version {
            1 => Ok(Some(record)),
            version => Err(unreadable(format!(
                "its version is {version}; this program reads version 1"
            ))),
        }
    }

    /// The base's type of a tensor, if it is recorded.
    pub(super) fn base_dtype(&self, name: &str) -> Option<Dtype> {
        match self.base_dtypes.get(name).map(String::as_str) {
            Some("F32") => Some(Dtype::F32),
            Some("F16") => Some(Dtype::F16),
            Some("BF16") => Some(Dtype::BF16),
            _ => None,
        }
    }
}

/// A SHA-256 of bytes that come in chunks.
#[derive(Clone, Default)]
pub(super) struct Sum(Sha256);

impl Sum {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds little-endian floats of `width` bytes, and -0 as 0: taking an update out cannot restore the sign.
    pub(super) fn add_numbers(&mut self, bytes: &[u8], width: usize) {
        let mut bytes = bytes.to_vec();
        for number in bytes.chunks_exact_mut(width.max(1)) {
            if let [rest @ .., sign @ 0x80] = number
                && rest.iter().all(|byte| *byte == 0)
            {
                *sign = 0;
            }
        }
        self.add(&bytes);
    }

    pub(super) fn finish(self) -> String {
        let digest = self.0.finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// SHA-256 of a file.
pub(super) fn file_sum(path: &Path) -> Result<String, MergeError> {
    let mut sum = Sum::default();
    let mut read = || {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                count => sum.add(&buffer[..count]),
            }
        }
    };
    read().map_err(|error: std::io::Error| MergeError::Unreadable {
        file: path.into(),
        reason: error.to_string(),
    })?;
    Ok(sum.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_numbers_know_no_negative_zero_and_all_else() {
        let sum = |values: &[f32]| {
            let mut sum = Sum::default();
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            sum.add_numbers(&bytes, 4);
            sum.finish()
        };
        assert_eq!(sum(&[1.5, -0.0]), sum(&[1.5, 0.0]));
        assert_ne!(sum(&[1.5, 0.0]), sum(&[-1.5, 0.0]));
        assert_ne!(sum(&[1.5, 0.0]), sum(&[1.5, -1e-45]));
        // SHA-256 of nothing, from FIPS 180-4's examples.
        let nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Sum::default().finish(), nothing);
    }
}
