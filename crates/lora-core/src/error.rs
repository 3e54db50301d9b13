//! Errors of a LoRA configuration, or of the tensors that it is applied to.

use kernels::AlreadyQuantized;

use crate::{Init, Method};

/// An invalid configuration, or tensors that do not fit it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LoraError {
    /// The rank is zero.
    #[error("the LoRA rank r is 0; it must be at least 1 (8 is a usual value)")]
    ZeroRank,
    /// `lora_alpha` is not a positive, finite number.
    #[error("lora_alpha is {0}; it must be a positive number (16 is a usual value)")]
    InvalidAlpha(f64),
    /// `lora_dropout` is outside `[0, 1)`.
    #[error("lora_dropout is {0}; it must be at least 0 and below 1")]
    InvalidDropout(f64),
    /// `target_modules` names no module.
    #[error("target_modules is empty; name modules such as q_proj, or use \"all-linear\"")]
    NoTargets,
    /// A regular expression does not compile.
    #[error("{field} is not a valid regular expression: {pattern:?}: {reason}")]
    InvalidPattern {
        /// The setting that holds it.
        field: &'static str,
        /// The expression as written.
        pattern: String,
        /// The regex engine's message.
        reason: String,
    },
    /// PEFT does not allow `layers_to_transform` together with a string in `target_modules`.
    #[error(
        "layers_to_transform cannot be used when target_modules is a string ({0:?}); list the module names instead"
    )]
    LayersWithPattern(String),
    /// `layers_pattern` is set, but `layers_to_transform` names no layer.
    #[error(
        "layers_pattern is set but layers_to_transform is not; name the layers, or leave it out"
    )]
    PatternWithoutLayers,
    /// PEFT does not allow `lora_bias` with this method.
    #[error("lora_bias is set with {0}, which PEFT does not support; leave lora_bias out")]
    MethodWithBias(Method),
    /// The initial value of the vector per rank is not a finite number.
    #[error("d_initial is {0}; it must be a finite number (0.1 is a usual value)")]
    InvalidInitialD(f64),
    /// A setting that PEFT's configuration of the method does not have.
    #[error(
        "{field} is set, and {method} has no such setting; leave {field} out, or choose another method"
    )]
    FieldOfMethod {
        /// The setting.
        field: &'static str,
        /// The method.
        method: Method,
    },
    /// Another method than the plain LoRA, dropout or an initialization from the weight on the output layer's adapter, which training does not
    /// support.
    #[error(
        "lm_head is a target, and its adapter can be trained only as a plain LoRA without dropout that is not made from its weight; leave the other method, lora_dropout and init_lora_weights out, or lm_head"
    )]
    PlainHead,
    /// An adapter that does more than add a low-rank product and is to be taken out of the weight: no adapter of the
    /// original weight would be the same.
    #[error(
        "init_lora_weights is {0} and the method is {1}; the trained adapter could not be written as one of the base model: leave one of the two out"
    )]
    MethodOfRest(Init, Method),
    /// The rank is larger than a side of the weight that the adapter is taken out of.
    #[error(
        "the LoRA rank r is {r}, but the weight has only {largest} singular values; choose a smaller rank"
    )]
    RankOfWeight {
        /// The rank.
        r: usize,
        /// The smaller side of the weight.
        largest: usize,
    },
    /// The decomposition of a weight does not converge.
    #[error(
        "the weight cannot be decomposed: it holds values that are not finite, or the decomposition does not converge"
    )]
    NotDecomposed,
    /// No module of the model is selected.
    #[error("{targets} selects none of the model's linear modules ({available})")]
    NothingSelected {
        /// The targets as configured.
        targets: String,
        /// The kinds of module that exist.
        available: String,
    },
    /// An entry of `modules_to_save` is the end of an adapted module's name, but not a whole name.
    #[error(
        "modules_to_save: an entry matches {0}, which also gets an adapter; write the module's name, or exclude it from the targets"
    )]
    SavedAndAdapted(Box<str>),
    /// A plain `Linear` cannot compute a bias of B.
    #[error(
        "lora_bias is set, which only a LoraLinear computes; use LoraLinear in place of Linear"
    )]
    BiasInLinear,
    /// A setting names something that the model does not have.
    #[error("{field}: {entry:?} matches none of {among}{}", did_you_mean(nearest))]
    MatchesNothing {
        /// The setting.
        field: &'static str,
        /// The entry as written in the configuration.
        entry: Box<str>,
        /// The names that an entry can match.
        among: Box<str>,
        /// The most similar name, if one is similar enough.
        nearest: Option<Box<str>>,
    },
    /// A tensor does not have the shape that the layer needs.
    #[error("{name} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// Which tensor.
        name: &'static str,
        /// The shape the layer needs.
        expected: Vec<usize>,
        /// The tensor's shape.
        got: Vec<usize>,
    },
    /// The layer is quantized or has an adapter already.
    #[error("this layer already {0}")]
    Already(&'static str),
    /// A module that is to be adapted has a layer with an adapter.
    #[error("the layer {0:?} has an adapter already; merge it first, with `materialize()`")]
    AlreadyAdapted(Box<str>),
    /// An initialization that changes the weights of a module whose adapters are saved apart from them.
    #[error(
        "init_lora_weights {0} changes the frozen weights, and the saved adapter would belong to the changed weights; use kaiming or gaussian here"
    )]
    InitOfModule(Init),
    /// Dropout of an adapter's input, in a module whose layers do not compute it.
    #[error(
        "lora_dropout is set, but a burn::nn::Linear computes no dropout of its adapter's input; set it to 0, or use LoraLinear in place of Linear"
    )]
    DropoutInLinear,
    /// The layer has no adapter to merge or to read.
    #[error("this layer has no adapter")]
    NoAdapter,
}

impl From<AlreadyQuantized> for LoraError {
    fn from(_: AlreadyQuantized) -> Self {
        Self::Already("has a quantized weight; call quantize only once")
    }
}

fn did_you_mean(nearest: &Option<Box<str>>) -> String {
    match nearest {
        Some(name) => format!(" (did you mean {name:?}?)"),
        None => String::new(),
    }
}
