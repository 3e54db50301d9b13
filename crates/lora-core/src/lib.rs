//! LoRA over frozen, optionally 8-bit weights, for any Burn model on any Burn device.
//!
//! | item | file | what it is |
//! | --- | --- | --- |
//! | [`LoraConfig`], [`TargetModules`], [`Init`] | `config.rs` | what to adapt and how, with PEFT's names and meaning |
//! | [`LoraLinear`] | `linear.rs` | a Burn `Module` made from a `Linear`: `h = x·W₀ + γ·(x·A)·B` |
//! | [`LoraLinear::forward`] | `autodiff.rs` | its forward pass in Burn's autodiff graph |
//! | [`adapt`], [`Adapt`] | `adapt.rs` | adapters in any Burn module, by the names of its layers |
//! | [`LinearGroup`] | `manual.rs` | the manual forward and backward pass, without a graph, for trainers |
//! | [`Trained`] | `whole.rs` | biases and whole weights that are trained themselves |
//! | [`Factors`] | `initial.rs` | PiSSA and OLoRA: adapters that are a part of the weight |
//! | [`best_factors`] | `svd.rs` | singular values; the best approximation by a lower rank |
//! | [`AdapterDropout`] | `dropout.rs` | dropout of the adapter's input |
//! | [`Method`], [`Adapter`] | `method/` | the methods (LoRA, DoRA, VeRA), each in a file, and what each is asked for |
//! | [`merge`](LoraLinear::merge), [`unmerge`](LoraLinear::unmerge) | `merge.rs` | adds the adapter to a plain `Linear`, or subtracts it |
//! | [`ModuleSelector`] | `selector.rs` | which modules of a model a configuration selects |
//! | [`ParameterCounts`] | `count.rs` | trainable and frozen parameters from shapes alone |
//! | [`LoraError`] | `error.rs` | what can be wrong |
//! | [`kernels`] | crate `kernels` | the operations underneath: products with frozen weights, 8- and 4-bit quantization |
//!
//! This crate does not depend on Llama, on files or on command lines, and names no backend: crate [`kernels`] chooses
//! the implementation by the device of the tensors.
//!
//! ```
//! use burn::nn::LinearConfig;
//! use burn::tensor::{Device, Tensor};
//! use lora_core::{LoraConfig, LoraLinear, Quantization};
//!
//! let device = Device::flex().autodiff();
//! let linear = LinearConfig::new(64, 64).init(&device);
//! let config = LoraConfig { r: 4, ..LoraConfig::default() };
//! let layer = LoraLinear::new(linear, &config, 42)?.quantize(Quantization::Bits8)?;
//! let y = layer.forward(Tensor::<2>::ones([3, 64], &device));
//! let gradients = y.sum().backward();
//! let [a, b] = layer.adapter().expect("an adapter").factors();
//! assert!(a.grad(&gradients).is_some() && b.grad(&gradients).is_some());
//! assert!(layer.weight.base().grad(&gradients).is_none());
//! # Ok::<(), lora_core::LoraError>(())
//! ```

mod adapt;
mod autodiff;
mod config;
mod count;
mod dropout;
mod error;
mod initial;
mod linear;
mod manual;
mod merge;
mod method;
mod selector;
mod svd;
mod whole;

pub use adapt::{
    Adapt, Attached, ModulePath, adapt, attached_parameters, linear_layer_dims, linear_layers,
    map_linear_weights,
};
pub use config::{Bias, ExcludeModules, Init, LoraConfig, TargetModules};
pub use count::{ModuleShape, ParameterCounts};
pub use dropout::AdapterDropout;
pub use error::LoraError;
pub use initial::Factors;
pub use kernels::{
    self, BLOCK, CounterRng, IntegerWeight, Quantization, QuantizationError, frozen_linear,
    frozen_linear_backward, quantize, quantize_data, spoil,
};
pub use linear::LoraLinear;
pub use manual::{LinearGroup, LinearInput, LowRank};
pub use method::{Accumulate, Adapter, Dora, Facts, Method, Scaling, Vector, Vera, Width};
pub use selector::ModuleSelector;
pub use svd::best_factors;
pub use whole::{Trained, column_sums};
