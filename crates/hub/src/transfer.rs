//! Downloads one file, resumes after an interruption, and checks the file before it is used.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use super::HubError;
use super::client::{Answer, Client, Failure, text};
use super::digest::{Digest, Hasher};
use super::progress::Progress;
use super::{HubName, Settings};

/// The maximum number of attempts, whatever their progress.
const MOST_ATTEMPTS: usize = 200;
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const BUFFER: usize = 1 << 20;

/// A file whose size and hash are known.
pub(super) struct Expected<'a> {
    pub file: &'a str,
    pub url: String,
    pub size: u64,
    /// `None`: the server states no hash that one can compute, so only the size is checked.
    pub digest: Option<Digest>,
}

/// Downloads of one repository.
pub(super) struct Transfer<'a> {
    pub client: &'a Client<'a>,
    pub settings: &'a Settings,
    pub name: &'a HubName,
    pub progress: &'a Progress,
}

impl Transfer<'_> {
    /// Runs `attempt` until it succeeds, fails for good, or fails too often without progress.
    pub fn persist<T>(
        &self,
        mut attempt: impl FnMut(&mut bool) -> Result<T, Failure>,
    ) -> Result<T, HubError> {
        let (most, first_pause) = self.settings.retries;
        let (mut in_vain, mut pause) = (0, first_pause);
        for _ in 0..MOST_ATTEMPTS {
            let mut brought_something = false;
            let (reason, asked) = match attempt(&mut brought_something) {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(reason, asked)) => (reason, asked),
            };
            if brought_something {
                (in_vain, pause) = (0, first_pause);
            }
            in_vain += 1;
            if in_vain > most {
                return Err(self.no_connection(reason));
            }
            log::debug!("{}: {reason}; trying again", self.name);
            std::thread::sleep(asked.unwrap_or(pause));
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
        Err(self.no_connection(format!("{MOST_ATTEMPTS} attempts were cut off")))
    }

    fn no_connection(&self, reason: String) -> HubError {
        HubError::NoConnection {
            name: self.name.clone(),
            endpoint: self.settings.endpoint.clone(),
            reason,
        }
    }

    /// The size and hash of a file, from the Hub's headers, if the listing does not state them.
    pub fn look(&self, url: &str) -> Result<(u64, Option<Digest>), HubError> {
        self.persist(|_| {
            let answer = self.client.get(url, Some(0))?;
            let status = answer.response.status().as_u16();
            if !matches!(status, 200 | 206) {
                let headers = answer.response.headers();
                return Err(self.client.refused(&answer.url, status, headers));
            }
            let size = answer.size.or_else(|| announced(&answer, 0).ok()?);
            let size = size.ok_or_else(|| {
                let reason = "the response states no file size".into();
                self.client.not_the_protocol(&answer.url, reason)
            })?;
            Ok((size, answer.digest))
        })
    }

    /// Completes `part` and checks that it is the file. A partial download of an earlier call is resumed.
    ///
    /// `file` is kept if the connection fails. If its bytes are wrong, it is emptied and downloaded once more.
    pub fn download(&self, expected: &Expected, part: &Path) -> Result<(), HubError> {
        let disk = |source| HubError::Cache {
            action: "write",
            path: part.into(),
            source,
        };
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(part)
            .map_err(disk)?;
        let mut wrong = None;
        for _ in 0..2 {
            let got = self.fill(expected, &mut file, part)?;
            match &expected.digest {
                Some(digest) if got.as_ref() != Some(digest) => {
                    file.set_len(0).map_err(disk)?;
                    self.progress.back(expected.size);
                    wrong = got;
                }
                _ => return file.sync_all().map_err(disk),
            }
        }
        drop(file);
        let _ = std::fs::remove_file(part);
        let shown =
            |digest: &Option<Digest>| digest.as_ref().map_or_else(String::new, Digest::to_string);
        Err(HubError::Damaged {
            name: self.name.clone(),
            file: expected.file.into(),
            expected: shown(&expected.digest),
            got: shown(&wrong),
        })
    }

    /// Fills `file` to its size and hashes it.
    fn fill(
        &self,
        expected: &Expected,
        file: &mut File,
        part: &Path,
    ) -> Result<Option<Digest>, HubError> {
        let disk = |source| HubError::Cache {
            action: "write",
            path: part.into(),
            source,
        };
        let start = |file: &mut File| -> io::Result<(u64, Option<Hasher>)> {
            if file.metadata()?.len() > expected.size {
                file.set_len(0)?;
            }
            let mut hasher = expected
                .digest
                .as_ref()
                .map(|digest| Hasher::new(digest, expected.size));
            file.seek(SeekFrom::Start(0))?;
            let mut buffer = vec![0; BUFFER];
            let mut have = 0;
            loop {
                match file.read(&mut buffer)? {
                    0 => return Ok((have, hasher)),
                    count => {
                        have += count as u64;
                        if let Some(hasher) = &mut hasher {
                            hasher.update(&buffer[..count]);
                        }
                    }
                }
            }
        };
        let (mut have, mut hasher) = start(file).map_err(disk)?;
        self.progress.forward(have);
        let mut buffer = vec![0; BUFFER];
        self.persist(|brought_something| {
            if have == expected.size {
                return Ok(());
            }
            let mut answer = self
                .client
                .get(&expected.url, Some(have).filter(|have| *have > 0))?;
            let status = answer.response.status().as_u16();
            match status {
                206 => match announced(&answer, have) {
                    Ok(Some(size)) if size != expected.size => {
                        let reason = format!("the file has {size} bytes, not {}", expected.size);
                        return Err(self.client.not_the_protocol(&answer.url, reason));
                    }
                    Ok(_) => {}
                    Err(reason) => return Err(self.client.not_the_protocol(&answer.url, reason)),
                },
                // The server does not resume files, or considers this one complete: start again.
                200 | 416 => {
                    if have > 0 {
                        file.set_len(0).map_err(disk)?;
                        self.progress.back(have);
                        (have, hasher) = start(file).map_err(disk)?;
                        if status == 416 {
                            return Err(Failure::Passing("status 416".into(), None));
                        }
                    } else if status == 416 {
                        let reason = "status 416 for a whole file".into();
                        return Err(self.client.not_the_protocol(&answer.url, reason));
                    }
                }
                status => {
                    let headers = answer.response.headers();
                    return Err(self.client.refused(&answer.url, status, headers));
                }
            }
            // One byte more than expected, so that a response that is too long is noticed.
            let limit = expected.size - have + 1;
            let body = answer.response.body_mut().with_config().limit(u64::MAX);
            let mut reader = body.reader().take(limit);
            loop {
                let count = match reader.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        return Err(Failure::Passing(
                            format!("the connection was cut off: {error}"),
                            None,
                        ));
                    }
                };
                if have + count as u64 > expected.size {
                    let reason = format!("more than the {} bytes that it announced", expected.size);
                    return Err(self.client.not_the_protocol(&expected.url, reason));
                }
                file.write_all(&buffer[..count]).map_err(disk)?;
                if let Some(hasher) = &mut hasher {
                    hasher.update(&buffer[..count]);
                }
                have += count as u64;
                *brought_something = true;
                self.progress.forward(count as u64);
            }
            if have == expected.size {
                Ok(())
            } else {
                Err(Failure::Passing("the connection was cut off".into(), None))
            }
        })?;
        Ok(hasher.map(Hasher::finish))
    }
}

/// The size of the whole file by `Content-Range` or `Content-Length`, if either is present; an error if the
/// response begins at another byte than `from`.
fn announced(answer: &Answer, from: u64) -> Result<Option<u64>, String> {
    let headers = answer.response.headers();
    if answer.response.status().as_u16() != 206 {
        return Ok(text(headers, "content-length").and_then(|length| length.parse().ok()));
    }
    let range = text(headers, "content-range").unwrap_or_default();
    let parsed = range.strip_prefix("bytes ").and_then(|range| {
        let (bytes, total) = range.split_once('/')?;
        let (first, _) = bytes.split_once('-')?;
        Some((first.trim().parse::<u64>().ok()?, total.trim().parse().ok()))
    });
    match parsed {
        Some((first, total)) if first == from => Ok(total),
        _ => Err(format!("requested bytes from {from}, received {range:?}")),
    }
}
