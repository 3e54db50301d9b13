//! What the value of a key may be: how it is described, read and written.
//!
//! ```text
//! mod.rs      numbers, switches, texts, and what can be made of a kind: optional, "auto"
//! adapter.rs  the kinds of PEFT's keys
//! data.rs     the kinds of the keys of the data
//! ```

mod adapter;
mod data;

use std::path::PathBuf;

use toml::Value as Toml;

use super::choice::Choice;
use super::error::nearest;
use super::value::Value;

pub(super) use adapter::{
    alpha_pattern, exclude_modules, initialization, layers, peft_type, rank_pattern, saved_modules,
    target_modules, trained_tokens,
};
pub(super) use data::{dataset_columns, dataset_format, prompt_template, val_set_size};

/// What a value became, or why it is wrong.
pub(super) type Parsed<T> = Result<T, String>;

type Parse<T> = Box<dyn Fn(&Value) -> Parsed<T>>;
type Write<T> = Box<dyn Fn(&T) -> Toml>;

/// The values that a key may have.
pub(super) struct Kind<T> {
    /// The right values in words, as they follow "must be" in messages.
    pub allowed: String,
    /// Right values of every sort, for tests.
    pub samples: Vec<Toml>,
    parse: Parse<T>,
    write: Write<T>,
}

impl<T: 'static> Kind<T> {
    /// A kind whose `parse` explains itself what is wrong with a value.
    pub fn new(
        allowed: impl Into<String>,
        parse: impl Fn(&Value) -> Parsed<T> + 'static,
        write: impl Fn(&T) -> Toml + 'static,
    ) -> Self {
        Self {
            allowed: allowed.into(),
            samples: Vec::new(),
            parse: Box::new(parse),
            write: Box::new(write),
        }
    }

    /// A kind for whose wrong values there is one message: "must be", and `allowed`.
    fn simple(
        allowed: impl Into<String>,
        parse: impl Fn(&Value) -> Option<T> + 'static,
        write: impl Fn(&T) -> Toml + 'static,
    ) -> Self {
        let allowed = allowed.into();
        let message = must_be(&allowed);
        let parse = move |value: &Value| parse(value).ok_or_else(|| message.clone());
        Self::new(allowed, parse, write)
    }

    /// The same with samples.
    fn with_samples(mut self, samples: impl IntoIterator<Item = impl Into<Toml>>) -> Self {
        self.samples = samples.into_iter().map(Into::into).collect();
        self
    }

    pub fn parse(&self, value: &Value) -> Parsed<T> {
        (self.parse)(value)
    }

    pub fn write(&self, value: &T) -> Toml {
        (self.write)(value)
    }

    /// The same values as another type.
    fn map<U: 'static>(
        self,
        to: impl Fn(T) -> U + 'static,
        from: impl Fn(&U) -> T + 'static,
    ) -> Kind<U> {
        let (parse, write) = (self.parse, self.write);
        Kind {
            allowed: self.allowed,
            samples: self.samples,
            parse: Box::new(move |value| parse(value).map(&to)),
            write: Box::new(move |value| write(&from(value))),
        }
    }

    /// These values, or a word that stands for one more. `is_word` recognizes the value of the word.
    fn or_word<U: 'static>(
        self,
        word: &'static str,
        value_of_word: impl Fn() -> U + 'static,
        to: impl Fn(T) -> U + 'static,
        from: impl Fn(&U) -> Option<T> + 'static,
    ) -> Kind<U> {
        let (parse, write) = (self.parse, self.write);
        let mut samples = self.samples;
        samples.push(word.into());
        Kind {
            allowed: format!("{}, or {word:?}", self.allowed),
            samples,
            parse: Box::new(move |value| match value {
                Value::String(text) if text == word => Ok(value_of_word()),
                other => parse(other)
                    .map(&to)
                    .map_err(|message| format!("{message}, or {word:?}")),
            }),
            write: Box::new(move |value| match from(value) {
                Some(value) => write(&value),
                None => word.into(),
            }),
        }
    }
}

fn must_be(allowed: &str) -> String {
    format!("must be {allowed}")
}

/// What switches an optional key off.
pub(super) const NONE: &str = "none";

/// A kind, or `"none"`.
pub(super) fn optional<T: Clone + 'static>(kind: Kind<T>) -> Kind<Option<T>> {
    kind.or_word(NONE, || None, Some, Clone::clone)
}

/// A kind of lists, or `"none"` for an empty one.
fn none_if_empty<T: Clone + 'static>(kind: Kind<Vec<T>>) -> Kind<Vec<T>> {
    let filled = |list: &Vec<T>| Some(list.clone()).filter(|list| !list.is_empty());
    kind.or_word(NONE, Vec::new, |list| list, filled)
}

/// Examples, tokens, steps: no product of two exceeds 64 bits.
const LARGEST_COUNT: usize = (1 << 31) - 1;

/// A whole number of at least `least`. A float without a fraction counts, as in files that Python wrote.
pub(super) fn whole(least: usize) -> Kind<usize> {
    let samples = [least, least.max(17), 100_000, 2_000_000_000];
    whole_up_to(least, LARGEST_COUNT).with_samples(samples.map(|number| number as i64))
}

/// A whole number in a range.
fn whole_up_to(least: usize, largest: usize) -> Kind<usize> {
    let parse = move |value: &Value| whole_number(value, least, largest);
    let write = |number: &usize| Toml::from(*number as i64);
    Kind::new(format!("a whole number of at least {least}"), parse, write)
}

fn whole_number(value: &Value, least: usize, largest: usize) -> Parsed<usize> {
    let number = match value {
        Value::Integer(number) => usize::try_from(*number).ok(),
        // From 2⁵³ on, a float cannot represent every integer.
        Value::Float(number) if number.fract() == 0.0 && (0.0..9.0e15).contains(number) => {
            Some(*number as usize)
        }
        _ => None,
    };
    match number {
        Some(number) if number > largest => Err(format!("must be at most {largest}")),
        Some(number) if number >= least => Ok(number),
        _ => Err(format!("must be a whole number of at least {least}")),
    }
}

/// The seed of the random numbers.
pub(super) fn seed() -> Kind<u64> {
    whole_up_to(0, usize::MAX)
        .with_samples([0_i64, 42, 9_007_199_254_740_993])
        .map(|number| number as u64, |number| *number as usize)
}

fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(number) => Some(*number as f64),
        Value::Float(number) => Some(*number),
        _ => None,
    }
}

/// A finite number for which `valid` holds.
fn number(allowed: &str, valid: impl Fn(f64) -> bool + 'static) -> Kind<f64> {
    let parse =
        move |value: &Value| float(value).filter(|number| number.is_finite() && valid(*number));
    Kind::simple(allowed, parse, |number| Toml::from(*number))
}

pub(super) fn positive() -> Kind<f64> {
    let samples = [1e-300, 1e-9, 1.2345678901234567e-5, 0.5, 16.0, 1e3];
    number("a number above 0", |x| x > 0.0).with_samples(samples)
}

pub(super) fn not_negative() -> Kind<f64> {
    number("a number of at least 0", |x| x >= 0.0).with_samples([0.0, 0.1, 0.3, 1e3])
}

pub(super) fn fraction() -> Kind<f64> {
    let is_fraction = |x: f64| (0.0..1.0).contains(&x);
    number("a number of at least 0 and below 1", is_fraction).with_samples([0.0, 0.1, 0.9, 0.999])
}

/// A number of bytes: `"8GiB"`, `"24 GB"`, or the number itself.
pub(super) fn bytes() -> Kind<u64> {
    let allowed = "a number of bytes with its unit, as in \"8GiB\" or \"24 GB\"";
    // Less than a mebibyte means that the unit is missing; no device has 2⁵³ bytes.
    let parse = |value: &Value| {
        let bytes = number_of_bytes(value).filter(|bytes| (1048576.0..9.0e15).contains(bytes));
        bytes.map(|bytes| bytes.round() as u64)
    };
    Kind::simple(allowed, parse, |bytes| Toml::from(*bytes as i64)).with_samples(["8GiB", "24 GB"])
}

fn number_of_bytes(value: &Value) -> Option<f64> {
    const UNITS: [(&str, f64); 8] = [
        ("KIB", 1024.0),
        ("MIB", 1048576.0),
        ("GIB", 1073741824.0),
        ("TIB", 1099511627776.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
    ];
    let Value::String(text) = value else {
        return float(value);
    };
    let text = text.trim().to_uppercase();
    let unit = UNITS.iter().find(|(unit, _)| text.ends_with(unit));
    let (digits, factor) = match unit {
        Some((unit, factor)) => (text.trim_end_matches(unit), *factor),
        None => (text.trim_end_matches('B'), 1.0),
    };
    let number = digits.trim().parse::<f64>().ok();
    number.map(|number| number * factor)
}

/// `true` or `false`.
pub(super) fn boolean() -> Kind<bool> {
    let parse = |value: &Value| match value {
        Value::Bool(boolean) => Some(*boolean),
        _ => None,
    };
    Kind::simple("true or false", parse, |boolean| Toml::from(*boolean)).with_samples([true, false])
}

/// A string that is not empty.
pub(super) fn text(allowed: &str) -> Kind<String> {
    let parse = |value: &Value| match value {
        Value::String(text) if !text.trim().is_empty() => Some(text.clone()),
        _ => None,
    };
    Kind::simple(allowed, parse, |text| Toml::from(text.clone())).with_samples([
        "runs/x",
        "a b/'c'",
        "ä/\u{1f600}",
    ])
}

/// The path of a file or folder.
pub(super) fn path(allowed: &str) -> Kind<PathBuf> {
    text(allowed).map(PathBuf::from, |path| path.to_string_lossy().into_owned())
}

/// One of the names of a type's values.
pub(super) fn choice<T: Choice>() -> Kind<T> {
    let names = || T::NAMES.iter().map(|(name, _)| *name);
    let quoted: Vec<String> = names().map(|name| format!("{name:?}")).collect();
    let allowed = format!("one of {}", quoted.join(", "));
    let right = must_be(&allowed);
    let parse = move |value: &Value| {
        let Value::String(text) = value else {
            return Err(right.clone());
        };
        match T::NAMES.iter().find(|(name, _)| name == text) {
            Some((_, value)) => Ok(*value),
            None => Err(match nearest(text, names()) {
                Some(name) => format!("{right}; did you mean {name:?}?"),
                None => right.clone(),
            }),
        }
    };
    Kind::new(allowed, parse, |value: &T| value.name().into()).with_samples(names())
}

/// A choice that also takes `true` or `false`, where `of_boolean` has a value for it.
fn choice_or_boolean<T: Choice>(
    booleans: &'static str,
    of_boolean: impl Fn(bool) -> Option<T> + 'static,
) -> Kind<T> {
    let Kind {
        allowed,
        mut samples,
        parse,
        write,
    } = choice::<T>();
    let values = [true, false].into_iter();
    let accepted = values.filter(|boolean| of_boolean(*boolean).is_some());
    samples.extend(accepted.map(Toml::from));
    Kind {
        allowed: format!("{allowed}, {booleans}"),
        samples,
        parse: Box::new(move |value| match value {
            Value::Bool(boolean) => of_boolean(*boolean).map_or_else(|| parse(value), Ok),
            _ => parse(value),
        }),
        write,
    }
}

/// `gradient_checkpointing`.
pub(super) fn checkpointing() -> Kind<super::Checkpointing> {
    use super::Checkpointing::{Off, On};
    choice_or_boolean("true or false", |on| Some(if on { On } else { Off }))
}

/// `batch_size`: a number, or `"auto"`.
pub(super) fn batch_size() -> Kind<super::BatchSize> {
    use super::BatchSize::{Auto, Rows};
    whole(1).or_word(
        "auto",
        || Auto,
        Rows,
        |size| match size {
            Rows(rows) => Some(*rows),
            Auto => None,
        },
    )
}

/// `quant_bits`.
pub(super) fn quant_bits() -> Kind<u8> {
    let parse = |value: &Value| match whole_number(value, 0, LARGEST_COUNT) {
        Ok(4) => Some(4),
        Ok(8) => Some(8),
        Ok(16) => Some(16),
        _ => None,
    };
    let write = |bits: &u8| Toml::from(i64::from(*bits));
    Kind::simple("4, 8, or 16 (not quantized)", parse, write).with_samples([4, 8, 16])
}
