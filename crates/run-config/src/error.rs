//! What can be wrong with a configuration.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

use llama_burn::limited::clipped;

/// Why there is no valid configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The file is not text.
    #[error("{path}:{line}: this is not UTF-8 text", path = path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The first line that is not UTF-8.
        line: usize,
    },
    /// The file is not valid TOML, JSON or YAML.
    #[error("{file} is not valid {format}:{}", list(errors))]
    Syntax {
        /// The file.
        file: String,
        /// `TOML`, `JSON` or `YAML`.
        format: &'static str,
        /// Every error that the parser found.
        errors: Vec<SyntaxError>,
    },
    /// The file holds several runs and none was named.
    #[error("{file} holds {} runs; name one with --run NAME:{}", names.len(), list_names(names))]
    RunNeeded {
        /// The file.
        file: String,
        /// Its runs.
        names: Vec<String>,
    },
    /// The file has no run of this name.
    #[error(
        "{file} holds no run {run:?}{}; its runs are:{}",
        did_you_mean(nearest),
        list_names(names)
    )]
    UnknownRun {
        /// The file.
        file: String,
        /// The name asked for.
        run: String,
        /// The most similar name, if one is similar.
        nearest: Option<String>,
        /// The file's runs.
        names: Vec<String>,
    },
    /// A run was named, but the file holds one without a name.
    #[error("{file} holds one run that has no name; leave out --run {run}")]
    UnnamedRun {
        /// The file.
        file: String,
        /// The name asked for.
        run: String,
    },
    /// The file is the `config.json` of a model.
    #[error(
        "{file} is a model's config.json, not the configuration of a run; `plan --config {file}` plans that model, and \
         --set base_model=FOLDER names a model's folder"
    )]
    OfModel {
        /// The file.
        file: String,
    },
    /// Keys or values are wrong.
    #[error(transparent)]
    Invalid(#[from] Problems),
}

/// A place where a file cannot be parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntaxError {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// The parser's message.
    pub message: String,
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "line {}, column {}: {}",
            self.line, self.column, self.message
        )
    }
}

/// One wrong key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `file:line`, `file`, or `--set`.
    pub location: String,
    /// The key.
    pub key: String,
    /// The value as given; `None` for a key that is missing.
    pub value: Option<String>,
    /// What would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, shown(&self.key))?;
        if let Some(value) = &self.value {
            write!(f, " = {}", shown(value))?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Everything that is wrong with a configuration, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration has {}:{}", count(.0.len()), list(.0))]
pub struct Problems(
    /// The problems; at least one.
    pub Vec<Problem>,
);

fn count(problems: usize) -> String {
    match problems {
        1 => "a problem".into(),
        several => format!("{several} problems"),
    }
}

/// What a user wrote (a key, a value, a name), shortened for a message. The words of the message itself, with the remedy,
/// are never cut.
pub(super) fn shown(text: &str) -> Cow<'_, str> {
    clipped(text, 200)
}

/// The first items: a damaged file can have thousands.
fn list(items: &[impl fmt::Display]) -> String {
    const MOST: usize = 40;
    // Far longer than any message of this program; only a parser's message about a damaged file could be.
    const LONGEST: usize = 4000;
    let first = items.iter().take(MOST);
    let mut text: String = first
        .map(|item| format!("\n  {}", clipped(&item.to_string(), LONGEST)))
        .collect();
    if items.len() > MOST {
        text += &format!("\n  and {} more", items.len() - MOST);
    }
    text
}

fn list_names(names: &[String]) -> String {
    let names: Vec<Cow<str>> = names.iter().map(|name| shown(name)).collect();
    list(&names)
}

fn did_you_mean(nearest: &Option<String>) -> String {
    match nearest {
        Some(name) => format!(" (did you mean {name:?}?)"),
        None => String::new(),
    }
}

/// The known name most similar to `name`, if it is similar enough for a typing error.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| {
            let similarity = strsim::jaro_winkler(&name.to_lowercase(), &candidate.to_lowercase());
            (similarity, candidate)
        })
        .filter(|(similarity, _)| *similarity > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_error_finds_its_name_and_noise_finds_none() {
        let known = ["learning_rate", "lora_r", "batch_size"];
        let nearest = |name| nearest(name, known.into_iter());
        assert_eq!(nearest("learning_rat"), Some("learning_rate"));
        assert_eq!(nearest("Batchsize"), Some("batch_size"));
        assert_eq!(nearest("lora_rank"), Some("lora_r"));
        assert_eq!(nearest("zebra"), None);
    }

    #[test]
    fn a_long_value_is_cut_and_its_remedy_is_not() {
        let problem = Problem {
            location: "x.toml:3".into(),
            key: "a".into(),
            value: Some("y".repeat(10_000)),
            message: format!("{}; remove the key", "z".repeat(500)),
        };
        let text = Problems(vec![problem]).to_string();
        assert!(text.contains("y… (10000 characters): z"), "{text}");
        assert!(text.ends_with("z; remove the key"), "{text}");
    }

    #[test]
    fn problems_are_listed_one_per_line() {
        let problem = |key: &str, value: Option<&str>| Problem {
            location: "x.toml:3".into(),
            key: key.into(),
            value: value.map(String::from),
            message: "must be 1".into(),
        };
        let problems = Problems(vec![problem("a", Some("0")), problem("b", None)]);
        assert_eq!(
            problems.to_string(),
            "the configuration has 2 problems:\n  x.toml:3: a = 0: must be 1\n  x.toml:3: b: must be 1"
        );
    }
}
