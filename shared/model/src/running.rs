//! Batches that a GPU computes while the host does something else.

use std::ops::Range;

use crate::cuda::{BatchOutput, Launched, Predictions};
use crate::error::ProveError;
use crate::evaluate::{BatchResult, Evaluated, Rollout, after_missing_row, targets};
use crate::packed::Segment;
use crate::sketch::SelectedBuckets;

/// An evaluation that was begun: its batches in order.
#[derive(Debug)]
pub(crate) struct Running {
    parts: Vec<Part>,
}

/// One batch.
#[derive(Debug)]
pub(crate) enum Part {
    Done(BatchResult),
    OnDevice(Pending),
}

impl Running {
    pub(crate) const fn new(parts: Vec<Part>) -> Self {
        Self { parts }
    }

    /// Whether [`Running::finish`] will not wait.
    pub(crate) fn is_done(&self) -> bool {
        // Batches of one stream end in order.
        self.parts.last().is_none_or(|part| match part {
            Part::Done(_) => true,
            Part::OnDevice(pending) => pending.launched.as_ref().is_none_or(Launched::is_done),
        })
    }

    /// Waits for all batches.
    ///
    /// # Errors
    /// What went wrong on the device; members that are not finite have errors of their own.
    pub(crate) fn finish(self) -> Result<Vec<BatchResult>, ProveError> {
        self.parts
            .into_iter()
            .map(|part| match part {
                Part::Done(result) => Ok(result),
                Part::OnDevice(pending) => pending.finish(),
            })
            .collect()
    }
}

/// Where one member's results are.
#[derive(Debug)]
struct Member {
    prompt_rows: Range<usize>,
    completion_rows: Range<usize>,
    predictions: Range<usize>,
}

/// A batch on the device, and how its results are read.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Place of the batch's first rollout among all.
    first: usize,
    tokens: usize,
    members: Vec<Member>,
    predictions: Predictions,
    /// Unset before it is launched.
    launched: Option<Launched>,
    /// By member: probabilities behind sampling's transformations.
    chosen: Vec<Vec<f32>>,
}

impl Pending {
    pub(crate) fn new(first: usize, tokens: usize) -> Self {
        let (members, chosen) = (Vec::new(), Vec::new());
        Self { first, tokens, members, predictions: Predictions::default(), launched: None, chosen }
    }

    /// Adds the next member: its segments, and the rows whose logits predict its tokens.
    pub(crate) fn push(
        &mut self,
        member: &Rollout<'_>,
        (prompt, completion): (Option<&Segment>, &Segment),
        rows: &[i64],
    ) {
        // Rows and tokens are far below 2^31.
        let narrow = |value: i64| i32::try_from(value).unwrap_or(i32::MAX);
        let start = self.predictions.rows.len();
        self.predictions.rows.extend(rows.iter().copied().map(narrow));
        self.predictions.targets.extend(targets(member).map(narrow));
        self.predictions.eos.resize(self.predictions.rows.len(), -1);
        // The row before the last token says how likely the end was.
        if let Some(last) = self.predictions.eos[start..].last_mut() {
            *last = narrow(i64::from(member.eos_token.0));
        }
        self.members.push(Member {
            prompt_rows: prompt.map(|prompt| prompt.rows.clone()).unwrap_or_default(),
            completion_rows: completion.rows.clone(),
            predictions: start..self.predictions.rows.len(),
        });
    }

    pub(crate) const fn predictions(&self) -> &Predictions {
        &self.predictions
    }

    /// The same, under way.
    pub(crate) fn launched(self, (launched, chosen): (Launched, Vec<Vec<f32>>)) -> Self {
        Self { launched: Some(launched), chosen, ..self }
    }

    fn finish(mut self) -> Result<BatchResult, ProveError> {
        let launched = self.launched.take();
        let launched =
            launched.ok_or_else(|| ProveError::BadRequest { detail: "a batch was never launched".to_owned() })?;
        let output = launched.finish().map_err(|error| ProveError::classify(error, self.tokens))?;
        Ok(self.result(output))
    }

    fn result(mut self, output: BatchOutput) -> BatchResult {
        let rollouts = (0..self.members.len()).map(|member| self.read(member, &output)).collect();
        BatchResult { first: self.first, rollouts, buckets: SelectedBuckets::from_rows(output.buckets) }
    }

    fn read(&mut self, place: usize, output: &BatchOutput) -> Result<Evaluated, ProveError> {
        let Member { prompt_rows, completion_rows, predictions } = &self.members[place];
        let mut rows = prompt_rows.clone().chain(completion_rows.clone());
        let not_finite = |position| ProveError::NonFinite { member: self.first + place, position };
        if let Some(position) = rows.position(|row| !output.is_finite(row)) {
            return Err(not_finite(position));
        }
        let logprobs = output.logprobs[predictions.clone()].to_vec();
        if let Some(at) = logprobs.iter().position(|logprob| !logprob.is_finite()) {
            return Err(not_finite(prompt_rows.len() + at));
        }
        let eos_probability = predictions.clone().next_back().map_or(0.0, |last| output.eos_probabilities[last]);
        let chosen_probabilities = self.chosen.get_mut(place).map(std::mem::take).unwrap_or_default();
        Ok(Evaluated {
            logprobs: after_missing_row(prompt_rows.is_empty(), logprobs, f32::NEG_INFINITY),
            prompt_rows: prompt_rows.clone(),
            completion_rows: completion_rows.clone(),
            eos_probability,
            chosen_probabilities,
        })
    }
}

#[cfg(test)]
mod tests {
    use grail_protocol::ids::TokenId;

    use super::*;
    use crate::packed::PackedBatch;

    const EOS: TokenId = TokenId(9);

    /// Two members behind one prompt of two tokens, and one without a prompt: 2 + 3 + 1 + 2 rows, 3 + 1 + 1 predictions.
    fn pending() -> Pending {
        let tokens: Vec<TokenId> = (1..9).map(TokenId).collect();
        let (prompt, none) = (&tokens[..2], &tokens[..0]);
        let mut batch = PackedBatch::new();
        let shared = batch.push_sequence(prompt);
        let mut pending = Pending::new(10, 8);
        for completion in [&tokens[2..5], &tokens[5..6]] {
            let own = batch.push_continuation(shared, completion);
            let segments = (Some(batch.segment(shared)), batch.segment(own));
            let rows: Vec<i64> = std::iter::once(1).chain(segments.1.rows.clone().map(|row| row as i64)).collect();
            let member = Rollout { prompt, completion, eos_token: EOS, sampling: None };
            pending.push(&member, segments, &rows[..completion.len()]);
        }
        let own = batch.push_sequence(&tokens[6..]);
        let member = Rollout { prompt: none, completion: &tokens[6..], eos_token: EOS, sampling: None };
        pending.push(&member, (None, batch.segment(own)), &[6]);
        pending
    }

    fn output() -> BatchOutput {
        let logprobs = vec![-1.0, -2.0, -3.0, -4.0, -5.0];
        BatchOutput { buckets: vec![[1; 16]; 8], logprobs, eos_probabilities: vec![0.1, 0.2, 0.3, 0.4, 0.5] }
    }

    #[test]
    fn each_member_gets_its_own_predictions() {
        let pending = pending();
        let Predictions { rows, targets, eos } = pending.predictions();
        assert_eq!(rows, &[1, 2, 3, 1, 6]);
        assert_eq!(targets, &[3, 4, 5, 6, 8]);
        assert_eq!(eos, &[-1, -1, 9, 9, 9]);
        let result = pending.result(output());
        assert_eq!(result.first, 10);
        let members: Vec<Evaluated> = result.rollouts.into_iter().map(Result::unwrap).collect();
        assert_eq!(members[0].logprobs, [-1.0, -2.0, -3.0]);
        assert_eq!((members[0].prompt_rows.clone(), members[0].completion_rows.clone()), (0..2, 2..5));
        assert_eq!((members[1].logprobs.as_slice(), members[1].eos_probability), (&[-4.0][..], 0.4));
        assert_eq!(members[2].logprobs, [f32::NEG_INFINITY, -5.0], "no row predicts its first token");
        let eos: Vec<f32> = members.iter().map(|member| member.eos_probability).collect();
        assert_eq!(eos, [0.3, 0.4, 0.5]);
    }

    #[test]
    fn what_is_not_finite_names_the_member_and_spares_the_others() {
        let mut spoilt = output();
        spoilt.buckets[4][0] = i8::MIN;
        spoilt.logprobs[4] = f32::NAN;
        let result = pending().result(spoilt);
        assert!(matches!(result.rollouts[0], Err(ProveError::NonFinite { member: 10, position: 4 })));
        assert!(result.rollouts[1].is_ok());
        assert!(matches!(result.rollouts[2], Err(ProveError::NonFinite { member: 12, .. })));

        let mut prompt = output();
        prompt.buckets[1][0] = i8::MIN;
        let result = pending().result(prompt);
        let refused = result.rollouts.iter().map(Result::is_err).collect::<Vec<_>>();
        assert_eq!(refused, [true, true, false], "both share the prompt");
    }
}
