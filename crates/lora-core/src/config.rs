//! What to adapt and how: PEFT's `LoraConfig` with PEFT's names and meaning.

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::LoraError;

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

/// How the adapter's `A` starts. `B` always starts at zero, so the first output is the base model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Init {
    /// Kaiming-uniform with a = √5, that is uniform in ±1/√d_in: PEFT's default and that of `nn.Linear`.
    #[default]
    Kaiming,
    /// Normal with standard deviation 1/r: PEFT's `init_lora_weights="gaussian"`.
    Gaussian,
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
    /// How `A` starts.
    pub init: Init,
    /// Adapt these decoder layers only; all where `None`.
    pub layers_to_transform: Option<Vec<usize>>,
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
        }
    }
}

impl LoraConfig {
    /// The scale γ of the adapter: α/r, or α/√r with `use_rslora`.
    pub fn scale(&self) -> f64 {
        match self.use_rslora {
            true => self.lora_alpha / (self.r as f64).sqrt(),
            false => self.lora_alpha / self.r as f64,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// The first invalid field, with its value and what would be right.
    pub fn validate(&self) -> Result<(), LoraError> {
        if self.r == 0 {
            return Err(LoraError::ZeroRank);
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return Err(LoraError::InvalidAlpha(self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(LoraError::InvalidDropout(self.lora_dropout));
        }
        self.selector().map(|_| ())
    }

    /// Compiles `target_modules` and `layers_to_transform` into a test on module names.
    ///
    /// # Errors
    ///
    /// [`NoTargets`](LoraError::NoTargets), [`InvalidPattern`](LoraError::InvalidPattern) or
    /// [`LayersWithPattern`](LoraError::LayersWithPattern).
    pub fn selector(&self) -> Result<ModuleSelector, LoraError> {
        let as_string = match &self.target_modules {
            TargetModules::Names(names) if names.iter().all(|name| name.is_empty()) => {
                return Err(LoraError::NoTargets);
            }
            TargetModules::Names(_) => None,
            TargetModules::Regex(pattern) => Some(pattern.clone()),
            TargetModules::AllLinear => Some("all-linear".into()),
        };
        if let (Some(string), Some(_)) = (as_string, &self.layers_to_transform) {
            return Err(LoraError::LayersWithPattern(string));
        }
        let targets = match &self.target_modules {
            TargetModules::Names(names) => Targets::Names(names.clone()),
            TargetModules::AllLinear => Targets::AllLinear,
            TargetModules::Regex(pattern) => {
                let anchored = Regex::new(&format!("^(?:{pattern})$"));
                Targets::Regex(anchored.map_err(|error| LoraError::InvalidPattern {
                    pattern: pattern.clone(),
                    reason: error.to_string(),
                })?)
            }
        };
        Ok(ModuleSelector {
            targets,
            layers: self.layers_to_transform.clone(),
        })
    }
}

#[derive(Debug, Clone)]
enum Targets {
    Names(Vec<String>),
    Regex(Regex),
    AllLinear,
}

/// Decides by full module name (`model.layers.0.self_attn.q_proj`) whether a linear module is adapted.
#[derive(Debug, Clone)]
pub struct ModuleSelector {
    targets: Targets,
    layers: Option<Vec<usize>>,
}

impl ModuleSelector {
    /// Whether the linear module of this full name is adapted.
    ///
    /// The output layer is recognised by its name, `lm_head`; `all-linear` leaves it out.
    pub fn matches(&self, name: &str) -> bool {
        let targeted = match &self.targets {
            Targets::Names(names) => names.iter().any(|target| {
                name == target
                    || name
                        .strip_suffix(target.as_str())
                        .is_some_and(|rest| rest.ends_with('.'))
            }),
            Targets::Regex(regex) => regex.is_match(name),
            Targets::AllLinear => name != "lm_head" && !name.ends_with(".lm_head"),
        };
        let layer_selected = match &self.layers {
            None => true,
            Some(layers) => layer_index(name).is_some_and(|index| layers.contains(&index)),
        };
        targeted && layer_selected
    }
}

/// The first number that stands between two dots of a module name: the layer's index.
fn layer_index(name: &str) -> Option<usize> {
    let mut parts = name.split('.');
    parts.next_back();
    parts.find_map(|part| part.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q0: &str = "model.layers.0.self_attn.q_proj";

    fn with_targets(target_modules: TargetModules) -> LoraConfig {
        LoraConfig {
            target_modules,
            ..LoraConfig::default()
        }
    }

    fn names(names: &[&str]) -> TargetModules {
        TargetModules::Names(names.iter().map(|name| name.to_string()).collect())
    }

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
    fn names_match_whole_path_components_only() {
        let selector = with_targets(names(&["proj", "q_proj"])).selector().unwrap();
        assert!(selector.matches(Q0));
        assert!(selector.matches("q_proj"));
        assert!(!selector.matches("model.layers.0.self_attn.k_proj"));
        assert!(!selector.matches("model.layers.0.self_attn.eq_proj"));
    }

    #[test]
    fn a_name_may_be_a_dotted_path() {
        let selector = with_targets(names(&["self_attn.q_proj"]))
            .selector()
            .unwrap();
        assert!(selector.matches(Q0));
        assert!(!selector.matches("model.layers.0.mlp.q_proj"));
    }

    #[test]
    fn a_regex_must_match_the_whole_name() {
        let select = |pattern: &str| {
            with_targets(TargetModules::Regex(pattern.into()))
                .selector()
                .unwrap()
        };
        assert!(select(r".*\.layers\.[02]\..*q_proj").matches(Q0));
        assert!(!select("q_proj").matches(Q0));
        assert!(
            !select("model|q_proj").matches(Q0),
            "alternatives are anchored too"
        );
    }

    #[test]
    fn all_linear_leaves_the_output_layer_out() {
        let selector = with_targets(TargetModules::AllLinear).selector().unwrap();
        assert!(selector.matches(Q0));
        assert!(!selector.matches("lm_head"));
    }

    #[test]
    fn layers_to_transform_restricts_names() {
        let mut config = with_targets(names(&["q_proj"]));
        config.layers_to_transform = Some(vec![1, 11]);
        let selector = config.selector().unwrap();
        assert!(!selector.matches(Q0));
        assert!(selector.matches("model.layers.11.self_attn.q_proj"));
        config.target_modules = TargetModules::AllLinear;
        assert!(matches!(
            config.validate(),
            Err(LoraError::LayersWithPattern(_))
        ));
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
        assert!(matches!(
            check(|c| c.target_modules = TargetModules::Regex("(".into())),
            LoraError::InvalidPattern { .. }
        ));
    }
}
