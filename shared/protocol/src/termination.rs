//! When a completion may end (protocol §8.1).

use half::bf16;

use crate::constants::{MAX_NEW_TOKENS_PROTOCOL_CAP, MIN_EOS_PROBABILITY};
use crate::ids::TokenId;

/// Most tokens of a completion, from `generation_params.max_tokens` of the checkpoint: the protocol's cap if that is missing, not
/// positive or larger.
#[must_use]
pub fn max_new_tokens(configured: Option<i64>) -> u32 {
    configured
        .filter(|tokens| *tokens > 0)
        .and_then(|tokens| u32::try_from(tokens).ok())
        .map_or(MAX_NEW_TOKENS_PROTOCOL_CAP, |tokens| tokens.min(MAX_NEW_TOKENS_PROTOCOL_CAP))
}

/// Probability of `eos` under one row of f32 logits `[vocab]`: softmax without temperature, rounded to f32. `None` if the row has
/// no such entry.
#[must_use]
pub fn eos_probability_f32(logits: &[f32], eos: TokenId) -> Option<f32> {
    #[expect(clippy::cast_possible_truncation, reason = "rounded to the model's dtype on purpose")]
    softmax_at(logits.iter().map(|logit| f64::from(*logit)), logits.len(), eos).map(|probability| probability as f32)
}

/// Probability of `eos` under one row of bf16 logits, rounded to bf16 as the reference's softmax rounds it: the values next to
/// the bound are 0.01990 and 0.02002, so everything from about 0.01996 on passes.
#[must_use]
pub fn eos_probability_bf16(logits: &[bf16], eos: TokenId) -> Option<f32> {
    let probability = softmax_at(logits.iter().map(|logit| logit.to_f64()), logits.len(), eos)?;
    Some(bf16::from_f64(probability).to_f32())
}

fn softmax_at(logits: impl Iterator<Item = f64> + Clone, len: usize, eos: TokenId) -> Option<f64> {
    let index = usize::try_from(eos.0).ok().filter(|index| *index < len)?;
    let chosen = logits.clone().nth(index)?;
    let largest = logits.clone().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.map(|logit| (logit - largest).exp()).sum();
    Some((chosen - largest).exp() / total)
}

/// True if a probability, in the precision in which it was computed, is enough for a completion to end in EOS. NaN is not.
#[must_use]
pub fn is_probable_eos(probability: f32) -> bool {
    f64::from(probability) >= MIN_EOS_PROBABILITY
}

/// How one completion ended.
#[derive(Clone, Copy, Debug)]
pub struct CompletionEnd {
    /// Tokens of the completion.
    pub completion_length: u32,
    /// See [`max_new_tokens`].
    pub max_new_tokens: u32,
    /// Last token of the sequence.
    pub last_token: Option<TokenId>,
    /// The tokenizer's EOS, which may differ from the model config's.
    pub eos_token: Option<TokenId>,
    /// Probability of EOS under the logits before the last token.
    pub eos_probability: Option<f32>,
}

impl CompletionEnd {
    /// True if a validator accepts this end: at the full length, or in a probable EOS. Any other stop fails.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.completion_length == self.max_new_tokens
            || (self.eos_token.is_some()
                && self.last_token == self.eos_token
                && self.eos_probability.is_some_and(is_probable_eos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two logits whose softmax gives the second entry `probability`.
    fn logits(probability: f64) -> [f64; 2] {
        [0.0, (probability / (1.0 - probability)).ln()]
    }

    #[test]
    fn the_configured_length_is_capped_and_defaults_to_the_cap() {
        let cases = [(None, 8_192), (Some(0), 8_192), (Some(-3), 8_192), (Some(1), 1), (Some(512), 512)];
        for (configured, expected) in cases.into_iter().chain([(Some(8_193), 8_192), (Some(i64::MAX), 8_192)]) {
            assert_eq!(max_new_tokens(configured), expected, "{configured:?}");
        }
    }

    #[test]
    fn f32_probabilities_are_compared_in_binary64() {
        assert!(!is_probable_eos(0.02), "the binary32 next to 0.02 lies below it");
        assert!(is_probable_eos(0.02_f32.next_up()));
        assert!(!is_probable_eos(f32::NAN));
        #[expect(clippy::cast_possible_truncation, reason = "logits are binary32")]
        let probability = |wanted| eos_probability_f32(&logits(wanted).map(|logit| logit as f32), TokenId(1)).unwrap();
        assert!((probability(0.25) - 0.25).abs() < 1e-6);
        assert!(is_probable_eos(probability(0.020_5)) && !is_probable_eos(probability(0.019_5)));
    }

    #[test]
    fn bf16_rounds_up_to_the_bound() {
        // One bf16 logit is too coarse to hit the rounding interval of the probability; 49 and 50 equal ones are not.
        let row = |others: usize| vec![bf16::ZERO; others + 1];
        let of = |others: usize| eos_probability_bf16(&row(others), TokenId(0)).unwrap();
        assert!(is_probable_eos(of(49)), "1/50");
        assert!(!is_probable_eos(of(50)), "1/51");
        assert!(is_probable_eos(bf16::from_f64(0.019_96).to_f32()));
        assert!(!is_probable_eos(bf16::from_f64(0.019_95).to_f32()));
    }

    #[test]
    fn a_token_outside_the_row_has_no_probability() {
        assert_eq!(eos_probability_f32(&[0.0; 4], TokenId(4)), None);
        assert_eq!(eos_probability_bf16(&[], TokenId(0)), None);
    }

    #[test]
    fn only_the_full_length_or_a_probable_eos_ends_a_completion() {
        let eos = Some(TokenId(7));
        let end = CompletionEnd {
            completion_length: 40,
            max_new_tokens: 64,
            last_token: eos,
            eos_token: eos,
            eos_probability: Some(0.5),
        };
        assert!(end.is_valid());
        assert!(!CompletionEnd { eos_probability: Some(0.019_5), ..end }.is_valid());
        assert!(!CompletionEnd { eos_probability: None, ..end }.is_valid());
        assert!(!CompletionEnd { last_token: Some(TokenId(8)), ..end }.is_valid());
        assert!(!CompletionEnd { last_token: None, eos_token: None, ..end }.is_valid());
        assert!(CompletionEnd { completion_length: 64, last_token: Some(TokenId(8)), ..end }.is_valid());
        assert!(!CompletionEnd { completion_length: 65, last_token: Some(TokenId(8)), ..end }.is_valid());
    }
}
