//! Prevents two runs from using the same output folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

/// Name of the file that is locked. It is not removed after the run: two processes could otherwise lock
/// two different files of this name.
const FILE: &str = ".lock";

/// A locked folder. Dropping it releases the lock. The system releases it when the process ends, also
/// after a crash.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why a folder could not be locked.
#[derive(Debug)]
pub enum LockError {
    /// It is locked already, by this process.
    Held(String),
    /// The system's error.
    Io(io::Error),
}

impl Lock {
    /// Locks a folder, without waiting.
    ///
    /// On a file system without locks (some network ones) it logs a warning and does not lock.
    ///
    /// # Errors
    ///
    /// [`LockError::Held`] if another process, or another lock of this process, holds the folder.
    pub fn acquire(folder: &Path) -> Result<Self, LockError> {
        let path = folder.join(FILE);
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).read(true).write(true);
        let mut file = options.open(&path).map_err(LockError::Io)?;
        match file.try_lock() {
            Ok(()) => {
                // For people, and for the message of the other run. Nothing else depends on it.
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
                // On Windows, other processes cannot read a locked file.
                let _ = (&mut file).take(100).read_to_string(&mut note);
                let holder = match note.trim() {
                    "" => "another process".into(),
                    note => note.to_string(),
                };
                Err(LockError::Held(holder))
            }
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                log::warn!(
                    "{}: this file system has no locks; make sure that no other run writes here",
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
