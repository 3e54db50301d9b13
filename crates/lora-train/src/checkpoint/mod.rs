//! Checkpoints: everything that is needed to resume a run with the same result.
//!
//! ```text
//! OUTPUT/checkpoints/step-000123/
//!   manifest.json                lengths and SHA-256 of the files below
//!   state.json                   step, best validation, micro-batches, hashes of model, tokenizer and data
//!   config.toml                  the resolved configuration
//!   training.safetensors         trainable parameters and AdamW's moments, in f32
//!   adapter/                     the adapter of this step, which PEFT can load
//!   kept/                        the adapter kept so far, if it is of another step
//! ```
//!
//! | file | contents |
//! | --- | --- |
//! | `state.rs`, `tensors.rs` | the saved state |
//! | `fingerprint.rs`, `hash.rs`, `manifest.rs` | hashes of what a run reads, and of a checkpoint's files |
//! | `store.rs` | the folder of checkpoints: writing atomically, finding, pruning |
//! | `keeper.rs` | when a run writes one, and what happens if it cannot |
//! | `resume.rs` | the newest intact one, and whether the run is still the same |

mod error;
mod fingerprint;
mod hash;
mod keeper;
mod manifest;
mod resume;
mod state;
mod store;
mod tensors;

use std::fs;
use std::path::{Path, PathBuf};

pub use error::CheckpointError;
pub use fingerprint::{Fingerprint, Mark};
pub use keeper::Keeper;
pub use manifest::{MANIFEST, Manifest};
pub use resume::{Resume, Resumed, config_of, run_folder};
pub use state::{Division, FORMAT, Progress, State};
pub use store::Store;
pub use tensors::TrainingTensors;

use error::io;
use peft::{AdapterConfig, AdapterTensors};
use run_config::Config;

const STATE: &str = "state.json";
const CONFIG: &str = "config.toml";
const TENSORS: &str = "training.safetensors";
const ADAPTER: &str = "adapter";
const KEPT: &str = "kept";
/// A larger file is not a state file.
const LARGEST_STATE: u64 = 16 << 20;

/// The contents of a checkpoint, on the host.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The progress of the run.
    pub state: State,
    /// The trainable parameters with the optimizer's state.
    pub tensors: TrainingTensors,
    /// The adapter of this step.
    pub adapter: (AdapterConfig, AdapterTensors),
}

/// A file of an adapter: its name in the adapter's folder, and its bytes.
pub type AdapterFile = (String, Vec<u8>);

/// An intact checkpoint on the disk.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    manifest: Manifest,
    /// The state of the run.
    pub state: State,
    /// The configuration of the run.
    pub config: Config,
}

impl Checkpoint {
    /// Reads a checkpoint and checks every file against its hash.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Damaged`] with the first thing that is wrong.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let manifest = Manifest::check(folder)?;
        let damaged = |reason: String| CheckpointError::Damaged {
            folder: folder.into(),
            reason,
        };
        if let Some(name) = [STATE, CONFIG, TENSORS]
            .iter()
            .find(|name| !manifest.has(name))
        {
            return Err(damaged(format!("{MANIFEST} does not name {name}")));
        }
        for name in [STATE, CONFIG] {
            let length = fs::metadata(folder.join(name)).map_or(0, |file| file.len());
            if length > LARGEST_STATE {
                return Err(damaged(format!("{name} has {length} bytes")));
            }
        }
        let text = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(io("read", &path))
        };
        let state: State = serde_json::from_str(&text(STATE)?)
            .map_err(|error| damaged(format!("{STATE}: {error}")))?;
        let config = Config::parse(&text(CONFIG)?, Some(&folder.join(CONFIG)), None, &[])
            .map_err(|error| damaged(format!("{CONFIG}: {error}")))?;
        Ok(Self {
            folder: folder.into(),
            manifest,
            state,
            config,
        })
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The trainable parameters with the optimizer's state.
    ///
    /// # Errors
    ///
    /// A file that is not valid.
    pub fn tensors(&self) -> Result<TrainingTensors, CheckpointError> {
        let path = self.folder.join(TENSORS);
        let bytes = fs::read(&path).map_err(io("read", &path))?;
        TrainingTensors::from_bytes(&bytes)
    }

    /// The files of the adapter kept so far; empty before the first validation.
    ///
    /// # Errors
    ///
    /// A file that cannot be read.
    pub fn kept(&self) -> Result<Vec<AdapterFile>, CheckpointError> {
        let folder = match self.state.progress.kept {
            None => return Ok(Vec::new()),
            Some(step) if step == self.state.progress.step => ADAPTER,
            Some(_) => KEPT,
        };
        let files = self.manifest.in_folder(folder).map(|name| {
            let path = self.folder.join(folder).join(name);
            let bytes = fs::read(&path).map_err(io("read", &path))?;
            Ok((name.to_string(), bytes))
        });
        files.collect()
    }
}
