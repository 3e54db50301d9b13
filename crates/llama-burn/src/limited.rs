//! Untrusted files: reads up to a size limit, quotes up to a length.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// The largest file of settings (`config.json`, `generation_config.json`, …). Real ones have some kilobytes.
pub const LARGEST_SETTINGS: u64 = 16 << 20;
/// The largest index of shards and the largest `tokenizer.json`. Real ones reach some tens of megabytes.
pub const LARGEST_TABLE: u64 = 256 << 20;

/// The byte order mark that editors on Windows put before UTF-8 text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The bytes of a file of at most `limit` bytes, without a byte order mark.
///
/// # Errors
///
/// The system's error; [`ErrorKind::FileTooLarge`] for a larger file, of which `limit + 1` bytes are read.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(
            ErrorKind::FileTooLarge,
            format!("it has more than {limit} bytes, which no such file needs"),
        ));
    }
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(bytes)
}

/// As [`read`], for text.
///
/// # Errors
///
/// As [`read`]; [`ErrorKind::InvalidData`] for bytes that are not UTF-8.
pub fn read_to_string(path: &Path, limit: u64) -> io::Result<String> {
    String::from_utf8(read(path, limit)?).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        io::Error::new(
            ErrorKind::InvalidData,
            format!("byte {} is not UTF-8 text", at + 1),
        )
    })
}

/// A text for a message: if it is longer than `most` characters, its first `most` characters and its length.
pub fn clipped(text: &str, most: usize) -> Cow<'_, str> {
    match text.char_indices().nth(most) {
        None => text.into(),
        Some((end, _)) => format!("{}… ({} characters)", &text[..end], text.chars().count()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit_and_no_further() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "four").unwrap();
        assert_eq!(read(&path, 4).unwrap(), b"four");
        let error = read(&path, 3).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        std::fs::write(&path, b"ab\xff").unwrap();
        let error = read_to_string(&path, 9).unwrap_err().to_string();
        assert!(error.contains("byte 3"), "{error}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_without_an_end_is_refused() {
        assert!(read(Path::new("/dev/zero"), 1000).is_err());
    }

    #[test]
    fn long_texts_are_truncated() {
        assert_eq!(clipped("äöü", 3), "äöü");
        assert_eq!(clipped("äöüx", 3), "äöü… (4 characters)");
    }
}
