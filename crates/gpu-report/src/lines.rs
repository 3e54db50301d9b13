//! Findings as lines on the screen.

use std::path::Path;

use super::finding::Finding;
use terminal::human;

/// A finding as a line on the screen; `None` for the end of a section.
pub fn line(finding: &Finding) -> Option<String> {
    Some(match finding {
        Finding::Device(device) => format!("{} (driver: {})", device.name, device.driver),
        Finding::Check(check) => {
            let difference = check
                .difference
                .map_or("not a number".into(), |it| format!("{it:.1e}"));
            let verdict = if check.ok { "ok  " } else { "FAIL" };
            format!(
                "{verdict} {}: difference {difference}, tolerance {:.1e}",
                check.name, check.tolerance
            )
        }
        Finding::Rate(rate) => {
            let tflops = rate
                .tflops
                .map(|it| format!("{} TFLOP/s", human::number(it)));
            let speed = tflops.or(rate.gbs.map(|it| format!("{} GB/s", human::number(it))));
            format!(
                "{}, {}, {}: {}",
                rate.what,
                rate.dtype,
                rate.size,
                speed.unwrap_or_default()
            )
        }
        Finding::Counts(step) => format!(
            "{} launches per layer, {} uploads and {} reads per step, {:.1} GB per step",
            step.launches_per_layer,
            step.uploads_per_step,
            step.reads_per_step,
            step.bytes_per_step as f64 / 1e9
        ),
        Finding::Training(it) => format!(
            "{}, {}, {}, {} tokens per example: {} tokens/s, {}",
            it.program,
            it.shape,
            it.dtype,
            it.tokens_per_example,
            human::rate(it.tokens_per_s),
            it.peak_mib
                .map_or("memory unknown".into(), |mib| format!("{mib:.0} MiB"))
        ),
        Finding::LeftOut(left_out) => format!("skipped: {}: {}", left_out.what, left_out.why),
        Finding::Failed(failed) => format!("FAILED: {}: {}", failed.what, failed.message),
        Finding::Done => return None,
    })
}

/// The last line that a section printed on standard error.
pub fn last_words(log: &Path) -> String {
    let said = std::fs::read_to_string(log).unwrap_or_default();
    let last = said.lines().rfind(|line| !line.trim().is_empty());
    match last {
        Some(line) => llama_burn::limited::clipped(line.trim(), 300).into_owned(),
        None => format!("it printed nothing ({})", log.display()),
    }
}
