//! LoRA over frozen, optionally 8-bit weights, for any Burn model on any Burn device.
//!
//! | item | what it is |
//! | --- | --- |
//! | [`LoraConfig`], [`TargetModules`], [`Init`] | what to adapt and how, with PEFT's names and meaning |
//! | [`LoraLinear`] | a Burn `Module` made from a `Linear`: `h = x·W₀ + γ·(x·A)·B` |
//! | [`Dora`] | what makes such an adapter a DoRA: trained lengths beside the directions |
//! | [`frozen_linear`] | the product with a frozen weight, dense or quantized; its tape keeps only the packed weight |
//! | [`table_scores`] | the product with an embedding table, which the CPU may hold in 16 bits |
//! | [`LinearGroup`] | the same layers' forward and backward passes written out, for trainers that need no tape |
//! | [`cpu`] | what the CPU kernels are made of |
//! | [`Quantization`], [`quantize`] | 8- or 4-bit weights, the same bytes on every device |
//! | [`IntegerWeight`] | 8-bit weights that another program quantized, as they are |
//! | [`merge`](LoraLinear::merge), [`unmerge`](LoraLinear::unmerge) | between adapters and plain `Linear`s |
//! | [`spoil`] | an operation made wrong on purpose, for tests |
//! | [`ParameterCounts`] | trainable and frozen parameters from shapes alone |
//!
//! This crate knows nothing of Llama, of files or of command lines, and names no backend: the
//! device of a tensor decides where the work runs.
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

mod config;
mod count;
pub mod cpu;
mod dora;
mod dropout;
mod error;
mod frozen_linear;
mod fusion;
mod gpu_products;
mod init;
mod integers;
mod limits;
mod linear;
mod merge;
mod passes;
mod products;
mod quantize;
mod random;
mod selector;
pub mod spoil;

pub use config::{Bias, ExcludeModules, Init, LoraConfig, TargetModules};
pub use count::{ModuleShape, ParameterCounts};
pub use dora::Dora;
pub use dropout::AdapterDropout;
pub use error::LoraError;
pub use frozen_linear::{
    frozen_linear, frozen_linear_backward, has_bf16_products, table_scores, table_scores_backward,
    use_bf16_products,
};
pub use fusion::{Fusion, set_fusion};
pub use gpu_products::{is_exact_f32, product, use_exact_f32};
pub use init::{kaiming_uniform, normal};
pub use integers::IntegerWeight;
pub use limits::{AssumedBuffer, has_f16_matrix_units, has_tf32, largest_buffer, limit_launches};
pub use linear::LoraLinear;
pub use passes::{LinearGroup, LowRank};
pub use products::{multiply_add, multiply_in_f32};
pub use quantize::{
    BLOCK, Quantization, QuantizationError, compact, quantize, quantize_data, quantize_on_device,
};
pub use random::CounterRng;
pub use selector::ModuleSelector;
