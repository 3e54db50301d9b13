//! Keeps two runs out of one output folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

/// Name of the file that is locked. It stays when the run is over: a file that is removed could be locked by
/// two processes, each by another one of that name.
const FILE: &str = ".lock";

/// A folder that is locked, as long as this lives. The system gives the lock back when the process ends,
/// however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why a folder cannot be locked.
#[derive(Debug)]
pub enum LockError {
    /// By whom it is.
    Held(String),
    /// What the system says.
    Io(io::Error),
}

impl Lock {
    /// Locks a folder, without waiting.
    ///
    /// A file system that knows no locks (some network ones) gets a warning and no lock.
    ///
    /// # Errors
    ///
    /// [`LockError::Held`] by another process, and by another lock of this one.
    pub fn acquire(folder: &Path) -> Result<Self, LockError> {
        let path = folder.join(FILE);
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).read(true).write(true);
        let mut file = options.open(&path).map_err(LockError::Io)?;
        match file.try_lock() {
            Ok(()) => {
                // For people and for the message of the other run; nothing depends on it.
                let note = format!("process {}\n", std::process::id());
                let noted = file
                    .set_len(0)
                    .and_then(|()| file.rewind())
                    .and_then(|()| file.write_all(note.as_bytes()));
                if let Err(error) = noted {
                    log::debug!("{}: {error}", path.display());
                }
                Ok(Self { _file: file })
            }
            Err(TryLockError::WouldBlock) => {
                let mut note = String::new();
                // Windows does not let others read a locked file.
                let _ = (&mut file).take(100).read_to_string(&mut note);
                let holder = match note.trim() {
                    "" => "another process".into(),
                    note => note.to_string(),
                };
                Err(LockError::Held(holder))
            }
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                log::warn!(
                    "{}: this file system has no locks; see to it that no other run writes here",
                    folder.display()
                );
                Ok(Self { _file: file })
            }
            Err(TryLockError::Error(error)) => Err(LockError::Io(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_lock_at_a_time_and_names_its_holder() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::acquire(folder.path()).unwrap();
        match Lock::acquire(folder.path()) {
            Err(LockError::Held(holder)) if cfg!(unix) => {
                assert_eq!(holder, format!("process {}", std::process::id()));
            }
            other => assert!(matches!(other, Err(LockError::Held(_))), "{other:?}"),
        }
        drop(first);
        Lock::acquire(folder.path()).unwrap();
    }
}
