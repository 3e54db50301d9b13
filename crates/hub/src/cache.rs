//! Hugging Face's cache, in the layout of `huggingface_hub`, so that each program finds what the others downloaded.
//!
//! ```text
//! models--ORG--NAME/
//!   blobs/HASH                 a file's bytes; HASH.incomplete during the download
//!   snapshots/COMMIT/FILE      a link to its blob
//!   refs/REVISION              the commit that a branch or tag was last seen at
//! .locks/models--ORG--NAME/HASH.lock
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo};

use super::client::repo;
use super::digest::{Digest, Hasher};
use super::listing::{INDEX, LARGEST_TEXT, Listing, Need};
use super::name::is_commit;
use super::progress::Progress;
use super::{HubError, HubName, Settings};

/// Files up to this size are hashed whenever they are used, larger ones when they are downloaded.
const SMALL: u64 = 16 << 20;

/// One repository's part of the cache.
pub(super) struct RepositoryCache<'a> {
    name: &'a HubName,
    repository: CacheRepo,
    folder: PathBuf,
    locks: PathBuf,
}

impl<'a> RepositoryCache<'a> {
    pub fn new(settings: &Settings, name: &'a HubName) -> Self {
        let folder_name = repo(name).folder_name();
        Self {
            name,
            repository: Cache::new(settings.cache.clone()).repo(repo(name)),
            folder: settings.cache.join(&folder_name),
            locks: settings.cache.join(".locks").join(folder_name),
        }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn blob(&self, hash: &str) -> PathBuf {
        self.repository.blob_path(hash)
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.repository.pointer_path(commit)
    }

    /// The commit that the revision was last seen at.
    fn commit(&self) -> Option<String> {
        let revision = self.name.revision_or_main();
        if is_commit(revision) {
            return Some(revision.into());
        }
        let text = read_text(&self.folder.join("refs").join(revision), 64).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// The folder that holds everything that is needed, from the cache alone. The error names what is missing.
    pub fn whole(&self, need: Need) -> Result<PathBuf, String> {
        let Some(commit) = self.commit() else {
            return Err(format!("nothing of it is in {}", self.folder.display()));
        };
        let folder = self.snapshot(&commit);
        let entries =
            fs::read_dir(&folder).map_err(|_| format!("there is no {}", folder.display()))?;
        let names = entries.filter_map(|entry| {
            let path = entry.ok()?.path();
            // A link without its blob is not a file.
            path.is_file()
                .then(|| path.file_name()?.to_str().map(String::from))?
        });
        let listing = Listing::of_names(&commit, names.collect());
        let lacks = |error: HubError| match error {
            HubError::MissingFile { file, .. } => format!("{} has no {file}", folder.display()),
            other => other.to_string(),
        };
        let files = listing.select(self.name, need).map_err(lacks)?;
        if files.last().is_some_and(|file| file.name == INDEX) {
            let index =
                read_text(&folder.join(INDEX), LARGEST_TEXT).map_err(|error| error.to_string())?;
            listing.shards(self.name, index.as_bytes()).map_err(lacks)?;
        }
        Ok(folder)
    }

    /// Remembers the commit of a branch or tag. A failure is only logged: the cache may be read-only.
    pub fn remember(&self, commit: &str) {
        let revision = self.name.revision_or_main();
        if is_commit(revision) || self.commit().as_deref() == Some(commit) {
            return;
        }
        let path = self.folder.join("refs").join(revision);
        if let Err(error) = durable::write_atomically(&path, commit.as_bytes()) {
            log::warn!("{error}");
        }
    }

    /// Waits until no other process downloads this blob. Python's `huggingface_hub` takes the same lock.
    pub fn lock(
        &self,
        hash: &str,
        file: &str,
        progress: &Progress,
    ) -> Result<Option<File>, HubError> {
        let path = self.locks.join(format!("{hash}.lock"));
        let failed = |source| HubError::Cache {
            action: "lock",
            path: path.clone(),
            source,
        };
        fs::create_dir_all(&self.locks).map_err(failed)?;
        let lock = File::create(&path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(lock)),
            Err(TryLockError::WouldBlock) => {
                progress.line(&format!(
                    "waiting for another program that is downloading {file}"
                ));
                lock.lock().map_err(failed)?;
                Ok(Some(lock))
            }
            // Some network file systems have no locks. The blob is complete all the same: it is renamed at the end.
            Err(TryLockError::Error(error)) => {
                log::warn!("{}: {error}; continuing without a lock", path.display());
                Ok(None)
            }
        }
    }

    /// Makes `snapshots/COMMIT/FILE` a link to the blob.
    pub fn link(&self, blob: &Path, commit: &str, file: &str) -> Result<(), HubError> {
        let folder = self.snapshot(commit);
        let pointer = folder.join(file);
        let failed = |source| HubError::Cache {
            action: "make",
            path: pointer.clone(),
            source,
        };
        if same_file(&pointer, blob) {
            return Ok(());
        }
        fs::create_dir_all(&folder).map_err(failed)?;
        let temporary = folder.join(format!(".{file}.{}.tmp", std::process::id()));
        let _ = fs::remove_file(&temporary);
        let hash = blob.file_name().unwrap_or_default();
        make_link(&Path::new("../../blobs").join(hash), blob, &temporary).map_err(failed)?;
        fs::rename(&temporary, &pointer).map_err(failed)
    }
}

/// Whether `path` is a file of this size and, if it is small, with this hash.
pub(super) fn is_whole(path: &Path, size: u64, digest: Option<&Digest>) -> bool {
    if !fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == size) {
        return false;
    }
    match digest.filter(|_| size <= SMALL) {
        None => true,
        Some(digest) => fs::read(path).is_ok_and(|bytes| {
            let mut hasher = Hasher::new(digest, size);
            hasher.update(&bytes);
            hasher.finish() == *digest
        }),
    }
}

/// A text file of at most `limit` bytes.
pub(super) fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(limit + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > limit {
        Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("{} is larger than {limit} bytes", path.display()),
        ))
    } else {
        Ok(text)
    }
}

fn same_file(pointer: &Path, blob: &Path) -> bool {
    match (fs::canonicalize(pointer), fs::canonicalize(blob)) {
        (Ok(pointer), Ok(blob)) => pointer == blob,
        _ => false,
    }
}

#[cfg(unix)]
fn make_link(relative: &Path, _blob: &Path, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(relative, at)
}

/// On Windows, symbolic links need a permission that users do not have; hard links do not.
#[cfg(not(unix))]
fn make_link(_relative: &Path, blob: &Path, at: &Path) -> io::Result<()> {
    fs::hard_link(blob, at).or_else(|_| fs::copy(blob, at).map(drop))
}
