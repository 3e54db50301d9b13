//! Takes one key after another out of a raw configuration and collects everything that is wrong.

use super::axolotl;
use super::error::{Problem, Problems, nearest};
use super::keys::{KEYS, known_elsewhere};
use super::kinds::{Kind, NONE};
use super::raw::{BUILT_IN, RawConfig, RawEntry};
use super::value::Value;

/// A raw configuration while it is being checked.
pub(super) struct Reader {
    entries: Vec<RawEntry>,
    used: Vec<bool>,
    file: String,
    run_name: String,
    /// Problems, each with the index of its entry: they are listed in the order of the file.
    problems: Vec<(usize, Problem)>,
}

impl Reader {
    pub fn new(raw: RawConfig, problems: Vec<Problem>) -> Self {
        Self {
            used: vec![false; raw.entries.len()],
            entries: raw.entries,
            file: raw.file,
            run_name: raw.name,
            problems: problems
                .into_iter()
                .map(|problem| (usize::MAX, problem))
                .collect(),
        }
    }

    /// The name of the run in its file, else that of the file.
    pub fn run_name(&self) -> &str {
        &self.run_name
    }

    fn index(&self, key: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.key == key)
    }

    /// Whether the key has a value, in the file or among the overrides.
    pub fn has(&self, key: &str) -> bool {
        let index = self.index(key);
        index.is_some_and(|index| self.entries[index].value != Value::Null)
    }

    /// Whether the key has a value other than `"none"`.
    pub fn is_on(&self, key: &str) -> bool {
        let index = self.index(key).filter(|_| self.has(key));
        let off = Value::String(NONE.into());
        index.is_some_and(|index| self.entries[index].value != off)
    }

    /// Whether the key has a value that is not from the built-in configuration.
    pub fn written(&self, key: &str) -> bool {
        let index = self.index(key).filter(|_| self.has(key));
        index.is_some_and(|index| !self.entries[index].location.starts_with(BUILT_IN))
    }

    /// The value of a key; `None` if it is absent or wrong.
    pub fn get<T: 'static>(&mut self, key: &str, kind: &Kind<T>) -> Option<T> {
        let index = self.index(key)?;
        self.used[index] = true;
        let value = self.entries[index].value.clone();
        if value == Value::Null {
            return None;
        }
        match kind.parse(&value) {
            Ok(parsed) => Some(parsed),
            Err(mut right) => {
                if without_quotes(&value).is_some_and(|value| kind.parse(&value).is_ok()) {
                    right.push_str(" (write it without quotes)");
                }
                self.problem(key, &right);
                None
            }
        }
    }

    /// The value of an absent key that must not be absent, which is noted as a problem.
    pub fn required<T: Default>(&mut self, key: &str, allowed: &str) -> T {
        if !self.has(key) {
            self.problem(key, &format!("is missing; it must be {allowed}"));
        }
        T::default()
    }

    /// Notes that this key is wrong.
    pub fn problem(&mut self, key: &str, message: &str) {
        let index = self.index(key);
        let entry = index.map(|index| &self.entries[index]);
        let problem = Problem {
            location: entry.map_or(&self.file, |entry| &entry.location).clone(),
            key: key.into(),
            value: entry.map(|entry| entry.value.to_string()),
            message: message.into(),
        };
        self.problems.push((index.unwrap_or(usize::MAX), problem));
    }

    /// Everything that was wrong, with the keys that are unknown.
    pub fn finish(mut self) -> Result<(), Problems> {
        for index in 0..self.entries.len() {
            if self.used[index] {
                continue;
            }
            let key = self.entries[index].key.clone();
            let known = known_elsewhere(&key).or_else(|| axolotl::known_elsewhere(&key));
            let message = match known.or_else(|| nearest(&key, KEYS.iter().copied())) {
                Some(name) => format!("unknown key; did you mean {name}?"),
                None => "unknown key; docs/configuration.md lists all keys".into(),
            };
            self.problem(&key, &message);
        }
        if self.problems.is_empty() {
            return Ok(());
        }
        self.problems.sort_by_key(|(index, _)| *index);
        Err(Problems(
            self.problems
                .into_iter()
                .map(|(_, problem)| problem)
                .collect(),
        ))
    }
}

/// The number or boolean that a string spells.
fn without_quotes(value: &Value) -> Option<Value> {
    let Value::String(text) = value else {
        return None;
    };
    let integer = text.parse().ok().map(Value::Integer);
    let float = || text.parse().ok().map(Value::Float);
    let boolean = || text.parse().ok().map(Value::Bool);
    integer.or_else(float).or_else(boolean)
}
