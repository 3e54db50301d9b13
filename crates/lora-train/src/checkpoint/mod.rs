//! Checkpoints: everything that a run needs to go on as if nothing had happened.
//!
//! ```text
//! OUTPUT/checkpoints/step-000123/
//!   manifest.json                lengths and SHA-256 of the files below
//!   state.json                   step, best validation, division of rows, hashes of model, tokenizer and data
//!   config.toml                  the resolved configuration
//!   training.safetensors         what is trained, with AdamW's moments, in f32
//!   adapter/                     the adapter of this step, which PEFT loads as it is
//!   kept/                        the adapter kept so far, where that is another one
//! ```
//!
//! | file | what is there |
//! | --- | --- |
//! | `state.rs`, `tensors.rs` | what is kept |
//! | `fingerprint.rs`, `hash.rs`, `manifest.rs` | hashes of what a run reads, and of a checkpoint's files |
//! | `store.rs` | the folder of checkpoints: written whole, found, pruned |
//! | `keeper.rs` | when a run writes one, and what it does when it cannot |
//! | `resume.rs` | the newest whole one, and whether the run is still the same |

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
/// No state of ours comes near this.
const LARGEST_STATE: u64 = 16 << 20;

/// What a checkpoint is made of, on the host.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where the run is.
    pub state: State,
    /// What is trained, with the optimizer's state.
    pub tensors: TrainingTensors,
    /// The adapter of this step.
    pub adapter: (AdapterConfig, AdapterTensors),
}

/// A file of an adapter: its name in the adapter's folder, and its bytes.
pub type AdapterFile = (String, Vec<u8>);

/// A checkpoint on the disk that is whole.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    manifest: Manifest,
    /// Where the run was.
    pub state: State,
    /// The configuration that the run had.
    pub config: Config,
}

impl Checkpoint {
    /// Reads a checkpoint, every file held against its hash.
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

    /// What is trained, with the optimizer's state.
    ///
    /// # Errors
    ///
    /// A file that is not what it should be.
    pub fn tensors(&self) -> Result<TrainingTensors, CheckpointError> {
        let path = self.folder.join(TENSORS);
        let bytes = fs::read(&path).map_err(io("read", &path))?;
        TrainingTensors::from_bytes(&bytes)
    }

    /// The files of the adapter kept so far; none before the first validation.
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
