//! The header of a GGUF file: metadata and the list of tensors.
//!
//! The header is untrusted: a count is compared with the number of remaining bytes before memory is allocated.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::value::{ARRAY, Number, Source, read_array, read_value};
use super::{Array, GgufError, TensorKind, Value};

/// Metadata larger than this is rejected. The largest vocabularies in use take a few dozen MiB.
const LARGEST_HEADER: u64 = 128 << 20;
/// Longer names are rejected; the format's limit for keys.
const LONGEST_NAME: usize = 65_535;
/// The largest number of dimensions of ggml's tensors.
const MOST_DIMENSIONS: u32 = 4;

/// Where a tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlace {
    /// The row-major shape as in Hugging Face's files: a linear weight is `[out, in]`.
    pub shape: Vec<usize>,
    /// The id of the stored type; [`Header::kind`] returns an error for an unsupported one.
    pub type_id: u32,
    /// The first byte, counted from the start of the file.
    pub start: u64,
    /// The number of bytes; 0 for an unknown type.
    pub bytes: u64,
}

/// Metadata and tensor list.
#[derive(Debug, Clone, Default)]
pub struct Header {
    /// The file's path, for messages.
    pub path: PathBuf,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by llama.cpp's name.
    pub tensors: BTreeMap<String, TensorPlace>,
}

impl Header {
    /// Reads the header of a file of `length` bytes.
    ///
    /// # Errors
    ///
    /// Names the error and its byte offset.
    pub fn read(path: &Path, input: impl Read, length: u64) -> Result<Self, GgufError> {
        let mut reader = Reader {
            path,
            input,
            at: 0,
            end: length.min(LARGEST_HEADER),
            length,
        };
        let magic = reader.some_bytes(4)?;
        if magic != b"GGUF" {
            return Err(GgufError::NotGguf {
                file: path.into(),
                got: String::from_utf8_lossy(&magic).into_owned(),
            });
        }
        let version: u32 = reader.number()?;
        if !(2..=3).contains(&version) {
            let what = match version.swap_bytes() {
                2..=3 => "its byte order is big-endian".into(),
                _ => format!("its version is {version}"),
            };
            return Err(GgufError::Version {
                file: path.into(),
                what,
            });
        }
        let tensor_count: u64 = reader.number()?;
        let key_count: u64 = reader.number()?;
        // The shortest entry: an empty name's length, the number of dimensions, type and offset.
        reader.expect_room(tensor_count, 24, "tensors")?;
        reader.expect_room(key_count, 13, "metadata keys")?;
        let mut header = Self {
            path: path.into(),
            ..Self::default()
        };
        for _ in 0..key_count {
            let start = reader.at;
            let key = reader.name()?;
            let value = reader.value(&key)?;
            if header.metadata.insert(key.clone(), value).is_some() {
                return Err(reader.damaged_at(start, format!("the key {key} occurs twice")));
            }
        }
        let alignment = header.alignment()?;
        for _ in 0..tensor_count {
            let start = reader.at;
            let (name, place) = reader.tensor(alignment)?;
            if header.tensors.insert(name.clone(), place).is_some() {
                return Err(reader.damaged_at(start, format!("the tensor {name} occurs twice")));
            }
        }
        let data = reader.at.next_multiple_of(alignment);
        header.place_tensors(data, length)?;
        Ok(header)
    }

    fn alignment(&self) -> Result<u64, GgufError> {
        const KEY: &str = "general.alignment";
        match self.metadata.get(KEY) {
            None => Ok(32),
            Some(value) => match value.as_count() {
                Some(count) if count.is_power_of_two() && (8..=1 << 20).contains(&count) => {
                    Ok(count)
                }
                _ => Err(self.wrong(KEY, "must be a power of two from 8 to 1048576")),
            },
        }
    }

    /// Converts offsets to positions in the file, and checks that every tensor is inside the file and that none
    /// overlap.
    fn place_tensors(&mut self, data: u64, length: u64) -> Result<(), GgufError> {
        let path = &self.path;
        let wrong = |name: &str, at: u64, reason: String| GgufError::Damaged {
            file: path.clone(),
            at,
            reason: format!("the tensor {name} {reason}"),
        };
        let mut ranges = Vec::with_capacity(self.tensors.len());
        for (name, place) in &mut self.tensors {
            let offset = place.start;
            let end = data
                .checked_add(offset)
                .and_then(|start| start.checked_add(place.bytes));
            match end {
                Some(end) if end <= length => {
                    place.start = data + offset;
                    if place.bytes > 0 {
                        ranges.push((place.start, end, name.as_str()));
                    }
                }
                _ => {
                    let bytes = place.bytes;
                    let reason = format!(
                        "of {bytes} bytes at offset {offset} ends after the file's end, {length}"
                    );
                    return Err(wrong(name, data, reason));
                }
            }
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            let ((_, end, one), (start, _, other)) = (pair[0], pair[1]);
            if start < end {
                return Err(wrong(other, start, format!("overlaps {one}")));
            }
        }
        Ok(())
    }

    /// How a tensor is stored.
    ///
    /// # Errors
    ///
    /// A tensor that is missing or of an unsupported type.
    pub fn kind(&self, name: &str) -> Result<TensorKind, GgufError> {
        let wrong = |reason: String| GgufError::Tensor {
            file: self.path.clone(),
            name: name.into(),
            reason,
        };
        match self.tensors.get(name) {
            None => Err(wrong("is missing".into())),
            Some(place) => TensorKind::from_id(place.type_id).map_err(wrong),
        }
    }

    /// An error about a key.
    pub fn wrong(&self, key: &str, reason: impl Into<String>) -> GgufError {
        GgufError::Metadata {
            file: self.path.clone(),
            key: key.into(),
            reason: reason.into(),
        }
    }

    /// A key's value, converted by `read`; `None` if the key is missing.
    ///
    /// # Errors
    ///
    /// A value of another type, with `expected`.
    pub fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(found) => Ok(Some(found)),
                None => Err(self.wrong(key, format!("must be {expected}"))),
            },
        }
    }

    /// A text.
    ///
    /// # Errors
    ///
    /// A value of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.get(key, "a text", Value::as_text)
    }

    /// A whole number that is not negative.
    ///
    /// # Errors
    ///
    /// A value of another type.
    pub fn count(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.get(key, "a whole number that is not negative", Value::as_count)
    }

    /// A flag.
    ///
    /// # Errors
    ///
    /// A value of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.get(key, "true or false", Value::as_flag)
    }
}

/// Reads the header and counts the bytes.
struct Reader<'a, R> {
    path: &'a Path,
    input: R,
    at: u64,
    /// The largest offset at which the header may end.
    end: u64,
    length: u64,
}

impl<R: Read> Reader<'_, R> {
    fn damaged_at(&self, at: u64, reason: impl Into<String>) -> GgufError {
        GgufError::Damaged {
            file: self.path.into(),
            at,
            reason: reason.into(),
        }
    }

    fn damaged(&self, reason: impl Into<String>) -> GgufError {
        self.damaged_at(self.at, reason)
    }

    /// Checks that the file has room for `count` elements of at least `smallest` bytes.
    fn expect_room(&self, count: u64, smallest: u64, what: &str) -> Result<(), GgufError> {
        let left = self.end - self.at;
        match count.checked_mul(smallest) {
            Some(bytes) if bytes <= left => Ok(()),
            _ if self.end < self.length => Err(self.damaged(format!(
                "it announces {count} {what}, more than fit in the supported {LARGEST_HEADER} bytes of metadata"
            ))),
            _ => Err(self.damaged(format!(
                "it announces {count} {what}, and {left} bytes are left"
            ))),
        }
    }

    fn some_bytes(&mut self, count: usize) -> Result<Vec<u8>, GgufError> {
        self.expect_room(count as u64, 1, "bytes")?;
        let mut bytes = vec![0; count];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        let file = || self.path.to_path_buf();
        self.input
            .read_exact(bytes)
            .map_err(|source| GgufError::Io {
                file: file(),
                source,
            })?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn name(&mut self) -> Result<String, GgufError> {
        let start = self.at;
        let name = self.text()?;
        match name.len() {
            1..=LONGEST_NAME => Ok(name),
            length => Err(self.damaged_at(start, format!("a name of {length} bytes"))),
        }
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let start = self.at;
        let id: u32 = self.number()?;
        let found = match id {
            ARRAY => {
                let element: u32 = self.number()?;
                let count: u64 = self.number()?;
                if element == ARRAY {
                    let reason = format!("{key} is an array of arrays, which is not supported");
                    return Err(self.damaged_at(start, reason));
                }
                read_array(element, count, self)
                    .map(|array: Result<Array, _>| array.map(Value::Array))
            }
            _ => read_value(id, self),
        };
        match found {
            Some(value) => value,
            None => Err(self.damaged_at(start, format!("{key} is of a type that does not exist"))),
        }
    }

    fn tensor(&mut self, alignment: u64) -> Result<(String, TensorPlace), GgufError> {
        let start = self.at;
        let name = self.name()?;
        let wrong = |reader: &Self, reason: String| {
            Err(reader.damaged_at(start, format!("the tensor {name} {reason}")))
        };
        let dimensions: u32 = self.number()?;
        if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
            return wrong(self, format!("has {dimensions} dimensions"));
        }
        let mut shape = Vec::new();
        let mut elements = 1u64;
        for _ in 0..dimensions {
            let dimension: u64 = self.number()?;
            let size = usize::try_from(dimension).ok();
            let product = elements.checked_mul(dimension);
            match (size, product) {
                // Elements of at least half a byte, in a file of at most 2⁶³ bytes.
                (Some(size), Some(product)) if product < 1 << 62 => {
                    shape.push(size);
                    elements = product;
                }
                _ => return wrong(self, format!("has a dimension of {dimension}")),
            }
        }
        let row = shape[0];
        // The file's first dimension is the contiguous one.
        shape.reverse();
        let type_id: u32 = self.number()?;
        let offset: u64 = self.number()?;
        if !offset.is_multiple_of(alignment) {
            return wrong(
                self,
                format!("has the offset {offset}, which is not a multiple of {alignment}"),
            );
        }
        let bytes = match TensorKind::from_id(type_id) {
            Err(_) => 0,
            Ok(kind) if !row.is_multiple_of(kind.block()) => {
                let block = kind.block();
                return wrong(self, format!("has rows of {row} in blocks of {block}"));
            }
            Ok(kind) => {
                let blocks = elements / kind.block() as u64;
                match blocks.checked_mul(kind.block_bytes() as u64) {
                    Some(bytes) => bytes,
                    None => return wrong(self, format!("has {elements} elements")),
                }
            }
        };
        let place = TensorPlace {
            shape,
            type_id,
            start: offset,
            bytes,
        };
        Ok((name, place))
    }
}

impl<R: Read> Source for Reader<'_, R> {
    type Error = GgufError;

    fn number<N: Number>(&mut self) -> Result<N, GgufError> {
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..N::BYTES];
        self.expect_room(1, N::BYTES as u64, "value")?;
        self.fill(bytes)?;
        Ok(N::from_le(bytes))
    }

    fn numbers<N: Number>(&mut self, count: u64) -> Result<Vec<N>, GgufError> {
        self.expect_room(count, N::BYTES as u64, "elements")?;
        let bytes = self.some_bytes(count as usize * N::BYTES)?;
        Ok(bytes.chunks_exact(N::BYTES).map(N::from_le).collect())
    }

    fn flag(&mut self) -> Result<bool, GgufError> {
        match self.number::<u8>()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.damaged(format!("a boolean of the value {other}"))),
        }
    }

    fn text(&mut self) -> Result<String, GgufError> {
        let start = self.at;
        let length: u64 = self.number()?;
        self.expect_room(length, 1, "bytes of text")?;
        let bytes = self.some_bytes(length as usize)?;
        String::from_utf8(bytes).map_err(|_| self.damaged_at(start, "a text that is not UTF-8"))
    }

    fn list<T>(
        &mut self,
        count: u64,
        smallest: u64,
        one: fn(&mut Self) -> Result<T, GgufError>,
    ) -> Result<Vec<T>, GgufError> {
        self.expect_room(count, smallest, "elements")?;
        let mut list = Vec::with_capacity(count.min(1 << 16) as usize);
        for _ in 0..count {
            list.push(one(self)?);
        }
        Ok(list)
    }
}
