//! The model's forward and backward passes without an autodiff graph: what training and generation run.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `layer.rs` | [`LayerPass`]: a decoder layer forward and backward |
//! | `model.rs` | embeddings, final norm and output layer |
//! | `head.rs` | the adapter of the output layer |
//! | [`operations`] | the operations of a layer one by one, for checks of a device |

mod head;
mod layer;
mod model;
pub mod operations;

pub use layer::{Activations, LayerPass};
pub use model::ManualInputs;
