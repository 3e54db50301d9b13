//! LoRA+ (Hayou et al., 2024, <https://arxiv.org/abs/2402.12354>): B learns faster than A.

use std::collections::HashMap;

use burn::module::ParamId;
use llama_burn::Llama;

use crate::groups::undecayed;

/// The learning rates of LoRA+ for [`Optimizer::with_rates`](crate::optimizer::Optimizer::with_rates): `ratio` times
/// the step's for every B and every vector, such as a magnitude per output, a bias or a norm. A, trained rows of a table
/// and whole weights keep the step's. The groups are those of PEFT's `create_loraplus_optimizer`.
pub fn loraplus_rates(model: &Llama, ratio: f64) -> HashMap<ParamId, f64> {
    let params = model.trainable().flat_map(|(_, params)| {
        // A, or the rows, come first.
        params.into_iter().skip(1)
    });
    let of_adapters = params.map(|param| param.id);
    let vectors = undecayed(model);
    let ids = of_adapters.chain(vectors);
    ids.map(|id| (id, ratio)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradients::{AdapterGradients, PassOptions, accumulate};
    use crate::optimizer::{AdamW, Optimizer, to_host};
    use burn::tensor::Device;
    use data::{Batch, BatchRow, Prefixes};
    use llama_burn::LlamaConfig;
    use lora_core::{LoraConfig, Method, TargetModules};
    use std::collections::BTreeMap;

    /// A model whose adapters have a magnitude, on a device with an autodiff graph.
    fn model() -> Llama {
        let text = r#"{"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}"#;
        let json: serde_json::Value = serde_json::from_str(text).unwrap();
        let config = LlamaConfig::from_json(json.as_object().unwrap()).unwrap();
        let lora = LoraConfig {
            r: 2,
            method: Method::Dora,
            target_modules: TargetModules::AllLinear,
            ..LoraConfig::default()
        };
        let model = Llama::random(&config, 1, &Device::flex().autodiff());
        model.with_lora(&lora, 2).unwrap()
    }

    fn batch() -> Batch {
        let row = BatchRow {
            ids: &[3, 4, 5, 6, 7],
            targets: vec![(2, 6), (3, 7)],
            line: 1,
        };
        Batch::new(&[row], Prefixes::Apart)
    }

    /// Trains some steps; the optimizer's sums are used, or sums in the order of the passes.
    fn train(model: &Llama, optimizer: &mut Optimizer, steps: usize, sorted: bool) -> Llama {
        let mut model = model.clone();
        for _ in 0..steps {
            let mut sums = if sorted {
                optimizer.sums()
            } else {
                AdapterGradients::default()
            };
            accumulate(&model, &batch(), PassOptions::default(), &mut sums);
            model = optimizer.step(0.01, model, sums.into_mean(0.0).gradients);
        }
        model
    }

    /// The trained tensors by module and index: A, B, magnitude.
    fn values(model: &Llama) -> BTreeMap<(String, usize), Vec<f32>> {
        let modules = model.trainable().flat_map(|(module, params)| {
            let params = params.into_iter().enumerate();
            params.map(move |(index, param)| ((module.clone(), index), to_host(param.val())))
        });
        modules.collect()
    }

    #[test]
    fn a_first_step_moves_b_and_magnitudes_by_the_ratio_and_a_as_before() {
        let start = model();
        let rates = loraplus_rates(&start, 4.0);
        let adamw = AdamW::default();
        let before = values(&start);
        let plain = values(&train(&start, &mut adamw.resumable(), 1, false));
        let mut optimizer = adamw.resumable().with_rates(rates);
        let fast = values(&train(&start, &mut optimizer, 1, true));
        assert_eq!(plain.len(), 2 * 7 * 3);
        for (name, before) in before {
            // A's first gradient is zero, because B is.
            let moved = |after: &[f32]| -> Vec<f32> {
                after.iter().zip(&before).map(|(a, b)| a - b).collect()
            };
            let (plain, fast) = (moved(&plain[&name]), moved(&fast[&name]));
            let ratio = if name.1 == 0 { 1.0 } else { 4.0 };
            for (plain, fast) in plain.iter().zip(&fast) {
                // One rounding of a value of order 1.
                assert!(
                    (ratio * plain - fast).abs() < 2e-6,
                    "{name:?} {plain} {fast}"
                );
            }
            assert!(name.1 == 0 || fast.iter().any(|fast| fast.abs() > 0.039));
        }
    }

    #[test]
    fn the_order_of_the_gradients_and_a_restart_from_moments_change_no_bit() {
        let start = model();
        let new = || {
            AdamW::default()
                .resumable()
                .with_rates(loraplus_rates(&start, 4.0))
        };
        let expected = values(&train(&start, &mut new(), 4, true));
        // One launch per run of equal rates.
        assert_eq!(expected, values(&train(&start, &mut new(), 4, false)));
        let mut first = new();
        let halfway = train(&start, &mut first, 2, true);
        let mut second = new();
        for (_, params) in halfway.trainable() {
            for param in params {
                let moments = first.moments(param.id).unwrap();
                second.set_moments(param.id, moments, &Device::flex());
            }
        }
        assert_eq!(expected, values(&train(&halfway, &mut second, 2, true)));
    }
}
