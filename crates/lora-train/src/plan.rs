//! The plan of a run from shapes alone: parameters, and peak memory by part.
//!
//! Memory in use is highest in one of three phases of a step: the loss, or the backward pass
//! through the feed-forward or the attention block of the last layers. The plan adds up what is
//! allocated in each phase and takes the largest sum. `tests/tests/plan.rs` counts the bytes of
//! real passes and compares.

mod activations;
mod cards;
pub mod flops;
pub mod on_gpu;
mod report;

use llama_burn::{LinearSpec, LlamaConfig, WholeElements};
use lora_core::{Bias, LoraConfig, LoraError, ParameterCounts, Quantization, TargetModules};

use data::Batch;

pub use report::{alternatives, shape};

/// Everything that the memory of a run depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanOptions {
    /// The adapters.
    pub lora: LoraConfig,
    /// How the decoder's linear weights are stored.
    pub quantization: Quantization,
    /// Bytes of a float in the computation: 4 for f32, 2 for bf16 and f16.
    pub float_bytes: usize,
    /// Whether a layer's activations are recomputed in the backward pass.
    pub gradient_checkpointing: bool,
    /// Whether a step adds up several micro-batches.
    pub accumulates: bool,
    /// Whether the model is on a GPU. The program's own memory is then not part of the sum.
    pub on_gpu: bool,
    /// The largest micro-batch.
    pub workload: Workload,
}

/// The size of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Examples.
    pub rows: usize,
    /// Tokens of the longest example.
    pub longest_row: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Tokens in the loss.
    pub supervised: usize,
}

impl Workload {
    /// A micro-batch of `batch_size` examples of `max_seq_len` tokens, all of them in the loss: the
    /// largest that a configuration allows, for when the data is not known.
    pub fn largest(batch_size: usize, max_seq_len: usize, max_batch_tokens: Option<usize>) -> Self {
        let fitting = max_batch_tokens.map_or(batch_size, |tokens| tokens / max_seq_len.max(1));
        let rows = batch_size.min(fitting).max(1);
        // Capped above any machine's memory, so that no product with a width overflows 64 bits.
        let tokens = rows.saturating_mul(max_seq_len).min(1 << 26);
        Self {
            rows,
            longest_row: max_seq_len,
            tokens,
            supervised: tokens,
        }
    }

    /// A micro-batch of examples with these token counts and `supervised` tokens in the loss.
    pub fn of_rows(lengths: &[usize], supervised: usize) -> Self {
        Self {
            rows: lengths.len(),
            longest_row: lengths.iter().copied().max().unwrap_or(0),
            tokens: lengths.iter().sum(),
            supervised,
        }
    }

    /// A packed micro-batch: shared prefixes count once.
    pub fn of_batch(batch: &Batch) -> Self {
        let segments = batch.tokens.segments.iter();
        let rows = segments.zip(batch.tokens.offsets());
        Self {
            rows: batch.tokens.segments.len(),
            longest_row: rows
                .map(|(segment, offset)| offset + segment.length)
                .max()
                .unwrap_or(0),
            tokens: batch.tokens.ids.len(),
            supervised: batch.target_ids.len(),
        }
    }
}

/// One line of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Parameters of the model in it; `None` for memory that only training needs.
    pub parameters: Option<u64>,
    /// Bytes.
    pub bytes: u64,
}

/// The memory and the parameters of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Trainable and frozen parameters.
    pub counts: ParameterCounts,
    /// The base model, part by part.
    pub base: Vec<Part>,
    /// The adapters and their training state: weights, gradients, moments.
    pub adapters: Vec<Part>,
    /// Other memory in use at the peak of a step.
    pub step: Vec<Part>,
    /// The phase of a step in which memory peaks.
    pub phase: &'static str,
    /// The program itself; 0 on a GPU.
    pub program: u64,
    /// Memory that loading needs in addition to the base model: the weight files, which are mapped
    /// and which the system can drop when memory is short, and the largest tensor in f32.
    pub loading: Part,
    /// Host memory that writing a checkpoint needs in addition to the base model and the adapters,
    /// while no step runs.
    pub saving: Part,
}

/// Resident memory of the program with its thread pool before a model is loaded, and what the
/// allocator holds back.
const PROGRAM: u64 = 24 << 20;

/// Bytes per vocabulary token in the tokenizer (measured with 49,152 of them): its text in both
/// directions, and a merge.
const OF_TOKEN: u64 = 512;

/// Copies of the adapters that a checkpoint is written from: weights and two moments, the adapter
/// in PEFT's layout, and the best one so far.
const COPIES: u64 = 5;

/// Copies of the frozen matrices of the adapters while these are saved: on the host, and in PEFT's layout.
const COPIES_OF_SHARED: u64 = 2;

/// Elements of B of all adapted modules of a layer, each with its own vectors, and of their gradients.
fn of_one_layer(model: &LlamaConfig, lora: &LoraConfig) -> Result<u64, LoraError> {
    let selector = lora.selector()?;
    let in_layer = |layer: usize| {
        let linears = model.layer_linears().into_iter();
        let adapted = linears
            .filter(|linear| selector.matches(&format!("model.layers.{layer}.{}", linear.name)));
        adapted
            .map(|linear| 2 * lora.r * linear.d_out)
            .sum::<usize>()
    };
    let most = (0..model.num_hidden_layers).map(in_layer).max();
    Ok(most.unwrap_or(0) as u64)
}

impl Plan {
    /// Plans a run of `model`.
    ///
    /// # Errors
    ///
    /// If the adapters' configuration is invalid or selects no module.
    pub fn new(model: &LlamaConfig, options: &PlanOptions) -> Result<Self, LoraError> {
        let quantization = options.stored();
        let counts = model.count(&options.lora, quantization, options.float_bytes)?;
        let whole = model.whole_elements(&options.lora, quantization, options.float_bytes)?;
        let base = base_parts(model, options, &counts, whole);
        let adapter = |name: &str, copies: u64| Part {
            name: name.into(),
            parameters: None,
            bytes: copies * counts.adapter_bytes,
        };
        let peak = activations::peak(model, options, counts.adapter_bytes)?;
        let mut step = peak.step;
        let mut adapters = vec![
            Part {
                parameters: Some(counts.trainable),
                ..adapter(&options.adapter_name(), 1)
            },
            Part {
                bytes: peak.adapter_gradients,
                ..adapter("gradients of the adapters", 1)
            },
            adapter("AdamW moments", 2),
        ];
        if counts.shared > 0 {
            adapters.push(Part {
                bytes: 4 * counts.shared,
                ..adapter("frozen matrices of the adapters", 1)
            });
            step.push(Part {
                bytes: 4 * of_one_layer(model, &options.lora)?,
                ..adapter("matrices of a layer's adapters", 1)
            });
        }
        Ok(Self {
            counts,
            base,
            adapters,
            step,
            phase: peak.phase,
            program: if options.on_gpu {
                0
            } else {
                PROGRAM + OF_TOKEN * model.vocab_size as u64
            },
            loading: loading(model),
            saving: Part {
                name: "while saving (a second copy of adapters and moments)".into(),
                parameters: None,
                bytes: COPIES * counts.adapter_bytes + COPIES_OF_SHARED * 4 * counts.shared,
            },
        })
    }

    /// Bytes at the peak of training.
    pub fn peak(&self) -> u64 {
        let parts = self.base.iter().chain(&self.adapters).chain(&self.step);
        parts.map(|part| part.bytes).sum::<u64>() + self.program
    }

    /// Bytes at the peak of loading, the mapped weight files included.
    pub fn loading_peak(&self) -> u64 {
        self.base_bytes() + self.loading.bytes + self.program
    }

    /// Bytes while a checkpoint is written.
    pub fn saving_peak(&self) -> u64 {
        let trained = self.adapters.iter().map(|part| part.bytes).sum::<u64>();
        self.base_bytes() + trained + self.saving.bytes + self.program
    }

    /// Bytes at the peak of the run: loading, training or saving, whichever is largest.
    pub fn resident_peak(&self) -> u64 {
        match self.program {
            0 => self.peak(),
            _ => self.peak().max(self.loading_peak()).max(self.saving_peak()),
        }
    }

    /// Bytes of the base model.
    pub fn base_bytes(&self) -> u64 {
        self.base.iter().map(|part| part.bytes).sum()
    }

    /// The peak as a few names and numbers, for the summary of a run.
    pub fn summary(&self) -> Vec<(String, u64)> {
        let sum = |parts: &[Part]| parts.iter().map(|part| part.bytes).sum();
        // Loading and training do not overlap. A checkpoint is made in the host's memory.
        let activations: u64 = sum(&self.step);
        let (name, bytes) = if self.saving.bytes > activations && self.program > 0 {
            ("writing a checkpoint", self.saving.bytes)
        } else {
            ("activations", activations)
        };
        vec![
            ("base model".into(), self.base_bytes()),
            ("adapters and optimizer".into(), sum(&self.adapters)),
            (name.into(), bytes),
            ("program and tokenizer".into(), self.program),
        ]
    }
}

impl PlanOptions {
    /// Burn's CPU backend stores each 4-bit integer in a byte.
    fn stored(&self) -> Quantization {
        match (self.quantization, self.on_gpu) {
            (Quantization::Bits4, false) => Quantization::Bits8,
            (quantization, _) => quantization,
        }
    }

    /// Bytes of the logits that exist at a time.
    fn logits_bytes(&self) -> usize {
        if self.on_gpu {
            kernels::LOGITS_BYTES_GPU
        } else {
            kernels::LOGITS_BYTES
        }
    }

    /// On the CPU, which computes in f32, embedding and `lm_head` keep the type of their file.
    fn table_bytes(&self, model: &LlamaConfig) -> usize {
        if self.on_gpu {
            self.float_bytes
        } else {
            self.float_bytes.min(model.weight_bytes)
        }
    }

    fn adapter_name(&self) -> String {
        let rows = if self.lora.trainable_token_indices.is_empty() {
            ""
        } else {
            ", embedding rows of tokens"
        };
        format!(
            "adapters: {}, r {}{rows}{}, f32",
            targets(&self.lora.target_modules),
            self.lora.r,
            beside(&self.lora)
        )
    }
}

/// The targets as in a configuration: `q_proj, k_proj, v_proj`.
pub fn targets(targets: &TargetModules) -> String {
    match targets {
        TargetModules::Names(names) => names.join(", "),
        TargetModules::Regex(pattern) => pattern.clone(),
        TargetModules::AllLinear => "all-linear".into(),
    }
}

/// What is trained beside the adapters, to be appended to the targets: `, biases of adapted modules, whole: norm`.
pub fn beside(lora: &LoraConfig) -> String {
    let mut text = String::new();
    text += match lora.bias {
        Bias::None => "",
        Bias::All => ", all biases",
        Bias::LoraOnly => ", biases of adapted modules",
    };
    if lora.lora_bias {
        text += ", biases of B";
    }
    if !lora.modules_to_save.is_empty() {
        text += ", whole: ";
        text += &lora.modules_to_save.join(", ");
    }
    text
}

/// The base model's frozen parts. Their sums are those of `counts`. `whole` is trained.
fn base_parts(
    model: &LlamaConfig,
    options: &PlanOptions,
    counts: &ParameterCounts,
    whole: WholeElements,
) -> Vec<Part> {
    let float = options.table_bytes(model) as u64;
    let table = (model.vocab_size * model.hidden_size) as u64;
    let tied = model.tie_word_embeddings;
    let linear: u64 = model
        .layer_linears()
        .iter()
        .map(|linear| (linear.elements() * model.num_hidden_layers) as u64)
        .sum();
    let linear = linear - whole.linear as u64;
    let bits = match (options.quantization, options.stored()) {
        (Quantization::Bits4, Quantization::Bits8) => "4 bits stored in bytes".into(),
        (Quantization::Bits4, _) => "4 bits".into(),
        (Quantization::Bits8, _) => "8 bits".into(),
        (Quantization::None, _) => format!("{} bits", 8 * options.float_bytes),
    };
    let embedding = if tied {
        "embedding, tied to lm_head"
    } else {
        "embedding"
    };
    let part = |name: String, parameters: u64, bytes: u64| Part {
        name,
        parameters: Some(parameters),
        bytes,
    };
    let mut parts = Vec::new();
    // The two uses of a tied table keep it until both are trained.
    let trains_embedding = whole.embedding > 0 && (!tied || whole.head > 0);
    if !trains_embedding {
        parts.push(part(embedding.into(), table, table * float));
    }
    parts.push(part(
        format!("linear layers, {bits}"),
        linear,
        counts.linear_bytes,
    ));
    if !tied && whole.head == 0 {
        parts.push(part("lm_head".into(), table, table * float));
    }
    let rest = counts.frozen - parts.iter().filter_map(|part| part.parameters).sum::<u64>();
    // Norms are f32 whatever the compute type.
    parts.push(part("norms and biases".into(), rest, rest * 4));
    parts
}

/// Tensors are read one at a time: the mapped part of their file, a copy of the bytes, the f32
/// values, and the transposed values. The embedding comes first and is only read.
fn loading(model: &LlamaConfig) -> Part {
    let linears = model.layer_linears();
    let largest = linears.iter().map(LinearSpec::elements).max();
    let largest = (largest.unwrap_or(0) * (model.weight_bytes + 8)) as u64;
    Part {
        name: "while loading (part of the weight files memory-mapped, one tensor at a time in f32)"
            .into(),
        parameters: None,
        bytes: llama_burn::MAPPED_BYTES as u64 + largest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn llama(
        [
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
        ]: [usize; 4],
        [num_attention_heads, num_key_value_heads]: [usize; 2],
        tie_word_embeddings: bool,
    ) -> LlamaConfig {
        LlamaConfig {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim: hidden_size / num_attention_heads,
            max_position_embeddings: 8192,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: llama_burn::RopeScaling::Default,
            tie_word_embeddings,
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_ids: vec![],
            weight_bytes: 2,
            ..LlamaConfig::default()
        }
    }

    pub(super) fn smollm2() -> LlamaConfig {
        llama([49_152, 576, 1536, 30], [9, 3], true)
    }

    pub(super) fn options(r: usize) -> PlanOptions {
        PlanOptions {
            lora: LoraConfig {
                r,
                ..LoraConfig::default()
            },
            quantization: Quantization::Bits8,
            float_bytes: 4,
            gradient_checkpointing: true,
            accumulates: false,
            on_gpu: false,
            workload: Workload::of_rows(&[64; 8], 16),
        }
    }

    #[test]
    fn llama_70b_trains_11_141_120_of_70_553_706_496_parameters() {
        let model = llama([128_256, 8192, 28_672, 80], [64, 8], false);
        let plan = Plan::new(&model, &options(4)).unwrap();
        assert_eq!(plan.counts.trainable, 11_141_120);
        assert_eq!(plan.counts.frozen, 70_553_706_496);
        assert_eq!(format!("{:.1}", plan.counts.ratio()), "6332.7");
    }

    #[test]
    fn totals_are_the_published_ones_and_the_parts_add_up() {
        let cases = [
            (
                "Llama 3.1 8B",
                [128_256, 4096, 14_336, 32],
                [32, 8],
                false,
                8_030_261_248,
            ),
            (
                "Llama 3.2 1B",
                [128_256, 2048, 8192, 16],
                [32, 8],
                true,
                1_235_814_400,
            ),
            (
                "TinyLlama 1.1B",
                [32_000, 2048, 5632, 22],
                [32, 4],
                false,
                1_100_048_384,
            ),
            (
                "SmolLM2-135M",
                [49_152, 576, 1536, 30],
                [9, 3],
                true,
                134_515_008,
            ),
        ];
        for (name, sizes, heads, tied, total) in cases {
            for on_gpu in [false, true] {
                let options = PlanOptions {
                    on_gpu,
                    float_bytes: if on_gpu { 2 } else { 4 },
                    ..options(8)
                };
                let plan = Plan::new(&llama(sizes, heads, tied), &options).unwrap();
                assert_eq!(plan.counts.frozen, total, "{name}");
                let parameters = plan.base.iter().filter_map(|part| part.parameters);
                assert_eq!(parameters.sum::<u64>(), total, "{name}");
            }
        }
    }

    #[test]
    fn eight_bits_and_their_scales_take_nine_bytes_for_eight_weights() {
        let on_gpu = PlanOptions {
            on_gpu: true,
            ..options(8)
        };
        let plan = Plan::new(&smollm2(), &on_gpu).unwrap();
        assert_eq!(plan.base[1].bytes, 106_168_320 * 9 / 8);
        let plan = Plan::new(&smollm2(), &options(8)).unwrap();
        assert_eq!(plan.base[1].parameters, Some(106_168_320));
        assert_eq!(plan.base[1].bytes, 106_168_320 * 9 / 8);
        // In the 16-bit type of its file.
        assert_eq!(plan.base[0].bytes, 28_311_552 * 2);
        assert_eq!(plan.adapters[0].bytes, 4 * plan.counts.trainable);
    }

    #[test]
    fn four_bits_save_nothing_on_the_cpu_and_half_on_a_gpu() {
        let bytes = |quantization, on_gpu| {
            let options = PlanOptions {
                quantization,
                on_gpu,
                ..options(8)
            };
            Plan::new(&smollm2(), &options).unwrap().base[1].bytes
        };
        let (four, eight) = (Quantization::Bits4, Quantization::Bits8);
        assert_eq!(bytes(four, false), bytes(eight, false));
        assert_eq!(bytes(four, true), 106_168_320 * 5 / 8);
    }

    #[test]
    fn a_checkpoint_of_large_adapters_takes_more_than_a_step() {
        let sum = |plan: &Plan| -> u64 { plan.summary().iter().map(|(_, bytes)| bytes).sum() };
        let large = PlanOptions {
            lora: LoraConfig {
                r: 64,
                target_modules: TargetModules::AllLinear,
                ..LoraConfig::default()
            },
            ..options(8)
        };
        let plan = Plan::new(&smollm2(), &large).unwrap();
        assert!(plan.saving_peak() > plan.peak());
        assert_eq!(plan.resident_peak(), plan.saving_peak());
        assert_eq!(sum(&plan), plan.saving_peak());
        // On a GPU the checkpoint is made in the host's memory.
        let on_gpu = PlanOptions {
            on_gpu: true,
            ..large
        };
        let plan = Plan::new(&smollm2(), &on_gpu).unwrap();
        assert_eq!(plan.resident_peak(), plan.peak());
        assert_eq!(sum(&plan), plan.peak());
    }

    #[test]
    fn the_summary_adds_up_to_the_peak() {
        for on_gpu in [false, true] {
            let options = PlanOptions {
                on_gpu,
                ..options(8)
            };
            let plan = Plan::new(&smollm2(), &options).unwrap();
            let sum: u64 = plan.summary().iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(sum, plan.peak());
        }
    }

    #[test]
    fn the_largest_workload_keeps_to_the_token_limit() {
        let workload = Workload::largest(8, 512, Some(1100));
        assert_eq!((workload.rows, workload.tokens), (2, 1024));
        assert_eq!(Workload::largest(8, 512, None).tokens, 4096);
        assert_eq!(
            Workload::largest(8, 512, Some(100)).rows,
            1,
            "an example is never truncated"
        );
    }

    #[test]
    fn a_target_that_the_model_lacks_is_an_error() {
        let mut options = options(8);
        options.lora.target_modules = TargetModules::Names(vec!["c_attn".into()]);
        let error = Plan::new(&smollm2(), &options).unwrap_err().to_string();
        assert!(
            error.contains("c_attn") && error.contains("q_proj"),
            "{error}"
        );
    }
}
