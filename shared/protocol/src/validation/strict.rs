//! Findings beyond the reference's checks (validation §11), and how exactly a file agrees with the model.

use std::collections::HashMap;

use rayon::prelude::*;

use super::context::{Facts, Forward};
use super::groups::row_completion_digest;
use super::proof::{Claimed, claimed_logprob, claimed_sketch};
use super::report::{Exactness, Finding, FindingCode, RowExactness};
use crate::constants::PRIME_Q;
use crate::hash::Digest;
use crate::ids::{BlockHash, Hotkey, Nonce};
use crate::nonce::challenge_text;
use crate::sketch::modular_distance;
use crate::window_file::{ReadRow, WindowFile};

/// Largest difference of two logprobs that count as equal.
const EQUAL_LOGPROB: f64 = 1e-4;

/// Share of equal values below which a row is named.
const ROW_SHARE: f64 = 0.99;

/// Median distance of an honest proof's sketches at most; most are 0.
const HONEST_MEDIAN_DISTANCE: u32 = 200;

/// Distance that at most [`HONEST_FAR_SHARE`] of an honest proof's sketches exceed.
const HONEST_DISTANCE: u32 = 1_500;
const HONEST_FAR_SHARE: f64 = 0.05;

/// Length of the miner's randomness.
const RANDOMNESS_DIGITS: usize = 64;

/// All findings, by row.
pub(super) fn findings(file: &WindowFile, hotkey: &Hotkey, window_hash: &BlockHash, facts: &Facts) -> Vec<Finding> {
    let mut findings: Vec<Finding> = file
        .rows
        .par_iter()
        .enumerate()
        .flat_map_iter(|(index, row)| {
            let mut notes = Notes { row: index, findings: Vec::new() };
            notes.identity(row, hotkey, window_hash);
            notes.commit(row);
            if let Some(facts) = facts.rows.get(&index) {
                if let Ok(evaluation) = facts.evaluation {
                    notes.success(row, evaluation.success);
                }
                if let Ok(forward) = &facts.forward {
                    notes.distances(row, forward);
                }
            }
            notes.findings
        })
        .collect();
    findings.extend(order_of_groups(&file.rows));
    findings.extend(repeated_completions(&file.rows));
    findings.sort_by_key(|finding| (finding.row, finding.code));
    findings
}

fn finding(row: usize, code: FindingCode, detail: impl Into<String>) -> Finding {
    Finding { code, severity: code.severity(), row, detail: detail.into() }
}

struct Notes {
    row: usize,
    findings: Vec<Finding>,
}

impl Notes {
    fn note(&mut self, code: FindingCode, detail: impl Into<String>) {
        self.findings.push(finding(self.row, code, detail));
    }

    fn identity(&mut self, row: &ReadRow, hotkey: &Hotkey, window_hash: &BlockHash) {
        if row.hotkey.as_deref() != Some(hotkey.0.as_str()) {
            let claimed = row.hotkey.as_deref().unwrap_or("null");
            self.note(FindingCode::ForeignHotkey, format!("the row's hotkey is {claimed}, the wallet's {hotkey}"));
        }
        let expected = row.nonce.map(|nonce| challenge_text(window_hash, Nonce(nonce)));
        if row.challenge.is_none() || row.challenge != expected {
            let claimed = row.challenge.as_deref().unwrap_or("null");
            let expected = expected.as_deref().unwrap_or("unknown without a nonce");
            self.note(FindingCode::WrongChallenge, format!("the challenge is {claimed:?}, expected {expected:?}"));
        }
        let expected = row
            .rollout_group
            .zip(row.rollout_index)
            .and_then(|(group, index)| group.checked_mul(16)?.checked_add(index).filter(|_| (0..16).contains(&index)));
        if row.nonce.is_none() || row.nonce != expected {
            let text = |nonce: Option<i64>| nonce.map_or_else(|| "null".to_owned(), |nonce| nonce.to_string());
            let (nonce, expected) = (text(row.nonce), text(expected));
            self.note(FindingCode::WrongNonce, format!("nonce {nonce}, from group and rollout {expected}"));
        }
    }

    fn commit(&mut self, row: &ReadRow) {
        let beacon = row.commit.beacon_randomness();
        let text = beacon.unwrap_or_default();
        let strange = text.chars().position(|digit| !matches!(digit, '0'..='9' | 'a'..='f'));
        if let Some(position) = strange {
            let what = format!("character {position} of the beacon's randomness is no lower-case hexadecimal digit");
            self.note(FindingCode::RandomnessForm, what);
        } else if text.len() != RANDOMNESS_DIGITS {
            let what = format!("the beacon's randomness has {} digits, must have {RANDOMNESS_DIGITS}", text.len());
            self.note(FindingCode::RandomnessForm, what);
        }
        if row.randomness.is_none() || row.randomness.as_deref() != beacon {
            let column = row.randomness.as_deref().unwrap_or("null");
            let beacon = beacon.unwrap_or("null");
            self.note(
                FindingCode::RandomnessColumn,
                format!("the randomness column is {column}, the beacon's {beacon}"),
            );
        }
        let positions = row.commit.commitments.len().unwrap_or(0);
        let out_of_range = |position: &usize| match claimed_sketch(&row.commit.commitments, *position) {
            Some(Claimed::Int(sketch)) => !(0..i64::from(PRIME_Q)).contains(&sketch),
            Some(Claimed::Other(_)) | None => true,
        };
        let wrong: Vec<usize> = (0..positions).filter(out_of_range).collect();
        if let Some(first) = wrong.first() {
            let count = wrong.len();
            let value = match claimed_sketch(&row.commit.commitments, *first) {
                Some(Claimed::Int(sketch)) => sketch.to_string(),
                Some(Claimed::Other(value)) => {
                    value.to_bigint().map_or("no integer".to_owned(), |sketch| sketch.to_string())
                }
                None => "missing".to_owned(),
            };
            self.note(
                FindingCode::SketchOutOfRange,
                format!(
                    "{count} of {positions} sketches are outside 0..{PRIME_Q}, the first at position {first} is {value}"
                ),
            );
        }
        let logprobs = &row.commit.rollout.token_logprobs;
        let completion = row.commit.prompt_length().unwrap_or(0)..logprobs.len();
        let total = completion.len();
        let nan: Vec<usize> =
            completion.filter(|position| claimed_logprob(logprobs, *position).is_some_and(f64::is_nan)).collect();
        if let Some(first) = nan.first() {
            let count = nan.len();
            self.note(
                FindingCode::NanLogprob,
                format!("{count} of {total} logprobs of the completion are NaN, the first at position {first}"),
            );
        }
    }

    fn success(&mut self, row: &ReadRow, success: bool) {
        let claimed = row.commit.rollout.success;
        if claimed.is_some_and(|claimed| claimed != success) {
            self.note(FindingCode::SuccessDiffers, format!("claimed success {}, environment says {success}", !success));
        }
    }

    fn distances(&mut self, row: &ReadRow, forward: &Forward) {
        let distances: Vec<(i128, usize)> = forward
            .sketches
            .iter()
            .enumerate()
            .filter_map(|(position, model)| match claimed_sketch(&row.commit.commitments, position)? {
                Claimed::Int(claimed) => Some((modular_distance(claimed, i64::from(*model)).abs(), position)),
                Claimed::Other(_) => None,
            })
            .collect();
        let Some((largest, position)) = distances.iter().max().copied() else { return };
        let mut distances: Vec<i128> = distances.into_iter().map(|(distance, _)| distance).collect();
        distances.sort_unstable();
        let median = distances[distances.len() / 2];
        let far = distances.iter().filter(|distance| **distance > i128::from(HONEST_DISTANCE)).count();
        let far = share(far, distances.len());
        if median > i128::from(HONEST_MEDIAN_DISTANCE) || far > HONEST_FAR_SHARE {
            self.note(
                FindingCode::SketchDistance,
                format!(
                    "median sketch distance {median}, honest up to {HONEST_MEDIAN_DISTANCE}; {:.1} % above \
                     {HONEST_DISTANCE}, honest up to {:.1} %; the largest is {largest} at position {position}",
                    far * 100.0,
                    HONEST_FAR_SHARE * 100.0
                ),
            );
        }
    }
}

/// The first row of each group whose number is not above that of the group before it.
fn order_of_groups(rows: &[ReadRow]) -> Vec<Finding> {
    let changes = rows.windows(2).enumerate().filter_map(|(index, pair)| {
        let [before, after] = pair else { return None };
        let (before, after) = before.rollout_group.zip(after.rollout_group)?;
        (after < before).then(|| {
            finding(index + 1, FindingCode::GroupsNotAscending, format!("group {after} stands after group {before}"))
        })
    });
    changes.collect()
}

fn repeated_completions(rows: &[ReadRow]) -> Vec<Finding> {
    let digests: Vec<Option<Digest>> = rows.par_iter().map(row_completion_digest).collect();
    let mut first: HashMap<Digest, usize> = HashMap::with_capacity(rows.len());
    let mut findings = Vec::new();
    for (row, digest) in digests.into_iter().enumerate() {
        let Some(digest) = digest else { continue };
        let earlier = *first.entry(digest).or_insert(row);
        if earlier != row {
            let detail = format!("the completion is that of row {earlier}: it does not count again");
            findings.push(finding(row, FindingCode::RepeatedCompletion, detail));
        }
    }
    findings
}

/// Shares of equal sketches and logprobs over all rows whose forward pass is known.
pub(super) fn exactness(file: &WindowFile, facts: &Facts) -> Exactness {
    let counts: Vec<(usize, Equal)> = file
        .rows
        .par_iter()
        .enumerate()
        .filter_map(|(index, row)| {
            let forward = facts.rows.get(&index)?.forward.as_ref().ok()?;
            Some((index, Equal::of(row, forward)))
        })
        .collect();
    let total = counts.iter().fold(Equal::default(), |total, (_, equal)| total.plus(equal));
    let rows_below = counts.iter().filter_map(|(row, equal)| {
        let exactness = RowExactness {
            row: *row,
            sketch_equal: share(equal.sketches, equal.positions),
            logprob_equal: share(equal.logprobs, equal.completion),
        };
        (exactness.sketch_equal < ROW_SHARE || exactness.logprob_equal < ROW_SHARE).then_some(exactness)
    });
    Exactness {
        sketch_equal: (total.positions > 0).then(|| share(total.sketches, total.positions)),
        logprob_equal: (total.completion > 0).then(|| share(total.logprobs, total.completion)),
        rows_below: rows_below.collect(),
    }
}

/// Equal values of a row, and how many there are.
#[derive(Debug, Clone, Copy, Default)]
struct Equal {
    sketches: usize,
    positions: usize,
    logprobs: usize,
    completion: usize,
}

impl Equal {
    fn of(row: &ReadRow, forward: &Forward) -> Self {
        let sketches = forward.sketches.iter().enumerate().filter(|(position, model)| {
            let claimed = claimed_sketch(&row.commit.commitments, *position);
            matches!(claimed, Some(Claimed::Int(claimed)) if claimed == i64::from(**model))
        });
        let prompt_length = forward.sketches.len() - forward.logprobs.len().min(forward.sketches.len());
        let logprobs = forward.logprobs.iter().enumerate().filter(|(offset, model)| {
            let claimed = claimed_logprob(&row.commit.rollout.token_logprobs, prompt_length + offset);
            claimed.is_some_and(|claimed| is_equal_logprob(claimed, f64::from(**model)))
        });
        Self {
            sketches: sketches.count(),
            positions: forward.sketches.len(),
            logprobs: logprobs.count(),
            completion: forward.logprobs.len(),
        }
    }

    const fn plus(self, other: &Self) -> Self {
        Self {
            sketches: self.sketches + other.sketches,
            positions: self.positions + other.positions,
            logprobs: self.logprobs + other.logprobs,
            completion: self.completion + other.completion,
        }
    }
}

fn is_equal_logprob(claimed: f64, model: f64) -> bool {
    #[expect(clippy::float_cmp, reason = "equal infinities have no difference")]
    let same = claimed == model;
    same || (claimed - model).abs() <= EQUAL_LOGPROB
}

/// Share of `part` in `whole`; 1 of nothing.
#[expect(clippy::cast_precision_loss, reason = "counts of tokens are far below 2^53")]
fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}
