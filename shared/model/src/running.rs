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
        let rollouts = (0..self.members.len()).map(|member| self.read(member, &output)).collect();
        Ok(BatchResult { first: self.first, rollouts, buckets: SelectedBuckets::from_rows(output.buckets) })
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
