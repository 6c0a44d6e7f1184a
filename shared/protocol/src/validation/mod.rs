//! The validator as a pure function: the verdict that a validator gives on a window file, and what it does not see.
//!
//! Work that needs a model, a tokenizer or an environment is the caller's, and known before anything is checked:
//!
//! ```no_run
//! # use grail_protocol::validation::{Facts, RowEvaluation, RowFacts, ValidationContext, needs, validate, Report};
//! # use grail_protocol::window_file::read_bytes;
//! # fn ask(_: &grail_protocol::validation::NeededRow) -> RowFacts { unimplemented!() }
//! # fn prompt(_: &grail_protocol::validation::NeededGroup) -> Result<Vec<grail_protocol::ids::TokenId>, String> { unimplemented!() }
//! # fn verify(bytes: Vec<u8>, context: &ValidationContext) -> Result<Report, Box<dyn std::error::Error>> {
//! let file = match read_bytes(bytes) {
//!     Ok(file) => file,
//!     Err(error) => return Ok(Report::of_read_error(&error)),
//! };
//! let needs = needs(&file, context);
//! let facts = Facts {
//!     prompts: needs.groups.iter().map(|needed| (needed.group, prompt(needed))).collect(),
//!     rows: needs.rows.iter().map(|needed| (needed.row, ask(needed))).collect(),
//! };
//! let report = validate(&file, context, &facts)?;
//! # Ok(report)
//! # }
//! ```
//!
//! The sampled verdict follows the reference step by step, early exit included; `all_rows` runs the same checks over every row,
//! `strict` and `exactness` hold what the reference never looks at. Another `R_v` may be tried with the same facts.

mod canonical;
mod cheap;
mod context;
mod groups;
mod proof;
mod report;
mod row;
mod schema;
mod strict;
mod structure;

use std::collections::{BTreeMap, HashSet};

use rayon::prelude::*;

pub use canonical::{canonical_commit, canonical_commitments};
pub use cheap::{CheapCheck, Problem, ProofOutput, cheap_checks};
pub use context::{
    Facts, Forward, MissingFacts, NeededGroup, NeededRow, Needs, RowEvaluation, RowFacts, ValidationContext,
};
pub use groups::{Group, group_digests, group_notes, groups, groups_are_valid, row_completion_digest, sampled_rows};
pub use report::{
    AllRows, Check, CheckedRow, Checks, Distribution, Exactness, Finding, FindingCode, GroupNote, Metrics, Number,
    Processed, REPORT_SCHEMA, Report, RowDetail, RowExactness, Severity, Verdict,
};
pub use structure::{Rejection, check_structure};

use crate::hash::Digest;
use crate::ids::GroupIndex;
use crate::seed::environment_seed;
use crate::window_file::WindowFile;
use row::{Before, RowOutcome};

/// What [`validate`] will ask of its [`Facts`]: nothing for a file that is rejected, and no row that fails before its facts
/// matter.
#[must_use]
pub fn needs(file: &WindowFile, context: &ValidationContext) -> Needs {
    if check_structure(file, context).is_err() {
        return Needs { groups: Vec::new(), rows: Vec::new() };
    }
    let rows: Vec<NeededRow> =
        file.rows.par_iter().enumerate().filter_map(|(index, row)| row::needed(index, row, context)).collect();
    let numbers: std::collections::BTreeSet<GroupIndex> = rows.iter().map(|row| row.group).collect();
    let seed = |group: GroupIndex| environment_seed(&context.hotkey, &context.window_hash, group);
    Needs { groups: numbers.into_iter().map(|group| NeededGroup { group, seed: seed(group) }).collect(), rows }
}

/// Judges a file that was read; see [`Report::of_read_error`] for one that was not.
///
/// # Errors
/// [`MissingFacts`] if `facts` lacks what [`needs`] asked for: that is the caller's gap and says nothing of the file.
pub fn validate(file: &WindowFile, context: &ValidationContext, facts: &Facts) -> Result<Report, MissingFacts> {
    let mut report = match check_structure(file, context) {
        Err(rejection) => Report::rejected(rejection.code()),
        Ok(()) => judge(file, context, facts)?,
    };
    report.strict = strict::findings(file, &context.hotkey, &context.window_hash, facts);
    report.exactness = strict::exactness(file, facts);
    Ok(report)
}

fn judge(file: &WindowFile, context: &ValidationContext, facts: &Facts) -> Result<Report, MissingFacts> {
    let outcomes: Vec<RowOutcome> = file
        .rows
        .par_iter()
        .enumerate()
        .map(|(index, row)| row::check_row(index, row, context, facts))
        .collect::<Result<_, _>>()?;
    let digests: Vec<Option<Digest>> = file.rows.par_iter().map(row_completion_digest).collect();
    let indices = sampled_rows(file, context);
    let judged = Judged { file, outcomes, digests };
    let mut report = judged.sampled(indices);
    report.all_rows = judged.all_rows();
    Ok(report)
}

/// A file whose rows have been checked, each once.
struct Judged<'a> {
    file: &'a WindowFile,
    outcomes: Vec<RowOutcome>,
    /// Digests of the completions.
    digests: Vec<Option<Digest>>,
}

impl Judged<'_> {
    /// The reference's loop over the sampled rows.
    fn sampled(&self, indices: Vec<usize>) -> Report {
        let mut state = Loop::new(indices.len());
        let mut row_checks = Vec::new();
        for &index in &indices {
            if let RowOutcome::Checked(detail) = &self.outcomes[index] {
                row_checks
                    .push(CheckedRow { checks: detail.checks.clone(), logprob_median_dev: detail.logprob_median_dev });
            }
            if state.enter(&self.outcomes[index]).is_some() {
                break;
            }
        }
        let failed = state.failure.is_some() || !groups_are_valid(&self.file.rows, &indices);
        let metrics = if failed { self.failed_metrics(&state) } else { self.metrics(&state, &indices) };
        let last = || row_checks.last().map(|row: &CheckedRow| row.checks.clone()).unwrap_or_default();
        Report {
            verdict: if failed { Verdict::Failed } else { Verdict::Success },
            failure_reason: state.failure.flatten(),
            metrics: Some(metrics),
            processed: state.processed,
            indices_checked: Some(indices),
            rows_checked: row_checks.len(),
            first_failing_row_checks: failed.then(last),
            row_checks,
            distinct_digests: (!failed).then(|| self.distinct(0..self.digests.len())),
            ..Report::rejected("")
        }
    }

    /// Every row, also those after a failure.
    fn all_rows(&self) -> AllRows {
        let mut state = Loop::new(self.outcomes.len());
        for outcome in &self.outcomes {
            state.enter(outcome);
        }
        let indices: Vec<usize> = (0..self.outcomes.len()).collect();
        let group_notes = group_notes(&self.file.rows, &indices);
        let groups_valid = group_notes.is_empty();
        let failed = state.failure.is_some() || !groups_valid;
        AllRows {
            verdict: if failed { Verdict::Failed } else { Verdict::Success },
            failure_reason: state.failure.flatten(),
            valid: state.valid,
            checked: state.checked,
            unique: self.distinct(0..self.digests.len()),
            soft_failures: state.soft_failures,
            groups_valid: Some(groups_valid),
            group_notes,
            rows: self.outcomes.iter().map(RowOutcome::detail).collect(),
        }
    }

    fn metrics(&self, state: &Loop, indices: &[usize]) -> Metrics {
        let total = self.file.rows.len();
        let unique = self.distinct(indices.iter().copied());
        let successful =
            indices.iter().filter(|index| self.file.rows[**index].commit.rollout.success == Some(true)).count();
        Metrics {
            valid: state.valid,
            checked: state.checked,
            total,
            estimated_valid: extrapolate(total, state.valid, state.checked),
            successful,
            estimated_successful: extrapolate(total, successful, state.checked),
            unique,
            estimated_unique: extrapolate(total, unique, state.checked),
            prompt_valid: state.valid,
            prompt_mismatch: 0,
            had_failure: 0,
        }
    }

    fn failed_metrics(&self, state: &Loop) -> Metrics {
        Metrics { checked: state.checked, total: self.file.rows.len(), had_failure: 1, ..Metrics::default() }
    }

    fn distinct(&self, indices: impl Iterator<Item = usize>) -> usize {
        indices.filter_map(|index| self.digests[index]).collect::<HashSet<_>>().len()
    }
}

/// `int(total * (part / checked))` in binary64.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the reference truncates the same product; counts of rows are far below 2^53"
)]
fn extrapolate(total: usize, part: usize, checked: usize) -> usize {
    if checked == 0 { 0 } else { (total as f64 * (part as f64 / checked as f64)) as usize }
}

/// Counters of a loop over rows.
#[derive(Debug)]
struct Loop {
    planned: usize,
    checked: usize,
    valid: usize,
    processed: Processed,
    soft_failures: BTreeMap<Check, usize>,
    /// The first failure, with its reason if it has one.
    failure: Option<Option<String>>,
}

impl Loop {
    fn new(planned: usize) -> Self {
        Self {
            planned,
            checked: 0,
            valid: 0,
            processed: Processed::default(),
            soft_failures: BTreeMap::new(),
            failure: None,
        }
    }

    /// Takes one row; `Some` if it, or one before it, has failed the miner.
    fn enter(&mut self, outcome: &RowOutcome) -> Option<()> {
        self.checked += 1;
        let failure = match outcome {
            RowOutcome::Before(before) => {
                self.processed.invalid_signature += usize::from(*before == Before::RowSignature);
                Some(None)
            }
            RowOutcome::Checked(detail) => {
                self.processed.total += 1;
                if let Some(check) = detail.checks.hard_failure() {
                    self.processed.invalid_proof += 1;
                    Some(Some(format!("hard:{check}")))
                } else {
                    self.valid += 1;
                    self.soft_failure(&detail.checks).map(|check| Some(format!("soft:{check}")))
                }
            }
        };
        if self.failure.is_none() {
            self.failure = failure;
        }
        self.failure.is_some().then_some(())
    }

    /// Counts the soft failures of a row; the first check that has reached its cut-off.
    fn soft_failure(&mut self, checks: &Checks) -> Option<Check> {
        let mut reached = None;
        for (check, passed) in &checks.0 {
            if let (false, Some(threshold)) = (passed, check.soft_threshold()) {
                let count = self.soft_failures.entry(*check).or_default();
                *count += 1;
                if *count >= cut_off(threshold, self.planned) {
                    reached = reached.or(Some(*check));
                }
            }
        }
        reached
    }
}

/// Failures of a soft check that fail the miner: `max(1, ceil(threshold · planned))`.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the reference rounds the same product up; counts of rows are far below 2^53"
)]
fn cut_off(threshold: f64, planned: usize) -> usize {
    ((threshold * planned as f64).ceil() as usize).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constants::{DISTRIBUTION_SOFT_THRESHOLD, REWARD_SOFT_THRESHOLD};

    #[test]
    fn cut_offs_are_those_of_the_reference() {
        let reward = [16, 32, 48, 64].map(|planned| cut_off(REWARD_SOFT_THRESHOLD, planned));
        let distribution = [16, 32, 48, 64].map(|planned| cut_off(DISTRIBUTION_SOFT_THRESHOLD, planned));
        assert_eq!(reward, [4, 7, 10, 13]);
        assert_eq!(distribution, [9, 17, 25, 33]);
        assert_eq!(cut_off(REWARD_SOFT_THRESHOLD, 0), 1);
    }

    #[test]
    fn estimates_are_truncated_products() {
        assert_eq!(extrapolate(48, 16, 16), 48);
        assert_eq!(extrapolate(16, 5, 16), 5);
        assert_eq!(extrapolate(100, 1, 3), 33);
        assert_eq!(extrapolate(0, 0, 0), 0);
    }
}
