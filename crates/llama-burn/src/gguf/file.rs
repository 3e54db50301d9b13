//! An open GGUF file: its tensors as floats or as integers.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use rayon::prelude::*;

use super::{GgufError, Header, TensorKind, blocks};

/// The approximate number of bytes that are read at a time.
const PIECE: usize = 4 << 20;

/// A GGUF file whose tensors are read one at a time, on request.
#[derive(Debug)]
pub struct GgufFile {
    /// Metadata and tensor list.
    pub header: Header,
    file: File,
}

/// A tensor of integers with one scale per `block` integers along its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct IntegerTensor {
    /// Row-major, in the file's orientation: `[rows, columns]`.
    pub integers: Vec<i8>,
    /// `[rows, columns / block]`.
    pub scales: Vec<f32>,
    /// The number of integers that share a scale.
    pub block: usize,
}

/// Whether `path` is a file in this format, by its name or its first bytes.
pub fn is_gguf(path: &Path) -> bool {
    let named = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let begins = || {
        let mut magic = [0; 4];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
        read.is_ok() && &magic == b"GGUF"
    };
    path.is_file() && (named || begins())
}

impl GgufFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    ///
    /// As [`Header::read`]; also for one of several files of a split model.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let io = |source| GgufError::Io {
            file: path.into(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let header = Header::read(path, BufReader::new(&file), length)?;
        match header.count("split.count")? {
            None | Some(0..=1) => Ok(Self { header, file }),
            Some(parts) => Err(header.wrong(
                "split.count",
                format!(
                    "is {parts}: this is one of several parts; join them with llama.cpp's \
                     llama-gguf-split --merge"
                ),
            )),
        }
    }

    /// A tensor's values, row-major.
    ///
    /// # Errors
    ///
    /// If it is missing, of an unsupported type, or cannot be read.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>, GgufError> {
        let kind = self.header.kind(name)?;
        let mut values = vec![0f32; self.elements(name)];
        self.pieces(name, kind, |bytes, first| {
            let count = bytes.len() / kind.block_bytes() * kind.block();
            let values = &mut values[first..][..count];
            // Enough blocks to make up for the cost of a thread.
            let blocks = 1 << 10;
            values
                .par_chunks_mut(blocks * kind.block())
                .zip(bytes.par_chunks(blocks * kind.block_bytes()))
                .for_each(|(values, bytes)| blocks::dequantize(kind, bytes, values));
        })?;
        Ok(values)
    }

    /// A tensor's integers and scales; `None` for other kinds (floats, kinds with offsets).
    ///
    /// # Errors
    ///
    /// As [`floats`](Self::floats).
    pub fn integers(&self, name: &str) -> Result<Option<IntegerTensor>, GgufError> {
        let kind = self.header.kind(name)?;
        let Some(block) = blocks::integer_block(kind) else {
            return Ok(None);
        };
        let elements = self.elements(name);
        let mut integers = vec![0i8; elements];
        let mut scales = vec![0f32; elements / block];
        self.pieces(name, kind, |bytes, first| {
            let count = bytes.len() / kind.block_bytes() * kind.block();
            let (integers, scales) = (
                &mut integers[first..][..count],
                &mut scales[first / block..][..count / block],
            );
            let blocks = 1 << 10;
            integers
                .par_chunks_mut(blocks * kind.block())
                .zip(scales.par_chunks_mut(blocks * kind.block() / block))
                .zip(bytes.par_chunks(blocks * kind.block_bytes()))
                .for_each(|((integers, scales), bytes)| {
                    blocks::integers(kind, bytes, integers, scales);
                });
        })?;
        Ok(Some(IntegerTensor {
            integers,
            scales,
            block,
        }))
    }

    fn elements(&self, name: &str) -> usize {
        // The header's checks guarantee that the file has this many elements.
        let place = self.header.tensors.get(name);
        place.map_or(0, |place| place.shape.iter().product())
    }

    /// Calls `work(bytes, first element)` for chunks of whole blocks.
    fn pieces(
        &self,
        name: &str,
        kind: TensorKind,
        mut work: impl FnMut(&[u8], usize),
    ) -> Result<(), GgufError> {
        let Some(place) = self.header.tensors.get(name) else {
            return Ok(());
        };
        let io = |source| GgufError::Io {
            file: self.header.path.clone(),
            source,
        };
        let mut file = &self.file;
        file.seek(SeekFrom::Start(place.start)).map_err(io)?;
        let at_once = PIECE / kind.block_bytes() * kind.block_bytes();
        let mut bytes = vec![0; at_once.min(place.bytes as usize)];
        let (mut left, mut first) = (place.bytes as usize, 0);
        while left > 0 {
            let bytes = &mut bytes[..left.min(at_once)];
            file.read_exact(bytes).map_err(io)?;
            work(bytes, first);
            left -= bytes.len();
            first += bytes.len() / kind.block_bytes() * kind.block();
        }
        Ok(())
    }
}
