//! Adapts a Burn model that is not a Llama: a classifier of points on a plane, 8-bit base, LoRA, merged. With `LoraLinear`
//! in place of `Linear`, no dense weight is built; `adapt_transformer.rs` keeps the model's type.
//!
//! ```text
//! cargo run --release -p lora-core --example adapt_classifier -- --backend cpu
//! cargo run --release -p lora-core --example adapt_classifier --features wgpu -- --backend wgpu
//! ```
//!
//! 1. A plain Burn model learns to classify points by the spiral arm they are on; there are three arms.
//! 2. The plane is rotated by 40 degrees: the model is now often wrong.
//! 3. Its layers are quantized to 8 bits and frozen, and adapters of rank 4 learn the rotated plane.
//! 4. The adapters are merged into a plain Burn model again, which makes the same predictions.

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use lora_core::{CounterRng, LoraConfig, LoraError, LoraLinear, Quantization};

mod shared;

#[derive(Parser)]
struct Args {
    /// cpu; with the feature of the same name also wgpu, vulkan, metal or cuda
    #[arg(long, default_value = "cpu")]
    backend: String,
}

/// The model as a user of Burn writes it.
#[derive(Module, Debug)]
struct Classifier {
    input: Linear,
    hidden: Linear,
    output: Linear,
}

impl Classifier {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = relu(self.input.forward(x));
        let x = relu(self.hidden.forward(x));
        self.output.forward(x)
    }
}

/// The same model with `LoraLinear` in place of `Linear`: nothing else changes.
#[derive(Module, Debug)]
struct AdaptedClassifier {
    input: LoraLinear,
    hidden: LoraLinear,
    output: LoraLinear,
}

impl AdaptedClassifier {
    /// Freezes and quantizes every layer and gives each a new adapter.
    fn new(base: Classifier, config: &LoraConfig) -> Result<Self, LoraError> {
        let adapt =
            |linear, seed| LoraLinear::new(linear, config, seed)?.quantize(Quantization::Bits8);
        Ok(Self {
            input: adapt(base.input, 1)?,
            hidden: adapt(base.hidden, 2)?,
            output: adapt(base.output, 3)?,
        })
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = relu(self.input.forward(x));
        let x = relu(self.hidden.forward(x));
        self.output.forward(x)
    }

    fn merge(&self) -> Classifier {
        Classifier {
            input: self.input.merge(),
            hidden: self.hidden.merge(),
            output: self.output.merge(),
        }
    }
}

/// Points on three spiral arms, rotated by `angle`, and the arm of each.
fn spirals(count: usize, angle: f64, seed: u64, device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    let mut rng = CounterRng::new(seed);
    let mut points = Vec::with_capacity(2 * count);
    let mut arms = Vec::with_capacity(count);
    for index in 0..count {
        let (arm, radius) = (index % 3, rng.uniform());
        let theta =
            angle + 4.0 * radius + arm as f64 * std::f64::consts::TAU / 3.0 + 0.1 * rng.normal();
        points.extend([(radius * theta.cos()) as f32, (radius * theta.sin()) as f32]);
        arms.push(arm as i32);
    }
    (
        Tensor::from_data(TensorData::new(points, [count, 2]), device),
        Tensor::from_data(TensorData::new(arms, [count]), device),
    )
}

/// Trains the trainable parameters of `model`.
fn train<M: Module>(
    mut model: M,
    forward: impl Fn(&M, Tensor<2>) -> Tensor<2>,
    angle: f64,
    device: &Device,
) -> M {
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    let loss = CrossEntropyLossConfig::new().init(device);
    for step in 0..400 {
        let (x, arms) = spirals(256, angle, 1_000 + step, device);
        let gradients = loss.forward(forward(&model, x), arms).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(5e-3, model, gradients);
    }
    model
}

fn main() -> Result<(), LoraError> {
    let plain = shared::device(&Args::parse().backend);
    let device = plain.clone().autodiff();
    let rotation = 40f64.to_radians();
    let (x, arms) = spirals(3_000, 0.0, 1, &plain);
    let (x_rotated, arms_rotated) = spirals(3_000, rotation, 2, &plain);

    let base = Classifier {
        input: LinearConfig::new(2, 64).init(&device),
        hidden: LinearConfig::new(64, 64).init(&device),
        output: LinearConfig::new(64, 4).init(&device),
    };
    let base = train(base, Classifier::forward, 0.0, &device);
    let valid = base.valid();
    println!(
        "base model, original plane:        {:5.1} %",
        shared::accuracy(valid.forward(x), arms)
    );
    let before = shared::accuracy(valid.forward(x_rotated.clone()), arms_rotated.clone());
    println!("base model, rotated plane:         {before:5.1} %");

    let config = LoraConfig {
        r: 4,
        ..LoraConfig::default()
    };
    let adapted = AdaptedClassifier::new(base, &config)?;
    let adapted = train(adapted, AdaptedClassifier::forward, rotation, &device);
    let logits = adapted.valid().forward(x_rotated.clone());
    println!(
        "8-bit base and adapters, rotated:  {:5.1} %",
        shared::accuracy(logits.clone(), arms_rotated.clone())
    );

    let merged = adapted.merge();
    let merged_logits = merged.forward(x_rotated);
    let difference = (merged_logits.clone() - logits)
        .abs()
        .max()
        .into_scalar::<f32>();
    println!(
        "merged into a plain Burn model:    {:5.1} %",
        shared::accuracy(merged_logits, arms_rotated)
    );
    println!("largest difference of a logit after merging: {difference:.1e}");
    Ok(())
}
