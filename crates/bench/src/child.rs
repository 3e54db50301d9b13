//! A contender's process, as seen from the benchmark.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{self, ChildStdin, ChildStdout, Stdio};

use super::error::BenchError;
use super::protocol::{Answer, Command, Contender, WorkerSpec};

/// The option, without its dashes, that makes this program a worker; the file of its specification
/// follows.
pub const WORKER: &str = "worker";

/// The script that runs PEFT.
const PEFT_WORKER: &str = include_str!("peft_worker.py");

/// A running contender; dropping it ends the process.
pub(super) struct Child {
    name: String,
    process: process::Child,
    input: ChildStdin,
    answers: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Child {
    /// Starts a contender. Its specification and its standard error go to `folder`, under `id`.
    ///
    /// # Errors
    ///
    /// If a file cannot be written or the program cannot be started.
    pub fn start(
        name: &str,
        id: &str,
        spec: &WorkerSpec,
        folder: &Path,
        python: Option<&Path>,
    ) -> Result<Self, BenchError> {
        let spec_path = folder.join(format!("{id}.json"));
        let text = serde_json::to_string(spec).map_err(|error| BenchError::Protocol {
            name: name.into(),
            line: id.into(),
            reason: error.to_string(),
        })?;
        durable::write_atomically(&spec_path, text.as_bytes())?;
        let log = folder.join(format!("{id}.log"));
        let errors = File::create(&log).map_err(BenchError::io("write", &log))?;
        let mut command = match (&spec.contender, python) {
            (Contender::Peft(_), Some(python)) => {
                let script = folder.join("peft_worker.py");
                durable::write_atomically(&script, PEFT_WORKER.as_bytes())?;
                let mut command = process::Command::new(python);
                command.arg(script).arg("--spec").env("HF_HUB_OFFLINE", "1");
                command
            }
            (Contender::Peft(_), None) => return Err(BenchError::NotHere("PEFT without --peft")),
            _ => {
                let program = std::env::current_exe();
                let program = program.map_err(BenchError::io("find", "this program"))?;
                let mut command = process::Command::new(program);
                command.arg(format!("--{WORKER}"));
                command
            }
        };
        command
            .arg(&spec_path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let program = PathBuf::from(command.get_program());
        let mut process = command.spawn().map_err(BenchError::io("start", program))?;
        let (Some(input), Some(answers)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(BenchError::NotHere("a process without pipes"));
        };
        Ok(Self {
            name: name.into(),
            process,
            input,
            answers: BufReader::new(answers),
            log,
        })
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    ///
    /// The contender's error; that it ended; that its answer is not part of the protocol.
    pub fn ask(&mut self, command: &Command) -> Result<Answer, BenchError> {
        let line = serde_json::to_string(command).map_err(|error| self.unreadable("", &error))?;
        let mut answer = String::new();
        // A process that has ended closes both pipes. The reason is in its log and its exit status.
        let sent = writeln!(self.input, "{line}").and_then(|()| self.input.flush());
        let read = self.answers.read_line(&mut answer);
        if answer.is_empty() {
            log::debug!("{}: {sent:?}, {read:?}", self.name);
            return Err(self.ended());
        }
        match serde_json::from_str(&answer) {
            Ok(Answer::Error { message }) => Err(BenchError::Contender {
                name: self.name.clone(),
                message,
            }),
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.unreadable(&answer, &error)),
        }
    }

    /// An answer of another kind than expected.
    pub fn unexpected(&self, answer: &Answer) -> BenchError {
        BenchError::Protocol {
            name: self.name.clone(),
            line: cut(&format!("{answer:?}")),
            reason: "it answers another command".into(),
        }
    }

    fn unreadable(&self, line: &str, error: &serde_json::Error) -> BenchError {
        BenchError::Protocol {
            name: self.name.clone(),
            line: cut(line),
            reason: error.to_string(),
        }
    }

    fn ended(&mut self) -> BenchError {
        let how = match self.process.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().find(|line| !line.trim().is_empty());
        BenchError::Ended {
            name: self.name.clone(),
            how,
            log: self.log.clone(),
            tail: last.map_or_else(String::new, |line| format!(": {}", cut(line.trim()))),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // A process that has ended already is not an error, and neither is one that does not read.
        let quit = serde_json::to_string(&Command::Quit).unwrap_or_default();
        let _ = writeln!(self.input, "{quit}").and_then(|()| self.input.flush());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn cut(line: &str) -> String {
    line.chars().take(200).collect()
}
