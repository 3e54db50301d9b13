//! Adapters that were taken out of the base model's weights (PiSSA, OLoRA), as adapters of the base model itself: what
//! PEFT's `save_pretrained` does with `path_initial_model_for_weight_conversion`.

use std::collections::BTreeMap;

use lora_core::{Factors, Init};

use super::{AdapterConfig, AdapterPair, AdapterTensors};

impl AdapterTensors {
    /// The adapters with these factors, by module.
    pub fn from_factors(factors: BTreeMap<String, Factors>) -> Self {
        let modules = factors.into_iter().map(|(module, factors)| {
            let [d_in, r, d_out] = factors.shape;
            let pair = AdapterPair::new(d_in, r, d_out, factors.a, factors.b);
            (module, pair)
        });
        Self {
            modules: modules.collect(),
            ..Self::default()
        }
    }

    /// The adapter of the base model that does the same as this adapter of the weights that `initial` was taken out
    /// of. Its ranks are doubled: [`AdapterConfig::for_base_model`] makes its settings.
    ///
    /// # Panics
    ///
    /// If a module of `initial` is not in this adapter with the same shape.
    pub fn for_base_model(mut self, initial: &Self) -> Self {
        for (module, initial) in &initial.modules {
            let pair = self.modules.get_mut(module);
            let pair = pair.unwrap_or_else(|| panic!("{module} has no adapter any more"));
            let converted = factors(pair).for_original_weight(&factors(initial));
            let [d_in, r, d_out] = converted.shape;
            *pair = AdapterPair::new(d_in, r, d_out, converted.a, converted.b);
        }
        self
    }
}

impl AdapterConfig {
    /// The settings of [`AdapterTensors::for_base_model`]: twice the rank with the same scale, and an initialization
    /// that leaves the base model as it is.
    pub fn for_base_model(mut self) -> Self {
        let lora = &mut self.lora;
        let by = if lora.use_rslora { 2f64.sqrt() } else { 2.0 };
        lora.r *= 2;
        lora.lora_alpha *= by;
        lora.rank_pattern.iter_mut().for_each(|(_, r)| *r *= 2);
        // PEFT writes twice these values with rsLoRA as well, and refuses the combination for it.
        lora.alpha_pattern
            .iter_mut()
            .for_each(|(_, alpha)| *alpha *= by);
        lora.init = Init::Kaiming;
        self
    }
}

fn factors(pair: &AdapterPair) -> Factors {
    Factors {
        a: pair.a.clone(),
        b: pair.b.clone(),
        shape: [pair.d_in, pair.r, pair.d_out],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::LoraConfig;

    #[test]
    fn every_module_keeps_its_scale_at_twice_the_rank() {
        for use_rslora in [false, true] {
            let config = AdapterConfig {
                lora: LoraConfig {
                    r: 3,
                    lora_alpha: 5.0,
                    use_rslora,
                    init: Init::PissaNiter(4),
                    rank_pattern: vec![("q_proj".into(), 2)],
                    alpha_pattern: vec![("v_proj".into(), 7.0)],
                    ..LoraConfig::default()
                },
                base_model_name_or_path: None,
            };
            let before = config.lora.selector().unwrap();
            let lora = config.for_base_model().lora;
            let after = lora.selector().unwrap();
            for module in ["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"] {
                assert_eq!(after.r(module), 2 * before.r(module));
                assert!((after.scale(module) - before.scale(module)).abs() < 1e-12);
            }
            assert_eq!(lora.init, Init::Kaiming);
        }
    }

    #[test]
    fn the_initial_adapter_itself_becomes_one_that_does_nothing() {
        let factors = Factors {
            a: vec![1.0, 2.0, 3.0, 4.0],
            b: vec![5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
            shape: [2, 2, 3],
        };
        let initial = AdapterTensors::from_factors([("q_proj".to_string(), factors)].into());
        let converted = initial.clone().for_base_model(&initial);
        let pair = &converted.modules["q_proj"];
        assert_eq!((pair.d_in, pair.r, pair.d_out), (2, 4, 3));
        for row in pair.a.chunks(4) {
            for column in 0..3 {
                let sum: f32 = (0..4).map(|k| row[k] * pair.b[3 * k + column]).sum();
                assert_eq!(sum, 0.0);
            }
        }
    }
}
