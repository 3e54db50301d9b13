//! One AdamW update of all parameters as one flat tensor, and the norm of their gradients (Loshchilov and Hutter, 2019,
//! <https://arxiv.org/abs/1711.05101>).

use burn::optim::{AdamWConfig, AdaptiveMomentumState};
use burn::tensor::Tensor;

use crate::dispatch::of;

/// Both moments of the parameters and the number of updates.
pub type AdamWState = AdaptiveMomentumState<1>;

/// AdamW's settings except the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the first moment, the mean of gradients.
    pub beta_1: f32,
    /// Decay of the second moment, the mean of squared gradients.
    pub beta_2: f32,
    /// Added to the denominator, so that it is not zero.
    pub epsilon: f32,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f32,
}

impl AdamWSettings {
    /// Burn's optimizer with these settings.
    pub fn config(&self) -> AdamWConfig {
        AdamWConfig::new()
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay)
            .with_cautious_weight_decay(false)
            .with_amsgrad(false)
            .with_grad_clipping(None)
    }
}

/// Numbers whose sum is the sum of the squares of `values`, `[count]`. They are added on the host, in their order.
pub fn sums_of_squares(values: &Tensor<1>) -> Tensor<1> {
    of(values).sums_of_squares(values)
}

/// The updated parameters and state; without a state, the first update. The gradients are multiplied by `factor`: the
/// step's divisor and clipping.
///
/// # Shapes
///
/// - `parameters`, `gradients`, output: `[count]`, f32
pub fn adamw(
    settings: AdamWSettings,
    learning_rate: f64,
    factor: f64,
    parameters: Tensor<1>,
    gradients: Tensor<1>,
    state: Option<AdamWState>,
) -> (Tensor<1>, Option<AdamWState>) {
    of(&parameters).adamw(
        settings,
        learning_rate,
        factor,
        parameters,
        gradients,
        state,
    )
}
