//! From logits to a token, in SGLang's order: penalties, temperature, softmax, then top-k and top-p on the same
//! distribution, min-p, renormalise, draw.

use std::cmp::Ordering;
use std::collections::HashMap;

use grail_protocol::ids::TokenId;

/// Parameters of one request, in range (see [`super::params`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Positive; 1 for a greedy request.
    pub temperature: f32,
    /// At least 1; `usize::MAX` is the whole vocabulary, 1 is greedy.
    pub top_k: usize,
    /// In `(0, 1]`.
    pub top_p: f64,
    /// In `[0, 1]`.
    pub min_p: f64,
    /// Positive; 1 = none.
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: usize::MAX,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
        }
    }
}

impl Sampling {
    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    fn filters(&self, vocab_size: usize) -> bool {
        self.top_k < vocab_size || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// How often each token was generated; tokens of the prompt do not count.
#[derive(Debug, Clone, Default)]
pub struct Generated(HashMap<u32, u32>);

impl Generated {
    /// Counts one more.
    pub fn add(&mut self, token: TokenId) {
        *self.0.entry(token.0).or_default() += 1;
    }
}

impl FromIterator<TokenId> for Generated {
    fn from_iter<I: IntoIterator<Item = TokenId>>(tokens: I) -> Self {
        let mut counts = Self::default();
        for token in tokens {
            counts.add(token);
        }
        counts
    }
}

/// One draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    pub token: TokenId,
    /// After penalties and temperature, before top-k, top-p and min-p.
    pub logprob: f32,
}

/// The logits hold NaN or +∞, or nothing but −∞.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the logits are not finite")]
pub struct NotFinite;

/// Draws tokens; holds the buffers that a draw needs.
#[derive(Debug, Default)]
pub struct Sampler {
    /// exp(logit − largest), not normalised.
    weights: Vec<f32>,
    order: Vec<u32>,
}

impl Sampler {
    /// Draws from one row of logits, which is scratch afterwards.
    ///
    /// * `logits`: `[vocab]`, as the model gave them.
    /// * `uniform`: in `[0, 1)`.
    ///
    /// # Errors
    /// [`NotFinite`]
    pub fn draw(
        &mut self,
        logits: &mut [f32],
        sampling: &Sampling,
        generated: &Generated,
        uniform: f64,
    ) -> Result<Drawn, NotFinite> {
        if sampling.penalises() {
            penalise(logits, sampling, generated);
        }
        if sampling.temperature != 1.0 {
            logits.iter_mut().for_each(|logit| *logit /= sampling.temperature);
        }
        let (best, largest) = largest(logits)?;
        self.weights.clear();
        self.weights.extend(logits.iter().map(|logit| (logit - largest).exp()));
        let total: f64 = self.weights.iter().map(|weight| f64::from(*weight)).sum();
        let token = if sampling.top_k == 1 {
            best
        } else if sampling.filters(logits.len()) {
            self.draw_filtered(sampling, total, uniform)
        } else {
            pick(self.weights.iter().map(|weight| f64::from(*weight)), total, uniform)
        };
        #[expect(clippy::cast_possible_truncation, reason = "a logprob is reported in single precision")]
        let logprob = (f64::from(logits[token]) - f64::from(largest) - total.ln()) as f32;
        let id = u32::try_from(token).expect("a vocabulary is checked to fit into 32 bits when it is loaded");
        Ok(Drawn { token: TokenId(id), logprob })
    }

    /// Top-k and top-p act on the same distribution, which is not renormalised in between: an entry goes when its rank is
    /// `top_k` or more, or when what precedes it weighs more than `top_p`. Only as many entries are sorted as are needed.
    fn draw_filtered(&mut self, sampling: &Sampling, total: f64, uniform: f64) -> usize {
        let weights = &self.weights;
        let size = u32::try_from(weights.len()).expect("a vocabulary is checked to fit into 32 bits when it is loaded");
        self.order.clear();
        self.order.extend(0..size);
        let by_weight = |a: &u32, b: &u32| -> Ordering {
            weights[*b as usize].total_cmp(&weights[*a as usize]).then_with(|| a.cmp(b))
        };
        let most = sampling.top_k.min(self.order.len());
        let mut kept = 0;
        let mut before = 0.0;
        let mut least = 0.0;
        let mut sorted = 0;
        let mut chunk = 64;
        'chunks: while sorted < most {
            let end = (sorted + chunk).min(most);
            let rest = &mut self.order[sorted..];
            if end - sorted < rest.len() {
                rest.select_nth_unstable_by(end - sorted - 1, by_weight);
            }
            rest[..end - sorted].sort_unstable_by(by_weight);
            for rank in sorted..end {
                let weight = f64::from(weights[self.order[rank] as usize]);
                if rank == 0 {
                    least = weight * sampling.min_p;
                }
                if before / total > sampling.top_p || weight < least {
                    break 'chunks;
                }
                before += weight;
                kept = rank + 1;
            }
            sorted = end;
            chunk *= 4;
        }
        let kept = &self.order[..kept];
        let rank = pick(kept.iter().map(|id| f64::from(weights[*id as usize])), before, uniform);
        kept[rank] as usize
    }
}

fn penalise(logits: &mut [f32], sampling: &Sampling, generated: &Generated) {
    for (&token, &count) in &generated.0 {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        #[expect(clippy::cast_precision_loss, reason = "a count is below 2^24")]
        let count = count as f32;
        *logit -= sampling.frequency_penalty * count + sampling.presence_penalty;
        if *logit > 0.0 {
            *logit /= sampling.repetition_penalty;
        } else {
            *logit *= sampling.repetition_penalty;
        }
    }
}

/// Position and value of the largest logit, the first of equals.
fn largest(logits: &[f32]) -> Result<(usize, f32), NotFinite> {
    let mut best = (0, f32::NEG_INFINITY);
    for (position, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(NotFinite);
        }
        if logit > best.1 {
            best = (position, logit);
        }
    }
    if best.1.is_finite() { Ok(best) } else { Err(NotFinite) }
}

/// First position whose cumulative weight exceeds `uniform · total`; the last one with weight if rounding leaves none.
fn pick(weights: impl Iterator<Item = f64>, total: f64, uniform: f64) -> usize {
    let threshold = uniform * total;
    let mut sum = 0.0;
    let mut last = 0;
    for (position, weight) in weights.enumerate() {
        if weight > 0.0 {
            last = position;
            sum += weight;
            if sum > threshold {
                return position;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::draw::DrawStream;
    use super::*;

    /// Logits of a distribution.
    fn logits(probabilities: &[f64]) -> Vec<f32> {
        #[expect(clippy::cast_possible_truncation, reason = "test values")]
        probabilities.iter().map(|p| p.ln() as f32).collect()
    }

    /// Exact share of `[0, 1)` that goes to each token, measured on a fine grid.
    fn shares(probabilities: &[f64], sampling: &Sampling, generated: &Generated) -> Vec<f64> {
        const GRID: u32 = 20_000;
        let mut sampler = Sampler::default();
        let mut hits = vec![0_u32; probabilities.len()];
        for step in 0..GRID {
            let mut row = logits(probabilities);
            let uniform = (f64::from(step) + 0.5) / f64::from(GRID);
            let drawn = sampler.draw(&mut row, sampling, generated, uniform).unwrap();
            hits[drawn.token.0 as usize] += 1;
        }
        hits.iter().map(|hit| f64::from(*hit) / f64::from(GRID)).collect()
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        let close = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 3e-4);
        assert!(close && found.len() == expected.len(), "{found:?} is not {expected:?}");
    }

    const P: [f64; 5] = [0.1, 0.4, 0.05, 0.3, 0.15];

    #[test]
    fn unfiltered_draws_follow_the_softmax() {
        assert_close(&shares(&P, &Sampling::default(), &Generated::default()), &P);
    }

    #[test]
    fn temperature_sharpens_before_the_softmax() {
        let sampling = Sampling { temperature: 0.5, ..Sampling::default() };
        let total: f64 = P.iter().map(|p| p * p).sum();
        let expected: Vec<f64> = P.iter().map(|p| p * p / total).collect();
        assert_close(&shares(&P, &sampling, &Generated::default()), &expected);
    }

    #[test]
    fn top_k_keeps_the_largest_and_renormalises() {
        let sampling = Sampling { top_k: 2, ..Sampling::default() };
        assert_close(&shares(&P, &sampling, &Generated::default()), &[0.0, 0.4 / 0.7, 0.0, 0.3 / 0.7, 0.0]);
    }

    #[test]
    fn top_p_drops_an_entry_when_what_precedes_it_exceeds_the_bound() {
        // Before the ranks 0.4, 0.3, 0.15, 0.1, 0.05: nothing, 0.4, 0.7, 0.85, 0.95.
        let sampling = Sampling { top_p: 0.6, ..Sampling::default() };
        assert_close(&shares(&P, &sampling, &Generated::default()), &[0.0, 0.4 / 0.7, 0.0, 0.3 / 0.7, 0.0]);
        let sampling = Sampling { top_p: 0.71, ..Sampling::default() };
        assert_close(&shares(&P, &sampling, &Generated::default()), &[0.0, 0.4 / 0.85, 0.0, 0.3 / 0.85, 0.15 / 0.85]);
    }

    #[test]
    fn top_p_acts_on_the_distribution_that_top_k_has_not_renormalised() {
        // Renormalised after top-k 3 the second rank would follow 0.47, above 0.45; not renormalised it follows 0.4.
        let sampling = Sampling { top_k: 3, top_p: 0.45, ..Sampling::default() };
        assert_close(&shares(&P, &sampling, &Generated::default()), &[0.0, 0.4 / 0.7, 0.0, 0.3 / 0.7, 0.0]);
    }

    #[test]
    fn min_p_is_relative_to_the_largest() {
        let sampling = Sampling { min_p: 0.3, ..Sampling::default() };
        assert_close(&shares(&P, &sampling, &Generated::default()), &[0.0, 0.4 / 0.85, 0.0, 0.3 / 0.85, 0.15 / 0.85]);
    }

    #[test]
    fn repetition_penalty_divides_positive_and_multiplies_negative_logits() {
        let generated: Generated = [TokenId(0), TokenId(1), TokenId(1)].into_iter().collect();
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let mut row = vec![4.0, -1.0, 3.0];
        penalise(&mut row, &sampling, &generated);
        assert_eq!(row, [2.0, -2.0, 3.0]);
        let sampling = Sampling { frequency_penalty: 0.5, presence_penalty: 0.25, ..Sampling::default() };
        let mut row = vec![4.0, -1.0, 3.0];
        penalise(&mut row, &sampling, &generated);
        assert_eq!(row, [3.25, -2.25, 3.0]);
    }

    #[test]
    fn penalty_comes_before_temperature_and_filters() {
        // Logits 2, 1.5, 0; token 0 was generated: 2 / 2 = 1, so token 1 leads.
        let generated: Generated = [TokenId(0)].into_iter().collect();
        let sampling = Sampling { repetition_penalty: 2.0, top_k: 1, ..Sampling::default() };
        let drawn = Sampler::default().draw(&mut [2.0, 1.5, 0.0], &sampling, &generated, 0.0).unwrap();
        let total = 1.0_f32.exp() + 1.5_f32.exp() + 1.0;
        assert_eq!(drawn.token, TokenId(1));
        assert!((drawn.logprob - (1.5 - total.ln())).abs() < 1e-6);
    }

    #[test]
    fn logprob_is_taken_after_temperature_and_before_the_filters() {
        let sampling = Sampling { temperature: 0.5, top_k: 2, ..Sampling::default() };
        let drawn = Sampler::default().draw(&mut logits(&P), &sampling, &Generated::default(), 0.0).unwrap();
        let total: f64 = P.iter().map(|p| p * p).sum();
        assert_eq!(drawn.token, TokenId(1));
        assert!((f64::from(drawn.logprob) - (0.16 / total).ln()).abs() < 1e-6);
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let sampling = Sampling { top_k: 1, ..Sampling::default() };
        for uniform in [0.0, 0.5, 0.999] {
            let drawn = Sampler::default().draw(&mut [1.0, 3.0, 3.0], &sampling, &Generated::default(), uniform);
            assert_eq!(drawn.unwrap().token, TokenId(1));
        }
    }

    #[test]
    fn masked_tokens_are_never_drawn_and_bad_logits_are_refused() {
        let mut sampler = Sampler::default();
        let plain = Sampling::default();
        for uniform in [0.0, 0.3, 1.0 - f64::EPSILON] {
            let drawn =
                sampler.draw(&mut [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], &plain, &Generated::default(), uniform);
            assert_eq!(drawn.unwrap().token, TokenId(1));
        }
        for bad in [[f32::NAN, 0.0], [f32::INFINITY, 0.0], [f32::NEG_INFINITY; 2]] {
            assert_eq!(sampler.draw(&mut bad.clone(), &plain, &Generated::default(), 0.5), Err(NotFinite));
        }
    }

    /// The filter written down naively.
    fn naive(weights: &[f32], sampling: &Sampling, uniform: f64) -> usize {
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
        let top = f64::from(weights[order[0]]);
        let mut before = 0.0;
        let mut kept = Vec::new();
        for (rank, id) in order.into_iter().enumerate() {
            let weight = f64::from(weights[id]);
            if rank < sampling.top_k && before / total <= sampling.top_p && weight >= top * sampling.min_p {
                kept.push(id);
            }
            before += weight;
        }
        let sum = kept.iter().map(|id| f64::from(weights[*id])).sum();
        kept[pick(kept.iter().map(|id| f64::from(weights[*id])), sum, uniform)]
    }

    proptest! {
        /// Sorting in pieces gives what sorting everything gives.
        #[test]
        fn partial_sorting_equals_full_sorting(
            seed in any::<u64>(), size in 2..900_usize, top_k in 2..1000_usize, top_p in 0.01..1.0_f64, min_p in 0.0..0.2_f64,
            spread in 0.1..12.0_f64,
        ) {
            let stream = DrawStream::of_seed(seed);
            #[expect(clippy::cast_possible_truncation, reason = "test values")]
            let row: Vec<f32> = (0..size as u64).map(|at| (stream.uniform(at) * spread) as f32).collect();
            let sampling = Sampling { top_k, top_p, min_p, ..Sampling::default() };
            let uniform = stream.uniform(1 << 40);
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = row.iter().map(|logit| (logit - largest).exp()).collect();
            let drawn = Sampler::default().draw(&mut row.clone(), &sampling, &Generated::default(), uniform).unwrap();
            prop_assert_eq!(drawn.token.0 as usize, naive(&weights, &sampling, uniform));
        }
    }
}
