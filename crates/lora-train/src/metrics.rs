//! `metrics.jsonl`: one JSON object per line, for plots and for programs that watch a run.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use train_step::loss::LossSums;

/// The file of metrics cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the metrics to {}: {source}", path.display())]
pub struct MetricsError {
    /// The file.
    pub path: PathBuf,
    /// The system's error: a full disk, missing permissions.
    pub source: io::Error,
}

/// The line of an optimizer step. A float that is not finite becomes `null` in the file.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TrainLine {
    /// Optimizer steps so far, this one included.
    pub step: usize,
    /// Passes over the training data so far, with a fraction.
    pub epoch: f64,
    /// Cross entropy per token in the loss, in nats, before the step.
    pub loss: f64,
    /// The learning rate of the step.
    pub learning_rate: f64,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Tokens of this step's examples, prompts and targets, without padding.
    pub tokens: usize,
    /// `tokens` over `step_s`.
    pub tokens_per_s: f64,
    /// Seconds that the step took, data and optimizer included.
    pub step_s: f64,
    /// Peak resident memory of this process so far, in MiB.
    pub memory_mib: f64,
    /// Memory that the device has reserved, in MiB; absent on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory_mib: Option<f64>,
    /// The factor that keeps gradients in the range of f16; absent in other types.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
}

/// The line of a validation. A float that is not finite becomes `null` in the file.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ValidationLine {
    /// Optimizer steps before it; 0 is the base model.
    pub step: usize,
    /// Passes over the training data before it, with a fraction.
    pub epoch: f64,
    /// Cross entropy per token in the loss, in nats.
    pub val_loss: f64,
    /// Share of the tokens in the loss that the model ranks first.
    pub val_accuracy: f64,
    /// Share of the examples whose every token in the loss is right: the whole target and its end
    /// token.
    pub val_row_accuracy: f64,
    /// Tokens in the loss.
    pub val_tokens: usize,
    /// Seconds it took.
    pub val_s: f64,
}

/// A validation's numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// Cross entropy per token in the loss, in nats.
    pub loss: f64,
    /// Share of the tokens in the loss that the model ranks first.
    pub accuracy: f64,
    /// Share of the examples whose whole target is right: exact match.
    pub row_accuracy: f64,
}

impl Scores {
    /// The numbers of a validation's sums.
    pub fn of(sums: &LossSums) -> Self {
        Self {
            loss: sums.mean(),
            accuracy: sums.accuracy(),
            row_accuracy: sums.row_accuracy(),
        }
    }
}

/// A step that was skipped because a loss or gradient is not finite.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SkippedLine {
    /// Optimizer steps so far, this one included.
    pub step: usize,
    /// Passes over the training data so far, with a fraction.
    pub epoch: f64,
    /// The reason and the examples: `the loss is NaN; it comes from …`.
    pub skipped: String,
    /// The factor of the learning rate from here on.
    pub rate_factor: f64,
}

/// Lines that could not be written are kept in memory up to this many bytes.
const PENDING: usize = 64 << 20;

/// Appends lines to a run's metrics. Each line is in the file when its call returns, unless the
/// disk is full: then lines wait in memory and are written when there is room.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    /// Bytes of the file that are whole lines.
    end: u64,
    pending: Vec<u8>,
}

impl MetricsWriter {
    /// Opens the file for appending, or makes it. An incomplete last line, which a killed run
    /// leaves, is cut off, so that every line of the file is complete.
    ///
    /// # Errors
    ///
    /// [`MetricsError`] with the path.
    pub fn append(path: &Path) -> Result<Self, MetricsError> {
        let open = || {
            let mut options = OpenOptions::new();
            let mut file = options.create(true).read(true).append(true).open(path)?;
            let whole = whole_lines(&mut file)?;
            if whole < file.metadata()?.len() {
                file.set_len(whole)?;
            }
            Ok(file)
        };
        match open() {
            Ok(file) => Ok(Self {
                path: path.into(),
                end: file.metadata().map_or(0, |file| file.len()),
                file,
                pending: Vec::new(),
            }),
            Err(source) => Err(MetricsError {
                path: path.into(),
                source,
            }),
        }
    }

    /// As [`append`](Self::append) for a run that is resumed: lines after the first `bytes` belong
    /// to steps that will be taken again, and are removed.
    ///
    /// # Errors
    ///
    /// [`MetricsError`] with the path.
    pub fn resume(path: &Path, bytes: u64) -> Result<Self, MetricsError> {
        let mut writer = Self::append(path)?;
        if writer.end > bytes {
            let cut = writer.file.set_len(bytes);
            cut.map_err(|source| writer.error(source))?;
            writer.end = bytes;
        } else if writer.end < bytes {
            log::warn!(
                "{} is shorter than when the checkpoint was written; metrics of some steps are missing",
                path.display()
            );
        }
        Ok(writer)
    }

    /// Waits until every line is on the disk, and returns their number of bytes.
    ///
    /// # Errors
    ///
    /// [`MetricsError`], on a full disk for example.
    pub fn sync(&mut self) -> Result<u64, MetricsError> {
        let synced = self.flush().and_then(|()| self.file.sync_all());
        synced.map_err(|source| self.error(source))?;
        Ok(self.end)
    }

    /// Bytes of the file and of the lines in memory.
    pub fn bytes(&self) -> u64 {
        self.end + self.pending.len() as u64
    }

    /// Adds a training line.
    ///
    /// # Errors
    ///
    /// [`MetricsError`], on a full disk for example.
    pub fn train(&mut self, line: &TrainLine) -> Result<(), MetricsError> {
        self.write(line)
    }

    /// Adds a validation line.
    ///
    /// # Errors
    ///
    /// [`MetricsError`], on a full disk for example.
    pub fn validation(&mut self, line: &ValidationLine) -> Result<(), MetricsError> {
        self.write(line)
    }

    /// Adds the line of a step that was skipped.
    ///
    /// # Errors
    ///
    /// [`MetricsError`], on a full disk for example.
    pub fn skipped(&mut self, line: &SkippedLine) -> Result<(), MetricsError> {
        self.write(line)
    }

    fn write(&mut self, line: &impl Serialize) -> Result<(), MetricsError> {
        let bytes = serde_json::to_vec(line).map_err(|error| self.error(error.into()))?;
        if self.pending.len() < PENDING {
            self.pending.extend(bytes);
            self.pending.push(b'\n');
        }
        self.flush().map_err(|source| self.error(source))
    }

    /// One system call for all complete lines, so that a reader never sees half of one.
    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let written = durable::faults::space().and_then(|()| self.file.write_all(&self.pending));
        match written {
            Ok(()) => {
                self.end += self.pending.len() as u64;
                self.pending.clear();
                Ok(())
            }
            Err(error) => {
                // A full disk may have taken a part of them. The first error is the one to report.
                let _ = self.file.set_len(self.end);
                Err(error)
            }
        }
    }

    fn error(&self, source: io::Error) -> MetricsError {
        MetricsError {
            path: self.path.clone(),
            source,
        }
    }
}

/// The history of a run from its file of metrics; unknown lines are ignored.
///
/// # Errors
///
/// [`MetricsError`] if the file cannot be read.
pub fn history(path: &Path) -> Result<History, MetricsError> {
    let text = std::fs::read_to_string(path).map_err(|source| MetricsError {
        path: path.into(),
        source,
    })?;
    let mut history = History::default();
    for line in text.lines() {
        let Ok(line) = serde_json::from_str::<PastLine>(line) else {
            continue;
        };
        if let Some(loss) = line.loss {
            history.losses.push(loss);
        }
        if let (Some(loss), Some(accuracy)) = (line.val_loss, line.val_accuracy) {
            history.validations.push((line.step, loss, accuracy));
        }
    }
    Ok(history)
}

/// The losses of a run so far.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct History {
    /// Of the steps.
    pub losses: Vec<f64>,
    /// Of the validations: step, loss, accuracy.
    pub validations: Vec<(usize, f64, f64)>,
}

#[derive(Deserialize)]
struct PastLine {
    step: usize,
    loss: Option<f64>,
    val_loss: Option<f64>,
    val_accuracy: Option<f64>,
}

/// Bytes up to the end of the last complete line, searched for from the end.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut block = [0u8; 4096];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let block = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(block)?;
        if let Some(newline) = block.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + newline as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn line(step: usize) -> TrainLine {
        TrainLine {
            step,
            epoch: 0.25,
            loss: 1.5,
            learning_rate: 2e-4,
            grad_norm: 0.75,
            tokens: 456,
            tokens_per_s: 912.0,
            step_s: 0.5,
            memory_mib: 312.5,
            device_memory_mib: None,
            loss_scale: None,
        }
    }

    fn validation() -> ValidationLine {
        ValidationLine {
            step: 2,
            epoch: 0.5,
            val_loss: 0.5,
            val_accuracy: 0.875,
            val_row_accuracy: 0.75,
            val_tokens: 16,
            val_s: 0.125,
        }
    }

    fn read(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn every_line_is_an_object_with_the_documented_keys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = MetricsWriter::append(&path).unwrap();
        metrics.train(&line(1)).unwrap();
        assert_eq!(read(&path).len(), 1, "written before the next line");
        metrics.validation(&validation()).unwrap();
        let lines = read(&path);
        let keys = |line: &Value| {
            line.as_object()
                .unwrap()
                .keys()
                .cloned()
                .collect::<Vec<_>>()
        };
        assert_eq!(
            keys(&lines[0]),
            [
                "step",
                "epoch",
                "loss",
                "learning_rate",
                "grad_norm",
                "tokens",
                "tokens_per_s",
                "step_s",
                "memory_mib"
            ]
        );
        assert_eq!(
            keys(&lines[1]),
            [
                "step",
                "epoch",
                "val_loss",
                "val_accuracy",
                "val_row_accuracy",
                "val_tokens",
                "val_s"
            ]
        );
        assert_eq!(
            (&lines[0]["loss"], &lines[0]["tokens"]),
            (&1.5.into(), &456.into())
        );
    }

    #[test]
    fn floats_that_are_not_finite_are_null() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = MetricsWriter::append(&path).unwrap();
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let line = TrainLine {
                loss: value,
                device_memory_mib: Some(value),
                loss_scale: None,
                ..line(1)
            };
            metrics.train(&line).unwrap();
        }
        for line in read(&path) {
            assert!(line["loss"].is_null() && line["device_memory_mib"].is_null());
        }
    }

    #[test]
    fn a_resumed_run_appends_and_a_torn_line_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        MetricsWriter::append(&path)
            .unwrap()
            .train(&line(1))
            .unwrap();
        let whole = std::fs::read(&path).unwrap();
        for torn in ["", "{\"step\":2,\"epo", &"x".repeat(10_000)] {
            std::fs::write(&path, [&whole, torn.as_bytes()].concat()).unwrap();
            MetricsWriter::append(&path)
                .unwrap()
                .train(&line(2))
                .unwrap();
            let steps: Vec<Value> = read(&path)
                .iter()
                .map(|line| line["step"].clone())
                .collect();
            assert_eq!(steps, [1, 2]);
        }
        std::fs::write(&path, "no end of line").unwrap();
        MetricsWriter::append(&path).unwrap();
        assert!(read(&path).is_empty());
    }

    #[test]
    fn a_run_that_goes_on_drops_the_lines_of_steps_that_it_takes_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = MetricsWriter::append(&path).unwrap();
        metrics.train(&line(1)).unwrap();
        metrics.validation(&validation()).unwrap();
        let bytes = metrics.sync().unwrap();
        metrics.train(&line(2)).unwrap();
        let mut metrics = MetricsWriter::resume(&path, bytes).unwrap();
        metrics.train(&line(3)).unwrap();
        let steps: Vec<Value> = read(&path).iter().map(|l| l["step"].clone()).collect();
        assert_eq!(steps, [1, 2, 3]);
        let history = history(&path).unwrap();
        assert_eq!(history.losses, [1.5, 1.5]);
        assert_eq!(history.validations, [(2, 0.5, 0.875)]);
        // A file that was shortened is still appended to.
        MetricsWriter::resume(&path, 1 << 20).unwrap();
        assert_eq!(read(&path).len(), 3);
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = MetricsWriter::append(folder.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&folder.path().display().to_string()),
            "{error}"
        );
        #[cfg(target_os = "linux")]
        {
            // The device that is always full. Its end cannot be read, so it is opened by hand.
            let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
            let path = PathBuf::from("/dev/full");
            let mut metrics = MetricsWriter {
                path,
                file,
                end: 0,
                pending: Vec::new(),
            };
            let error = metrics.train(&line(1)).unwrap_err();
            assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
            assert!(error.to_string().contains("/dev/full"));

            // With room again, the lines in memory are written in order.
            let path = folder.path().join("metrics.jsonl");
            metrics.file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .unwrap();
            metrics.train(&line(2)).unwrap();
            let steps: Vec<Value> = read(&path).iter().map(|l| l["step"].clone()).collect();
            assert_eq!(steps, [1, 2]);
            let bytes = std::fs::metadata(&path).unwrap().len();
            assert_eq!((metrics.bytes(), metrics.sync().unwrap()), (bytes, bytes));
        }
    }
}
