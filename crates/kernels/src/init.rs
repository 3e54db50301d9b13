//! Initial values, drawn on the host so that every device starts from the same numbers.

use burn::tensor::{Device, Tensor, TensorData};

use crate::CounterRng;

/// PEFT's initialization of `A`: Kaiming-uniform with a = √5 over `[d_in, r]`, that is uniform in ±1/√d_in.
///
/// # Shapes
///
/// - output: `[d_in, r]`, f32
pub fn kaiming_uniform(d_in: usize, r: usize, rng: &mut CounterRng, device: &Device) -> Tensor<2> {
    let bound = 1.0 / (d_in as f64).sqrt();
    draw([d_in, r], device, || bound * (2.0 * rng.uniform() - 1.0))
}

/// Normal values with mean 0 and the given standard deviation.
///
/// # Shapes
///
/// - output: `shape`, f32
pub fn normal(shape: [usize; 2], std: f64, rng: &mut CounterRng, device: &Device) -> Tensor<2> {
    draw(shape, device, || std * rng.normal())
}

fn draw(shape: [usize; 2], device: &Device, mut next: impl FnMut() -> f64) -> Tensor<2> {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| next() as f32).collect();
    Tensor::from_data(
        TensorData::new(values, shape),
        (device, burn::tensor::DType::F32),
    )
}
