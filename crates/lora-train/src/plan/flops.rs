//! How many operations it takes to train on an example, from shapes alone.
//!
//! Counted are, with a multiplication and an addition as two:
//!
//! - the decoder's linear weights, forward and once backward (for the input; frozen weights have no gradient);
//! - attention's two products, each query with the keys up to its own position and within its window,
//!   forward and twice backward;
//! - the adapters' two products, forward and twice backward (input and factors);
//! - the head at positions in the loss, forward and once backward;
//! - the gradients of whole linear layers and of a whole head (`modules_to_save`).
//!
//! Not counted: norms, rotations, softmax, the embedding, AdamW. Padding, recomputation and logits
//! of positions that are not in the loss are not counted either: they lower a program's
//! utilization.

use llama_burn::{LinearSpec, LlamaConfig};
use lora_core::{LoraConfig, LoraError};

/// The rule of the count, for the user.
pub const COUNTED: &str = "Counted, a multiplication and an addition as two: the decoder's linear weights forward \
     and once backward, causal attention forward and twice backward, the adapters forward and twice backward, the \
     head at supervised positions forward and once backward; each example in full, without prefix sharing and padding.";

/// The shape-dependent factors of a model with adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlopsModel {
    /// Elements of the decoder's linear weights.
    linear: u64,
    /// Elements of the adapters' A and B.
    adapters: u64,
    /// Layers · heads · width of a head, for layers without a sliding window.
    attention: u64,
    /// The same for layers with one, and its length.
    windowed: (u64, u64),
    /// Vocabulary · hidden.
    head: u64,
    /// Elements of linear weights that are trained themselves.
    whole: u64,
    /// The same of the head.
    whole_head: u64,
}

impl FlopsModel {
    /// The factors of a model whose modules selected by `lora` are adapted.
    ///
    /// # Errors
    ///
    /// If `lora` is invalid or selects nothing.
    pub fn new(model: &LlamaConfig, lora: &LoraConfig) -> Result<Self, LoraError> {
        let quantization = lora_core::Quantization::None;
        let counts =
            lora_core::ParameterCounts::new(&model.module_shapes(), lora, quantization, 4)?;
        let whole = model.whole_elements(lora, quantization, 4)?;
        let linears = model.layer_linears();
        let in_a_layer: usize = linears.iter().map(LinearSpec::elements).sum();
        let layers = model.num_hidden_layers;
        let window = model.shortest_window().unwrap_or(0);
        let windowed = model.windows.iter().flatten().count();
        Ok(Self {
            linear: (in_a_layer * layers) as u64,
            adapters: counts.low_rank,
            attention: ((layers - windowed) * model.query_width()) as u64,
            windowed: ((windowed * model.query_width()) as u64, window as u64),
            head: (model.vocab_size * model.hidden_size) as u64,
            whole: whole.linear as u64,
            whole_head: whole.head as u64,
        })
    }

    /// Operations of a forward and a backward pass over a single example.
    pub fn of_row(&self, tokens: u64, supervised: u64) -> u64 {
        // Query t meets t keys, or as many as the window has, in two products.
        let pairs = tokens * (tokens + 1) / 2;
        let (windowed, window) = self.windowed;
        let within = tokens.min(window);
        let pairs_within = within * (within + 1) / 2 + (tokens - within) * window;
        2 * 2 * self.linear * tokens
            + 3 * 2 * 2 * (self.attention * pairs + windowed * pairs_within)
            + 3 * 2 * self.adapters * tokens
            + 2 * 2 * self.head * supervised
            + 2 * self.whole * tokens
            + 2 * self.whole_head * supervised
    }

    /// Operations per useful token, over examples with so many tokens and so many of them in the
    /// loss; 0 without examples.
    pub fn per_token(&self, rows: impl IntoIterator<Item = (u64, u64)>) -> f64 {
        let (mut operations, mut tokens) = (0, 0);
        for (length, supervised) in rows {
            operations += self.of_row(length, supervised);
            tokens += length;
        }
        match tokens {
            0 => 0.0,
            tokens => operations as f64 / tokens as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Hidden 8, feed-forward 12, 2 layers, 2 query heads and 1 key head of 4, vocabulary 10.
    fn model() -> LlamaConfig {
        let value = json!({
            "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true,
        });
        LlamaConfig::from_json(value.as_object().unwrap()).unwrap()
    }

    #[test]
    fn a_row_of_two_tokens_counts_what_a_hand_counts() {
        let lora = LoraConfig {
            r: 1,
            ..LoraConfig::default()
        };
        let flops = FlopsModel::new(&model(), &lora).unwrap();
        // q 8·8, k and v 8·4 each, o 8·8, gate, up and down 8·12 each; two layers.
        let linear = 2 * (64 + 32 + 32 + 64 + 3 * 96);
        // q (8 + 8), k and v (8 + 4) each; two layers.
        let adapters = 2 * (16 + 12 + 12);
        // Position 1 meets one key, position 2 two: 3 pairs; q·k and weights·v; 2 heads of 4; two layers;
        // forward, and in the backward pass each of the two products gives two.
        let attention = 3 * (2 * 2 * (2 * 4) * 3 * 2);
        let head = 2 * (2 * 80);
        let by_hand = 2 * (2 * linear * 2) + attention + 3 * (2 * adapters * 2) + head;
        assert_eq!(flops.of_row(2, 1), by_hand);
        assert_eq!(flops.per_token([(2, 1), (2, 1)]), by_hand as f64 / 2.0);
        assert_eq!(flops.per_token([]), 0.0);
    }

    #[test]
    fn a_window_bounds_the_keys_that_a_query_meets() {
        let lora = LoraConfig::default();
        let all = FlopsModel::new(&model(), &lora).unwrap();
        let windows = vec![None, Some(3)];
        let windowed = LlamaConfig { windows, ..model() };
        let windowed = FlopsModel::new(&windowed, &lora).unwrap();
        // Queries 4 and 5 meet 3 keys instead of 4 and 5; one layer with 2 heads of 4.
        let saved = 3 * 2 * 2 * (2 * 4) * (1 + 2);
        assert_eq!(all.of_row(5, 1) - windowed.of_row(5, 1), saved);
        assert_eq!(all.of_row(3, 1), windowed.of_row(3, 1));
    }

    #[test]
    fn attention_grows_with_the_square_of_the_row_and_the_rest_with_its_length() {
        let flops = FlopsModel::new(&model(), &LoraConfig::default()).unwrap();
        let rest =
            |tokens| flops.of_row(tokens, 0) - 12 * flops.attention * (tokens * (tokens + 1) / 2);
        assert_eq!(rest(128), 2 * rest(64));
        assert!(flops.of_row(128, 0) > 2 * flops.of_row(64, 0));
    }
}
