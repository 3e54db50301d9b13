//! Files that are there, whole, after a power cut: what is written is synced before it gets its name, and
//! its folder after. Everything that a run writes but its metrics goes through here.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use safetensors::{SafeTensorError, View};

use crate::fault::{self, Operation};

/// Writes a new file and waits until the disk has it.
///
/// # Errors
///
/// What the system says. A part of the file may be there then.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fault::before(Operation::Write);
    let mut file = File::create(path)?;
    if let Err(full) = fault::space() {
        // As a disk does: part of it still fits.
        file.write_all(&bytes[..bytes.len() / 2])?;
        return Err(full);
    }
    file.write_all(bytes)?;
    fault::after(Operation::Write, path);
    sync(&file, path)
}

/// As [`write()`], a file of tensors, one after the other: none of it is held in memory a second time.
///
/// # Errors
///
/// As [`write()`]; what the format cannot hold.
pub fn write_tensors<V: View>(
    path: &Path,
    tensors: Vec<(String, V)>,
    metadata: HashMap<String, String>,
) -> io::Result<()> {
    fault::before(Operation::Write);
    if let Err(full) = fault::space() {
        // As a disk does: part of it still fits.
        File::create(path)?;
        return Err(full);
    }
    let written = safetensors::serialize_to_file(tensors, Some(metadata), path);
    written.map_err(|error| match error {
        SafeTensorError::IoError(error) => error,
        other => io::Error::other(other),
    })?;
    fault::after(Operation::Write, path);
    sync(&File::options().write(true).open(path)?, path)
}

fn sync(file: &File, path: &Path) -> io::Result<()> {
    fault::before(Operation::Sync);
    file.sync_all()?;
    fault::after(Operation::Sync, path);
    Ok(())
}

/// Gives a file or folder another name, in one step; a file of that name goes.
///
/// # Errors
///
/// What the system says.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fault::before(Operation::Rename);
    fs::rename(from, to)?;
    fault::after(Operation::Rename, to);
    Ok(())
}

/// Waits until the disk has a folder's entries: a file's name, or its new name, is on the disk then.
///
/// # Errors
///
/// What the system says; a file system that cannot do it is none.
#[cfg(unix)]
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    fault::before(Operation::SyncFolder);
    let folder = match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    };
    match File::open(folder)?.sync_all() {
        // Some network and container file systems cannot; the rename is done all the same.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
        result => result?,
    }
    fault::after(Operation::SyncFolder, folder);
    Ok(())
}

/// Windows writes a folder's entries with the files.
///
/// # Errors
///
/// None.
#[cfg(not(unix))]
pub fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

/// Removes a folder with everything in it; one that is not there is none.
///
/// # Errors
///
/// What the system says.
pub fn remove_folder(folder: &Path) -> io::Result<()> {
    fault::before(Operation::Remove);
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fault::after(Operation::Remove, folder);
    Ok(())
}

/// Whether there was no room: the disk is full, or the user's share of it.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
