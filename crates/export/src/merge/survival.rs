//! Measures how much of a LoRA update survives when the merged weight is quantized again.
//!
//! An 8-bit step is about a hundredth of a typical weight. A smaller update is rounded away, or becomes
//! noise of the size of a step. The measure is the cosine between the intended change and the change in
//! the quantized weight: 1 if the whole update survived, 0 if nothing did.

use std::collections::BTreeMap;

use lora_core::Quantization;

use terminal::human;

/// The merged model is refused below this cosine over all modules together: more than 40 % noise.
pub const LEAST_OVERALL: f64 = 0.9;
/// The merged model is refused below this cosine in a single module.
pub const LEAST_OF_A_MODULE: f64 = 0.5;

/// Sums over the elements of intended and actual differences.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Survival {
    /// Σ intended · actual.
    pub product: f64,
    /// Σ intended².
    pub intended: f64,
    /// Σ actual².
    pub actual: f64,
}

impl Survival {
    /// The sums over these differences.
    pub fn of(intended: &[f32], actual: &[f32]) -> Self {
        let mut sums = Self::default();
        for (intended, actual) in intended.iter().zip(actual) {
            let (intended, actual) = (f64::from(*intended), f64::from(*actual));
            sums.product += intended * actual;
            sums.intended += intended * intended;
            sums.actual += actual * actual;
        }
        sums
    }

    /// Adds the sums of other elements.
    pub fn add(&mut self, other: Self) {
        self.product += other.product;
        self.intended += other.intended;
        self.actual += other.actual;
    }

    /// The cosine between both. 1 if no change was intended, because nothing was lost.
    pub fn cosine(&self) -> f64 {
        if self.intended <= 0.0 {
            1.0
        } else if self.actual > 0.0 {
            self.product / (self.intended * self.actual).sqrt()
        } else {
            0.0
        }
    }
}

/// How much of the change from `base`, which is rounded, to `merged`, which is not, survives in the quantized
/// merged weight. Both are `[d_out, d_in]`.
pub(super) fn of_merged(
    base: &[f32],
    mut merged: Vec<f32>,
    d_in: usize,
    quantization: Quantization,
    block: usize,
) -> Survival {
    let intended: Vec<f32> = merged.iter().zip(base).map(|(w, base)| w - base).collect();
    round(&mut merged, d_in, quantization, block);
    for (merged, base) in merged.iter_mut().zip(base) {
        *merged -= base;
    }
    Survival::of(&intended, &merged)
}

/// Rounds a weight `[d_out, d_in]` to the values of its quantized form. Blocks lie along d_out, as
/// `lora_core::quantize_data` makes them in the transposed weight.
pub(super) fn round(values: &mut [f32], d_in: usize, quantization: Quantization, block: usize) {
    let largest = match quantization {
        Quantization::Bits8 => 127.0,
        Quantization::Bits4 => 7.0,
        Quantization::None => return,
    };
    let mut scales = vec![0f32; d_in];
    for block in values.chunks_exact_mut(block * d_in) {
        scales.fill(0.0);
        for row in block.chunks_exact(d_in) {
            for (peak, value) in scales.iter_mut().zip(row) {
                *peak = peak.max(value.abs());
            }
        }
        for scale in &mut scales {
            *scale = (*scale / largest).max(f32::MIN_POSITIVE);
        }
        for row in block.chunks_exact_mut(d_in) {
            for (value, scale) in row.iter_mut().zip(&scales) {
                let integer = (*value * (1.0 / *scale)).round();
                *value = integer.clamp(-largest, largest) * scale;
            }
        }
    }
}

/// How much of each module's update survives.
#[derive(Debug, Clone, PartialEq)]
pub struct SurvivalReport {
    /// Bits of the quantized weights.
    pub bits: u8,
    /// By module name, such as `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, Survival>,
}

impl SurvivalReport {
    /// The cosine over all modules together.
    pub fn overall(&self) -> f64 {
        let mut all = Survival::default();
        self.modules.values().for_each(|module| all.add(*module));
        all.cosine()
    }

    /// The module with the smallest cosine.
    pub fn worst(&self) -> Option<(&str, f64)> {
        let cosines = self.modules.iter().map(|(name, s)| (&name[..], s.cosine()));
        cosines.min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// The reason not to use the merged model, if there is one.
    pub fn refusal(&self) -> Option<String> {
        let overall = self.overall();
        let (name, worst) = self.worst()?;
        let what = if overall < LEAST_OVERALL {
            format!(
                "the cosine similarity of the LoRA update before and after quantization is {overall:.3} over all modules, expected at least {LEAST_OVERALL}"
            )
        } else if worst < LEAST_OF_A_MODULE {
            format!(
                "in {name} the cosine similarity of the LoRA update before and after quantization is {worst:.3}, expected at least {LEAST_OF_A_MODULE}"
            )
        } else {
            return None;
        };
        Some(format!(
            "too little of the adapter's update survives in {} bits: {what}",
            self.bits
        ))
    }

    /// A table with one line per layer and one column per module.
    pub fn lines(&self) -> Vec<String> {
        let mut kinds: Vec<&str> = Vec::new();
        let mut layers: BTreeMap<usize, BTreeMap<&str, f64>> = BTreeMap::new();
        let mut others = Vec::new();
        for (name, survival) in &self.modules {
            let parts = name.strip_prefix("model.layers.").and_then(|rest| {
                let (layer, module) = rest.split_once('.')?;
                let kind = module.rsplit('.').next()?;
                Some((layer.parse::<usize>().ok()?, kind))
            });
            match parts {
                None => others.push(format!("{name}  {:.4}", survival.cosine())),
                Some((layer, kind)) => {
                    if !kinds.contains(&kind) {
                        kinds.push(kind);
                    }
                    let layer = layers.entry(layer).or_default();
                    layer.insert(kind, survival.cosine());
                }
            }
        }
        let title = std::iter::once("layer".to_string()).chain(kinds.iter().map(|k| k.to_string()));
        let mut rows = vec![title.collect::<Vec<String>>()];
        for (layer, modules) in &layers {
            let cell = |kind: &&str| match modules.get(kind) {
                Some(cosine) => format!("{cosine:.4}"),
                None => "-".into(),
            };
            let cells = std::iter::once(layer.to_string()).chain(kinds.iter().map(cell));
            rows.push(cells.collect());
        }
        let right: Vec<usize> = (0..=kinds.len()).collect();
        let mut lines = vec![format!(
            "cosine similarity of the LoRA update before and after quantization to {} bits",
            self.bits
        )];
        lines.extend(human::columns(&rows, &right));
        lines.extend(others);
        lines.push(format!("all modules together: {:.4}", self.overall()));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Tensor};
    use lora_core::{CounterRng, quantize_data};

    fn weight(count: usize) -> Vec<f32> {
        let mut rng = CounterRng::new(9);
        (0..count).map(|_| (rng.normal() * 0.05) as f32).collect()
    }

    #[test]
    fn rounding_is_what_the_quantized_weight_holds() {
        for (quantization, d_out) in [(Quantization::Bits8, 96), (Quantization::Bits4, 72)] {
            let (d_in, values) = (10, weight(10 * d_out));
            let turned: Vec<f32> = (0..d_in * d_out)
                .map(|i| values[i % d_out * d_in + i / d_out])
                .collect();
            let (data, _) = quantize_data(&turned, [d_in, d_out], quantization).unwrap();
            let quantized = Tensor::<2>::from_data(data, &Device::flex());
            let expected = quantized.dequantize().transpose();
            let expected: Vec<f32> = expected.into_data().try_to_vec().unwrap();
            let mut rounded = values;
            let block = quantization.block(d_out).unwrap();
            round(&mut rounded, d_in, quantization, block);
            assert_eq!(rounded, expected);
        }
    }

    #[test]
    fn a_large_update_survives_and_a_tiny_one_does_not() {
        let (d_in, d_out) = (64, 96);
        let survival = |size: f64| {
            let mut base = weight(d_in * d_out);
            round(&mut base, d_in, Quantization::Bits8, 32);
            let mut rng = CounterRng::new(10);
            let update = base.iter().map(|w| w + (rng.normal() * size) as f32);
            let merged = update.collect();
            of_merged(&base, merged, d_in, Quantization::Bits8, 32)
        };
        // Weights of 0.05 have steps of about 0.001, whose roundings are 0.0003: updates of 100, 4 and 1/10 of that.
        let [large, middle, tiny] = [0.03, 0.0012, 0.00003].map(|size| survival(size).cosine());
        assert!(large > 0.999, "{large}");
        assert!(middle > 0.9 && middle < 0.99, "{middle}");
        assert!(tiny < 0.5, "{tiny}");
    }

    #[test]
    fn the_report_refuses_what_is_mostly_noise_and_names_a_lost_module() {
        let module = |product| Survival {
            product,
            intended: 1.0,
            actual: 1.0,
        };
        let report = |q, k| SurvivalReport {
            bits: 8,
            modules: [
                ("model.layers.0.self_attn.q_proj".to_string(), module(q)),
                ("model.layers.10.self_attn.k_proj".to_string(), module(k)),
            ]
            .into(),
        };
        assert_eq!(report(0.99, 0.95).refusal(), None);
        let refusal = report(0.9, 0.8).refusal().unwrap();
        assert!(refusal.contains("0.850 over all modules"), "{refusal}");
        let mut lost = report(1.0, 0.4);
        lost.modules.values_mut().next().unwrap().intended = 100.0;
        lost.modules.values_mut().next().unwrap().actual = 100.0;
        lost.modules.values_mut().next().unwrap().product = 100.0;
        let refusal = lost.refusal().unwrap();
        assert!(refusal.contains("layers.10.self_attn.k_proj"), "{refusal}");
        let lines = report(0.99, 0.95).lines();
        assert!(
            lines[1].contains("q_proj") && lines[3].contains("0.9500"),
            "{lines:?}"
        );
        assert_eq!(Survival::default().cosine(), 1.0);
    }
}
