//! The table of faults, which tests fill in: `RELIABILITY.md`.
//!
//! Every test of a fault calls [`record`]. Its words have to be those of the committed table; times are
//! measured anew. `LORA_UPDATE_RELIABILITY=1 cargo xtask test` writes the committed file again.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A fault, and what came of it.
#[derive(Debug, Clone)]
pub struct Row<'a> {
    /// Its place in the table.
    pub place: usize,
    /// What went wrong.
    pub fault: &'a str,
    /// What the run did.
    pub happened: &'a str,
    /// What was lost.
    pub lost: &'a str,
    /// How long it took from starting again to being where the run was; none where nothing had to be started.
    pub recovery: Option<Duration>,
}

const HEAD: &str = "\
# What can go wrong, and what comes of it

Written by the tests, which cause each of these faults and look at what is left (`tests/tests/crash.rs`, `resume.rs`,
`faults.rs`). `LORA_UPDATE_RELIABILITY=1 cargo xtask test` writes this file again; a test fails where its words differ
from what happens. Times are those of a tiny model on two cores, start of the program included. \"Nothing\" means: the
adapter at the end is that of an undisturbed run, byte for byte.

| fault | what happens | lost | back where it was after |
| --- | --- | --- | --- |
";

fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../RELIABILITY.md")
}

/// Where the rows of this machine are gathered.
fn gathered() -> PathBuf {
    let executable = std::env::current_exe().expect("a test has a path");
    let target = executable.parent().and_then(Path::parent);
    target.expect("a target folder").join("reliability")
}

/// Puts a row into the table of this machine (`reliability/RELIABILITY.md` beside the program), and compares
/// it with the committed one.
///
/// # Panics
///
/// If the committed table says something else, or a file cannot be written.
pub fn record(row: &Row) {
    let words = format!("| {} | {} | {} |", row.fault, row.happened, row.lost);
    let recovery = row
        .recovery
        .map_or_else(|| "-".into(), |time| format!("{:.1} s", time.as_secs_f64()));
    println!("{words} {recovery} |");
    let folder = gathered();
    fs::create_dir_all(&folder).expect("the target folder is writable");
    let part = folder.join(format!("{:03}.row", row.place));
    // Tests run at the same time: each row is a file, replaced in one step.
    let temporary = folder.join(format!(".{:03}.{}", row.place, std::process::id()));
    fs::write(&temporary, format!("{words} {recovery} |\n"))
        .expect("the target folder is writable");
    fs::rename(&temporary, &part).expect("the target folder is writable");

    let table = table(&folder);
    fs::write(folder.join("RELIABILITY.md"), &table).expect("the target folder is writable");
    if std::env::var_os("LORA_UPDATE_RELIABILITY").is_some() {
        fs::write(committed(), table).expect("RELIABILITY.md is writable");
        return;
    }
    let committed = fs::read_to_string(committed()).unwrap_or_default();
    assert!(
        committed.lines().any(|line| line.starts_with(&words)),
        "RELIABILITY.md does not say\n  {words}\nLORA_UPDATE_RELIABILITY=1 cargo xtask test writes it again"
    );
}

fn table(folder: &Path) -> String {
    let mut names: Vec<PathBuf> = fs::read_dir(folder)
        .expect("it was made")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "row"))
        .collect();
    names.sort();
    let mut table = HEAD.to_string();
    for name in names {
        let row = fs::read_to_string(name).unwrap_or_default();
        let _ = write!(table, "{row}");
    }
    table
}
