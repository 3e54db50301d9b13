//! Models and adapters by their names on the Hugging Face Hub.
//!
//! A folder on this machine always wins. A name (`ORG/NAME`, `ORG/NAME@REVISION`) is looked up in Hugging Face's
//! cache and on the Hub. What is missing is downloaded, resumed after an interruption, and compared with the
//! sizes and hashes that the Hub states before it is used. Only JSON, safetensors and the chat template are ever
//! fetched: nothing that runs code.
//!
//! ```text
//! name.rs      ORG/NAME@REVISION
//! settings.rs  HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, …
//! listing.rs   the files of a repository, and which of them are needed
//! client.rs    requests, redirects, refusals
//! transfer.rs  one file: ranges, attempts, hashes
//! cache.rs     the cache's layout and locks
//! ```

mod cache;
mod client;
mod digest;
mod error;
mod listing;
mod name;
mod progress;
mod settings;
mod transfer;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cache::{RepositoryCache, is_whole, read_text};
use client::Client;
use listing::{INDEX, LARGEST_TEXT, Listing, RemoteFile, is_plain_name};
use transfer::{Expected, Transfer};

pub use error::HubError;
pub use listing::Need;
pub use name::HubName;
pub use progress::Progress;
pub use settings::Settings;

use terminal::human;

/// A small model that messages can name.
pub const EXAMPLE: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
/// Room that a download leaves free.
const SPARE: u64 = 64 << 20;
/// Attempts to reach the Hub before the first download.
const ATTEMPTS_TO_LIST: usize = 2;

/// The folder of a model: `text` itself if it is a path, else the cache's folder of the repository that it
/// names, with what is needed downloaded. Environment variables set the address of the Hub and the cache.
///
/// # Errors
///
/// [`HubError`]: neither folder nor name, no connection, gated, damaged, …; each names a remedy.
pub fn model_folder(text: &str, need: Need) -> Result<PathBuf, HubError> {
    folder(text, need, EXAMPLE)
}

/// [`model_folder`] for an adapter in PEFT's layout.
///
/// # Errors
///
/// As [`model_folder`].
pub fn adapter_folder(path: &Path) -> Result<PathBuf, HubError> {
    match path.to_str() {
        Some(text) => folder(text, Need::Adapter, "ORG/ADAPTER"),
        // A path that is not text cannot be a name.
        None => Ok(path.into()),
    }
}

fn folder(text: &str, need: Need, example: &'static str) -> Result<PathBuf, HubError> {
    let path = Path::new(text);
    if path.exists() {
        return Ok(path.into());
    }
    match HubName::parse(text) {
        Some(name) => Hub::new(Settings::from_env()?, Progress::new()).fetch(&name, need),
        None => Err(HubError::Neither {
            text: text.into(),
            looked_at: std::path::absolute(path).unwrap_or_else(|_| path.into()),
            example,
        }),
    }
}

/// The Hub and the local cache of it.
pub struct Hub {
    settings: Settings,
    progress: Progress,
}

impl Hub {
    /// With these settings.
    pub fn new(settings: Settings, progress: Progress) -> Self {
        Self { settings, progress }
    }

    /// The folder in the cache that holds what is needed of a repository. What is missing is downloaded.
    ///
    /// A full commit hash that is complete in the cache needs no connection. Anything else is looked up on the Hub;
    /// if the Hub does not respond, a complete copy in the cache is used, with a warning.
    ///
    /// # Errors
    ///
    /// [`HubError`].
    pub fn fetch(&self, name: &HubName, need: Need) -> Result<PathBuf, HubError> {
        let cache = RepositoryCache::new(&self.settings, name);
        let cached = cache.whole(need);
        if self.settings.offline {
            return cached.map_err(|missing| HubError::Offline {
                name: name.clone(),
                missing,
            });
        }
        if let (Ok(folder), true) = (&cached, name::is_commit(name.revision_or_main())) {
            return Ok(folder.clone());
        }
        let client = Client::new(&self.settings, name)?;
        let listing = match self.list(name, &client, cached.is_ok()) {
            Ok(listing) => listing,
            Err(error @ (HubError::NoConnection { .. } | HubError::Protocol { .. })) => {
                match cached {
                    Ok(folder) => {
                        log::warn!("{error}. Using the copy of {name} in {}", folder.display());
                        return Ok(folder);
                    }
                    Err(_) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        };
        let download = Download {
            hub: self,
            name,
            cache: &cache,
            listing: &listing,
            transfer: self.transfer(name, &client, &self.settings),
        };
        download.everything(need)?;
        cache.remember(&listing.commit);
        Ok(cache.snapshot(&listing.commit))
    }

    fn transfer<'a>(
        &'a self,
        name: &'a HubName,
        client: &'a Client<'a>,
        settings: &'a Settings,
    ) -> Transfer<'a> {
        Transfer {
            client,
            settings,
            name,
            progress: &self.progress,
        }
    }

    fn list(&self, name: &HubName, client: &Client, is_cached: bool) -> Result<Listing, HubError> {
        let (retries, pause) = self.settings.retries;
        let patient = Settings {
            retries: if is_cached {
                (0, Duration::ZERO)
            } else {
                (retries.min(ATTEMPTS_TO_LIST), pause)
            },
            ..self.settings.clone()
        };
        let transfer = self.transfer(name, client, &patient);
        transfer.persist(|_| client.listing())
    }
}

/// The download of one repository at one commit.
struct Download<'a> {
    hub: &'a Hub,
    name: &'a HubName,
    cache: &'a RepositoryCache<'a>,
    listing: &'a Listing,
    transfer: Transfer<'a>,
}

/// A file with everything that is known about it.
struct Job<'a> {
    expected: Expected<'a>,
    /// Its name among the blobs.
    hash: String,
}

impl Download<'_> {
    fn everything(&self, need: Need) -> Result<(), HubError> {
        let files = self.listing.select(self.name, need)?;
        let has_index = files.last().is_some_and(|file| file.name == INDEX);
        let shards = if has_index {
            // The index names the remaining files.
            self.fetch_all(&files[files.len() - 1..])?;
            let path = self.cache.snapshot(&self.listing.commit).join(INDEX);
            let index = read_text(&path, LARGEST_TEXT).map_err(|source| HubError::Cache {
                action: "read",
                path,
                source,
            })?;
            self.listing.shards(self.name, index.as_bytes())?
        } else {
            Vec::new()
        };
        self.fetch_all(&[files, shards].concat())
    }

    fn fetch_all(&self, files: &[RemoteFile]) -> Result<(), HubError> {
        let snapshot = self.cache.snapshot(&self.listing.commit);
        let mut jobs = Vec::new();
        for file in files {
            let job = self.job(file)?;
            let there = snapshot.join(&file.name);
            if !is_whole(&there, job.expected.size, job.expected.digest.as_ref()) {
                jobs.push(job);
            }
        }
        if jobs.is_empty() {
            return Ok(());
        }
        let bytes: u64 = jobs.iter().map(|job| job.expected.size).sum();
        self.check_space(&jobs)?;
        let what = format!(
            "{} of {}",
            human::counted(jobs.len() as u64, "file"),
            self.name
        );
        let (progress, started) = (&self.hub.progress, Instant::now());
        progress.start(
            &format!(
                "downloading {what}, {}, from {}",
                human::bytes(bytes),
                self.hub.settings.endpoint
            ),
            bytes,
        );
        for job in &jobs {
            self.run(job)?;
        }
        progress.done(&format!(
            "downloaded {what} in {}",
            human::duration(started.elapsed())
        ));
        Ok(())
    }

    fn job<'f>(&self, file: &'f RemoteFile) -> Result<Job<'f>, HubError> {
        let url = self
            .transfer
            .client
            .file_url(&self.listing.commit, &file.name);
        let (size, digest) = match (file.size, &file.digest) {
            (Some(size), Some(digest)) => (size, Some(digest.clone())),
            _ => self.transfer.look(&url)?,
        };
        if file.is_text() && size > LARGEST_TEXT {
            return Err(HubError::Protocol {
                url,
                reason: format!(
                    "{} of {}, which is too large for a configuration file",
                    file.name,
                    human::bytes(size)
                ),
            });
        }
        let hash = match &digest {
            Some(digest) => digest.hex().to_string(),
            // A file without a hash is named by commit and name; the plain names of a listing are safe in a path.
            None => format!("{}-{}", self.listing.commit, file.name),
        };
        debug_assert!(is_plain_name(&hash) && is_plain_name(&file.name));
        Ok(Job {
            expected: Expected {
                file: &file.name,
                url,
                size,
                digest,
            },
            hash,
        })
    }

    fn part(&self, job: &Job) -> PathBuf {
        self.cache.blob(&format!("{}.incomplete", job.hash))
    }

    fn check_space(&self, jobs: &[Job]) -> Result<(), HubError> {
        let missing = jobs
            .iter()
            .filter(|job| !self.cache.blob(&job.hash).exists());
        let needed = missing.map(|job| {
            let have = fs::metadata(self.part(job)).map_or(0, |part| part.len());
            job.expected.size.saturating_sub(have)
        });
        let needed: u64 = needed.sum();
        let folder = self.cache.folder();
        fs::create_dir_all(folder.join("blobs")).map_err(|source| HubError::Cache {
            action: "make",
            path: folder.into(),
            source,
        })?;
        // If the free space is unknown, a full disk is noticed while writing.
        match fs4::available_space(folder) {
            Ok(free) if needed > 0 && needed.saturating_add(SPARE) > free => {
                Err(HubError::NoSpace {
                    name: self.name.clone(),
                    folder: folder.into(),
                    needed,
                    free,
                })
            }
            _ => Ok(()),
        }
    }

    fn run(&self, job: &Job) -> Result<(), HubError> {
        let expected = &job.expected;
        let blob = self.cache.blob(&job.hash);
        let _lock = self
            .cache
            .lock(&job.hash, expected.file, &self.hub.progress)?;
        if is_whole(&blob, expected.size, expected.digest.as_ref()) {
            self.hub.progress.forward(expected.size);
        } else {
            if blob.exists() {
                log::warn!("{} is damaged; it is downloaded again", blob.display());
            }
            let part = self.part(job);
            self.transfer.download(expected, &part)?;
            fs::rename(&part, &blob).map_err(|source| HubError::Cache {
                action: "write",
                path: blob.clone(),
                source,
            })?;
        }
        self.cache.link(&blob, &self.listing.commit, expected.file)
    }
}
