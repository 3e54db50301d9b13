//! The values of metadata keys.

use std::io::{self, Write};

/// A number of the format, little-endian.
pub(super) trait Number: Copy {
    const BYTES: usize;
    fn from_le(bytes: &[u8]) -> Self;
    fn write_le(self, out: &mut dyn Write) -> io::Result<()>;
}

/// The format's numbers: their type id, the variant's name, Rust's type.
macro_rules! numbers {
    ($($id:literal $name:ident $type:ty),* $(,)?) => {
        $(impl Number for $type {
            const BYTES: usize = size_of::<$type>();

            fn from_le(bytes: &[u8]) -> Self {
                let mut le = [0; size_of::<$type>()];
                le.copy_from_slice(bytes);
                <$type>::from_le_bytes(le)
            }

            fn write_le(self, out: &mut dyn Write) -> io::Result<()> {
                out.write_all(&self.to_le_bytes())
            }
        })*

        /// A metadata value in the type of the file.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)] // The variants are the format's types.
        pub enum Value {
            $($name($type),)*
            Bool(bool),
            Text(String),
            Array(Array),
        }

        /// An array of elements in the type of the file. Arrays of arrays are not supported.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)] // The variants are the format's types.
        pub enum Array {
            $($name(Vec<$type>),)*
            Bool(Vec<bool>),
            Text(Vec<String>),
        }

        impl Value {
            pub(super) fn type_id(&self) -> u32 {
                match self {
                    $(Self::$name(_) => $id,)*
                    Self::Bool(_) => BOOL,
                    Self::Text(_) => TEXT,
                    Self::Array(_) => ARRAY,
                }
            }

            /// Writes the value without its type.
            pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
                match self {
                    $(Self::$name(number) => number.write_le(out),)*
                    Self::Bool(flag) => out.write_all(&[u8::from(*flag)]),
                    Self::Text(text) => write_text(text, out),
                    Self::Array(array) => array.write(out),
                }
            }
        }

        impl Array {
            /// The number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Self::$name(list) => list.len(),)*
                    Self::Bool(list) => list.len(),
                    Self::Text(list) => list.len(),
                }
            }

            fn write(&self, out: &mut dyn Write) -> io::Result<()> {
                let id = match self {
                    $(Self::$name(_) => $id,)*
                    Self::Bool(_) => BOOL,
                    Self::Text(_) => TEXT,
                };
                u32::write_le(id, out)?;
                (self.len() as u64).write_le(out)?;
                match self {
                    $(Self::$name(list) => list.iter().try_for_each(|number| number.write_le(out)),)*
                    Self::Bool(list) => list.iter().try_for_each(|flag| out.write_all(&[u8::from(*flag)])),
                    Self::Text(list) => list.iter().try_for_each(|text| write_text(text, out)),
                }
            }
        }

        /// Reads a value of type `id` with `source`'s methods; `None` for an unknown type.
        pub(super) fn read_value<S: Source>(id: u32, source: &mut S) -> Option<Result<Value, S::Error>> {
            Some(match id {
                $($id => source.number().map(Value::$name),)*
                BOOL => source.flag().map(Value::Bool),
                TEXT => source.text().map(Value::Text),
                _ => return None,
            })
        }

        /// As [`read_value`], of `count` elements.
        pub(super) fn read_array<S: Source>(
            id: u32,
            count: u64,
            source: &mut S,
        ) -> Option<Result<Array, S::Error>> {
            Some(match id {
                $($id => source.numbers(count).map(Array::$name),)*
                BOOL => source.list(count, 1, S::flag).map(Array::Bool),
                // The length of a text takes eight bytes.
                TEXT => source.list(count, 8, S::text).map(Array::Text),
                _ => return None,
            })
        }
    };
}

pub(super) const BOOL: u32 = 7;
pub(super) const TEXT: u32 = 8;
pub(super) const ARRAY: u32 = 9;

numbers! {
    0 U8 u8, 1 I8 i8, 2 U16 u16, 3 I16 i16, 4 U32 u32, 5 I32 i32, 6 F32 f32,
    10 U64 u64, 11 I64 i64, 12 F64 f64,
}

/// A reader of values.
pub(super) trait Source: Sized {
    type Error;
    fn number<N: Number>(&mut self) -> Result<N, Self::Error>;
    fn numbers<N: Number>(&mut self, count: u64) -> Result<Vec<N>, Self::Error>;
    fn flag(&mut self) -> Result<bool, Self::Error>;
    fn text(&mut self) -> Result<String, Self::Error>;
    /// `count` elements that take at least `smallest` bytes each.
    fn list<T>(
        &mut self,
        count: u64,
        smallest: u64,
        one: fn(&mut Self) -> Result<T, Self::Error>,
    ) -> Result<Vec<T>, Self::Error>;
}

pub(super) fn write_text(text: &str, out: &mut dyn Write) -> io::Result<()> {
    (text.len() as u64).write_le(out)?;
    out.write_all(text.as_bytes())
}

impl Array {
    /// Whether the array is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Value {
    /// A non-negative whole number of any type.
    pub fn as_count(&self) -> Option<u64> {
        match *self {
            Self::U8(x) => Some(x.into()),
            Self::U16(x) => Some(x.into()),
            Self::U32(x) => Some(x.into()),
            Self::U64(x) => Some(x),
            Self::I8(x) => x.try_into().ok(),
            Self::I16(x) => x.try_into().ok(),
            Self::I32(x) => x.try_into().ok(),
            Self::I64(x) => x.try_into().ok(),
            _ => None,
        }
    }

    /// A number as the shortest decimal with the same binary form: 1e-5 in f32 is 1e-5, as in `config.json`.
    pub fn as_decimal(&self) -> Option<f64> {
        match self {
            Self::F32(x) => x.to_string().parse().ok(),
            Self::F64(x) => Some(*x),
            other => other.as_count().map(|x| x as f64),
        }
    }

    /// A flag.
    pub fn as_flag(&self) -> Option<bool> {
        match self {
            Self::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// A text.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A list of texts.
    pub fn as_texts(&self) -> Option<&[String]> {
        match self {
            Self::Array(Array::Text(texts)) => Some(texts),
            _ => None,
        }
    }

    /// A list of floats.
    pub fn as_floats(&self) -> Option<&[f32]> {
        match self {
            Self::Array(Array::F32(list)) => Some(list),
            _ => None,
        }
    }

    /// A list of whole numbers of any type; `None` if one is negative.
    pub fn as_counts(&self) -> Option<Vec<u64>> {
        let Self::Array(array) = self else {
            return None;
        };
        match array {
            Array::U8(list) => Some(list.iter().map(|x| u64::from(*x)).collect()),
            Array::U16(list) => Some(list.iter().map(|x| u64::from(*x)).collect()),
            Array::U32(list) => Some(list.iter().map(|x| u64::from(*x)).collect()),
            Array::U64(list) => Some(list.clone()),
            Array::I8(list) => list.iter().map(|x| u64::try_from(*x).ok()).collect(),
            Array::I16(list) => list.iter().map(|x| u64::try_from(*x).ok()).collect(),
            Array::I32(list) => list.iter().map(|x| u64::try_from(*x).ok()).collect(),
            Array::I64(list) => list.iter().map(|x| u64::try_from(*x).ok()).collect(),
            _ => None,
        }
    }
}
