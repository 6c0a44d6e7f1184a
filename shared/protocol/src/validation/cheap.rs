//! Checks that a miner runs on its own file before it uploads it: everything that needs no model.
//!
//! Structure, signatures, lengths, advantages and the strict findings are those of [`super::validate`]. In place of a forward
//! pass stands what the proof itself returned: it gives the EOS probability, and the sketches and logprobs that the file must
//! hold. Nothing is sampled: every row is looked at.

use std::collections::HashMap;
use std::fmt::Display;

use rayon::prelude::*;

use super::context::{Facts, ValidationContext};
use super::groups::group_notes;
use super::proof;
use super::report::{GroupNote, Severity};
use super::row::{self, Sequence};
use super::strict;
use super::structure::check_structure;
use crate::ids::{GroupIndex, TokenId};
use crate::window_file::{ReadRow, WindowFile};

/// What the proof of one row returned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProofOutput<'a> {
    /// Sketches of all positions.
    pub sketches: &'a [u32],
    /// Logprobs of the completion tokens.
    pub logprobs: &'a [f32],
    /// Probability of EOS in the logits row `len − 2`.
    pub eos_probability: f32,
}

/// Inputs of [`cheap_checks`].
pub struct CheapCheck<'a> {
    pub context: &'a ValidationContext,
    /// Prompt ids by group; a group that is missing here is a problem.
    pub prompts: &'a HashMap<GroupIndex, Vec<TokenId>>,
    /// The proof of the row with an index. `None`, for instance after a restart that kept no proof, skips the comparison with
    /// it and trusts an EOS at the end.
    pub proof: &'a (dyn Fn(usize) -> Option<ProofOutput<'a>> + Sync),
}

impl std::fmt::Debug for CheapCheck<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheapCheck")
            .field("context", &self.context)
            .field("prompts", &self.prompts.len())
            .finish_non_exhaustive()
    }
}

/// Why a file must not be uploaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    #[error("the file as a whole is rejected: {0}")]
    File(&'static str),
    #[error("row {row} (group {group:?}): {detail}")]
    Row { row: usize, group: Option<i64>, detail: String },
    #[error("group {group}: {detail}")]
    Group { group: i64, detail: String },
}

/// All problems of a file, best read back from the bytes that are about to go out; none means that a validator with the same
/// model accepts it, apart from what only a forward pass and an evaluation can show.
#[must_use]
pub fn cheap_checks(file: &WindowFile, check: &CheapCheck<'_>) -> Vec<Problem> {
    let context = check.context;
    if let Err(rejection) = check_structure(file, context) {
        return vec![Problem::File(rejection.code())];
    }
    let mut problems: Vec<Problem> = file
        .rows
        .par_iter()
        .enumerate()
        .filter_map(|(index, row)| {
            let detail = check_row(index, row, check).err()?;
            Some(Problem::Row { row: index, group: row.rollout_group, detail })
        })
        .collect();
    let all: Vec<usize> = (0..file.rows.len()).collect();
    let groups = group_notes(&file.rows, &all).into_iter();
    problems.extend(groups.map(|GroupNote { group, detail }| Problem::Group { group, detail }));
    let findings = strict::findings(file, &context.hotkey, &context.window_hash, &Facts::default());
    for finding in findings.into_iter().filter(|finding| finding.severity == Severity::Error) {
        let group = file.rows[finding.row].rollout_group;
        problems.push(Problem::Row { row: finding.row, group, detail: finding.detail });
    }
    problems
}

fn check_row(index: usize, row: &ReadRow, check: &CheapCheck<'_>) -> Result<(), String> {
    if let Some(before) = row::ends_before(row, check.context) {
        return Err(before.note());
    }
    let sequence = row::sequence(&row.commit, check.context).map_err(|(_, note)| note)?;
    check_prompt(row, &sequence, check)?;
    proof::check_claim(&row.commit, &sequence, check.context)?;
    let proof = (check.proof)(index);
    let eos_probability = proof.map_or(Some(1.0), |proof| Some(proof.eos_probability));
    row::check_termination(&sequence, eos_probability, check.context)?;
    check_logprobs(row, &sequence)?;
    proof.map_or(Ok(()), |proof| check_against_proof(row, &sequence, &proof))
}

fn check_prompt(row: &ReadRow, sequence: &Sequence, check: &CheapCheck<'_>) -> Result<(), String> {
    let group = GroupIndex(row.rollout_group.unwrap_or_default());
    let prompt = check.prompts.get(&group).ok_or_else(|| format!("no prompt is known for group {group}"))?;
    let claimed = &sequence.tokens[..sequence.prompt_length];
    if claimed.len() != prompt.len() {
        return Err(format!("prompt of {} tokens, its group's has {}", claimed.len(), prompt.len()));
    }
    row::compare_prompts(claimed, prompt)
}

/// A log-probability is a number and not above 0; an honest one is finite.
fn check_logprobs(row: &ReadRow, sequence: &Sequence) -> Result<(), String> {
    let logprobs = row.commit.rollout.token_logprobs.plain().unwrap_or_default();
    if logprobs.len() != sequence.tokens.len() {
        return Err(format!("{} logprobs for {} tokens", logprobs.len(), sequence.tokens.len()));
    }
    let mut completion = logprobs.iter().enumerate().skip(sequence.prompt_length);
    let wrong = completion.find(|(_, logprob)| !(logprob.is_finite() && **logprob <= 0.0));
    wrong.map_or(Ok(()), |(position, logprob)| {
        Err(format!("the logprob at {position} is {logprob}, must be finite and at most 0"))
    })
}

fn check_against_proof(row: &ReadRow, sequence: &Sequence, proof: &ProofOutput<'_>) -> Result<(), String> {
    let sketches = row.commit.commitments.sketches().unwrap_or_default();
    compare("sketch", (sketches, proof.sketches), 0)?;
    let logprobs = row.commit.rollout.token_logprobs.plain().unwrap_or_default();
    let prompt_length = sequence.prompt_length;
    compare("logprob", (logprobs.get(prompt_length..).unwrap_or_default(), proof.logprobs), prompt_length)
}

/// Values of the file against those of the proof, which begin at position `first`.
fn compare<T: PartialEq + Display>(what: &str, (file, proof): (&[T], &[T]), first: usize) -> Result<(), String> {
    if file.len() != proof.len() {
        return Err(format!("{} values of {what}, the proof's are {}", file.len(), proof.len()));
    }
    match file.iter().zip(proof).enumerate().find(|(_, (file, proof))| file != proof) {
        None => Ok(()),
        Some((offset, (file, proof))) => {
            Err(format!("the {what} at {} is {file}, the proof's {proof}", first + offset))
        }
    }
}
