//! Many tensors joined into one flat tensor.

use burn::module::ParamId;
use burn::tensor::{Shape, Tensor};

/// The gradients of many parameters, joined.
#[derive(Debug, Clone, Default)]
pub struct FlatGradients {
    /// The parameters, in the gradients' order.
    pub ids: Vec<ParamId>,
    /// Their gradients, row-major, before the multiplication by `factor`; `None` without parameters.
    pub values: Option<Tensor<1>>,
    /// What the optimizer multiplies the gradients by: the step's divisor and clipping. Another pass over the gradients
    /// would cost as much as a third of the update.
    pub factor: f64,
}

/// Tensors joined per launch: with the output, as many buffers as every WebGPU device binds to a kernel.
const AT_ONCE: usize = 7;

/// Joins tensors in their order, in few kernel launches.
///
/// # Panics
///
/// If there are no tensors.
pub fn joined(mut parts: Vec<Tensor<1>>) -> Tensor<1> {
    assert!(!parts.is_empty(), "nothing to join");
    while parts.len() > 1 {
        let mut rest = parts.into_iter();
        let mut fewer = Vec::new();
        loop {
            let group: Vec<Tensor<1>> = rest.by_ref().take(AT_ONCE).collect();
            match group.len() {
                0 => break,
                1 => fewer.extend(group),
                _ => fewer.push(Tensor::cat(group, 0)),
            }
        }
        parts = fewer;
    }
    parts.remove(0)
}

/// The range of each of these shapes in the flat tensor.
pub fn places(shapes: &[Shape]) -> Vec<std::ops::Range<usize>> {
    let mut start = 0;
    shapes
        .iter()
        .map(|shape| {
            let end = start + shape.num_elements();
            std::mem::replace(&mut start, end)..end
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn many_tensors_are_joined_in_their_order() {
        let device = Device::flex();
        for count in [1, 6, 7, 8, 50, 120] {
            let part = |i: usize| Tensor::<1>::full([1 + i % 3], i as f32, &device);
            let all = joined((0..count).map(part).collect());
            let expected: Vec<f32> = (0..count).flat_map(|i| vec![i as f32; 1 + i % 3]).collect();
            assert_eq!(all.into_data().try_to_vec::<f32>().unwrap(), expected);
        }
    }
}
