//! Every key of a run's configuration, in one table.
//!
//! An entry of the table is all that a new key needs. From it come the field of [`Config`], the parser, the writer, the
//! names of "did you mean", the documentation (`docs/configuration.md`), the commented example (`configs/all-keys.toml`)
//! and the random configurations of the tests. What holds between two keys is in `validate.rs`.

use std::path::PathBuf;

use data::{Columns, Format, PromptTemplate};
use lora_core::{Bias, ExcludeModules, Init, LoraConfig, Method, TargetModules};
use toml::{Table, Value as Toml};

use super::kinds::{
    NONE, alpha_pattern, batch_size, boolean, bytes, checkpointing, choice, dataset_columns,
    dataset_format, exclude_modules, fraction, initialization, layers, not_negative, optional,
    path, peft_type, positive, prompt_template, quant_bits, rank_pattern, saved_modules, seed,
    target_modules, text, trained_tokens, val_set_size, whole,
};
use super::reader::Reader;
use super::{BatchSize, Checkpointing, ComputeDtype, Decay, OnNonFinite, OnOutOfMemory, Source};

/// A library or program that has a key of the same meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// PEFT's `LoraConfig`.
    Peft,
    /// transformers' `TrainingArguments`, or the command line of its examples.
    Transformers,
    /// TRL's `SFTConfig`.
    Trl,
    /// A name by which the key is known elsewhere; not in the documentation.
    Other,
}

/// A key of the configuration, for documentation and tests.
#[derive(Debug, Clone)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// The part of the configuration that it belongs to.
    pub section: &'static str,
    /// What it means: the documentation of the field of [`Config`].
    pub documentation: &'static str,
    /// The right values in words, as they follow "must be".
    pub allowed: String,
    /// Some right values.
    pub samples: Vec<Toml>,
    /// Names of the key elsewhere.
    pub elsewhere: &'static [(Library, &'static str)],
}

/// The section of the keys that an adapter is saved with. Beside `init_adapter` these must not contradict the adapter.
const ADAPTER: &str = "Adapter";

/// Pairs of keys that exclude each other.
pub const EXCLUSIVE: [(&str, &str); 4] = [
    ("warmup_steps", "warmup_ratio"),
    ("val_dataset_path", "val_set_size"),
    ("eval_steps", "evals_per_epoch"),
    ("save_steps", "saves_per_epoch"),
];

/// The key that excludes this one.
pub(super) fn excluded_by(key: &str) -> Option<&'static str> {
    EXCLUSIVE.iter().find_map(|(a, b)| match key {
        key if key == *a => Some(*b),
        key if key == *b => Some(*a),
        _ => None,
    })
}

/// Expands the table, whose entries have this form:
///
/// ```text
/// /// What the key means, in plain English: the first sentence is what a reader needs.
/// name: Type = default, kind of the values, [Library: "name there", …];
/// ```
///
/// A default may depend on the keys before it, by their names, and on `reader`.
macro_rules! keys {
    (
        fn read($reader:ident);
        $(
            section $section:expr;
            $(
                $(#[doc = $doc:literal])+
                $name:ident: $type:ty = $default:expr, $kind:expr,
                    [$($library:ident: $elsewhere:literal),*];
            )+
        )+
    ) => {
        /// A valid configuration. Every public field but `source` is the config key of that name.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Config {
            $($(
                $(#[doc = $doc])+
                pub $name: $type,
            )+)+
            /// Where the values came from; not a key.
            pub source: Source,
        }

        /// The name of every key. `preset` has no field: `preset.rs` replaces it by the keys that it stands for.
        pub(super) const KEYS: &[&str] = &["preset", $($(stringify!($name)),+),+];

        /// Reads every key. Wrong ones are noted in the reader, and have any value.
        pub(super) fn read($reader: &mut Reader) -> Config {
            $($(
                let $name: $type = match $reader.get(stringify!($name), &$kind) {
                    Some(value) => value,
                    None => $default,
                };
            )+)+
            Config {
                $($($name,)+)+
                source: Source::default(),
            }
        }

        /// Every key with its value.
        fn table(config: &Config) -> Table {
            let mut table = Table::new();
            // The keys of a preset are written out.
            table.insert("preset".into(), NONE.into());
            $($(
                table.insert(stringify!($name).into(), $kind.write(&config.$name));
            )+)+
            table
        }

        /// Every key but `preset`, in the order of the documentation.
        pub fn keys() -> Vec<Key> {
            let mut keys = Vec::new();
            $($({
                let kind = $kind;
                keys.push(Key {
                    name: stringify!($name),
                    section: $section,
                    documentation: concat!($($doc, "\n"),+),
                    allowed: kind.allowed,
                    samples: kind.samples,
                    elsewhere: &[$((Library::$library, $elsewhere)),*],
                });
            })+)+
            keys
        }

        /// Every key with its names elsewhere.
        const ELSEWHERE: &[(&str, &[(Library, &str)])] = &[
            $($((stringify!($name), &[$((Library::$library, $elsewhere)),*])),+),+
        ];
    };
}

/// The default of `val_set_size`.
pub(super) const VAL_SET_SIZE: f64 = 0.05;
/// What `base_model` must be.
const MODEL: &str = "a Hugging Face model folder, a name on the Hub, a GGUF file, or \"embedded\"";
/// What `dataset_path` must be.
const DATA: &str = "the path of a data file (JSON lines, JSON, CSV, TSV, Parquet), or \"embedded\"";

keys! {
    fn read(reader);

    section "Model and data";

    /// The model: a folder, a name on the Hugging Face Hub (`ORG/NAME` or `ORG/NAME@REVISION`), a GGUF file, or
    /// `"embedded"` for the small model in this program.
    base_model: String = reader.required("base_model", MODEL), text(MODEL),
        [Transformers: "model_name_or_path", Other: "model"];

    /// The training data: JSON lines, a JSON array, CSV, TSV or Parquet; or `"embedded"` for the small data set in this
    /// program.
    dataset_path: PathBuf = reader.required("dataset_path", DATA), path(DATA),
        [Transformers: "train_file", Other: "data"];

    /// A separate file for validation. Nothing is then split off `dataset_path`.
    val_dataset_path: Option<PathBuf> = None, optional(path("the path of a data file")),
        [Transformers: "validation_file"];

    /// How much of `dataset_path` is held out for validation: a fraction below 1, or a number of examples. 0 holds out
    /// nothing. Not used with `dataset_path = "embedded"`, which has its own 300 validation examples.
    val_set_size: f64 = if val_dataset_path.is_some() { 0.0 } else { VAL_SET_SIZE }, val_set_size(),
        [Other: "test_size"];

    /// The format of the examples. `"auto"` detects it from the names of the columns.
    dataset_format: Option<Format> = None, dataset_format(),
        [Other: "dataset_type"];

    /// The columns of the format that have another name in the file, as in `{ instruction = "question" }`.
    dataset_columns: Columns = Columns::default(), dataset_columns(),
        [];

    /// How the context of an example becomes the prompt. Conversations always use the chat template of the model.
    prompt_template: PromptTemplate = PromptTemplate::Raw, prompt_template(),
        [Other: "chat_template"];

    /// The maximum number of tokens of an example. Longer examples are skipped and reported, never truncated.
    max_seq_len: usize = 4096, whole(2),
        [Trl: "max_length", Other: "sequence_len", Other: "cutoff_len"];

    section ADAPTER;

    /// Rank of the adapter.
    lora_r: usize = 8, whole(1),
        [Peft: "r", Other: "rank"];

    /// Numerator of the adapter's scale, which is `lora_alpha / lora_r`.
    lora_alpha: f64 = 16.0, positive(),
        [Peft: "lora_alpha", Other: "alpha"];

    /// Dropout probability of the adapter's input in training.
    lora_dropout: f64 = 0.0, fraction(),
        [Peft: "lora_dropout", Other: "dropout"];

    /// Scale by `lora_alpha / sqrt(lora_r)` instead (rank-stabilized LoRA).
    peft_use_rslora: bool = false, boolean(),
        [Peft: "use_rslora", Other: "rslora"];

    /// The kind of adapter. `"vera"` trains a VeRA adapter: frozen random matrices that all modules share, and two trained
    /// vectors per module. A larger `lora_r`, such as 256, is usual then, and a larger learning rate; `lora_alpha` does not
    /// apply.
    peft_type: Method = Method::default(), peft_type(),
        [Peft: "peft_type", Other: "fine_tune_type"];

    /// Train a DoRA adapter: a magnitude vector (one value per output feature) is trained as well.
    peft_use_dora: bool = false, boolean(),
        [Peft: "use_dora", Other: "dora"];

    /// The linear modules that are adapted: a list of names, `"all-linear"`, or one regular expression that matches whole
    /// module names.
    target_modules: TargetModules = LoraConfig::default().target_modules, target_modules(),
        [Peft: "target_modules", Other: "lora_target_modules"];

    /// The decoder layers that are adapted, counted from 0. `"none"` adapts all.
    layers_to_transform: Option<Vec<usize>> = None, layers(),
        [Peft: "layers_to_transform"];

    /// Modules that are not adapted although `target_modules` selects them.
    exclude_modules: Option<ExcludeModules> = None, exclude_modules(),
        [Peft: "exclude_modules"];

    /// Ranks that differ from `lora_r`, by regular expressions for the end of a module's name.
    rank_pattern: Vec<(String, usize)> = Vec::new(), rank_pattern(),
        [Peft: "rank_pattern"];

    /// Values that differ from `lora_alpha`, as in `rank_pattern`.
    alpha_pattern: Vec<(String, f64)> = Vec::new(), alpha_pattern(),
        [Peft: "alpha_pattern"];

    /// Tokens whose rows of the embedding (`embed_tokens`) or of the output layer (`lm_head`) are trained as well.
    trainable_token_indices: Vec<(String, Vec<usize>)> = Vec::new(), trained_tokens(),
        [Peft: "trainable_token_indices"];

    /// Seed of the matrices that a VeRA adapter's modules share. They are those of PEFT.
    projection_prng_key: u64 = 0, seed(),
        [Peft: "projection_prng_key"];

    /// Whether the shared matrices are written to a VeRA adapter's file. Without them the file is much smaller, and PEFT
    /// makes them again from `projection_prng_key`.
    save_projection: bool = true, boolean(),
        [Peft: "save_projection"];

    /// Biases of the base model that are trained as well: `"lora_only"` trains those of the adapted modules, `"all"` every
    /// bias.
    bias: Bias = Bias::None, choice::<Bias>(),
        [Peft: "bias"];

    /// Train a bias of B as well. It starts at zero. Not possible with DoRA.
    lora_bias: bool = false, boolean(),
        [Peft: "lora_bias"];

    /// Modules that are trained and saved as a whole, in f32 and not quantized: ends of module names, such as
    /// `embed_tokens`, `lm_head`, `norm` or `o_proj`. They get no adapter.
    modules_to_save: Vec<String> = Vec::new(), saved_modules(),
        [Peft: "modules_to_save"];

    section "Initialization of the adapter";

    /// Initial value of the vector per rank of a VeRA adapter. The other vector starts at zero.
    d_initial: f64 = LoraConfig::default().d_initial, positive(),
        [Peft: "d_initial"];

    /// How the adapter is initialized. `"kaiming"` and `"gaussian"` draw A, and B starts at zero. PiSSA and OLoRA take the
    /// adapter out of the base model's weights, before these are quantized; it is saved as an adapter of the original
    /// model, with twice the rank.
    init_lora_weights: Init = Init::Kaiming, initialization(),
        [Peft: "init_lora_weights"];

    /// A PEFT adapter to continue training from: a folder, or a name on the Hub. Its `adapter_config.json` replaces
    /// `lora_r`, `lora_alpha`, `target_modules` and so on; a different value in the config is an error. Only `lora_dropout`
    /// may differ.
    init_adapter: Option<PathBuf> = None, optional(path("the folder of a PEFT adapter")),
        [Other: "adapter", Other: "lora_model_dir", Other: "resume_adapter_file"];

    section "Base model and device";

    /// Bits per frozen weight: 8, 4, or 16 for weights that are not quantized. The format is this program's own, not
    /// bitsandbytes' NF4.
    quant_bits: u8 = 8, quant_bits(),
        [Other: "load_in_8bit", Other: "load_in_4bit", Other: "bits"];

    /// Quantize the output layer as well.
    quantize_lm_head: bool = false, boolean(),
        [];

    /// The number format in which the layers compute. `"auto"` chooses the best one of the device.
    compute_dtype: ComputeDtype = ComputeDtype::default(), choice::<ComputeDtype>(),
        [Transformers: "bf16", Transformers: "fp16", Other: "dtype"];

    /// The memory of the device. `"none"` uses the value that the driver reports; some drivers report none.
    device_memory: Option<u64> = None, optional(bytes()),
        [];

    section "Optimization";

    /// The peak learning rate.
    learning_rate: f64 = 1e-4, positive(),
        [Transformers: "learning_rate", Other: "lr"];

    /// LoRA+: the learning rate of B (and of a DoRA's magnitudes) is this many times `learning_rate`, which A keeps;
    /// the paper recommends 16. `"none"` trains both with `learning_rate`.
    loraplus_lr_ratio: Option<f64> = None, optional(positive()),
        [Peft: "loraplus_lr_ratio"];

    /// Passes over the training examples. A fraction is allowed.
    num_epochs: f64 = 4.0, positive(),
        [Transformers: "num_train_epochs", Other: "epochs"];

    /// The number of optimizer steps. Overrides `num_epochs`.
    max_steps: Option<usize> = None, optional(whole(1)),
        [Transformers: "max_steps"];

    /// Examples per micro-batch. `"auto"` takes as many as memory allows of the 8 × `gradient_accumulation_steps` examples
    /// of an optimizer step.
    batch_size: BatchSize = BatchSize::Rows(8), batch_size(),
        [Transformers: "per_device_train_batch_size", Other: "micro_batch_size"];

    /// The maximum number of tokens of a micro-batch. A larger micro-batch is split; the result is the same.
    max_batch_tokens: Option<usize> = None, optional(whole(2)),
        [];

    /// Micro-batches per optimizer step.
    gradient_accumulation_steps: usize = 1, whole(1),
        [Transformers: "gradient_accumulation_steps"];

    /// Optimizer steps of the linear warm-up.
    warmup_steps: usize = 0, whole(0),
        [Transformers: "warmup_steps"];

    /// The warm-up as a fraction of all optimizer steps.
    warmup_ratio: f64 = if reader.has("warmup_steps") { 0.0 } else { 0.03 }, fraction(),
        [Transformers: "warmup_ratio"];

    /// How the learning rate falls after the warm-up.
    lr_scheduler: Decay = Decay::Cosine, choice::<Decay>(),
        [Transformers: "lr_scheduler_type"];

    /// Decoupled weight decay of AdamW.
    weight_decay: f64 = 0.0, not_negative(),
        [Transformers: "weight_decay"];

    /// β₁ of AdamW.
    adam_beta1: f64 = 0.9, fraction(),
        [Transformers: "adam_beta1"];

    /// β₂ of AdamW.
    adam_beta2: f64 = 0.999, fraction(),
        [Transformers: "adam_beta2"];

    /// ε of AdamW.
    adam_epsilon: f64 = 1e-8, positive(),
        [Transformers: "adam_epsilon", Other: "adam_eps"];

    /// The maximum norm of all gradients together; larger gradients are scaled down. 0 turns clipping off.
    max_grad_norm: f64 = 1.0, not_negative(),
        [Transformers: "max_grad_norm", Other: "clip_grad_norm"];

    /// Recompute the activations of a layer in the backward pass instead of keeping them. `"auto"` recomputes where there
    /// is not enough memory to keep them.
    gradient_checkpointing: Checkpointing = Checkpointing::Auto, checkpointing(),
        [Transformers: "gradient_checkpointing"];

    /// Compute a prompt prefix that several examples of a micro-batch share only once. Losses and gradients are the same.
    /// With dropout this is always off.
    share_prefixes: bool = true, boolean(),
        [];

    /// Compute the micro-batches of one optimizer step together if there is plenty of memory. The step is the same. With
    /// dropout this is always off.
    merge_micro_batches: bool = true, boolean(),
        [];

    /// Seed of the split, the order of the examples, the initialization and the dropout.
    seed: u64 = 42, seed(),
        [Transformers: "seed"];

    section "Validation, checkpoints and faults";

    /// Optimizer steps between two validations. Without this key and `evals_per_epoch` there is one per epoch. The run
    /// always ends with a validation.
    eval_steps: Option<usize> = None, optional(whole(1)),
        [Transformers: "eval_steps"];

    /// Validations per epoch.
    evals_per_epoch: Option<usize> = None, optional(whole(1)),
        [];

    /// Optimizer steps between two lines of progress.
    logging_steps: usize = 1, whole(1),
        [Transformers: "logging_steps"];

    /// Keep the adapter with the lowest validation loss, not the last one.
    save_best: bool = true, boolean(),
        [Transformers: "load_best_model_at_end"];

    /// Optimizer steps between two checkpoints, in addition to those of `save_minutes`.
    save_steps: Option<usize> = None, optional(whole(1)),
        [Transformers: "save_steps"];

    /// Checkpoints per epoch, in addition to those of `save_minutes`.
    saves_per_epoch: Option<usize> = None, optional(whole(1)),
        [];

    /// Minutes between two checkpoints. If this key, `save_steps` and `saves_per_epoch` are all `"none"`, only Ctrl-C writes
    /// a checkpoint.
    save_minutes: Option<f64> = Some(5.0), optional(positive()),
        [];

    /// The number of checkpoints to keep, in addition to the one of the best validation. `"none"` keeps all.
    save_total_limit: Option<usize> = Some(2), optional(whole(1)),
        [Transformers: "save_total_limit"];

    /// What happens if a loss or gradient is not a number: `"stop"` ends the run with a checkpoint of the step before;
    /// `"skip"` skips the step and halves the learning rate from there on.
    on_non_finite: OnNonFinite = OnNonFinite::default(), choice::<OnNonFinite>(),
        [];

    /// The maximum number of steps that `on_non_finite = "skip"` skips in a run.
    max_skipped_steps: usize = 3, whole(0),
        [];

    /// What happens if a micro-batch does not fit into the memory of the device: `"halve"` halves the micro-batches and
    /// accumulates more of them, `"stop"` ends the run with a checkpoint of the step before.
    on_out_of_memory: OnOutOfMemory = OnOutOfMemory::default(), choice::<OnOutOfMemory>(),
        [];

    /// Optimizer steps between two comparisons of a GPU with the CPU during the run. 0 compares only before the run.
    check_every: usize = 0, whole(0),
        [];

    /// The folder for the adapter, the checkpoints, the metrics and the resolved config. The default is `runs/NAME`, where
    /// `NAME` is the name of the run or of the config file.
    output_dir: PathBuf = PathBuf::from("runs").join(reader.run_name()), path("the path of a folder"),
        [Transformers: "output_dir"];
}

impl Config {
    /// The configuration as a TOML file that names every key; the same parser reads it back as the same configuration.
    /// A key that is off has the value `"none"`.
    pub fn to_toml(&self) -> String {
        table(self).to_string()
    }
}

/// The keys that must not contradict the adapter of `init_adapter`, and `lora_dropout`.
pub(super) fn adapter_keys() -> impl Iterator<Item = &'static str> {
    let keys = keys().into_iter();
    keys.filter(|key| key.section == ADAPTER)
        .map(|key| key.name)
}

/// Our name of a key of another library or program.
pub(super) fn known_elsewhere(name: &str) -> Option<&'static str> {
    let knows =
        |(_, names): &&(&str, &[(Library, &str)])| names.iter().any(|(_, theirs)| *theirs == name);
    let found = ELSEWHERE.iter().find(knows);
    found.map(|(ours, _)| *ours)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn round_trip(config: &Config) {
        let written = config.to_toml();
        let read = Config::parse(&written, Some(Path::new("elsewhere.toml")), None, &[]);
        let read = read.unwrap_or_else(|error| panic!("{error}\n{written}"));
        let source = read.source.clone();
        assert_eq!(
            read,
            Config {
                source,
                ..config.clone()
            },
            "{written}"
        );
    }

    #[test]
    fn the_written_configuration_reads_back_as_the_same() {
        let load = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            Config::load(None, None, &sets).unwrap()
        };
        round_trip(&load(&[]));
        round_trip(&load(&[
            "target_modules=all-linear",
            "max_steps=3",
            "learning_rate=1.2345678901234567e-5",
            "num_epochs=0.1",
            "prompt_template=\"custom:a\\n\\\"'\\\\{context}\\t'''\"",
            "val_dataset_path=C:\\data\\v.jsonl",
            "val_set_size=0",
            "seed=9007199254740993",
            "eval_steps=none",
            "warmup_ratio=0",
            "warmup_steps=9",
            "lr_scheduler=linear",
            "compute_dtype=bf16",
            "init_lora_weights=gaussian",
        ]));
        round_trip(&load(&[
            "peft_use_dora=true",
            r"rank_pattern={ 'layers\.0\..*' = 4, q_proj = 2 }",
            "alpha_pattern={ v_proj = 2.5 }",
            "trainable_token_indices={ embed_tokens = [7, 3], lm_head = [5] }",
            "exclude_modules=[\"k_proj\"]",
            "bias=lora_only",
            "modules_to_save=[\"embed_tokens\", \"layers.1.mlp\"]",
        ]));
        round_trip(&load(&[
            "peft_type=VERA",
            "projection_prng_key=7",
            "save_projection=false",
            "d_initial=0.01",
        ]));
        round_trip(&load(&[
            "exclude_modules='.*k_proj'",
            "layers_to_transform=[0, 5]",
            "target_modules=[\"o_proj\"]",
            "quant_bits=16",
        ]));
        round_trip(&load(&[
            r"target_modules='.*\.layers\.[0-3]\..*_proj'",
            "adam_epsilon=1e-300",
            "save_steps=50",
            "save_minutes=none",
            "save_total_limit=none",
            "on_non_finite=skip",
            "max_skipped_steps=0",
            "on_out_of_memory=stop",
            "dataset_format=alpaca",
            "dataset_columns={ instruction = \"q\", output = \"a\" }",
            r#"prompt_template='instruct:{"format":"{input}","no_input_format":"{instruction}\n"}'"#,
            "device_memory=8GiB",
            "check_every=50",
        ]));
    }

    #[test]
    fn every_key_is_written() {
        let written: Table = Config::load(None, None, &[])
            .unwrap()
            .to_toml()
            .parse()
            .unwrap();
        let written: Vec<&str> = written.keys().map(String::as_str).collect();
        assert_eq!(written, KEYS);
    }
}
