//! LoRA over frozen, optionally 8-bit weights, for any Burn model on any Burn device.
//!
//! | item | what it is |
//! | --- | --- |
//! | [`LoraConfig`], [`TargetModules`], [`Init`] | what to adapt and how, with PEFT's names and meaning |
//! | [`LoraLinear`] | a Burn `Module` made from a `Linear`: `h = x·W₀ + γ·(x·A)·B` |
//! | [`Dora`] | what makes such an adapter a DoRA: a trained magnitude per output |
//! | [`LinearGroup`] | the same layers' forward and backward pass without an autodiff graph, for trainers |
//! | [`merge`](LoraLinear::merge), [`unmerge`](LoraLinear::unmerge) | between adapters and plain `Linear`s |
//! | [`ModuleSelector`] | which modules of a model a configuration selects |
//! | [`ParameterCounts`] | trainable and frozen parameters from shapes alone |
//! | [`kernels`] | the operations underneath: products with frozen weights, 8- and 4-bit quantization |
//!
//! This crate does not depend on Llama, on files or on command lines, and names no backend: crate [`kernels`] runs each
//! operation where its tensors are.
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
//! let (a, b) = layer.adapter().map(|x| (x.a.val(), x.b.val())).expect("an adapter");
//! assert!(a.grad(&gradients).is_some() && b.grad(&gradients).is_some());
//! assert!(layer.weight.base().grad(&gradients).is_none());
//! # Ok::<(), lora_core::LoraError>(())
//! ```

mod autodiff;
mod config;
mod count;
mod dora;
mod dropout;
mod error;
mod linear;
mod manual;
mod merge;
mod selector;

pub use config::{Bias, ExcludeModules, Init, LoraConfig, TargetModules};
pub use count::{ModuleShape, ParameterCounts};
pub use dora::Dora;
pub use dropout::AdapterDropout;
pub use error::LoraError;
pub use kernels::{
    self, BLOCK, CounterRng, IntegerWeight, Quantization, QuantizationError, frozen_linear,
    frozen_linear_backward, quantize, quantize_data, spoil,
};
pub use linear::LoraLinear;
pub use manual::{LinearGroup, LowRank};
pub use selector::ModuleSelector;
