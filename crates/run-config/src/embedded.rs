//! The model and data set in the program, for a first run without downloads.
//!
//! `assets/` is compiled in; its README describes how it was made. Other parts of the program, and PEFT,
//! need files, so [`materialise`] writes them into the user's cache.

use std::path::{Path, PathBuf};

use durable::{WriteError, cache_folder, write_atomically};

/// A file of `assets/`: its path there, and its bytes.
macro_rules! assets {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../../../assets/", $name)).as_slice())),*]
    };
}

const FILES: [(&str, &[u8]); 8] = assets![
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/special_tokens_map.json",
    "data/sentiment_train.jsonl",
    "data/sentiment_validation.jsonl",
];

/// The paths of the embedded files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedPaths {
    /// A Hugging Face model folder.
    pub model_dir: PathBuf,
    /// The training data.
    pub train: PathBuf,
    /// The validation data; none of its sentences is in `train`.
    pub validation: PathBuf,
}

/// The embedded files cannot be written anywhere.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot unpack the embedded model: {last}. Set XDG_CACHE_HOME to a folder that can be written to"
)]
pub struct EmbeddedError {
    /// The error of the last folder that was tried.
    #[source]
    last: WriteError,
}

/// Writes the embedded files into the user's cache folder, or into the folder for temporary files if
/// the cache cannot be written. Returns their paths.
///
/// The folder's name holds a hash of the files, so versions of the program do not disturb each other.
/// An existing file is compared with the program's; a damaged one is written again.
///
/// # Errors
///
/// If neither folder can be written.
pub fn materialise() -> Result<EmbeddedPaths, EmbeddedError> {
    let temporary = std::env::temp_dir();
    if let Some(cache) = cache_folder() {
        match materialise_in(&cache) {
            Ok(paths) => return Ok(paths),
            Err(error) => log::warn!("{error}; using {} instead", temporary.display()),
        }
    }
    materialise_in(&temporary).map_err(|last| EmbeddedError { last })
}

fn materialise_in(parent: &Path) -> Result<EmbeddedPaths, WriteError> {
    let folder = parent.join("llama-lora-trainer").join(version());
    for (name, bytes) in FILES {
        let path = folder.join(name);
        // Comparing two megabytes is cheap, and the file may be damaged.
        if std::fs::read(&path).is_ok_and(|there| there == bytes) {
            continue;
        }
        write_atomically(&path, bytes)?;
    }
    Ok(EmbeddedPaths {
        model_dir: folder.join("model"),
        train: folder.join("data/sentiment_train.jsonl"),
        validation: folder.join("data/sentiment_validation.jsonl"),
    })
}

/// `embedded-` and a hash of every file (FNV-1a, 64 bits; it distinguishes versions and is not cryptographic).
fn version() -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in FILES.iter().flat_map(|(_, bytes)| *bytes) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    format!("embedded-{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_burn::{LlamaConfig, LoadOptions, load};

    #[test]
    fn a_damaged_copy_is_written_again() {
        let parent = tempfile::tempdir().unwrap();
        let paths = materialise_in(parent.path()).unwrap();
        let weights = paths.model_dir.join("model.safetensors");
        let whole = std::fs::read(&weights).unwrap();
        std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
        std::fs::remove_file(&paths.train).unwrap();
        assert_eq!(materialise_in(parent.path()).unwrap(), paths);
        assert!(std::fs::read(&weights).unwrap() == whole);
        assert!(paths.train.is_file() && paths.validation.is_file());
    }

    #[test]
    fn the_embedded_model_loads() {
        let parent = tempfile::tempdir().unwrap();
        let folder = materialise_in(parent.path()).unwrap().model_dir;
        let config = LlamaConfig::from_file(&folder).unwrap();
        let device = burn::tensor::Device::flex();
        load(&folder, &config, LoadOptions::default(), &device, |_| {}).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_that_names_it() {
        let parent = tempfile::NamedTempFile::new().unwrap();
        let error = materialise_in(parent.path()).unwrap_err().to_string();
        assert!(error.contains(parent.path().to_str().unwrap()), "{error}");
    }
}
