//! Packed sequences compared with padded ones, with single ones, and with micro-batches of other
//! sizes.

use std::collections::BTreeMap;

use burn::tensor::Device;
use data::{Batch, BatchRow, Prefixes};
use llama_burn::{Biases, Llama, LlamaConfig, RopeScaling};
use lora_core::{CounterRng, LoraConfig, TargetModules};
use parity::against_reference;
use peft::{AdapterTensors, WholeTensor};
use tests::fixture;
use train_step::gradients::{
    AdapterGradients, PassOptions, accumulate, accumulate_in_graph, evaluate,
};
use train_step::loss::LossSums;

/// Lengths of sequences with their last third in the loss: 3, 7, 1, 4 and 2 tokens.
const LENGTHS: [usize; 5] = [9, 21, 5, 14, 6];

/// A small Llama with adapters on every linear module, B ≠ 0 and γ = 4, and adapted embedding rows
/// of a third of its tokens.
fn model(lora_dropout: f64) -> Llama {
    model_of(&config(), lora_dropout)
}

fn config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: 96,
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: true,
        initializer_range: 0.2,
        bos_token_id: None,
        eos_token_ids: vec![],
        weight_bytes: 4,
        ..LlamaConfig::default()
    }
}

/// What other families have, all at once: biases, norms of each head, sliding windows, heads whose widths do not add up
/// to the hidden size.
fn other_config() -> LlamaConfig {
    LlamaConfig {
        head_dim: 12,
        query_key_norm: true,
        windows: vec![Some(4), None, Some(9)],
        biases: Biases::of_blocks(true, true),
        ..config()
    }
}

/// As [`model`]; the weights of norms and biases are random too.
fn model_of(config: &LlamaConfig, lora_dropout: f64) -> Llama {
    let lora = LoraConfig {
        r: 4,
        lora_dropout,
        target_modules: TargetModules::AllLinear,
        trainable_token_indices: vec![("embed_tokens".into(), (0..96).step_by(3).collect())],
        ..LoraConfig::default()
    };
    let mut base = Llama::random(config, 1, &Device::flex().autodiff());
    let mut rng = CounterRng::new(4);
    for (name, shape) in config.tensor_shapes() {
        if let [width] = shape[..] {
            let center = if name.ends_with(".bias") { 0.0 } else { 1.0 };
            let values = (0..width).map(|_| center + 0.2 * rng.normal() as f32);
            assert!(base.set_tensor(&name, values.collect()), "{name}");
        }
    }
    let fresh = base.with_lora(&lora, 2).expect("the settings are valid");
    let mut adapter = AdapterTensors::from_model(&fresh).expect("the CPU gives its tensors back");
    let mut rng = CounterRng::new(3);
    let numbers = adapter.modules.values_mut().flat_map(|pair| &mut pair.b);
    numbers.for_each(|value| *value = 0.1 * rng.normal() as f32);
    let shape = vec![32, config.hidden_size];
    let values = (0..32 * config.hidden_size).map(|_| 0.2 * rng.normal() as f32);
    let values = values.collect();
    let rows = WholeTensor { shape, values };
    adapter.token_rows.insert("model.embed_tokens".into(), rows);
    adapter
        .put_on(fresh, &lora)
        .expect("the adapter fits its own model")
}

/// Sequences with these indices into [`LENGTHS`], packed.
fn batch(rows: &[usize]) -> Batch {
    pack(rows, 0, Prefixes::Apart)
}

/// Sequences of random tokens, of which the first `alike` are the same in all of them.
fn pack(rows: &[usize], alike: usize, prefixes: Prefixes) -> Batch {
    let tokens = |row: usize, count: usize| -> Vec<u32> {
        let mut rng = CounterRng::new(7).fork(row as u64);
        (0..count).map(|_| (rng.next_u64() % 96) as u32).collect()
    };
    let ids: Vec<Vec<u32>> = rows
        .iter()
        .map(|row| [tokens(1000, alike), tokens(*row, LENGTHS[*row])].concat())
        .collect();
    let rows: Vec<BatchRow> = rows
        .iter()
        .zip(&ids)
        .map(|(row, ids)| BatchRow {
            ids,
            targets: (ids.len() - LENGTHS[*row] / 3..ids.len())
                .map(|at| (at - 1, ids[at]))
                .collect(),
            line: row + 1,
        })
        .collect();
    Batch::new(&rows, prefixes)
}

/// The gradients of the mean loss over these micro-batches, by module and parameter.
type Named = BTreeMap<String, Vec<f32>>;

fn gradients(
    model: &Llama,
    micro_batches: &[Batch],
    gradient_checkpointing: bool,
) -> (LossSums, Named) {
    let mut sums = AdapterGradients::default();
    for batch in micro_batches {
        let options = PassOptions {
            gradient_checkpointing,
            dropout_seed: 5,
            ..PassOptions::default()
        };
        accumulate(model, batch, options, &mut sums);
    }
    named(model, sums)
}

fn named(model: &Llama, sums: AdapterGradients) -> (LossSums, Named) {
    let mean = sums.into_mean(0.0);
    let mut named = Named::new();
    for (module, params) in model.trainable() {
        for (index, param) in params.into_iter().enumerate() {
            let gradient = mean.get(param.id).expect("every parameter has a gradient");
            let values = gradient.into_data().try_to_vec::<f32>();
            named.insert(
                format!("{module}.{index}"),
                values.expect("gradients are f32"),
            );
        }
    }
    assert!(named.contains_key("model.embed_tokens.0"));
    (mean.totals, named)
}

/// The largest relative Frobenius distance of two sets of gradients.
fn distance(got: &Named, expected: &Named) -> f64 {
    assert_eq!(
        got.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    let relative = |name: &String| {
        let pairs = || got[name].iter().zip(&expected[name]);
        let difference: f64 = pairs().map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let norm: f64 = pairs().map(|(_, b)| f64::from(*b).powi(2)).sum();
        assert!(norm > 0.0, "{name} has no gradient to compare");
        (difference / norm).sqrt()
    };
    got.keys().map(relative).fold(0.0, f64::max)
}

// f32 sums in another order: 1e-7 to 1e-6. A sequence that attends to its neighbour, a position
// that does not restart, or a mean over micro-batches instead of tokens gives 1e-2 and more.
const TOLERANCE: f64 = 1e-5;

#[track_caller]
fn assert_same(got: &(LossSums, Named), expected: &(LossSums, Named)) {
    let loss = (got.0.loss - expected.0.loss).abs() / expected.0.loss;
    let gradients = distance(&got.1, &expected.1);
    println!("loss {loss:.1e}, gradients {gradients:.1e}, tolerance {TOLERANCE:.0e}");
    assert!(
        loss < TOLERANCE && gradients < TOLERANCE,
        "loss {loss:e}, gradients {gradients:e}"
    );
    let counts = |sums: LossSums| {
        (
            sums.tokens,
            sums.correct,
            sums.examples,
            sums.correct_examples,
        )
    };
    assert_eq!(counts(got.0), counts(expected.0));
}

#[test]
fn packed_rows_agree_with_padded_rows_under_transformers_attention_mask() {
    let cpu = [("cpu".to_string(), Device::flex())];
    let report = against_reference(&fixture("padded_rows"), None, 1e-3, &cpu);
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    assert!(report.passed(), "{report}");
    let checks = &report.sections[0].checks;
    for quantity in ["logits", "loss", "LoRA gradients (", "train_losses"] {
        let found = checks
            .iter()
            .any(|check| check.quantity.starts_with(quantity));
        assert!(found, "{quantity} was not compared:\n{report}");
    }
}

#[test]
fn packed_rows_have_the_loss_and_the_gradients_of_the_rows_alone() {
    let model = model(0.0);
    let packed = gradients(&model, &[batch(&[0, 1, 2, 3, 4])], false);
    let alone = [0, 1, 2, 3, 4].map(|row| batch(&[row]));
    assert_same(&packed, &gradients(&model, &alone, false));
}

#[test]
fn the_order_of_packed_rows_does_not_matter() {
    let model = model(0.0);
    let packed = gradients(&model, &[batch(&[0, 1, 2, 3, 4])], false);
    assert_same(
        &gradients(&model, &[batch(&[4, 2, 0, 3, 1])], false),
        &packed,
    );
}

#[test]
fn accumulated_micro_batches_of_unequal_token_counts_equal_one_big_batch() {
    let model = model(0.0);
    let big = gradients(&model, &[batch(&[0, 1, 2, 3, 4])], false);
    // 7, 4 and 6 tokens in the loss.
    let micro_batches = [batch(&[1]), batch(&[0, 2]), batch(&[3, 4])];
    let supervised = micro_batches.each_ref().map(|batch| batch.target_ids.len());
    assert!(supervised[0] != supervised[1] && supervised[1] != supervised[2]);
    assert_same(&gradients(&model, &micro_batches, false), &big);
}

#[test]
fn gradient_checkpointing_changes_no_gradient_not_even_under_dropout() {
    for dropout in [0.0, 0.4] {
        let model = model(dropout);
        let batches = [batch(&[0, 1]), batch(&[2, 3, 4])];
        let kept = gradients(&model, &batches, false);
        let recomputed = gradients(&model, &batches, true);
        // Another dropout mask in the second forward pass would change a gradient by half its size.
        assert_same(&recomputed, &kept);
    }
}

#[test]
fn the_training_pass_and_the_evaluation_see_the_same_loss() {
    let model = model(0.0);
    let batch = batch(&[0, 1, 2, 3, 4]);
    let evaluated = evaluate(&model, &batch);
    let (trained, _) = gradients(&model, &[batch], true);
    assert!((evaluated.loss - trained.loss).abs() < TOLERANCE * trained.loss);
    assert_eq!(
        (evaluated.tokens, evaluated.examples),
        (trained.tokens, trained.examples)
    );
}

#[test]
fn shared_beginnings_have_the_loss_and_the_gradients_of_rows_apart() {
    let model = model(0.0);
    let rows = [0, 1, 2, 3, 4, 1];
    let apart = pack(&rows, 12, Prefixes::Apart);
    let shared = pack(&rows, 12, Prefixes::Shared);
    // Twelve tokens once instead of six times, and one of two equal sequences.
    let saved = apart.tokens.ids.len() - shared.tokens.ids.len();
    assert_eq!(saved, 5 * 12 + LENGTHS[1]);
    for checkpointing in [false, true] {
        let expected = gradients(&model, std::slice::from_ref(&apart), checkpointing);
        let got = gradients(&model, std::slice::from_ref(&shared), checkpointing);
        assert_same(&got, &expected);
    }
    let (got, expected) = (evaluate(&model, &shared), evaluate(&model, &apart));
    assert!((got.loss - expected.loss).abs() < TOLERANCE * expected.loss);
}

#[test]
fn the_manual_passes_have_the_loss_and_the_gradients_of_burns_autodiff_graph() {
    for (config, dropout) in [
        (config(), 0.0),
        (config(), 0.4),
        (other_config(), 0.0),
        (other_config(), 0.4),
    ] {
        let model = model_of(&config, dropout);
        let batch = batch(&[0, 1, 2, 3, 4]);
        let got = gradients(&model, std::slice::from_ref(&batch), false);
        let mut sums = AdapterGradients::default();
        accumulate_in_graph(&model, &batch, 5, &mut sums);
        assert_same(&got, &named(&model, sums));
    }
}
