//! AdamW (Loshchilov and Hutter, 2019, <https://arxiv.org/abs/1711.05101>): Burn's, with every
//! hyper-parameter given, because Burn's defaults are not PyTorch's.

use burn::optim::{AdamWConfig, ModuleOptimizer};

/// AdamW's hyper-parameters, but for the learning rate, which the schedule gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta_1: f64,
    /// Decay of the mean of squared gradients.
    pub beta_2: f64,
    /// Keeps the division away from zero.
    pub epsilon: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's, without weight decay: β 0.9 and 0.999, ε 1e-8.
    fn default() -> Self {
        Self {
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
        }
    }
}

impl AdamW {
    /// An optimizer without state. Clipping is not its affair: Burn clips each tensor by itself, PyTorch
    /// all together ([`AdapterGradients::into_mean`](crate::gradients::AdapterGradients::into_mean)).
    pub fn init(&self) -> ModuleOptimizer {
        AdamWConfig::new()
            .with_beta_1(self.beta_1 as f32)
            .with_beta_2(self.beta_2 as f32)
            .with_epsilon(self.epsilon as f32)
            .with_weight_decay(self.weight_decay as f32)
            .with_cautious_weight_decay(false)
            .with_amsgrad(false)
            .with_grad_clipping(None)
            .init()
    }
}
