//! What the examples share: a device by its name, and the accuracy of logits.

use burn::tensor::{Device, Int, Tensor};

/// The device of this name. Exits if this build has none.
pub fn device(backend: &str) -> Device {
    match backend {
        "cpu" => Device::flex(),
        #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
        "wgpu" => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::vulkan(burn::tensor::DeviceKind::DefaultDevice),
        #[cfg(feature = "metal")]
        "metal" => Device::metal(burn::tensor::DeviceKind::DefaultDevice),
        #[cfg(feature = "cuda")]
        "cuda" => Device::cuda(0),
        _ => {
            eprintln!(
                "no backend {backend:?} in this build; use cpu, or build with --features {backend}"
            );
            std::process::exit(2);
        }
    }
}

/// The share of rows whose largest logit is that of the label, in percent.
pub fn accuracy(logits: Tensor<2>, labels: Tensor<1, Int>) -> f32 {
    let count = labels.dims()[0];
    let hits = logits
        .argmax(1)
        .reshape([count])
        .equal(labels)
        .float()
        .sum();
    100.0 * hits.into_scalar::<f32>() / count as f32
}
