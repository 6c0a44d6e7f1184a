//! Proof that a generation server has the weights that it says it has: the most likely continuation of a fixed prompt, whose
//! logprobs a proof worker recomputes. A server that stayed on old weights must be found before any of its groups is spooled.

use grail_ipc::RequestError;
use grail_ipc::generate_api::SamplingParams;
use grail_ipc::jobs::{RowJob, VerifyJob};
use grail_protocol::ids::{TokenId, WeightsHash};

use super::server::ModelFacts;
use super::workers::Confirmers;
use crate::generation::{GenerationError, HttpGenerator, Probe};

/// Length of the prompt and of its continuation.
const PROMPT_TOKENS: u32 = 16;
const CONTINUATION_TOKENS: u32 = 32;
/// Largest median difference of logprobs between two engines with the same weights: half of what validators accept between a
/// miner and themselves (a ratio of probabilities within 10 %). Engines of one host differ by bf16 rounding, a tenth of it.
const MOST_MEDIAN_DIFFERENCE: f32 = 0.05;

/// A server that is not known to have its weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CanaryError {
    #[error("ask the generation server for the canary")]
    Generation(#[from] GenerationError),
    #[error("have a proof worker confirm the canary")]
    Confirmation(#[from] RequestError),
    #[error(
        "logprobs of the server differ from those of weights {weights} by {median:.4} in the median, {limit} is accepted: it has \
         other weights than it says"
    )]
    Differs { weights: WeightsHash, median: f32, limit: f32 },
    #[error(
        "the server answers bit by bit as it did with weights {before}, although {weights} answer otherwise: it kept the old ones"
    )]
    Unchanged { weights: WeightsHash, before: WeightsHash },
}

impl CanaryError {
    /// Whether the server has answered and is refuted, as opposed to nobody knowing.
    #[must_use]
    pub const fn is_refuted(&self) -> bool {
        matches!(self, Self::Differs { .. } | Self::Unchanged { .. })
    }
}

/// What was seen of earlier weights.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    weights: WeightsHash,
    probe: Probe,
    confirmed: Vec<f32>,
}

/// Holds a server against a proof worker.
#[derive(Debug)]
pub(super) struct Canary {
    confirmers: Confirmers,
    last: Option<Seen>,
}

impl Canary {
    pub const fn new(confirmers: Confirmers) -> Self {
        Self { confirmers, last: None }
    }

    /// Forgets what earlier weights answered: a server that was just started has nothing to stay on.
    pub fn forget(&mut self) {
        self.last = None;
    }

    /// Checks that the server behind `generator` has `weights`; waits for a worker that has them.
    ///
    /// # Errors
    /// [`CanaryError`].
    pub async fn check(
        &mut self,
        generator: &HttpGenerator,
        weights: WeightsHash,
        facts: ModelFacts,
    ) -> Result<(), CanaryError> {
        let prompt = prompt(facts);
        let sampling = SamplingParams::greedy(CONTINUATION_TOKENS);
        let probe = generator.probe(format!("canary-{weights}"), &prompt, sampling).await?;
        let row = RowJob {
            tokens: [&prompt[..], &probe.tokens].concat(),
            prompt_length: PROMPT_TOKENS,
            randomness: vec![0; 32],
            temperature: 1.0,
            repetition_penalty: 1.0,
            eos_token: facts.eos_token,
        };
        let rows = self.confirmers.verify(&VerifyJob { weights, rows: vec![row] }).await?;
        let confirmed = rows.into_iter().next().map(|row| row.logprobs).unwrap_or_default();
        let seen = Seen { weights, probe, confirmed };
        judge(self.last.as_ref(), &seen)?;
        self.last = Some(seen);
        Ok(())
    }
}

/// A prompt that every tokenizer has: ids spread over the vocabulary.
fn prompt(facts: ModelFacts) -> Vec<TokenId> {
    let vocabulary = u32::try_from(facts.vocab_size).unwrap_or(u32::MAX).max(1);
    (0..PROMPT_TOKENS).map(|place| TokenId(place.wrapping_mul(7_919).wrapping_add(13) % vocabulary)).collect()
}

fn judge(before: Option<&Seen>, seen: &Seen) -> Result<(), CanaryError> {
    let weights = seen.weights;
    let median = median_difference(&seen.probe.logprobs, &seen.confirmed);
    if median.is_nan() || median > MOST_MEDIAN_DIFFERENCE {
        return Err(CanaryError::Differs { weights, median, limit: MOST_MEDIAN_DIFFERENCE });
    }
    // A small step of training hides in the rounding; an answer without any change does not come from changed weights.
    match before {
        Some(before)
            if before.weights != weights && before.probe == seen.probe && before.confirmed != seen.confirmed =>
        {
            Err(CanaryError::Unchanged { weights, before: before.weights })
        }
        _ => Ok(()),
    }
}

/// Median of the absolute differences; not a number where the lengths differ or a value is none.
fn median_difference(left: &[f32], right: &[f32]) -> f32 {
    if left.len() != right.len() || left.is_empty() {
        return f32::NAN;
    }
    let mut differences: Vec<f32> = left.iter().zip(right).map(|(left, right)| (left - right).abs()).collect();
    if differences.iter().any(|difference| !difference.is_finite()) {
        return f32::NAN;
    }
    differences.sort_by(f32::total_cmp);
    differences[differences.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: WeightsHash = WeightsHash(1);
    const NEW: WeightsHash = WeightsHash(2);

    fn seen(weights: WeightsHash, served: &[f32], confirmed: &[f32]) -> Seen {
        let tokens = (0..u32::try_from(served.len()).unwrap()).map(TokenId).collect();
        Seen { weights, probe: Probe { tokens, logprobs: served.to_vec() }, confirmed: confirmed.to_vec() }
    }

    #[test]
    fn rounding_is_no_difference_and_other_weights_are() {
        judge(None, &seen(NEW, &[-0.5, -1.0, -2.0], &[-0.501, -1.03, -2.4])).unwrap();
        let error = judge(None, &seen(NEW, &[-0.5, -1.0, -2.0], &[-0.5, -1.1, -2.2])).unwrap_err();
        assert!(error.is_refuted(), "{error}");
        assert!(error.to_string().contains("by 0.1000 in the median"), "{error}");
    }

    #[test]
    fn what_is_no_number_proves_nothing() {
        for (served, confirmed) in
            [(&[][..], &[][..]), (&[-1.0], &[f32::NAN]), (&[f32::NEG_INFINITY], &[-1.0]), (&[-1.0], &[])]
        {
            assert!(judge(None, &seen(NEW, served, confirmed)).is_err(), "{served:?} {confirmed:?}");
        }
    }

    #[test]
    fn an_answer_without_any_change_is_an_old_one_if_the_worker_sees_a_change() {
        let before = seen(OLD, &[-0.5, -1.0], &[-0.5, -1.0]);
        let stale = seen(NEW, &[-0.5, -1.0], &[-0.501, -1.0]);
        let error = judge(Some(&before), &stale).unwrap_err();
        assert!(matches!(error, CanaryError::Unchanged { weights: NEW, before: OLD }), "{error}");
        judge(Some(&before), &seen(NEW, &[-0.5, -1.0], &[-0.5, -1.0])).expect("the change is too small to be seen");
        judge(Some(&before), &seen(OLD, &[-0.5, -1.0], &[-0.501, -1.0])).expect("the same weights once more");
        judge(Some(&before), &seen(NEW, &[-0.501, -1.0], &[-0.501, -1.0])).unwrap();
    }

    #[test]
    fn the_prompt_stays_inside_the_vocabulary() {
        for vocab_size in [1, 2, 512, 151_936] {
            let facts = ModelFacts { vocab_size, eos_token: TokenId(0), max_position_embeddings: 64 };
            assert!(prompt(facts).iter().all(|token| (token.0 as usize) < vocab_size), "{vocab_size}");
        }
    }
}
