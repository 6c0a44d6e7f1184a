//! The loop turn of one rollout (validation §4): what comes before the nine checks, then the checks in their order.

use super::context::{Facts, Forward, MissingFacts, NeededRow, ValidationContext};
use super::proof::{self, LogprobDeviation};
use super::report::{Check, Distribution, Number, RowDetail};
use super::schema;
use crate::constants::{
    MIN_EOS_PROBABILITY, REWARD_ABS_TOL, REWARD_REL_TOL, SAMPLING_LOW_Q10_MAX, SAMPLING_MEDIAN_LOW_MAX,
    SAMPLING_MIN_STEPS, SAMPLING_MIN_TOKEN_PROB,
};
use crate::distribution::{DistributionMetrics, DistributionVerdict, SuspicionReasons, assess};
use crate::hex_text::clean_hex;
use crate::ids::{GroupIndex, Hotkey, TokenId};
use crate::keys;
use crate::seed::environment_seed;
use crate::termination::{CompletionEnd, max_new_tokens};
use crate::window_file::{ReadCommit, ReadRow};

/// What ends a row before its checks. All of them fail the miner without a reason text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    CheckpointWindow { claimed: Option<i64>, expected: u64 },
    RowSignature,
}

/// Outcome of one row, whoever asks for it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RowOutcome {
    /// Ended before the checks.
    Before(Before),
    Checked(Box<RowDetail>),
}

impl RowOutcome {
    /// What a report shows of the row.
    pub(super) fn detail(&self) -> RowDetail {
        match self {
            Self::Checked(detail) => RowDetail::clone(detail),
            Self::Before(before) => RowDetail { note: Some(before.note()), ..RowDetail::default() },
        }
    }
}

impl Before {
    pub(super) fn note(self) -> String {
        match self {
            Self::CheckpointWindow { claimed: Some(claimed), expected } => {
                format!("checkpoint window {claimed}, the validator's is {expected}")
            }
            Self::CheckpointWindow { claimed: None, expected } => {
                format!("no checkpoint window, the validator's is {expected}")
            }
            Self::RowSignature => "the row signature does not verify".to_owned(),
        }
    }
}

/// A commit whose form, ids and lengths are valid, in the types of the protocol.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    pub(super) tokens: Vec<TokenId>,
    pub(super) prompt_length: usize,
    /// The row's beacon as bytes.
    pub(super) randomness: Vec<u8>,
}

impl Sequence {
    pub(super) fn completion_length(&self) -> usize {
        self.tokens.len() - self.prompt_length
    }
}

/// The sequence of a commit that passes the schema and the token check; the first of the two that fails otherwise, and why.
pub(super) fn sequence(commit: &ReadCommit, context: &ValidationContext) -> Result<Sequence, (Check, String)> {
    let form = |what: String| (Check::SchemaValid, what);
    if let Some(defect) = schema::defect(commit) {
        return Err(form(defect));
    }
    let beacon = commit.beacon_randomness().unwrap_or_default();
    let randomness = clean_hex(beacon).map_err(|error| form(format!("the beacon's randomness: {error}")))?;
    // The schema has seen lengths that add up.
    let prompt_length = commit.prompt_length().ok_or_else(|| form("no prompt length".to_owned()))?;
    let wrong = |what: String| (Check::TokensValid, what);
    let ids = commit.tokens.plain().ok_or_else(|| wrong("the tokens are no list of 32-bit integers".to_owned()))?;
    let most = context.max_position_embeddings;
    if ids.len() > most {
        return Err(wrong(format!("{} tokens, the model takes at most {most}", ids.len())));
    }
    let in_vocabulary = |(position, id): (usize, &i32)| {
        let token = u32::try_from(*id).ok().filter(|id| *id < context.vocab_size).map(TokenId);
        token.ok_or_else(|| wrong(format!("token {position} is {id}, the vocabulary has {}", context.vocab_size)))
    };
    let tokens = ids.iter().enumerate().map(in_vocabulary).collect::<Result<Vec<_>, _>>()?;
    Ok(Sequence { tokens, prompt_length, randomness })
}

/// What the caller must supply for this row, if the row comes that far.
pub(super) fn needed(index: usize, row: &ReadRow, context: &ValidationContext) -> Option<NeededRow> {
    let group = GroupIndex(row.rollout_group?);
    let sequence = sequence(&row.commit, context).ok()?;
    Some(NeededRow {
        row: index,
        group,
        seed: environment_seed(&context.hotkey, &context.window_hash, group),
        tokens: sequence.tokens,
        prompt_length: sequence.prompt_length,
        randomness: sequence.randomness,
    })
}

/// Runs one row. The window, the block hash and the nonce have been checked with the structure of the file.
pub(super) fn check_row(
    index: usize,
    row: &ReadRow,
    context: &ValidationContext,
    facts: &Facts,
) -> Result<RowOutcome, MissingFacts> {
    if let Some(before) = ends_before(row, context) {
        return Ok(RowOutcome::Before(before));
    }
    let mut detail = RowDetail::default();
    run_checks(index, row, &mut Run { context, facts, detail: &mut detail })?;
    Ok(RowOutcome::Checked(Box::new(detail)))
}

pub(super) fn ends_before(row: &ReadRow, context: &ValidationContext) -> Option<Before> {
    if let Some(expected) = context.checkpoint_window
        && row.checkpoint_window.and_then(|window| u64::try_from(window).ok()) != Some(expected.0)
    {
        return Some(Before::CheckpointWindow { claimed: row.checkpoint_window, expected: expected.0 });
    }
    (!row_signature_verifies(row)).then_some(Before::RowSignature)
}

/// With the row's own hotkey, whatever it is: that is what the reference does.
fn row_signature_verifies(row: &ReadRow) -> bool {
    let (Some(challenge), Some(hotkey), Some(signature)) = (&row.challenge, &row.hotkey, &row.signature) else {
        return false;
    };
    if challenge.is_empty() || hotkey.is_empty() {
        return false;
    }
    signature.parse().is_ok_and(|signature| keys::verify(&Hotkey(hotkey.clone()), challenge.as_bytes(), &signature))
}

struct Run<'a> {
    context: &'a ValidationContext,
    facts: &'a Facts,
    detail: &'a mut RowDetail,
}

impl Run<'_> {
    /// Notes a result; true if the row goes on.
    fn note(&mut self, check: Check, result: Result<(), String>) -> bool {
        let passed = result.is_ok();
        self.detail.checks.0.push((check, passed));
        if let Err(note) = result {
            self.detail.note.get_or_insert(note);
        }
        passed || check.soft_threshold().is_some()
    }

    /// An exception inside a check is hard, even where the check is soft: nothing of the kind is left for the two soft ones.
    fn fail(&mut self, check: Check, note: impl Into<String>) {
        self.note(check, Err(note.into()));
    }
}

fn run_checks(index: usize, row: &ReadRow, run: &mut Run<'_>) -> Result<(), MissingFacts> {
    let commit = &row.commit;
    let sequence = match sequence(commit, run.context) {
        Ok(sequence) => sequence,
        Err((check, note)) => {
            if check == Check::TokensValid {
                run.note(Check::SchemaValid, Ok(()));
            }
            run.fail(check, note);
            return Ok(());
        }
    };
    run.note(Check::SchemaValid, Ok(()));
    run.note(Check::TokensValid, Ok(()));

    // Files with a null group were rejected with their structure.
    let group = GroupIndex(row.rollout_group.unwrap_or_default());
    let canonical = run.facts.prompts.get(&group).ok_or(MissingFacts::Prompt(group))?;
    if !run.note(Check::EnvPromptValid, check_prompt(&sequence, canonical)) {
        return Ok(());
    }
    let row_facts = run.facts.rows.get(&index).ok_or(MissingFacts::Row(index))?;
    let claim = proof::check_claim(commit, &sequence, run.context);
    let positions = proof::challenged_positions(&sequence, run.context);
    let proof = claim.and_then(|()| {
        let forward = row_facts.forward.as_ref().map_err(Clone::clone)?;
        proof::check_sketches(commit, forward, &positions)?;
        Ok(forward)
    });
    let forward = match proof {
        Ok(forward) => forward,
        Err(note) => {
            run.fail(Check::ProofValid, note);
            return Ok(());
        }
    };
    run.note(Check::ProofValid, Ok(()));
    if !run.note(Check::TerminationValid, check_termination(&sequence, Some(forward.eos_probability), run.context)) {
        return Ok(());
    }
    let evaluation = match &row_facts.evaluation {
        Ok(evaluation) => *evaluation,
        Err(note) => {
            run.fail(Check::EnvEvalValid, note.clone());
            return Ok(());
        }
    };
    run.note(Check::EnvEvalValid, Ok(()));
    run.detail.env_reward = Some(Number(evaluation.reward));
    run.detail.env_success = Some(evaluation.success);
    run.note(Check::RewardValid, check_reward(commit.rollout.total_reward, evaluation.reward));
    check_probabilities(run, commit, &sequence, forward, &positions);
    Ok(())
}

fn check_probabilities(
    run: &mut Run<'_>,
    commit: &ReadCommit,
    sequence: &Sequence,
    forward: &Forward,
    positions: &[usize],
) {
    let LogprobDeviation { result, median, max } = proof::logprob_deviation(commit, sequence, forward, positions);
    run.detail.logprob_median_dev = median.map(Number);
    run.detail.logprob_max_dev = max.map(Number);
    if run.note(Check::LogprobsValid, result) {
        let result = note_distribution(run.detail, &forward.chosen_probabilities);
        run.note(Check::TokenDistributionValid, result);
    }
}

fn check_prompt(sequence: &Sequence, canonical: &Result<Vec<TokenId>, String>) -> Result<(), String> {
    let canonical = canonical.as_ref().map_err(|error| format!("no canonical prompt: {error}"))?;
    if canonical.len() != sequence.prompt_length {
        return Err(format!("prompt of {} tokens, canonical {}", sequence.prompt_length, canonical.len()));
    }
    compare_prompts(&sequence.tokens, canonical)
}

/// The claimed tokens against those of a canonical prompt, which is not longer.
pub(super) fn compare_prompts(claimed: &[TokenId], canonical: &[TokenId]) -> Result<(), String> {
    let mut pairs = canonical.iter().zip(claimed).enumerate();
    match pairs.find(|(_, (canonical, claimed))| canonical != claimed) {
        None => Ok(()),
        Some((position, (canonical, claimed))) => {
            Err(format!("prompt token {position} is {}, canonical {}", claimed.0, canonical.0))
        }
    }
}

pub(super) fn check_termination(
    sequence: &Sequence,
    eos_probability: Option<f32>,
    context: &ValidationContext,
) -> Result<(), String> {
    let end = CompletionEnd {
        completion_length: u32::try_from(sequence.completion_length()).unwrap_or(u32::MAX),
        max_new_tokens: max_new_tokens(context.max_tokens),
        last_token: sequence.tokens.last().copied(),
        eos_token: context.eos_token,
        eos_probability,
    };
    if end.is_valid() {
        return Ok(());
    }
    Err(if end.eos_token.is_some() && end.last_token == end.eos_token {
        let (position, probability) = (sequence.tokens.len() - 1, eos_probability.unwrap_or(f32::NAN));
        format!(
            "position {position} ends in EOS of probability {probability}, at least {MIN_EOS_PROBABILITY} is needed"
        )
    } else {
        format!("ends after {} of {} tokens without EOS", end.completion_length, end.max_new_tokens)
    })
}

fn check_reward(claimed: Option<f64>, reward: f64) -> Result<(), String> {
    // The schema has seen a number.
    let claimed = claimed.unwrap_or(f64::NAN);
    if is_close(claimed, reward) { Ok(()) } else { Err(format!("claimed reward {claimed}, environment says {reward}")) }
}

/// Python's `math.isclose` with the protocol's tolerances: NaN never, equal infinities always.
fn is_close(a: f64, b: f64) -> bool {
    #[expect(clippy::float_cmp, reason = "equal infinities are close, as in Python")]
    if a == b {
        return true;
    }
    if a.is_infinite() || b.is_infinite() {
        return false;
    }
    (a - b).abs() <= (REWARD_REL_TOL * a.abs().max(b.abs())).max(REWARD_ABS_TOL)
}

fn note_distribution(detail: &mut RowDetail, probabilities: &[f32]) -> Result<(), String> {
    match assess(probabilities) {
        DistributionVerdict::Insufficient => {
            detail.distribution_reason = Some("insufficient".to_owned());
            Err(format!("{} token probabilities, at least {SAMPLING_MIN_STEPS} are needed", probabilities.len()))
        }
        DistributionVerdict::Assessed { metrics, initial, reasons } => {
            detail.distribution = Some(Distribution::from(&metrics));
            detail.distribution_initial = Some(Distribution::from(&initial));
            detail.distribution_reasons = Some(reasons);
            if reasons.any() { Err(suspicions(probabilities, &metrics, &initial, reasons)) } else { Ok(()) }
        }
    }
}

/// What is unusual about the probabilities, each with its bound.
fn suspicions(
    probabilities: &[f32],
    metrics: &DistributionMetrics,
    initial: &DistributionMetrics,
    reasons: SuspicionReasons,
) -> String {
    let least = probabilities.iter().position(|probability| f64::from(*probability) <= metrics.min).unwrap_or_default();
    [
        (reasons.median_low, format!("median {}, must be above {SAMPLING_MEDIAN_LOW_MAX}", metrics.median)),
        (
            reasons.min_low,
            format!(
                "least {} at token {least} of the completion, must be above {SAMPLING_MIN_TOKEN_PROB}",
                metrics.min
            ),
        ),
        (reasons.q10_low, format!("10 % quantile {}, must be above {SAMPLING_LOW_Q10_MAX}", metrics.q10)),
        (
            reasons.q10_low_initial,
            format!("10 % quantile of the first tokens {}, must be above {SAMPLING_LOW_Q10_MAX}", initial.q10),
        ),
    ]
    .into_iter()
    .filter_map(|(applies, text)| applies.then_some(text))
    .fold("token probabilities:".to_owned(), |all, text| {
        let separator = if all.ends_with(':') { " " } else { "; " };
        all + separator + &text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_are_close_as_in_python() {
        for (claimed, reward, close) in [
            (1.0, 1.0, true),
            (1.015, 1.0, true),
            (1.021, 1.0, false),
            (0.0, 1e-6, true),
            (0.0, 1.1e-6, false),
            (-1.0, 1.0, false),
            (f64::NAN, f64::NAN, false),
            (f64::INFINITY, f64::INFINITY, true),
            (f64::INFINITY, 1e308, false),
        ] {
            assert_eq!(is_close(claimed, reward), close, "{claimed} {reward}");
            assert_eq!(is_close(reward, claimed), close, "{reward} {claimed}");
        }
    }
}
