//! The statistics over the probabilities of chosen tokens, and the check on them (§7 of the validator's rules).

use serde::{Deserialize, Serialize};

use crate::constants::{
    SAMPLING_HIGH_P, SAMPLING_INITIAL_WINDOW_STEPS, SAMPLING_LOW_P, SAMPLING_LOW_Q10_MAX, SAMPLING_MEDIAN_LOW_MAX,
    SAMPLING_MIN_STEPS, SAMPLING_MIN_TOKEN_PROB,
};

/// Statistics of one sequence of probabilities, in binary64.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistributionMetrics {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub median: f64,
    /// 10 % quantile, linearly interpolated.
    pub q10: f64,
    /// Least value.
    pub min: f64,
    /// Share up to 0.10.
    pub low_frac: f64,
    /// Share from 0.90 on.
    pub high_frac: f64,
    /// The share between, never negative.
    pub mid_frac: f64,
    /// Bimodality coefficient; 0 for a constant.
    pub bc: f64,
}

/// Statistics of `probabilities`; all NaN for none.
#[must_use]
pub fn metrics(probabilities: &[f32]) -> DistributionMetrics {
    let values: Vec<f64> = probabilities.iter().map(|probability| f64::from(*probability)).collect();
    let count = values.len() as f64;
    let mean_of = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / count;
    let mean = mean_of(&mut values.iter().copied());
    let low_frac = mean_of(&mut values.iter().map(|value| f64::from(u8::from(*value <= SAMPLING_LOW_P))));
    let high_frac = mean_of(&mut values.iter().map(|value| f64::from(u8::from(*value >= SAMPLING_HIGH_P))));
    let moment = |power: i32| mean_of(&mut values.iter().map(|value| (value - mean).powi(power)));
    let sorted = sorted_or_nan(&values);
    DistributionMetrics {
        mean,
        median: median(&sorted),
        q10: quantile(&sorted, 0.10),
        min: sorted.first().copied().unwrap_or(f64::NAN),
        low_frac,
        high_frac,
        mid_frac: (1.0 - low_frac - high_frac).max(0.0),
        bc: bimodality(moment(2), moment(3), moment(4)),
    }
}

/// Ascending; if any value is NaN then all are, as numpy's order statistics would be.
fn sorted_or_nan(values: &[f64]) -> Vec<f64> {
    if values.iter().any(|value| value.is_nan()) {
        return vec![f64::NAN; values.len()];
    }
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The quantile by linear interpolation, in numpy's order of operations.
#[expect(clippy::cast_possible_truncation, reason = "the place is floored and lies within the slice")]
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = last as f64 * share;
    let below = place as usize;
    let (low, high) = (sorted[below], sorted[(below + 1).min(last)]);
    let weight = place - below as f64;
    if weight < 0.5 { low + (high - low) * weight } else { high - (high - low) * (1.0 - weight) }
}

fn bimodality(variance: f64, third: f64, fourth: f64) -> f64 {
    if variance <= 1e-12 {
        return 0.0;
    }
    let skew = third / (variance.powf(1.5) + 1e-12);
    let kurtosis = fourth / (variance * variance + 1e-12);
    (skew * skew + 1.0) / kurtosis.max(1e-6)
}

/// The four conditions, each of which fails the check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuspicionReasons {
    /// Median up to 0.30.
    pub median_low: bool,
    /// Least probability up to 1e-5.
    pub min_low: bool,
    /// 10 % quantile up to 0.025.
    pub q10_low: bool,
    /// 10 % quantile of the first 50 probabilities up to 0.025.
    pub q10_low_initial: bool,
}

impl SuspicionReasons {
    /// True if any condition holds.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.median_low || self.min_low || self.q10_low || self.q10_low_initial
    }
}

/// Result of the check on one completion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DistributionVerdict {
    /// Fewer than 30 probabilities: the check fails without statistics.
    Insufficient,
    /// The statistics decided.
    Assessed {
        /// Over all probabilities.
        metrics: DistributionMetrics,
        /// Over the first 50 at most.
        initial: DistributionMetrics,
        /// What failed.
        reasons: SuspicionReasons,
    },
}

impl DistributionVerdict {
    /// True if the check passes.
    #[must_use]
    pub const fn passes(&self) -> bool {
        match self {
            Self::Insufficient => false,
            Self::Assessed { reasons, .. } => !reasons.any(),
        }
    }
}

/// Checks the probabilities of a completion's tokens, in order.
///
/// They come from f32 logits: repetition penalty (if it is not 1) over the prefix, then temperature (if it is not 1), then
/// softmax; without top-k and top-p.
#[must_use]
pub fn assess(probabilities: &[f32]) -> DistributionVerdict {
    if probabilities.len() < SAMPLING_MIN_STEPS {
        return DistributionVerdict::Insufficient;
    }
    let all = metrics(probabilities);
    let initial = metrics(&probabilities[..probabilities.len().min(SAMPLING_INITIAL_WINDOW_STEPS)]);
    let reasons = SuspicionReasons {
        median_low: all.median <= SAMPLING_MEDIAN_LOW_MAX,
        min_low: all.min <= SAMPLING_MIN_TOKEN_PROB,
        q10_low: all.q10 <= SAMPLING_LOW_Q10_MAX,
        q10_low_initial: initial.q10 <= SAMPLING_LOW_Q10_MAX,
    };
    DistributionVerdict::Assessed { metrics: all, initial, reasons }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reasons(probabilities: &[f32]) -> SuspicionReasons {
        match assess(probabilities) {
            DistributionVerdict::Assessed { reasons, .. } => reasons,
            DistributionVerdict::Insufficient => panic!("30 probabilities are enough"),
        }
    }

    #[test]
    fn statistics_equal_numpys() {
        // From numpy, with moments of the population.
        let measured = metrics(&[0.0625, 0.125, 0.25, 0.5, 1.0, 0.75, 0.9375]);
        let expected = [
            (measured.mean, 0.517_857_142_857_142_9),
            (measured.median, 0.5),
            (measured.q10, 0.1),
            (measured.min, 0.0625),
            (measured.low_frac, 1.0 / 7.0),
            (measured.high_frac, 2.0 / 7.0),
            (measured.mid_frac, 4.0 / 7.0),
            (measured.bc, 0.721_598_494_941_377_4),
        ];
        for (index, (got, wanted)) in expected.into_iter().enumerate() {
            assert!((got - wanted).abs() < 1e-12, "statistic {index}: {got} instead of {wanted}");
        }
        assert_eq!(metrics(&[0.5; 40]).bc.to_bits(), 0.0_f64.to_bits());
    }

    #[test]
    fn each_condition_is_found_alone() {
        let good = [0.8_f32; 100];
        assert_eq!(reasons(&good), SuspicionReasons::default());
        assert!(assess(&good).passes());
        assert!(!assess(&good[..29]).passes() && assess(&good[..30]).passes());

        assert_eq!(reasons(&[0.29; 100]), SuspicionReasons { median_low: true, ..Default::default() });
        let mut rare = good;
        rare[99] = 1e-6;
        assert_eq!(reasons(&rare), SuspicionReasons { min_low: true, ..Default::default() });
        let mut late = good;
        late[80..95].fill(0.01);
        assert_eq!(reasons(&late), SuspicionReasons { q10_low: true, ..Default::default() });
        let mut early = good;
        early[..8].fill(0.01);
        assert_eq!(reasons(&early), SuspicionReasons { q10_low_initial: true, ..Default::default() });
    }

    #[test]
    fn nan_makes_statistics_nan_and_trips_nothing() {
        let mut broken = [0.01_f32; 100];
        broken[7] = f32::NAN;
        assert!(metrics(&broken).median.is_nan());
        assert!(!reasons(&broken).any());
    }
}
