//! Advantages of a group (protocol §8.2). Computed here and nowhere else, in the reference's order.

pub use crate::python_math::python_sum;

use crate::constants::{GRPO_ADV_SUM_TOLERANCE, GRPO_ADV_TOLERANCE};

/// Least divisor, so that equal rewards give zeros.
const MIN_DEVIATION: f64 = 1e-8;

/// Each reward less the mean, divided by the population standard deviation.
#[must_use]
pub fn advantages(rewards: &[f64]) -> Vec<f64> {
    let count = rewards.len() as f64;
    let mean = python_sum(rewards.iter().copied()) / count;
    let centred: Vec<f64> = rewards.iter().map(|reward| reward - mean).collect();
    let variance = python_sum(centred.iter().map(|difference| difference * difference)) / count;
    // Python's `max(deviation, 1e-8)` keeps a NaN, which `f64::max` would not.
    let deviation = variance.powf(0.5);
    let divisor = if MIN_DEVIATION > deviation { MIN_DEVIATION } else { deviation };
    centred.into_iter().map(|difference| difference / divisor).collect()
}

/// True if the claimed advantages of a group sum to nothing and equal those of its rewards, each within the validator's
/// tolerance. NaN never passes.
#[must_use]
pub fn are_consistent(claimed: &[f64], rewards: &[f64]) -> bool {
    inconsistency(claimed, rewards).is_none()
}

/// What keeps the claimed advantages from being [consistent](are_consistent), with both numbers.
#[must_use]
pub fn inconsistency(claimed: &[f64], rewards: &[f64]) -> Option<String> {
    let recomputed = advantages(rewards);
    if claimed.len() != recomputed.len() {
        return Some(format!("{} advantages for {} rewards", claimed.len(), recomputed.len()));
    }
    let is_close = |(claim, expected): (&f64, &f64)| (claim - expected).abs() <= GRPO_ADV_TOLERANCE;
    if let Some(rollout) = claimed.iter().zip(&recomputed).position(|pair| !is_close(pair)) {
        let (claim, expected) = (claimed[rollout], recomputed[rollout]);
        return Some(format!(
            "the advantage at {rollout} is {claim}, from the rewards {expected}; {GRPO_ADV_TOLERANCE} apart is allowed"
        ));
    }
    let sum = python_sum(claimed.iter().copied()).abs();
    let is_small = sum <= GRPO_ADV_SUM_TOLERANCE;
    (!is_small).then(|| format!("the advantages sum to {sum}, at most {GRPO_ADV_SUM_TOLERANCE} is allowed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consistency_has_both_tolerances_and_refuses_nan() {
        let mut rewards = [0.0; 16];
        rewards[0] = 1.0;
        let exact = advantages(&rewards);
        let shifted = |index: usize, by: f64| {
            let mut claimed = exact.clone();
            claimed[index] += by;
            claimed
        };
        assert!(are_consistent(&exact, &rewards));
        assert!(are_consistent(&shifted(3, 0.000_9), &rewards));
        assert!(!are_consistent(&shifted(3, 0.001_1), &rewards));
        assert!(!are_consistent(&shifted(3, f64::NAN), &rewards));
        assert!(!are_consistent(&exact[1..], &rewards));
        let all_shifted: Vec<f64> = exact.iter().map(|advantage| advantage + 0.000_9).collect();
        assert!(!are_consistent(&all_shifted, &rewards), "each is close, but the sum is 0.0144");
        for (claimed, expected) in [
            (shifted(3, 1.0), "the advantage at 3 is 0.74"),
            (shifted(3, f64::NAN), "the advantage at 3 is NaN, from the rewards -0.25"),
            (exact[1..].to_vec(), "15 advantages for 16 rewards"),
            (all_shifted, "the advantages sum to 0.0144"),
        ] {
            let text = inconsistency(&claimed, &rewards).unwrap();
            assert!(text.starts_with(expected), "{text}");
        }
    }
}
