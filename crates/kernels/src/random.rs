//! Random numbers that depend on a seed and a position only, so that every device gets the same ones.

/// A counter-based generator: number `i` of seed `s` is `mix(s, i)`, independent of earlier numbers.
///
/// The mixing function is SplitMix64's finaliser (Steele, Lea and Flood, 2014,
/// <https://doi.org/10.1145/2660193.2660195>). It runs on the host: the devices' own generators
/// differ from each other, and a recomputed layer must draw the same dropout mask again.
#[derive(Debug, Clone)]
pub struct CounterRng {
    key: u64,
    counter: u64,
}

impl CounterRng {
    /// A generator for `seed`, starting at its first number.
    pub fn new(seed: u64) -> Self {
        Self {
            key: mix(seed),
            counter: 0,
        }
    }

    /// The independent generator number `index` of this one's seed; draws nothing from it.
    pub fn fork(&self, index: u64) -> Self {
        Self {
            key: mix(self.key ^ mix(index.wrapping_add(0x51_7c_c1_b7_27_22_0a_95))),
            counter: 0,
        }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.counter += 1;
        mix(self.key.wrapping_add(self.counter.wrapping_mul(GOLDEN)))
    }

    /// The next number in `[0, 1)`, with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The next number of a standard normal distribution (Box and Muller, 1958).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_forks_differ() {
        let mut a = CounterRng::new(7);
        let mut b = CounterRng::new(7);
        assert_eq!(a.next_u64(), b.next_u64());
        let root = CounterRng::new(7);
        assert_ne!(root.fork(0).next_u64(), root.fork(1).next_u64());
        assert_ne!(root.fork(0).next_u64(), root.clone().next_u64());
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let mut rng = CounterRng::new(1);
        let draws: Vec<f64> = (0..100_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / draws.len() as f64;
        // Standard errors are 0.003 and 0.0045; five of them.
        assert!(mean.abs() < 0.016, "{mean}");
        assert!((variance - 1.0).abs() < 0.023, "{variance}");
    }
}
