//! Burn's AdamW.

use burn::optim::{AdamW, AdamWState as BurnState, Optimizer as _};
use burn::tensor::Tensor;

use crate::adamw::AdamWState;

pub fn step(
    adamw: &AdamW,
    learning_rate: f64,
    parameters: Tensor<1>,
    gradients: Tensor<1>,
    state: Option<AdamWState>,
) -> (Tensor<1>, Option<AdamWState>) {
    let state = state.map(BurnState::new);
    let (parameters, state) = adamw.step(learning_rate, parameters, gradients, state);
    (parameters, state.map(|state| state.momentum))
}
