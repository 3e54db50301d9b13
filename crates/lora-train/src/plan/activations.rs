//! Memory in use during a step besides the model and the adapters.
//!
//! Forward and backward pass are manual (`llama-burn/src/passes.rs`), so the saved tensors can be
//! counted one by one. A test of the workspace (`tests/tests/plan.rs`) counts every byte of real
//! passes and compares.

use llama_burn::{EMBEDDING_WEIGHT, LinearSpec, LlamaConfig};
use lora_core::{LoraError, ModuleSelector, Quantization};

use super::{Part, PlanOptions};
use peft::trains_embedding;
use train_step::loss::positions_at_once;

/// Floats of a weight that the CPU dequantizes at a time (lora-core's `frozen_linear`).
const PANEL: usize = 256 * 1024;

/// Copies of a tile of attention scores on a GPU: scores, weights, their gradients, the mask.
const SCORE_COPIES: f64 = 5.0;

/// Bytes of a phase, by purpose.
#[derive(Debug, Clone, Copy, Default)]
struct Bytes {
    inputs: f64,
    layers: f64,
    gradients: f64,
    scores: f64,
    logits: f64,
    unpacked: f64,
    /// The adapters' gradients that exist in this phase.
    adapters: f64,
}

impl Bytes {
    fn sum(self) -> f64 {
        self.step() + self.adapters
    }

    /// Without the adapters' share.
    fn step(self) -> f64 {
        self.inputs + self.layers + self.gradients + self.scores + self.logits + self.unpacked
    }
}

/// Memory in use at the peak of a step.
pub(super) struct Peak {
    /// The phase of the peak.
    pub(super) phase: &'static str,
    /// Memory in use then besides the model and the adapters.
    pub(super) step: Vec<Part>,
    /// Bytes of the adapters' gradients that exist then.
    pub(super) adapter_gradients: u64,
}

/// The phase of a step in which the most memory is in use, and what is in use then.
///
/// # Errors
///
/// If the adapters' configuration is invalid.
pub(super) fn peak(
    model: &LlamaConfig,
    options: &PlanOptions,
    adapter_bytes: u64,
) -> Result<Peak, LoraError> {
    let adapted = Adapted::new(model, options)?;
    let all = Sizes::new(model, options, &adapted, options.workload.tokens);
    // From the last layer's attention on, only the positions in the loss are computed.
    let wanted = Sizes::new(model, options, &adapted, options.workload.supervised);
    let layers = adapted.layers as f64;
    let below = (layers - 1.0).max(0.0);
    let checkpointing = options.gradient_checkpointing;
    // The number of whole layers whose activations exist besides those of the layer at work.
    let kept_layers = if checkpointing { 0.0 } else { below };
    let inputs = layers * all.hidden;
    let last = all.attention + wanted.feed_forward_block;
    let unpacked = unpacked(model, options);

    // With an earlier micro-batch every adapter has a gradient already; otherwise gradients appear
    // layer by layer.
    let adapter_bytes = adapter_bytes as f64;
    let of_layers = |count: f64| {
        if options.accumulates {
            adapter_bytes
        } else {
            adapter_bytes * count / layers.max(1.0)
        }
    };

    let whole = model.whole_elements(&options.lora, options.stored(), options.float_bytes)?;
    let supervised = options.workload.supervised;
    let at_once = supervised.min(positions_at_once(model.vocab_size, options.logits_bytes()));
    let loss = Bytes {
        inputs,
        layers: kept_layers * all.layer() + if checkpointing { 0.0 } else { last },
        gradients: 3.0 * wanted.hidden,
        // A chunk's gradient of the output layer and the sum of those before it.
        adapters: of_layers(0.0) + 8.0 * whole.head as f64,
        logits: copies_of_scores(model, options) * 4.0 * (at_once * model.vocab_size) as f64,
        ..Bytes::default()
    };
    // With one head per thread, each head has its own gradients of keys and values.
    let heads = if options.on_gpu {
        0.0
    } else {
        2.0 * f64::from(llama_burn::heads_apart(model.num_attention_heads)) * all.query
    };
    // The last layer's feed-forward activations are freed by then; the gradients of its output with
    // respect to query, key and value are as large.
    let attention = Bytes {
        inputs,
        layers: kept_layers * all.layer() + all.attention,
        gradients: wanted.hidden + 2.0 * all.query + 2.0 * all.key_value + all.log_sums + heads,
        scores: all.tile,
        adapters: of_layers(1.0),
        ..Bytes::default()
    };
    let working = if adapted.has("down_proj") { 2.0 } else { 1.0 };
    // Recomputing a layer also produces its output.
    let output = if checkpointing { all.hidden } else { 0.0 };
    let feed_forward = Bytes {
        inputs: if below > 0.0 {
            inputs - all.hidden
        } else {
            inputs
        },
        layers: if below > 0.0 {
            kept_layers.max(1.0) * all.layer()
        } else {
            last
        },
        gradients: if below > 0.0 {
            all.hidden + output + working * all.feed_forward
        } else {
            wanted.hidden + working * wanted.feed_forward
        },
        unpacked,
        adapters: of_layers(1.0),
        ..Bytes::default()
    };
    let first = Bytes {
        inputs: all.hidden,
        layers: all.layer(),
        gradients: all.hidden + output + working * all.feed_forward,
        unpacked,
        adapters: of_layers(layers),
        ..Bytes::default()
    };
    // The gradients are joined into one tensor. Beside whole weights, activations are not always larger.
    let copies = if options.accumulates { 3.0 } else { 2.0 };
    let joining = Bytes {
        adapters: if options.lora.trains_whole() {
            copies * adapter_bytes
        } else {
            0.0
        },
        ..Bytes::default()
    };

    let phases = [
        ("the loss", loss),
        ("the backward pass of the last layer's attention", attention),
        ("the backward pass of a feed-forward block", feed_forward),
        ("the backward pass of the lowest adapted layer", first),
        ("the sum of the gradients", joining),
    ];
    let mut largest = phases[0];
    for phase in phases {
        if phase.1.sum() > largest.1.sum() {
            largest = phase;
        }
    }
    let (name, bytes) = largest;
    let layer = if checkpointing {
        "recomputed activations of one layer"
    } else {
        "activations of all layers"
    };
    let parts = [
        ("layer inputs", bytes.inputs),
        (layer, bytes.layers),
        ("gradients of activations", bytes.gradients),
        ("attention scores of one tile", bytes.scores),
        ("logits", bytes.logits),
        ("dequantized weights", bytes.unpacked),
    ];
    let parts = parts.into_iter().filter(|(_, bytes)| *bytes >= 1.0);
    let part = |(name, bytes): (&str, f64)| Part {
        name: name.into(),
        parameters: None,
        bytes: bytes as u64,
    };
    Ok(Peak {
        phase: name,
        step: parts.map(part).collect(),
        adapter_gradients: bytes.adapters as u64,
    })
}

/// The logits of a sharded `lm_head` are concatenated from those of the shards. On a GPU logits,
/// their exponentials and the gradient exist at a time; on the CPU the gradient reuses the memory
/// of the logits.
fn copies_of_scores(model: &LlamaConfig, options: &PlanOptions) -> f64 {
    if options.on_gpu {
        return 3.0;
    }
    let table = 4 * model.vocab_size * model.hidden_size;
    if table > llama_burn::PIECE_BYTES {
        2.0
    } else {
        1.0
    }
}

/// Bytes of one tensor of each size, and of a layer's saved activations, for a number of tokens.
struct Sizes {
    hidden: f64,
    query: f64,
    key_value: f64,
    feed_forward: f64,
    log_sums: f64,
    /// Attention scores that exist at a time, on a GPU.
    tile: f64,
    /// Saved by the attention block in addition to the layer's input.
    attention: f64,
    /// Saved by the feed-forward block.
    feed_forward_block: f64,
}

impl Sizes {
    fn new(model: &LlamaConfig, options: &PlanOptions, adapted: &Adapted, tokens: usize) -> Self {
        let floats = (tokens * options.float_bytes) as f64;
        let low = |names: &[&str]| {
            let modules = names.iter().map(|name| adapted.kept_floats(name));
            floats * modules.sum::<usize>() as f64
        };
        // Hidden states and their gradients are f32 whatever the compute type.
        let hidden = 4.0 * (tokens * model.hidden_size) as f64;
        let query = floats * model.query_width() as f64;
        let key_value = floats * model.key_width() as f64;
        let feed_forward = floats * model.intermediate_size as f64;
        // The inputs of the norms of queries and keys, and on a GPU a factor per head.
        let heads = model.num_attention_heads + model.num_key_value_heads;
        let factors = f64::from(options.on_gpu) * 4.0 * (tokens * heads) as f64;
        let head_norms = f64::from(model.query_key_norm) * (query + key_value + factors);
        let log_sums = 4.0 * (tokens * model.num_attention_heads) as f64;
        let workload = options.workload;
        let scores = workload.rows * model.num_attention_heads * workload.longest_row;
        let scores = (scores * workload.longest_row).min(llama_burn::SCORES_AT_ONCE);
        Self {
            hidden,
            query,
            key_value,
            feed_forward,
            log_sums,
            tile: if options.on_gpu {
                SCORE_COPIES * 4.0 * scores as f64
            } else {
                0.0
            },
            // On a GPU including the attention output, which the backward pass multiplies with its
            // gradient.
            attention: query
                + f64::from(options.on_gpu) * query
                + 2.0 * key_value
                + log_sums
                + head_norms
                + low(&["q_proj", "k_proj", "v_proj"]),
            // Including the attention output if the adapter of `o_proj` reads it again.
            feed_forward_block: hidden
                + f64::from(adapted.has("o_proj")) * query
                + 2.0 * feed_forward
                + low(&["o_proj", "gate_proj", "up_proj", "down_proj"]),
        }
    }

    fn layer(&self) -> f64 {
        self.attention + self.feed_forward_block
    }
}

/// Where the adapters and the trained tensors of the base model are.
struct Adapted {
    /// Layers from the lowest one in which something is trained to the last: those that have a backward pass. All
    /// layers if the embedding or rows of it are trained.
    layers: usize,
    /// The layer's linear modules that are adapted or whole in any layer, with the floats per token that the
    /// most demanding of them saves: its low-rank activation, and the input of the scaling of outputs.
    modules: Vec<(&'static str, usize)>,
}

impl Adapted {
    fn new(model: &LlamaConfig, options: &PlanOptions) -> Result<Self, LoraError> {
        let selector: ModuleSelector = options.lora.selector()?;
        let full = |layer: usize, name: &str| format!("model.layers.{layer}.{name}");
        let adapted = |layer: usize, name: &str| selector.matches(&full(layer, name));
        let linears = model.layer_linears();
        let all = 0..model.num_hidden_layers;
        let whole = model.whole_tensors(&options.lora)?;
        let is_whole = |name: &str| whole.iter().any(|(tensor, _)| tensor == name);
        let whole_in = |layer: usize| {
            let prefix = format!("model.layers.{layer}.");
            whole.iter().any(|(tensor, _)| tensor.starts_with(&prefix))
        };
        let embedding = trains_embedding(&options.lora, model) || is_whole(EMBEDDING_WEIGHT);
        let lowest = if embedding {
            Some(0)
        } else {
            all.clone().find(|layer| {
                let mut linears = linears.iter();
                linears.any(|linear| adapted(*layer, linear.name)) || whole_in(*layer)
            })
        };
        let modules = linears.iter().filter_map(|linear| {
            let LinearSpec { name, d_out, .. } = *linear;
            let layers = all.clone().filter(|layer| adapted(*layer, name));
            let r = layers.map(|layer| selector.r(&full(layer, name))).max();
            let Some(r) = r else {
                let weight = |layer| is_whole(&format!("{}.weight", full(layer, name)));
                return all.clone().any(weight).then_some((name, 0));
            };
            let scales = options.lora.method.facts().scales_outputs;
            let scaled = if scales { d_out } else { 0 };
            Some((name, r + scaled))
        });
        Ok(Self {
            layers: model.num_hidden_layers - lowest.unwrap_or(model.num_hidden_layers),
            modules: modules.collect(),
        })
    }

    fn has(&self, name: &str) -> bool {
        let mut modules = self.modules.iter();
        modules.any(|(module, _)| module.ends_with(name))
    }

    fn kept_floats(&self, name: &str) -> usize {
        let mut modules = self.modules.iter();
        let found = modules.find(|(module, _)| module.ends_with(name));
        found.map_or(0, |(_, floats)| *floats)
    }
}

/// Weights that exist dense for a moment.
fn unpacked(model: &LlamaConfig, options: &PlanOptions) -> f64 {
    let linears = model.layer_linears();
    let largest = linears.iter().map(LinearSpec::elements).max().unwrap_or(0);
    let floats = match (options.quantization, options.on_gpu) {
        (Quantization::None, _) => 0,
        (_, false) => largest.min(PANEL),
        (_, true) => largest,
    };
    (floats * options.float_bytes) as f64
}
