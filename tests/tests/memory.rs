//! The memory that a deep quantized stack holds between its forward and its backward pass, counted
//! byte by byte.
//!
//! Only one test: the counting allocator counts every thread of the process.

use burn::module::{Lora, Module, QLora, Quantizer};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::quantization::{Calibration, QuantScheme, QuantValue, ScaleDtype};
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::{CounterRng, LoraConfig, LoraLinear, Quantization};
use tests::allocator::CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const LAYERS: usize = 24;
const WIDTH: usize = 256;
const ROWS: usize = 4;
/// The weights of the stack as f32.
const DENSE: usize = LAYERS * WIDTH * WIDTH * 4;

fn linears(device: &Device) -> Vec<Linear> {
    let config = LinearConfig::new(WIDTH, WIDTH).with_bias(false);
    (0..LAYERS).map(|_| config.init(device)).collect()
}

fn input(device: &Device) -> Tensor<2> {
    let mut rng = CounterRng::new(1);
    let values: Vec<f32> = (0..ROWS * WIDTH).map(|_| rng.normal() as f32).collect();
    // As in the middle of a deeper model: without a gradient to pass on, no path saves its first
    // weight.
    Tensor::from_data(TensorData::new(values, [ROWS, WIDTH]), device).require_grad()
}

/// The bytes in use after a forward pass that were not in use before it, with only its loss kept;
/// and how much the peak of the backward pass exceeds that.
fn held(forward: impl Fn() -> Tensor<2>) -> (usize, usize) {
    // Once before measuring: thread pools and their buffers stay allocated.
    drop(forward().sum().backward());
    let before = CountingAllocator::bytes_in_use();
    let loss = forward().sum();
    let after = CountingAllocator::bytes_in_use();
    CountingAllocator::reset_peak();
    let gradients = loss.backward();
    let peak = CountingAllocator::peak();
    drop(gradients);
    (after.saturating_sub(before), peak.saturating_sub(after))
}

#[test]
fn the_graph_of_a_quantized_stack_does_not_hold_the_dense_weights_and_burns_does() {
    let device = Device::flex().autodiff();
    let config = LoraConfig {
        r: 4,
        ..LoraConfig::default()
    };

    let ours: Vec<LoraLinear> = linears(&device)
        .into_iter()
        .map(|linear| LoraLinear::frozen(linear).quantize(Quantization::Bits8))
        .map(|layer| layer.and_then(|layer| layer.with_new_adapter(&config, 7)))
        .collect::<Result<_, _>>()
        .expect("a valid configuration");
    let (ours_held, ours_backward) = held(|| {
        ours.iter()
            .fold(input(&device), |x, layer| layer.forward(x))
    });
    drop(ours);

    let scheme = QuantScheme::default()
        .with_value(QuantValue::Q8S)
        .per_block([32], ScaleDtype::F32);
    let qlora = QLora::new(
        Lora::new(4, 16.0),
        Quantizer::new(Calibration::MinMax, scheme),
    );
    let burns = linears(&device).apply_qlora(qlora);
    let (burns_held, burns_backward) = held(|| {
        burns
            .iter()
            .fold(input(&device), |x, layer| layer.forward(x))
    });

    println!(
        "{LAYERS} layers of {WIDTH} x {WIDTH}, dense {DENSE} bytes. Held between forward and backward: \
         lora-core {ours_held}, Burn's apply_qlora {burns_held}. More at the worst moment of backward: \
         {ours_backward}, {burns_backward}."
    );
    assert!(
        ours_held < DENSE / 4,
        "{ours_held} bytes held; the dense weights are {DENSE}"
    );
    assert!(
        ours_backward < DENSE / 4,
        "{ours_backward} bytes more; the dense weights are {DENSE}"
    );
    assert!(
        burns_held > DENSE,
        "{burns_held} bytes: Burn's own path has become better; compare again"
    );
}
