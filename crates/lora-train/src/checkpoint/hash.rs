//! SHA-256 of files, read in chunks.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Larger files are hashed by samples, if samples are enough.
const WHOLE: u64 = 64 << 20;
/// Of a sampled file, one block of [`BLOCK`] bytes is read at each multiple of this.
const EVERY: u64 = 4 << 20;
const BLOCK: usize = 64 << 10;
/// The beginning and the end are read to this length.
const ENDS: u64 = 1 << 20;

/// SHA-256 of bytes, in hexadecimal.
#[cfg(test)]
pub fn of_bytes(bytes: &[u8]) -> String {
    hex(Sha256::digest(bytes).as_slice())
}

/// SHA-256 of a file, in hexadecimal.
///
/// # Errors
///
/// The system's error.
pub fn of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut block = vec![0; BLOCK];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hex(hash.finalize().as_slice())),
            read => hash.update(&block[..read]),
        }
    }
}

/// SHA-256 of a file of up to 64 MiB; of a larger one, `sampled:` and SHA-256 of its length, its first and
/// last MiB and 64 KiB of every 4 MiB between.
///
/// That is enough to distinguish models, whose weights differ everywhere, and to notice a truncated
/// file. A single changed byte in gigabytes can escape it. Reading everything would take minutes at
/// every start.
///
/// # Errors
///
/// The system's error.
pub fn of_large_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    if length <= WHOLE {
        return of_file(path);
    }
    let mut hash = Sha256::new();
    hash.update(length.to_le_bytes());
    let mut block = vec![0; ENDS as usize];
    let mut take = |start: u64, bytes: usize| {
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut block[..bytes])?;
        hash.update(&block[..bytes]);
        io::Result::Ok(())
    };
    take(0, ENDS as usize)?;
    for start in (EVERY..length - ENDS).step_by(EVERY as usize) {
        take(start, BLOCK)?;
    }
    take(length - ENDS, ENDS as usize)?;
    Ok(format!("sampled:{}", hex(hash.finalize().as_slice())))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_sha_256() {
        // FIPS 180-2, appendix B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_bytes(b"abc"), abc);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        assert_eq!(of_file(file.path()).unwrap(), abc);
        assert_eq!(of_large_file(file.path()).unwrap(), abc);
    }

    #[test]
    fn a_large_file_is_sampled_at_both_ends_and_between() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let length = WHOLE + 5 * EVERY;
        file.as_file().set_len(length).unwrap();
        let hash = || of_large_file(file.path()).unwrap();
        let mut seen = vec![hash()];
        assert!(seen[0].starts_with("sampled:"));
        for place in [0, 3 * EVERY + 5, length - 1] {
            let mut opened = file.as_file();
            opened.seek(SeekFrom::Start(place)).unwrap();
            io::Write::write_all(&mut opened, b"x").unwrap();
            assert!(!seen.contains(&hash()), "a change at {place}");
            seen.push(hash());
        }
        file.as_file().set_len(length + 1).unwrap();
        assert!(!seen.contains(&hash()));
    }
}
