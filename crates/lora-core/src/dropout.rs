//! Dropout of the adapter's input, with masks that a seed fixes.

use std::sync::atomic::{AtomicU64, Ordering};

use burn::module::{Flag, Module, Param};
use burn::tensor::{Tensor, TensorData};

use kernels::CounterRng;

/// Zeroes elements of the adapter's input in training and scales the rest by `1/(1 - prob)`.
///
/// Differs from `burn::nn::Dropout` in one point: the mask comes from a seed on the host, not from the device's
/// generator. A layer that runs again during the backward pass therefore drops the same elements, and so does every
/// backend.
#[derive(Module, Debug)]
pub struct AdapterDropout {
    /// Probability of dropping an element, in `[0, 1)`.
    pub prob: f64,
    /// Whether to behave as in training; `valid()` and `freeze()` clear it.
    pub training: Param<Flag>,
}

/// Seeds for calls without a seed.
static NEXT_SEED: AtomicU64 = AtomicU64::new(0);

impl AdapterDropout {
    /// Dropout with this probability, in training state.
    pub fn new(prob: f64) -> Self {
        Self {
            prob,
            training: Param::from_bool(true),
        }
    }

    /// Whether [`forward`](Self::forward) drops anything.
    pub(crate) fn acts(&self, x: &Tensor<2>, seed: Option<u64>) -> bool {
        let in_training = self.training.is_enabled() && x.is_autodiff();
        self.prob > 0.0 && (seed.is_some() || in_training)
    }

    /// Drops elements of `x`.
    ///
    /// With a seed it always drops, and the mask depends on `seed` and the shape only: the manual passes train outside
    /// an autodiff graph. Without a seed it behaves as `burn::nn::Dropout`: it drops in training state and in an
    /// autodiff graph only, and each call draws a new mask.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, d]`
    /// - output: `[n, d]`
    pub fn forward(&self, x: Tensor<2>, seed: Option<u64>) -> Tensor<2> {
        if !self.acts(&x, seed) {
            return x;
        }
        let seed = seed.unwrap_or_else(|| NEXT_SEED.fetch_add(1, Ordering::Relaxed));
        let mut rng = CounterRng::new(seed);
        let keep = (1.0 / (1.0 - self.prob)) as f32;
        let [n, d] = x.dims();
        let mask: Vec<f32> = (0..n * d)
            .map(|_| if rng.uniform() < self.prob { 0.0 } else { keep })
            .collect();
        let options = (&x.device().without_autodiff(), x.dtype());
        let mask = Tensor::<2>::from_data(TensorData::new(mask, [n, d]), options);
        x * mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn a_seed_fixes_the_mask_and_the_mean_is_kept() {
        let x = Tensor::<2>::ones([200, 200], &Device::flex().autodiff());
        let dropout = AdapterDropout::new(0.25);
        let run = |seed| {
            dropout
                .forward(x.clone(), seed)
                .into_data()
                .try_to_vec::<f32>()
                .unwrap()
        };
        assert_eq!(run(Some(3)), run(Some(3)));
        assert_ne!(run(Some(3)), run(Some(4)));
        assert_ne!(run(None), run(None));
        let mean = run(Some(3)).iter().sum::<f32>() / 40_000.0;
        // The standard error of the mean is sqrt(p/(1-p)/n) = 0.003; five of them.
        assert!((mean - 1.0).abs() < 0.015, "{mean}");
    }

    #[test]
    fn validation_and_tensors_outside_an_autodiff_graph_drop_nothing() {
        let dropout = AdapterDropout::new(0.5);
        let plain = Tensor::<2>::ones([4, 4], &Device::flex());
        let tracked = Tensor::<2>::ones([4, 4], &Device::flex().autodiff());
        for y in [
            dropout.forward(plain, None),
            dropout.valid().forward(tracked, None),
        ] {
            assert!(
                y.into_data()
                    .try_to_vec::<f32>()
                    .unwrap()
                    .iter()
                    .all(|v| *v == 1.0)
            );
        }
    }

    #[test]
    fn a_seed_drops_the_same_elements_inside_and_outside_an_autodiff_graph() {
        let dropout = AdapterDropout::new(0.5);
        let plain = Tensor::<2>::ones([8, 8], &Device::flex());
        let outside = dropout.valid().forward(plain.clone(), Some(1));
        let inside = dropout.forward(plain.autodiff(), Some(1)).inner();
        outside
            .into_data()
            .assert_eq(&inside.clone().into_data(), true);
        assert!(
            inside
                .into_data()
                .try_to_vec::<f32>()
                .unwrap()
                .contains(&0.0)
        );
    }
}
