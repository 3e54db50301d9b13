//! The raw configuration: the keys of one run with their values and where each was written.

use std::path::Path;

use toml::de::DeTable;

use super::error::{ConfigError, Problem, SyntaxError, nearest, shown};
use super::keys::excluded_by;
use super::kinds::NONE;
use super::value::{Entry, Value, line_and_column};
use super::{EMBEDDED, Source, yaml};

/// The place of the keys of the built-in configuration, in messages.
pub(super) const BUILT_IN: &str = "the built-in configuration";
/// The place of the keys that are set on the command line.
pub(super) const SET: &str = "--set";

/// The language of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Json,
    Toml,
    /// An axolotl file.
    Yaml,
}

impl Language {
    fn name(self) -> &'static str {
        match self {
            Self::Json => "JSON",
            Self::Toml => "TOML",
            Self::Yaml => "YAML",
        }
    }
}

/// Each unknown key is compared with all known ones, so their number is limited.
const MOST_KEYS: usize = 1000;

/// One key with its value and where it was written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RawEntry {
    pub key: String,
    pub value: Value,
    /// `file:line`, `file`, or `--set`.
    pub location: String,
}

/// The keys of one run; nothing about them is checked yet.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RawConfig {
    pub entries: Vec<RawEntry>,
    pub source: Source,
    /// The file, for messages.
    pub file: String,
    /// The name of the run: its name in the file, else that of the file.
    pub name: String,
    /// Whether the file is JSON.
    pub is_json: bool,
}

impl RawConfig {
    /// Reads the text of a file and takes the run of this name.
    pub fn parse(text: &str, path: Option<&Path>, run: Option<&str>) -> Result<Self, ConfigError> {
        // Editors on Windows begin a file with a byte order mark, which neither format allows.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let file = match path {
            Some(path) => path.display().to_string(),
            None => BUILT_IN.into(),
        };
        let extension = path
            .and_then(Path::extension)
            .and_then(|extension| extension.to_str());
        let language = match extension.map(str::to_lowercase).as_deref() {
            Some("json") => Language::Json,
            Some("toml") => Language::Toml,
            Some("yml" | "yaml") => Language::Yaml,
            // No TOML document starts with a brace.
            _ if text.trim_start().starts_with('{') => Language::Json,
            _ => Language::Toml,
        };
        let table = match language {
            Language::Json => json_table(text),
            Language::Toml => toml_table(text),
            Language::Yaml => yaml::table(text).map_err(|error| vec![error]),
        };
        let table = table.map_err(|errors| ConfigError::Syntax {
            file: file.clone(),
            format: language.name(),
            errors,
        })?;
        let (run, table) = match (language, run) {
            // An axolotl file always holds one run.
            (Language::Yaml, None) => (None, table),
            (Language::Yaml, Some(run)) => {
                let run = run.into();
                return Err(ConfigError::UnnamedRun { file, run });
            }
            _ => pick_run(table, run, &file)?,
        };
        if table.len() > MOST_KEYS {
            let message = format!(
                "the run has {} keys; at most {MOST_KEYS} are read, and docs/configuration.md lists the known ones",
                table.len()
            );
            return Err(ConfigError::Syntax {
                file,
                format: "configuration",
                errors: vec![SyntaxError {
                    line: 1,
                    column: 1,
                    message,
                }],
            });
        }
        let stem = path
            .and_then(Path::file_stem)
            .and_then(|stem| stem.to_str());
        let name = run
            .clone()
            .unwrap_or_else(|| stem.unwrap_or(EMBEDDED).into());
        let entries = table.into_iter().map(|entry| RawEntry {
            key: entry.key,
            value: entry.value,
            location: match entry.line {
                Some(line) => format!("{file}:{line}"),
                None => file.clone(),
            },
        });
        Ok(Self {
            entries: entries.collect(),
            source: Source {
                file: path.map(Path::to_path_buf),
                run,
                is_axolotl: language == Language::Yaml,
                ..Source::default()
            },
            file,
            name,
            is_json: language == Language::Json,
        })
    }

    /// Applies `KEY=VALUE` overrides to the keys of the file; of several for one key, the last is used. Returns a problem
    /// for each override that is not of this form.
    pub fn apply(&mut self, overrides: &[String]) -> Vec<Problem> {
        let mut problems = Vec::new();
        for text in overrides {
            let Some((key, value)) = key_and_value(text) else {
                problems.push(Problem {
                    location: SET.into(),
                    key: text.clone(),
                    value: None,
                    message: "must have the form KEY=VALUE, as in --set lora_r=8".into(),
                });
                continue;
            };
            let entry = RawEntry {
                key,
                value,
                location: SET.into(),
            };
            if let Some(rival) = rival(&entry) {
                self.entries
                    .retain(|present| present.key != rival || present.location == SET);
            }
            match self
                .entries
                .iter_mut()
                .find(|present| present.key == entry.key)
            {
                Some(present) => *present = entry,
                None => self.entries.push(entry),
            }
        }
        problems
    }
}

/// The key that an override takes back: a file's `warmup_ratio` must not forbid `--set warmup_steps=10`.
fn rival(entry: &RawEntry) -> Option<&'static str> {
    let is_off = match &entry.value {
        Value::Integer(0) | Value::Null => true,
        Value::Float(number) => *number == 0.0,
        Value::String(word) => word == NONE,
        _ => false,
    };
    excluded_by(&entry.key).filter(|_| !is_off)
}

/// The key and the value of an override; `None` for one that has no key.
pub(super) fn key_and_value(text: &str) -> Option<(String, Value)> {
    let (key, value) = text.split_once('=')?;
    let key = Some(key.trim()).filter(|key| !key.is_empty())?;
    Some((key.into(), override_value(value.trim())))
}

/// The value of an override: TOML if it is valid TOML, else the text itself, so that paths need no quotes.
fn override_value(text: &str) -> Value {
    let document = format!("value = {text}");
    let parsed =
        DeTable::parse(&document).map(|table| Value::from_toml(table.get_ref(), &document));
    match parsed {
        // More than one entry: the text had a line break and further keys in it.
        Ok(mut entries) if entries.len() == 1 => entries.remove(0).value,
        _ => Value::String(text.into()),
    }
}

fn toml_table(text: &str) -> Result<Vec<Entry>, Vec<SyntaxError>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Ok(Value::from_toml(table.get_ref(), text));
    }
    let errors = errors.iter().map(|error| {
        let (line, column) = line_and_column(text, error.span().map_or(0, |span| span.start));
        SyntaxError {
            line,
            column,
            message: error.message().trim().replace('\n', "; "),
        }
    });
    let mut errors: Vec<SyntaxError> = errors.collect();
    errors.sort_by_key(|error| (error.line, error.column));
    Err(errors)
}

fn json_table(text: &str) -> Result<Vec<Entry>, Vec<SyntaxError>> {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Table(entries)) => Ok(entries),
        Ok(other) => Err(vec![SyntaxError {
            line: 1,
            column: 1,
            message: format!(
                "expected an object {{ … }} of keys, got {}",
                shown(&other.to_string())
            ),
        }]),
        Err(error) => {
            let position = format!(" at line {} column {}", error.line(), error.column());
            Err(vec![SyntaxError {
                line: error.line(),
                column: error.column(),
                message: error.to_string().replace(&position, ""),
            }])
        }
    }
}

/// The name of the run, if it has one, and its keys. A file whose values are all tables holds named runs.
fn pick_run(
    table: Vec<Entry>,
    run: Option<&str>,
    file: &str,
) -> Result<(Option<String>, Vec<Entry>), ConfigError> {
    let runs: Option<Vec<(String, Vec<Entry>)>> = table
        .iter()
        .map(|entry| match &entry.value {
            Value::Table(entries) => Some((entry.key.clone(), entries.clone())),
            _ => None,
        })
        .collect();
    let Some(mut runs) = runs.filter(|runs| !runs.is_empty()) else {
        return match run {
            None => Ok((None, table)),
            Some(run) => Err(ConfigError::UnnamedRun {
                file: file.into(),
                run: run.into(),
            }),
        };
    };
    let names = || {
        runs.iter()
            .map(|(name, _)| name.clone())
            .collect::<Vec<_>>()
    };
    let index = match run {
        None if runs.len() == 1 => 0,
        None => {
            return Err(ConfigError::RunNeeded {
                file: file.into(),
                names: names(),
            });
        }
        Some(run) => match runs.iter().position(|(name, _)| name == run) {
            Some(index) => index,
            None => {
                let known = runs.iter().map(|(name, _)| name.as_str());
                return Err(ConfigError::UnknownRun {
                    file: file.into(),
                    run: run.into(),
                    nearest: nearest(run, known).map(String::from),
                    names: names(),
                });
            }
        },
    };
    let (name, entries) = runs.swap_remove(index);
    Ok((Some(name), entries))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_RUNS: &str = r#"{"sentiment_r8": {"lora_r": 8}, "headline_r4": {"lora_r": 4}}"#;

    fn parse(text: &str, path: &str, run: Option<&str>) -> Result<RawConfig, ConfigError> {
        RawConfig::parse(text, Some(Path::new(path)), run)
    }

    fn keys(raw: &RawConfig) -> Vec<String> {
        let shown = |entry: &RawEntry| format!("{} {} {}", entry.location, entry.key, entry.value);
        raw.entries.iter().map(shown).collect()
    }

    #[test]
    fn the_format_is_detected_from_the_extension_else_from_the_first_character() {
        for (text, path) in [
            ("lora_r = 8", "a.toml"),
            ("lora_r = 8", "a"),
            ("{\"lora_r\": 8}", "a.JSON"),
            (" {\"lora_r\": 8}", "a.conf"),
            ("\u{feff}{\"lora_r\": 8}", "a.json"),
        ] {
            let raw = parse(text, path, None).unwrap();
            assert_eq!(raw.entries[0].value, Value::Integer(8), "{text} in {path}");
            assert_eq!(raw.name, "a");
        }
    }

    #[test]
    fn a_run_is_picked_by_name_in_json_and_toml() {
        let raw = parse(TWO_RUNS, "runs.json", Some("headline_r4")).unwrap();
        assert_eq!(keys(&raw), ["runs.json lora_r 4"]);
        assert_eq!(raw.name, "headline_r4");
        let toml = "[sentiment_r8]\nlora_r = 8\n[headline_r4]\nlora_r = 4";
        let raw = parse(toml, "runs.toml", Some("headline_r4")).unwrap();
        assert_eq!(keys(&raw), ["runs.toml:4 lora_r 4"]);
        let one = parse("[only]\nlora_r = 3", "runs.toml", None).unwrap();
        assert_eq!(one.source.run.as_deref(), Some("only"));
    }

    #[test]
    fn several_runs_and_no_name_lists_them() {
        let error = parse(TWO_RUNS, "runs.json", None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "runs.json holds 2 runs; name one with --run NAME:\n  sentiment_r8\n  headline_r4"
        );
    }

    #[test]
    fn a_mistyped_run_finds_the_nearest() {
        let error = parse(TWO_RUNS, "runs.json", Some("sentimet_r8"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("did you mean \"sentiment_r8\"?"), "{error}");
        let error = parse("lora_r = 8", "a.toml", Some("x"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("leave out --run x"), "{error}");
    }

    #[test]
    fn overrides_are_toml_or_else_strings_and_the_last_wins() {
        let mut raw = parse("lora_r = 8\nseed = 1", "a.toml", None).unwrap();
        let sets = [
            "lora_r=4",
            "learning_rate = 1e-4",
            "base_model=models/a-b",
            "target_modules=[\"q_proj\"]",
            "prompt_template=a=b",
            "lora_r=2",
            "seed=1\nlora_r=9",
        ];
        assert!(raw.apply(&sets.map(String::from)).is_empty());
        assert_eq!(
            keys(&raw),
            [
                "--set lora_r 2",
                "--set seed \"1\\nlora_r=9\"",
                "--set learning_rate 0.0001",
                "--set base_model \"models/a-b\"",
                "--set target_modules [\"q_proj\"]",
                "--set prompt_template \"a=b\"",
            ]
        );
        let problems = raw.apply(&["lora_r".into(), "=3".into()]);
        assert_eq!(problems.len(), 2);
        assert!(problems[0].to_string().contains("KEY=VALUE"));
    }

    #[test]
    fn an_override_takes_back_the_key_that_it_replaces() {
        let after = |set: &str| {
            let text = "warmup_ratio = 0.1\nval_dataset_path = \"v\"";
            let mut raw = parse(text, "a.toml", None).unwrap();
            assert!(raw.apply(&[set.into()]).is_empty());
            keys(&raw).join(", ")
        };
        assert_eq!(
            after("warmup_steps=5"),
            "a.toml:2 val_dataset_path \"v\", --set warmup_steps 5"
        );
        assert_eq!(
            after("val_set_size=9"),
            "a.toml:1 warmup_ratio 0.1, --set val_set_size 9"
        );
        assert!(after("val_set_size=0").contains("val_dataset_path"));
        assert!(after("warmup_steps=0").contains("warmup_ratio"));
    }

    #[test]
    fn every_syntax_error_has_a_position() {
        let error = parse("lora_r = \nseed 3\nbatch_size = 8", "a.toml", None).unwrap_err();
        let ConfigError::Syntax { errors, format, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(*format, "TOML");
        let lines: Vec<usize> = errors.iter().map(|error| error.line).collect();
        assert_eq!((lines[0], lines[lines.len() - 1]), (1, 2), "{error}");
        let error = parse("{\"lora_r\": 8,\n}", "a.json", None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("a.json is not valid JSON:\n  line 2, column 1"),
            "{error}"
        );
        let error = parse("[1]", "a.json", None).unwrap_err().to_string();
        assert!(error.contains("expected an object"), "{error}");
        let error = parse("seed = 1\nseed = 2", "a.toml", None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
