//! Properties of every configuration and every batch of sequences, tested on random ones.

use std::path::Path;

use burn::tensor::Device;
use data::{Batch, BatchRow, Prefixes};
use llama_burn::{Llama, LlamaConfig, PackedTokens, RopeScaling};
use lora_core::{Init, Method};
use proptest::prelude::*;
use proptest::sample::{Index, select, subsequence};
use run_config::{Config, Library};
use serde_json::{Value, json};
use train_step::gradients::evaluate;

/// Every key of the table with valid values, except those that every configuration here has.
fn right_values() -> Vec<(&'static str, Vec<Value>)> {
    let keys = run_config::keys().into_iter();
    let optional = keys.filter(|key| !least().contains_key(key.name));
    let values = optional.map(|key| {
        (
            key.name,
            key.samples.iter().map(|value| json!(value)).collect(),
        )
    });
    values.collect()
}

/// Makes keys that were chosen without regard for each other agree.
fn reconcile(object: &mut serde_json::Map<String, Value>) {
    for (one, other) in run_config::EXCLUSIVE {
        if object.contains_key(one) {
            object.remove(other);
        }
    }
    let init = object.get("init_lora_weights").and_then(Value::as_str);
    if init
        .and_then(Init::from_name)
        .is_some_and(Init::changes_weights)
    {
        object.remove("init_adapter");
        object.remove("peft_use_dora");
        for whole in ["bias", "lora_bias", "modules_to_save"] {
            object.remove(whole);
        }
    }
    if object.get("peft_use_dora") == Some(&json!(true)) {
        object.remove("lora_bias");
    }
    let peft_type = object.get("peft_type").and_then(Value::as_str);
    let method = peft_type.and_then(Method::of_peft_type).unwrap_or_default();
    let facts = method.facts();
    // A flag belongs to methods of one peft_type.
    let of_another_type = |name: &str| {
        let flagged = Method::of_flag(name).map(Method::facts);
        flagged.is_some_and(|other| other.peft_type != facts.peft_type)
    };
    let lacks = |name: &str| !facts.has(name) || of_another_type(name);
    for key in run_config::keys() {
        let mut names = key.elsewhere.iter();
        if names.any(|(library, name)| *library == Library::Peft && lacks(name)) {
            object.remove(key.name);
        }
    }
    if facts.shared.is_some() {
        object.remove("loraplus_lr_ratio");
    }
    if object.contains_key("layers_to_transform") {
        object.insert("target_modules".into(), json!(["q_proj"]));
    }
    if object.contains_key("max_batch_tokens") {
        object.insert("max_seq_len".into(), json!(2));
    }
}

fn parse(object: &serde_json::Map<String, Value>) -> Result<Config, String> {
    let text = Value::Object(object.clone()).to_string();
    Config::parse(&text, Some(Path::new("run.json")), None, &[]).map_err(|error| error.to_string())
}

fn least() -> serde_json::Map<String, Value> {
    let least = json!({"base_model": "models/x", "dataset_path": "rows.jsonl"});
    least.as_object().cloned().unwrap_or_default()
}

/// A written value is read back as the same.
fn round_trip(config: &Config) {
    let written = config.to_toml();
    let again = Config::parse(&written, Some(Path::new("again.toml")), None, &[]);
    let again = again.unwrap_or_else(|error| panic!("{error}\n{written}"));
    let source = config.source.clone();
    assert!(Config { source, ..again } == *config, "{written}");
}

/// Values that no key accepts, and some that one or another accepts.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        select(vec!["none", "auto", "embedded", "../..", "", "nan", "8"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".{0,8}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn right_values_in_any_company_are_accepted_and_come_back_as_they_were(
        chosen in subsequence(right_values(), 0..=right_values().len()),
        picks in prop::collection::vec(any::<Index>(), right_values().len()),
    ) {
        let mut object = least();
        for ((key, values), pick) in chosen.iter().zip(&picks) {
            object.insert(key.to_string(), pick.get(values).clone());
        }
        reconcile(&mut object);
        let config = parse(&object).unwrap_or_else(|error| panic!("{error}\n{object:?}"));
        round_trip(&config);
    }

    #[test]
    fn any_value_of_any_key_is_an_error_that_names_the_key_or_a_valid_setting(
        key in prop_oneof![
            select(right_values()).prop_map(|(key, _)| key.to_string()),
            select(vec!["base_model", "dataset_path", "preset", "modules_to_save"]).prop_map(String::from),
            "[a-z_]{0,12}",
        ],
        value in any_value(),
    ) {
        let mut object = least();
        object.insert(key.clone(), value);
        match parse(&object) {
            Ok(config) => {
                prop_assert!(config.lora_config().validate().is_ok());
                prop_assert!(config.learning_rate > 0.0 && config.learning_rate.is_finite());
                round_trip(&config);
            }
            Err(message) => {
                prop_assert!(message.contains(&key), "{key} is not named: {message}");
                prop_assert!(message.len() < 4000, "{} bytes: {message}", message.len());
            }
        }
    }

    #[test]
    fn an_override_is_an_error_or_valid(text in ".{0,60}") {
        if let Ok(config) = Config::load(None, None, &[text]) {
            round_trip(&config);
        }
    }
}

/// Sequences over few tokens, so that many share a prefix.
fn rows() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let beginnings = prop::collection::vec(prop::collection::vec(0u32..3, 1..24), 1..4);
    let own = prop::collection::vec(
        (any::<Index>(), prop::collection::vec(0u32..3, 1..12)),
        1..8,
    );
    (beginnings, own).prop_map(|(beginnings, own)| {
        let rows = own
            .into_iter()
            .map(|(beginning, end)| [beginning.get(&beginnings).clone(), end].concat());
        rows.collect()
    })
}

/// Every second token of the latter half of a sequence is in the loss, and its last token.
fn packed(rows: &[Vec<u32>], prefixes: Prefixes) -> Batch {
    let rows: Vec<BatchRow> = rows
        .iter()
        .enumerate()
        .map(|(line, ids)| BatchRow {
            ids,
            targets: (ids.len() / 2..ids.len())
                .filter(|at| *at > 0 && (at % 2 == 1 || at + 1 == ids.len()))
                .map(|at| (at - 1, ids[at]))
                .collect(),
            line: line + 1,
        })
        .collect();
    Batch::new(&rows, prefixes)
}

/// The tokens that the position `at` of a packed sequence attends to, with itself the last.
fn seen(tokens: &PackedTokens, at: usize) -> Vec<u32> {
    let starts = tokens.starts();
    let segment = starts.partition_point(|start| *start <= at) - 1;
    let mut seen = tokens.ids[starts[segment]..=at].to_vec();
    let mut parent = tokens.segments[segment].parent;
    while let Some(segment) = parent {
        let start = starts[segment];
        let before = &tokens.ids[start..start + tokens.segments[segment].length];
        seen.splice(0..0, before.iter().copied());
        parent = tokens.segments[segment].parent;
    }
    assert_eq!(
        tokens.offsets()[segment] + at - starts[segment] + 1,
        seen.len(),
        "a position counts the tokens that it attends to"
    );
    seen
}

fn tiny() -> (LlamaConfig, Llama) {
    let config = LlamaConfig {
        vocab_size: 8,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 8,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: true,
        initializer_range: 0.3,
        bos_token_id: None,
        eos_token_ids: vec![],
        weight_bytes: 4,
        ..LlamaConfig::default()
    };
    let model = Llama::random(&config, 3, &Device::flex().autodiff());
    (config, model)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_target_is_predicted_by_what_comes_before_it_in_its_own_row(rows in rows()) {
        let (config, _) = tiny();
        for prefixes in [Prefixes::Shared, Prefixes::Apart] {
            let batch = packed(&rows, prefixes);
            prop_assert!(batch.tokens.check(&config).is_ok());
            let all: usize = rows.iter().map(Vec::len).sum();
            prop_assert_eq!(batch.row_tokens, all);
            prop_assert!(batch.tokens.ids.len() <= all);
            prop_assert!(prefixes == Prefixes::Shared || batch.tokens.ids.len() == all);
            prop_assert_eq!(batch.rows.clone(), (1..=rows.len()).collect::<Vec<_>>());
            let mut targets = batch.target_positions.iter().zip(&batch.target_ids);
            for (row, count) in rows.iter().zip(&batch.targets_per_example) {
                let learned = (row.len() / 2..row.len()).filter(|at| *at > 0 && (at % 2 == 1 || at + 1 == row.len()));
                let learned: Vec<usize> = learned.collect();
                prop_assert_eq!(*count, learned.len());
                for at in learned {
                    let (position, id) = targets.next().expect("a target for each");
                    prop_assert_eq!(*id, row[at]);
                    prop_assert_eq!(seen(&batch.tokens, *position as usize), &row[..at]);
                }
            }
            prop_assert!(targets.next().is_none());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sharing_beginnings_changes_no_loss(rows in rows()) {
        let (_, model) = tiny();
        let [shared, apart] = [Prefixes::Shared, Prefixes::Apart].map(|prefixes| evaluate(&model, &packed(&rows, prefixes)));
        prop_assert_eq!((shared.tokens, shared.examples), (apart.tokens, apart.examples));
        // Sums of up to 100 losses of about 2, each in f32 in another order of additions: 1e-5 of
        // the sum is a hundred times the measured difference.
        let tolerance = 1e-5 * apart.loss.abs().max(1.0);
        prop_assert!((shared.loss - apart.loss).abs() <= tolerance, "{} and {}", shared.loss, apart.loss);
    }
}
