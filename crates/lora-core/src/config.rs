//! What to adapt and how: PEFT's `LoraConfig` with PEFT's names and meaning.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{LoraError, Method, ModuleSelector};

/// Which modules get an adapter. The meaning is PEFT's (`check_target_module_exists`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetModules {
    /// A module matches when its full name equals one of these or ends with `.` and one of these.
    Names(Vec<String>),
    /// A module matches when this expression matches its whole name.
    Regex(String),
    /// Every linear module except the output layer (`lm_head`).
    AllLinear,
}

/// Which modules get no adapter, even if [`TargetModules`] selects them (PEFT's `exclude_modules`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExcludeModules {
    /// As [`TargetModules::Names`].
    Names(Vec<String>),
    /// As [`TargetModules::Regex`].
    Regex(String),
}

/// Which of the base model's biases were trained with the adapter (PEFT's `bias`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Bias {
    /// No bias.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// The biases of the modules that have an adapter.
    LoraOnly,
}

/// How an adapter is initialized. The first output is the base model's: `B` is zero, or the adapter is a part of the
/// weight and the frozen weight is the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Init {
    /// Kaiming-uniform with a = √5, that is uniform in ±1/√d_in: PEFT's default and that of `nn.Linear`.
    #[default]
    Kaiming,
    /// Normal with standard deviation 1/r: PEFT's `init_lora_weights="gaussian"`.
    Gaussian,
    /// PiSSA (Meng et al., 2024, <https://arxiv.org/abs/2404.02948>): the part of the weight with the r largest singular
    /// values.
    Pissa,
    /// PiSSA by a randomized decomposition with this many iterations, which is much faster: PEFT's `pissa_niter_N`.
    PissaNiter(u16),
    /// OLoRA (Büyükakyüz, 2024, <https://arxiv.org/abs/2406.01775>): orthonormal rows of B, by a QR decomposition of the
    /// weight.
    Olora,
}

impl Init {
    /// Whether the adapter is taken out of the weight, which is then no longer the base model's.
    pub fn changes_weights(self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_) | Self::Olora)
    }

    /// The initialization of this name, as in PEFT's `init_lora_weights`; `kaiming` is PEFT's `True`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "kaiming" => Some(Self::Kaiming),
            "gaussian" => Some(Self::Gaussian),
            "pissa" => Some(Self::Pissa),
            "olora" => Some(Self::Olora),
            _ => {
                let iterations = name.strip_prefix("pissa_niter_")?;
                iterations.parse().ok().map(Self::PissaNiter)
            }
        }
    }
}

/// The name that [`Init::from_name`] reads.
impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kaiming => f.write_str("kaiming"),
            Self::Gaussian => f.write_str("gaussian"),
            Self::Pissa => f.write_str("pissa"),
            Self::PissaNiter(iterations) => write!(f, "pissa_niter_{iterations}"),
            Self::Olora => f.write_str("olora"),
        }
    }
}

/// The settings of a LoRA (Hu et al., 2021, <https://arxiv.org/abs/2106.09685>), named as in PEFT.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank of the adapter, at least 1.
    pub r: usize,
    /// Numerator α of the scale.
    pub lora_alpha: f64,
    /// Probability with which an element of the adapter's input is dropped in training, in `[0, 1)`.
    pub lora_dropout: f64,
    /// Scale by α/√r (Kalajdzievski, 2023, <https://arxiv.org/abs/2312.03732>) instead of α/r.
    pub use_rslora: bool,
    /// Which modules are adapted.
    pub target_modules: TargetModules,
    /// How the adapter is initialized.
    pub init: Init,
    /// Adapt these decoder layers only; `None` means all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The name of the list of layers in module names, as regular expressions; empty for any name.
    pub layers_pattern: Vec<String>,
    /// Modules that get no adapter although they are targets.
    pub exclude_modules: Option<ExcludeModules>,
    /// Ranks that differ from `r`. The first expression that matches the end of a module's name applies.
    pub rank_pattern: Vec<(String, usize)>,
    /// Values that differ from `lora_alpha`, as `rank_pattern`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// The method: LoRA, a variant of it (PEFT's `use_dora`), or another `peft_type`.
    pub method: Method,
    /// Which of the base model's biases belong to the adapter.
    pub bias: Bias,
    /// Whether `B` has a bias.
    pub lora_bias: bool,
    /// Modules that are trained and saved as a whole with the adapter; they get no low-rank factors.
    pub modules_to_save: Vec<String>,
    /// Whether, in a model whose output layer is tied to its embedding, an adapter on one of the two applies to both.
    pub ensure_weight_tying: bool,
    /// Tokens whose rows of an embedding or `lm_head` weight belong to the adapter, by the end of the module's name
    /// (`embed_tokens`), in the order of the rows in the adapter's file.
    pub trainable_token_indices: Vec<(String, Vec<usize>)>,
    /// Initial value of the vector per rank, for a method that has one.
    pub d_initial: f64,
    /// Seed of the matrices that all modules share, for a method that has them. The lower 32 bits count.
    pub projection_prng_key: u64,
    /// Whether the shared matrices are saved with the adapter. Otherwise they are made from the seed again.
    pub save_projection: bool,
}

impl Default for LoraConfig {
    /// r = 8, α = 16, no dropout, `q_proj`, `k_proj` and `v_proj` of every layer.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: TargetModules::Names(
                ["q_proj", "k_proj", "v_proj"].map(String::from).to_vec(),
            ),
            init: Init::Kaiming,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            exclude_modules: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            method: Method::Lora,
            bias: Bias::None,
            lora_bias: false,
            modules_to_save: Vec::new(),
            ensure_weight_tying: false,
            trainable_token_indices: Vec::new(),
            d_initial: 0.1,
            projection_prng_key: 0,
            save_projection: true,
        }
    }
}

impl LoraConfig {
    /// The scale γ of the adapter: α/r, or α/√r with `use_rslora`. A module to which patterns apply has
    /// [`ModuleSelector::scale`].
    ///
    /// 1 for a method without α.
    pub fn scale(&self) -> f64 {
        if self.method.facts().has("lora_alpha") {
            scale(self.r, self.lora_alpha, self.use_rslora)
        } else {
            1.0
        }
    }

    /// Whether parameters of the base model, or biases of B, are trained beside the adapters.
    pub fn trains_whole(&self) -> bool {
        self.bias != Bias::None || self.lora_bias || !self.modules_to_save.is_empty()
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// Names the first invalid field, its value and what is expected.
    pub fn validate(&self) -> Result<(), LoraError> {
        let ranks = self.rank_pattern.iter().map(|(_, r)| *r);
        if ranks.chain([self.r]).any(|r| r == 0) {
            return Err(LoraError::ZeroRank);
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha);
        let wrong = |alpha: &f64| !(alpha.is_finite() && *alpha > 0.0);
        if let Some(alpha) = alphas.chain([self.lora_alpha]).find(wrong) {
            return Err(LoraError::InvalidAlpha(alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(LoraError::InvalidDropout(self.lora_dropout));
        }
        if !self.d_initial.is_finite() {
            return Err(LoraError::InvalidInitialD(self.d_initial));
        }
        let facts = self.method.facts();
        if let Some(field) = self.fields_in_use().find(|field| !facts.has(field)) {
            let method = self.method;
            return Err(LoraError::FieldOfMethod { field, method });
        }
        if self.lora_bias && !facts.allows_lora_bias {
            return Err(LoraError::MethodWithBias(self.method));
        }
        if self.init.changes_weights() && !facts.vectors.is_empty() {
            return Err(LoraError::MethodOfRest(self.init, self.method));
        }
        self.selector().map(|_| ())
    }

    /// The fields that not every method has and whose values are not the defaults.
    fn fields_in_use(&self) -> impl Iterator<Item = &'static str> {
        let default = Self::default();
        let fields = [
            ("lora_alpha", self.lora_alpha != default.lora_alpha),
            ("use_rslora", self.use_rslora),
            ("exclude_modules", self.exclude_modules.is_some()),
            ("rank_pattern", !self.rank_pattern.is_empty()),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
            ("init_lora_weights", self.init != default.init),
            ("ensure_weight_tying", self.ensure_weight_tying),
            (
                "trainable_token_indices",
                !self.trainable_token_indices.is_empty(),
            ),
            ("d_initial", self.d_initial != default.d_initial),
            ("projection_prng_key", self.projection_prng_key != 0),
            ("save_projection", !self.save_projection),
        ];
        let used = fields.into_iter().filter(|(_, used)| *used);
        used.map(|(field, _)| field)
    }

    /// Compiles everything that depends on a module's name: which modules are adapted, with which rank
    /// and scale.
    ///
    /// # Errors
    ///
    /// [`NoTargets`](LoraError::NoTargets), [`InvalidPattern`](LoraError::InvalidPattern),
    /// [`LayersWithPattern`](LoraError::LayersWithPattern) or
    /// [`PatternWithoutLayers`](LoraError::PatternWithoutLayers).
    pub fn selector(&self) -> Result<ModuleSelector, LoraError> {
        ModuleSelector::new(self)
    }

    /// The settings for one module: the rank and α that `selector` gives it, without patterns. The argument of
    /// [`LoraLinear::with_new_adapter`](crate::LoraLinear::with_new_adapter).
    pub fn of_module(&self, selector: &ModuleSelector, name: &str) -> Self {
        Self {
            r: selector.r(name),
            lora_alpha: selector.alpha(name),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            ..self.clone()
        }
    }
}

/// α/r, or α/√r.
pub(crate) fn scale(r: usize, alpha: f64, use_rslora: bool) -> f64 {
    if use_rslora {
        alpha / (r as f64).sqrt()
    } else {
        alpha / r as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_is_alpha_over_r_and_over_its_root_with_rslora() {
        let mut config = LoraConfig {
            r: 4,
            ..LoraConfig::default()
        };
        assert_eq!(config.scale(), 4.0);
        config.use_rslora = true;
        assert_eq!(config.scale(), 8.0);
    }

    #[test]
    fn every_initialization_has_pefts_name() {
        let names = ["kaiming", "gaussian", "pissa", "pissa_niter_16", "olora"];
        for name in names {
            assert_eq!(Init::from_name(name).unwrap().to_string(), name);
        }
        for name in ["pissa_niter_", "pissa_niter_-1", "eva", ""] {
            assert_eq!(Init::from_name(name), None);
        }
    }

    #[test]
    fn every_invalid_field_is_a_typed_error() {
        let check = |change: fn(&mut LoraConfig)| {
            let mut config = LoraConfig::default();
            change(&mut config);
            config.validate().unwrap_err()
        };
        assert_eq!(check(|c| c.r = 0), LoraError::ZeroRank);
        assert_eq!(check(|c| c.lora_alpha = 0.0), LoraError::InvalidAlpha(0.0));
        assert_eq!(
            check(|c| c.lora_alpha = -1.0),
            LoraError::InvalidAlpha(-1.0)
        );
        assert!(matches!(
            check(|c| c.lora_alpha = f64::NAN),
            LoraError::InvalidAlpha(_)
        ));
        assert_eq!(
            check(|c| c.lora_dropout = 1.0),
            LoraError::InvalidDropout(1.0)
        );
        assert_eq!(
            check(|c| c.target_modules = TargetModules::Names(vec![])),
            LoraError::NoTargets
        );
        let dora = check(|c| (c.method, c.init) = (Method::Dora, Init::Olora));
        assert_eq!(dora, LoraError::MethodOfRest(Init::Olora, Method::Dora));
        assert!(matches!(
            check(|c| c.target_modules = TargetModules::Regex("(".into())),
            LoraError::InvalidPattern { .. }
        ));
    }
}
