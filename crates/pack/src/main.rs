//! `pack FOLDER FILE`: a folder as `FILE.tar.zst` or `FILE.tar.xz`, compressed as far as it goes.
//!
//! A program of its own, so that xtask, the first thing that a new user builds, needs no C compiler.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

/// Of 22; beyond it, unpacking takes much memory and little is won.
const ZSTD_LEVEL: i32 = 19;

/// The logarithm of the distance at which repetitions are found: the largest that `zstd` unpacks unasked. The builds
/// in a bundle have much in common.
const ZSTD_WINDOW: u32 = 27;

const XZ_LEVEL: u32 = 9;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let packed = match &args[..] {
        [folder, file] => pack(&PathBuf::from(folder), &PathBuf::from(file)),
        _ => Err(anyhow::anyhow!(
            "usage: pack FOLDER FILE.tar.zst|FILE.tar.xz"
        )),
    };
    match packed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pack: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the folder's content, without the folder's own name, to `file`.
fn pack(folder: &Path, file: &Path) -> Result<()> {
    let output = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    let output = BufWriter::new(output);
    let written = match file.extension().and_then(|extension| extension.to_str()) {
        Some("zst") => zst(folder, output),
        Some("xz") => xz(folder, output),
        _ => bail!(
            "{}: the name has to end in .tar.zst or .tar.xz",
            file.display()
        ),
    };
    written.with_context(|| format!("cannot pack {} into {}", folder.display(), file.display()))
}

fn zst(folder: &Path, output: impl Write) -> io::Result<()> {
    let mut encoder = zstd::Encoder::new(output, ZSTD_LEVEL)?;
    encoder.long_distance_matching(true)?;
    encoder.window_log(ZSTD_WINDOW)?;
    encoder.include_checksum(true)?;
    tar(folder, encoder)?.finish()?.flush()
}

fn xz(folder: &Path, output: impl Write) -> io::Result<()> {
    let encoder = liblzma::write::XzEncoder::new(output, XZ_LEVEL);
    tar(folder, encoder)?.finish()?.flush()
}

fn tar<W: Write>(folder: &Path, output: W) -> io::Result<W> {
    let mut archive = tar::Builder::new(output);
    // Owners and times of this machine mean nothing on another; what may be run stays so.
    archive.mode(tar::HeaderMode::Deterministic);
    archive.append_dir_all(".", folder)?;
    archive.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(archive: impl io::Read) -> Vec<(String, u32)> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            (name, entry.header().mode().unwrap() & 0o111)
        });
        entries.filter(|(name, _)| name.contains('r')).collect()
    }

    #[cfg(unix)]
    #[test]
    fn what_may_be_run_may_be_run_when_it_is_unpacked() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        let run = inside.join("run.sh");
        std::fs::write(&run, "true\n").unwrap();
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(inside.join("report"), [7; 100_000]).unwrap();
        let mut expected = vec![("report".to_string(), 0), ("run.sh".into(), 0o111)];
        expected.sort();

        let zst = folder.path().join("a.tar.zst");
        pack(&inside, &zst).unwrap();
        let mut got = names(zstd::Decoder::new(File::open(&zst).unwrap()).unwrap());
        got.sort();
        assert_eq!(got, expected);

        let xz = folder.path().join("a.tar.xz");
        pack(&inside, &xz).unwrap();
        let mut got = names(liblzma::read::XzDecoder::new(File::open(&xz).unwrap()));
        got.sort();
        assert_eq!(got, expected);

        for file in [zst, xz] {
            assert!(std::fs::metadata(&file).unwrap().len() < 5_000);
        }
        let other = pack(&inside, &folder.path().join("a.zip")).unwrap_err();
        assert!(other.to_string().contains(".tar.xz"), "{other}");
    }
}
