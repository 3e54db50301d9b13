//! The trainer's GPU report in continuous integration: on the software driver, with small sizes.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bundle::target_of_workspace;
use crate::cargo::{exit_code, quiet_display_server, trainer_binary};

/// Seconds that the report may take here; it needs about one.
const SECONDS: &str = "300";

/// Seconds for the bundle's script. Its build tunes kernels, which is slow on a software driver.
const SECONDS_OF_BUNDLE: &str = "900";

/// The keys of `report.json` that other programs read; each must have a value.
const KEYS: [&str; 9] = [
    "device",
    "checks",
    "training",
    "launches_per_layer",
    "uploads_per_step",
    "reads_per_step",
    "bytes_per_step_8b_2048",
    "peak_tflops",
    "peak_gbs",
];

/// Those keys that every report has, however soon it ends.
const KEYS_OF_EVERY_REPORT: [&str; 2] = ["device", "checks"];

/// Runs the quick report with the trainer that the tests built, and checks these keys.
pub fn quick() -> Result<u8> {
    let folder = target_of_workspace()?.join("gpu-report-ci");
    let mut report = Command::new(trainer_binary()?);
    report
        .args([
            "gpu-report",
            "--backend",
            "wgpu",
            "--quick",
            "--seconds",
            SECONDS,
        ])
        .arg("--output")
        .arg(&folder);
    quiet_display_server(&mut report);
    let status = report.status().context("cannot start the trainer")?;
    if !status.success() {
        return Ok(exit_code(status).max(1));
    }
    complete(&folder.join("report.json"), &KEYS)?;
    Ok(0)
}

/// Unpacks a bundle and runs its script on the software driver.
pub fn bundle(file: &Path) -> Result<u8> {
    let folder = target_of_workspace()?.join("gpu-bundle-ci");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut tar = Command::new("tar");
    tar.arg("--extract")
        .arg("--file")
        .arg(file)
        .arg("--directory")
        .arg(&folder);
    let status = tar.status().context("cannot start tar")?;
    if !status.success() {
        bail!("tar cannot unpack {}", file.display());
    }
    let output = folder.join("results");
    let mut run = Command::new(folder.join("run.sh"));
    run.args(["--quick", "--seconds", SECONDS_OF_BUNDLE])
        .arg("--output")
        .arg(&output);
    let status = run.status().context("cannot start run.sh")?;
    if !status.success() {
        return Ok(exit_code(status).max(1));
    }
    // Its build tunes kernels, so a software driver does not finish the sections that count and
    // measure. The earlier report of the other build has their keys.
    complete(&output.join("wgpu/report.json"), &KEYS_OF_EVERY_REPORT)?;
    Ok(0)
}

/// Fails unless each of these keys has a value.
fn complete(path: &Path, keys: &[&'static str]) -> Result<()> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let missing = missing(&text, keys);
    if !missing.is_empty() {
        bail!("{}: no value for {}", path.display(), missing.join(", "));
    }
    Ok(())
}

/// The keys without a value. The file is written by the trainer with one key per line, so no parser
/// is needed.
fn missing(json: &str, keys: &[&'static str]) -> Vec<&'static str> {
    let has = |key: &&str| {
        let start = format!("\"{key}\": ");
        let values = json
            .lines()
            .filter_map(|line| line.trim().strip_prefix(&start));
        let empty = ["null", "[]", "{}"];
        values
            .map(|value| value.trim_end_matches(','))
            .any(|value| !empty.contains(&value))
    };
    keys.iter().copied().filter(|key| !has(key)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_without_a_value_is_missed() {
        let json = "{\n  \"device\": {\n    \"name\": \"x\"\n  },\n  \"checks\": [],\n  \"launches_per_layer\": 150,\n  \
                    \"reads_per_step\": null,\n  \"peak_gbs\": 3.5\n}";
        let missing = missing(json, &KEYS);
        for key in ["checks", "reads_per_step", "training"] {
            assert!(missing.contains(&key), "{missing:?}");
        }
        for key in ["device", "launches_per_layer", "peak_gbs"] {
            assert!(!missing.contains(&key), "{missing:?}");
        }
    }
}
