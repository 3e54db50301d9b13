//! From logits to the next token.

use lora_core::CounterRng;

/// How the next token is chosen, in transformers' order: repetition penalty, temperature, top-k,
/// top-p, sampling.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; 1 samples from the model's own distribution.
    pub temperature: f64,
    /// Only the `k` most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 1 for all
    /// (Holtzman et al., 2019, <https://arxiv.org/abs/1904.09751>).
    pub top_p: f64,
    /// Logits of tokens that already occurred are divided by this if positive, else multiplied
    /// (Keskar et al., 2019, <https://arxiv.org/abs/1909.05858>); 1 for none.
    pub repetition_penalty: f64,
    /// The seed for sampling.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 42,
        }
    }
}

impl Sampling {
    /// Whether the most likely token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// The next token of a sequence.
    ///
    /// - `scores`: the logits, one per token of the vocabulary; changed by the function
    /// - `seen`: the sequence's tokens so far, for the repetition penalty
    /// - `row`, `step`: with the seed, they determine the random number; the rest of the batch does
    ///   not
    pub fn next(&self, scores: &mut [f32], seen: &[u32], row: usize, step: usize) -> u32 {
        self.penalise(scores, seen);
        if self.is_greedy() {
            return largest(scores);
        }
        let temperature = self.temperature as f32;
        scores.iter_mut().for_each(|score| *score /= temperature);
        let mut candidates = self.candidates(scores);
        let mut rng = CounterRng::new(self.seed)
            .fork(row as u64)
            .fork(step as u64);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let drawn = rng.uniform() * total;
        let mut sum = 0.0;
        let last = candidates.pop();
        for (token, weight) in candidates {
            sum += weight;
            if drawn < sum {
                return token;
            }
        }
        last.map_or_else(|| largest(scores), |(token, _)| token)
    }

    fn penalise(&self, scores: &mut [f32], seen: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let penalty = self.repetition_penalty as f32;
        let mut seen = seen.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(score) = scores.get_mut(token as usize) {
                *score = if *score < 0.0 {
                    *score * penalty
                } else {
                    *score / penalty
                };
            }
        }
    }

    /// The candidates with weights that need not add up to 1, the most likely first.
    fn candidates(&self, scores: &[f32]) -> Vec<(u32, f64)> {
        let mut order: Vec<u32> = (0..scores.len() as u32)
            .filter(|token| !scores[*token as usize].is_nan())
            .collect();
        let score = |token: &u32| scores[*token as usize];
        let descending = |a: &u32, b: &u32| score(b).total_cmp(&score(a)).then(a.cmp(b));
        if self.top_k > 0 && self.top_k < order.len() {
            order.select_nth_unstable_by(self.top_k - 1, descending);
            order.truncate(self.top_k);
        }
        order.sort_unstable_by(descending);
        let best = order.first().map_or(0.0, score) as f64;
        let weights = order
            .iter()
            .map(|token| (*token, (score(token) as f64 - best).exp()));
        let mut weights: Vec<(u32, f64)> = weights.collect();
        if self.top_p < 1.0 {
            let wanted = self.top_p * weights.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut sum = 0.0;
            // Up to and including the token that reaches the probability; at least one.
            let kept = weights.iter().position(|(_, weight)| {
                sum += weight;
                sum >= wanted
            });
            weights.truncate(kept.map_or(weights.len(), |last| last + 1));
        }
        weights
    }
}

/// The first of the largest values, as `argmax` elsewhere.
fn largest(scores: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, score) in scores.iter().enumerate() {
        if *score > best.1 {
            best = (token as u32, *score);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(sampling: &Sampling, scores: &[f32], draws: usize) -> Vec<usize> {
        let mut counts = vec![0; scores.len()];
        for step in 0..draws {
            let token = sampling.next(&mut scores.to_vec(), &[], 0, step);
            counts[token as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let sampling = Sampling::default();
        assert_eq!(sampling.next(&mut [0.0, 3.0, 3.0, -1.0], &[], 0, 0), 1);
        assert_eq!(sampling.next(&mut [-5.0, f32::NAN, -3.0], &[], 0, 0), 2);
    }

    #[test]
    fn draws_follow_the_distribution_at_their_temperature() {
        // Probabilities 0.1, 0.2, 0.7 at temperature 1.
        let scores = [0.1f32.ln(), 0.2f32.ln(), 0.7f32.ln()];
        for (temperature, expected) in [
            (1.0, [0.1, 0.2, 0.7]),
            (0.5, [0.01 / 0.54, 0.04 / 0.54, 0.49 / 0.54]),
        ] {
            let sampling = Sampling {
                temperature,
                ..Sampling::default()
            };
            let draws = 40_000;
            for (count, expected) in drawn(&sampling, &scores, draws).iter().zip(expected) {
                let share = *count as f64 / draws as f64;
                // Five standard deviations of a share of 40,000 draws.
                assert!(
                    (share - expected).abs() < 5.0 * 0.0025,
                    "{share} {expected}"
                );
            }
        }
    }

    #[test]
    fn top_k_and_top_p_leave_the_likeliest() {
        let scores = [0.1f32.ln(), 0.2f32.ln(), 0.7f32.ln()];
        let base = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let counts = drawn(
            &Sampling {
                top_k: 2,
                ..base.clone()
            },
            &scores,
            2_000,
        );
        assert!(counts[0] == 0 && counts[1] > 0 && counts[2] > 0);
        let counts = drawn(
            &Sampling {
                top_p: 0.65,
                ..base.clone()
            },
            &scores,
            500,
        );
        assert_eq!(counts, [0, 0, 500]);
        // 0.7 is not enough for 0.75: the next one is included.
        let counts = drawn(
            &Sampling {
                top_p: 0.75,
                ..base.clone()
            },
            &scores,
            2_000,
        );
        assert!(counts[0] == 0 && counts[1] > 0);
        let counts = drawn(&Sampling { top_p: 0.0, ..base }, &scores, 50);
        assert_eq!(counts, [0, 0, 50]);
    }

    #[test]
    fn the_penalty_makes_what_was_there_less_likely_whatever_its_sign() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::default()
        };
        let mut scores = [4.0, 3.0, -1.0];
        assert_eq!(sampling.next(&mut scores, &[0, 2, 0], 0, 0), 1);
        assert_eq!(scores, [2.0, 3.0, -2.0]);
    }

    #[test]
    fn a_draw_depends_on_seed_row_and_step_only() {
        let scores: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.1).collect();
        let sampling = |seed| Sampling {
            temperature: 1.0,
            seed,
            ..Sampling::default()
        };
        let draw = |seed, row, step| sampling(seed).next(&mut scores.clone(), &[], row, step);
        assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
        let different = |draws: Vec<u32>| draws.iter().any(|token| *token != draws[0]);
        assert!(different((0..20).map(|step| draw(1, 2, step)).collect()));
        assert!(different((0..20).map(|row| draw(1, row, 3)).collect()));
        assert!(different((0..20).map(|seed| draw(seed, 2, 3)).collect()));
    }
}
