//! Writes a GGUF file, one tensor at a time.

use std::io::{self, Write};

use half::f16;

use super::value::{Number, write_text};
use super::{TensorKind, Value, blocks};

/// Tensors start at multiples of this.
const ALIGNMENT: u64 = 32;

/// A tensor of the file: its name, shape and kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// llama.cpp's name.
    pub name: String,
    /// Row-major, `[out, in]`.
    pub shape: Vec<usize>,
    /// F32, F16 or Q8_0.
    pub kind: TensorKind,
}

impl TensorPlan {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> u64 {
        (self.elements() / self.kind.block() * self.kind.block_bytes()) as u64
    }
}

/// Writes a file in version 3: first the header, then every tensor in the order of the header.
#[derive(Debug)]
pub struct GgufWriter<W: Write> {
    out: W,
    plans: Vec<TensorPlan>,
    next: usize,
}

impl<W: Write> GgufWriter<W> {
    /// Writes metadata and tensor list.
    ///
    /// # Errors
    ///
    /// The system's error.
    ///
    /// # Panics
    ///
    /// If a tensor has a kind that cannot be written, or its rows are not whole blocks.
    pub fn new(
        mut out: W,
        metadata: &[(String, Value)],
        plans: Vec<TensorPlan>,
    ) -> io::Result<Self> {
        let mut counted = Counted {
            out: &mut out,
            at: 0,
        };
        let header: &mut dyn Write = &mut counted;
        header.write_all(b"GGUF")?;
        3u32.write_le(header)?;
        (plans.len() as u64).write_le(header)?;
        (metadata.len() as u64).write_le(header)?;
        for (key, value) in metadata {
            write_text(key, header)?;
            value.type_id().write_le(header)?;
            value.write(header)?;
        }
        let mut offset = 0u64;
        for plan in &plans {
            let kind = plan.kind;
            let written = [TensorKind::F32, TensorKind::F16, TensorKind::Q8_0];
            assert!(written.contains(&kind), "{kind:?} is not written");
            let row = plan.shape.last().copied().unwrap_or(1);
            assert!(
                row.is_multiple_of(kind.block()),
                "rows of {row} in {kind:?}"
            );
            write_text(&plan.name, header)?;
            (plan.shape.len() as u32).write_le(header)?;
            for dimension in plan.shape.iter().rev() {
                (*dimension as u64).write_le(header)?;
            }
            kind.id().write_le(header)?;
            offset.write_le(header)?;
            offset = (offset + plan.bytes()).next_multiple_of(ALIGNMENT);
        }
        let at = counted.at;
        pad(&mut out, at)?;
        Ok(Self {
            out,
            plans,
            next: 0,
        })
    }

    /// The tensor that is to be written next.
    pub fn next(&self) -> Option<&TensorPlan> {
        self.plans.get(self.next)
    }

    /// Writes the next tensor's values, row-major.
    ///
    /// # Errors
    ///
    /// The system's error; [`io::ErrorKind::InvalidData`] for a value outside the range of F16.
    ///
    /// # Panics
    ///
    /// If no tensor is left, or the next one has another number of elements.
    pub fn write(&mut self, values: &[f32]) -> io::Result<()> {
        let plan = self
            .plans
            .get(self.next)
            .expect("more tensors than in the header");
        assert_eq!(values.len(), plan.elements(), "{}", plan.name);
        // In chunks of whole blocks, so that a large tensor is not in memory twice.
        let mut bytes = Vec::new();
        for values in values.chunks(1 << 18) {
            bytes.clear();
            match plan.kind {
                TensorKind::F16 => {
                    for value in values {
                        let half = f16::from_f32(*value);
                        if !half.is_finite() {
                            return Err(io::Error::new(
                                io::ErrorKind::InvalidData,
                                format!(
                                    "{} holds {value}, which F16 cannot; write F32 or Q8_0",
                                    plan.name
                                ),
                            ));
                        }
                        bytes.extend(half.to_le_bytes());
                    }
                }
                TensorKind::Q8_0 => blocks::quantize_q8_0(values, &mut bytes),
                _ => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            }
            self.out.write_all(&bytes)?;
        }
        self.next += 1;
        let written = plan.bytes();
        pad(&mut self.out, written)
    }

    /// Returns the complete file.
    ///
    /// # Panics
    ///
    /// If a tensor of the header was not written.
    pub fn finish(self) -> W {
        assert_eq!(self.next, self.plans.len(), "a tensor was not written");
        self.out
    }
}

/// Writes zeros from `at` up to the next multiple of the alignment.
fn pad(out: &mut impl Write, at: u64) -> io::Result<()> {
    let zeros = at.next_multiple_of(ALIGNMENT) - at;
    out.write_all(&[0; ALIGNMENT as usize][..zeros as usize])
}

struct Counted<'a, W> {
    out: &'a mut W,
    at: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
