//! A model's tensors under llama.cpp's names and Hugging Face's.
//!
//! Hugging Face rotates the two halves of a head. For some architectures llama.cpp rotates neighbouring pairs of its
//! elements, and llama.cpp's converter reorders the rows of the query and key projections.

use crate::LlamaConfig;
use crate::spec::{LINEARS, NORMS};

/// Modules outside the layers: Hugging Face's name, llama.cpp's.
const OUTSIDE: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Hugging Face's name of a tensor (`model.layers.0.self_attn.q_proj.weight`) for llama.cpp's
/// (`blk.0.attn_q.weight`); `None` for a tensor that no family has.
pub fn hugging_face_name(name: &str) -> Option<String> {
    translate(name, "blk.", "model.layers.", |(theirs, ours)| {
        (ours, theirs)
    })
}

/// llama.cpp's name of a tensor for Hugging Face's.
pub fn llama_cpp_name(name: &str) -> Option<String> {
    translate(name, "model.layers.", "blk.", |(ours, theirs)| {
        (ours, theirs)
    })
}

fn translate(
    name: &str,
    from: &str,
    to: &str,
    order: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    if !["weight", "bias"].contains(&kind) {
        return None;
    }
    let find = |table: &[(&'static str, &'static str)], wanted: &str| {
        let mut pairs = table.iter().map(|pair| order(*pair));
        pairs.find(|pair| pair.0 == wanted).map(|pair| pair.1)
    };
    match module.strip_prefix(from) {
        None => Some(format!("{}.{kind}", find(&OUTSIDE, module)?)),
        Some(rest) => {
            let (layer, module) = rest.split_once('.')?;
            // Only the canonical form of a number, so that two names never mean one tensor.
            let number: u32 = layer.parse().ok()?;
            if number.to_string() != layer {
                return None;
            }
            let in_layer = NORMS.iter().chain(&LINEARS);
            let in_layer = in_layer.map(|names| (names.hugging_face, names.llama_cpp));
            let in_layer: Vec<_> = in_layer.collect();
            Some(format!("{to}{layer}.{}.{kind}", find(&in_layer, module)?))
        }
    }
}

/// The order of a projection's rows in the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Rows per head.
    pub head_dim: usize,
}

/// The order of rows of a tensor with this Hugging Face name in a model of this configuration; `None` if both programs
/// have the same order.
pub fn rows_of(name: &str, config: &LlamaConfig) -> Option<Rows> {
    let rotated = [".q_proj.", ".k_proj.", ".q_norm.", ".k_norm."];
    let rotated = rotated.iter().any(|part| name.contains(part));
    let head_dim = config.head_dim;
    (rotated && config.family.gguf_rotates_pairs).then_some(Rows { head_dim })
}

impl Rows {
    /// The index in llama.cpp's order of Hugging Face's row.
    pub fn in_llama_cpp(self, row: usize) -> usize {
        let (head, within) = (row / self.head_dim, row % self.head_dim);
        let half = self.head_dim / 2;
        head * self.head_dim + within % half * 2 + within / half
    }

    /// Rows of `columns` elements in Hugging Face's order, from llama.cpp's.
    pub fn to_hugging_face<T: Copy>(self, values: &[T], columns: usize) -> Vec<T> {
        let mut ordered = Vec::with_capacity(values.len());
        for row in 0..values.len() / columns.max(1) {
            ordered.extend_from_slice(&values[self.in_llama_cpp(row) * columns..][..columns]);
        }
        ordered
    }

    /// Rows of `columns` elements in llama.cpp's order, from Hugging Face's.
    pub fn to_llama_cpp<T: Copy + Default>(self, values: &[T], columns: usize) -> Vec<T> {
        let mut ordered = vec![T::default(); values.len()];
        for (row, values) in values.chunks_exact(columns.max(1)).enumerate() {
            ordered[self.in_llama_cpp(row) * columns..][..columns].copy_from_slice(values);
        }
        ordered
    }
}
