//! Runs a section in a process of its own, with a time limit.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::clock::Clock;
use super::error::ReportError;
use super::finding::Finding;
use super::worker::WorkerOptions;

/// How a section's process ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// It finished.
    Done,
    /// Its time limit was reached.
    Stopped,
    /// Something else ended it: a crash inside a driver, or the system when memory was short.
    Died(String),
}

/// The name of a section's process in errors.
const SECTION: &str = "the section";

/// The time between the limit that a section plans with and the end of its process.
const GRACE: Duration = Duration::from_secs(3);

/// Runs a section; its findings go to `found` as they arrive, its standard error to `log`.
///
/// # Errors
///
/// If the process cannot be started.
pub fn run(
    options: &WorkerOptions,
    log: &Path,
    found: &mut dyn FnMut(Finding),
) -> Result<Ended, ReportError> {
    let program = std::env::current_exe().map_err(ReportError::OwnProgram)?;
    let errors = File::create(log).map_err(|source| ReportError::WriteFile {
        path: log.into(),
        source,
    })?;
    let mut command = Command::new(program);
    command
        .args([
            "gpu-report-worker",
            "--section",
            &options.section.to_string(),
        ])
        .args(["--backend", options.backend.name()])
        .args([
            "--seconds",
            &options.limit.saturating_sub(GRACE).as_secs().to_string(),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(errors);
    if options.quick {
        command.arg("--quick");
    }
    watch(command, options.limit, found)
}

/// Starts `command` and reads findings until it ends or `limit` is reached.
fn watch(
    mut command: Command,
    limit: Duration,
    found: &mut dyn FnMut(Finding),
) -> Result<Ended, ReportError> {
    let clock = Clock::new(limit);
    let mut process = command.spawn().map_err(|source| ReportError::Start {
        program: SECTION.into(),
        source,
    })?;
    // Held open: the process ends when this one does.
    let input = process.stdin.take();
    let output = process.stdout.take().ok_or(ReportError::NoOutput)?;
    let (send, lines) = channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    let mut done = false;
    let ended = loop {
        match lines.recv_timeout(clock.remaining()) {
            // Other lines are printed by a driver.
            Ok(line) => match serde_json::from_str(&line) {
                Ok(Finding::Done) => {
                    done = true;
                    break Ended::Done;
                }
                Ok(finding) => found(finding),
                Err(_) => log::debug!("{line}"),
            },
            Err(RecvTimeoutError::Timeout) => break Ended::Stopped,
            Err(RecvTimeoutError::Disconnected) => break Ended::Died(String::new()),
        }
    };
    if ended == Ended::Stopped || done {
        // A process that is done may still hang in a driver's clean-up.
        let _ = process.kill();
    }
    let status = process.wait().map_err(|source| ReportError::Wait {
        program: SECTION.into(),
        source,
    })?;
    drop(input);
    let _ = reader.join();
    Ok(match ended {
        Ended::Died(_) => Ended::Died(status.to_string()),
        other => other,
    })
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::finding::LeftOut;

    fn shell(script: &str, limit: f64) -> (Ended, Vec<Finding>, Duration) {
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut found = Vec::new();
        let clock = Clock::new(Duration::ZERO);
        let limit = Duration::from_secs_f64(limit);
        let ended = watch(command, limit, &mut |finding| found.push(finding)).unwrap();
        (ended, found, clock.elapsed())
    }

    const FINDING: &str = r#"echo '{"left_out":{"what":"a","why":"b"}}'"#;

    #[test]
    fn what_was_found_is_kept_however_the_process_ends() {
        let kept = Finding::LeftOut(LeftOut {
            what: "a".into(),
            why: "b".into(),
        });
        let (ended, found, _) = shell(&format!("echo talk; {FINDING}; echo '\"done\"'"), 60.0);
        assert_eq!((ended, &found[..]), (Ended::Done, &[kept.clone()][..]));
        let (ended, found, _) = shell(&format!("{FINDING}; kill -9 $$"), 60.0);
        assert!(
            matches!(&ended, Ended::Died(how) if how.contains('9')),
            "{ended:?}"
        );
        assert_eq!(found, std::slice::from_ref(&kept));
        let (ended, found, took) = shell(&format!("{FINDING}; exec sleep 60"), 1.0);
        assert_eq!((ended, &found[..]), (Ended::Stopped, &[kept][..]));
        assert!(took < Duration::from_secs(30), "{took:?}");
    }
}
