//! Makes one adapter from several, with weights, as PEFT's `add_weighted_adapter`.

use std::collections::BTreeSet;

use clap::ValueEnum;
use lora_core::{Bias, LoraConfig, LoraError, ModuleSelector, TargetModules, best_factors};

use super::{AdapterConfig, AdapterError, AdapterPair, AdapterTensors};

/// How adapters are combined. The names are PEFT's `combination_type`s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Combination {
    /// Exactly the weighted sum of the adapters' updates; the ranks add up
    Cat,
    /// Weighted sums of the factors: PEFT's rough approximation, with the adapters' common rank
    Linear,
    /// The best approximation of the weighted sum with a given rank
    Svd,
}

/// An adapter with its weight.
#[derive(Debug, Clone)]
pub struct Weighted {
    /// Its name in messages.
    pub name: String,
    /// Its settings.
    pub config: AdapterConfig,
    /// Its tensors.
    pub tensors: AdapterTensors,
    /// Its weight, of any sign.
    pub weight: f64,
}

/// Why adapters cannot be combined.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The messages are the documentation.
pub enum CombineError {
    #[error("no adapter is named; write --adapter DIR=WEIGHT for each")]
    Nothing,
    #[error("{name}: the weight is {weight}, which is not a finite number")]
    Weight { name: String, weight: f64 },
    #[error(
        "{name}: {field} is set, and its update is not a low-rank product that could be weighted; merge this adapter into its base model instead"
    )]
    Field { name: String, field: &'static str },
    #[error(
        "{name}: peft_type is {peft_type}, whose file does not hold the matrices of each module; merge this adapter into its base model instead"
    )]
    Shared {
        name: String,
        peft_type: &'static str,
    },
    #[error("{name}: it replaces {tensor}, which cannot be weighted")]
    Whole { name: String, tensor: String },
    #[error(
        "{name}: {module} has {got} inputs and outputs, but {expected} in an earlier adapter: they are for different models"
    )]
    Widths {
        name: String,
        module: String,
        expected: String,
        got: String,
    },
    #[error(
        "{name}: {module} has rank {got}, but {expected} in an earlier adapter; \"linear\" needs equal ranks: use \"cat\" or \"svd\""
    )]
    Rank {
        name: String,
        module: String,
        expected: usize,
        got: usize,
    },
    #[error(
        "the svd rank is {rank}; it must be at least 1 and at most {most}, the sum of the ranks"
    )]
    SvdRank { rank: usize, most: usize },
    #[error("{name}: {source}")]
    Adapter { name: String, source: AdapterError },
    #[error("{name}: {source}")]
    Lora { name: String, source: LoraError },
}

/// A module's factors, and the number to multiply them by.
struct Part<'a> {
    pair: &'a AdapterPair,
    /// Weight times scale.
    weight: f64,
}

/// Returns the adapter whose modules add `Σ weight·γ·A·B` of the given ones, exactly or approximately,
/// depending on `combination`. Its scale is 1.
///
/// `svd_rank` is for [`Combination::Svd`]. `None` means the largest rank.
///
/// # Errors
///
/// [`CombineError`] for adapters that are not plain LoRAs, or not for the same model.
pub fn combine(
    adapters: &[Weighted],
    combination: Combination,
    svd_rank: Option<usize>,
) -> Result<(AdapterConfig, AdapterTensors), CombineError> {
    let first = adapters.first().ok_or(CombineError::Nothing)?;
    let mut selectors: Vec<ModuleSelector> = Vec::new();
    for adapter in adapters {
        selectors.push(check(adapter)?);
    }
    let modules: BTreeSet<&String> = adapters
        .iter()
        .flat_map(|a| a.tensors.modules.keys())
        .collect();
    let largest_rank = |adapter: &Weighted| {
        let patterns = adapter.config.lora.rank_pattern.iter().map(|(_, r)| *r);
        patterns.chain([adapter.config.lora.r]).max().unwrap_or(0)
    };
    let sum: usize = adapters.iter().map(largest_rank).sum();
    let largest = adapters.iter().map(largest_rank).max().unwrap_or(0);
    let rank = match (combination, svd_rank) {
        (Combination::Cat, _) => sum,
        (Combination::Linear, _) | (Combination::Svd, None) => largest,
        (Combination::Svd, Some(rank)) if (1..=sum).contains(&rank) => rank,
        (Combination::Svd, Some(rank)) => return Err(CombineError::SvdRank { rank, most: sum }),
    };
    let mut tensors = AdapterTensors::default();
    for module in modules {
        let mut parts: Vec<Part> = Vec::new();
        for (adapter, selector) in adapters.iter().zip(&selectors) {
            let Some(pair) = adapter.tensors.modules.get(module) else {
                continue;
            };
            if let Some(before) = parts.first().map(|part| part.pair) {
                fits(adapter, module, before, pair, combination)?;
            }
            parts.push(Part {
                pair,
                weight: adapter.weight * selector.scale(module),
            });
        }
        let pair = match combination {
            Combination::Cat => concatenated(&parts, rank),
            Combination::Linear => added(&parts, rank),
            Combination::Svd => decomposed(&parts, rank),
        };
        tensors.modules.insert(module.clone(), pair);
    }
    let lora = LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        lora_dropout: first.config.lora.lora_dropout,
        use_rslora: false,
        target_modules: targets(adapters, &tensors),
        ..LoraConfig::default()
    };
    let config = AdapterConfig {
        lora,
        base_model_name_or_path: first.config.base_model_name_or_path.clone(),
    };
    Ok((config, tensors))
}

fn check(adapter: &Weighted) -> Result<ModuleSelector, CombineError> {
    let Weighted {
        name,
        config,
        tensors,
        weight,
    } = adapter;
    if !weight.is_finite() {
        return Err(CombineError::Weight {
            name: name.clone(),
            weight: *weight,
        });
    }
    let lora = &config.lora;
    let facts = lora.method.facts();
    if facts.shared.is_some() {
        return Err(CombineError::Shared {
            name: name.clone(),
            peft_type: facts.peft_type,
        });
    }
    let fields = [
        (facts.flag.unwrap_or(facts.name), !facts.vectors.is_empty()),
        ("lora_bias", lora.lora_bias),
        ("bias", lora.bias != Bias::None),
        ("modules_to_save", !lora.modules_to_save.is_empty()),
        (
            "trainable_token_indices",
            !lora.trainable_token_indices.is_empty(),
        ),
    ];
    if let Some((field, _)) = fields.into_iter().find(|(_, set)| *set) {
        return Err(CombineError::Field {
            name: name.clone(),
            field,
        });
    }
    // An embedding that PEFT saved beside its adapter is the base model's. Any other was trained.
    let changed = |name: &&String| {
        let module = name
            .rsplit_once('.')
            .map_or(name.as_str(), |(module, _)| module);
        !tensors.modules.contains_key(module)
    };
    if let Some(tensor) = tensors.whole.keys().find(changed) {
        return Err(CombineError::Whole {
            name: name.clone(),
            tensor: tensor.clone(),
        });
    }
    if tensors.modules.is_empty() {
        return Err(CombineError::Adapter {
            name: name.clone(),
            source: AdapterError::Missing {
                name: "lora_A".into(),
            },
        });
    }
    let selector = lora.selector();
    selector.map_err(|source| CombineError::Lora {
        name: name.clone(),
        source,
    })
}

fn fits(
    adapter: &Weighted,
    module: &str,
    before: &AdapterPair,
    pair: &AdapterPair,
    combination: Combination,
) -> Result<(), CombineError> {
    let name = adapter.name.clone();
    let module = module.to_string();
    let widths = |pair: &AdapterPair| format!("{} and {}", pair.d_in, pair.d_out);
    if (before.d_in, before.d_out) != (pair.d_in, pair.d_out) {
        return Err(CombineError::Widths {
            name,
            module,
            expected: widths(before),
            got: widths(pair),
        });
    }
    if combination == Combination::Linear && before.r != pair.r {
        Err(CombineError::Rank {
            name,
            module,
            expected: before.r,
            got: pair.r,
        })
    } else {
        Ok(())
    }
}

/// The factors side by side, with the weights in A. Zeros fill up to `rank`, as in PEFT.
fn concatenated(parts: &[Part], rank: usize) -> AdapterPair {
    let (d_in, d_out) = (parts[0].pair.d_in, parts[0].pair.d_out);
    let mut a = vec![0.0; d_in * rank];
    let mut b = vec![0.0; rank * d_out];
    let mut start = 0;
    for Part { pair, weight } in parts {
        for (row, line) in pair.a.chunks_exact(pair.r).enumerate() {
            for (column, value) in line.iter().enumerate() {
                a[row * rank + start + column] = (f64::from(*value) * weight) as f32;
            }
        }
        b[start * d_out..][..pair.b.len()].copy_from_slice(&pair.b);
        start += pair.r;
    }
    AdapterPair::new(d_in, rank, d_out, a, b)
}

/// Each factor is the sum of the adapters' factors times the root of the weight. The sign of a negative weight
/// goes to A.
fn added(parts: &[Part], rank: usize) -> AdapterPair {
    let (d_in, d_out) = (parts[0].pair.d_in, parts[0].pair.d_out);
    let mut a = vec![0.0; d_in * rank];
    let mut b = vec![0.0; rank * d_out];
    for Part { pair, weight } in parts {
        let root = weight.abs().sqrt();
        for (row, line) in pair.a.chunks_exact(pair.r).enumerate() {
            for (column, value) in line.iter().enumerate() {
                a[row * rank + column] += (f64::from(*value) * root * weight.signum()) as f32;
            }
        }
        for (sum, value) in b.iter_mut().zip(&pair.b) {
            *sum += (f64::from(*value) * root) as f32;
        }
    }
    AdapterPair::new(d_in, rank, d_out, a, b)
}

fn decomposed(parts: &[Part], rank: usize) -> AdapterPair {
    let all: usize = parts.iter().map(|part| part.pair.r).sum();
    let pair = concatenated(parts, all);
    let widen = |values: &[f32]| {
        values
            .iter()
            .map(|value| f64::from(*value))
            .collect::<Vec<_>>()
    };
    let shape = [pair.d_in, all, pair.d_out];
    let (a, b) = best_factors(&widen(&pair.a), &widen(&pair.b), shape, rank.min(all));
    if rank <= all {
        AdapterPair::new(pair.d_in, rank, pair.d_out, a, b)
    } else {
        let pair = AdapterPair::new(pair.d_in, all, pair.d_out, a, b);
        let part = Part {
            pair: &pair,
            weight: 1.0,
        };
        concatenated(&[part], rank)
    }
}

/// The union of the names that the adapters list. If one of them selects modules in another way, every module by
/// its full name.
fn targets(adapters: &[Weighted], tensors: &AdapterTensors) -> TargetModules {
    let listed: Option<BTreeSet<&String>> = adapters
        .iter()
        .map(|adapter| {
            let lora = &adapter.config.lora;
            let everywhere = lora.layers_to_transform.is_none() && lora.exclude_modules.is_none();
            match &lora.target_modules {
                TargetModules::Names(names) if everywhere => Some(names.iter()),
                _ => None,
            }
        })
        .collect::<Option<Vec<_>>>()
        .map(|lists| lists.into_iter().flatten().collect());
    let names: Vec<String> = match listed {
        Some(names) => names.into_iter().cloned().collect(),
        None => tensors.modules.keys().cloned().collect(),
    };
    TargetModules::Names(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::CounterRng;

    const Q: &str = "model.layers.0.self_attn.q_proj";
    const K: &str = "model.layers.0.self_attn.k_proj";

    /// An adapter with random factors on these modules, 6 inputs and 5 outputs.
    fn adapter(seed: u64, r: usize, modules: &[&str], weight: f64) -> Weighted {
        let mut rng = CounterRng::new(seed);
        let mut random = |count| (0..count).map(|_| rng.normal() as f32).collect();
        let mut tensors = AdapterTensors::default();
        for module in modules {
            let pair = AdapterPair::new(6, r, 5, random(6 * r), random(r * 5));
            tensors.modules.insert(module.to_string(), pair);
        }
        let names = modules
            .iter()
            .map(|name| name.rsplit('.').next().unwrap().to_string());
        Weighted {
            name: format!("adapter {seed}"),
            config: AdapterConfig {
                lora: LoraConfig {
                    r,
                    lora_alpha: 3.0,
                    target_modules: TargetModules::Names(names.collect()),
                    ..LoraConfig::default()
                },
                base_model_name_or_path: None,
            },
            tensors,
            weight,
        }
    }

    /// γ·A·B times the weight, `[6, 5]`.
    fn delta(adapter: &Weighted, module: &str) -> Vec<f64> {
        let mut sum = vec![0.0; 30];
        let Some(pair) = adapter.tensors.modules.get(module) else {
            return sum;
        };
        let scale = adapter.config.lora.selector().unwrap().scale(module) * adapter.weight;
        for (i, sum) in sum.iter_mut().enumerate() {
            let (row, column) = (i / 5, i % 5);
            let products = (0..pair.r)
                .map(|k| f64::from(pair.a[row * pair.r + k]) * f64::from(pair.b[k * 5 + column]));
            *sum = scale * products.sum::<f64>();
        }
        sum
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f64::max)
    }

    fn result(adapters: &[Weighted], combination: Combination, rank: Option<usize>) -> Weighted {
        let (config, tensors) = combine(adapters, combination, rank).unwrap();
        Weighted {
            name: "combined".into(),
            config,
            tensors,
            weight: 1.0,
        }
    }

    #[test]
    fn concatenation_adds_exactly_what_the_adapters_add_and_so_does_a_full_decomposition() {
        let mut patterned = adapter(2, 3, &[K, Q], -0.75);
        patterned.config.lora.alpha_pattern = vec![("k_proj".into(), 9.0)];
        patterned.config.lora.use_rslora = true;
        let adapters = [adapter(1, 2, &[Q], 0.5), patterned];
        for (combination, rank) in [(Combination::Cat, None), (Combination::Svd, Some(5))] {
            let combined = result(&adapters, combination, rank);
            assert_eq!(combined.config.lora.r, 5);
            assert_eq!(combined.config.lora.scale(), 1.0);
            for module in [Q, K] {
                let sum: Vec<f64> = delta(&adapters[0], module)
                    .iter()
                    .zip(delta(&adapters[1], module))
                    .map(|(a, b)| a + b)
                    .collect();
                // Factors are rounded to f32.
                let difference = distance(&delta(&combined, module), &sum);
                assert!(difference < 1e-5, "{combination:?} {module}: {difference}");
            }
        }
    }

    #[test]
    fn linear_adds_factors_with_the_weights_roots() {
        let adapters = [adapter(1, 2, &[Q], 2.0), adapter(2, 2, &[Q], -0.5)];
        let combined = result(&adapters, Combination::Linear, None);
        let pair = &combined.tensors.modules[Q];
        let [one, two] = [0, 1].map(|i| &adapters[i].tensors.modules[Q]);
        // Scale 1.5: √3 and √0.75, the sign of the second on A.
        let (first, second) = (3f32.sqrt(), 0.75f32.sqrt());
        for i in 0..12 {
            let expected = first * one.a[i] - second * two.a[i];
            assert!((pair.a[i] - expected).abs() < 1e-6);
        }
        for i in 0..10 {
            let expected = first * one.b[i] + second * two.b[i];
            assert!((pair.b[i] - expected).abs() < 1e-6);
        }
        let different = [adapter(1, 2, &[Q], 1.0), adapter(2, 3, &[Q], 1.0)];
        let error = combine(&different, Combination::Linear, None).unwrap_err();
        assert!(matches!(error, CombineError::Rank { .. }), "{error}");
    }

    #[test]
    fn what_cannot_be_combined_is_named() {
        let error = |change: fn(&mut Weighted)| {
            let mut second = adapter(2, 2, &[Q], 1.0);
            change(&mut second);
            let adapters = [adapter(1, 2, &[Q], 1.0), second];
            combine(&adapters, Combination::Cat, None)
                .unwrap_err()
                .to_string()
        };
        for (field, change) in [
            (
                "use_dora",
                (|a| a.config.lora.method = lora_core::Method::Dora) as fn(&mut Weighted),
            ),
            ("lora_bias", |a| a.config.lora.lora_bias = true),
            ("bias", |a| a.config.lora.bias = Bias::All),
            ("modules_to_save", |a| {
                a.config.lora.modules_to_save = vec!["norm".into()]
            }),
            ("trainable_token_indices", |a| {
                a.config.lora.trainable_token_indices = vec![("embed_tokens".into(), vec![1])]
            }),
        ] {
            let error = error(change);
            assert!(
                error.contains(field) && error.contains("adapter 2"),
                "{error}"
            );
        }
        assert!(error(|a| a.weight = f64::NAN).contains("NaN"));
        let wide = error(|a| {
            let pair = AdapterPair::new(7, 2, 5, vec![0.0; 14], vec![0.0; 10]);
            a.tensors.modules.insert(Q.into(), pair);
        });
        assert!(
            wide.contains("7 and 5") && wide.contains("6 and 5"),
            "{wide}"
        );
        let adapters = [adapter(1, 2, &[Q], 1.0)];
        let error = combine(&adapters, Combination::Svd, Some(3)).unwrap_err();
        assert!(
            matches!(error, CombineError::SvdRank { rank: 3, most: 2 }),
            "{error}"
        );
        assert!(matches!(
            combine(&[], Combination::Cat, None),
            Err(CombineError::Nothing)
        ));
    }

    #[test]
    fn weights_beyond_the_range_of_f32_make_an_adapter_that_is_not_written() {
        for combination in [Combination::Cat, Combination::Linear, Combination::Svd] {
            let adapters = [adapter(1, 2, &[Q], 1e300), adapter(2, 2, &[Q], 1.0)];
            let written = result(&adapters, combination, None).tensors.to_bytes();
            let error = written.expect_err("it is not finite");
            assert!(matches!(error, AdapterError::NotFinite { .. }), "{error}");
        }
    }

    #[test]
    fn modules_are_listed_in_full_where_names_alone_would_select_more() {
        let mut regex = adapter(1, 2, &[Q], 1.0);
        regex.config.lora.target_modules = TargetModules::Regex(".*q_proj".into());
        let combined = result(&[regex, adapter(2, 2, &[K], 1.0)], Combination::Cat, None);
        let full = TargetModules::Names(vec![K.into(), Q.into()]);
        assert_eq!(combined.config.lora.target_modules, full);
        let both = [adapter(1, 2, &[Q], 1.0), adapter(2, 2, &[K], 1.0)];
        let names = TargetModules::Names(vec!["k_proj".into(), "q_proj".into()]);
        assert_eq!(
            result(&both, Combination::Cat, None)
                .config
                .lora
                .target_modules,
            names
        );
    }
}
