//! The learning rate over the run.

/// The shape of the learning rate after the warm-up (transformers' `lr_scheduler_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// Half a cosine, from the peak to zero.
    Cosine,
    /// A straight line from the peak to zero.
    Linear,
    /// The peak, until the end.
    Constant,
}

/// Linear warm-up to a peak, then a decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The highest rate.
    pub peak: f64,
    /// Steps of the warm-up.
    pub warmup_steps: usize,
    /// Number of optimizer steps.
    pub total_steps: usize,
    /// What follows the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// The rate of optimizer step `step`, counted from 1.
    ///
    /// As in transformers, except that the first step of a warm-up has 1/`warmup_steps` of the peak
    /// instead of zero: a step with rate zero changes nothing.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        // Steps since the peak, divided by all steps from the peak on.
        let start = self.warmup_steps.max(1);
        let length = (self.total_steps + 1).saturating_sub(start).max(1) as f64;
        let progress = ((step - start.min(step)) as f64 / length).min(1.0);
        match self.decay {
            Decay::Cosine => self.peak * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Decay::Linear => self.peak * (1.0 - progress),
            Decay::Constant => self.peak,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay) -> Schedule {
        Schedule {
            peak: 1.0,
            warmup_steps: 4,
            total_steps: 12,
            decay,
        }
    }

    #[test]
    fn warm_up_rises_to_the_peak() {
        let rates: Vec<f64> = (1..=4)
            .map(|step| schedule(Decay::Cosine).rate(step))
            .collect();
        assert_eq!(rates, [0.25, 0.5, 0.75, 1.0]);
    }

    #[test]
    fn decays_fall_towards_zero_and_every_step_moves() {
        for decay in [Decay::Cosine, Decay::Linear] {
            let rates: Vec<f64> = (4..=12).map(|step| schedule(decay).rate(step)).collect();
            assert!(rates.windows(2).all(|pair| pair[1] < pair[0]), "{rates:?}");
            assert!(rates[8] > 0.0 && rates[8] < 0.15, "{rates:?}");
        }
        assert_eq!(schedule(Decay::Constant).rate(12), 1.0);
        // Halfway: 4 of 9 steps after the peak would be at 5/9 on a line.
        assert!((schedule(Decay::Linear).rate(8) - 5.0 / 9.0).abs() < 1e-12);
    }

    #[test]
    fn without_warm_up_the_first_step_is_the_peak() {
        let schedule = Schedule {
            warmup_steps: 0,
            ..schedule(Decay::Linear)
        };
        assert_eq!(schedule.rate(1), 1.0);
        assert!(schedule.rate(2) < 1.0);
    }
}
