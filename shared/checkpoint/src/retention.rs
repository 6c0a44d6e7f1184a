//! Which cached checkpoints may go. Pure: the caller removes them.

use std::collections::BTreeSet;
use std::time::Duration;

use grail_protocol::ids::CheckpointWindow;

/// A folder of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cached {
    pub window: CheckpointWindow,
    pub bytes: u64,
    /// Time since it was installed.
    pub age: Duration,
}

/// What the cache may hold beside the checkpoints in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetentionLimits {
    /// Checkpoints in total.
    pub checkpoints: usize,
    /// Bytes in total.
    pub bytes: u64,
    /// Time since the installation; `None` sets no limit.
    pub max_age: Option<Duration>,
}

/// The checkpoints to remove, oldest first. Those `in_use` stay whatever the limits say: the active one, its base, and all
/// that a server or a worker points at. Of the others the newest stay while all limits allow it.
#[must_use]
pub fn removable(
    cached: &[Cached],
    in_use: &BTreeSet<CheckpointWindow>,
    limits: &RetentionLimits,
) -> Vec<CheckpointWindow> {
    let (kept, mut others): (Vec<Cached>, Vec<Cached>) =
        cached.iter().partition(|checkpoint| in_use.contains(&checkpoint.window));
    others.sort_unstable_by_key(|checkpoint| std::cmp::Reverse(checkpoint.window));
    let (mut aged, others): (Vec<Cached>, Vec<Cached>) =
        others.into_iter().partition(|checkpoint| limits.max_age.is_some_and(|limit| checkpoint.age > limit));
    let mut count = kept.len();
    let mut bytes = kept.iter().fold(0_u64, |sum, checkpoint| sum.saturating_add(checkpoint.bytes));
    let stays = others.iter().take_while(|checkpoint| {
        count += 1;
        bytes = bytes.saturating_add(checkpoint.bytes);
        count <= limits.checkpoints && bytes <= limits.bytes
    });
    let stays = stays.count();
    aged.extend_from_slice(&others[stays..]);
    aged.sort_unstable_by_key(|checkpoint| checkpoint.window);
    aged.iter().map(|checkpoint| checkpoint.window).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The age of a checkpoint is the distance of its window to 1000, in seconds.
    fn cached(windows: &[u64]) -> Vec<Cached> {
        windows
            .iter()
            .map(|window| Cached {
                window: CheckpointWindow(*window),
                bytes: 10,
                age: Duration::from_secs(1000 - window),
            })
            .collect()
    }

    fn removed(windows: &[u64], in_use: &[u64], checkpoints: usize, bytes: u64) -> Vec<u64> {
        removed_by(windows, in_use, &RetentionLimits { checkpoints, bytes, max_age: None })
    }

    fn removed_by(windows: &[u64], in_use: &[u64], limits: &RetentionLimits) -> Vec<u64> {
        let in_use = in_use.iter().copied().map(CheckpointWindow).collect();
        removable(&cached(windows), &in_use, limits).into_iter().map(|window| window.0).collect()
    }

    #[test]
    fn the_old_go_even_where_there_is_room() {
        let limits = RetentionLimits { checkpoints: 9, bytes: 1000, max_age: Some(Duration::from_secs(1000 - 60)) };
        assert_eq!(removed_by(&[30, 90, 60, 120], &[], &limits), [30]);
        assert_eq!(removed_by(&[30, 90, 0, 120], &[0], &limits), [30]);
        assert_eq!(removed_by(&[30, 90, 60, 120], &[], &RetentionLimits { checkpoints: 1, ..limits }), [30, 60, 90]);
    }

    #[test]
    fn the_newest_stay() {
        assert_eq!(removed(&[30, 90, 60, 120], &[], 2, 1000), [30, 60]);
        assert_eq!(removed(&[30, 90, 60, 120], &[], 9, 25), [30, 60]);
        assert_eq!(removed(&[30, 60], &[], 9, 1000), [0; 0]);
    }

    #[test]
    fn what_is_in_use_stays_even_beyond_the_limits() {
        assert_eq!(removed(&[30, 60, 90], &[30], 1, 5), [60, 90]);
        assert_eq!(removed(&[30, 60, 90], &[30], 2, 1000), [60]);
        assert_eq!(removed(&[30, 60], &[30, 60], 0, 0), [0; 0]);
    }

    proptest! {
        #[test]
        fn nothing_in_use_is_ever_named(
            windows in proptest::collection::btree_set(0_u64..50, 0..12),
            in_use in proptest::collection::btree_set(0_u64..50, 0..6),
            checkpoints in 0_usize..6,
        ) {
            let windows: Vec<u64> = windows.into_iter().collect();
            let used: Vec<u64> = in_use.iter().copied().collect();
            let removed = removed(&windows, &used, checkpoints, u64::MAX);
            prop_assert!(removed.iter().all(|window| !in_use.contains(window) && windows.contains(window)));
            let held = windows.iter().filter(|window| in_use.contains(window)).count();
            prop_assert_eq!(windows.len() - removed.len(), held.max(checkpoints.min(windows.len())));
        }
    }
}
