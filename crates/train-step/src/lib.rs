//! The arithmetic of a training step: from a batch to updated adapters. Files, screens and configurations are not part
//! of it.
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`gradients`] | gradients summed over micro-batches, averaged and clipped |
//! | `manual.rs` | the forward and backward pass that training runs, and the loss in chunks of positions |
//! | `autodiff.rs` | the same passes in Burn's autodiff graph, for comparison |
//! | [`loss`] | sums of the loss, on the device and read back to the host |
//! | [`loss_scale`] | the factor that keeps gradients within f16's range |
//! | [`optimizer`] | AdamW over one flat tensor |
//! | `groups.rs` | parameters with other settings of the optimizer: learning rate, weight decay
//! | `loraplus.rs` | LoRA+: a learning rate of its own for B |
//! | `flat.rs` | many tensors joined into one |
//! | [`step_counts`] | launches, uploads, reads and bytes of a step |

mod autodiff;
mod flat;
pub mod gradients;
mod groups;
mod loraplus;
pub mod loss;
pub mod loss_scale;
mod manual;
pub mod optimizer;
pub mod step_counts;

pub use flat::{FlatGradients, joined, places};
pub use groups::undecayed;
pub use loraplus::loraplus_rates;
