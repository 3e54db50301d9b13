//! How much time is left.

use std::time::{Duration, Instant};

/// A time limit that has begun.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started: Instant,
    limit: Duration,
}

impl Clock {
    /// Begins now.
    pub fn new(limit: Duration) -> Self {
        Self {
            started: Instant::now(),
            limit,
        }
    }

    /// What is left; zero when it is over.
    pub fn remaining(&self) -> Duration {
        self.limit.saturating_sub(self.started.elapsed())
    }

    /// Whether at least so much is left.
    pub fn has(&self, seconds: f64) -> bool {
        self.remaining().as_secs_f64() >= seconds
    }

    /// Since the beginning.
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
