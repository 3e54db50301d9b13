//! Converts a model's configuration between GGUF's metadata and Hugging Face's `config.json`.

use serde_json::{Map, Number, Value as Json, json};

use super::{GgufError, Header, TensorKind, Value};
use crate::family::HOW_TO_ADD;
use crate::limited::clipped;
use crate::rope_scaling::{plain, sharpening};
use crate::{Family, LlamaConfig, RopeScaling, Yarn};

/// The tensor in which llama.cpp stores the divisors of the rotary frequencies for Llama 3.1's scaling.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The `config.json` object of the same model.
///
/// # Errors
///
/// Another architecture, or a key that is missing or has an invalid value.
pub fn config_json(file: &super::GgufFile) -> Result<Map<String, Json>, GgufError> {
    let header = &file.header;
    const ARCHITECTURE: &str = "general.architecture";
    let Some(architecture) = header.text(ARCHITECTURE)? else {
        return Err(header.wrong(ARCHITECTURE, "is missing; is this a model?"));
    };
    let Some(family) = Family::of_gguf(architecture) else {
        let reason = format!(
            "is {:?}; the architectures that can be read are {}; {HOW_TO_ADD} explains how to add one",
            clipped(architecture, 80),
            Family::gguf_architectures()
        );
        return Err(header.wrong(ARCHITECTURE, reason));
    };
    let own = Own {
        header,
        architecture,
    };
    if let Some(kind) = header.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(header.wrong("general.type", format!("is {kind:?}, not \"model\"")));
    }
    if own.count("expert_count")?.unwrap_or(0) > 0 {
        let reason = "is above 0; mixture-of-experts models are not supported";
        return Err(own.wrong("expert_count", reason));
    }
    let heads = own.need("attention.head_count")?;
    let kv_heads = match own.count("attention.head_count_kv")? {
        None => heads,
        Some(_) => own.need("attention.head_count_kv")?,
    };
    let hidden = own.need("embedding_length")?;
    let head_dim = match own.count("attention.key_length")? {
        Some(_) => own.need("attention.key_length")?,
        None => hidden / heads,
    };
    for (key, of) in [
        ("attention.value_length", "values"),
        ("rope.dimension_count", "rotated dimensions"),
    ] {
        if let Some(other) = own.count(key)?.filter(|other| *other != head_dim) {
            let reason = format!(
                "is {other}, and heads have {head_dim}; {of} of another size are not supported"
            );
            return Err(own.wrong(key, reason));
        }
    }
    let vocab = match header
        .tensors
        .get("token_embd.weight")
        .map(|place| &place.shape[..])
    {
        Some([rows, _]) => *rows as u64,
        _ => {
            return Err(wrong_tensor(
                header,
                "token_embd.weight",
                "is missing or not a matrix",
            ));
        }
    };
    const EPSILON: &str = "attention.layer_norm_rms_epsilon";
    const BASE: &str = "rope.freq_base";
    let eps = own.decimal(EPSILON)?;
    let eps = eps.ok_or_else(|| own.wrong(EPSILON, "is missing"))?;
    let theta = own.decimal(BASE)?.unwrap_or(10_000.0);
    let has = |name: &str| header.tensors.contains_key(name);
    let mut config = Map::new();
    let mut set = |key: &str, value: Json| config.insert(key.into(), value);
    set("architectures", json!([family.class]));
    set("model_type", json!(family.model_type));
    // What the tables are loaded in.
    set(
        "dtype",
        json!(match header.kind("token_embd.weight")? {
            TensorKind::F16 => "float16",
            TensorKind::BF16 => "bfloat16",
            _ => "float32",
        }),
    );
    set("hidden_act", json!("silu"));
    set("vocab_size", json!(vocab));
    set("hidden_size", json!(hidden));
    set("intermediate_size", json!(own.need("feed_forward_length")?));
    set("num_hidden_layers", json!(own.need("block_count")?));
    set("num_attention_heads", json!(heads));
    set("num_key_value_heads", json!(kv_heads));
    set("head_dim", json!(head_dim));
    set(
        "max_position_embeddings",
        json!(own.need("context_length")?),
    );
    set("rms_norm_eps", own.number(EPSILON, eps)?);
    set("rope_theta", own.number(BASE, theta)?);
    let scaling = rope_scaling(file, &own, head_dim, theta)?;
    set("rope_scaling", scaling);
    set("tie_word_embeddings", json!(!has("output.weight")));
    set("attention_bias", json!(has("blk.0.attn_q.bias")));
    set("mlp_bias", json!(has("blk.0.ffn_gate.bias")));
    for (key, ids) in [
        ("bos_token_id", &["tokenizer.ggml.bos_token_id"][..]),
        (
            "eos_token_id",
            &[
                "tokenizer.ggml.eos_token_id",
                "tokenizer.ggml.eot_token_id",
                "tokenizer.ggml.eom_token_id",
            ],
        ),
    ] {
        let mut found = Vec::new();
        for id in ids {
            found.extend(header.count(id)?.filter(|id| !found.contains(id)));
        }
        match found[..] {
            [] => {}
            [one] => {
                set(key, json!(one));
            }
            _ => {
                set(key, json!(found));
            }
        }
    }
    Ok(config)
}

/// The keys of a file that begin with its architecture.
struct Own<'a> {
    header: &'a Header,
    architecture: &'a str,
}

impl Own<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn wrong(&self, key: &str, reason: impl Into<String>) -> GgufError {
        self.header.wrong(&self.key(key), reason)
    }

    fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.header.text(&self.key(key))
    }

    fn count(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.header.count(&self.key(key))
    }

    /// A count of at least 1 that has to be there.
    fn need(&self, key: &str) -> Result<u64, GgufError> {
        match self.count(key)? {
            Some(count) if (1..=1 << 28).contains(&count) => Ok(count),
            Some(count) => Err(self.wrong(key, format!("is {count}"))),
            None => Err(self.wrong(key, "is missing")),
        }
    }

    fn decimal(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.header
            .get(&self.key(key), "a number", Value::as_decimal)
    }

    /// A number above 0.
    fn positive(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.decimal(key)? {
            Some(factor) if factor.is_finite() && factor > 0.0 => Ok(Some(factor)),
            None => Ok(None),
            _ => Err(self.wrong(key, "must be above 0")),
        }
    }

    /// The value of `key` in JSON.
    fn number(&self, key: &str, value: f64) -> Result<Json, GgufError> {
        let number = Number::from_f64(value).map(Json::Number);
        number.ok_or_else(|| self.wrong(key, "is not finite"))
    }
}

fn wrong_tensor(header: &Header, name: &str, reason: impl Into<String>) -> GgufError {
    GgufError::Tensor {
        file: header.path.clone(),
        name: name.into(),
        reason: reason.into(),
    }
}

fn rope_scaling(
    file: &super::GgufFile,
    own: &Own,
    head_dim: u64,
    theta: f64,
) -> Result<Json, GgufError> {
    let header = &file.header;
    if let Some(place) = header.tensors.get(ROPE_FACTORS) {
        // Checked before the tensor is read: a wrong size must not cause a large allocation.
        if place.shape != [head_dim as usize / 2] {
            let reason = format!(
                "has the shape {:?}, expected [{}]",
                place.shape,
                head_dim / 2
            );
            return Err(wrong_tensor(header, ROPE_FACTORS, reason));
        }
        if let Some(kind @ ("linear" | "yarn")) = own.text(SCALING_TYPE)? {
            let reason = format!(
                "is {kind:?} and the file has {ROPE_FACTORS}; only one scaling is supported"
            );
            return Err(own.wrong(SCALING_TYPE, reason));
        }
        let factors = file.floats(ROPE_FACTORS)?;
        return match llama3_scaling(&factors, theta) {
            Some(RopeScaling::Default) => Ok(Json::Null),
            Some(scaling) => Ok(scaling_json(scaling)),
            None => Err(wrong_tensor(
                header,
                ROPE_FACTORS,
                "is not the scaling of Llama 3.1; other scalings are not supported",
            )),
        };
    }
    let kind = own.text(SCALING_TYPE)?;
    let yarn = kind == Some("yarn");
    // In llama.cpp a missing type means "linear"; older files have `scale_linear`.
    let factor = match own.positive("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => own.positive("rope.scale_linear")?,
    };
    for (key, neutral) in NEUTRAL {
        let key = format!("rope.scaling.{key}");
        let value = own.decimal(&key)?;
        if let Some(value) = value.filter(|value| value != neutral) {
            let reason = format!("is {value}; only {neutral} is supported");
            return Err(own.wrong(&key, reason));
        }
    }
    const ATTENTION: &str = "rope.scaling.attn_factor";
    let attention = own.positive(ATTENTION)?.unwrap_or(1.0);
    if attention != 1.0 && !yarn {
        let reason = format!("is {attention}; it is supported with the scaling type \"yarn\" only");
        return Err(own.wrong(ATTENTION, reason));
    }
    match kind {
        Some("none") => Ok(Json::Null),
        None | Some("linear") => Ok(match factor {
            None => Json::Null,
            Some(factor) => scaling_json(RopeScaling::Linear { factor }),
        }),
        Some("yarn") => {
            let factor = factor.unwrap_or(1.0);
            let context = match own.count("rope.scaling.original_context_length")? {
                Some(context) => Some(context),
                None => own.count("context_length")?,
            };
            let context = context.unwrap_or(0) as f64;
            let yarn = Yarn {
                factor,
                original_max_position_embeddings: context,
                attention_factor: sharpening(factor, 1.0) * attention,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
            };
            if theta <= 1.0 || !is_llama_cpps(&yarn, theta, head_dim as usize) {
                let reason = "is \"yarn\" with a context too short or a base too small for its ramp, where \
                              llama.cpp and transformers differ";
                return Err(own.wrong(SCALING_TYPE, reason));
            }
            Ok(scaling_json(RopeScaling::Yarn(yarn)))
        }
        Some(other) => {
            let reason = format!("is {other:?}; \"none\", \"linear\" and \"yarn\" are supported");
            Err(own.wrong(SCALING_TYPE, reason))
        }
    }
}

const SCALING_TYPE: &str = "rope.scaling.type";

/// Further settings of llama.cpp's rotation, with the values that have no effect. YaRN's factor on attention
/// (`yarn_attn_factor`) is separate from the factor of all types (`attn_factor`).
const NEUTRAL: &[(&str, f64)] = &[
    ("alpha", 0.0),
    ("yarn_log_multiplier", 0.0),
    ("yarn_ext_factor", 1.0),
    ("yarn_attn_factor", 1.0),
    ("yarn_beta_fast", 32.0),
    ("yarn_beta_slow", 1.0),
];

/// Whether llama.cpp computes these settings as transformers does: it supports the default betas and a rounded ramp
/// only, and computes a ramp with exchanged ends as a step.
fn is_llama_cpps(yarn: &Yarn, theta: f64, head_dim: usize) -> bool {
    let [low, high] = yarn.ramp(theta, head_dim);
    yarn.truncate && yarn.beta_fast == 32.0 && yarn.beta_slow == 1.0 && low <= high
}

fn scaling_json(scaling: RopeScaling) -> Json {
    match scaling {
        RopeScaling::Default => Json::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Yarn(yarn) => json!({"rope_type": "yarn", "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "attention_factor": yarn.attention_factor, "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow, "truncate": yarn.truncate}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings}),
    }
}

/// The divisor of each rotary frequency, the content of the tensor `rope_freqs.weight`; `None` if all have the same
/// divisor.
pub fn rope_factors(config: &LlamaConfig) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { .. } = config.rope_scaling else {
        return None;
    };
    Some(factors_of(
        config.rope_scaling,
        config.head_dim,
        config.rope_theta,
    ))
}

fn factors_of(scaling: RopeScaling, head_dim: usize, theta: f64) -> Vec<f32> {
    let scaled = scaling.frequencies(theta, head_dim, 0, 1);
    let factors = plain(theta, head_dim).into_iter().zip(scaled);
    factors
        .map(|(plain, scaled)| (plain / scaled) as f32)
        .collect()
}

/// The settings of Llama 3.1's scaling that have these factors as their result.
///
/// With 1/factor = 1/f + (1 − 1/f)·s, the blend s is linear in the frequency, so two frequencies on the ramp determine
/// it. Several settings describe the same line; the choice has no effect. Meta's settings (low 1, high 4, context 8192)
/// are tried first.
fn llama3_scaling(factors: &[f32], theta: f64) -> Option<RopeScaling> {
    let factor = f64::from(*factors.last()?);
    let head_dim = 2 * factors.len();
    let plain = plain(theta, head_dim);
    if factors.iter().all(|factor| *factor == 1.0) {
        return Some(RopeScaling::Default);
    }
    // The scaling lowers frequencies only.
    if !factors
        .iter()
        .all(|factor| factor.is_finite() && *factor > 0.0)
        || factor <= 1.0
    {
        return None;
    }
    if factors.iter().all(|other| f64::from(*other) == factor) {
        return Some(RopeScaling::Linear { factor });
    }
    let llama3 = |low, high, context| RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: context,
    };
    let fits = |scaling: &RopeScaling| {
        // The file's factors are rounded to f32, in another order of operations.
        let own = factors_of(*scaling, head_dim, theta);
        own.iter()
            .zip(factors)
            .all(|(own, factor)| (f64::from(*own) / f64::from(*factor) - 1.0).abs() < 1e-4)
    };
    let mut candidates = vec![llama3(1.0, 4.0, 8192.0)];
    // Frequencies with their blends; low frequencies come last and have blend 0.
    let points: Vec<(f64, f64)> = plain
        .iter()
        .zip(factors)
        .map(|(frequency, own)| {
            let blend = (1.0 / f64::from(*own) - 1.0 / factor) / (1.0 - 1.0 / factor);
            (frequency / std::f64::consts::TAU, blend)
        })
        .collect();
    let on_ramp = |point: &&(f64, f64)| (1e-3..=0.999).contains(&point.1);
    let kept = points.iter().rfind(|point| point.1 > 0.999);
    let divided = points.iter().find(|point| point.1 < 1e-3);
    let ramp = [points.iter().find(on_ramp), points.iter().rfind(on_ramp)];
    let slope = |a: &(f64, f64), b: &(f64, f64)| (a.1 - b.1) / (a.0 - b.0);
    let line = match (ramp, divided) {
        ([Some(first), Some(last)], _) if first != last => Some((slope(first, last), *first)),
        // With one frequency on the ramp, the flattest line that keeps its neighbours unchanged.
        ([Some(only), _], Some(divided)) => {
            let below = slope(only, &(divided.0, 0.0));
            let above = kept.map_or(0.0, |kept| slope(&(kept.0, 1.0), only));
            Some((below.max(above), *only))
        }
        (_, Some(divided)) => kept.map(|kept| {
            let kept = (kept.0, 1.0);
            (slope(&kept, &(divided.0, 0.0)), kept)
        }),
        _ => None,
    };
    if let Some((slope, (turns, blend))) = line {
        // blend = (context · turns − low) / (high − low), with low = 1.
        let offset = slope * turns - blend;
        if slope > 0.0 && offset > 0.0 {
            candidates.push(llama3(1.0, 1.0 + 1.0 / offset, slope / offset));
        }
    }
    candidates.into_iter().find(fits)
}

/// The metadata of `config`, without tokenizer and names.
///
/// # Errors
///
/// Names a rotary scaling or a window that llama.cpp does not support.
pub fn config_metadata(config: &LlamaConfig) -> Result<Vec<(String, Value)>, String> {
    if let Some(window) = config.shortest_window() {
        return Err(format!(
            "the model has a sliding window of {window} tokens, which llama.cpp does not compute for this architecture; \
             write \"max_position_embeddings\": {window} into config.json to write the model for sequences for which the \
             window changes nothing"
        ));
    }
    let architecture = config.family.gguf_architecture;
    let count = |x: usize| Value::U32(u32::try_from(x).unwrap_or(u32::MAX));
    let mut metadata: Vec<(String, Value)> = [
        ("vocab_size", count(config.vocab_size)),
        ("context_length", count(config.max_position_embeddings)),
        ("embedding_length", count(config.hidden_size)),
        ("block_count", count(config.num_hidden_layers)),
        ("feed_forward_length", count(config.intermediate_size)),
        ("attention.head_count", count(config.num_attention_heads)),
        ("attention.head_count_kv", count(config.num_key_value_heads)),
        ("attention.key_length", count(config.head_dim)),
        ("attention.value_length", count(config.head_dim)),
        (
            "attention.layer_norm_rms_epsilon",
            Value::F32(config.rms_norm_eps as f32),
        ),
        ("rope.dimension_count", count(config.head_dim)),
        ("rope.freq_base", Value::F32(config.rope_theta as f32)),
    ]
    .map(|(key, value)| (format!("{architecture}.{key}"), value))
    .into();
    let scaling = |key: &str, value| (format!("{architecture}.rope.scaling.{key}"), value);
    match config.rope_scaling {
        // Llama 3.1's scaling is a tensor, see `rope_factors`.
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            metadata.push(scaling("type", Value::Text("linear".into())));
            metadata.push(scaling("factor", Value::F32(factor as f32)));
        }
        RopeScaling::Dynamic { .. } => {
            return Err("llama.cpp has no rope type \"dynamic\"; remove it from config.json to write the model for \
                        sequences of up to max_position_embeddings tokens, for which it changes nothing"
                .into());
        }
        RopeScaling::Yarn(yarn) => {
            if !is_llama_cpps(&yarn, config.rope_theta, config.head_dim) {
                return Err(
                    "llama.cpp computes the rope type \"yarn\" with beta_fast 32, beta_slow 1 and \
                            \"truncate\": true only, and not for contexts too short for its ramp"
                        .into(),
                );
            }
            let attention = yarn.attention_factor / sharpening(yarn.factor, 1.0);
            let context = yarn.original_max_position_embeddings;
            metadata.push(scaling("type", Value::Text("yarn".into())));
            metadata.push(scaling("factor", Value::F32(yarn.factor as f32)));
            metadata.push(scaling("original_context_length", count(context as usize)));
            if attention as f32 != 1.0 {
                metadata.push(scaling("attn_factor", Value::F32(attention as f32)));
            }
        }
    }
    Ok(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scaling_is_recovered_from_its_factors() {
        let llama3 = |factor, low, high, context| RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: context,
        };
        for (scaling, head_dim, theta) in [
            (llama3(8.0, 1.0, 4.0, 8192.0), 128, 500_000.0),
            (llama3(32.0, 1.0, 4.0, 8192.0), 64, 500_000.0),
            // One frequency on the ramp, two, many; another low factor.
            (llama3(8.0, 1.0, 4.0, 32.0), 8, 100.0),
            (llama3(8.0, 1.0, 4.0, 32.0), 16, 100.0),
            (llama3(4.0, 2.0, 7.0, 4096.0), 64, 10_000.0),
            // None on it.
            (llama3(8.0, 1.0, 1.01, 32.0), 8, 100.0),
            (RopeScaling::Linear { factor: 2.5 }, 64, 10_000.0),
            (RopeScaling::Default, 64, 10_000.0),
        ] {
            let factors = factors_of(scaling, head_dim, theta);
            let found = llama3_scaling(&factors, theta).unwrap_or_else(|| panic!("{scaling:?}"));
            let again = factors_of(found, head_dim, theta);
            for (one, other) in factors.iter().zip(&again) {
                // The factors are known to f32.
                assert!((one / other - 1.0).abs() < 1e-5, "{scaling:?}: {found:?}");
            }
        }
    }

    #[test]
    fn other_factors_are_no_llama3_scaling() {
        let frequencies = 32;
        let zigzag: Vec<f32> = (0..frequencies).map(|i| 1.0 + (i % 3) as f32).collect();
        assert_eq!(llama3_scaling(&zigzag, 10_000.0), None);
        assert_eq!(llama3_scaling(&[f32::NAN; 4], 10_000.0), None);
        assert_eq!(llama3_scaling(&[0.5; 4], 10_000.0), None);
        assert_eq!(llama3_scaling(&[], 10_000.0), None);
    }
}
