//! A time limit.

use std::time::{Duration, Instant};

/// A time limit that has started.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started: Instant,
    limit: Duration,
}

impl Clock {
    /// Starts now.
    pub fn new(limit: Duration) -> Self {
        Self {
            started: Instant::now(),
            limit,
        }
    }

    /// The remaining time; zero after the limit.
    pub fn remaining(&self) -> Duration {
        self.limit.saturating_sub(self.started.elapsed())
    }

    /// Whether at least this much time remains.
    pub fn has(&self, seconds: f64) -> bool {
        self.remaining().as_secs_f64() >= seconds
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_over_leaves_nothing() {
        let clock = Clock::new(Duration::from_secs(60));
        assert!(clock.has(1.0) && !clock.has(61.0));
        let over = Clock::new(Duration::ZERO);
        assert_eq!(over.remaining(), Duration::ZERO);
        assert!(!over.has(0.001));
    }
}
