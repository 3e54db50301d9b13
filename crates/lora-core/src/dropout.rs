//! Dropout on the adapter's input, with masks that a seed fixes.

use std::sync::atomic::{AtomicU64, Ordering};

use burn::module::{Flag, Module, Param};
use burn::tensor::{Tensor, TensorData};

use crate::CounterRng;

/// Zeroes elements of the adapter's input in training and scales the rest by `1/(1 - prob)`.
///
/// Differs from `burn::nn::Dropout` in one point: the mask comes from a seed on the host, not from
/// the device's generator. So a layer that is run again during the backward pass drops the same
/// elements, and every backend drops the same ones.
#[derive(Module, Debug)]
pub struct AdapterDropout {
    /// Probability of dropping an element, in `[0, 1)`.
    pub prob: f64,
    /// Whether to behave as in training; `valid()` and `freeze()` clear it.
    pub training: Param<Flag>,
}

/// Seeds for calls that bring none.
static NEXT_SEED: AtomicU64 = AtomicU64::new(0);

impl AdapterDropout {
    /// Dropout with this probability, in training state.
    pub fn new(prob: f64) -> Self {
        Self {
            prob,
            training: Param::from_bool(true),
        }
    }

    /// Whether a call on `x` drops anything: training state, a probability, and a tape.
    pub fn is_active<const D: usize>(&self, x: &Tensor<D>) -> bool {
        self.prob > 0.0 && self.training.is_enabled() && x.is_autodiff()
    }

    /// Drops elements of `x`; the mask depends on `seed` and the shape only.
    ///
    /// Without a seed each call draws a mask of its own.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, d]`
    /// - output: `[n, d]`
    pub fn forward(&self, x: Tensor<2>, seed: Option<u64>) -> Tensor<2> {
        if !self.is_active(&x) {
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
        x * Tensor::from_inner(mask)
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
    fn validation_and_tensors_without_a_tape_drop_nothing() {
        let dropout = AdapterDropout::new(0.5);
        let plain = Tensor::<2>::ones([4, 4], &Device::flex());
        let tracked = Tensor::<2>::ones([4, 4], &Device::flex().autodiff());
        for y in [
            dropout.forward(plain, Some(1)),
            dropout.valid().forward(tracked, Some(1)),
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
}
