//! What a window file says about the model that made it: how many groups teach something, how completions end.

use std::collections::{BTreeMap, HashSet};

use grail_protocol::constants::ROLLOUTS_PER_PROBLEM;
use grail_protocol::ids::TokenId;
use grail_protocol::validation::{Check, Report};
use grail_protocol::window_file::WindowFile;
use serde::Serialize;

/// Shares over all rows of a file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shares {
    pub rows: usize,
    pub groups: usize,
    /// Distinct completions.
    pub distinct: usize,
    /// Share of groups with 1 to 15 successes by the environment's judgement: only those teach a trainer anything.
    pub mixed_groups: f64,
    /// Share of rows that end in the EOS token.
    pub natural_ends: f64,
    /// Tokens of the shortest completion.
    pub shortest: usize,
    /// Share of rows that pass the distribution check.
    pub distribution: f64,
}

/// Shares of a file that was judged.
#[must_use]
pub fn of(file: &WindowFile, report: &Report, eos_token: TokenId) -> Shares {
    let mut groups: BTreeMap<Option<i64>, usize> = BTreeMap::new();
    let mut distinct = HashSet::new();
    let (mut ends, mut distribution, mut shortest) = (0_usize, 0_usize, usize::MAX);
    for (index, row) in file.rows.iter().enumerate() {
        let detail = report.all_rows.rows.get(index);
        let success = detail.and_then(|detail| detail.env_success).unwrap_or(false);
        *groups.entry(row.rollout_group).or_default() += usize::from(success);
        let passes = detail.and_then(|detail| detail.checks.get(Check::TokenDistributionValid));
        distribution += usize::from(passes == Some(true));
        let tokens = row.commit.tokens.plain().unwrap_or_default();
        let prompt = row.commit.rollout.prompt_length.and_then(|length| usize::try_from(length).ok());
        let completion = prompt.and_then(|prompt| tokens.get(prompt..)).unwrap_or_default();
        ends += usize::from(completion.last().is_some_and(|last| u32::try_from(*last) == Ok(eos_token.0)));
        shortest = shortest.min(completion.len());
        distinct.insert(completion.to_vec());
    }
    let rows = file.rows.len();
    let mixed = groups.values().filter(|successes| (1..ROLLOUTS_PER_PROBLEM).contains(*successes)).count();
    Shares {
        rows,
        groups: groups.len(),
        distinct: distinct.len(),
        mixed_groups: share(mixed, groups.len()),
        natural_ends: share(ends, rows),
        shortest: if rows == 0 { 0 } else { shortest },
        distribution: share(distribution, rows),
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of rows are far below 2^53")]
fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
