//! The table of faults in `RELIABILITY.md`, filled in by tests.
//!
//! Every test of a fault calls [`record`]. Its text must be that of the committed table; times are
//! measured anew. `LORA_UPDATE_RELIABILITY=1 cargo xtask test` writes the committed file again.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A fault and its consequences.
#[derive(Debug, Clone)]
pub struct Row<'a> {
    /// Its position in the table.
    pub place: usize,
    /// The fault.
    pub fault: &'a str,
    /// The behaviour of the run.
    pub happened: &'a str,
    /// What was lost.
    pub lost: &'a str,
    /// The time from the restart to the step that the run had reached; `None` if nothing had to be
    /// started.
    pub recovery: Option<Duration>,
}

const HEAD: &str = "\
# Faults and their consequences

Written by the tests, which cause each of these faults and check the result (`tests/tests/crash.rs`, `resume.rs`,
`faults.rs`). `LORA_UPDATE_RELIABILITY=1 cargo xtask test` writes this file again; a test fails if its text differs
from the table. Times are those of a tiny model on two cores, including the start of the program. \"Nothing\" is lost if
the final adapter equals that of an undisturbed run, byte for byte.

| fault | what happens | lost | time to recover |
| --- | --- | --- | --- |
";

fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../RELIABILITY.md")
}

/// The folder for the rows measured on this machine.
fn gathered() -> PathBuf {
    let executable = std::env::current_exe().expect("a test has a path");
    let target = executable.parent().and_then(Path::parent);
    target.expect("a target folder").join("reliability")
}

/// Adds a row to the table of this machine (`reliability/RELIABILITY.md` in the target folder), and
/// compares it with the committed table.
///
/// # Panics
///
/// If the committed table differs, or a file cannot be written.
pub fn record(row: &Row) {
    let words = format!("| {} | {} | {} |", row.fault, row.happened, row.lost);
    let recovery = row
        .recovery
        .map_or_else(|| "-".into(), |time| format!("{:.1} s", time.as_secs_f64()));
    println!("{words} {recovery} |");
    let folder = gathered();
    fs::create_dir_all(&folder).expect("the target folder is writable");
    let part = folder.join(format!("{:03}.row", row.place));
    // Tests run in parallel: each row is a file, replaced atomically.
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
        "RELIABILITY.md lacks the row\n  {words}\nLORA_UPDATE_RELIABILITY=1 cargo xtask test writes it again"
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
