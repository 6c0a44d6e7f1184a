//! Sampling of groups (validation §3), their advantages and the counts of completions (§8).

use std::collections::HashSet;

use rayon::prelude::*;

use super::canonical::canonical_commit;
use super::context::ValidationContext;
use super::report::GroupNote;
use crate::advantage::inconsistency;
use crate::constants::ROLLOUTS_PER_PROBLEM;
use crate::hash::{Digest, completion_digest_of_ints, sha256};
use crate::sampling::{checks_every_row, group_digest, sample_groups, sample_seed_text, sampled_group_count};
use crate::window_file::{ReadRow, WindowFile};

/// Rows of one group, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub number: i64,
    pub rows: Vec<usize>,
}

/// Groups in order of first appearance. Rows without a group number are in none.
#[must_use]
pub fn groups(rows: &[ReadRow]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for (index, row) in rows.iter().enumerate() {
        let Some(number) = row.rollout_group else { continue };
        let place = *places.entry(number).or_insert(groups.len());
        if place == groups.len() {
            groups.push(Group { number, rows: Vec::with_capacity(ROLLOUTS_PER_PROBLEM) });
        }
        groups[place].rows.push(index);
    }
    groups
}

/// Digest of each group, in the order of `groups`: a function of all commits in it, so no miner can choose which groups are
/// drawn without making the proofs.
#[must_use]
pub fn group_digests(rows: &[ReadRow], groups: &[Group]) -> Vec<Digest> {
    let digest = |row: &usize| sha256(canonical_commit(&rows[*row].commit).as_bytes());
    groups.par_iter().map(|group| group_digest(&group.rows.iter().map(digest).collect::<Vec<_>>())).collect()
}

/// Indices of the rows that a validator with this `R_v` checks, ascending.
#[must_use]
pub fn sampled_rows(file: &WindowFile, context: &ValidationContext) -> Vec<usize> {
    if checks_every_row(file.rows.len()) {
        return (0..file.rows.len()).collect();
    }
    let groups = groups(&file.rows);
    let digests = group_digests(&file.rows, &groups);
    let seed_text = sample_seed_text(&context.hotkey, context.challenge.as_hex());
    let drawn = sample_groups(&seed_text, &digests, sampled_group_count(groups.len()));
    let mut rows: Vec<usize> = drawn.into_iter().flat_map(|group| groups[group].rows.iter().copied()).collect();
    rows.sort_unstable();
    rows
}

/// Whether every group among the rows at `indices` is whole and has the advantages of its rewards.
#[must_use]
pub fn groups_are_valid(rows: &[ReadRow], indices: &[usize]) -> bool {
    group_notes(rows, indices).is_empty()
}

/// What is wrong with each group that [`groups_are_valid`] refuses.
#[must_use]
pub fn group_notes(rows: &[ReadRow], indices: &[usize]) -> Vec<GroupNote> {
    let checked: HashSet<usize> = indices.iter().copied().collect();
    let note = |group: Group| {
        let members: Vec<_> = group.rows.iter().filter(|row| checked.contains(row)).map(|row| &rows[*row]).collect();
        if members.is_empty() {
            return None;
        }
        let detail = if members.len() == ROLLOUTS_PER_PROBLEM {
            advantages_defect(&members)?
        } else {
            format!("{} rows, must be {ROLLOUTS_PER_PROBLEM}", members.len())
        };
        Some(GroupNote { group: group.number, detail })
    };
    groups(rows).into_iter().filter_map(note).collect()
}

fn advantages_defect(members: &[&ReadRow]) -> Option<String> {
    let claimed: Option<Vec<f64>> = members.iter().map(|row| row.commit.rollout.advantage).collect();
    let rewards: Option<Vec<f64>> = members.iter().map(|row| row.commit.rollout.total_reward).collect();
    match claimed.zip(rewards) {
        Some((claimed, rewards)) => inconsistency(&claimed, &rewards),
        None => Some("an advantage or a reward is missing".to_owned()),
    }
}

/// Digest by which a completion counts as unique and by which copies between miners are found; `None` for a row without tokens.
#[must_use]
pub fn row_completion_digest(row: &ReadRow) -> Option<Digest> {
    let tokens: Vec<i64> = row.commit.tokens.plain()?.iter().map(|token| i64::from(*token)).collect();
    completion_digest_of_ints(&tokens, row.commit.rollout.prompt_length)
}
