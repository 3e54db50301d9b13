//! Adapts the linear layers of a convolutional classifier, by their names.
//!
//! ```text
//! cargo run --release -p lora-core --example adapt_convolution -- --backend cpu
//! cargo run --release -p lora-core --example adapt_convolution --features wgpu -- --backend wgpu
//! ```
//!
//! 1. A small convolutional network learns which shape is in an image: a horizontal bar, a vertical bar or a cross.
//! 2. The images are turned by 45 degrees. The model is now often wrong.
//! 3. `adapt` puts adapters of rank 4 on `hidden`, and trains the output layer `head` as a whole (`modules_to_save`). The
//!    convolutions stay as they are.

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use lora_core::{CounterRng, LoraConfig, LoraError, TargetModules, adapt};

mod shared;

/// Pixels of an image's side.
const SIDE: usize = 10;

#[derive(Parser)]
struct Args {
    /// cpu; with the feature of the same name also wgpu, vulkan, metal or cuda
    #[arg(long, default_value = "cpu")]
    backend: String,
}

/// The model as a user of Burn writes it.
#[derive(Module, Debug)]
struct Shapes {
    first: Conv2d,
    second: Conv2d,
    hidden: Linear,
    head: Linear,
}

impl Shapes {
    fn new(device: &Device) -> Self {
        let convolution = |channels| Conv2dConfig::new(channels, [3, 3]).with_stride([1, 1]);
        Self {
            first: convolution([1, 8]).init(device),
            second: convolution([8, 8]).with_stride([2, 2]).init(device),
            hidden: LinearConfig::new(8 * 3 * 3, 32).init(device),
            head: LinearConfig::new(32, 3).init(device),
        }
    }

    /// Logits from images, `[images, 1, SIDE, SIDE]`.
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = relu(self.second.forward(relu(self.first.forward(images))));
        self.head
            .forward(relu(self.hidden.forward(x.flatten(1, 3))))
    }
}

/// Noisy images of shapes at random places, turned by `angle`, and the shape of each.
fn images(count: usize, angle: f64, seed: u64, device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    let mut rng = CounterRng::new(seed);
    let (sin, cos) = angle.sin_cos();
    let mut pixels = Vec::with_capacity(count * SIDE * SIDE);
    let mut shapes = Vec::with_capacity(count);
    for index in 0..count {
        let shape = index % 3;
        let center = [(); 2].map(|()| 3.5 + 2.0 * rng.uniform());
        for row in 0..SIDE {
            for column in 0..SIDE {
                let (y, x) = (row as f64 - center[0], column as f64 - center[1]);
                let (along, across) = (cos * x + sin * y, cos * y - sin * x);
                let bar = |along: f64, across: f64| along.abs() < 3.5 && across.abs() < 0.8;
                let (horizontal, vertical) = (bar(along, across), bar(across, along));
                let inside = [horizontal, vertical, horizontal || vertical][shape];
                pixels.push(f32::from(u8::from(inside)) + 0.3 * rng.normal() as f32);
            }
        }
        shapes.push(shape as i32);
    }
    (
        Tensor::from_data(TensorData::new(pixels, [count, 1, SIDE, SIDE]), device),
        Tensor::from_data(TensorData::new(shapes, [count]), device),
    )
}

/// Trains the trainable parameters of `model`.
fn train(mut model: Shapes, angle: f64, device: &Device) -> Shapes {
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    let loss = CrossEntropyLossConfig::new().init(device);
    for step in 0..150 {
        let (images, shapes) = images(96, angle, 1_000 + step, device);
        let gradients = loss.forward(model.forward(images), shapes).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(5e-3, model, gradients);
    }
    model
}

fn accuracy(model: &Shapes, angle: f64, device: &Device) -> f32 {
    let (images, shapes) = images(1_500, angle, 1, device);
    shared::accuracy(model.forward(images), shapes)
}

fn main() -> Result<(), LoraError> {
    let plain = shared::device(&Args::parse().backend);
    let device = plain.clone().autodiff();
    let turned = 45f64.to_radians();
    let base = train(Shapes::new(&device), 0.0, &device);
    let valid = base.valid();
    println!(
        "base model, upright:  {:5.1} %",
        accuracy(&valid, 0.0, &plain)
    );
    println!(
        "base model, turned:   {:5.1} %",
        accuracy(&valid, turned, &plain)
    );

    let config = LoraConfig {
        r: 4,
        target_modules: TargetModules::Names(vec!["hidden".into()]),
        modules_to_save: vec!["head".into()],
        ..LoraConfig::default()
    };
    let parameters = base.num_params();
    let adapted = adapt(base, &config)?;
    println!(
        "parameters of the adapter: {}, beside {parameters} of the model",
        adapted.num_params() - parameters
    );
    let adapted = train(adapted, turned, &device).valid();
    println!(
        "adapted, turned:      {:5.1} %",
        accuracy(&adapted, turned, &plain)
    );
    println!(
        "merged, turned:       {:5.1} %",
        accuracy(&adapted.materialize(), turned, &plain)
    );
    Ok(())
}
