//! From a module's name to its adapter: PEFT's `check_target_module_exists` and `get_pattern_key`.

use fancy_regex::Regex;

use crate::config::scale;
use crate::{Bias, ExcludeModules, LoraConfig, LoraError, TargetModules};

/// Decides by full module name (`model.layers.0.self_attn.q_proj`) whether a module is adapted, and with
/// which rank and scale.
///
/// Regular expressions have the syntax of Python's `re`, with look-around. An expression that needs more than a million
/// steps for a name counts as not matching.
#[derive(Debug, Clone)]
pub struct ModuleSelector {
    targets: Names,
    exclude: Option<Names>,
    saved: Vec<Regex>,
    layers: Option<Layers>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
    r: usize,
    alpha: f64,
    use_rslora: bool,
    /// Whether the method has a scale γ.
    scaled: bool,
    bias: Bias,
}

/// A set of module names.
#[derive(Debug, Clone)]
enum Names {
    List(Vec<String>),
    Regex(Regex),
    AllLinear,
}

impl Names {
    fn contains(&self, name: &str) -> bool {
        match self {
            Names::List(names) => names.iter().any(|target| {
                name == target
                    || name
                        .strip_suffix(target.as_str())
                        .is_some_and(|rest| rest.ends_with('.'))
            }),
            Names::Regex(regex) => matches(regex, name),
            Names::AllLinear => name != "lm_head" && !name.ends_with(".lm_head"),
        }
    }

    /// Whether the full name, not only its end, is in a list. PEFT then ignores `layers_to_transform`.
    fn lists(&self, name: &str) -> bool {
        matches!(self, Names::List(names) if names.iter().any(|target| target == name))
    }
}

/// `layers_to_transform`, and the patterns that find the layer's index in a name.
#[derive(Debug, Clone)]
struct Layers {
    indices: Vec<usize>,
    patterns: Vec<Regex>,
}

impl Layers {
    fn contain(&self, name: &str) -> bool {
        let index = self.patterns.iter().find_map(|pattern| {
            let captures = pattern.captures(name).ok()??;
            captures.name("index")?.as_str().parse::<usize>().ok()
        });
        index.is_some_and(|index| self.indices.contains(&index))
    }
}

impl ModuleSelector {
    pub(crate) fn new(config: &LoraConfig) -> Result<Self, LoraError> {
        let as_string = match &config.target_modules {
            // Without low-rank factors PEFT has nothing to train.
            TargetModules::Names(names) if names.iter().all(|name| name.is_empty()) => {
                return Err(LoraError::NoTargets);
            }
            TargetModules::Names(_) => None,
            TargetModules::Regex(pattern) => Some(pattern.as_str()),
            TargetModules::AllLinear => Some("all-linear"),
        };
        if let (Some(string), Some(_)) = (as_string, &config.layers_to_transform) {
            return Err(LoraError::LayersWithPattern(string.into()));
        }
        if !config.layers_pattern.is_empty() && config.layers_to_transform.is_none() {
            return Err(LoraError::PatternWithoutLayers);
        }
        let targets = match &config.target_modules {
            TargetModules::Names(names) => Names::List(names.clone()),
            TargetModules::AllLinear => Names::AllLinear,
            TargetModules::Regex(pattern) => Names::Regex(whole("target_modules", pattern)?),
        };
        let exclude = match &config.exclude_modules {
            None => None,
            Some(ExcludeModules::Names(names)) => Some(Names::List(names.clone())),
            Some(ExcludeModules::Regex(pattern)) => {
                Some(Names::Regex(whole("exclude_modules", pattern)?))
            }
        };
        let saved = config.modules_to_save.iter().map(|module| {
            let text = format!(r"\A(?:|.*\.){module}(?:\z|\..*)");
            compile("modules_to_save", module, &text)
        });
        let indices = config.layers_to_transform.clone();
        let layers = match indices.filter(|indices| !indices.is_empty()) {
            None => None,
            Some(indices) => Some(Layers {
                indices,
                patterns: layer_patterns(&config.layers_pattern)?,
            }),
        };
        Ok(Self {
            targets,
            exclude,
            saved: saved.collect::<Result<_, _>>()?,
            layers,
            ranks: patterns("rank_pattern", &config.rank_pattern)?,
            alphas: patterns("alpha_pattern", &config.alpha_pattern)?,
            r: config.r,
            alpha: config.lora_alpha,
            use_rslora: config.use_rslora,
            scaled: config.method.facts().has("lora_alpha"),
            bias: config.bias,
        })
    }

    /// Whether the module of this full name is adapted.
    ///
    /// The output layer is recognised by its name, `lm_head`; `all-linear` excludes it.
    pub fn matches(&self, name: &str) -> bool {
        let excluded = self.exclude.as_ref().is_some_and(|set| set.contains(name));
        if excluded || self.saves(name) {
            return false;
        }
        let in_layers = |layers: &Layers| self.targets.lists(name) || layers.contain(name);
        self.targets.contains(name) && self.layers.as_ref().is_none_or(in_layers)
    }

    /// Whether the module of this full name is trained as a whole: it, or a module around it, is in `modules_to_save`.
    pub fn saves(&self, name: &str) -> bool {
        self.saved.iter().any(|saved| matches(saved, name))
    }

    /// Whether the parameter of this name in the module of this full name is trained itself: as a part of a module in
    /// `modules_to_save`, or as a bias that the setting `bias` selects.
    pub fn trains(&self, module: &str, parameter: &str) -> bool {
        let bias = parameter == "bias"
            && match self.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => self.matches(module),
            };
        bias || self.saves(module)
    }

    /// Checks that every entry of `config`, from which the selector was made, matches a linear module of these names.
    /// An entry without a match is most likely a typing error, and would have no effect.
    ///
    /// # Errors
    ///
    /// [`LoraError::MatchesNothing`] with the first entry that matches no module.
    pub fn check(&self, config: &LoraConfig, names: &[&str]) -> Result<(), LoraError> {
        let all = "the model's linear modules";
        let nothing = |field, entry: &str, among: &str| LoraError::MatchesNothing {
            field,
            entry: entry.into(),
            among: format!("{among} ({})", kinds(names.iter().copied()).join(", ")).into(),
            nearest: nearest(entry, names),
        };
        let lists = |entry: &String| {
            let list = Names::List(vec![entry.clone()]);
            names.iter().any(|name| list.contains(name))
        };
        if let TargetModules::Names(targets) = &config.target_modules
            && let Some(entry) = targets.iter().find(|entry| !lists(entry))
        {
            return Err(nothing("target_modules", entry, all));
        }
        match &config.exclude_modules {
            Some(ExcludeModules::Names(excluded)) => {
                if let Some(entry) = excluded.iter().find(|entry| !lists(entry)) {
                    return Err(nothing("exclude_modules", entry, all));
                }
            }
            Some(ExcludeModules::Regex(pattern)) => {
                let set = self.exclude.as_ref();
                if set.is_some_and(|set| !names.iter().any(|name| set.contains(name))) {
                    return Err(nothing("exclude_modules", pattern, all));
                }
            }
            None => {}
        }
        if let Some(layers) = &self.layers {
            let has = |index: usize| {
                let one = Layers {
                    indices: vec![index],
                    patterns: layers.patterns.clone(),
                };
                names.iter().any(|name| one.contain(name))
            };
            if let Some(index) = layers.indices.iter().find(|index| !has(**index)) {
                let count = (0..).take_while(|index| has(*index)).count();
                return Err(LoraError::MatchesNothing {
                    field: "layers_to_transform",
                    entry: index.to_string().into(),
                    among: format!("the model's {count} layers, which are counted from 0").into(),
                    nearest: None,
                });
            }
        }
        let adapted: Vec<&str> = names
            .iter()
            .copied()
            .filter(|name| self.matches(name))
            .collect();
        let idle = |regex: &Regex| !adapted.iter().any(|name| matches(regex, name));
        let among = "the modules that get an adapter";
        if let Some(at) = self.ranks.iter().position(|(regex, _)| idle(regex)) {
            return Err(nothing("rank_pattern", &config.rank_pattern[at].0, among));
        }
        if let Some(at) = self.alphas.iter().position(|(regex, _)| idle(regex)) {
            return Err(nothing("alpha_pattern", &config.alpha_pattern[at].0, among));
        }
        Ok(())
    }

    /// The rank of this module's adapter.
    pub fn r(&self, name: &str) -> usize {
        first(&self.ranks, name).unwrap_or(self.r)
    }

    /// The α of this module's adapter.
    pub fn alpha(&self, name: &str) -> f64 {
        first(&self.alphas, name).unwrap_or(self.alpha)
    }

    /// The scale γ of this module's adapter: α/r, or α/√r with `use_rslora`; 1 for a method without α.
    pub fn scale(&self, name: &str) -> f64 {
        if self.scaled {
            scale(self.r(name), self.alpha(name), self.use_rslora)
        } else {
            1.0
        }
    }
}

/// The value of the first expression that matches a name's end, whole components only.
fn first<T: Copy>(patterns: &[(Regex, T)], name: &str) -> Option<T> {
    let found = patterns.iter().find(|(regex, _)| matches(regex, name));
    found.map(|(_, value)| *value)
}

/// The last components of names, each once, in order.
pub(crate) fn kinds<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut kinds: Vec<&str> = Vec::new();
    for name in names {
        let kind = name.rsplit('.').next().unwrap_or(name);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
}

/// The kind of module with the most similar name, if it is similar enough for a typing error.
fn nearest(entry: &str, names: &[&str]) -> Option<Box<str>> {
    let similarity = |kind: &str| strsim::jaro_winkler(&entry.to_lowercase(), kind);
    let kinds = kinds(names.iter().copied()).into_iter();
    let alike = kinds.filter(|kind| similarity(kind) > 0.8);
    let nearest = alike.max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    nearest.filter(|kind| *kind != entry).map(Box::from)
}

fn matches(regex: &Regex, name: &str) -> bool {
    regex.is_match(name).unwrap_or(false)
}

fn patterns<T: Copy>(
    field: &'static str,
    patterns: &[(String, T)],
) -> Result<Vec<(Regex, T)>, LoraError> {
    let compiled = patterns.iter().map(|(pattern, value)| {
        let text = format!(r"\A(?:.*\.)?(?:{pattern})\z");
        Ok((compile(field, pattern, &text)?, *value))
    });
    compiled.collect()
}

/// Patterns that find the layer's index in a name: after any component except the first, or after one of these.
fn layer_patterns(layers_pattern: &[String]) -> Result<Vec<Regex>, LoraError> {
    const FIELD: &str = "layers_pattern";
    if layers_pattern.is_empty() {
        let any = r"\A.*?\.[^.]*\.(?P<index>\d+)\.";
        return Ok(vec![compile(FIELD, any, any)?]);
    }
    let patterns = layers_pattern.iter().map(|pattern| {
        let text = format!(r"\A(?:|.*?\.){pattern}\.(?P<index>\d+)\.");
        compile(FIELD, pattern, &text)
    });
    patterns.collect()
}

/// An expression that must match the whole name.
fn whole(field: &'static str, pattern: &str) -> Result<Regex, LoraError> {
    compile(field, pattern, &format!(r"\A(?:{pattern})\z"))
}

fn compile(field: &'static str, pattern: &str, text: &str) -> Result<Regex, LoraError> {
    Regex::new(text).map_err(|error| LoraError::InvalidPattern {
        field,
        pattern: pattern.into(),
        reason: error.to_string(),
    })
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
    fn all_linear_excludes_the_output_layer() {
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
    fn a_listed_full_name_needs_no_layer_and_an_empty_list_of_layers_means_all() {
        let mut config = with_targets(names(&[Q0, "k_proj"]));
        config.layers_to_transform = Some(vec![1]);
        let selector = config.selector().unwrap();
        assert!(selector.matches(Q0));
        assert!(!selector.matches("model.layers.0.self_attn.k_proj"));
        config.layers_to_transform = Some(vec![]);
        let selector = config.selector().unwrap();
        assert!(selector.matches("model.layers.0.self_attn.k_proj"));
    }

    #[test]
    fn layers_pattern_finds_the_layers_index() {
        let mut config = with_targets(names(&["q_proj"]));
        config.layers_to_transform = Some(vec![0]);
        for (pattern, expected) in [("layers", true), ("blocks", false), ("lay[a-z]+", true)] {
            config.layers_pattern = vec![pattern.into()];
            assert_eq!(
                config.selector().unwrap().matches(Q0),
                expected,
                "{pattern}"
            );
        }
        config.layers_to_transform = None;
        assert_eq!(config.validate(), Err(LoraError::PatternWithoutLayers));
    }

    #[test]
    fn excluded_modules_and_modules_to_save_are_not_adapted() {
        let mut config = with_targets(TargetModules::AllLinear);
        config.exclude_modules = Some(ExcludeModules::Names(vec!["q_proj".into()]));
        let selector = config.selector().unwrap();
        assert!(!selector.matches(Q0));
        assert!(selector.matches("model.layers.0.self_attn.k_proj"));
        config.exclude_modules = Some(ExcludeModules::Regex(r".*layers\.0\..*".into()));
        let selector = config.selector().unwrap();
        assert!(!selector.matches(Q0));
        assert!(selector.matches("model.layers.1.self_attn.q_proj"));
        config.exclude_modules = None;
        config.modules_to_save = vec!["mlp".into()];
        let selector = config.selector().unwrap();
        assert!(!selector.matches("model.layers.0.mlp.up_proj"));
        assert!(selector.matches(Q0));
    }

    #[test]
    fn look_around_is_supported() {
        let pattern = r"(?!.*layers\.1\.).*(?<!k)_proj";
        let selector = with_targets(TargetModules::Regex(pattern.into()));
        let selector = selector.selector().unwrap();
        assert!(selector.matches(Q0));
        assert!(!selector.matches("model.layers.0.self_attn.k_proj"));
        assert!(!selector.matches("model.layers.1.self_attn.q_proj"));
    }

    #[test]
    fn the_first_pattern_that_matches_the_end_of_a_name_gives_rank_and_alpha() {
        let mut config = with_targets(names(&["q_proj", "k_proj", "v_proj"]));
        config.rank_pattern = vec![
            (r"layers\.0\.self_attn\.q_proj".into(), 2),
            ("q_proj".into(), 4),
            ("_proj".into(), 5),
            (r"^model\.layers\.1\..*v_proj".into(), 6),
        ];
        config.alpha_pattern = vec![("q_proj|v_proj".into(), 3.0)];
        let selector = config.selector().unwrap();
        let name = |layer: usize, module: &str| format!("model.layers.{layer}.self_attn.{module}");
        let r = |layer, module| selector.r(&name(layer, module));
        assert_eq!((r(0, "q_proj"), r(1, "q_proj")), (2, 4));
        assert_eq!((r(0, "k_proj"), r(1, "v_proj"), r(0, "v_proj")), (8, 6, 8));
        assert_eq!(selector.scale(&name(1, "v_proj")), 0.5);
        assert_eq!(selector.scale(&name(1, "k_proj")), 2.0);
        config.use_rslora = true;
        assert_eq!(config.selector().unwrap().scale(&name(1, "q_proj")), 1.5);
        config.rank_pattern = vec![("q_proj".into(), 0)];
        assert_eq!(config.validate(), Err(LoraError::ZeroRank));
        config.rank_pattern = vec![("(".into(), 1)];
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains("rank_pattern"), "{error}");
    }

    #[test]
    fn an_entry_that_matches_nothing_is_named_with_the_nearest() {
        let modules: Vec<String> = (0..2)
            .flat_map(|layer| {
                ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]
                    .map(|name| format!("model.layers.{layer}.{name}"))
            })
            .collect();
        let modules: Vec<&str> = modules.iter().map(String::as_str).collect();
        let base = || with_targets(names(&["q_proj", "v_proj"]));
        let check = |config: LoraConfig| {
            let checked = config.selector().unwrap().check(&config, &modules);
            checked.map_err(|error| error.to_string())
        };
        let good = LoraConfig {
            rank_pattern: vec![("q_proj".into(), 4), (r"layers\.1\..*".into(), 2)],
            alpha_pattern: vec![("model.layers.0.self_attn.v_proj".into(), 3.0)],
            exclude_modules: Some(ExcludeModules::Names(vec![
                "layers.0.self_attn.q_proj".into(),
            ])),
            layers_to_transform: Some(vec![0, 1]),
            ..base()
        };
        assert_eq!(check(good), Ok(()));
        for (config, parts) in [
            (
                with_targets(names(&["q_proj", "vproj"])),
                ["target_modules: \"vproj\"", "did you mean \"v_proj\""],
            ),
            (
                LoraConfig {
                    rank_pattern: vec![("qproj".into(), 4)],
                    ..base()
                },
                ["rank_pattern: \"qproj\"", "did you mean \"q_proj\""],
            ),
            (
                // The module exists, but has no adapter.
                LoraConfig {
                    alpha_pattern: vec![("up_proj".into(), 4.0)],
                    ..base()
                },
                ["alpha_pattern: \"up_proj\"", "get an adapter"],
            ),
            (
                LoraConfig {
                    exclude_modules: Some(ExcludeModules::Regex(".*o_proj".into())),
                    ..base()
                },
                ["exclude_modules: \".*o_proj\"", "q_proj, v_proj, up_proj"],
            ),
            (
                LoraConfig {
                    layers_to_transform: Some(vec![1, 2]),
                    ..base()
                },
                ["layers_to_transform: \"2\"", "2 layers"],
            ),
        ] {
            let error = check(config).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
