//! PEFT on the same shapes, measured in turn with this trainer by a script that the user names (`peft_bench.py`; it is not
//! part of this repository).
//!
//! The script is run with `--shape CONFIG.JSON --tokens N --batch-size N --steps N --warmup N --dtype TYPE --device
//! DEVICE`. The last line of its output that starts with a brace is a JSON object with `useful_tokens_per_s`,
//! `seconds_per_step`, `peak_rss_mib`, `peak_gpu_mib` (or null) and `losses`.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Deserialize;

use super::clock::Clock;
use super::error::ReportError;
use super::finding::Training;
use super::shapes::Shape;

/// How PEFT is run.
#[derive(Debug, Clone, Copy)]
pub struct Peft<'a> {
    /// A Python with torch, transformers and peft.
    pub python: &'a Path,
    /// `peft_bench.py`.
    pub script: &'a Path,
    /// PyTorch's name for the device: `cuda`, `mps`, `cpu`.
    pub device: &'a str,
    /// The folder for its configuration and its log.
    pub folder: &'a Path,
}

/// The script's line of results.
#[derive(Debug, Deserialize)]
struct Line {
    useful_tokens_per_s: f64,
    seconds_per_step: f64,
    peak_rss_mib: f64,
    peak_gpu_mib: Option<f64>,
    losses: Vec<f64>,
}

/// Steps per run; the first ones are not timed.
const STEPS: usize = 7;
const WARM_UP: usize = 2;

impl Peft<'_> {
    /// Trains a shape with a dense base in `dtype`, a PyTorch name.
    ///
    /// # Errors
    ///
    /// The script's message, or that it exceeded its time limit.
    pub fn train(
        &self,
        shape: Shape,
        (tokens, examples): (usize, usize),
        dtype: &str,
        limit: Duration,
    ) -> Result<Training, ReportError> {
        let config = self.folder.join(format!("{}.json", shape.name()));
        durable::write_atomically(&config, shape.json()?.as_bytes())?;
        let log = self
            .folder
            .join(format!("peft-{}-{tokens}.log", shape.name()));
        let write = |path: &Path| {
            File::create(path).map_err(|source| ReportError::WriteFile {
                path: path.into(),
                source,
            })
        };
        let answer = log.with_extension("out");
        let mut process = Command::new(self.python)
            .arg(self.script)
            .arg("--shape")
            .arg(&config)
            .args(["--tokens", &tokens.to_string()])
            .args(["--batch-size", &examples.to_string()])
            .args(["--steps", &STEPS.to_string()])
            .args(["--warmup", &WARM_UP.to_string()])
            .args(["--dtype", dtype])
            .args(["--device", self.device])
            .env("HF_HUB_OFFLINE", "1")
            .stdin(Stdio::null())
            .stdout(write(&answer)?)
            .stderr(write(&log)?)
            .spawn()
            .map_err(|source| ReportError::Start {
                program: self.python.display().to_string(),
                source,
            })?;
        let clock = Clock::new(limit);
        let waiting = |source| ReportError::Wait {
            program: self.python.display().to_string(),
            source,
        };
        let status = loop {
            match process.try_wait().map_err(waiting)? {
                Some(status) => break status,
                None if clock.has(0.001) => std::thread::sleep(Duration::from_millis(100)),
                None => {
                    let _ = process.kill();
                    let _ = process.wait();
                    return Err(ReportError::PeftTimeOut(limit.as_secs_f64()));
                }
            }
        };
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        if !status.success() {
            let last = said.lines().rfind(|line| !line.trim().is_empty());
            let message = last.unwrap_or("it failed and printed nothing");
            return Err(ReportError::PeftFailed(message.into()));
        }
        let text = std::fs::read_to_string(&answer).map_err(|source| ReportError::ReadFile {
            path: answer.clone(),
            source,
        })?;
        training(&text, shape, (tokens, examples), dtype)
    }
}

fn training(
    text: &str,
    shape: Shape,
    (tokens, examples): (usize, usize),
    dtype: &str,
) -> Result<Training, ReportError> {
    let line = text.lines().rfind(|line| line.starts_with('{'));
    let line: Line =
        serde_json::from_str(line.unwrap_or_default()).map_err(ReportError::PeftLine)?;
    let ends = [line.losses.first(), line.losses.last()];
    Ok(Training {
        program: format!("PEFT {dtype}"),
        shape: shape.name().into(),
        dtype: short(dtype).into(),
        bits: if dtype == "float32" { 32 } else { 16 },
        tokens_per_example: tokens,
        examples_per_step: examples,
        tokens_per_s: line.useful_tokens_per_s,
        seconds_per_step: [line.seconds_per_step; 3],
        steps: STEPS - WARM_UP,
        peak_mib: line.peak_gpu_mib.or(Some(line.peak_rss_mib)),
        gradient_checkpointing: false,
        losses: match ends {
            [Some(first), Some(last)] => Some([*first, *last]),
            _ => None,
        },
        warm_up_s: None,
    })
}

/// PyTorch's name of a type.
pub fn long(dtype: &str) -> &'static str {
    match dtype {
        "bf16" => "bfloat16",
        "f16" => "float16",
        _ => "float32",
    }
}

fn short(dtype: &str) -> &str {
    match dtype {
        "bfloat16" => "bf16",
        "float16" => "f16",
        "float32" => "f32",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_last_line_is_read_and_types_have_both_names() {
        let text = "a warning\n{\"useful_tokens_per_s\": 90.5, \"padded_tokens_per_s\": 91.0, \
                    \"seconds_per_step\": 0.5, \"peak_rss_mib\": 10, \"peak_gpu_mib\": null, \
                    \"trainable\": 1, \"threads\": 2, \"losses\": [3.0, 2.0]}\n";
        let read = |text| training(text, Shape::Smol, (512, 4), "bfloat16");
        let training = read(text).unwrap();
        assert_eq!(
            (training.tokens_per_s, training.peak_mib),
            (90.5, Some(10.0))
        );
        assert_eq!(
            (training.dtype.as_str(), training.losses),
            ("bf16", Some([3.0, 2.0]))
        );
        assert!(read("nothing").is_err());
        for dtype in ["f32", "f16", "bf16"] {
            assert_eq!(short(long(dtype)), dtype);
        }
    }
}
