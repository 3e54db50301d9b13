//! One AdamW update of all parameters as one flat tensor (Loshchilov and Hutter, 2019,
//! <https://arxiv.org/abs/1711.05101>).

use burn::optim::{AdamW, AdaptiveMomentumState};
use burn::tensor::Tensor;

use crate::dispatch::of;

/// Both moments of the parameters and the number of updates.
pub type AdamWState = AdaptiveMomentumState<1>;

/// The updated parameters and state; without a state, the first update.
///
/// # Shapes
///
/// - `parameters`, `gradients`, output: `[count]`, f32
pub fn adamw(
    adamw: &AdamW,
    learning_rate: f64,
    parameters: Tensor<1>,
    gradients: Tensor<1>,
    state: Option<AdamWState>,
) -> (Tensor<1>, Option<AdamWState>) {
    of(&parameters).adamw(adamw, learning_rate, parameters, gradients, state)
}
