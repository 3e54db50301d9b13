//! The arithmetic of a training step: from a batch to updated adapters. Files, screens and configurations are not part
//! of it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`loss`] | cross entropy over the supervised positions, in pieces |
//! | [`gradients`] | the passes over a batch, gradients summed over micro-batches |
//! | [`loss_scale`] | the factor that keeps gradients within f16's range |
//! | [`optimizer`] | AdamW over one flat buffer |
//! | [`step_counts`] | launches, uploads, reads and bytes of a step |

mod flat;
pub mod gradients;
pub mod loss;
pub mod loss_scale;
pub mod optimizer;
pub mod step_counts;

pub use flat::{FlatGradients, joined, places};
