//! Targets as FinLoRA reads them.
//!
//! It reads its files with `pandas.read_json(lines=True)` (2.2.2) and compares `str(target)`.
//! pandas converts a column of strings that are all numbers: `"12.50"` becomes `12.5`, and `"42"`
//! becomes `42.0` if another example has a fraction.

use std::borrow::Cow;

use data::python_float;

/// Floats from here on do not fit `int64`.
const BEYOND_INTEGERS: f64 = 9_223_372_036_854_775_808.0;

/// The type that pandas gives to a file's targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    /// The texts themselves.
    Texts,
    /// 64-bit integers.
    Integers,
    /// 64-bit floats.
    Floats,
}

impl Column {
    /// What the targets of a whole file are.
    pub fn of(targets: &[String]) -> Self {
        let numbers: Option<Vec<f64>> = targets.iter().map(|target| number(target)).collect();
        let is_integer = |number: &f64| number.fract() == 0.0 && number.abs() < BEYOND_INTEGERS;
        match numbers {
            None => Self::Texts,
            Some(numbers) if numbers.iter().all(is_integer) => Self::Integers,
            Some(_) => Self::Floats,
        }
    }

    /// `str` of a target of the file.
    pub fn read<'a>(self, target: &'a str) -> Cow<'a, str> {
        match (self, number(target)) {
            (Self::Integers, Some(number)) => (number as i64).to_string().into(),
            (Self::Floats, Some(number)) => python_float(number).into(),
            _ => target.into(),
        }
    }
}

/// Python's `float(text)`, except for digits that are not ASCII.
fn number(text: &str) -> Option<f64> {
    let text = text.trim_matches(super::super::labels::is_python_space);
    if !text.contains('_') {
        return text.parse().ok();
    }
    let bytes = text.as_bytes();
    let is_digit = |index: usize| bytes.get(index).is_some_and(u8::is_ascii_digit);
    let between_digits = |index: usize| index > 0 && is_digit(index - 1) && is_digit(index + 1);
    let mut underscores = text.match_indices('_');
    if underscores.all(|(index, _)| between_digits(index)) {
        text.replace('_', "").parse().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each case is what pandas 2.2.2 returned for a file with these targets.
    #[test]
    fn targets_are_read_as_pandas_reads_them() {
        for (targets, read) in [
            (["1", "2.50"], ["1.0", "2.5"]),
            (["1.0", "2.0"], ["1", "2"]),
            (["1e5", "2"], ["100000", "2"]),
            (["1_0", " 2"], ["10", "2"]),
            (["nan", "2"], ["nan", "2.0"]),
            (["infinity", "1"], ["inf", "1.0"]),
            (["1e400", "2"], ["inf", "2.0"]),
            (["", "2"], ["", "2"]),
            (["1,000", "2"], ["1,000", "2"]),
            (["5%", "1"], ["5%", "1"]),
            (["0x10", "1"], ["0x10", "1"]),
            (
                ["12345678901234567890", "2"],
                ["1.2345678901234567e+19", "2.0"],
            ),
            (["9007199254740993", "2"], ["9007199254740992", "2"]),
            (["007", "2"], ["7", "2"]),
            (["-0", "0.0"], ["0", "0"]),
            (["1e-7", "0.5"], ["1e-07", "0.5"]),
            (["1e16", "5"], ["10000000000000000", "5"]),
            (["1e16", "0.5"], ["1e+16", "0.5"]),
            (["True", "False"], ["True", "False"]),
        ] {
            let targets = targets.map(String::from);
            let column = Column::of(&targets);
            let ours = targets.each_ref().map(|target| column.read(target));
            assert_eq!(ours, read, "{targets:?}");
        }
    }
}
