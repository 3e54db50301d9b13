//! Adapts a Burn model by the names of its layers: a transformer from `burn::nn`, over an 8-bit base.
//!
//! ```text
//! cargo run --release -p lora-core --example adapt_transformer -- --backend cpu
//! cargo run --release -p lora-core --example adapt_transformer --features wgpu -- --backend wgpu
//! ```
//!
//! 1. A transformer learns whether most tokens of a sequence belong to a set of tokens.
//! 2. The set changes: half of its tokens are replaced. The model is now often wrong.
//! 3. `adapt` quantizes the model to 8 bits and puts adapters of rank 8 on its linear layers, by their names. The model's
//!    type stays the same.
//! 4. `materialize` merges the adapters, which makes the same predictions.

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{
    TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput,
};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use lora_core::{
    Adapt, CounterRng, LoraConfig, LoraError, Quantization, TargetModules, linear_layers,
};

mod shared;

/// Tokens that exist, tokens of a sequence, width of the model.
const TOKENS: usize = 32;
const LENGTH: usize = 15;
const WIDTH: usize = 32;

#[derive(Parser)]
struct Args {
    /// cpu; with the feature of the same name also wgpu, vulkan, metal or cuda
    #[arg(long, default_value = "cpu")]
    backend: String,
}

/// The model as a user of Burn writes it.
#[derive(Module, Debug)]
struct Majority {
    embedding: Embedding,
    encoder: TransformerEncoder,
    head: Linear,
}

impl Majority {
    fn new(device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(TOKENS, WIDTH).init(device),
            encoder: TransformerEncoderConfig::new(WIDTH, 64, 2, 1)
                .with_dropout(0.0)
                .init(device),
            head: LinearConfig::new(WIDTH, 4).init(device),
        }
    }

    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let [sequences, _] = tokens.dims();
        let input = TransformerEncoderInput::new(self.embedding.forward(tokens));
        let encoded = self.encoder.forward(input);
        self.head
            .forward(encoded.mean_dim(1).reshape([sequences, WIDTH]))
    }
}

/// Random sequences, and whether most of their tokens belong to the set. The set has every second token; `moved` by 1,
/// the last half of it is replaced.
fn sequences(
    count: usize,
    moved: usize,
    seed: u64,
    device: &Device,
) -> (Tensor<2, Int>, Tensor<1, Int>) {
    let mut rng = CounterRng::new(seed);
    let belongs = |token: usize| (token + if token < TOKENS / 2 { 0 } else { moved }) % 2;
    let mut tokens = Vec::with_capacity(count * LENGTH);
    let mut labels = Vec::with_capacity(count);
    for _ in 0..count {
        let sequence: Vec<usize> = (0..LENGTH)
            .map(|_| rng.next_u64() as usize % TOKENS)
            .collect();
        let members: usize = sequence.iter().map(|token| belongs(*token)).sum();
        labels.push(i32::from(2 * members > LENGTH));
        tokens.extend(sequence.into_iter().map(|token| token as i32));
    }
    (
        Tensor::from_data(TensorData::new(tokens, [count, LENGTH]), device),
        Tensor::from_data(TensorData::new(labels, [count]), device),
    )
}

/// Trains the trainable parameters of `model`.
fn train(mut model: Majority, moved: usize, rate: f64, device: &Device) -> Majority {
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    let loss = CrossEntropyLossConfig::new().init(device);
    for step in 0..300 {
        let (tokens, labels) = sequences(64, moved, 1_000 + step, device);
        let gradients = loss.forward(model.forward(tokens), labels).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(rate, model, gradients);
    }
    model
}

fn accuracy(model: &Majority, moved: usize, device: &Device) -> f32 {
    let (tokens, labels) = sequences(2_000, moved, 1, device);
    shared::accuracy(model.forward(tokens), labels)
}

fn main() -> Result<(), LoraError> {
    let plain = shared::device(&Args::parse().backend);
    let device = plain.clone().autodiff();
    let base = train(Majority::new(&device), 0, 3e-3, &device);
    let valid = base.valid();
    println!(
        "base model, its own set:      {:5.1} %",
        accuracy(&valid, 0, &plain)
    );
    println!(
        "base model, the new set:      {:5.1} %",
        accuracy(&valid, 1, &plain)
    );

    println!("linear layers: {}", linear_layers(&base).join(", "));
    let config = LoraConfig {
        r: 8,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let adapted = Adapt::new(&config)
        .with_seed(42)
        .with_quantized_base(Quantization::Bits8)
        .apply(base)?;
    let adapted = train(adapted, 1, 1e-2, &device).valid();
    println!(
        "8-bit base and adapters:      {:5.1} %",
        accuracy(&adapted, 1, &plain)
    );

    let (tokens, _) = sequences(2_000, 1, 2, &plain);
    let logits = adapted.forward(tokens.clone());
    let merged = adapted.materialize();
    let difference = (merged.forward(tokens) - logits).abs().max();
    println!(
        "merged into plain weights:    {:5.1} %",
        accuracy(&merged, 1, &plain)
    );
    println!(
        "largest difference of a logit after merging: {:.1e}",
        difference.into_scalar::<f32>()
    );
    Ok(())
}
