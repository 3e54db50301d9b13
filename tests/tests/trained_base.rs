//! Tensors of the base model that are trained beside the adapters: biases and whole modules. The manual passes are
//! compared with Burn's autodiff graph of the dense formulas.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use burn::tensor::Device;
use data::{Batch, BatchRow, Prefixes};
use llama_burn::{Biases, Llama, LlamaConfig};
use lora_core::{Bias, CounterRng, LoraConfig, Quantization, TargetModules};
use train_step::gradients::{AdapterGradients, PassOptions, accumulate, accumulate_in_graph};
use train_step::optimizer::AdamW;
use train_step::{loraplus_rates, undecayed};

/// Three layers with biases and norms of heads.
fn config(tied: bool) -> LlamaConfig {
    LlamaConfig {
        vocab_size: 96,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        query_key_norm: true,
        biases: Biases::of_blocks(true, true),
        tie_word_embeddings: tied,
        initializer_range: 0.2,
        ..LlamaConfig::default()
    }
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

fn lora(targets: &[&str], saved: &[&str]) -> LoraConfig {
    LoraConfig {
        r: 4,
        target_modules: TargetModules::Names(names(targets)),
        modules_to_save: names(saved),
        ..LoraConfig::default()
    }
}

/// A model with random norms, biases and B.
fn model(config: &LlamaConfig, lora: &LoraConfig, quantization: Quantization) -> Llama {
    model_on(&Device::flex(), config, lora, quantization)
}

/// The same on another device.
fn model_on(
    device: &Device,
    config: &LlamaConfig,
    lora: &LoraConfig,
    quantization: Quantization,
) -> Llama {
    let mut base = Llama::random(config, 1, &device.clone().autodiff());
    let mut rng = CounterRng::new(4);
    for (name, shape) in config.tensor_shapes() {
        if let [width] = shape[..] {
            let center = if name.ends_with(".bias") { 0.0 } else { 1.0 };
            let values = (0..width).map(|_| center + 0.2 * rng.normal() as f32);
            assert!(base.set_tensor(&name, values.collect()), "{name}");
        }
    }
    if quantization != Quantization::None {
        for (_, linear) in base.linears_mut() {
            *linear = linear
                .clone()
                .quantize(quantization)
                .expect("a dense weight");
        }
    }
    let fresh = base.with_lora(lora, 2).expect("the settings are valid");
    let mut adapter = peft::AdapterTensors::from_model(&fresh).expect("the CPU's tensors");
    for pair in adapter.modules.values_mut() {
        let bias = pair.bias.iter_mut().flatten();
        let numbers = pair.b.iter_mut().chain(bias);
        numbers.for_each(|value| *value = 0.1 * rng.normal() as f32);
    }
    adapter
        .put_on(fresh, lora)
        .expect("the adapter fits its own model")
}

/// Sequences of random tokens, some of which occur several times; the last third of each is in the loss.
fn batch() -> Batch {
    let ids: Vec<Vec<u32>> = [13, 7, 10]
        .iter()
        .map(|length| {
            let mut rng = CounterRng::new(7).fork(*length);
            (0..*length).map(|_| (rng.next_u64() % 20) as u32).collect()
        })
        .collect();
    let rows: Vec<BatchRow> = ids
        .iter()
        .enumerate()
        .map(|(index, ids)| BatchRow {
            ids,
            targets: (ids.len() * 2 / 3..ids.len())
                .map(|at| (at - 1, ids[at]))
                .collect(),
            line: index + 1,
        })
        .collect();
    Batch::new(&rows, Prefixes::Apart)
}

/// The gradients of everything that is trained, by name.
fn named(model: &Llama, sums: AdapterGradients) -> BTreeMap<String, Vec<f32>> {
    let mean = sums.into_mean(0.0);
    let factors = model.trainable().flat_map(|(module, params)| {
        let ids = params.into_iter().map(|param| param.id).enumerate();
        ids.map(|(index, id)| (format!("{module}.{index}"), id))
            .collect::<Vec<_>>()
    });
    let whole = model.trained_whole().into_iter();
    let whole = whole.flat_map(|(name, parts)| {
        let ids = parts.into_iter().map(|part| part.id()).enumerate();
        ids.map(|(index, id)| (format!("{name}.{index}"), id))
            .collect::<Vec<_>>()
    });
    let mut named = BTreeMap::new();
    for (name, id) in factors.chain(whole) {
        let gradient = mean
            .get(id)
            .unwrap_or_else(|| panic!("{name} has no gradient"));
        let values = gradient.into_data().try_to_vec::<f32>().expect("f32");
        named.insert(name, values);
    }
    let all: usize = named.values().map(Vec::len).sum();
    let flat = mean.gradients.values.expect("there are gradients");
    assert_eq!(all, flat.dims()[0], "gradients of trained parameters only");
    named
}

/// The largest relative Frobenius distance, and its tensor.
fn distance(
    got: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
) -> (f64, String) {
    assert!(got.keys().eq(expected.keys()));
    let mut worst = (0.0, String::new());
    for (name, expected) in expected {
        let pairs = || got[name].iter().zip(expected);
        let difference: f64 = pairs().map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let norm: f64 = pairs().map(|(_, b)| f64::from(*b).powi(2)).sum();
        assert!(norm > 0.0, "{name} has no gradient to compare");
        let relative = (difference / norm).sqrt();
        if relative > worst.0 {
            worst = (relative, name.clone());
        }
    }
    worst
}

/// f32 sums in another order, through three layers.
const BOUND: f64 = 2e-5;

/// [`agrees_within`] the bound for small models.
fn agrees(config: &LlamaConfig, lora: &LoraConfig, quantization: Quantization, count: usize) {
    agrees_within(BOUND, config, lora, quantization, count);
}

/// Compares the manual passes on every device of this build with the graph on the CPU, and checks which tensors are
/// trained: `count` of them.
fn agrees_within(
    bound: f64,
    config: &LlamaConfig,
    lora: &LoraConfig,
    quantization: Quantization,
    count: usize,
) {
    // One test at a time on a GPU.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (model, batch) = (model(config, lora, quantization), batch());
    let trained: Vec<String> = model
        .trained_whole()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(trained.len(), count, "{trained:?}");
    let mut sums = AdapterGradients::default();
    accumulate_in_graph(&model, &batch, 5, &mut sums);
    let expected = named(&model, sums);
    for (device_name, device) in all_devices() {
        let model = model_on(device, config, lora, quantization);
        for gradient_checkpointing in [false, true] {
            let options = PassOptions {
                gradient_checkpointing,
                dropout_seed: 5,
                ..PassOptions::default()
            };
            let mut sums = AdapterGradients::default();
            accumulate(&model, &batch, options, &mut sums);
            let (worst, name) = distance(&named(&model, sums), &expected);
            println!("{worst:.1e} {device_name} {name}");
            assert!(worst < bound, "{device_name} {name} {worst} {lora:?}");
        }
    }
}

/// The devices of this build; the CPU comes first.
fn all_devices() -> &'static [(String, Device)] {
    static DEVICES: OnceLock<Vec<(String, Device)>> = OnceLock::new();
    DEVICES.get_or_init(tests::devices)
}

#[test]
fn gradients_of_biases_are_those_of_the_graph() {
    for (bias, count) in [(Bias::All, 21), (Bias::LoraOnly, 9)] {
        for lora_dropout in [0.0, 0.2] {
            for quantization in [Quantization::None, Quantization::Bits8] {
                let lora = LoraConfig {
                    bias,
                    lora_dropout,
                    ..lora(&["q_proj", "o_proj", "up_proj"], &[])
                };
                agrees(&config(true), &lora, quantization, count);
            }
        }
    }
    let lora_bias = LoraConfig {
        lora_bias: true,
        lora_dropout: 0.1,
        bias: Bias::LoraOnly,
        rank_pattern: vec![("v_proj".into(), 2)],
        ..lora(&["v_proj", "gate_proj", "up_proj", "down_proj"], &[])
    };
    agrees(&config(true), &lora_bias, Quantization::Bits8, 24);
    let without = LlamaConfig {
        biases: Biases::default(),
        ..config(true)
    };
    agrees(&without, &lora_bias, Quantization::Bits8, 12);
}

#[test]
fn gradients_of_norms_are_those_of_the_graph() {
    agrees(
        &config(false),
        &lora(&["q_proj"], &["norm"]),
        Quantization::Bits8,
        13,
    );
    for saved in [
        "input_layernorm",
        "post_attention_layernorm",
        "q_norm",
        "k_norm",
        "model.norm",
    ] {
        // The lowest layer with an adapter is above the lowest layer with a norm.
        let lora = LoraConfig {
            layers_to_transform: Some(vec![2]),
            ..lora(&["down_proj"], &[saved])
        };
        let count = if saved == "model.norm" { 1 } else { 3 };
        agrees(&config(true), &lora, Quantization::Bits8, count);
    }
}

#[test]
fn gradients_of_embedding_and_head_are_those_of_the_graph() {
    for tied in [true, false] {
        for saved in [
            &["embed_tokens"][..],
            &["lm_head"],
            &["embed_tokens", "lm_head"],
        ] {
            let lora = lora(&["v_proj"], saved);
            agrees(&config(tied), &lora, Quantization::Bits8, saved.len());
        }
    }
    // The loss is computed in several chunks of positions, which all add to the head's gradient.
    let wide = LlamaConfig {
        vocab_size: 900_000,
        hidden_size: 8,
        ..config(true)
    };
    // The gradient of a hidden state is an f32 sum over the vocabulary: √900,000 roundings of 6e-8 are 6e-5.
    agrees_within(
        1e-4,
        &wide,
        &lora(&["v_proj"], &["lm_head", "model.norm"]),
        Quantization::None,
        2,
    );
}

#[test]
fn gradients_of_whole_linear_layers_are_those_of_the_graph() {
    // Alone in their group, beside an adapted layer and beside a frozen one; weight and bias of each.
    for (targets, saved, count) in [
        (&["q_proj"][..], &["o_proj", "down_proj"][..], 12),
        (&["q_proj", "gate_proj"], &["k_proj", "up_proj"], 12),
        (&["q_proj"], &["gate_proj"], 6),
        (&["q_proj", "up_proj"], &["layers.1.self_attn"], 10),
        (&["o_proj"], &["mlp", "embed_tokens", "norm"], 32),
    ] {
        for lora_dropout in [0.0, 0.2] {
            let lora = LoraConfig {
                lora_dropout,
                ..lora(targets, saved)
            };
            agrees(&config(false), &lora, Quantization::Bits8, count);
        }
    }
}

#[test]
fn without_these_settings_nothing_of_the_base_model_is_trained() {
    let lora = lora(&["q_proj"], &[]);
    assert!(
        model(&config(true), &lora, Quantization::Bits8)
            .trained_whole()
            .is_empty()
    );
}

#[test]
fn counts_are_those_of_the_parameters() {
    for (tied, saved) in [
        (true, &["embed_tokens", "norm"][..]),
        (true, &["embed_tokens", "lm_head", "o_proj"]),
        (false, &["lm_head", "mlp"]),
    ] {
        let lora = LoraConfig {
            bias: Bias::All,
            lora_bias: true,
            ..lora(&["q_proj", "v_proj"], saved)
        };
        let model = model(&config(tied), &lora, Quantization::None);
        let counts = config(tied)
            .count(&lora, Quantization::None, 4)
            .expect("valid");
        let mut sums = AdapterGradients::default();
        accumulate(&model, &batch(), PassOptions::default(), &mut sums);
        let gradients = named(&model, sums);
        let trained: usize = gradients.values().map(Vec::len).sum();
        assert_eq!(counts.trainable, trained as u64, "{saved:?}");
        let all = burn::module::Module::num_params(&model) as u64;
        assert_eq!(counts.frozen, all - trained as u64, "{saved:?}");
    }
}

/// What a first step of AdamW with this decay, and this ratio of LoRA+, adds to every parameter.
fn first_step(model: &Llama, weight_decay: f64, ratio: f64) -> BTreeMap<String, Vec<f32>> {
    let adamw = AdamW {
        weight_decay,
        ..AdamW::default()
    };
    let mut optimizer = adamw
        .resumable()
        .with_undecayed(undecayed(model))
        .with_rates(loraplus_rates(model, ratio));
    let mut sums = optimizer.sums();
    accumulate(model, &batch(), PassOptions::default(), &mut sums);
    let stepped = optimizer.step(0.01, model.clone(), sums.into_mean(0.0).gradients);
    let values = |model: &Llama| -> Vec<(String, Vec<f32>)> {
        let whole = model.trained_whole().into_iter();
        let whole = whole.flat_map(|(name, parts)| {
            parts
                .into_iter()
                .map(move |part| (name.clone(), part.value()))
        });
        let factors = model.trainable().flat_map(|(module, params)| {
            let params = params.into_iter().enumerate();
            params.map(move |(index, param)| {
                (format!("{module}.{index}"), param.val().without_autodiff())
            })
        });
        let all = whole.chain(factors);
        all.map(|(name, value)| (name, value.into_data().try_to_vec().expect("f32")))
            .collect()
    };
    let pairs = values(&stepped).into_iter().zip(values(model));
    let differences = pairs.map(|((name, after), (_, before))| {
        let difference = after
            .iter()
            .zip(before)
            .map(|(after, before)| after - before);
        (name, difference.collect())
    });
    differences.collect()
}

#[test]
fn weight_decay_leaves_biases_and_norms_alone_and_loraplus_gives_them_the_rate_of_b() {
    let lora = LoraConfig {
        bias: Bias::All,
        lora_bias: true,
        ..lora(&["q_proj"], &["embed_tokens", "o_proj", "norm"])
    };
    let model = model(&config(true), &lora, Quantization::None);
    let plain = first_step(&model, 0.0, 1.0);
    let decayed = first_step(&model, 0.5, 1.0);
    let fast = first_step(&model, 0.0, 4.0);
    assert!(plain.len() > 30);
    for (name, plain) in &plain {
        let is_vector = name.ends_with(".bias") || name.ends_with("norm.weight");
        assert_eq!(*plain == decayed[name], is_vector, "{name}");
        let ratio = if is_vector || name.ends_with(".1") {
            4.0
        } else {
            1.0
        };
        for (plain, fast) in plain.iter().zip(&fast[name]) {
            // A rounding of a value of order 1.
            assert!((ratio * plain - fast).abs() < 2e-6, "{name} {plain} {fast}");
        }
        assert!(plain.iter().any(|plain| plain.abs() > 0.0099), "{name}");
    }
}

#[test]
fn entries_that_match_nothing_or_an_adapted_module_are_named() {
    let error = |saved: &[&str]| {
        let checked = config(true).check_saved(&lora(&["q_proj"], saved));
        checked.expect_err("the entry is wrong").to_string()
    };
    let unknown = error(&["norm", "nrom"]);
    assert!(
        unknown.contains("\"nrom\"") && unknown.contains("k_norm"),
        "{unknown}"
    );
    // The end of q_proj's name, but not its name.
    let both = error(&["_proj"]);
    assert!(both.contains("model.layers.0.self_attn.q_proj"), "{both}");
    for right in [&["q_proj"][..], &["norm", "lm_head"], &["layers.2"]] {
        config(true)
            .check_saved(&lora(&["q_proj", "v_proj"], right))
            .expect("they match");
    }
}
