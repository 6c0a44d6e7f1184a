//! Which groups of a file a validator checks (§3 of the validator's rules).

use crate::constants::{MAX_SAMPLES_PER_MINER, MAX_SAMPLES_PER_MINER_THRESHOLD, ROLLOUTS_PER_PROBLEM, SAMPLE_RATE};
use crate::hash::{Digest, sha256};
use crate::ids::Hotkey;
use crate::json::{Style, Value};
use crate::python_random::PythonRandom;

/// True if a file of `rows` rows is checked whole.
#[must_use]
pub const fn checks_every_row(rows: usize) -> bool {
    rows <= MAX_SAMPLES_PER_MINER_THRESHOLD
}

/// Number of groups checked of the `groups` that a file holds: a tenth, at least one, at most four.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the reference truncates the same product")]
pub fn sampled_group_count(groups: usize) -> usize {
    let share = (groups as f64 * SAMPLE_RATE) as usize;
    share.min(groups).clamp(1, MAX_SAMPLES_PER_MINER / ROLLOUTS_PER_PROBLEM)
}

/// SHA-256 of the compact JSON, keys sorted, of one commit as it was read from the file.
#[must_use]
pub fn commit_digest(commit: &Value) -> Digest {
    sha256(commit.to_json(Style::CompactSorted).as_bytes())
}

/// Digest of a group: SHA-256 over the [`commit_digest`]s of its rows in ascending order of the file.
#[must_use]
pub fn group_digest(commit_digests: &[Digest]) -> Digest {
    sha256(commit_digests.as_flattened())
}

/// The text whose hash seeds the draw: `{hotkey}:{R_v}`.
#[must_use]
pub fn sample_seed_text(hotkey: &Hotkey, challenge_randomness: &str) -> String {
    format!("{hotkey}:{challenge_randomness}")
}

/// Order of the groups before the draw: indices into `digests` by digest; equal digests keep the order of first appearance.
#[must_use]
pub fn order_by_digest(digests: &[Digest]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..digests.len()).collect();
    order.sort_by_key(|index| digests[*index]);
    order
}

/// Draws `count` groups (all if there are fewer).
///
/// * `seed_text`: see [`sample_seed_text`].
/// * `digests`: one [`group_digest`] for each group, in order of first appearance in the file.
///
/// Returns indices into `digests`, in the order of the draw.
#[must_use]
pub fn sample_groups(seed_text: &str, digests: &[Digest], count: usize) -> Vec<usize> {
    let [a, b, c, d, e, f, g, h, ..] = sha256(seed_text.as_bytes());
    let mut random = PythonRandom::from_u64(u64::from_be_bytes([a, b, c, d, e, f, g, h]));
    let ordered = order_by_digest(digests);
    let drawn = random.sample_indices(ordered.len(), count.min(ordered.len())).expect("count was bounded");
    drawn.into_iter().map(|place| ordered[place]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_the_groups_is_sampled_between_one_and_four() {
        for (groups, sampled) in [(1, 1), (2, 1), (19, 1), (20, 2), (29, 2), (30, 3), (40, 4), (45, 4), (312, 4)] {
            assert_eq!(sampled_group_count(groups), sampled, "{groups}");
        }
        assert!(checks_every_row(20) && !checks_every_row(21));
    }

    #[test]
    fn equal_digests_keep_their_order_and_a_draw_of_all_is_a_permutation() {
        let digests = [[3; 32], [1; 32], [3; 32], [0; 32]];
        assert_eq!(order_by_digest(&digests), [3, 1, 0, 2]);
        let mut drawn = sample_groups("seed", &digests, 9);
        drawn.sort_unstable();
        assert_eq!(drawn, [0, 1, 2, 3]);
        assert_eq!(sample_groups("seed", &[], 4), Vec::<usize>::new());
    }
}
