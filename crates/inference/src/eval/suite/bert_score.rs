//! BERTScore with the usual program, Tiger Zhang's `bert-score` (package bert-score 0.3.13): its
//! files, its command, its run.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde::Serialize;

use durable::{WriteError, write_atomically};

/// The model that FinLoRA computes BERTScore with.
const MODEL: &str = "ProsusAI/finbert";
/// The program's name as a Python module.
const MODULE: &str = "bert_score_cli.score";
/// Characters of the program's own message that are shown.
const MOST_SHOWN: usize = 400;

/// Why BERTScore cannot be computed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries what was run.
pub enum BertScoreError {
    #[error("--bertscore {}: this cannot be started: {source}; give a Python interpreter, as in --bertscore venv/bin/python", python.display())]
    Start {
        python: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "--bertscore {}: this Python cannot import bert_score ({message}); run `{} -m pip install bert-score`, or leave --bertscore \
         out: the command is printed",
        python.display(), python.display()
    )]
    NotInstalled { python: PathBuf, message: String },
    #[error("`{command}` failed: {message}")]
    Failed { command: String, message: String },
    #[error("`{command}` ended without its line \"… P: … R: … F1: …\"; it printed {printed:?}")]
    NoScore { command: String, printed: String },
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// The program's output: means over the examples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(missing_docs)] // BERTScore's three numbers.
pub struct BertScore {
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
}

/// Answers and references of one task, one per line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BertScoreFiles {
    references: PathBuf,
    candidates: PathBuf,
}

impl BertScoreFiles {
    /// Writes `TASK.refs.txt` and `TASK.CONTENDER.hyps.txt`.
    ///
    /// # Errors
    ///
    /// [`BertScoreError::Write`].
    pub fn write(
        folder: &Path,
        task: &str,
        contender: &str,
        references: &[&str],
        answers: &[&str],
    ) -> Result<Self, BertScoreError> {
        let files = Self {
            references: folder.join(format!("{task}.refs.txt")),
            candidates: folder.join(format!("{task}.{contender}.hyps.txt")),
        };
        write_atomically(&files.references, lines(references).as_bytes())?;
        write_atomically(&files.candidates, lines(answers).as_bytes())?;
        Ok(files)
    }

    /// The command for a shell.
    pub fn command(&self) -> String {
        let words = self.arguments().map(|word| quoted(&word).into_owned());
        format!("bert-score {}", words.join(" "))
    }

    /// Runs the program with this Python.
    ///
    /// # Errors
    ///
    /// A Python that cannot be started; a program that fails or prints no score, with its message.
    pub fn run(&self, python: &Path) -> Result<BertScore, BertScoreError> {
        let arguments = self.arguments();
        let arguments = [vec!["-m".into(), MODULE.into()], arguments.to_vec()].concat();
        let words: Vec<Cow<str>> = arguments.iter().map(|word| quoted(word)).collect();
        let command = format!(
            "{} {}",
            quoted(&python.display().to_string()),
            words.join(" ")
        );
        let output = start(python, &arguments)?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            return Err(BertScoreError::Failed {
                command,
                message: ending(&output),
            });
        }
        parse(&printed).ok_or_else(|| BertScoreError::NoScore {
            command,
            printed: shortened(&printed),
        })
    }

    fn arguments(&self) -> [String; 8] {
        let path = |path: &Path| path.display().to_string();
        let (references, candidates) = (path(&self.references), path(&self.candidates));
        [
            "-r",
            &references,
            "-c",
            &candidates,
            "--lang",
            "en",
            "-m",
            MODEL,
        ]
        .map(String::from)
    }
}

/// Checks that this Python has bert-score, before the evaluation starts.
///
/// # Errors
///
/// A Python that cannot be started, or that lacks the package.
pub fn check(python: &Path) -> Result<(), BertScoreError> {
    let output = start(python, &["-c".into(), "import bert_score".into()])?;
    if output.status.success() {
        Ok(())
    } else {
        Err(BertScoreError::NotInstalled {
            python: python.into(),
            message: ending(&output),
        })
    }
}

fn start(python: &Path, arguments: &[String]) -> Result<Output, BertScoreError> {
    let mut command = Command::new(python);
    // The program opens its files in the locale's encoding.
    command.args(arguments).env("PYTHONUTF8", "1");
    command.output().map_err(|source| BertScoreError::Start {
        python: python.into(),
        source,
    })
}

/// The scores of the last line with scores: `… P: 0.9 R: 0.8 F1: 0.85`.
fn parse(printed: &str) -> Option<BertScore> {
    let score = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let behind = |name: &str| {
            let at = words.iter().rposition(|word| *word == name)?;
            words.get(at + 1)?.parse().ok()
        };
        Some(BertScore {
            precision: behind("P:")?,
            recall: behind("R:")?,
            f1: behind("F1:")?,
        })
    };
    printed.lines().rev().find_map(score)
}

/// One line per text, even if the text has several: the program reads one text per line.
fn lines(texts: &[&str]) -> String {
    let line = |text: &&str| format!("{}\n", one_line(text));
    texts.iter().map(line).collect()
}

fn one_line(text: &str) -> String {
    let ends_a_line =
        |character: char| character.is_control() || matches!(character, '\u{2028}' | '\u{2029}');
    text.replace(ends_a_line, " ").trim().to_string()
}

/// A word of a command, quoted for a shell.
fn quoted(word: &str) -> Cow<'_, str> {
    let is_plain = |character: char| character.is_alphanumeric() || "/._-+:@=,".contains(character);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''")).into()
    }
}

/// The end of a failed program's output.
fn ending(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    match last {
        Some(line) => shortened(line.trim()),
        None => output.status.to_string(),
    }
}

fn shortened(text: &str) -> String {
    text.trim().chars().take(MOST_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_several_lines_takes_one() {
        let texts = ["a\r\nb", "", "c\u{2028}d\t", " e\u{85}"];
        assert_eq!(lines(&texts), "a  b\n\nc d\ne\n");
    }

    #[test]
    fn the_programs_last_line_is_read() {
        let printed = "Warning: P: none\nfinbert_L10 P: 0.500000 R: 0.250000 F1: 0.333333\n\n";
        let score = parse(printed).unwrap();
        assert_eq!(
            (score.precision, score.recall, score.f1),
            (0.5, 0.25, 0.333333)
        );
        assert_eq!(parse("P: 1 R: 2"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn the_command_can_be_pasted_into_a_shell() {
        let files = BertScoreFiles {
            references: "my results/t.refs.txt".into(),
            candidates: "out/t.it's.hyps.txt".into(),
        };
        assert_eq!(
            files.command(),
            "bert-score -r 'my results/t.refs.txt' -c 'out/t.it'\\''s.hyps.txt' --lang en -m ProsusAI/finbert"
        );
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = check(Path::new("no/python")).unwrap_err().to_string();
        assert!(
            error.contains("no/python") && error.contains("cannot be started"),
            "{error}"
        );
    }
}
