//! A factor on the loss that keeps gradients within the range of f16, as torch.amp's `GradScaler` does (Micikevicius et
//! al., 2018, <https://arxiv.org/abs/1710.03740>).
//!
//! f16 has no numbers between 0 and 6e-8 and none above 65,504. The loss is multiplied by a power of two, which changes
//! no digit of the gradients, and gradients are divided by it in f32. If a gradient overflows, the factor is halved and
//! the same step is computed again: unlike with `GradScaler`, no examples are skipped. After 2,000 steps without
//! overflow the factor is doubled.

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

/// Steps after which the factor is doubled: `GradScaler`'s `growth_interval`.
const PATIENCE: usize = 2000;

/// The initial factor. `GradScaler` starts at 65,536 and multiplies a mean; here the loss is a sum, over some dozens of
/// tokens in most runs.
const INITIAL: f64 = 2048.0;

/// The largest factor. The gradient of a logit is at most 1: a larger factor would overflow.
const LARGEST: f64 = 32768.0;

/// A larger factor in a checkpoint is invalid.
const LARGEST_VALID: f64 = (1u64 << 40) as f64;

/// The loss scale of a run, part of its checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// A power of two, at least 1.
    pub factor: f64,
    /// Steps since the factor changed.
    pub steps: usize,
}

impl LossScale {
    /// The initial scale for products in this type; `None` if gradients need no factor.
    pub fn new(dtype: DType) -> Option<Self> {
        (dtype == DType::F16).then_some(Self {
            factor: INITIAL,
            steps: 0,
        })
    }

    /// The scale of a resumed run with products in this type: the checkpoint's if it is valid, else the initial one.
    pub fn of_run(dtype: DType, before: Option<Self>) -> Option<Self> {
        let new = Self::new(dtype)?;
        let possible = |scale: &Self| (1.0..=LARGEST_VALID).contains(&scale.factor);
        Some(before.filter(possible).unwrap_or(new))
    }

    /// The initial factor for products in this type; 1 if gradients need none.
    pub fn first_factor(dtype: DType) -> f64 {
        Self::new(dtype).map_or(1.0, |scale| scale.factor)
    }

    /// The scale after a step without overflow.
    pub fn after_step(self) -> Self {
        if self.steps + 1 < PATIENCE {
            Self {
                steps: self.steps + 1,
                ..self
            }
        } else {
            Self {
                factor: (self.factor * 2.0).min(LARGEST),
                steps: 0,
            }
        }
    }

    /// Half the factor, after an overflow. `None` if the factor is 1, so that it is not the cause.
    pub fn halved(self) -> Option<Self> {
        (self.factor > 1.0).then_some(Self {
            factor: (self.factor / 2.0).max(1.0),
            steps: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_f16_has_a_loss_scale() {
        assert!(LossScale::new(DType::BF16).is_none() && LossScale::new(DType::F32).is_none());
        assert_eq!(LossScale::first_factor(DType::F32), 1.0);
        assert_eq!(LossScale::first_factor(DType::F16), INITIAL);
    }

    #[test]
    fn an_invalid_factor_in_a_checkpoint_is_replaced() {
        let of = |factor| {
            let before = LossScale { factor, steps: 7 };
            LossScale::of_run(DType::F16, Some(before)).unwrap()
        };
        assert_eq!((of(64.0).factor, of(64.0).steps), (64.0, 7));
        for wrong in [f64::NAN, f64::INFINITY, 0.0, -4.0, 1e300] {
            assert_eq!(Some(of(wrong)), LossScale::new(DType::F16), "{wrong}");
        }
        assert_eq!(LossScale::of_run(DType::F32, Some(of(64.0))), None);
    }

    #[test]
    fn the_factor_grows_after_patience_up_to_the_largest_and_is_halved_down_to_one() {
        let mut scale = LossScale::new(DType::F16).unwrap();
        for _ in 0..PATIENCE - 1 {
            scale = scale.after_step();
        }
        assert_eq!((scale.factor, scale.steps), (INITIAL, PATIENCE - 1));
        scale = scale.after_step();
        assert_eq!((scale.factor, scale.steps), (2.0 * INITIAL, 0));
        for _ in 0..5 * PATIENCE {
            scale = scale.after_step();
        }
        assert_eq!(scale.factor, LARGEST);
        let mut halvings = 0;
        while let Some(half) = scale.halved() {
            assert_eq!((half.factor, half.steps), (scale.factor / 2.0, 0));
            scale = half;
            halvings += 1;
        }
        assert_eq!((scale.factor, halvings), (1.0, 15));
    }
}
