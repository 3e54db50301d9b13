//! Methods whose modules share their frozen matrices: the matrices in PEFT's file, and what they are for one module.

use std::borrow::Cow;

use kernels::cpu;
use llama_burn::LlamaConfig;
use lora_core::{Factors, LoraConfig};

use super::check::widths;
use super::tensors::Values;
use super::{AdapterError, AdapterPair, AdapterTensors, Floats};

const PREFIX: &str = "base_model.";

/// PEFT's name of a shared matrix; `end` is from [`Facts::shared`](lora_core::Facts::shared).
pub(super) fn shared_name(end: &str) -> String {
    format!("{PREFIX}{end}")
}

/// The frozen matrices that all modules of an adapter share.
#[derive(Debug, Clone, PartialEq)]
pub struct Shared {
    /// The ends of PEFT's names of A and B.
    pub names: [&'static str; 2],
    /// A and B, as wide as the widest module.
    pub factors: Factors,
}

impl Shared {
    /// The matrices of PEFT's file, where both are transposed.
    pub(super) fn from_file(
        names: [&'static str; 2],
        read: [Option<Values>; 2],
        r: usize,
    ) -> Result<Self, AdapterError> {
        let [a_name, b_name] = names.map(shared_name);
        let [a, b] = read;
        let missing = |name: &str| AdapterError::Missing { name: name.into() };
        let a = a.ok_or_else(|| missing(&a_name))?;
        let b = b.ok_or_else(|| missing(&b_name))?;
        let ([a_r, d_in], [d_out, b_r]) = (a.matrix(&a_name)?, b.matrix(&b_name)?);
        if a_r != r {
            return Err(AdapterError::shape(a_name, &[r, d_in], &[a_r, d_in]));
        }
        if b_r != r {
            return Err(AdapterError::shape(b_name, &[d_out, r], &[d_out, b_r]));
        }
        let factors = Factors {
            a: cpu::transposed(&a.values, [r, d_in]),
            b: cpu::transposed(&b.values, [d_out, r]),
            shape: [d_in, r, d_out],
        };
        Ok(Self { names, factors })
    }

    /// The tensors of PEFT's file.
    pub(super) fn entries(&self) -> [(String, Floats<'_>); 2] {
        let [a, b] = self.names.map(shared_name);
        let [d_in, r, d_out] = self.factors.shape;
        [
            (a, Floats::transposed(&self.factors.a, [d_in, r])),
            (b, Floats::transposed(&self.factors.b, [r, d_out])),
        ]
    }

    /// Checks that the matrices are at least as wide as a module.
    pub(super) fn check(&self, [d_in, d_out]: [usize; 2]) -> Result<(), AdapterError> {
        let [a, b] = self.names.map(shared_name);
        let [widest_in, r, widest_out] = self.factors.shape;
        if widest_in < d_in {
            return Err(AdapterError::shape(a, &[r, d_in], &[r, widest_in]));
        }
        if widest_out < d_out {
            return Err(AdapterError::shape(b, &[d_out, r], &[widest_out, r]));
        }
        Ok(())
    }

    /// Whether two sets of matrices are the same up to rounding.
    pub(super) fn is_near(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.factors, &other.factors);
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6);
        ours.shape == theirs.shape && near(&ours.a, &theirs.a) && near(&ours.b, &theirs.b)
    }

    /// Those that the settings make for these modules, `[d_in, d_out]` each; `None` for a method without shared matrices.
    pub(super) fn of_seed(
        lora: &LoraConfig,
        modules: impl IntoIterator<Item = [usize; 2]>,
    ) -> Option<Self> {
        let names = lora.method.facts().shared?;
        let factors = lora.shared_factors(modules)?;
        Some(Self { names, factors })
    }
}

impl AdapterTensors {
    /// Makes the shared matrices from the seed in the settings, if the adapter's file does not contain them. Nothing
    /// changes for a method without shared matrices.
    pub fn complete(&mut self, model: &LlamaConfig, lora: &LoraConfig) {
        if self.shared.is_none() {
            self.shared = self.made_for(model, lora);
        }
    }

    /// The matrices that the settings make for the adapted modules.
    pub(super) fn made_for(&self, model: &LlamaConfig, lora: &LoraConfig) -> Option<Shared> {
        let all = widths(model).into_iter();
        let adapted = all.filter(|(module, _)| self.modules.contains_key(module));
        Shared::of_seed(lora, adapted.map(|(_, widths)| widths))
    }

    /// The matrices A and B of a module, whether they are its own or made of shared ones and its vectors. `None` if the
    /// module is not adapted.
    pub fn low_rank(
        &self,
        model: &LlamaConfig,
        lora: &LoraConfig,
        module: &str,
    ) -> Option<Cow<'_, AdapterPair>> {
        let pair = self.modules.get(module)?;
        let vectors = lora.method.facts().vectors.iter();
        let vectors =
            vectors.map(|vector| pair.vectors.get(vector.name).map_or(&[][..], Vec::as_slice));
        let vectors: Vec<&[f32]> = vectors.collect();
        let of = |factors: Factors| {
            let [d_in, r, d_out] = factors.shape;
            AdapterPair::new(d_in, r, d_out, factors.a, factors.b)
        };
        if pair.has_matrices() && vectors.is_empty() {
            return Some(Cow::Borrowed(pair));
        }
        if pair.has_matrices() {
            let own = Factors {
                a: pair.a.clone(),
                b: pair.b.clone(),
                shape: [pair.d_in, pair.r, pair.d_out],
            };
            let made = lora
                .method
                .factors_of(&own, [pair.d_in, pair.d_out], &vectors);
            return Some(match made {
                Some(factors) => Cow::Owned(of(factors)),
                None => Cow::Borrowed(pair),
            });
        }
        let layer = widths(model).remove(module)?;
        let made = match self.shared {
            Some(_) => None,
            None => self.made_for(model, lora),
        };
        let shared = self.shared.as_ref().or(made.as_ref())?;
        let factors = lora.method.factors_of(&shared.factors, layer, &vectors)?;
        Some(Cow::Owned(of(factors)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{read_adapter, read_adapter_config, write_adapter};
    use std::path::{Path, PathBuf};

    const DOWN: &str = "model.layers.1.mlp.down_proj";
    const KEY: &str = "model.layers.0.self_attn.k_proj";

    /// An adapter of PEFT on all linear modules: r = 5, matrices of 24 inputs and 24 outputs.
    fn fixture(folder: &str) -> PathBuf {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/vera");
        root.join(folder)
    }

    fn read() -> (LlamaConfig, LoraConfig, AdapterTensors) {
        let model = LlamaConfig::from_file(&fixture("model")).unwrap();
        let (config, tensors) = read_adapter(&fixture("adapter")).unwrap();
        (model, config.lora, tensors)
    }

    #[test]
    fn an_adapter_reads_back_as_it_was_written_with_the_matrices_and_without() {
        let (mut config, tensors) = read_adapter(&fixture("adapter")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write_adapter(folder.path(), &config, &tensors).unwrap();
        let read_back = read_adapter(folder.path()).unwrap();
        assert_eq!(read_back, (config.clone(), tensors.clone()));
        config.lora.save_projection = false;
        write_adapter(folder.path(), &config, &tensors).unwrap();
        let (written, mut without) = read_adapter(folder.path()).unwrap();
        assert_eq!((&written, &without.shared), (&config, &None));
        without.complete(&read().0, &config.lora);
        assert_eq!(without, tensors);
    }

    #[test]
    fn the_matrices_of_a_module_are_parts_of_the_shared_ones_times_its_vectors() {
        let (model, lora, tensors) = read();
        let shared = &tensors.shared.as_ref().unwrap().factors;
        for (module, d_in, d_out) in [(DOWN, 24, 16), (KEY, 16, 8)] {
            let pair = tensors.low_rank(&model, &lora, module).unwrap();
            assert_eq!((pair.d_in, pair.r, pair.d_out), (d_in, 5, d_out));
            let vectors = &tensors.modules[module].vectors;
            let (b, d) = (&vectors["vera_lambda_b"], &vectors["vera_lambda_d"]);
            assert_eq!(pair.a, shared.a[..d_in * 5]);
            for (rank, d) in d.iter().enumerate() {
                for (output, b) in b.iter().enumerate() {
                    let expected = shared.b[rank * 24 + output] * d * b;
                    assert_eq!(pair.b[rank * d_out + output], expected);
                }
            }
            assert!(pair.vectors.is_empty());
        }
        assert!(tensors.low_rank(&model, &lora, "lm_head").is_none());
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let error = |change: fn(&mut LoraConfig, &mut AdapterTensors)| {
            let (model, mut lora, mut tensors) = read();
            tensors.check(&model, &lora).unwrap();
            change(&mut lora, &mut tensors);
            tensors.check(&model, &lora).unwrap_err().to_string()
        };
        let narrow = error(|_, tensors| {
            let shared = tensors.shared.as_mut().unwrap();
            shared.factors.shape[0] = 23;
        });
        assert!(
            narrow.contains("base_model.vera_A") && narrow.contains("23"),
            "{narrow}"
        );
        let vector = error(|_, tensors| {
            let pair = tensors.modules.get_mut(KEY).unwrap();
            pair.vectors.insert("vera_lambda_d", vec![0.0; 4]);
        });
        assert!(
            vector.contains("k_proj.vera_lambda_d") && vector.contains("[4]"),
            "{vector}"
        );
        let missing = error(|_, tensors| {
            let pair = tensors.modules.get_mut(KEY).unwrap();
            pair.vectors.remove("vera_lambda_b");
        });
        assert!(missing.contains("k_proj.vera_lambda_b"), "{missing}");
        let head = error(|lora, _| {
            lora.target_modules = lora_core::TargetModules::Names(vec!["lm_head".into()]);
        });
        assert!(
            head.contains("target_modules") && head.contains("lm_head"),
            "{head}"
        );
    }

    #[test]
    fn files_that_lack_a_matrix_or_have_one_too_many_are_refused() {
        let bytes = |change: fn(&mut AdapterTensors)| {
            let (_, _, mut tensors) = read();
            change(&mut tensors);
            tensors.to_bytes().unwrap()
        };
        let error = |bytes: &[u8], lora: &LoraConfig| {
            AdapterTensors::from_bytes(bytes, lora)
                .unwrap_err()
                .to_string()
        };
        let (_, lora, _) = read();
        let missing = error(&bytes(|tensors| tensors.shared = None), &lora);
        assert!(missing.contains("base_model.vera_A"), "{missing}");
        let extra = error(
            &bytes(|tensors| {
                let pair = AdapterPair::new(16, 5, 8, vec![0.0; 80], vec![0.0; 40]);
                tensors.modules.insert(KEY.into(), pair);
            }),
            &lora,
        );
        assert!(extra.contains("k_proj.lora_A"), "{extra}");
        let mut other = lora.clone();
        other.r = 4;
        let rank = error(&bytes(|_| ()), &other);
        assert!(rank.contains("[5]") || rank.contains("[5, 24]"), "{rank}");
        // A LoRA's settings do not explain these tensors.
        let plain = error(&bytes(|_| ()), &LoraConfig::default());
        assert!(plain.contains("unexpected"), "{plain}");
    }

    #[test]
    fn the_settings_have_pefts_fields_and_no_others() {
        let config = read_adapter_config(&fixture("adapter")).unwrap();
        let theirs = std::fs::read_to_string(fixture("adapter/adapter_config.json")).unwrap();
        let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
        let ours = config.to_json();
        for (field, value) in ours.as_object().unwrap() {
            assert_eq!(theirs.get(field), Some(value), "{field}");
        }
        let read = |field: &str, value: serde_json::Value| {
            let mut json = config.to_json();
            json[field] = value;
            crate::AdapterConfig::from_json(&json.to_string())
        };
        let dropped = read("vera_dropout", 0.25.into()).unwrap();
        assert_eq!(dropped.lora.lora_dropout, 0.25);
        let biased = read("bias", "vera_only".into()).unwrap();
        assert_eq!(biased.lora.bias, lora_core::Bias::LoraOnly);
        assert_eq!(biased.to_json()["bias"], "vera_only");
        for (field, value) in [
            ("use_dora", serde_json::json!(true)),
            ("lora_alpha", serde_json::json!(16)),
            ("lora_dropout", serde_json::json!(0.1)),
            ("rank_pattern", serde_json::json!({"q_proj": 2})),
            ("bias", serde_json::json!("lora_only")),
            ("projection_prng_key", serde_json::json!(-1)),
            ("peft_type", serde_json::json!("PVERA")),
        ] {
            let error = read(field, value).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }
}
