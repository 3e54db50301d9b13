//! Errors of checkpoints, and of resuming from one.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be written, read, or resumed from.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A checkpoint that is incomplete or damaged.
    #[error("{} is damaged: {reason}", folder.display())]
    Damaged {
        /// The checkpoint.
        folder: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No checkpoint of the run is intact.
    #[error(
        "every checkpoint in {} is damaged; start the run again with --overwrite:{}",
        folder.display(),
        list(damaged)
    )]
    NoneWhole {
        /// The run's folder.
        folder: PathBuf,
        /// What is wrong with each.
        damaged: Vec<String>,
    },
    /// There is no checkpoint to resume from.
    #[error(
        "{} holds no checkpoint to resume from; give the output folder of a run, or one of its checkpoints, \
         or leave --resume out to start from the beginning",
        folder.display()
    )]
    Nothing {
        /// Where one was looked for.
        folder: PathBuf,
    },
    /// The file of tensors is not valid.
    #[error("not a valid file of training tensors: {reason}")]
    Tensors {
        /// What is wrong.
        reason: String,
    },
    /// A parameter of the model does not match the checkpoint.
    #[error(
        "the checkpoint does not fit this configuration: the parameter {name} {problem}; the adapted modules \
         and their rank (target_modules, lora_r, …) cannot change within a run, not even with --force-resume"
    )]
    Parameter {
        /// Its path in the model.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The run differs from the one that the checkpoint is from.
    #[error(
        "the run in {} was started with other settings or files:{}\nrestore them, or resume nevertheless with \
         --force-resume; the result then matches neither run",
        folder.display(),
        list(changes)
    )]
    Changed {
        /// The checkpoint.
        folder: PathBuf,
        /// Everything that differs.
        changes: Vec<String>,
    },
    /// The adapter cannot be written.
    #[error(transparent)]
    Adapter(#[from] peft::AdapterError),
}

impl CheckpointError {
    /// The error of a checkpoint that the user named, with what else to resume from.
    pub(super) fn named(self, run: &Path) -> Self {
        match self {
            Self::Damaged { folder, reason } => Self::Damaged {
                folder,
                reason: format!(
                    "{reason}; resume from an older checkpoint in the same folder: --resume {} uses the newest intact one",
                    run.display()
                ),
            },
            other => other,
        }
    }

    /// Whether the cause is a full disk.
    pub fn is_full(&self) -> bool {
        let source = match self {
            Self::Io { source, .. } => source,
            Self::Adapter(peft::AdapterError::Io { source, .. }) => source,
            _ => return false,
        };
        durable::is_full(source)
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    items.iter().map(|item| format!("\n  {item}")).collect()
}

/// Makes an I/O error of an action on a path.
pub(super) fn io(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.into();
    move |source| CheckpointError::Io {
        action,
        path,
        source,
    }
}
