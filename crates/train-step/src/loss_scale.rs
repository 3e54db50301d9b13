//! A factor on the loss that keeps gradients within the range of f16, as torch.amp's `GradScaler` does (Micikevicius et
//! al., 2018, <https://arxiv.org/abs/1710.03740>).
//!
//! f16 has nothing between 0 and 6e-8 and nothing above 65,504. Gradients are computed times a power of two, which
//! changes no digit, and divided by it in f32. Where one leaves the range, the factor is halved and the same step is
//! computed again: unlike `GradScaler`, no rows are lost. After 2,000 steps without that it is doubled.

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

/// Steps after which the factor is doubled: `GradScaler`'s `growth_interval`.
const PATIENCE: usize = 2000;

/// The first factor. `GradScaler` starts at 65,536 and multiplies a mean; the loss here is a sum, of some dozens of tokens
/// in most runs.
const START: f64 = 2048.0;

/// The gradient of a score is at most 1: a higher factor would take it out of the range.
const MOST: f64 = 32768.0;

/// A checkpoint's factor above this was not written by a run.
const LARGEST: f64 = (1u64 << 40) as f64;

/// The factor of a run, which is part of its checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// A power of two, at least 1.
    pub factor: f64,
    /// Steps since it changed.
    pub steps: usize,
}

impl LossScale {
    /// The first, for products in this type; none where gradients need no factor.
    pub fn new(dtype: DType) -> Option<Self> {
        (dtype == DType::F16).then_some(Self {
            factor: START,
            steps: 0,
        })
    }

    /// That of a run that goes on with products in this type, where the checkpoint's can be one.
    pub fn of_run(dtype: DType, before: Option<Self>) -> Option<Self> {
        let new = Self::new(dtype)?;
        let possible = |scale: &Self| (1.0..=LARGEST).contains(&scale.factor);
        Some(before.filter(possible).unwrap_or(new))
    }

    /// The first factor for products in this type.
    pub fn first_factor(dtype: DType) -> f64 {
        Self::new(dtype).map_or(1.0, |scale| scale.factor)
    }

    /// After a step whose gradients stayed in the range.
    pub fn after_step(self) -> Self {
        if self.steps + 1 < PATIENCE {
            Self {
                steps: self.steps + 1,
                ..self
            }
        } else {
            Self {
                factor: (self.factor * 2.0).min(MOST),
                steps: 0,
            }
        }
    }

    /// After gradients that left the range: half the factor. `None` where a factor is not the reason.
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
    fn only_f16_has_one() {
        assert!(LossScale::new(DType::BF16).is_none() && LossScale::new(DType::F32).is_none());
        assert_eq!(LossScale::first_factor(DType::F32), 1.0);
        assert_eq!(LossScale::first_factor(DType::F16), START);
    }

    #[test]
    fn what_no_run_has_written_is_not_taken_from_a_checkpoint() {
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
    fn it_grows_after_patience_up_to_the_most_and_is_halved_down_to_one() {
        let mut scale = LossScale::new(DType::F16).unwrap();
        for _ in 0..PATIENCE - 1 {
            scale = scale.after_step();
        }
        assert_eq!((scale.factor, scale.steps), (START, PATIENCE - 1));
        scale = scale.after_step();
        assert_eq!((scale.factor, scale.steps), (2.0 * START, 0));
        for _ in 0..5 * PATIENCE {
            scale = scale.after_step();
        }
        assert_eq!(scale.factor, MOST);
        let mut halvings = 0;
        while let Some(half) = scale.halved() {
            assert_eq!((half.factor, half.steps), (scale.factor / 2.0, 0));
            scale = half;
            halvings += 1;
        }
        assert_eq!((scale.factor, halvings), (1.0, 15));
    }
}
