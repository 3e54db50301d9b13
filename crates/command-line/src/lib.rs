//! What every program of this workspace does around its commands: the screen, the log, errors and
//! exit codes. Wrong usage is clap's: it exits with code 2.

use std::error::Error;
use std::process::ExitCode;

use terminal::{Screen, ScreenKind};

/// Characters of an error that are printed. Some causes quote a whole file.
const LONGEST_ERROR: usize = 10_000;

/// Runs a program's command and returns its exit code, which is 1 for an error.
///
/// See [`run_with_codes`].
pub fn run<E: AsRef<dyn Error>>(command: impl FnOnce(Screen) -> Result<ExitCode, E>) -> ExitCode {
    run_with_codes(command, |_| ExitCode::FAILURE)
}

/// Runs a program's command; `code_of` returns the exit code of an error.
///
/// The command receives the screen on standard output. Log lines from `RUST_LOG`'s level on (`warn`
/// by default) are printed above the screen's progress bars. An error is printed once, on standard
/// error after `error: `, with all its causes.
pub fn run_with_codes<E: AsRef<dyn Error>>(
    command: impl FnOnce(Screen) -> Result<ExitCode, E>,
    code_of: impl FnOnce(&E) -> ExitCode,
) -> ExitCode {
    let screen = Screen::new(ScreenKind::detect());
    let filter = env_logger::Env::default().default_filter_or("warn");
    let logger = env_logger::Builder::from_env(filter).build();
    // This fails only if a logger is already installed.
    let _ = screen.install_logger(logger);
    // The screen is gone, with its progress bars, before the error is printed.
    match command(screen) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", whole_chain(error.as_ref()));
            code_of(&error)
        }
    }
}

/// The error with its causes; a cause that a message above it already quotes is left out.
fn whole_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        let message = below.to_string();
        if !text.contains(&message) {
            text += &format!(": {message}");
        }
        cause = below.source();
    }
    llama_burn::limited::clipped(&text, LONGEST_ERROR).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message and its cause.
    #[derive(Debug, thiserror::Error)]
    #[error("{message}")]
    struct Failure {
        message: String,
        source: Option<Box<Failure>>,
    }

    impl AsRef<dyn Error> for Failure {
        fn as_ref(&self) -> &(dyn Error + 'static) {
            self
        }
    }

    /// An error whose causes have these messages, the outermost first.
    fn chain(messages: &[&str]) -> Failure {
        let (message, causes) = messages.split_first().expect("at least one message");
        Failure {
            message: (*message).into(),
            source: (!causes.is_empty()).then(|| Box::new(chain(causes))),
        }
    }

    #[test]
    fn every_cause_is_printed_once() {
        let error = chain(&["cannot read a: no such file", "no such file", "errno 2"]);
        assert_eq!(whole_chain(&error), "cannot read a: no such file: errno 2");
    }

    #[test]
    fn an_error_that_quotes_a_whole_file_is_cut() {
        let text = whole_chain(&chain(&[&"x".repeat(LONGEST_ERROR + 1)]));
        assert!(text.ends_with("… (10001 characters)"), "{}", text.len());
    }

    #[test]
    fn the_exit_code_is_the_commands_or_the_errors() {
        let shown = |code: ExitCode| format!("{code:?}");
        let done = run(|_| Ok::<_, Failure>(ExitCode::from(75)));
        assert_eq!(shown(done), shown(ExitCode::from(75)));
        let failed = run(|_| Err(chain(&["no"])));
        assert_eq!(shown(failed), shown(ExitCode::FAILURE));
        let code_of = |error: &Failure| ExitCode::from(error.message.len() as u8);
        let failed = run_with_codes(|_| Err(chain(&["no", "cause"])), code_of);
        assert_eq!(shown(failed), shown(ExitCode::from(2)));
    }
}
