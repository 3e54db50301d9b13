//! What can be wrong with a checkpoint, or with resuming from one.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why a checkpoint cannot be written, read, or gone on from.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A checkpoint that is not whole.
    #[error("{} is damaged: {reason}", folder.display())]
    Damaged {
        /// The checkpoint.
        folder: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No checkpoint of a run is whole.
    #[error(
        "no checkpoint in {} is whole; --overwrite starts the run again:{}",
        folder.display(),
        list(damaged)
    )]
    NoneWhole {
        /// The run's folder.
        folder: PathBuf,
        /// What is wrong with each.
        damaged: Vec<String>,
    },
    /// There is nothing to go on from.
    #[error(
        "{} holds no checkpoint to resume from; give the output folder of a run, or one of its checkpoints, \
         or leave --resume out to start from the beginning",
        folder.display()
    )]
    Nothing {
        /// Where one was looked for.
        folder: PathBuf,
    },
    /// The tensors cannot be made sense of.
    #[error("not a valid file of training tensors: {reason}")]
    Tensors {
        /// What is wrong.
        reason: String,
    },
    /// A parameter of the model and one of the checkpoint do not go together.
    #[error(
        "the checkpoint does not fit this configuration: the parameter {name} {problem}; what is adapted \
         (lora_r, target_modules, …) cannot change within a run, not even with --force-resume"
    )]
    Parameter {
        /// Its path in the model.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The run would not be the one that the checkpoint is from.
    #[error(
        "the run in {} was started with something else:{}\nput it back as it was, or go on all the same with \
         --force-resume; the result is then that of neither",
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
    /// Whether it is for want of room on the disk.
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
