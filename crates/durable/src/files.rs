//! Files that are complete after a power cut. A file is synced before it gets its final name, and its
//! folder is synced afterwards. Everything that a run writes goes through here, except its metrics.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, IntoInnerError, Write};
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, View};

use crate::faults::{self, Operation};

/// Writes a new file and waits until it is on the disk.
///
/// # Errors
///
/// The system's error. A part of the file may exist then.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    faults::before(Operation::Write);
    let mut file = File::create(path)?;
    if let Err(full) = faults::space() {
        // As on a real disk, a part of the file still fits.
        file.write_all(&bytes[..bytes.len() / 2])?;
        return Err(full);
    }
    file.write_all(bytes)?;
    faults::after(Operation::Write, path);
    sync(&file, path)
}

/// As [`write()`], for a safetensors file. Tensors are written one at a time, without a second copy of
/// all of them in memory. The bytes are those of [`safetensors::serialize`].
///
/// # Errors
///
/// As [`write()`], and tensors that the format cannot hold.
pub fn write_tensors<V: View>(
    path: &Path,
    mut tensors: Vec<(String, V)>,
    metadata: HashMap<String, String>,
) -> io::Result<()> {
    faults::before(Operation::Write);
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    let infos = tensors.iter().map(|(name, tensor)| {
        let shape = tensor.shape().to_vec();
        (name.clone(), tensor.dtype(), shape, tensor.data_len())
    });
    let header = tensors_header(infos, metadata)?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&header)?;
    if let Err(full) = faults::space() {
        // As on a real disk, a part of the file still fits.
        file.flush()?;
        return Err(full);
    }
    for (_, tensor) in &tensors {
        file.write_all(&tensor.data())?;
    }
    let file = file.into_inner().map_err(IntoInnerError::into_error)?;
    faults::after(Operation::Write, path);
    sync(&file, path)
}

/// The start of a safetensors file, up to the data, for tensors that lie one behind the other. Each has a
/// name, a type, a shape and a size in bytes.
///
/// # Errors
///
/// Tensors that the format cannot hold.
pub fn tensors_header(
    tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>, usize)>,
    metadata: HashMap<String, String>,
) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let infos = tensors.into_iter().map(|(name, dtype, shape, bytes)| {
        let start = end;
        end += bytes;
        let data_offsets = (start, end);
        let info = TensorInfo {
            dtype,
            shape,
            data_offsets,
        };
        (name, info)
    });
    let metadata = Metadata::new(Some(metadata), infos.collect()).map_err(io::Error::other)?;
    let mut text = serde_json::to_vec(&metadata)?;
    // The data starts at a multiple of 8 bytes.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    Ok(header)
}

fn sync(file: &File, path: &Path) -> io::Result<()> {
    faults::before(Operation::Sync);
    file.sync_all()?;
    faults::after(Operation::Sync, path);
    Ok(())
}

/// Renames a file or folder atomically. An existing file at `to` is replaced.
///
/// # Errors
///
/// The system's error.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    faults::before(Operation::Rename);
    fs::rename(from, to)?;
    faults::after(Operation::Rename, to);
    Ok(())
}

/// Waits until a folder's entries, such as the new name of a file, are on the disk.
///
/// # Errors
///
/// The system's error. A file system that cannot sync folders is not an error.
#[cfg(unix)]
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    faults::before(Operation::SyncFolder);
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    match File::open(folder)?.sync_all() {
        // Some network and container file systems cannot. The rename has still happened.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
        result => result?,
    }
    faults::after(Operation::SyncFolder, folder);
    Ok(())
}

/// Does nothing: Windows writes a folder's entries together with its files.
///
/// # Errors
///
/// None.
#[cfg(not(unix))]
pub fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

/// Removes a folder with everything in it. A missing folder is not an error.
///
/// # Errors
///
/// The system's error.
pub fn remove_folder(folder: &Path) -> io::Result<()> {
    faults::before(Operation::Remove);
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    faults::after(Operation::Remove, folder);
    Ok(())
}

/// Whether the error means that the disk, or the user's quota, is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    #[test]
    fn a_file_of_tensors_has_the_formats_bytes_and_is_a_plain_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tensors");
        let bytes = |values: &[f32]| -> Vec<u8> {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        };
        let (b, a) = (bytes(&[1.5, -2.0, 3.0]), bytes(&[4.0, 5.0]));
        let view = |shape, data| TensorView::new(Dtype::F32, shape, data).unwrap();
        let tensors = || {
            vec![
                ("b".to_string(), view(vec![3, 1], &b)),
                ("a".to_string(), view(vec![2], &a)),
            ]
        };
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        write_tensors(&path, tensors(), metadata.clone()).unwrap();
        let expected = safetensors::serialize(tensors(), Some(metadata)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), expected);
        // No other file is left, and its permissions are those of other files.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let plain = folder.path().join("plain");
        write(&plain, b"").unwrap();
        let permissions = |path: &Path| fs::metadata(path).unwrap().permissions();
        assert_eq!(permissions(&path), permissions(&plain));
    }
}
