//! Which miners are checked, which copy, and what they earn (§1, §9 and §10 of the validator's rules).

use std::collections::{BTreeMap, HashMap};

use crate::constants::{
    GRAIL_BURN_PERCENTAGE, GRAIL_BURN_UID, MINER_SAMPLE_MAX, MINER_SAMPLE_MIN, MINER_SAMPLE_RATE, SUPERLINEAR_EXPONENT,
    UNIQUE_ROLLOUTS_CAP, WEIGHT_ROLLING_WINDOWS, WINDOW_LENGTH,
};
use crate::hash::{Digest, sha256};
use crate::ids::{BlockHash, Hotkey, WindowStart};
use crate::python_math::python_fsum;

/// Number of miners checked of the `eligible` ones.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a quarter of a small count, rounded up")]
pub fn miner_sample_size(eligible: usize) -> usize {
    let share = (eligible as f64 * MINER_SAMPLE_RATE).ceil() as usize;
    share.clamp(MINER_SAMPLE_MIN, MINER_SAMPLE_MAX).min(eligible)
}

/// The miners checked in a window: those selected least often lately, among these by a hash of window and hotkey.
///
/// * `eligible`: active miners without a recent failure.
/// * `recent_selections`: how often each was selected in the last 12 windows; missing counts as never.
#[must_use]
pub fn select_miners(
    eligible: &[Hotkey],
    window_hash: &BlockHash,
    recent_selections: &HashMap<Hotkey, u64>,
) -> Vec<Hotkey> {
    let tie_break = |hotkey: &Hotkey| {
        let [a, b, c, d, e, f, g, h, ..] = sha256(format!("{window_hash}:{hotkey}").as_bytes());
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    };
    let mut order: Vec<&Hotkey> = eligible.iter().collect();
    order.sort_by_cached_key(|hotkey| (recent_selections.get(hotkey).copied().unwrap_or(0), tie_break(hotkey)));
    order.into_iter().take(miner_sample_size(eligible.len())).cloned().collect()
}

/// Share of equal completions between two miners: the common ones, counted with repetition, over the rows of the smaller file.
/// 0 if one has no rows.
#[must_use]
pub fn copycat_ratio(left: &HashMap<Digest, u64>, right: &HashMap<Digest, u64>) -> f64 {
    let shared: u64 = left.iter().map(|(digest, count)| (*count).min(right.get(digest).copied().unwrap_or(0))).sum();
    let rows = left.values().sum::<u64>().min(right.values().sum());
    if rows == 0 { 0.0 } else { shared as f64 / rows as f64 }
}

/// Result of one miner in one window in which it was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowScore {
    /// Unique completions, extrapolated from the checked rows.
    pub estimated_unique: u64,
    /// Whether the miner failed.
    pub had_failure: bool,
}

/// What a weight is computed from.
#[derive(Clone, Copy, Debug)]
pub struct MinerRecord<'a> {
    /// UID on the subnet.
    pub uid: u16,
    /// Results by window.
    pub windows: &'a BTreeMap<WindowStart, WindowScore>,
    /// Windows of the interval in which the miner had a file.
    pub windows_active: u64,
}

impl MinerRecord<'_> {
    /// Fourth power of the share of the cap that the miner reached over the last 12 windows up to `target`.
    fn cap_share(&self, target: WindowStart) -> f64 {
        const CAP: f64 = (UNIQUE_ROLLOUTS_CAP * WEIGHT_ROLLING_WINDOWS) as f64;
        let first = target.block().0.saturating_sub((WEIGHT_ROLLING_WINDOWS - 1) * WINDOW_LENGTH);
        let recent = || self.windows.iter().filter(|(start, _)| (first..=target.block().0).contains(&start.block().0));
        let checked = recent().count();
        if self.windows_active == 0 || checked == 0 || recent().any(|(_, score)| score.had_failure) {
            return 0.0;
        }
        let unique: u64 = recent().map(|(_, score)| score.estimated_unique).sum();
        let extrapolated = unique as f64 * (self.windows_active as f64 / checked as f64);
        extrapolated.min(CAP).powf(SUPERLINEAR_EXPONENT) / CAP.powf(SUPERLINEAR_EXPONENT)
    }
}

/// Weights of all miners, in their order; they sum to 1 if the burn UID is among them.
///
/// 90 % burns to UID 0, and with it whatever the miners together leave of their tenth. Without UID 0 the shares are returned
/// unburnt, as the reference does.
#[must_use]
pub fn weights(miners: &[MinerRecord<'_>], target: WindowStart) -> Vec<f64> {
    let mut shares: Vec<f64> = miners.iter().map(|miner| miner.cap_share(target)).collect();
    let total = python_fsum(shares.iter().copied());
    if total > 1.0 {
        shares.iter_mut().for_each(|share| *share /= total);
    }
    let Some(burn) = miners.iter().position(|miner| miner.uid == GRAIL_BURN_UID) else { return shares };
    if total <= 0.0 {
        shares.fill(0.0);
        shares[burn] = 1.0;
        return shares;
    }
    let for_miners = 1.0 - GRAIL_BURN_PERCENTAGE / 100.0;
    let scale = for_miners.min(for_miners * total) / python_fsum(shares.iter().copied());
    shares.iter_mut().for_each(|share| *share *= scale);
    shares[burn] = 0.0;
    shares[burn] = 1.0 - python_fsum(shares.iter().copied());
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_count_with_repetition_over_the_smaller_file() {
        let file = |counts: &[(u8, u64)]| counts.iter().map(|(digest, count)| ([*digest; 32], *count)).collect();
        let left: HashMap<Digest, u64> = file(&[(1, 3), (2, 1)]);
        let right = file(&[(1, 2), (3, 38)]);
        assert!((copycat_ratio(&left, &right) - 0.5).abs() < 1e-12);
        assert_eq!(copycat_ratio(&left, &right).to_bits(), copycat_ratio(&right, &left).to_bits());
        assert_eq!(copycat_ratio(&left, &HashMap::new()).to_bits(), 0.0_f64.to_bits());
    }

    #[test]
    fn without_the_burn_uid_nothing_burns() {
        let window = WindowStart::containing(crate::ids::BlockNumber(600));
        let score = WindowScore { estimated_unique: 5_000, had_failure: false };
        let windows = BTreeMap::from([(window, score)]);
        let miner = MinerRecord { uid: 5, windows: &windows, windows_active: 12 };
        assert_eq!(weights(&[miner], window), [1.0]);
    }

    #[test]
    fn what_the_miners_leave_burns() {
        let window = WindowStart::containing(crate::ids::BlockNumber(600));
        let score = WindowScore { estimated_unique: 2_500, had_failure: false };
        let windows = BTreeMap::from([(window, score)]);
        let none = BTreeMap::new();
        let burn = MinerRecord { uid: 0, windows: &none, windows_active: 0 };
        let miner = MinerRecord { uid: 5, windows: &windows, windows_active: 12 };
        let computed = weights(&[burn, miner], window);
        assert!((computed[1] - 0.1 * 0.0625).abs() < 1e-12);
        assert!((computed[0] + computed[1] - 1.0).abs() < 1e-12);
    }
}
