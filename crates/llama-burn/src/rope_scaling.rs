//! How rotary frequencies are scaled for contexts longer than in a model's training: transformers'
//! `modeling_rope_utils`, with the settings in every form of versions 4 and 5.

use std::f64::consts::TAU;

use serde_json::{Map, Value};

use crate::ConfigError;
use crate::keys::{Keys, invalid};

/// The largest context that is accepted, the limit of every count in a `config.json`.
const LONGEST: f64 = (1u64 << 28) as f64;

/// How rotary frequencies are scaled for long contexts (transformers' `rope_type`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not scaled.
    Default,
    /// Every frequency divided by `factor` (position interpolation).
    Linear {
        /// The ratio of the new context to the original one.
        factor: f64,
    },
    /// A larger base for sequences longer than `max_position_embeddings` ("NTK-aware" scaling). The
    /// frequencies depend on the sequence's length; up to the limit they are those of [`Default`](Self::Default).
    Dynamic {
        /// How fast the base grows with the length.
        factor: f64,
    },
    /// YaRN (Peng et al., 2023, <https://arxiv.org/abs/2309.00071>): slow frequencies divided by `factor`, fast ones
    /// kept, a ramp between; cosines and sines are scaled.
    Yarn(Yarn),
    /// Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// The factor by which long wavelengths are stretched.
        factor: f64,
        /// Wavelengths longer than the original context over this are stretched.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original context over this are kept.
        high_freq_factor: f64,
        /// The context of the model's original training.
        original_max_position_embeddings: f64,
    },
}

/// YaRN's settings, by transformers' names.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// The divisor of slow frequencies.
    pub factor: f64,
    /// The context of the model's original training.
    pub original_max_position_embeddings: f64,
    /// The factor on cosines and sines.
    pub attention_factor: f64,
    /// Dimensions with more rotations than this within the original context are kept.
    pub beta_fast: f64,
    /// Dimensions with fewer rotations than this within the original context are divided.
    pub beta_slow: f64,
    /// Whether the ramp's ends are rounded outwards to whole dimensions.
    pub truncate: bool,
}

/// 0.1 · mscale · ln(factor) + 1: YaRN's factor on attention for a longer context.
pub(crate) fn sharpening(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

impl Yarn {
    /// Where the ramp begins and ends, in pairs of dimensions.
    pub(crate) fn ramp(&self, theta: f64, head_dim: usize) -> [f64; 2] {
        let dim = head_dim as f64;
        let context = self.original_max_position_embeddings;
        // The pair with this many rotations within the original context.
        let pair = |turns: f64| dim * (context / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (low, high) = (pair(self.beta_fast), pair(self.beta_slow));
        let (low, high) = if self.truncate {
            (low.floor(), high.ceil())
        } else {
            (low, high)
        };
        [low.max(0.0), high.min(dim - 1.0)]
    }

    fn frequencies(&self, theta: f64, head_dim: usize) -> Vec<f64> {
        let [low, mut high] = self.ramp(theta, head_dim);
        if low == high {
            high += 0.001;
        }
        let frequencies = plain(theta, head_dim).into_iter().enumerate();
        frequencies
            .map(|(pair, frequency)| {
                let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / self.factor * divided + frequency * (1.0 - divided)
            })
            .collect()
    }
}

/// The unscaled frequencies θ^(−2i/d), one per pair of dimensions.
pub(crate) fn plain(theta: f64, head_dim: usize) -> Vec<f64> {
    let exponents = (0..head_dim / 2).map(|pair| (2 * pair) as f64 / head_dim as f64);
    exponents.map(|exponent| theta.powf(-exponent)).collect()
}

impl RopeScaling {
    /// The angles per position, `head_dim / 2` values, of a sequence of `length` tokens in a model of
    /// `max_position_embeddings`. Only [`Dynamic`](Self::Dynamic) depends on the lengths.
    pub(crate) fn frequencies(
        self,
        theta: f64,
        head_dim: usize,
        length: usize,
        max_position_embeddings: usize,
    ) -> Vec<f64> {
        match self {
            Self::Default => plain(theta, head_dim),
            Self::Linear { factor } => {
                let frequencies = plain(theta, head_dim).into_iter();
                frequencies.map(|frequency| frequency / factor).collect()
            }
            Self::Dynamic { factor } => {
                let dim = head_dim as f64;
                let times = length.max(max_position_embeddings) as f64;
                let times = factor * times / max_position_embeddings as f64 - (factor - 1.0);
                plain(theta * times.powf(dim / (dim - 2.0)), head_dim)
            }
            Self::Yarn(yarn) => yarn.frequencies(theta, head_dim),
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: context,
            } => {
                let scaled = |frequency: f64| {
                    let wavelength = TAU / frequency;
                    if wavelength < context / high {
                        frequency
                    } else if wavelength > context / low {
                        frequency / factor
                    } else {
                        let kept = (context / wavelength - low) / (high - low);
                        (1.0 - kept) * frequency / factor + kept * frequency
                    }
                };
                plain(theta, head_dim).into_iter().map(scaled).collect()
            }
        }
    }

    /// The factor on cosines and sines.
    pub(crate) fn attention_factor(self) -> f64 {
        match self {
            Self::Yarn(yarn) => yarn.attention_factor,
            _ => 1.0,
        }
    }

    /// How many positions a model of `max_position_embeddings` has.
    ///
    /// For `linear` and `dynamic`, transformers' configurations state the original context in
    /// `max_position_embeddings`, and the context is that times the factor. For `yarn` it is the original context times
    /// the factor, unless `max_position_embeddings` is larger. Llama 3.1's configurations state the context itself.
    pub(crate) fn positions(self, max_position_embeddings: usize) -> usize {
        let stretched = match self {
            Self::Default | Self::Llama3 { .. } => 0.0,
            Self::Linear { factor } | Self::Dynamic { factor } => {
                max_position_embeddings as f64 * factor
            }
            Self::Yarn(yarn) => yarn.original_max_position_embeddings * yarn.factor,
        };
        // The conversion saturates.
        max_position_embeddings.max(stretched.min(LONGEST) as usize)
    }
}

/// Reads the base and the scaling of a model with heads of `head_dim` and `max_position_embeddings`.
///
/// As in transformers 5: `rope_scaling` takes precedence over `rope_parameters`, and the base comes from the object
/// that was used. The original context comes from the configuration itself, else from the settings, else it is
/// `max_position_embeddings`. Version 4 takes YaRN's factor from the ratio of the two contexts, version 5 from
/// `factor`.
///
/// # Errors
///
/// Names the key, its value and what is supported.
pub(crate) fn read(
    keys: &Keys,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<(f64, RopeScaling), ConfigError> {
    let not_empty =
        |object: Option<&'_ Map<String, Value>>| object.is_some_and(|it| !it.is_empty());
    let parameters = match keys.object("rope_scaling")? {
        scaling if not_empty(scaling) => scaling,
        _ => keys.object("rope_parameters")?,
    };
    let in_parameters = match &parameters {
        Some(parameters) => Keys(parameters).positive("rope_theta")?,
        None => None,
    };
    let theta = match in_parameters {
        Some(theta) => theta,
        None => keys.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    let Some(settings) = parameters else {
        return Ok((theta, RopeScaling::Default));
    };
    let settings = Keys(settings);
    let kind = ["rope_type", "type"]
        .iter()
        .find_map(|key| settings.get(key));
    let kind = match kind {
        None => "default",
        Some(Value::String(kind)) => kind,
        Some(other) => return Err(invalid("rope_type", other, "expected a name")),
    };
    if kind == "default" {
        return Ok((theta, RopeScaling::Default));
    }
    let need = |key: &'static str| settings.positive(key)?.ok_or(ConfigError::Missing(key));
    let original = || {
        const KEY: &str = "original_max_position_embeddings";
        Ok::<_, ConfigError>(match (keys.positive(KEY)?, settings.positive(KEY)?) {
            (Some(context), _) | (None, Some(context)) => context,
            (None, None) => max_position_embeddings as f64,
        })
    };
    let scaling = match kind {
        "linear" => RopeScaling::Linear {
            factor: need("factor")?,
        },
        "dynamic" if head_dim == 2 => {
            let expected = "heads of 2 dimensions have no frequency that \"dynamic\" could change";
            return Err(invalid("rope_type", kind, expected));
        }
        "dynamic" => RopeScaling::Dynamic {
            factor: need("factor")?,
        },
        "yarn" if theta <= 1.0 => {
            return Err(invalid(
                "rope_theta",
                theta,
                "\"yarn\" needs a base above 1",
            ));
        }
        "yarn" => {
            // A factor of null means the ratio of the contexts; a missing factor is an error.
            let factor = match settings.0.get("factor") {
                Some(Value::Null) => max_position_embeddings as f64 / original()?,
                _ => need("factor")?,
            };
            RopeScaling::Yarn(yarn(&settings, factor, original()?)?)
        }
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings: original()?,
        },
        other => {
            let expected = "supported are \"default\", \"linear\", \"dynamic\", \"yarn\" and \"llama3\"; \
                            choose a model with one of these";
            return Err(invalid("rope_type", other, expected));
        }
    };
    Ok((theta, scaling))
}

fn yarn(settings: &Keys, factor: f64, original: f64) -> Result<Yarn, ConfigError> {
    // Python's `or`: 0 counts as absent.
    let unless_zero = |key: &'static str| match settings.get(key).and_then(Value::as_f64) {
        Some(0.0) => Ok(None),
        _ => settings.positive(key),
    };
    let (mscale, all_dim) = (unless_zero("mscale")?, unless_zero("mscale_all_dim")?);
    let attention_factor = match (settings.positive("attention_factor")?, mscale, all_dim) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all_dim)) => {
            sharpening(factor, mscale) / sharpening(factor, all_dim)
        }
        _ => sharpening(factor, 1.0),
    };
    let truncate = match settings.0.get("truncate") {
        None => true,
        Some(Value::Bool(truncate)) => *truncate,
        Some(Value::Null) => false,
        Some(other) => return Err(invalid("truncate", other, "expected true or false")),
    };
    Ok(Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor,
        beta_fast: unless_zero("beta_fast")?.unwrap_or(32.0),
        beta_slow: unless_zero("beta_slow")?.unwrap_or(1.0),
        truncate,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(config: Value) -> Result<(f64, RopeScaling), ConfigError> {
        let Value::Object(object) = config else {
            unreachable!()
        };
        read(&Keys(&object), 64, 4096)
    }

    fn assert_close(one: f64, other: f64) {
        assert!((one / other - 1.0).abs() < 1e-12, "{one} {other}");
    }

    #[test]
    fn dynamic_frequencies_are_unscaled_up_to_the_limit_and_then_stretch_the_slowest_by_the_factor()
    {
        let (theta, dim, limit, factor) = (10_000.0, 64, 4096, 4.0);
        let dynamic = RopeScaling::Dynamic { factor };
        let own = plain(theta, dim);
        for length in [1, 100, limit] {
            assert_eq!(dynamic.frequencies(theta, dim, length, limit), own);
        }
        // base · t^(d/(d−2)): the slowest of θ^(−(d−2)/d) is divided by t = factor · length / limit − (factor − 1).
        for (length, times) in [(2 * limit, 5.0), (3 * limit, 9.0)] {
            let longer = dynamic.frequencies(theta, dim, length, limit);
            assert_eq!(longer[0], 1.0);
            assert_close(longer[31], own[31] / times);
            assert!(
                longer
                    .iter()
                    .zip(&own)
                    .skip(1)
                    .all(|(longer, own)| longer < own)
            );
        }
    }

    #[test]
    fn yarn_keeps_fast_frequencies_and_divides_slow_ones() {
        let (theta, dim) = (10_000.0, 128);
        let settings =
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": false}});
        let (_, RopeScaling::Yarn(yarn)) = parse(settings).unwrap() else {
            panic!("not yarn");
        };
        assert_eq!(yarn.original_max_position_embeddings, 4096.0);
        let (own, scaled) = (plain(theta, dim), yarn.frequencies(theta, dim));
        for (own, scaled) in own.iter().zip(&scaled) {
            let turns = own * 4096.0 / TAU;
            if turns > 32.0 {
                assert_eq!(scaled, own);
            } else if turns < 1.0 {
                assert_close(own / 8.0, *scaled);
            } else {
                // The ramp is linear in the pair's index, and so in the logarithm of the rotations.
                let kept = turns.ln() / 32f64.ln();
                assert_close(*scaled, own * kept + own / 8.0 * (1.0 - kept));
            }
        }
        let [low, high] = yarn.ramp(theta, dim);
        let whole = Yarn {
            truncate: true,
            ..yarn
        };
        assert_eq!(whole.ramp(theta, dim), [low.floor(), high.ceil()]);
        assert!(low.fract() > 0.0 && high.fract() > 0.0);
    }

    #[test]
    fn yarns_attention_factor_is_configured_or_follows_from_the_factor() {
        let of = |rest: Value| {
            let mut settings = json!({"type": "yarn", "factor": 1f64.exp()});
            let (Value::Object(all), Value::Object(rest)) = (&mut settings, rest) else {
                unreachable!()
            };
            all.extend(rest);
            let (_, scaling) = parse(json!({"rope_parameters": settings})).unwrap();
            scaling.attention_factor()
        };
        // ln e = 1.
        assert_close(of(json!({})), 1.1);
        assert_close(
            of(json!({"attention_factor": 0.7, "mscale": 2, "mscale_all_dim": 1})),
            0.7,
        );
        assert_close(of(json!({"mscale": 2, "mscale_all_dim": 1})), 1.2 / 1.1);
        assert_close(of(json!({"mscale": 2, "mscale_all_dim": 0})), 1.1);
        assert_close(of(json!({"mscale": 2})), 1.1);
    }

    #[test]
    fn the_original_context_and_the_factor_are_read_where_transformers_reads_them() {
        let yarn = |config: Value| match parse(config).unwrap() {
            (_, RopeScaling::Yarn(yarn)) => [yarn.factor, yarn.original_max_position_embeddings],
            other => panic!("{other:?}"),
        };
        let inside =
            json!({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 1024});
        assert_eq!(yarn(json!({"rope_parameters": inside})), [2.0, 1024.0]);
        assert_eq!(
            yarn(json!({"rope_parameters": inside, "original_max_position_embeddings": 512})),
            [2.0, 512.0]
        );
        let implied =
            json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 1024});
        assert_eq!(yarn(json!({"rope_scaling": implied})), [4.0, 1024.0]);
    }

    #[test]
    fn a_stretched_context_has_more_positions() {
        let positions = |settings: Value| {
            let (_, scaling) = parse(json!({"rope_scaling": settings})).unwrap();
            scaling.positions(4096)
        };
        assert_eq!(positions(json!({"type": "default"})), 4096);
        for kind in ["linear", "dynamic", "yarn"] {
            assert_eq!(
                positions(json!({"type": kind, "factor": 2.5})),
                10_240,
                "{kind}"
            );
        }
        // `max_position_embeddings` is the stretched context already.
        let yarn = json!({"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024});
        assert_eq!(positions(yarn), 4096);
        assert_eq!(
            positions(json!({"type": "linear", "factor": 1e300})),
            1 << 28
        );
    }

    #[test]
    fn invalid_settings_are_named() {
        let cases = [
            (json!({"rope_type": "longrope", "factor": 2}), "longrope"),
            (json!({"rope_type": 3}), "rope_type is 3"),
            (json!({"rope_type": "yarn"}), "\"factor\""),
            (json!({"rope_type": "dynamic"}), "\"factor\""),
            (
                json!({"rope_type": "yarn", "factor": 2, "truncate": 1}),
                "truncate is 1",
            ),
            (
                json!({"rope_type": "yarn", "factor": 2, "beta_fast": -1}),
                "beta_fast is -1",
            ),
            (
                json!({"rope_type": "yarn", "factor": 2, "rope_theta": 1}),
                "rope_theta is 1",
            ),
        ];
        for (settings, expected) in cases {
            let message = parse(json!({"rope_scaling": settings}));
            let message = message.unwrap_err().to_string();
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
    }
}
