//! Burn's AdamW.

use burn::optim::{AdamWState as BurnState, Optimizer as _};
use burn::tensor::Tensor;

use crate::adamw::{AdamWSettings, AdamWState};

pub fn step(
    settings: AdamWSettings,
    learning_rate: f64,
    factor: f64,
    parameters: Tensor<1>,
    gradients: Tensor<1>,
    state: Option<AdamWState>,
) -> (Tensor<1>, Option<AdamWState>) {
    let (state, gradients) = (state.map(BurnState::new), gradients.mul_scalar(factor));
    let adamw = settings.config().build();
    let (parameters, state) = adamw.step(learning_rate, parameters, gradients, state);
    (parameters, state.map(|state| state.momentum))
}
