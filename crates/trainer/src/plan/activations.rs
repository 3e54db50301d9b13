//! What lives during a step besides the model and the adapters.

use llama_burn::LlamaConfig;
use lora_core::{LoraError, ModuleSelector, Quantization};

use super::{Part, PlanOptions};
use crate::loss::positions_at_once;

/// Copies of the scores of the vocabulary: scores, log-probabilities, gradient.
const LOGITS: f64 = 3.0;

/// What a layer leaves on the tape, in copies of a tensor of that size: its hidden-sized and
/// query-sized tensors beside its input, keys and values, the feed-forward's, the attention scores.
const TAPE: Copies = Copies {
    hidden: 2.2,
    query: 1.5,
    key_value: 2.0,
    feed_forward: 4.0,
    scores: 3.0,
};

/// What the backward pass through the feed-forward block needs besides.
const FEED_FORWARD_BACKWARD: Copies = Copies {
    hidden: 1.8,
    query: 0.0,
    key_value: 0.0,
    feed_forward: 1.06,
    scores: 0.0,
};

/// What the backward pass through the attention block needs besides; the feed-forward's tape is
/// gone by then.
const ATTENTION_BACKWARD: Copies = Copies {
    hidden: 1.8,
    query: 0.0,
    key_value: 0.0,
    feed_forward: 0.0,
    scores: 2.0,
};

/// Floats that the CPU unpacks of a weight at a time (lora-core's `frozen_linear`).
const PANEL: usize = 256 * 1024;

/// How often tensors of each size exist.
#[derive(Debug, Clone, Copy)]
struct Copies {
    hidden: f64,
    query: f64,
    key_value: f64,
    feed_forward: f64,
    scores: f64,
}

/// Bytes of a phase, by what they are for.
#[derive(Debug, Clone, Copy, Default)]
struct Bytes {
    inputs: f64,
    layer: f64,
    scores: f64,
    logits: f64,
    unpacked: f64,
}

impl Bytes {
    fn sum(self) -> f64 {
        self.inputs + self.layer + self.scores + self.logits + self.unpacked
    }
}

/// The phase of a step in which the most memory is in use, and what is in use then.
///
/// # Errors
///
/// If the adapters' configuration is invalid.
pub(super) fn peak(
    model: &LlamaConfig,
    options: &PlanOptions,
) -> Result<(&'static str, Vec<Part>), LoraError> {
    let sizes = Sizes::new(model, options);
    let adapted = Adapted::new(model, options)?;
    let layers = adapted.layers as f64;
    let tape = sizes.of(TAPE);
    let adapters = adapted.tape(model, options) * sizes.tokens;
    // With checkpointing one layer's tape exists at a time, and none while the loss is computed.
    let (tapes, tapes_in_loss) = match options.gradient_checkpointing {
        true => (1.0, 0.0),
        false => (layers, layers),
    };
    let kept = Bytes {
        inputs: layers * sizes.hidden,
        scores: sizes.mask,
        ..Bytes::default()
    };
    let with_tapes = |tapes: f64| Bytes {
        layer: tapes * (tape.layer + adapters),
        scores: kept.scores + tapes * tape.scores,
        ..kept
    };

    let supervised = options.workload.supervised.min(positions_at_once(model.vocab_size));
    let mut loss = with_tapes(tapes_in_loss);
    loss.logits = LOGITS * 4.0 * (supervised * model.vocab_size) as f64;

    let mut feed_forward = with_tapes(tapes);
    feed_forward.layer += sizes.of(FEED_FORWARD_BACKWARD).layer + adapted.down_backward(&sizes);
    feed_forward.unpacked = unpacked(model, options);

    let mut attention = with_tapes(tapes);
    let backward = sizes.of(ATTENTION_BACKWARD);
    attention.layer += backward.layer - TAPE.feed_forward * sizes.feed_forward;
    attention.scores += backward.scores;

    let phases = [
        ("the loss", loss),
        ("the backward pass of a feed-forward block", feed_forward),
        ("the backward pass of an attention block", attention),
    ];
    let mut largest = phases[0];
    for phase in phases {
        if phase.1.sum() > largest.1.sum() {
            largest = phase;
        }
    }
    let (name, bytes) = largest;
    let layer = match options.gradient_checkpointing {
        true => "activations of one layer, computed again",
        false => "activations of all layers",
    };
    let parts = [
        ("inputs of the layers", bytes.inputs),
        (layer, bytes.layer),
        ("attention scores", bytes.scores),
        ("scores of the vocabulary", bytes.logits),
        ("weights being unpacked", bytes.unpacked),
    ];
    let parts = parts.into_iter().filter(|(_, bytes)| *bytes >= 1.0);
    let part = |(name, bytes): (&str, f64)| Part {
        name: name.into(),
        parameters: None,
        bytes: bytes as u64,
    };
    Ok((name, parts.map(part).collect()))
}

/// Bytes of one tensor of each size.
struct Sizes {
    tokens: f64,
    hidden: f64,
    query: f64,
    key_value: f64,
    feed_forward: f64,
    scores: f64,
    mask: f64,
}

impl Sizes {
    fn new(model: &LlamaConfig, options: &PlanOptions) -> Self {
        let workload = options.workload;
        let floats = (workload.tokens * options.float_bytes) as f64;
        let longest = workload.longest_row as f64;
        // Attention pads rows to the longest; its scores are f32 whatever is computed in.
        let mask = 4.0 * longest * longest;
        Self {
            tokens: floats,
            hidden: floats * model.hidden_size as f64,
            query: floats * (model.num_attention_heads * model.head_dim) as f64,
            key_value: floats * (model.num_key_value_heads * model.head_dim) as f64,
            feed_forward: floats * model.intermediate_size as f64,
            scores: mask * (workload.rows * model.num_attention_heads) as f64,
            mask,
        }
    }

    fn of(&self, copies: Copies) -> Bytes {
        Bytes {
            layer: copies.hidden * self.hidden
                + copies.query * self.query
                + copies.key_value * self.key_value
                + copies.feed_forward * self.feed_forward,
            scores: copies.scores * self.scores,
            ..Bytes::default()
        }
    }
}

/// Where the adapters are.
struct Adapted {
    /// Layers from the lowest with an adapter to the last: those that have a backward pass.
    layers: usize,
    /// The layer's linear modules that have one in any layer: name, d_in.
    modules: Vec<(&'static str, usize)>,
}

impl Adapted {
    fn new(model: &LlamaConfig, options: &PlanOptions) -> Result<Self, LoraError> {
        let selector: ModuleSelector = options.lora.selector()?;
        let adapted =
            |layer: usize, name: &str| selector.matches(&format!("model.layers.{layer}.{name}"));
        let linears = model.layer_linears();
        let all = 0..model.num_hidden_layers;
        let lowest = all
            .clone()
            .find(|layer| linears.iter().any(|(name, ..)| adapted(*layer, name)));
        let modules = linears
            .iter()
            .filter(|(name, ..)| all.clone().any(|layer| adapted(layer, name)))
            .map(|(name, d_in, ..)| (*name, *d_in));
        Ok(Self {
            layers: model.num_hidden_layers - lowest.unwrap_or(model.num_hidden_layers),
            modules: modules.collect(),
        })
    }

    /// Floats a token that the adapters of a layer leave on the tape: the low-rank product, and
    /// the inputs that no other module keeps.
    fn tape(&self, model: &LlamaConfig, options: &PlanOptions) -> f64 {
        let mut floats = (options.lora.r * self.modules.len()) as f64;
        let has = |name: &str| {
            self.modules
                .iter()
                .any(|(module, _)| module.ends_with(name))
        };
        if has("o_proj") {
            floats += (model.num_attention_heads * model.head_dim) as f64;
        }
        if has("gate_proj") || has("up_proj") {
            floats += model.hidden_size as f64;
        }
        if has("down_proj") {
            floats += model.intermediate_size as f64;
        }
        if options.lora.lora_dropout > 0.0 {
            // The mask and the input after it.
            floats += self
                .modules
                .iter()
                .map(|(_, d_in)| 2.0 * *d_in as f64)
                .sum::<f64>();
        }
        floats
    }

    /// An adapter on `down_proj` adds a second gradient of its input.
    fn down_backward(&self, sizes: &Sizes) -> f64 {
        match self
            .modules
            .iter()
            .any(|(name, _)| name.ends_with("down_proj"))
        {
            true => 0.9 * sizes.feed_forward,
            false => 0.0,
        }
    }
}

/// Weights that exist dense for a moment.
fn unpacked(model: &LlamaConfig, options: &PlanOptions) -> f64 {
    let linears = model.layer_linears();
    let largest = linears
        .iter()
        .map(|(_, d_in, d_out, _)| d_in * d_out)
        .max()
        .unwrap_or(0);
    let floats = match (options.quantization, options.on_gpu) {
        // The product with the transposed weight packs it anew.
        (Quantization::None, false) => 2 * largest,
        (Quantization::None, true) => 0,
        (_, false) => largest.min(PANEL),
        (_, true) => largest,
    };
    (floats * options.float_bytes) as f64
}

#[cfg(test)]
mod tests {
    use lora_core::TargetModules;

    use super::super::tests::llama;
    use super::super::{Plan, Workload};
    use super::*;

    /// `(([vocab, hidden, feed-forward, layers], [heads, key heads]), ([rows, tokens a row, supervised
    /// a row], r, all-linear, 8 bits, checkpointing), MB)`: the peak of what `gradients::accumulate`
    /// allocates on the CPU in a second micro-batch, counted in a global allocator.
    type Measured = (
        ([usize; 4], [usize; 2]),
        ([usize; 3], usize, bool, bool, bool),
        f64,
    );

    #[rustfmt::skip]
    const MEASURED: &[Measured] = &[
        (([64, 256, 512, 4], [4, 4]), ([1, 256, 1], 4, false, true, true), 11.58),
        (([64, 256, 512, 8], [4, 4]), ([1, 256, 1], 4, false, true, true), 12.67),
        (([64, 256, 512, 4], [4, 4]), ([1, 512, 1], 4, false, true, true), 30.20),
        (([64, 256, 512, 4], [4, 4]), ([2, 256, 1], 4, false, true, true), 20.58),
        (([64, 256, 1024, 4], [4, 4]), ([1, 256, 1], 4, false, true, true), 14.79),
        (([64, 256, 512, 4], [4, 2]), ([1, 256, 1], 4, false, true, true), 11.29),
        (([64, 256, 512, 4], [4, 1]), ([8, 64, 1], 4, false, true, true), 14.79),
        (([64, 256, 512, 4], [4, 4]), ([1, 256, 1], 4, true, true, true), 12.84),
        (([64, 256, 512, 4], [4, 4]), ([8, 64, 1], 4, false, true, true), 15.61),
        (([64, 256, 512, 4], [4, 4]), ([32, 16, 1], 4, false, true, true), 14.42),
        (([64, 256, 1024, 4], [4, 4]), ([32, 16, 1], 4, false, true, true), 20.25),
        (([64, 256, 512, 8], [4, 4]), ([32, 16, 1], 4, false, true, true), 16.56),
        (([64, 256, 512, 4], [4, 4]), ([8, 64, 1], 4, false, true, false), 41.34),
        (([64, 256, 512, 8], [4, 4]), ([8, 64, 1], 4, false, true, false), 77.80),
        (([64, 256, 512, 8], [4, 4]), ([32, 16, 1], 4, false, true, false), 68.35),
        (([64, 256, 1024, 8], [4, 4]), ([32, 16, 1], 4, false, true, false), 103.87),
        (([64, 256, 512, 8], [4, 4]), ([1, 512, 1], 4, false, true, false), 169.46),
        (([64, 256, 512, 8], [4, 4]), ([1, 512, 1], 4, true, true, false), 184.91),
        (([64, 256, 512, 8], [4, 1]), ([32, 16, 1], 4, false, true, false), 61.91),
        (([49152, 64, 128, 4], [4, 4]), ([8, 64, 2], 4, false, true, true), 11.72),
        (([49152, 64, 128, 4], [4, 4]), ([8, 64, 8], 4, false, true, true), 40.04),
        (([49152, 64, 128, 4], [4, 4]), ([8, 64, 60], 4, false, true, true), 153.40),
        (([64, 256, 512, 4], [4, 4]), ([8, 64, 1], 64, false, true, true), 17.46),
        (([64, 256, 512, 4], [4, 4]), ([8, 64, 1], 64, true, true, true), 23.70),
        (([64, 256, 512, 4], [4, 4]), ([8, 64, 1], 64, true, true, false), 58.43),
        (([64, 256, 512, 4], [4, 4]), ([32, 16, 1], 4, true, true, true), 17.27),
        (([64, 256, 512, 4], [4, 4]), ([32, 16, 1], 4, true, true, false), 45.88),
        (([64, 256, 512, 4], [4, 4]), ([32, 16, 1], 64, true, true, false), 53.70),
        (([64, 256, 4096, 2], [4, 4]), ([32, 16, 1], 1, false, true, true), 50.97),
        (([64, 256, 8192, 2], [4, 4]), ([32, 16, 1], 1, false, true, true), 93.44),
        (([64, 256, 4096, 2], [4, 4]), ([64, 16, 1], 1, false, true, true), 98.71),
        (([64, 256, 4096, 2], [4, 4]), ([8, 64, 1], 1, false, true, true), 52.17),
        (([64, 256, 4096, 2], [4, 1]), ([32, 16, 1], 1, false, true, true), 50.17),
        (([64, 512, 4096, 2], [4, 4]), ([32, 16, 1], 1, false, true, true), 56.98),
        (([64, 256, 4096, 4], [4, 4]), ([32, 16, 1], 1, false, true, true), 52.01),
        (([64, 256, 4096, 2], [4, 4]), ([32, 16, 1], 1, false, false, true), 57.79),
        (([64, 256, 4096, 2], [4, 4]), ([32, 16, 1], 1, true, true, true), 67.78),
        (([64, 256, 32, 2], [4, 4]), ([1, 512, 1], 1, false, true, true), 29.07),
        (([64, 256, 32, 2], [4, 4]), ([2, 512, 1], 1, false, true, true), 55.44),
        (([64, 256, 32, 2], [8, 8]), ([1, 512, 1], 1, false, true, true), 49.99),
        (([64, 256, 32, 2], [4, 4]), ([4, 256, 1], 1, false, true, true), 33.68),
        (([64, 256, 32, 2], [4, 1]), ([1, 512, 1], 1, false, true, true), 28.27),
        (([64, 512, 32, 2], [4, 4]), ([1, 512, 1], 1, false, true, true), 34.01),
        (([64, 256, 512, 2], [4, 4]), ([1, 512, 1], 1, false, true, true), 28.55),
        (([64, 256, 32, 4], [4, 4]), ([1, 512, 1], 1, false, true, true), 30.11),
        (([64, 256, 32, 2], [4, 4]), ([1, 1024, 1], 1, false, true, true), 100.00),
        (([64, 256, 512, 2], [4, 4]), ([32, 16, 1], 1, false, true, false), 20.66),
        (([64, 256, 512, 6], [4, 4]), ([32, 16, 1], 1, false, true, false), 52.26),
        (([64, 256, 1024, 6], [4, 4]), ([32, 16, 1], 1, false, true, false), 79.29),
        (([64, 256, 512, 6], [4, 1]), ([32, 16, 1], 1, false, true, false), 47.46),
        (([64, 256, 512, 6], [4, 4]), ([8, 64, 1], 1, false, true, false), 59.35),
        (([64, 256, 512, 6], [4, 4]), ([1, 512, 1], 1, false, true, false), 128.47),
        (([64, 512, 512, 6], [4, 4]), ([32, 16, 1], 1, false, true, false), 74.28),
        (([64, 256, 512, 6], [4, 4]), ([64, 16, 1], 1, false, true, false), 101.57),
        (([64, 256, 512, 6], [4, 4]), ([32, 16, 1], 1, true, true, false), 65.54),
        (([64, 256, 512, 6], [4, 4]), ([32, 16, 1], 32, true, true, false), 71.48),
        (([64, 256, 512, 6], [4, 4]), ([32, 16, 1], 32, false, true, false), 54.54),
    ];

    /// Thread pool and buffers of the matrix product; on the plan they are in the program's part.
    const THREADS: f64 = 1.5;

    #[test]
    fn predictions_are_within_a_tenth_of_measured_peaks() {
        let mut wrong = Vec::new();
        for measured in MEASURED {
            let ((sizes, heads), ([rows, length, supervised], r, all, bits8, checkpointing), mb) =
                *measured;
            let mut options = super::super::tests::options(r);
            options.gradient_checkpointing = checkpointing;
            options.workload = Workload::of_rows(&vec![length; rows], rows * supervised);
            if all {
                options.lora.target_modules = TargetModules::AllLinear;
            }
            if !bits8 {
                options.quantization = Quantization::None;
            }
            let plan = Plan::new(&llama(sizes, heads, true), &options).unwrap();
            let step: u64 = plan.step.iter().map(|part| part.bytes).sum();
            let predicted = (step + plan.adapters[1].bytes) as f64 / 1e6 + THREADS;
            let off = predicted / mb - 1.0;
            if off.abs() > 0.1 {
                wrong.push(format!(
                    "{off:+.3} {predicted:.2} {measured:?} {}",
                    plan.phase
                ));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
