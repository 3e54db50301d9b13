//! The KV cache on the CPU: the keys and values of the packed prompts, with shared prefixes once, followed by each
//! sequence's new tokens.

use std::ops::Range;

use crate::cpu::{self, Values};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::attention::Heads;
use crate::kv_cache::{KvCache, PromptTokens};

/// With fewer multiply-adds, starting threads costs more time than it saves.
const PARALLEL_FROM: usize = 64 * 1024;

#[derive(Debug, Clone)]
pub struct Cache {
    /// The packed prompts' keys and values, `[n, width]`.
    prompts: [Values; 2],
    rows: Vec<Row>,
    window: Option<usize>,
}

/// A sequence: the indices of its prompt, and the keys and values of its new tokens.
#[derive(Debug, Clone)]
struct Row {
    prompt: Vec<Range<usize>>,
    /// Keys and values of the tokens after the prompt, `[tokens, width]`.
    own: [Vec<f32>; 2],
}

impl Cache {
    pub fn new(keys_values: [Tensor<2>; 2], prompts: PromptTokens) -> Self {
        let rows = prompts.places.iter().map(|places| Row {
            prompt: ranges(places),
            own: Default::default(),
        });
        Self {
            prompts: keys_values.map(cpu::values),
            rows: rows.collect(),
            window: prompts.window,
        }
    }
}

impl KvCache for Cache {
    fn keep(&mut self, sequences: &[usize]) {
        self.rows = sequences
            .iter()
            .map(|row| self.rows[*row].clone())
            .collect();
    }

    fn attend(&mut self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, heads: Heads) -> Tensor<2> {
        let [q, k, v] = [q, k, v].map(cpu::values);
        let width = heads.key * heads.d;
        for (index, row) in self.rows.iter_mut().enumerate() {
            for (own, new) in row.own.iter_mut().zip([&k, &v]) {
                own.extend_from_slice(&new.as_slice()[index * width..][..width]);
            }
        }
        let prompts = [self.prompts[0].as_slice(), self.prompts[1].as_slice()];
        let group = heads.query / heads.key;
        let query_width = heads.query * heads.d;
        let mut output = vec![0f32; self.rows.len() * query_width];
        let window = self.window.unwrap_or(usize::MAX);
        let products = self.rows.iter();
        let products = products.map(|row| row.tokens(width).min(window) * query_width);
        let products: usize = products.sum();
        // Query heads that share a key head are adjacent, in the queries and in the output.
        let work = |(index, out): (usize, &mut [f32])| {
            let (row, key_head) = (index / heads.key, index % heads.key);
            let q = &q.as_slice()[index * group * heads.d..][..group * heads.d];
            let tokens = self.rows[row].tokens(width);
            let outside = tokens.saturating_sub(window);
            let of = |which: usize| Keys {
                row: &self.rows[row],
                which,
                prompts,
                outside,
                width,
                at: key_head * heads.d,
                d: heads.d,
            };
            cpu::vectorized(Mix {
                q,
                keys: of(0),
                values: of(1),
                tokens: tokens - outside,
                out,
            });
        };
        let pieces = group * heads.d;
        if products < PARALLEL_FROM {
            output.chunks_exact_mut(pieces).enumerate().for_each(work)
        } else {
            output
                .par_chunks_exact_mut(pieces)
                .enumerate()
                .for_each(work)
        }
        cpu::tensor(output, [self.rows.len(), query_width])
    }

    fn boxed_clone(&self) -> Box<dyn KvCache> {
        Box::new(self.clone())
    }
}

impl Row {
    /// Tokens so far.
    fn tokens(&self, width: usize) -> usize {
        let prompt: usize = self.prompt.iter().map(|range| range.len()).sum();
        prompt + self.own[0].len() / width.max(1)
    }
}

/// The keys (0) or values (1) of a sequence in one key head, in the order of its tokens.
#[derive(Clone, Copy)]
struct Keys<'a> {
    row: &'a Row,
    which: usize,
    prompts: [&'a [f32]; 2],
    /// The number of tokens before the window.
    outside: usize,
    width: usize,
    at: usize,
    d: usize,
}

impl<'a> Keys<'a> {
    /// The number of contiguous chunks of its tokens.
    #[inline(always)]
    fn pieces(self) -> usize {
        self.row.prompt.len() + 1
    }

    /// The tokens of a chunk that are in the window, `[tokens, width]`.
    #[inline(always)]
    fn piece(self, piece: usize) -> &'a [f32] {
        let all = match self.row.prompt.get(piece) {
            Some(range) => {
                &self.prompts[self.which][range.start * self.width..range.end * self.width]
            }
            None => &self.row.own[self.which],
        };
        let mut outside = self.outside;
        for range in &self.row.prompt[..piece] {
            outside = outside.saturating_sub(range.len());
        }
        &all[(outside * self.width).min(all.len())..]
    }
}

/// Adds `softmax(q·kᵀ/√d)·v` for the queries `[group, d]` of one key head to `out`, which is zero.
struct Mix<'a> {
    q: &'a [f32],
    keys: Keys<'a>,
    values: Keys<'a>,
    tokens: usize,
    out: &'a mut [f32],
}

impl cpu::Work for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        mix(self);
    }
}

#[inline(always)]
fn mix(
    Mix {
        q,
        keys,
        values,
        tokens,
        out,
    }: Mix,
) {
    let d = keys.d;
    let scale = 1.0 / (d as f32).sqrt();
    let mut scores = vec![0f32; q.len() / d * tokens];
    // Loops instead of closures, which the compiler may compile without the processor's vectors.
    let mut token = 0;
    for piece in 0..keys.pieces() {
        for key in keys.piece(piece).chunks_exact(keys.width) {
            let key = &key[keys.at..][..d];
            for (q, scores) in q.chunks_exact(d).zip(scores.chunks_exact_mut(tokens)) {
                scores[token] = cpu::dot(q, key) * scale;
            }
            token += 1;
        }
    }
    for weights in scores.chunks_exact_mut(tokens) {
        let largest = cpu::max(weights);
        let scale = 1.0 / cpu::exp_and_sum(weights, largest);
        weights.iter_mut().for_each(|weight| *weight *= scale);
    }
    let mut token = 0;
    for piece in 0..values.pieces() {
        for value in values.piece(piece).chunks_exact(values.width) {
            let value = &value[values.at..][..d];
            for (weights, out) in scores.chunks_exact(tokens).zip(out.chunks_exact_mut(d)) {
                let weight = weights[token];
                for (out, value) in out.iter_mut().zip(value) {
                    *out += weight * value;
                }
            }
            token += 1;
        }
    }
}

/// Ascending indices as ranges.
fn ranges(places: &[u32]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for place in places.iter().map(|place| *place as usize) {
        match ranges.last_mut() {
            Some(last) if last.end == place => last.end += 1,
            _ => ranges.push(place..place + 1),
        }
    }
    ranges
}
