//! The KV cache for any backend: the keys and values of all sequences in one tensor, with prompts aligned right, so
//! that all sequences continue at the same index.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, FloatDType, Tensor, TensorData, s};

use super::padding::MASKED;
use crate::attention::Heads;
use crate::kv_cache::{KvCache, PromptTokens, indices};
use crate::product;

/// The number of tokens by which the capacity grows.
const BLOCK: usize = 64;

#[derive(Debug, Clone)]
pub struct Cache {
    /// Keys and values, `[sequences, key heads, capacity, d]`.
    keys_values: [Tensor<4>; 2],
    /// The number of tokens of the longest sequence.
    used: usize,
    /// The padding before each sequence's prompt.
    padding: Vec<usize>,
    window: Option<usize>,
}

impl Cache {
    pub fn new(keys_values: [Tensor<2>; 2], prompts: PromptTokens) -> Self {
        let (rows, heads) = (prompts.places.len(), prompts.heads);
        let longest = prompts.places.iter().map(Vec::len).max().unwrap_or(0);
        let padding = prompts.places.iter().map(|places| longest - places.len());
        let padding: Vec<usize> = padding.collect();
        // The padding repeats token 0; the mask hides it.
        let spread = prompts.places.iter().zip(&padding);
        let spread = spread.flat_map(|(places, padding)| {
            let tokens = places.iter().map(|place| *place as i32);
            std::iter::repeat_n(0, *padding).chain(tokens)
        });
        let spread = indices(spread.collect(), &keys_values[0].device());
        let keys_values = keys_values.map(|x| {
            let x = x.select(0, spread.clone());
            x.reshape([rows, longest, heads.key, heads.d])
                .swap_dims(1, 2)
        });
        Self {
            keys_values,
            used: longest,
            padding,
            window: prompts.window,
        }
    }

    /// Adds a token to every sequence.
    fn push(&mut self, new: [Tensor<2>; 2], heads: Heads) {
        let rows = self.padding.len();
        let at = self.used;
        for (x, new) in self.keys_values.iter_mut().zip(new) {
            if at == x.dims()[2] {
                let shape = [rows, heads.key, BLOCK, heads.d];
                let room = Tensor::zeros(shape, (&x.device(), x.dtype()));
                *x = Tensor::cat(vec![x.clone(), room], 2);
            }
            let new = new.reshape([rows, heads.key, 1, heads.d]);
            let held = std::mem::replace(x, new.clone());
            *x = held.slice_assign(s![.., .., at..at + 1, ..], new);
        }
        self.used += 1;
    }

    /// 0 for a token of a sequence, very negative elsewhere: `[sequences, 1, 1, capacity]`.
    fn mask(&self, capacity: usize, scores: &Tensor<4>) -> Tensor<4> {
        let oldest = self
            .window
            .map_or(0, |window| self.used.saturating_sub(window));
        let row = |padding: &usize| {
            let first = oldest.max(*padding);
            let hidden = |place: usize| place < first || place >= self.used;
            let mask = move |place| if hidden(place) { MASKED } else { 0.0 };
            (0..capacity).map(mask).collect::<Vec<f32>>()
        };
        let mask: Vec<f32> = self.padding.iter().flat_map(row).collect();
        let data = TensorData::new(mask, [self.padding.len(), 1, 1, capacity]);
        Tensor::from_data(data, (&scores.device(), DType::F32))
    }
}

impl KvCache for Cache {
    fn keep(&mut self, sequences: &[usize]) {
        self.padding = sequences.iter().map(|row| self.padding[*row]).collect();
        let rows: Vec<i32> = sequences.iter().map(|row| *row as i32).collect();
        let rows = indices(rows, &self.keys_values[0].device());
        for x in &mut self.keys_values {
            *x = x.clone().select(0, rows.clone());
        }
    }

    fn attend(&mut self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, heads: Heads) -> Tensor<2> {
        let rows = self.padding.len();
        let Heads { query, key, d } = heads;
        self.push([k, v], heads);
        let capacity = self.keys_values[0].dims()[2];
        let dtype = FloatDType::from(q.dtype());
        let q = q.reshape([rows, key, query / key, d]);
        let [keys, values] = self.keys_values.clone();
        let scores = product(q, keys.swap_dims(2, 3)).cast(FloatDType::F32);
        let mask = self.mask(capacity, &scores);
        let weights = softmax(scores + mask, 3).cast(dtype);
        product(weights, values).reshape([rows, query * d])
    }

    fn boxed_clone(&self) -> Box<dyn KvCache> {
        Box::new(self.clone())
    }
}
