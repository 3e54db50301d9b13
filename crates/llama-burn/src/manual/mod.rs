//! The manual passes: the model's forward and backward pass without an autodiff graph, for training and inference.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `layer.rs` | [`LayerPass`]: a decoder layer forward and backward |
//! | `model.rs` | the batch on the device, embeddings, final norm and output layer |
//! | `head.rs` | the adapter of the output layer |
//! | [`operations`] | the operations of a layer one by one, for checks of a device against the CPU |

mod head;
mod layer;
mod model;
pub mod operations;

pub use layer::{Activations, HiddenGradient, LayerPass};
pub use model::ManualInputs;
