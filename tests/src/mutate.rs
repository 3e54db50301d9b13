//! Files with deliberate errors: the same ones for the same seed.
//!
//! Some changes are blind (truncation, flipped bits, moved and repeated pieces, bytes that are not
//! text). Most know the format, so that the error is deep inside an otherwise valid file: a count
//! of 2⁶⁴−1, a path that leads out of the folder, ten thousand brackets, a duplicate key.

use lora_core::CounterRng;
use serde_json::Value;

/// A mutator's knowledge of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON value.
    Json,
    /// One JSON value per line.
    JsonLines,
    /// TOML, or other text of lines.
    Lines,
    /// An 8-byte length, a JSON header of that length, data.
    Safetensors,
    /// Numbers, lengths and texts in some order.
    Binary,
}

/// Values that programs do not expect. Not all of them are JSON.
const NASTY: [&str; 44] = [
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1",
    "2",
    "0.5",
    "-0.0",
    "1e308",
    "1e400",
    "-1e400",
    "1e-400",
    "255",
    "65536",
    "2147483648",
    "4294967295",
    "4294967296",
    "268435456",
    "1099511627776",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775809",
    "99999999999999999999999999999999999999999999999999",
    "NaN",
    "Infinity",
    "\"\"",
    "\" \"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"../../../../etc/passwd\"",
    "\"/etc/passwd\"",
    "\"..\"",
    "\"C:\\\\x\"",
    "\"a\\nb\"",
    "\"(a+)+$\"",
    "\"[\"",
    "[]",
    "{}",
    "[[]]",
    "[0, 0, 0, 0, 0, 0, 0, 0]",
    "{\"\": {\"\": {}}}",
];

/// Makes mutated files.
pub struct Mutator {
    rng: CounterRng,
}

impl Mutator {
    /// The mutator of a seed.
    pub fn new(seed: u64) -> Self {
        Self {
            rng: CounterRng::new(seed),
        }
    }

    /// A number below `limit`, which is at least 1.
    fn below(&mut self, limit: usize) -> usize {
        (self.rng.next_u64() % limit.max(1) as u64) as usize
    }

    fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    /// A file like `file` with one to three errors.
    pub fn mutate(&mut self, format: Format, file: &[u8]) -> Vec<u8> {
        let mut mutated = file.to_vec();
        // Blind changes break a format early; every other file has none, so that later stages are
        // reached too.
        let careful = self.one_in(2);
        for _ in 0..1 + self.below(3) {
            mutated = if !careful && self.one_in(2) {
                self.blind(mutated)
            } else {
                self.informed(format, mutated)
            };
        }
        mutated
    }

    fn blind(&mut self, mut file: Vec<u8>) -> Vec<u8> {
        let length = file.len();
        let (from, to) = (self.below(length + 1), self.below(length + 1));
        let (from, to) = (from.min(to), from.max(to));
        match self.below(12) {
            0 => file.truncate(from),
            1 => drop(file.drain(..from)),
            2 => drop(file.drain(from..to.min(from + 64))),
            3 => {
                for _ in 0..1 + self.below(16) {
                    let at = self.below(length);
                    let bit = 1 << self.below(8);
                    file.get_mut(at).into_iter().for_each(|byte| *byte ^= bit);
                }
            }
            4 => {
                let piece = file[from..to.min(from + 256)].to_vec();
                let at = self.below(length + 1);
                file.splice(at..at, piece);
            }
            5 => {
                let noise: Vec<u8> = (0..1 + self.below(64))
                    .map(|_| self.rng.next_u64() as u8)
                    .collect();
                file.splice(from..from, noise);
            }
            6 => {
                let wrong: [&[u8]; 6] = [
                    b"\xff\xfe",
                    b"\xc3\x28",
                    b"\xed\xa0\x80",
                    b"\x00",
                    b"\xf4\x90\x80\x80",
                    b"\xef\xbb\xbf",
                ];
                let wrong = wrong[self.below(wrong.len())];
                file.splice(from..from, wrong.iter().copied());
            }
            7 => {
                let length = 8.min(length - from);
                let number = self.nasty_number().to_le_bytes();
                file[from..from + length].copy_from_slice(&number[..length]);
            }
            8 => file.extend_from_within(from..to),
            9 => file = file[from..].iter().chain(&file[..from]).copied().collect(),
            10 => file[from..to.min(from + 32)].fill(0),
            _ => {
                if self.one_in(4) {
                    file.clear();
                }
                let count = 1 + self.below(100);
                file.splice(
                    from.min(file.len())..from.min(file.len()),
                    std::iter::repeat_n(b' ', count),
                );
            }
        }
        file
    }

    fn nasty_number(&mut self) -> u64 {
        match self.below(8) {
            0 => u64::MAX,
            1 => 1 << 63,
            2 => u64::from(u32::MAX),
            3 => 1 << 40,
            4 => 0,
            5 => 1 << self.below(64),
            6 => u64::MAX - self.below(16) as u64,
            _ => self.below(1 << 20) as u64,
        }
    }

    fn informed(&mut self, format: Format, file: Vec<u8>) -> Vec<u8> {
        match format {
            Format::Json => self.json(&file).unwrap_or_else(|| self.text(file)),
            Format::Lines => self.text(file),
            Format::JsonLines => {
                let mut lines: Vec<Vec<u8>> = file
                    .split(|byte| *byte == b'\n')
                    .map(<[u8]>::to_vec)
                    .collect();
                let at = self.below(lines.len());
                lines[at] = match self.json(&lines[at]) {
                    Some(line) => line,
                    None => self.text(std::mem::take(&mut lines[at])),
                };
                lines.join(&b'\n')
            }
            Format::Safetensors => self.safetensors(file),
            Format::Binary => self.blind(file),
        }
    }

    /// Changes of text with lines, numbers and brackets.
    fn text(&mut self, file: Vec<u8>) -> Vec<u8> {
        let text = String::from_utf8_lossy(&file).into_owned();
        let mut lines: Vec<String> = text.split('\n').map(String::from).collect();
        let at = self.below(lines.len());
        let nasty = NASTY[self.below(NASTY.len())];
        match self.below(6) {
            0 => {
                let line = lines[at].clone();
                lines.insert(at, line);
            }
            1 => {
                let other = self.below(lines.len());
                lines.swap(at, other);
            }
            2 => drop(lines.remove(at)),
            3 => {
                let brackets = self.deep();
                lines[at] = match lines[at].split_once('=') {
                    Some((key, _)) => format!("{key}={brackets}"),
                    None => brackets,
                };
            }
            _ => {
                lines[at] = match lines[at].split_once('=') {
                    Some((key, _)) => format!("{key}= {nasty}"),
                    None => nasty.into(),
                };
            }
        }
        lines.join("\n").into_bytes()
    }

    /// Many brackets, closed or not.
    fn deep(&mut self) -> String {
        let depth = [50, 120, 130, 1000, 10_000, 100_000][self.below(6)];
        let (open, close) = [("[", "]"), ("{\"a\":", "}"), ("{a=", "}")][self.below(3)];
        let closed = if self.one_in(2) {
            close.repeat(depth)
        } else {
            String::new()
        };
        format!("{}1{closed}", open.repeat(depth))
    }

    /// A value of the tree is replaced, removed, duplicated or moved, or a key occurs twice.
    fn json(&mut self, file: &[u8]) -> Option<Vec<u8>> {
        let mut value: Value = serde_json::from_slice(file).ok()?;
        let nodes = count(&value);
        let at = self.below(nodes);
        let mut raw = None;
        let mut twice = None;
        match self.below(8) {
            0 => twice = Some(self.below(nodes)),
            1 => {
                let other = nth(&mut value, self.below(nodes))?.clone();
                *nth(&mut value, at)? = other;
            }
            2 => match nth(&mut value, at)? {
                Value::Object(object) if !object.is_empty() => {
                    let key = object.keys().nth(self.below(object.len()))?.clone();
                    object.remove(&key);
                }
                Value::Array(list) if !list.is_empty() => drop(list.remove(self.below(list.len()))),
                other => *other = Value::Null,
            },
            3 => match nth(&mut value, at)? {
                Value::Object(object) => {
                    object.insert("a_key_of_the_future".into(), Value::from(7));
                }
                Value::Array(list) => {
                    let again = list.first().cloned().unwrap_or(Value::Null);
                    // Long, but three such changes one after another must still give a file of
                    // moderate size.
                    let small = count(&again) < 4 && list.len() < 1000;
                    list.resize(list.len() + self.below(if small { 2000 } else { 3 }), again);
                }
                Value::String(text) => {
                    let most = 100_000 / text.len().max(50);
                    *text = text.repeat(1 + self.below(most));
                }
                Value::Number(number) => {
                    let shift = self.below(5) as i64 - 2;
                    *number = (number.as_i64().unwrap_or(0).wrapping_add(shift)).into();
                }
                other => *other = Value::from(u64::MAX),
            },
            4 => raw = Some(self.deep()),
            _ => raw = Some(NASTY[self.below(NASTY.len())].to_string()),
        }
        if raw.is_some() {
            *nth(&mut value, at)? = Value::from(HERE);
        }
        let mut text = String::new();
        write(&value, twice, &mut 0, &mut text);
        if let Some(raw) = raw {
            text = text.replace(&format!("\"{HERE}\""), &raw);
        }
        Some(text.into_bytes())
    }

    fn safetensors(&mut self, file: Vec<u8>) -> Vec<u8> {
        let length = file
            .first_chunk::<8>()
            .map(|bytes| u64::from_le_bytes(*bytes));
        let end = length.and_then(|length| usize::try_from(length).ok()?.checked_add(8));
        let Some(end) = end.filter(|end| *end <= file.len()) else {
            return self.blind(file);
        };
        if self.one_in(6) {
            let wrong = match self.below(4) {
                0 => (end as u64 - 8)
                    .wrapping_add(self.below(5) as u64)
                    .wrapping_sub(2),
                1 => 100_000_001,
                _ => self.nasty_number(),
            };
            return [&wrong.to_le_bytes(), &file[8..]].concat();
        }
        let header = if self.one_in(2) {
            self.json(&file[8..end])
        } else {
            self.tensor(&file[8..end])
        };
        let header = header.unwrap_or_else(|| file[8..end].to_vec());
        [
            &(header.len() as u64).to_le_bytes(),
            &header[..],
            &file[end..],
        ]
        .concat()
    }

    /// Changes of one tensor's offset, shape or type.
    fn tensor(&mut self, header: &[u8]) -> Option<Vec<u8>> {
        let mut value: Value = serde_json::from_slice(header).ok()?;
        let object = value.as_object_mut()?;
        let names: Vec<String> = object
            .keys()
            .filter(|name| *name != "__metadata__")
            .cloned()
            .collect();
        let name = names.get(self.below(names.len()))?.clone();
        let other = names.get(self.below(names.len()))?.clone();
        let number = self.nasty_number();
        let what = self.below(6);
        if what == 5 {
            let entry = object.remove(&name)?;
            let new = ["x", "__metadata__", "../x", "lm_head.weight", ""][self.below(5)];
            object.insert(new.into(), entry);
            return serde_json::to_vec(&value).ok();
        }
        let others_place = object[&other].get("data_offsets").cloned();
        let tensor = object[&name].as_object_mut()?;
        match what {
            0 => {
                let place = tensor.get_mut("data_offsets")?.as_array_mut()?;
                *place.get_mut(self.below(2))? = number.into();
            }
            1 => drop(tensor.insert("data_offsets".into(), others_place?)),
            2 => {
                let shape = tensor.get_mut("shape")?.as_array_mut()?;
                let at = self.below(shape.len());
                *shape.get_mut(at)? = number.into();
            }
            3 => {
                // The same number of elements, or a product beyond 64 bits.
                let shape = tensor.get_mut("shape")?.as_array_mut()?;
                let huge = Value::from(1u64 << 33);
                match self.below(3) {
                    0 => shape.reverse(),
                    1 => shape.push(1.into()),
                    _ => shape.extend([huge.clone(), huge, 0.into()]),
                }
            }
            _ => {
                let types = [
                    "F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "U8", "F4", "",
                ];
                let new = types[self.below(types.len())];
                tensor.insert("dtype".into(), new.into());
            }
        }
        serde_json::to_vec(&value).ok()
    }
}

/// A text that is not JSON replaces a value at this place.
const HERE: &str = "a value that no file has: 7b1f";

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(object) => object.values().map(count).sum(),
        _ => 0,
    }
}

/// The `at`th value of the tree, parents before children.
fn nth(value: &mut Value, at: usize) -> Option<&mut Value> {
    fn find<'v>(value: &'v mut Value, left: &mut usize) -> Option<&'v mut Value> {
        if *left == 0 {
            return Some(value);
        }
        *left -= 1;
        match value {
            Value::Array(list) => list.iter_mut().find_map(|item| find(item, left)),
            Value::Object(object) => object.values_mut().find_map(|item| find(item, left)),
            _ => None,
        }
    }
    find(value, &mut { at })
}

/// JSON of a tree in which entry number `twice` occurs two times.
fn write(value: &Value, twice: Option<usize>, entry: &mut usize, out: &mut String) {
    match value {
        Value::Array(list) => {
            out.push('[');
            for (index, item) in list.iter().enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                write(item, twice, entry, out);
            }
            out.push(']');
        }
        Value::Object(object) => {
            out.push('{');
            for (index, (key, item)) in object.iter().enumerate() {
                let times = 1 + usize::from(twice == Some(*entry));
                *entry += 1;
                for time in 0..times {
                    out.push_str(if index + time == 0 { "" } else { ", " });
                    out.push_str(&Value::from(key.as_str()).to_string());
                    out.push_str(": ");
                    write(item, twice, entry, out);
                }
            }
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &[u8] = br#"{"a": [1, {"b": "text"}], "c": {"d": null, "e": true}}"#;

    #[test]
    fn the_same_seed_gives_the_same_files_and_another_seed_others() {
        let files = |seed| -> Vec<Vec<u8>> {
            let mut mutator = Mutator::new(seed);
            (0..50)
                .map(|_| mutator.mutate(Format::Json, FILE))
                .collect()
        };
        assert_eq!(files(1), files(1));
        assert_ne!(files(1), files(2));
    }

    #[test]
    fn every_kind_of_damage_occurs() {
        let mut mutator = Mutator::new(3);
        let files: Vec<Vec<u8>> = (0..2000)
            .map(|_| mutator.mutate(Format::Json, FILE))
            .collect();
        let some = |what: &str, is: &dyn Fn(&[u8]) -> bool| {
            assert!(files.iter().any(|file| is(file)), "no file is {what}");
        };
        some("empty or cut off", &|file| file.len() < 10);
        some("no text", &|file| std::str::from_utf8(file).is_err());
        some("deep", &|file| {
            file.windows(1000)
                .any(|part| part.iter().all(|byte| *byte == b'['))
        });
        some("huge", &|file| {
            file.windows(20).any(|part| part == b"18446744073709551615")
        });
        some("with a key twice", &|file| {
            let text = String::from_utf8_lossy(file);
            serde_json::from_slice::<Value>(file).is_ok() && text.matches("\"d\":").count() == 2
        });
        some("a path out of its folder", &|file| {
            String::from_utf8_lossy(file).contains("../..")
        });
        some("unchanged in form", &|file| {
            serde_json::from_slice::<Value>(file).is_ok()
        });
    }

    #[test]
    fn headers_of_safetensors_keep_their_length_right_while_their_content_is_wrong() {
        let header = br#"{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
        let file = [&(header.len() as u64).to_le_bytes(), &header[..], &[0; 16]].concat();
        let mut mutator = Mutator::new(4);
        let inside = (0..1000).filter(|_| {
            let file = mutator.mutate(Format::Safetensors, &file);
            let length = file
                .first_chunk::<8>()
                .map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let header = file
                .get(8..)
                .and_then(|rest| rest.get(..usize::try_from(length).ok()?));
            header.is_some_and(|header| serde_json::from_slice::<Value>(header).is_ok())
        });
        assert!(inside.count() > 300);
    }
}
