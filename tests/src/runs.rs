//! Runs that are stopped and resumed, and their files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::binary;

/// The files of a run's adapter.
///
/// # Panics
///
/// If there is no adapter.
pub fn adapter_bytes(run: &Path) -> Vec<u8> {
    let path = run.join("adapter/adapter_model.safetensors");
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The complete lines of a run's metrics.
pub fn lines(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// The results of a run, without times and memory: the step and the numbers of each line, as in the
/// file.
pub fn numbers(run: &Path) -> Vec<String> {
    const KEYS: [&str; 9] = [
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "val_loss",
        "val_accuracy",
        "val_row_accuracy",
    ];
    let of = |line: &Value| {
        let numbers = KEYS
            .iter()
            .filter_map(|key| Some(format!("{key}={}", line.get(key)?)));
        numbers.collect::<Vec<_>>().join(" ")
    };
    lines(run).iter().map(of).collect()
}

/// The training losses by step.
pub fn losses(run: &Path) -> Vec<f64> {
    let lines = lines(run);
    lines
        .iter()
        .filter_map(|line| line["loss"].as_f64())
        .collect()
}

/// The last step that a run recorded.
pub fn last_step(run: &Path) -> usize {
    let lines = lines(run);
    let steps = lines.iter().filter_map(|line| line["step"].as_u64());
    steps.max().unwrap_or(0) as usize
}

/// The names in the folder of checkpoints, hidden ones included.
pub fn checkpoints(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else {
        return Vec::new();
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    let mut names: Vec<String> = names
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A run of the program in the background of a test.
pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts the program with these arguments and environment variables; its output goes into
    /// `log`.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start(arguments: &[&str], environment: &[(&str, &str)], log: &Path) -> Self {
        let file = fs::File::create(log).expect("a temporary folder is writable");
        let other = file.try_clone().expect("a file has two handles");
        let child = Command::new(binary())
            .args(arguments)
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(other)
            .spawn()
            .expect("the program starts");
        Self {
            child,
            log: log.into(),
        }
    }

    /// The output so far.
    pub fn text(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until `happened` is true or the program ends, and returns which.
    ///
    /// # Panics
    ///
    /// If neither happens within two minutes.
    pub fn wait_until(&mut self, happened: impl Fn() -> bool) -> bool {
        let started = Instant::now();
        loop {
            if happened() {
                return true;
            }
            if self
                .child
                .try_wait()
                .expect("a child can be waited for")
                .is_some()
            {
                return happened();
            }
            assert!(
                started.elapsed() < Duration::from_secs(120),
                "nothing happens:\n{}",
                self.text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal (`INT`, `TERM`).
    ///
    /// # Panics
    ///
    /// If the signal cannot be sent.
    #[cfg(unix)]
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill")
            .args([&format!("-{name}"), &pid])
            .status();
        assert!(sent.expect("kill is there").success(), "kill -{name}");
    }

    /// Kills it as a power failure would, and returns whether it was still running.
    ///
    /// # Panics
    ///
    /// If it cannot be killed.
    pub fn kill(mut self) -> bool {
        let running = self
            .child
            .try_wait()
            .expect("a child can be waited for")
            .is_none();
        // SIGKILL on Unix. An error means that the process has just ended.
        let _ = self.child.kill();
        self.child.wait().expect("a child can be waited for");
        running
    }

    /// Waits for its end and returns the exit code and the output.
    ///
    /// # Panics
    ///
    /// If it does not end within five minutes.
    pub fn end(mut self) -> crate::program::Outcome {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(
                started.elapsed() < Duration::from_secs(300),
                "it does not end:\n{}",
                self.text()
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        crate::program::Outcome {
            code: status.code(),
            text: self.text(),
        }
    }
}
