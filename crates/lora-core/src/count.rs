//! Parameter counts and bytes from shapes alone, without a weight.

use kernels::Quantization;

use crate::{LoraConfig, LoraError, TargetModules, selector};

/// One module's weight, by its name and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleShape {
    /// The module's full name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// The shape of its weight; `[d_in, d_out]` for a linear module.
    pub shape: Vec<usize>,
    /// Whether it is a linear module, to which an adapter or quantization can apply. Embedding, norms and biases are
    /// not.
    pub is_linear: bool,
}

/// How many parameters are trainable and frozen, and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ParameterCounts {
    /// Elements of all adapters' `A` and `B`, if they are trained, and of their methods' vectors.
    pub trainable: u64,
    /// Elements of all adapters' `A` and `B`, trained or not, each module's counted.
    pub low_rank: u64,
    /// Elements of the frozen matrices that all adapters share.
    pub shared: u64,
    /// Elements of the base model.
    pub frozen: u64,
    /// Bytes of the linear modules in the decoder as stored, block scales included.
    pub linear_bytes: u64,
    /// Bytes of everything else in the base model: embedding, head, norms, biases.
    pub other_bytes: u64,
    /// Bytes of the trained tensors in f32.
    pub adapter_bytes: u64,
    /// Modules that get an adapter.
    pub adapted_modules: usize,
}

impl ParameterCounts {
    /// Counts a model of these modules under `config`, its linear modules (without `lm_head`) stored
    /// with `quantization` and everything else with `float_bytes` bytes per element.
    ///
    /// # Errors
    ///
    /// If `config` is invalid, selects no module, or has an entry that matches no module.
    pub fn new(
        modules: &[ModuleShape],
        config: &LoraConfig,
        quantization: Quantization,
        float_bytes: usize,
    ) -> Result<Self, LoraError> {
        config.validate()?;
        let selector = config.selector()?;
        let facts = config.method.facts();
        let mut largest = [0, 0];
        let mut counts = Self::default();
        for module in modules {
            let elements: usize = module.shape.iter().product();
            counts.frozen += elements as u64;
            let linear = match module.shape[..] {
                [d_in, d_out] if module.is_linear => Some((d_in, d_out)),
                _ => None,
            };
            match linear {
                Some((d_in, d_out)) if module.name != "lm_head" => {
                    counts.linear_bytes += quantization.bytes(d_in, d_out, float_bytes) as u64;
                }
                _ => counts.other_bytes += (elements * float_bytes) as u64,
            }
            if let Some((d_in, d_out)) = linear
                && selector.matches(&module.name)
            {
                let r = selector.r(&module.name);
                let vectors = facts.vectors.iter().map(|vector| vector.length(r, d_out));
                let low_rank = r * (d_in + d_out);
                let trained = if facts.shared.is_none() { low_rank } else { 0 };
                counts.trainable += (trained + vectors.sum::<usize>()) as u64;
                counts.low_rank += low_rank as u64;
                largest = [d_in.max(largest[0]), d_out.max(largest[1])];
                counts.adapted_modules += 1;
            }
        }
        if counts.adapted_modules == 0 {
            return Err(LoraError::NothingSelected {
                targets: selection(config),
                available: kinds(modules),
            });
        }
        let linear = modules.iter().filter(|module| module.is_linear);
        let names: Vec<&str> = linear.map(|module| module.name.as_str()).collect();
        selector.check(config, &names)?;
        counts.adapter_bytes = counts.trainable * 4;
        if facts.shared.is_some() {
            counts.shared = (config.r * (largest[0] + largest[1])) as u64;
        }
        Ok(counts)
    }

    /// The ratio of frozen to trainable parameters.
    pub fn ratio(&self) -> f64 {
        self.frozen as f64 / self.trainable as f64
    }
}

/// The selection as in a configuration: `target_modules = q_proj, k_proj with layers_to_transform = 7, 8`.
pub(crate) fn selection(config: &LoraConfig) -> String {
    let targets = match &config.target_modules {
        TargetModules::Names(names) => names.join(", "),
        TargetModules::Regex(pattern) => format!("{pattern:?}"),
        TargetModules::AllLinear => "all-linear".into(),
    };
    let layers = match &config.layers_to_transform {
        Some(layers) => {
            let layers: Vec<String> = layers.iter().map(ToString::to_string).collect();
            format!(" with layers_to_transform = {}", layers.join(", "))
        }
        None => String::new(),
    };
    format!("target_modules = {targets}{layers}")
}

/// The last components of linear modules' names, each once, in order.
fn kinds(modules: &[ModuleShape]) -> String {
    let linear = modules.iter().filter(|module| module.is_linear);
    selector::kinds(linear.map(|module| module.name.as_str())).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, shape: &[usize], is_linear: bool) -> ModuleShape {
        ModuleShape {
            name: name.into(),
            shape: shape.to_vec(),
            is_linear,
        }
    }

    /// The shapes of Llama 3.1 70B's published configuration.
    fn llama_70b() -> Vec<ModuleShape> {
        let (vocab, hidden, inter, kv) = (128_256, 8192, 28_672, 1024);
        let mut modules = vec![
            module("model.embed_tokens", &[vocab, hidden], false),
            module("model.norm", &[hidden], false),
            module("lm_head", &[hidden, vocab], true),
        ];
        for i in 0..80 {
            let layer = |name: &str| format!("model.layers.{i}.{name}");
            modules.extend([
                module(&layer("self_attn.q_proj"), &[hidden, hidden], true),
                module(&layer("self_attn.k_proj"), &[hidden, kv], true),
                module(&layer("self_attn.v_proj"), &[hidden, kv], true),
                module(&layer("self_attn.o_proj"), &[hidden, hidden], true),
                module(&layer("mlp.gate_proj"), &[hidden, inter], true),
                module(&layer("mlp.up_proj"), &[hidden, inter], true),
                module(&layer("mlp.down_proj"), &[inter, hidden], true),
                module(&layer("input_layernorm"), &[hidden], false),
                module(&layer("post_attention_layernorm"), &[hidden], false),
            ]);
        }
        modules
    }

    #[test]
    fn llama_70b_with_rank_4_on_q_k_v_trains_11_141_120_parameters() {
        let config = LoraConfig {
            r: 4,
            ..LoraConfig::default()
        };
        let counts = ParameterCounts::new(&llama_70b(), &config, Quantization::Bits8, 2).unwrap();
        assert_eq!(counts.trainable, 11_141_120);
        assert_eq!(counts.frozen, 70_553_706_496);
        assert_eq!(format!("{:.1}", counts.ratio()), "6332.7");
        assert_eq!(counts.adapted_modules, 240);
        // Linear weights in the decoder: 8 bits each and a 32-bit scale per 32 weights.
        let linear = counts.frozen - 2 * 128_256 * 8192 - (2 * 80 + 1) * 8192;
        assert_eq!(counts.linear_bytes, linear + linear / 8);
    }

    #[test]
    fn all_linear_excludes_the_head_and_a_wrong_target_lists_the_kinds_of_modules() {
        let mut config = LoraConfig {
            r: 1,
            target_modules: TargetModules::AllLinear,
            ..LoraConfig::default()
        };
        let counts = ParameterCounts::new(&llama_70b(), &config, Quantization::None, 2).unwrap();
        assert_eq!(counts.adapted_modules, 7 * 80);
        config.target_modules = TargetModules::Names(vec!["query".into()]);
        let error = ParameterCounts::new(&llama_70b(), &config, Quantization::None, 2).unwrap_err();
        assert!(error.to_string().contains("q_proj, k_proj"), "{error}");
        config.target_modules = TargetModules::Names(vec!["q_proj".into()]);
        config.layers_to_transform = Some(vec![80, 81]);
        let error = ParameterCounts::new(&llama_70b(), &config, Quantization::None, 2).unwrap_err();
        assert!(
            error.to_string().contains("layers_to_transform = 80, 81"),
            "{error}"
        );
    }
}
