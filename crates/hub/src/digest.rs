//! The hash of a file, as the Hub states it.

use std::fmt;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// The hash of a file: SHA-256 for files in large-file storage, git's for the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Digest {
    /// Of the bytes.
    Sha256(String),
    /// Git's name of a blob: SHA-1 of `blob LENGTH`, a zero byte, and the bytes.
    GitSha1(String),
}

impl Digest {
    /// The hash in an `ETag` or in a field of the Hub's response, detected by its length; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches("W/").trim_matches('"');
        let hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match (hex, text.len()) {
            (true, 64) => Some(Self::Sha256(text.to_ascii_lowercase())),
            (true, 40) => Some(Self::GitSha1(text.to_ascii_lowercase())),
            _ => None,
        }
    }

    /// The hash in hexadecimal digits: the blob's name in the cache.
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitSha1(hex) => hex,
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(hex) => write!(f, "SHA-256 {hex}"),
            Self::GitSha1(hex) => write!(f, "git SHA-1 {hex}"),
        }
    }
}

/// Computes one of the two, piece by piece.
pub(super) enum Hasher {
    Sha256(Sha256),
    GitSha1(Sha1),
}

impl Hasher {
    /// For a file of `size` bytes that should have the hash `like`.
    pub fn new(like: &Digest, size: u64) -> Self {
        match like {
            Digest::Sha256(_) => Self::Sha256(Sha256::new()),
            Digest::GitSha1(_) => {
                let mut hasher = Sha1::new();
                hasher.update(format!("blob {size}\0"));
                Self::GitSha1(hasher)
            }
        }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::GitSha1(hasher) => hasher.update(bytes),
        }
    }

    pub fn finish(self) -> Digest {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Sha256(hasher) => Digest::Sha256(hex(&hasher.finalize())),
            Self::GitSha1(hasher) => Digest::GitSha1(hex(&hasher.finalize())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf 'hello\n' | sha256sum`, and `… | git hash-object --stdin`.
    #[test]
    fn the_hashes_are_those_of_sha256sum_and_git() {
        for text in [
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
            "ce013625030ba8dba906f756967f9e9ca394464a",
        ] {
            let expected = Digest::parse(&format!("W/\"{text}\"")).unwrap();
            let mut hasher = Hasher::new(&expected, 6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            assert_eq!(hasher.finish(), expected);
        }
    }

    #[test]
    fn anything_else_is_not_a_hash() {
        for text in [
            "",
            "\"abc\"",
            "../../../etc/passwd",
            &"g".repeat(64),
            &"a".repeat(41),
        ] {
            assert_eq!(Digest::parse(text), None, "{text}");
        }
    }
}
