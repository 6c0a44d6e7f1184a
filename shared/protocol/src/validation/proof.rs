//! The proof of one row (validation §6) and its logprobs (§7).

use std::fmt::Display;

use super::canonical::canonical_commitments;
use super::context::{Forward, ValidationContext};
use super::row::Sequence;
use crate::binding::{CommitBinding, commitments_hash};
use crate::challenge::positions;
use crate::constants::{ACCEPTED_PROOF_VERSIONS, CHALLENGE_K, LAYER_INDEX, LOGPROB_IS_EPS};
use crate::hash::{Digest, sha256, token_hash};
use crate::json::Value;
use crate::keys;
use crate::sketch::{modular_distance, modular_distance_big, tolerance};
use crate::window_file::{Commitments, List, ReadCommit};

/// Everything of the proof check that needs no model.
pub(super) fn check_claim(commit: &ReadCommit, sequence: &Sequence, context: &ValidationContext) -> Result<(), String> {
    let version = commit.proof_version.as_deref().unwrap_or_default();
    if !ACCEPTED_PROOF_VERSIONS.contains(&version) {
        return Err(format!("proof version {version:?}, accepted are {ACCEPTED_PROOF_VERSIONS:?}"));
    }
    if commit.commitments.is_empty() || commit.commitments.len() != Some(sequence.tokens.len()) {
        let count = commit.commitments.len().unwrap_or(0);
        return Err(format!("{count} commitments for {} tokens", sequence.tokens.len()));
    }
    if sequence.completion_length() < CHALLENGE_K {
        return Err(format!(
            "{} tokens of completion, at least {CHALLENGE_K} are needed",
            sequence.completion_length()
        ));
    }
    if !commit_signature_verifies(commit, sequence, context) {
        return Err("the commit signature does not verify".to_owned());
    }
    if commit.layer_index != Some(i64::from(LAYER_INDEX)) {
        return Err(format!("layer index {}, must be {LAYER_INDEX}", commit.layer_index.unwrap_or_default()));
    }
    Ok(())
}

fn commit_signature_verifies(commit: &ReadCommit, sequence: &Sequence, context: &ValidationContext) -> bool {
    let token_hash = token_hash(&sequence.tokens);
    let commitments_hash = hash_of(&commit.commitments);
    let model_name = commit.model_name.as_deref().unwrap_or_default();
    let binding = CommitBinding::new(&token_hash, &sequence.randomness, model_name, &commitments_hash);
    let signature = commit.signature.as_deref().unwrap_or_default().parse();
    signature.is_ok_and(|signature| keys::verify(&context.hotkey, &binding.digest(), &signature))
}

fn hash_of(commitments: &Commitments) -> Digest {
    match commitments {
        Commitments::Sketches(sketches) => commitments_hash(sketches),
        Commitments::Other(_) => sha256(canonical_commitments(commitments).as_bytes()),
    }
}

/// Absolute positions that this `R_v` challenges, ascending.
pub(super) fn challenged_positions(sequence: &Sequence, context: &ValidationContext) -> Vec<usize> {
    positions(&sequence.tokens, &context.challenge.to_bytes(), sequence.prompt_length, sequence.tokens.len())
}

/// The claimed sketches at `positions` against the model's.
pub(super) fn check_sketches(commit: &ReadCommit, forward: &Forward, positions: &[usize]) -> Result<(), String> {
    for &position in positions {
        let model = *forward.sketches.get(position).ok_or_else(|| format!("the model gave no sketch at {position}"))?;
        check_sketch(&commit.commitments, position, model)?;
    }
    Ok(())
}

fn check_sketch(commitments: &Commitments, position: usize, model: u32) -> Result<(), String> {
    let bound = tolerance(position);
    let far = |claimed: &dyn Display, distance: &dyn Display| {
        Err(format!(
            "the sketch at {position} is {claimed}, the model's {model}: distance {distance}, at most {bound} is allowed"
        ))
    };
    match claimed_sketch(commitments, position) {
        None => Err(format!("commitment {position} has no sketch")),
        Some(Claimed::Int(claimed)) => {
            let distance = modular_distance(claimed, i64::from(model));
            if distance <= i128::from(bound) { Ok(()) } else { far(&claimed, &distance) }
        }
        Some(Claimed::Other(claimed)) => {
            let claimed = claimed.to_bigint().ok_or_else(|| format!("the sketch at {position} is no integer"))?;
            let distance = modular_distance_big(&claimed, &model.into());
            if distance <= bound.into() { Ok(()) } else { far(&claimed, &distance) }
        }
    }
}

/// A claimed sketch.
pub(super) enum Claimed<'a> {
    Int(i64),
    Other(&'a Value),
}

/// `commitments[position]["sketch"]`.
pub(super) fn claimed_sketch(commitments: &Commitments, position: usize) -> Option<Claimed<'_>> {
    match commitments {
        Commitments::Sketches(sketches) => sketches.get(position).map(|sketch| Claimed::Int(i64::from(*sketch))),
        Commitments::Other(value) => {
            let sketch = value.as_array()?.get(position)?.get("sketch")?;
            Some(sketch.as_i64().map_or(Claimed::Other(sketch), Claimed::Int))
        }
    }
}

/// Result of the logprob check with the values that reports show.
#[derive(Debug)]
pub(super) struct LogprobDeviation {
    pub(super) result: Result<(), String>,
    pub(super) median: Option<f64>,
    pub(super) max: Option<f64>,
}

/// Compares the claimed logprobs at the challenged positions with the model's.
pub(super) fn logprob_deviation(
    commit: &ReadCommit,
    sequence: &Sequence,
    forward: &Forward,
    positions: &[usize],
) -> LogprobDeviation {
    match deviations(commit, sequence, forward, positions) {
        Err(note) => LogprobDeviation { result: Err(note), median: None, max: None },
        Ok(mut deviations) => {
            // With some NaN the reference's result depends on how its sort meets them; here any NaN is refused.
            if let Some(nan) = deviations.iter().position(|deviation| deviation.is_nan()) {
                let result = Err(pair_at(commit, sequence, forward, positions[nan]));
                return LogprobDeviation { result, median: Some(f64::NAN), max: Some(f64::NAN) };
            }
            let worst =
                deviations.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(place, _)| positions[place]);
            deviations.sort_unstable_by(f64::total_cmp);
            let median = median(&deviations);
            let result = if median <= LOGPROB_IS_EPS {
                Ok(())
            } else {
                let worst = worst.map(|position| pair_at(commit, sequence, forward, position)).unwrap_or_default();
                Err(format!("median logprob deviation {median}, at most {LOGPROB_IS_EPS} is allowed; at worst {worst}"))
            };
            LogprobDeviation { result, median: Some(median), max: deviations.last().copied() }
        }
    }
}

/// Both logprobs at a position that has them.
fn pair_at(commit: &ReadCommit, sequence: &Sequence, forward: &Forward, position: usize) -> String {
    let claimed = claimed_logprob(&commit.rollout.token_logprobs, position).unwrap_or(f64::NAN);
    let model = forward.logprobs.get(position - sequence.prompt_length).copied().unwrap_or(f32::NAN);
    format!("the logprob at {position} is {claimed}, the model's {model}")
}

/// `exp(|Δ|) − 1` at each position; an error where Python's `exp` raises.
fn deviations(
    commit: &ReadCommit,
    sequence: &Sequence,
    forward: &Forward,
    positions: &[usize],
) -> Result<Vec<f64>, String> {
    let claims = &commit.rollout.token_logprobs;
    if claims.len() != sequence.tokens.len() {
        return Err(format!("{} logprobs for {} tokens", claims.len(), sequence.tokens.len()));
    }
    if positions.len() < CHALLENGE_K {
        return Err(format!("{} challenged positions, {CHALLENGE_K} are needed", positions.len()));
    }
    let deviation = |position: usize| {
        let claimed = claimed_logprob(claims, position).ok_or_else(|| format!("no logprob at {position}"))?;
        let model = forward.logprobs.get(position - sequence.prompt_length);
        let model = f64::from(*model.ok_or_else(|| format!("the model gave no logprob at {position}"))?);
        let difference = (model - claimed).abs();
        let deviation = difference.exp() - 1.0;
        if deviation.is_infinite() && difference.is_finite() {
            return Err(format!("{}: off by {difference}", pair_at(commit, sequence, forward, position)));
        }
        Ok(deviation)
    };
    positions.iter().map(|position| deviation(*position)).collect()
}

/// One claimed logprob, widened.
pub(super) fn claimed_logprob(claims: &List<f32>, position: usize) -> Option<f64> {
    match claims {
        List::Plain(values) => values.get(position).map(|value| f64::from(*value)),
        List::Other(values) => match values.get(position)? {
            Value::Float(value) => Some(*value),
            #[expect(clippy::cast_precision_loss, reason = "a logprob that is an integer is small")]
            Value::Int(value) => Some(*value as f64),
            _ => None,
        },
    }
}

/// Mean of the two middle values, or the middle one.
fn median(sorted: &[f64]) -> f64 {
    let upper = sorted.len() / 2;
    match (sorted.get(upper.wrapping_sub(1)), sorted.get(upper)) {
        (Some(below), Some(above)) if sorted.len().is_multiple_of(2) => (below + above) / 2.0,
        (_, Some(middle)) => *middle,
        (_, None) => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_pythons() {
        assert!(median(&[]).is_nan());
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[1.0, 4.0]), 2.5);
        assert_eq!(median(&[1.0, 4.0, f64::INFINITY]), 4.0);
        assert_eq!(median(&[1.0, f64::INFINITY]), f64::INFINITY);
    }
}
