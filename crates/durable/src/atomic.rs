//! Replaces a file as a whole or not at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::files;

/// A file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", path.display())]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// The system's reason, for example a full disk or missing permissions.
    pub source: io::Error,
}

/// Replaces a file atomically: after a crash or a full disk it has the old content or the new one,
/// never a part. The bytes go to a temporary file in the same folder, which is synced and renamed.
///
/// A missing folder is created.
///
/// # Errors
///
/// [`WriteError`] with the file's path; the temporary file is removed.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    write_atomically_by(path, |temporary| files::write(temporary, bytes))
}

/// As [`write_atomically`], but `write` writes and syncs the temporary file, whose path it gets.
///
/// # Errors
///
/// As [`write_atomically`].
pub fn write_atomically_by(
    path: &Path,
    write: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), WriteError> {
    let failed = |source| WriteError {
        path: path.into(),
        source,
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let Some(name) = path.file_name() else {
        return Err(failed(io::Error::from(io::ErrorKind::InvalidInput)));
    };
    fs::create_dir_all(folder).map_err(failed)?;
    // The process id keeps two processes apart. Within one process, a file has one writer.
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = folder.join(temporary);
    let write = || {
        write(&temporary)?;
        files::rename(&temporary, path)?;
        files::sync_folder(folder)
    };
    write().map_err(|error| {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
        failed(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_atomic_write_replaces_the_file_and_leaves_nothing_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/file.toml");
        for content in [&b"first"[..], b"second, longer", b""] {
            write_atomically(&path, content).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_names_the_file_and_keeps_what_was_there() {
        let root = tempfile::tempdir().unwrap();
        // A folder that is not empty cannot be replaced by a file.
        let path = root.path().join("taken");
        fs::create_dir_all(path.join("inside")).unwrap();
        let error = write_atomically(&path, b"x").unwrap_err();
        assert!(error.to_string().contains("taken"), "{error}");
        assert!(path.join("inside").exists());
        assert_eq!(
            fs::read_dir(root.path()).unwrap().count(),
            1,
            "no temporary file"
        );
        assert!(write_atomically(Path::new("/"), b"x").is_err());
    }
}
